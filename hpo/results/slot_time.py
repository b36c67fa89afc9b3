"""Slot time: what the slots of a search did, and why they were idle.

A slot is what one trial takes: a GPU, several or a part of one, or a CPU on a machine without GPUs. Times are
slot-seconds in this module, and slot-minutes in run.json and in the log. The time before the search (Slurm's queue,
loading) and after it (the test of the best model) does not count.
"""

import math
import time

import ray
from ray.tune import Callback
from ray.tune.experiment import Trial

from hpo.results.slots import slots_of

# What a running trial does. "run again": iterations that were reported before; they
# were lost in an interruption, or the trial was stopped and is finished now.
WORK = ("training", "evaluation", "checkpoints", "run again")
# Why a slot is idle, see SlotTime.
IDLE = ("start-up", "rungs", "tail", "faults", "not asked for")


class SlotTime(Callback):
    """Adds up what the slots do. The time of an idle slot is counted under one cause.

    - start-up: no trial has reported yet, or none since a --resume
    - faults: a trial whose worker process was lost waits for another one
    - tail: fewer trials are left than there are slots
    - rungs: trials are paused until all trials of their rung have reported
    - not asked for: the slot is above --max_concurrent_trials

    Args:
        log: a TrialLog; its `trials` and `num_samples` are used.
        resources: {"cpu", "gpu"} of a trial.
        at_a_time: --max_concurrent_trials.
        searcher: a TuneBOHB; is told the number of slots.
    """

    EVERY = 5.0  # seconds between two counts of the slots: nodes join and leave

    def __init__(self, log, resources: dict[str, float], at_a_time: int, searcher):
        self.log, self.resources, self.at_a_time, self.searcher = log, resources, at_a_time, searcher
        self.spent = dict.fromkeys(("running", *WORK, *IDLE, "given back", "search"), 0.0)
        self.seen: set[tuple[str, int]] = set()  # iterations that were reported
        self.lost: set[str] = set()  # trials whose worker process was lost
        self.reported = False  # whether any trial has reported since the start of this process
        self.slots, self.counted_at = 0, 0.0
        self.added_at: float | None = None  # until when the time has been added

    def get_state(self) -> dict:
        """The state as plain data."""
        return {"spent": self.spent, "seen": sorted(self.seen)}

    def set_state(self, state: dict) -> None:
        """Goes on from a state."""
        self.spent |= state["spent"]  # older states have no "search"
        self.seen = {tuple(pair) for pair in state["seen"]}

    # -- what Tune calls ----------------------------------------------------------------------------------------------

    def on_trial_start(self, iteration, trials, trial, **info):
        """The trial has a worker process."""
        self.lost.discard(trial.trial_id)

    def on_trial_recover(self, iteration, trials, trial, **info):
        """The worker process of the trial is lost."""
        self.lost.add(trial.trial_id)

    def on_trial_result(self, iteration, trials, trial, result, **info):
        """Adds the parts of an iteration. An iteration that was reported before counts as run again."""
        if "ended_at" not in result:  # the trial has failed
            return
        self.reported = True
        took, pair = result["ended_at"] - result["started_at"], (trial.trial_id, result["training_iteration"])
        if pair in self.seen and not result.get("partial"):
            self.spent["run again"] += took
            return
        parts = {name: result.get(f"{name}_seconds", 0.0) for name in ("evaluation", "checkpoints")}
        for name, seconds in {**parts, "training": took - sum(parts.values())}.items():
            self.spent[name] += seconds
        if not result.get("partial"):  # a part of an iteration was saved before a planned stop
            self.seen.add(pair)

    def on_step_end(self, iteration, trials, **info):
        """Adds the time since the last call. Tune calls this several times a second."""
        now = time.time()
        since, self.added_at = now - (self.added_at or now), now
        if now > self.counted_at + self.EVERY:
            self.count_slots()
            self.counted_at = now
        self.add(since, trials)

    # -----------------------------------------------------------------------------------------------------------------

    def count_slots(self) -> None:
        """Counts the slots of the cluster."""
        self.slots = sum(slots_of(node["Resources"], self.resources) for node in ray.nodes() if node["Alive"])
        self.searcher.slots = self.slots

    def add(self, seconds: float, trials: list) -> None:
        """Counts seconds of each slot as running or idle, by the status of the trials.

        Args:
            seconds: the time.
            trials: of Tune.
        """
        self.spent["search"] += seconds * (self.slots > 0)
        states = [trial.status for trial in trials]
        running = states.count(Trial.RUNNING)
        idle = max(0, self.slots - running)
        usable = max(0, min(self.slots, self.at_a_time or self.slots) - running)
        live = running + states.count(Trial.PAUSED) + states.count(Trial.PENDING)
        waiting = 0
        if not self.reported:
            cause = "start-up"
        else:
            waiting = min(usable, len(self.lost))
            all_suggested = len(self.log.trials) >= self.log.num_samples
            cause = "tail" if all_suggested and live < self.slots else "rungs"
        self.spent["running"] += seconds * running
        self.spent["faults"] += seconds * waiting
        self.spent[cause] += seconds * (usable - waiting)
        self.spent["not asked for"] += seconds * (idle - usable)

    def budget_left(self, gpu_hours: float | None, hours: float | None, gpus_per_trial: float, slots: int) -> float:
        """Seconds until a budget is used up.

        Args:
            gpu_hours: of the slots, idle ones included, but not those above --max_concurrent_trials. None: no such
                budget.
            hours: of search: the time in which there were slots. None: no such budget.
            gpus_per_trial: what a slot takes. 0: a slot counts as one.
            slots: that are used from now on.
        """
        left = math.inf if hours is None else hours * 3600 - self.spent["search"]
        if gpu_hours is None:
            return left
        minutes = self.minutes()
        spent = 60 * (minutes["allocated"] - minutes["idle: not asked for"])
        return min(left, (gpu_hours * 3600 / (gpus_per_trial or 1) - spent) / slots)

    def minutes(self) -> dict[str, float]:
        """Slot-minutes by their parts. All but "allocated" and "given back" add up to "allocated".

        "change-over" is the rest of the time in which trials run: the start of a trial, and the time from a report
        until the next iteration.
        """
        spent = self.spent
        parts = {name: spent[name] for name in WORK}
        parts["change-over"] = spent["running"] - sum(parts.values())
        parts |= {f"idle: {cause}": spent[cause] for cause in IDLE}
        minutes = {name: seconds / 60 for name, seconds in parts.items()}
        return {"allocated": sum(minutes.values()), **minutes, "given back": spent["given back"] / 60}


