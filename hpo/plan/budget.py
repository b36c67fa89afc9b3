"""A budget of GPU-hours, or of hours: whether one more trial can be trained within it.

The search asks before each suggestion. The answer is a forecast: the rest of the search, with one more trial, runs on
simulated time at the pace that was measured so far. So the last bracket gets as many trials as fit, and each trial that
begins can also reach the end of its bracket.
"""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Container

from ray.tune import Callback
from ray.tune.experiment import Trial

from hpo.bohb.scheduler import HyperBandForBOHB
from hpo.bohb.searcher import TuneBOHB
from hpo.plan.simulator import Simulation


class Placeholders(TuneBOHB):
    """Suggests no hyperparameters and has no model: for the time that trials take, not for their results."""

    def suggest(self, trial_id: str) -> dict:
        """The id of the trial in place of hyperparameters."""
        self.running.add(trial_id)
        return {"trial": trial_id}

    def on_rung_result(self, trial_id: str, budget: int, loss: float) -> None:
        """Does nothing."""


def iterations_of(trial: Trial, restarted: Container[str] = ()) -> int:
    """The iterations that a trial has done: those of its last report, or of its last rung where it starts from there.

    `restarted`: ids of the trials that have not reported since they have started.
    """
    reported = (trial.last_result or {}).get("training_iteration", 0)
    if trial.status == Trial.RUNNING and trial.trial_id not in restarted:
        return reported
    return max((rung for rung in trial.config["rungs"] if rung <= reported), default=0)


def seconds_left(
    scheduler: HyperBandForBOHB,
    more: int,
    slots: int,
    seconds: Callable[[dict, int], float],
    restarted: Container[str] = (),
) -> float:
    """How long the rest of a search takes. An iteration that is running now is counted whole.

    The trials that take longest are promoted, and a baseline loses: no result can make the search take longer.

    Args:
        scheduler: of the search. It stays as it is.
        more: further trials, after which there are no more.
        slots: trials that can run at a time.
        seconds: the duration of an iteration, called with {"trial": its id} and the number of the iteration.
        restarted: see iterations_of.
    """
    state, live, max_t = scheduler.get_state(), scheduler.live_trials(), scheduler.settings["max_t"]
    searcher = Placeholders(metric="loss", mode="min")
    searcher.running = {trial.trial_id for trial in live if trial.status == Trial.RUNNING}
    other = HyperBandForBOHB(**scheduler.settings | {"metric": "loss", "mode": "min"})

    def loss(config: dict, iteration: int) -> float:
        return 1.0 if config["trial"] == scheduler.baseline else -seconds(config, max_t)

    created = len(state["bracket_of"])
    simulation = Simulation(searcher, other, created + more, loss, slots, max_t, seconds, rungs_only=True)
    simulation.search_alg.created = created
    other.set_state(state, {trial.trial_id for trial in live if trial.status == Trial.PENDING})
    for trial in live:
        config = {"trial": trial.trial_id, "rungs": trial.config["rungs"]}
        simulation.take_over(trial.trial_id, config, iterations_of(trial, restarted), trial.status)
    simulation.run()
    return simulation.now


