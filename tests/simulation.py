"""The simulator of --plan with faults and restarts."""

import copy
import json
from collections.abc import Callable

from ray.tune.experiment import Trial

from hpo.plan import simulator


class Simulation(simulator.Simulation):
    """A simulation whose trials can fail, and which can be interrupted.

    Args:
        args, kwargs: of hpo.plan.simulator.Simulation.
        fault: called before each report with (trial id, iteration). If it returns "crash", the trial fails. If it
            returns "retry", the trial loses its work since its last pause and is started again. None does nothing.
    """

    def __init__(
        self, *args, fault: Callable[[str, int], str | None] = lambda trial_id, iteration: None, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.fault = fault

    def run(self, max_reports: int = 1_000_000, abrupt: bool = False) -> None:
        """Runs to the end, or to a number of reports.

        Args:
            max_reports: the number of reports since the search began.
            abrupt: stop between the scheduler's decision on the last report and the action that follows from it. In
                Tune a crash can come there too.
        """
        self._cut_at = max_reports if abrupt else None
        super().run(max_reports)

    def restart(self, searcher, scheduler, saved: bool, num_samples: int | None = None) -> "Simulation":
        """Stops the search and resumes it with new objects, which take over the state.

        Args:
            searcher: a new searcher, with the same settings.
            scheduler: a new scheduler, with the same settings.
            saved: whether running trials wrote a checkpoint before the stop. If not, they lose their work since their
                last checkpoint.
            num_samples: number of trials from now on; None: as before.
        """
        state = json.loads(json.dumps([self.search_alg.searcher.get_state(), self.scheduler.get_state()]))
        live = [t for t in self.trials if self.scheduler.has_rung(t.trial_id)]
        new = copy.copy(self)
        new.search_alg = simulator.SearchAlgorithm(searcher, num_samples or self.search_alg.num_samples)
        new.search_alg.created = self.search_alg.created
        new.scheduler, new.trials, new._live, new._events = scheduler, [], {}, []
        searcher.set_state(state[0], {t.trial_id for t in live})
        scheduler.set_state(state[1], {t.trial_id for t in live if t.status == Trial.PENDING})
        for old in live:
            iteration = old.iteration if saved else self._checkpoints.get(old.trial_id, 0)
            new.take_over(old.trial_id, old.config, iteration, old.status)
        return new

    def _report(self, end, order, start, trial):
        if trial.status == Trial.RUNNING:
            self.now = end
            fault = self.fault(trial.trial_id, trial.iteration + 1)
            if fault == "crash":
                self.scheduler.on_trial_error(self, trial)
                self.search_alg.searcher.on_trial_complete(trial.trial_id, error=True)
                trial.status = Trial.ERROR
                del self._live[trial.trial_id]
                return
            if fault == "retry":  # in the order in which Tune recovers a trial
                trial.status = Trial.ERROR
                trial.iteration = self._checkpoints.get(trial.trial_id, 0)
                self.scheduler.on_trial_error(self, trial)
                trial.status = Trial.PENDING
                self.scheduler.on_trial_add(self, trial)
                return
        super()._report(end, order, start, trial)

    def _act(self, trial, decision):
        if len(self.reports) != self._cut_at:
            super()._act(trial, decision)
