"""A simulated cluster for the real searcher and scheduler: the same objects, no training, no waiting.

    simulation = Simulation(searcher, scheduler, num_samples=34, slots=4, train=lambda config, t: loss)
    simulation.run()
    simulation.reports   # [(start, end, trial_id, iteration, loss)], in simulated seconds

    forecast(space, num_samples=34, max_t=50, reduction_factor=4, slots=4)   # what to expect of a search

It does what ray.tune.execution.tune_controller.TuneController does around a search algorithm and a scheduler, in the
same order: one suggestion ahead of time, the scheduler asked before each start, the searcher told of a result only
when the decision is not STOP. It takes Ray's own classes too, so that both can be compared.
"""

import copy
import heapq
import itertools
import json
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.result import SHOULD_CHECKPOINT
from ray.tune.schedulers import TrialScheduler
from ray.tune.search.sample import Domain

from bohb import HyperBandForBOHB, TuneBOHB
from report import columns


class SimulatedTrial:
    """The part of a Tune trial that schedulers look at."""

    is_saving = False

    def __init__(self, trial_id: str, config: dict):
        self.trial_id, self.config, self.status = trial_id, config, Trial.PENDING
        self.iteration = 0  # last one reported
        self.last_result: dict[str, Any] = {}

    def get_trainable_cls(self):
        return None

    def __repr__(self):
        return f"{self.trial_id}({self.status})"


class SearchAlgorithm:
    """Stands for Tune's SearchGenerator: counts the samples."""

    def __init__(self, searcher, num_samples: int):
        self.searcher, self.num_samples, self.created = searcher, num_samples, 0

    def is_finished(self) -> bool:
        return self.created >= self.num_samples


