"""A simulated cluster. The searcher and the scheduler are those of a search, but nothing is trained.

    simulation = Simulation(searcher, scheduler, num_samples=34, train=lambda config, t: loss, slots=4)
    simulation.run()
    simulation.reports   # [(start, end, trial_id, iteration, loss)], in simulated seconds

It calls searcher and scheduler in the order of Tune's TuneController: it takes one suggestion ahead of time, asks the
scheduler before each start, and tells the searcher of a result only if the decision is not STOP. Ray's own classes
can be simulated too, for a comparison.
"""

import heapq
import itertools
from collections.abc import Callable
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.result import SHOULD_CHECKPOINT
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher


class SimulatedTrial:
    """The part of a Tune trial that schedulers look at."""

    is_saving = False

    def __init__(self, trial_id: str, config: dict):
        self.trial_id, self.config, self.status = trial_id, config, Trial.PENDING
        self.iteration = 0  # the last one that was reported
        self.last_result: dict[str, Any] = {}

    def get_trainable_cls(self):
        """None: there is no trainable."""
        return None

    def __repr__(self):
        return f"{self.trial_id}({self.status})"


class SearchAlgorithm:
    """Stands in for Tune's SearchGenerator, which counts the trials."""

    def __init__(self, searcher, num_samples: int):
        self.searcher, self.num_samples, self.created = searcher, num_samples, 0
        self.no_more = False  # the searcher has said so

    def is_finished(self) -> bool:
        """Whether all trials were suggested."""
        return self.no_more or self.created >= self.num_samples


class Simulation:
    """Runs a whole search.

    Args:
        searcher: has its metric, mode and search space already.
        scheduler: has its metric and mode already.
        num_samples: number of trials; math.inf where the searcher ends the search.
        train: returns the loss of a configuration after t iterations.
        slots: trials that can run at a time.
        max_t: a trial ends by itself after so many iterations.
        seconds: returns the simulated seconds that iteration t of a configuration takes.
        rungs_only: a trial reports at its rungs only. It is much faster, and the time is the same.

    Attributes:
        reports: (start, end, trial id, iteration, loss) of each iteration; times in simulated seconds.
        trials: all trials, in the order of their suggestion.
        now: the simulated time, in seconds.
    """

    def __init__(
        self,
        searcher,
        scheduler,
        num_samples: int,
        train: Callable[[dict, int], float],
        slots: int = 1,
        max_t: int = 50,
        seconds: Callable[[dict, int], float] = lambda config, t: 1.0,
        rungs_only: bool = False,
    ):
        self.search_alg = SearchAlgorithm(searcher, num_samples)
        self.scheduler, self.slots, self.train, self.max_t = scheduler, slots, train, max_t
        self.seconds, self.rungs_only = seconds, rungs_only
        self.trials: list[SimulatedTrial] = []
        self._live: dict[str, SimulatedTrial] = {}  # those that have not ended, in the same order
        self.reports: list[tuple[float, float, str, int, float]] = []
        self.now = 0.0
        self._events: list[tuple] = []  # heap of (end, order, start, trial)
        self._order = itertools.count()
        self._checkpoints: dict[str, int] = {}

    def checkpoints(self) -> int:
        """The number of live trials that have a checkpoint."""
        return sum(trial_id in self._checkpoints for trial_id in self._live)

    # -- what schedulers call -----------------------------------------------------------------------------------------

    def get_trials(self) -> list[SimulatedTrial]:
        """All trials."""
        return self.trials

    def stop_trial(self, trial: SimulatedTrial) -> None:
        """Ends a trial."""
        searcher = self.search_alg.searcher
        if trial.status in (Trial.PENDING, Trial.PAUSED):
            self.scheduler.on_trial_remove(self, trial)
            searcher.on_trial_complete(trial.trial_id)
        elif trial.status == Trial.RUNNING:
            self.scheduler.on_trial_complete(self, trial, trial.last_result)
            searcher.on_trial_complete(trial.trial_id, result=trial.last_result)
        trial.status = Trial.TERMINATED
        self._live.pop(trial.trial_id, None)

    def take_over(self, trial_id: str, config: dict, iteration: int, status: str) -> None:
        """Adds a live trial of another search, whose state the scheduler has. One that was running counts as paused.

        Args:
            trial_id: its id.
            config: its configuration.
            iteration: the last one that it has done.
            status: of Tune.
        """
        trial = SimulatedTrial(trial_id, config)
        trial.iteration = iteration
        trial.last_result = {"training_iteration": iteration}
        trial.status = Trial.PENDING if status == Trial.PENDING else Trial.PAUSED
        self._add(trial)
        self.scheduler.on_trial_add(self, trial)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self, max_reports: int = 1_000_000) -> None:
        """Runs to the end, or to a number of reports.

        Args:
            max_reports: the number of reports since the search began.

        Raises:
            RuntimeError: nothing can run although trials are left.
        """
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
        """Fills free slots. Returns whether a trial was started or suggested."""
        progress = False
        while True:
            if not self._count(Trial.PENDING) and not self.search_alg.is_finished():
                trial_id = f"{self.search_alg.created:05d}"
                config = self.search_alg.searcher.suggest(trial_id)
                if config == Searcher.FINISHED:
                    self.search_alg.no_more = progress = True
                elif config is not None:
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

    def _next_report(self, trial: SimulatedTrial) -> int:
        """The iteration after which a trial reports next."""
        if self.rungs_only:
            return min(rung for rung in trial.config["rungs"] if rung > trial.iteration)
        return trial.iteration + 1

    def _schedule(self, trial: SimulatedTrial) -> None:
        iterations = range(trial.iteration + 1, self._next_report(trial) + 1)
        end = self.now + sum(self.seconds(trial.config, t) for t in iterations)
        heapq.heappush(self._events, (end, next(self._order), self.now, trial))

    def _report(self, end: float, _: int, start: float, trial: SimulatedTrial) -> None:
        self.now = end
        if trial.status != Trial.RUNNING:  # it was stopped meanwhile
            return
        trial.iteration = self._next_report(trial)
        loss = self.train(trial.config, trial.iteration)
        self.reports.append((start, end, trial.trial_id, trial.iteration, loss))
        searcher = self.search_alg.searcher
        result = {"training_iteration": trial.iteration, searcher.metric: loss, SHOULD_CHECKPOINT: True}
        decision = self.scheduler.on_trial_result(self, trial, result)
        if decision != TrialScheduler.STOP:
            searcher.on_trial_result(trial.trial_id, result)
        trial.last_result = result
        self._act(trial, decision)

    def _act(self, trial: SimulatedTrial, decision: str) -> None:
        """Pauses, stops or continues a trial. In Tune this is a later step than the decision."""
        if decision == TrialScheduler.PAUSE:
            trial.status = Trial.PAUSED
            self._checkpoints[trial.trial_id] = trial.iteration
        elif decision == TrialScheduler.STOP or trial.iteration >= self.max_t:
            self.stop_trial(trial)
        else:
            self._schedule(trial)
