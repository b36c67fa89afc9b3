"""The scheduler: Hyperband with synchronous rungs."""

import dataclasses
import logging
import math
from typing import Any

import ray.tune.schedulers
from ray.tune.experiment import Trial
from ray.tune.result import SHOULD_CHECKPOINT
from ray.tune.schedulers import TrialScheduler
from ray.tune.trainable import FunctionTrainable

from hpo.bohb.brackets import Bracket, rungs
from hpo.bohb.searcher import TuneBOHB

logger = logging.getLogger(__name__)


class HyperBandForBOHB(ray.tune.schedulers.HyperBandForBOHB):
    """Hyperband with synchronous rungs; pauses a trial at its rung and resumes it when its bracket is halved.

    Arguments as for Ray's class. A trial's config gains the key "rungs", the budgets at which it may be paused or
    ends: the trainable has to report a checkpoint there, and needs none elsewhere.

    Raises (from on_trial_result, which ends the search):
        RuntimeError: a function trainable came to a rung without a checkpoint. It would start again from zero.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._band = rungs(self._max_t_attr, self._eta)
        self.brackets: list[Bracket] = []  # all of them, for the record
        self._active: list[Bracket] = []  # those that still have trials: decisions look at no others
        self._bracket_of: dict[str, Bracket] = {}
        self._trials: dict[str, Trial] = {}  # live ones
        self.draining = False  # set before a planned stop: pause each trial at its next checkpoint, start none
        self.node_fault = False  # set while a failure is handled that says nothing about the hyperparameters

    def get_state(self) -> dict[str, Any]:
        """The brackets, as plain data."""
        number = {id(bracket): i for i, bracket in enumerate(self.brackets)}
        return {
            "brackets": [dataclasses.asdict(bracket) | {"promoted": sorted(bracket.promoted)} for bracket in self.brackets],
            "bracket_of": {trial_id: number[id(bracket)] for trial_id, bracket in self._bracket_of.items()},
        }

    def set_state(self, state: dict[str, Any], waiting: set[str]) -> None:
        """Goes on from a state. Live trials come back by on_trial_add, paused but for those `waiting` for a first slot."""
        self.brackets = [
            Bracket(**bracket | {"rungs": [tuple(rung) for rung in bracket["rungs"]], "promoted": set(bracket["promoted"])})
            for bracket in state["brackets"]
        ]
        self._bracket_of = {trial_id: self.brackets[i] for trial_id, i in state["bracket_of"].items()}
        self._active = [b for b in self.brackets if b.members or not b.full]
        for bracket in self._active:
            for trial_id in bracket.members:
                if trial_id not in bracket.scores and trial_id not in waiting:
                    bracket.promoted.add(trial_id)  # it was running, or about to

    def bracket_of(self, trial_id: str) -> Bracket | None:
        """The bracket that a trial came into."""
        return self._bracket_of.get(trial_id)

    def in_race(self, trial_id: str) -> bool:
        """Whether a trial has rungs before it."""
        return trial_id in self._bracket_of and trial_id in self._bracket_of[trial_id].members

    # -- what Tune calls ----------------------------------------------------------------------------------------------

    def on_trial_add(self, tune_controller, trial: Trial) -> None:
        """Puts a new trial into the current bracket; a trial that comes back after a crash keeps its place."""
        if self._metric is None or self._metric_op is None:
            raise ValueError("HyperBandForBOHB needs a metric and a mode, here or in tune.TuneConfig.")
        self._trials[trial.trial_id] = trial
        if trial.trial_id in self._bracket_of:
            return
        if not self.brackets or self.brackets[-1].full:
            # the next bracket of the band, largest first; after the last the next band begins
            self.brackets.append(Bracket(list(self._band[len(self.brackets) % len(self._band)])))
            self._active.append(self.brackets[-1])
        bracket = self._bracket_of[trial.trial_id] = self.brackets[-1]
        bracket.added += 1
        bracket.members.append(trial.trial_id)
        trial.config = {**(trial.config or {}), "rungs": bracket.budgets()}

    def on_trial_result(self, tune_controller, trial: Trial, result: dict) -> str:
        """CONTINUE below the rung; at the rung the result goes to the model, whatever is decided then.

        A result with the key "failed" is the end of a trial that cannot go on, and a bad result at its next rung.
        """
        if self._time_attr not in result:
            logger.warning("Trial %s: a report without %r decides nothing.", trial.trial_id, self._time_attr)
            return TrialScheduler.CONTINUE
        decision = self._decide(tune_controller, trial, result)
        can_pause = SHOULD_CHECKPOINT in result and trial.trial_id in self._trials
        return TrialScheduler.PAUSE if self.draining and can_pause and decision == TrialScheduler.CONTINUE else decision

    def _decide(self, tune_controller, trial: Trial, result: dict) -> str:
        bracket = self._bracket_of[trial.trial_id]
        bracket.promoted.discard(trial.trial_id)
        if "failed" in result:
            self._fail(tune_controller, trial.trial_id)
            return TrialScheduler.STOP
        if trial.trial_id not in bracket.members:  # is past its last rung
            return TrialScheduler.STOP if self._stop_last_trials else TrialScheduler.CONTINUE
        if result[self._time_attr] < bracket.budget:
            return TrialScheduler.CONTINUE
        self._record(tune_controller, trial.trial_id, self._metric_op * float(result.get(self._metric, math.nan)))
        if bracket.last_rung:
            self._leave(trial.trial_id)
            return TrialScheduler.STOP if self._stop_last_trials else TrialScheduler.CONTINUE
        if SHOULD_CHECKPOINT not in result and issubclass(trial.get_trainable_cls() or object, FunctionTrainable):
            raise RuntimeError(
                f"Trial {trial.trial_id} came to its rung at {self._time_attr} {bracket.budget} without a checkpoint: when "
                "resumed it would start again from zero. Report a checkpoint at each of config['rungs']."
            )
        self._halve_if_through(tune_controller, bracket, current=trial.trial_id)
        if trial.trial_id in bracket.members and trial.trial_id not in bracket.scores:
            return TrialScheduler.CONTINUE  # was promoted on the spot: no need to leave its slot
        if trial.trial_id in bracket.members:
            self._searcher(tune_controller).on_pause(trial.trial_id)
            return TrialScheduler.PAUSE
        return TrialScheduler.STOP

    def on_trial_error(self, tune_controller, trial: Trial) -> None:
        """A crashed trial is a bad result at its rung, unless Tune is about to start it again or a node was at fault."""
        if trial.status == Trial.ERROR:  # set before this call only when the trial is to be retried
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
        """A trial that ended by itself leaves its bracket; what it did not earn is not made up."""
        self._leave(trial.trial_id)

    def on_trial_remove(self, tune_controller, trial: Trial) -> None:
        """A trial that was stopped while pending or paused leaves its bracket."""
        self._leave(trial.trial_id)

    def choose_trial_to_run(self, tune_controller) -> Trial | None:
        """A promoted trial, oldest bracket first, else a new one; none beyond max_concurrent."""
        if self.draining:
            return None
        searcher = self._searcher(tune_controller)
        for bracket in list(self._active):
            self._halve_if_through(tune_controller, bracket)
        self._active = [b for b in self._active if b.members or (b is self.brackets[-1] and not b.full)]
        limit = searcher._max_concurrent if searcher._max_concurrent > 0 else math.inf
        promoted = [(b, t) for b in self._active if b.promoted for t in b.members if t in b.promoted and t in self._trials]
        promoted.sort(key=lambda pair: pair[1] not in searcher.running)  # first those that ran when a state was saved
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
        """One line a live bracket."""
        return "\n".join(
            f"bracket {b.rungs}: at {b.budget}, {len(b.members)} in the race, {len(b.scores)} through"
            for b in self._active
        )

    def state(self) -> dict[str, int]:
        """Counts, as Ray's."""
        return {"num_brackets": len(self.brackets), "num_live": len(self._trials)}

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
        """Keeps a score (higher is better) at the current rung and tells the model; a second report changes nothing."""
        bracket = self._bracket_of[trial_id]
        if trial_id in bracket.scores:
            return
        score = score if math.isfinite(score) else -math.inf  # NaN has no order
        bracket.scores[trial_id] = score
        self._searcher(tune_controller).on_rung_result(trial_id, bracket.budget, -score)

    def _leave(self, trial_id: str) -> None:
        self._bracket_of[trial_id].drop(trial_id)
        self._trials.pop(trial_id, None)

    def _halve_if_through(self, tune_controller, bracket: Bracket, current: str | None = None) -> None:
        """Once every trial of a rung is through: promotes the best, stops the rest.

        A rung waits for nothing but its own trials: the ones lost count as through, and a bracket that will get no
        more trials shrinks to what it has. `current` is the trial whose report is being answered: its fate is the
        answer, so it is neither stopped nor marked for resumption here.
        """
        if not bracket.full and not tune_controller.search_alg.is_finished():
            return
        if bracket.last_rung or not bracket.members or any(t not in bracket.scores for t in bracket.members):
            return
        if any(t not in self._trials for t in bracket.members):  # after a restart, before all have come back
            return
        next_size = math.ceil(bracket.added / self._eta ** (bracket.rung + 1) - 1e-9)
        ranked = sorted(bracket.members, key=lambda t: -bracket.scores[t])  # stable: ties go to the older trial
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