def in_parts(minutes: dict[str, float]) -> str:
    """The parts of the slot time, see SlotTime.minutes, in words. Parts below half a percent are left out."""
    whole = minutes["allocated"] or 1.0
    hidden = ("allocated", "given back")
    shown = {name: value for name, value in minutes.items() if name not in hidden and value / whole >= 0.005}
    parts = ", ".join(f"{name} {value:.1f} ({value / whole:.0%})" for name, value in shown.items())
    saved = f"; given back: {minutes['given back']:.1f} more" if minutes["given back"] else ""
    return f"{minutes['allocated']:.1f} slot-minutes: {parts}{saved}"


def summary(minutes: dict[str, float], iterations: int, max_t: int, num_samples: int, grid: int) -> str:
    """Two lines for the log: the parts of the slot time, and the cost beside random search and grid search.

    Args:
        minutes: see SlotTime.minutes.
        iterations: the number of iterations that were run.
        max_t: the number of iterations of a full training.
        num_samples: the number of trials.
        grid: the number of trials of a grid search, with 10 values for each range.
    """
    full = iterations / max_t
    return (
        f"slot time: {in_parts(minutes)}\n"
        f"cost: {iterations} iterations, as many as {full:.1f} full trainings; random search of as many trials would "
        f"take {num_samples} full trainings, a grid with 10 values for each range {grid} (computed, not run)"
    )
