"""The bill of a search: where the time of its slots went, and what it cost beside other ways to search.

A slot is what one trial takes: a GPU, or on a machine without GPUs a CPU. All times here are slot-seconds, all that is printed
slot-minutes. The time before the search (Slurm's queue, loading) and after it (the test) is not in it.
"""

import time

import ray
from ray.tune import Callback
from ray.tune.experiment import Trial

IDLE = ("start-up", "rungs", "tail", "faults", "not asked for")


class Bill(Callback):
    """Adds up what the slots do, several times a second.

    Idle slots are counted under what keeps them idle: *start-up*, no trial has reported yet, or not since a --resume; *faults*, a trial
    whose process was lost waits for another; *tail*, fewer trials are left than slots; *rungs*, trials are paused until their bracket
    is through; *not asked for*, above --max_concurrent_trials.

    Args:
        record: its `trials` and `num_samples`.
        resources: {"cpu", "gpu"} of a trial.
        at_a_time: --max_concurrent_trials.
    """

    EVERY = 5.0  # seconds between two looks at the cluster, whose nodes come and go

    def __init__(self, record, resources: dict[str, int], at_a_time: int):
        self.record, self.resources, self.at_a_time = record, resources, at_a_time
        self.spent = dict.fromkeys(("running", "training", "evaluation", "checkpoints", "run again", *IDLE, "given back"), 0.0)
        self.seen: set[tuple[str, int]] = set()  # iterations that were reported
        self.lost: set[str] = set()  # trials whose process was lost
        self.heard, self.slots, self.looked_at, self.added_at = False, 0, 0.0, None

    def get_state(self) -> dict:
        return {"spent": self.spent, "seen": sorted(self.seen)}

    def set_state(self, state: dict) -> None:
        self.spent, self.seen = dict(state["spent"]), {tuple(pair) for pair in state["seen"]}

    # -- what Tune calls ----------------------------------------------------------------------------------------------

    def on_trial_start(self, iteration, trials, trial, **info):
        self.lost.discard(trial.trial_id)

    def on_trial_recover(self, iteration, trials, trial, **info):
        self.lost.add(trial.trial_id)

    def on_trial_result(self, iteration, trials, trial, result, **info):
        if "ended_at" not in result:  # the end of a trial that failed
            return
        self.heard = True
        took, pair = result["ended_at"] - result["started_at"], (trial.trial_id, result["training_iteration"])
        if pair in self.seen and not result.get("partial"):
            self.spent["run again"] += took
            return
        parts = {name: result.get(f"{name}_seconds", 0.0) for name in ("evaluation", "checkpoints")}
        for name, seconds in {**parts, "training": took - sum(parts.values())}.items():
            self.spent[name] += seconds
        if not result.get("partial"):  # that is a piece of an iteration, saved before a planned stop
            self.seen.add(pair)

    def on_step_end(self, iteration, trials, **info):
        now = time.time()
        since, self.added_at = now - (self.added_at or now), now
        if now > self.looked_at + self.EVERY:
            self.slots = sum(slots_of(node["Resources"], self.resources) for node in ray.nodes() if node["Alive"])
            self.looked_at = now
        self.add(since, trials)

    # -----------------------------------------------------------------------------------------------------------------

    def add(self, seconds: float, trials: list) -> None:
        """Adds a time in which the slots did what the trials' states say."""
        states = [trial.status for trial in trials]
        running = states.count(Trial.RUNNING)
        idle = max(0, self.slots - running)
        usable = max(0, min(self.slots, self.at_a_time or self.slots) - running)
        live = running + states.count(Trial.PAUSED) + states.count(Trial.PENDING)
        waiting = 0
        if not self.heard:
            cause = "start-up"
        else:
            waiting = min(usable, len(self.lost))
            cause = "tail" if len(self.record.trials) >= self.record.num_samples and live < self.slots else "rungs"
        self.spent["running"] += seconds * running
        self.spent["faults"] += seconds * waiting
        self.spent[cause] += seconds * (usable - waiting)
        self.spent["not asked for"] += seconds * (idle - usable)

    def minutes(self) -> dict[str, float]:
        """Slot-minutes; all but `allocated` and `given back` add up to `allocated`."""
        spent = self.spent
        at_work = {name: spent[name] for name in ("training", "evaluation", "checkpoints", "run again")}
        parts = at_work | {"change-over": spent["running"] - sum(at_work.values())} | {f"idle: {cause}": spent[cause] for cause in IDLE}
        minutes = {name: seconds / 60 for name, seconds in parts.items()}
        return {"allocated": sum(minutes.values()), **minutes, "given back": spent["given back"] / 60}


def slots_of(have: dict[str, float], resources: dict[str, int]) -> int:
    """How many trials a node's, or the cluster's, resources have room for."""
    return int(min(have.get(name.upper(), 0) // n for name, n in resources.items() if n))


def text(minutes: dict[str, float], iterations: int, max_t: int, num_samples: int, grid: int) -> str:
    """The bill as lines, with the cost of other ways to search in trainings of full length: computed, they were not run."""
    whole = minutes["allocated"] or 1.0
    shown = {name: value for name, value in minutes.items() if name not in ("allocated", "given back") and value / whole >= 0.005}
    parts = [f"{name} {value:.1f} ({value / whole:.0%})" for name, value in shown.items()]
    saved = f"; given back: {minutes['given back']:.1f} more" if minutes["given back"] else ""
    return "\n".join([
        f"bill: {minutes['allocated']:.1f} slot-minutes: " + ", ".join(parts) + saved,
        f"cost: {iterations} iterations, as many as {iterations / max_t:.1f} full trainings; computed, not run: {num_samples} for random search "
        f"of as many trials, {grid} for a grid of all choices with 10 values of each range",
    ])  # fmt: skip