class Simulation:
    """Runs a whole search.

    Args:
        searcher, scheduler: with metric, mode and search space set.
        num_samples: trials to suggest.
        slots: trials that can run at a time.
        train: loss of a configuration after t iterations.
        seconds: duration of one iteration of a configuration.
        max_t: a trial ends by itself after so many iterations.
        fault: called before each report with (trial id, iteration); "crash" ends the trial, "retry" loses the
            iteration and starts the trial again from its last pause, None lets it be.
    """

    def __init__(
        self,
        searcher,
        scheduler,
        num_samples: int,
        train: Callable[[dict, int], float],
        slots: int = 1,
        max_t: int = 50,
        seconds: Callable[[dict], float] = lambda config: 1.0,
        fault: Callable[[str, int], str | None] = lambda trial_id, iteration: None,
    ):
        self.search_alg = SearchAlgorithm(searcher, num_samples)
        self.scheduler, self.slots, self.train, self.max_t = scheduler, slots, train, max_t
        self.seconds, self.fault = seconds, fault
        self.trials: list[SimulatedTrial] = []
        self._live: dict[str, SimulatedTrial] = {}  # those not ended, in the same order: decisions look at no others
        self.reports: list[tuple[float, float, str, int, float]] = []
        self.now = 0.0
        self._events: list[tuple] = []  # heap of (end, order, start, trial)
        self._order = itertools.count()
        self._checkpoints: dict[str, int] = {}

    def checkpoints(self) -> int:
        """How many live trials have one."""
        return sum(trial_id in self._checkpoints for trial_id in self._live)

    # -- what schedulers call -----------------------------------------------------------------------------------------

    def get_trials(self) -> list[SimulatedTrial]:
        return self.trials

    def stop_trial(self, trial: SimulatedTrial) -> None:
        searcher = self.search_alg.searcher
        if trial.status in (Trial.PENDING, Trial.PAUSED):
            self.scheduler.on_trial_remove(self, trial)
            searcher.on_trial_complete(trial.trial_id)
        elif trial.status == Trial.RUNNING:
            self.scheduler.on_trial_complete(self, trial, trial.last_result)
            searcher.on_trial_complete(trial.trial_id, result=trial.last_result)
        trial.status = Trial.TERMINATED
        self._live.pop(trial.trial_id, None)

    def restart(self, searcher, scheduler, saved: bool) -> "Simulation":
        """The same search in new objects that take over the state, as --resume does it.

        What runs is lost since its last checkpoint, unless all has been `saved` before a planned stop.
        """
        state = json.loads(json.dumps([self.search_alg.searcher.get_state(), self.scheduler.get_state()]))
        live = [t for t in self.trials if self.scheduler.in_race(t.trial_id)]
        new = copy.copy(self)
        new.search_alg = SearchAlgorithm(searcher, self.search_alg.num_samples)
        new.search_alg.created = self.search_alg.created
        new.scheduler, new.trials, new._live, new._events = scheduler, [], {}, []
        searcher.set_state(state[0], {t.trial_id for t in live})
        scheduler.set_state(state[1], {t.trial_id for t in live if t.status == Trial.PENDING})
        for old in live:
            trial = SimulatedTrial(old.trial_id, old.config)
            trial.iteration = old.iteration if saved else self._checkpoints.get(old.trial_id, 0)
            trial.status = Trial.PENDING if old.status == Trial.PENDING else Trial.PAUSED
            new._add(trial)
            scheduler.on_trial_add(new, trial)
        return new

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self, max_reports: int = 1_000_000, abrupt: bool = False) -> None:
        """Runs to the end, or to so many reports; RuntimeError when nothing can run although trials are left (a hang).

        Where it ends abruptly the scheduler has decided upon the last report, and nothing has been done about it: Tune stops and pauses
        in a later step.
        """
        self._cut_at = max_reports if abrupt else None
        while len(self.reports) < max_reports:
            progress = self._start_trials()
            if self._events:
                self._report(*heapq.heappop(self._events))
            elif not progress:
                break
        else:
            return
        left = list(self._live.values())
        if left or not self.search_alg.is_finished():
            raise RuntimeError(f"the search hangs: {self.search_alg.created} trials made, {left} left")

    def _add(self, trial: SimulatedTrial) -> None:
        self.trials.append(trial)
        self._live[trial.trial_id] = trial

    def _count(self, status: str) -> int:
        return sum(t.status == status for t in self._live.values())

    def _start_trials(self) -> bool:
        """Fills free slots; True if anything was started or suggested."""
        progress = False
        while True:
            if not self._count(Trial.PENDING) and not self.search_alg.is_finished():
                trial_id = f"{self.search_alg.created:05d}"
                config = self.search_alg.searcher.suggest(trial_id)
                if config is not None:
                    self.search_alg.created += 1
                    trial = SimulatedTrial(trial_id, config)
                    self._add(trial)
                    self.scheduler.on_trial_add(self, trial)
                    progress = True
            trial = self.scheduler.choose_trial_to_run(self)
            if trial is not None and trial.status == Trial.PAUSED:
                trial.status = Trial.PENDING
            if trial is None:
                trial = next((t for t in self._live.values() if t.status == Trial.PENDING), None)
            if trial is None or self._count(Trial.RUNNING) >= self.slots:
                return progress
            trial.status = Trial.RUNNING
            self._schedule(trial)
            progress = True

    def _schedule(self, trial: SimulatedTrial) -> None:
        end = self.now + self.seconds(trial.config)
        heapq.heappush(self._events, (end, next(self._order), self.now, trial))

    def _report(self, end: float, _: int, start: float, trial: SimulatedTrial) -> None:
        self.now = end
        if trial.status != Trial.RUNNING:  # was stopped meanwhile
            return
        fault = self.fault(trial.trial_id, trial.iteration + 1)
        if fault == "crash":
            self.scheduler.on_trial_error(self, trial)
            self.search_alg.searcher.on_trial_complete(trial.trial_id, error=True)
            trial.status = Trial.ERROR
            del self._live[trial.trial_id]
            return
        if fault == "retry":  # as TuneController._try_recover
            trial.status = Trial.ERROR
            trial.iteration = self._checkpoints.get(trial.trial_id, 0)
            self.scheduler.on_trial_error(self, trial)
            trial.status = Trial.PENDING
            self.scheduler.on_trial_add(self, trial)
            return
        trial.iteration += 1
        loss = self.train(trial.config, trial.iteration)
        self.reports.append((start, end, trial.trial_id, trial.iteration, loss))
        searcher = self.search_alg.searcher
        result = {"training_iteration": trial.iteration, searcher.metric: loss, SHOULD_CHECKPOINT: True}
        decision = self.scheduler.on_trial_result(self, trial, result)
        if decision != TrialScheduler.STOP:
            searcher.on_trial_result(trial.trial_id, result)
        trial.last_result = result
        if len(self.reports) == self._cut_at:
            return
        if decision == TrialScheduler.PAUSE:
            trial.status = Trial.PAUSED
            self._checkpoints[trial.trial_id] = trial.iteration
        elif decision == TrialScheduler.STOP or trial.iteration >= self.max_t:
            self.stop_trial(trial)
        else:
            self._schedule(trial)


# ---------------------------------------------------------------------------------------------------------------------
# the plan of a search


@dataclass
class Forecast:
    """What to expect of a search whose iterations all take equally long."""

    rungs: list[tuple[int, int, int, int]]  # (bracket, rung at iteration, trials that come to it, iterations run for it)
    suggested: int  # trials suggested before there is a model
    model_based: int  # suggestions made once there is one; BOHB still draws a third of them at random
    checkpoints: int  # most on disk at a time
    iterations: int  # in all
    time: float  # of the whole search, in iterations
    busy: list[float]  # share of the slots' time that is spent on iterations, in each tenth of the time

    def disk(self, checkpoint_bytes: int) -> int:
        """Bytes at the peak: the checkpoints and, at most as large, the best model."""
        return checkpoint_bytes * (self.checkpoints + 1)