class Budget:
    """Decides before each suggestion whether the search can still take one more trial.

    Args:
        scheduler: of the search.
        slots: called for the number of trials that can run at a time now.
        left: called for the seconds until the budget is used up, at the present number of slots.
        seconds: see seconds_left; called with no pace known yet it raises LookupError.
        restarted: see iterations_of.
    """

    def __init__(
        self,
        scheduler: HyperBandForBOHB,
        slots: Callable[[], int],
        left: Callable[[], float],
        seconds: Callable[[dict, int], float],
        restarted: Container[str] = (),
    ):
        self.scheduler, self.slots, self.left, self.seconds, self.restarted = scheduler, slots, left, seconds, restarted
        self._refused: tuple | None = None  # the slots, and what the trials had done, when a trial was not allowed

    def allows_trial(self) -> bool | None:
        """Whether a trial may begin. None: not now, but perhaps when more is known. False: no further trial fits.

        If the budget has no room for another trial in the open bracket, that bracket is closed.
        """
        live, slots = self.scheduler.live_trials(), self.slots()
        now = slots, [(trial.trial_id, trial.status, iterations_of(trial, self.restarted)) for trial in live]
        if now != self._refused:  # Tune asks several times a second
            try:
                if self.needed(1) <= self.left():
                    return True
            except LookupError:  # until a pace is known, a trial for each slot
                return len(live) < slots or None
            self.scheduler.close_bracket()
            self._refused = now
        return None if live else False

    def needed(self, more: int = 0) -> float:
        """Seconds that the trials need, and so many more. Raises LookupError where no pace is known yet."""
        return seconds_left(self.scheduler, more, self.slots(), self.seconds, self.restarted)


class MeasuredPace(Callback):
    """The durations of a search's iterations, as forecast from those that have ended.

    An iteration at a rung also computes EM and F1, and writes a checkpoint; a trial that begins or goes on has to load
    its model. A trial that is slower than others in what it has done so far stays slower by the same factor; one that
    has done nothing yet is as slow as the slowest.

    Args:
        log: a TrialLog; its `iterations` are used.
        scheduler: of the search.
    """

    def __init__(self, log, scheduler: HyperBandForBOHB):
        self.log, self.scheduler = log, scheduler
        self.measured = 0  # the iterations that the following numbers are of
        self.typical: dict[bool, float] = {}  # seconds of an iteration at a rung (True), and of others
        self.factors: dict[str, float] = {}  # of each trial
        self.slowest = 1.0
        self.started: dict[str, float] = {}  # when a trial without a report since then has started
        self.gaps: list[float] = []  # seconds from each start of a trial to the start of its next iteration

    def on_trial_start(self, iteration, trials, trial, **info):
        """A trial begins or goes on."""
        self.started[trial.trial_id] = time.time()

    def on_trial_result(self, iteration, trials, trial, result, **info):
        """A trial has reported."""
        since = self.started.pop(trial.trial_id, None)
        if since and "started_at" in result:
            self.gaps.append(max(0.0, result["started_at"] - since))  # clocks of nodes may differ

    def __call__(self, config: dict, iteration: int) -> float:
        """The seconds that an iteration of a trial will take. Raises LookupError where none has ended yet."""
        if self.measured < len(self.log.iterations):
            self._measure()
        if not self.typical:
            raise LookupError("no iteration has ended")
        budgets = self._budgets(config["trial"])
        seconds = self.typical[iteration in budgets] * self.factors.get(config["trial"], self.slowest)
        starts = iteration == 1 or iteration - 1 in budgets
        return seconds + (statistics.fmean(self.gaps) if starts and self.gaps else 0.0)

    def _budgets(self, trial_id: str) -> list[int]:
        """The rungs of a trial; those of all brackets for one that has not begun."""
        bracket = self.scheduler.bracket_of(trial_id)
        return bracket.budgets() if bracket else self.scheduler.budgets

    def _measure(self) -> None:
        seconds, of_trial = {True: [], False: []}, defaultdict(list)
        for row in self.log.iterations:
            at_rung = row["training_iteration"] in self._budgets(row["trial_id"])
            seconds[at_rung].append(row["ended_at"] - row["started_at"])
            of_trial[row["trial_id"]].append((row["ended_at"] - row["started_at"], at_rung))
        every = statistics.fmean(seconds[True] + seconds[False])
        self.typical = {at_rung: statistics.fmean(values) if values else every for at_rung, values in seconds.items()}
        for trial_id, pairs in of_trial.items():
            expected = math.fsum(self.typical[at_rung] for _, at_rung in pairs)
            self.factors[trial_id] = math.fsum(took for took, _ in pairs) / expected
        self.slowest, self.measured = max(self.factors.values()), len(self.log.iterations)
