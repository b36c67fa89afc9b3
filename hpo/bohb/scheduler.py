"""The scheduler of BOHB: Hyperband with synchronous rungs."""

import dataclasses
import logging
import math
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.result import SHOULD_CHECKPOINT
from ray.tune.schedulers import TrialScheduler
from ray.tune.trainable import FunctionTrainable

from hpo.bohb.brackets import Bracket, rungs
from hpo.bohb.searcher import TuneBOHB

logger = logging.getLogger(__name__)


class HyperBandForBOHB(TrialScheduler):
    """Hyperband with synchronous rungs. Pauses a trial at its rung, and resumes it when it is promoted.

    A trial's config gains the key "rungs": the budgets at which it may be paused, or ends. The trainable must report a
    checkpoint at each of them, and needs none elsewhere.

    Args:
        time_attr: the key of a result that has the used budget.
        metric: to compare trials by. None: that of Tune.
        mode: "min" or "max". None: that of Tune.
        max_t: the largest budget.
        reduction_factor: one in so many trials is promoted at a rung.
        stop_last_trials: stop a trial at max_t, in place of letting it end by itself.

    Raises:
        RuntimeError: from on_trial_result, which ends the search: a function trainable has reported at its rung
            without a checkpoint, and would start from zero when it is resumed.
    """

    supports_buffered_results = False  # each result is decided on before the trial trains on

    def __init__(
        self,
        time_attr: str = "training_iteration",
        metric: str | None = None,
        mode: str | None = None,
        max_t: int = 81,
        reduction_factor: float = 3,
        stop_last_trials: bool = True,
    ):
        super().__init__()
        self.brackets: list[Bracket] = []  # all of them
        self.pause_all = False  # set before a planned stop: pause each trial at its next checkpoint, start none
        self.node_fault = False  # set while a failure is handled that is not the fault of the hyperparameters
        self._time_attr, self._reduction_factor, self._stop_last_trials = time_attr, reduction_factor, stop_last_trials
        self._own_metric, self._own_mode = metric, mode
        self._band = rungs(max_t, reduction_factor)
        self._active: list[Bracket] = []  # brackets that still have trials: decisions look at no others
        self._bracket_of: dict[str, Bracket] = {}
        self._trials: dict[str, Trial] = {}  # live ones

    def set_search_properties(self, metric: str | None, mode: str | None, **spec) -> bool:
        """Takes metric and mode over from Tune. Returns False if they were given before."""
        if self._own_metric and metric or self._own_mode and mode:
            return False
        self._own_metric, self._own_mode = self._own_metric or metric, self._own_mode or mode
        return True

    @property
    def metric(self) -> str | None:
        """Trials are compared by it."""
        return self._own_metric

    def get_state(self) -> dict[str, Any]:
        """The brackets, as plain data."""
        number = {id(bracket): i for i, bracket in enumerate(self.brackets)}
        return {
            "brackets": [dataclasses.asdict(b) | {"promoted": sorted(b.promoted)} for b in self.brackets],
            "bracket_of": {trial_id: number[id(bracket)] for trial_id, bracket in self._bracket_of.items()},
        }

    def set_state(self, state: dict[str, Any], waiting: set[str]) -> None:
        """Goes on from a state. The live trials come back by on_trial_add.

        Args:
            state: from get_state.
            waiting: the trials that wait for a first slot. All others come back paused.
        """
        self.brackets = [
            Bracket(**b | {"rungs": [tuple(rung) for rung in b["rungs"]], "promoted": set(b["promoted"])})
            for b in state["brackets"]
        ]
        self._bracket_of = {trial_id: self.brackets[i] for trial_id, i in state["bracket_of"].items()}
        self._active = [b for b in self.brackets if b.members or not b.full]
        for bracket in self._active:
            for trial_id in bracket.members:
                if trial_id not in bracket.scores and trial_id not in waiting:
                    bracket.promoted.add(trial_id)  # it was running, or about to

    def bracket_of(self, trial_id: str) -> Bracket | None:
        """The bracket of a trial."""
        return self._bracket_of.get(trial_id)

    def in_race(self, trial_id: str) -> bool:
        """Whether a trial has rungs before it."""
        return trial_id in self._bracket_of and trial_id in self._bracket_of[trial_id].members

    # -- what Tune calls ----------------------------------------------------------------------------------------------

    def on_trial_add(self, tune_controller, trial: Trial) -> None:
        """Puts a new trial into the current bracket. A trial that comes back after a failure keeps its place."""
        if self._own_metric is None or self._own_mode is None:
            raise ValueError("HyperBandForBOHB needs a metric and a mode, here or in tune.TuneConfig.")
        self._trials[trial.trial_id] = trial
        if trial.trial_id in self._bracket_of:
            return
        if not self.brackets or self.brackets[-1].full:
            # The next bracket of the band, the one with most trials first. After the last, the next band begins.
            self.brackets.append(Bracket(list(self._band[len(self.brackets) % len(self._band)])))
            self._active.append(self.brackets[-1])
        bracket = self._bracket_of[trial.trial_id] = self.brackets[-1]
        bracket.added += 1
        bracket.members.append(trial.trial_id)
        trial.config = {**(trial.config or {}), "rungs": bracket.budgets()}

    def on_trial_result(self, tune_controller, trial: Trial, result: dict) -> str:
        """CONTINUE below the rung. At the rung the model gets the result, whatever is decided then.

        A result with the key "failed" ends a trial that cannot go on, and counts as bad at its next rung.
        """
        if self._time_attr not in result:
            logger.warning("Trial %s: a report without %r decides nothing.", trial.trial_id, self._time_attr)
            return TrialScheduler.CONTINUE
        decision = self._decide(tune_controller, trial, result)
        can_pause = SHOULD_CHECKPOINT in result and trial.trial_id in self._trials
        return (
            TrialScheduler.PAUSE if self.pause_all and can_pause and decision == TrialScheduler.CONTINUE else decision
        )

    def _decide(self, tune_controller, trial: Trial, result: dict) -> str:
        bracket = self._bracket_of[trial.trial_id]
        bracket.promoted.discard(trial.trial_id)
        if "failed" in result:
            self._fail(tune_controller, trial.trial_id)
            return TrialScheduler.STOP
        if trial.trial_id not in bracket.members:  # it is past its last rung
            return TrialScheduler.STOP if self._stop_last_trials else TrialScheduler.CONTINUE
        if result[self._time_attr] < bracket.budget:
            return TrialScheduler.CONTINUE
        sign = 1 if self._own_mode == "max" else -1
        self._record(tune_controller, trial.trial_id, sign * float(result.get(self._own_metric, math.nan)))
        if bracket.last_rung:
            self._leave(trial.trial_id)
            return TrialScheduler.STOP if self._stop_last_trials else TrialScheduler.CONTINUE
        if SHOULD_CHECKPOINT not in result and issubclass(trial.get_trainable_cls() or object, FunctionTrainable):
            where = f"{self._time_attr} {bracket.budget}"
            raise RuntimeError(
                f"Trial {trial.trial_id} came to its rung at {where} without a checkpoint: when resumed it would start "
                "again from zero. Report a checkpoint at each of config['rungs']."
            )
        self._promote_if_complete(tune_controller, bracket, current=trial.trial_id)
        if trial.trial_id in bracket.members and trial.trial_id not in bracket.scores:
            return TrialScheduler.CONTINUE  # it was promoted at once and keeps its slot
        if trial.trial_id in bracket.members:
            self._searcher(tune_controller).on_pause(trial.trial_id)
            return TrialScheduler.PAUSE
        return TrialScheduler.STOP

    def on_trial_error(self, tune_controller, trial: Trial) -> None:
        """A failed trial is a bad result at its rung, unless Tune starts it again or its node was at fault."""
        if trial.status == Trial.ERROR:  # Tune has set it before this call only if it starts the trial again
            return
        if self.node_fault:
            self._leave(trial.trial_id)
        else:
            self._fail(tune_controller, trial.trial_id)

    def _fail(self, tune_controller, trial_id: str) -> None:
        bracket = self._bracket_of[trial_id]
        if trial_id in bracket.members and trial_id not in bracket.scores:
            self._record(tune_controller, trial_id, -math.inf)
        self._leave(trial_id)

    def on_trial_complete(self, tune_controller, trial: Trial, result: dict) -> None:
        """A trial that has ended by itself leaves its bracket."""
        self._leave(trial.trial_id)

    def on_trial_remove(self, tune_controller, trial: Trial) -> None:
        """A trial that was stopped while it was pending or paused leaves its bracket."""
        self._leave(trial.trial_id)

    def choose_trial_to_run(self, tune_controller) -> Trial | None:
        """A promoted trial of the oldest bracket, else a new trial. None beyond the searcher's max_concurrent."""
        if self.pause_all:
            return None
        searcher = self._searcher(tune_controller)
        for bracket in list(self._active):
            self._promote_if_complete(tune_controller, bracket)
        self._active = [b for b in self._active if b.members or (b is self.brackets[-1] and not b.full)]
        limit = searcher.max_concurrent if searcher.max_concurrent > 0 else math.inf
        promoted = [(b, t) for b in self._active for t in b.members if t in b.promoted and t in self._trials]
        promoted.sort(key=lambda pair: pair[1] not in searcher.running)  # first those that ran when the state was saved
        for bracket, trial_id in promoted:
            room = len(searcher.running) < limit or trial_id in searcher.running
            if room and self._trials[trial_id].status == Trial.PAUSED:
                bracket.promoted.discard(trial_id)
                searcher.on_unpause(trial_id)
                return self._trials[trial_id]
        for bracket in self._active:
            for trial_id in bracket.members:
                if trial_id in self._trials and self._trials[trial_id].status == Trial.PENDING:
                    return self._trials[trial_id]
        return None

    def debug_string(self) -> str:
        """One line for each active bracket."""
        return "\n".join(
            f"bracket {b.rungs}: at {b.budget}, {len(b.members)} trials, {len(b.scores)} results" for b in self._active
        )

    # -- how it decides -----------------------------------------------------------------------------------------------

    @staticmethod
    def _searcher(tune_controller) -> TuneBOHB:
        searcher = tune_controller.search_alg
        while not isinstance(searcher, TuneBOHB):
            searcher = getattr(searcher, "searcher", None)
            if searcher is None:
                raise TypeError("HyperBandForBOHB needs hpo.bohb.searcher.TuneBOHB as the search algorithm.")
        return searcher

    def _record(self, tune_controller, trial_id: str, score: float) -> None:
        """Keeps a score (higher is better) at the current rung, and tells the model. A second one changes nothing."""
        bracket = self._bracket_of[trial_id]
        if trial_id in bracket.scores:
            return
        score = score if math.isfinite(score) else -math.inf  # NaN has no order
        bracket.scores[trial_id] = score
        self._searcher(tune_controller).on_rung_result(trial_id, bracket.budget, -score)

    def _leave(self, trial_id: str) -> None:
        self._bracket_of[trial_id].drop(trial_id)
        self._trials.pop(trial_id, None)

    def _promote_if_complete(self, tune_controller, bracket: Bracket, current: str | None = None) -> None:
        """Once all trials of a rung have a result: promotes the best, stops the others.

        A rung waits only for its own trials. Lost trials do not count, and a bracket that gets no more trials shrinks
        to those that it has. `current` is the trial whose report is being answered: its fate is the answer, so it is
        neither stopped nor marked for resumption here.
        """
        if not bracket.full and not tune_controller.search_alg.is_finished():
            return
        if bracket.last_rung or not bracket.members or any(t not in bracket.scores for t in bracket.members):
            return
        if any(t not in self._trials for t in bracket.members):  # after a resume, before all have come back
            return
        next_size = math.ceil(bracket.added / self._reduction_factor ** (bracket.rung + 1) - 1e-9)
        ranked = sorted(bracket.members, key=lambda t: -bracket.scores[t])  # of equal ones the older trial comes first
        good = [t for t in ranked if bracket.scores[t] > -math.inf][:next_size]
        bad = [t for t in bracket.members if t not in good]
        bracket.rung += 1
        bracket.scores = {}
        bracket.members = [t for t in bracket.members if t in good]
        bracket.promoted = {t for t in good if t != current}
        for trial_id in bad:
            if trial_id == current:
                self._trials.pop(trial_id)
            else:
                tune_controller.stop_trial(self._trials[trial_id])