def forecast(space: dict, num_samples: int, max_t: int, reduction_factor: int, slots: int) -> Forecast:
    """Runs the searcher and the scheduler of a search on random losses.

    With many slots most suggestions are made before the first rung is through, so few can be the model's.
    """
    rng = random.Random(0)
    searcher = TuneBOHB(seed=0, bohb_config={"random_fraction": 0})
    searcher.set_search_properties("loss", "min", space)
    scheduler = HyperBandForBOHB(
        time_attr="training_iteration", metric="loss", mode="min", max_t=max_t, reduction_factor=reduction_factor
    )
    most = 0

    def train(config: dict, t: int) -> float:
        nonlocal most
        most = max(most, simulation.checkpoints())
        return rng.random()

    simulation = Simulation(searcher, scheduler, num_samples, train, slots=slots, max_t=max_t)
    simulation.run()
    rungs = []
    for number, bracket in enumerate(scheduler.brackets, 1):
        below = 0
        for _, budget in bracket.rungs:
            came = sum(o["budget"] == budget and scheduler.bracket_of(o["trial_id"]) is bracket for o in searcher.observations)
            rungs.append((number, budget, came, came * (budget - below)))
            below = budget
    tenth = simulation.now / 10
    busy = [
        sum(max(0.0, min(end, (i + 1) * tenth) - max(start, i * tenth)) for start, end, *_ in simulation.reports) / tenth / slots
        for i in range(10)
    ]
    return Forecast(
        rungs,
        next((i for i, s in enumerate(searcher.suggested.values()) if s["model_based"]), num_samples),
        searcher.model_based,
        # Besides: the best trial's; and where a trial has written a new one, the old one stays until the state is saved twice.
        most + 1 + 2 * min(slots, num_samples),
        len(simulation.reports),
        simulation.now,
        busy,
    )


def plan(
    space: dict, settings: list[dict], forecasts: list[Forecast], seconds: float | None, checkpoint_bytes: int | None, time_limit: int | None
) -> str:
    """The plan of a search as text; of several settings, one line each.

    Args:
        space: the search space.
        settings: each {"num_samples", "max_t", "reduction_factor", "slots"}.
        forecasts: one a setting.
        seconds: of one iteration, if known.
        checkpoint_bytes: size of one checkpoint, if known.
        time_limit: of one job, in seconds, if there is one.
    """
    rows = [["slots", "reduction factor", "trials", "iterations", "full trainings", "model-based", "busy", "iterations' time"]]
    rows[0] += ["hours", "slot-hours"] if seconds else []
    rows[0] += ["disk GB"] if checkpoint_bytes else []
    for s, f in zip(settings, forecasts):
        row = [s["slots"], s["reduction_factor"], s["num_samples"], f.iterations, f"{f.iterations / s['max_t']:.1f}", f.model_based]
        row += [f"{statistics.mean(f.busy):.0%}", f"{f.time:.0f}"]
        row += [f"{f.time * seconds / 3600:.2f}", f"{f.time * seconds / 3600 * s['slots']:.2f}"] if seconds else []
        row += [f"{f.disk(checkpoint_bytes) / 1e9:.3g}"] if checkpoint_bytes else []
        rows.append(row)
    if len(settings) > 1:
        return columns(rows)
    (s,), (f,) = settings, forecasts
    wide = [["bracket", "rung at iteration", "trials", "iterations", "share"]]
    wide += [[bracket, budget, trials, run, f"{run / f.iterations:.0%}"] for bracket, budget, trials, run in f.rungs]
    dimensions = sum(isinstance(domain, Domain) for domain in space["train_loop_config"].values())
    lines = [
        columns(wide),
        "",
        f"{s['num_samples']} trials, {f.iterations} iterations: as many as {f.iterations / s['max_t']:.1f} full trainings of {s['max_t']}",
        f"model: it needs {2 * (dimensions + 1)} results at one rung (2 (d + 1), {dimensions} hyperparameters); on {s['slots']} slots it has them after "
        f"{f.suggested} suggestions, so {f.model_based} can come from it; a third of these stays random",
        f"time: that of {f.time:.0f} iterations one after another, slots {statistics.mean(f.busy):.0%} busy; by tenths of the time: "
        + " ".join(f"{share:.0%}" for share in f.busy),
    ]
    if seconds:
        hours = f.time * seconds / 3600
        lines.append(f"at {seconds:.3g} s an iteration: {hours:.2f} hours, {hours * s['slots']:.2f} slot-hours, {f.iterations * seconds / 3600:.2f} of them busy")
        if time_limit:
            jobs = math.ceil(f.time * seconds / max(60, time_limit - 360))  # it is warned 5 minutes before, and takes one to start
            lines.append(f"time limit of a job, {time_limit / 3600:.2f} hours: " + ("it fits" if jobs == 1 else f"at least {jobs} jobs, one after another, by requeueing"))
        else:
            lines.append("time limit of a job: not known, set SBATCH_TIMELIMIT")
    else:
        lines.append("hours: with --seconds_per_iteration, a number or the iterations.csv of an earlier run")
    if checkpoint_bytes:
        size = f"{f.disk(checkpoint_bytes) / 1e9:.3g} GB, for {f.checkpoints} checkpoints of {checkpoint_bytes / 1e9:.3g} GB and the best model"
        lines.append(f"disk at its peak: up to {size}")
    else:
        lines.append("disk: known once the model is there (--prefetch)")
    return "\n".join(lines)
