"""The scheduler of BOHB. It is Hyperband with synchronous rungs."""

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


def plain(bracket: Bracket) -> dict[str, Any]:
    """A bracket as data for JSON."""
    return dataclasses.asdict(bracket) | {"promoted": sorted(bracket.promoted)}


def from_plain(data: dict[str, Any]) -> Bracket:
    """The bracket of `plain`."""
    return Bracket(**data | {"rungs": [tuple(rung) for rung in data["rungs"]], "promoted": set(data["promoted"])})


def add_alone(state: dict[str, Any], trial_ids: list[str], max_t: int) -> None:
    """Changes a state of `get_state` of a search that has ended: trials that were stopped go on to max_t, each alone.

    Args:
        state: its "alone" gains a bracket of its own for each trial.
        trial_ids: the trials. They must be added again as paused.
        max_t: the largest budget. There are no rungs before it.
    """
    alone = {trial_id: plain(Bracket([(1, max_t)], added=1, members=[trial_id])) for trial_id in trial_ids}
    state["alone"] = state["alone"] | alone


class HyperBandForBOHB(TrialScheduler):
    """Hyperband with synchronous rungs. A trial is paused at its rung, and resumed if it is promoted.

    It replaces ray.tune.schedulers.HyperBandForBOHB and takes the same arguments. A new trial joins the current bracket
    until it is full, or until its first rung was decided because the search had no more trials. When all trials of a
    bracket have a result at the current rung, the best are promoted and the others are stopped. See Li et al.,
    "Hyperband", JMLR 2018, and Falkner, Klein & Hutter, "BOHB", ICML 2018.

    The scheduler adds the key "rungs" to the config of a trial: the budgets at which the trial may be paused or ends. A
    function trainable must report a checkpoint at each of them. It needs no checkpoint at other times.

    Args:
        time_attr: key of a result that has the budget which the trial has used.
        metric: key of a result by which trials are compared. None: the metric of Tune.
        mode: "min" or "max". None: the mode of Tune.
        max_t: the largest budget.
        reduction_factor: one of so many trials is promoted at a rung.
        stop_last_trials: whether to stop a trial at max_t. If not, it ends by itself.
        baseline: whether the first trial of the search is trained to max_t in any case. If its bracket does not promote
            it, it goes on alone and takes no place of a promoted trial. Its results reach the model as all others.

    Attributes:
        brackets: all brackets, the oldest first.
        baseline: the id of the trial that is trained to max_t in any case; None if there is none.
        alone: by trial id, brackets of one trial, which goes on without others: the baseline, after its bracket has
            not promoted it, and trials of `add_alone`.
        settings: the arguments that it was made with, without metric and mode.
        pause_all: set it before a planned stop. Each trial is paused at its next checkpoint, and none is started.
        node_fault: set it while on_trial_error handles a failure that says nothing about the hyperparameters, such as a
            lost node. The model then gets no bad result.
    """

    supports_buffered_results = False  # a trial may train on only after the decision on its result

    def __init__(
        self,
        time_attr: str = "training_iteration",
        metric: str | None = None,
        mode: str | None = None,
        max_t: int = 81,
        reduction_factor: float = 3,
        stop_last_trials: bool = True,
        baseline: bool = False,
    ):
        super().__init__()
        if mode not in (None, "min", "max"):
            raise ValueError(f'mode {mode!r} is neither "min" nor "max"')
        self.brackets: list[Bracket] = []
        self.baseline: str | None = None
        self.alone: dict[str, Bracket] = {}
        self._has_baseline = baseline
        self.pause_all = False
        self.node_fault = False
        self._time_attr, self._reduction_factor, self._stop_last_trials = time_attr, reduction_factor, stop_last_trials
        self._own_metric, self._own_mode = metric, mode  # `_metric` is the base class's
        self._band = rungs(max_t, reduction_factor)
        self.settings = {
            "time_attr": time_attr, "max_t": max_t, "reduction_factor": reduction_factor,
            "stop_last_trials": stop_last_trials, "baseline": baseline,
        }  # fmt: skip
        self._active: list[Bracket] = []  # brackets that are not over; a decision looks at no others
        self._bracket_of: dict[str, Bracket] = {}
        self._trials: dict[str, Trial] = {}  # trials that have not ended

    def set_search_properties(self, metric: str | None, mode: str | None, **spec) -> bool:
        """Sets metric and mode to those of Tune. Returns False if one is set already."""
        if self._own_metric and metric or self._own_mode and mode:
            return False
        self._own_metric, self._own_mode = self._own_metric or metric, self._own_mode or mode
        return True

    @property
    def metric(self) -> str | None:
        """The key of a result by which trials are compared."""
        return self._own_metric

    def get_state(self) -> dict[str, Any]:
        """The brackets, as data for JSON."""
        number = {id(bracket): i for i, bracket in enumerate(self.brackets)}
        return {
            "brackets": list(map(plain, self.brackets)),
            "bracket_of": {trial_id: number[id(bracket)] for trial_id, bracket in self._bracket_of.items()},
            "baseline": self.baseline,
            "alone": {trial_id: plain(bracket) for trial_id, bracket in self.alone.items()},
        }

    def set_state(self, state: dict[str, Any], waiting: set[str]) -> None:
        """Restores a state. Then on_trial_add must be called for each trial that has not ended.

        Args:
            state: from get_state.
            waiting: ids of the trials that had no slot yet. They come back as pending, all others as paused.
        """
        self.brackets = list(map(from_plain, state["brackets"]))
        self._bracket_of = {trial_id: self.brackets[i] for trial_id, i in state["bracket_of"].items()}
        self.baseline, alone = state.get("baseline"), state.get("alone") or {}  # older states have neither
        if "rungs" in alone:  # a state of version 2 has at most that of the baseline
            alone = {self.baseline: alone}
        self.alone = {trial_id: from_plain(bracket) for trial_id, bracket in alone.items()}
        self._active = [b for b in [*self.brackets, *self.alone.values()] if b.members or b.open]
        for bracket in self._active:
            for trial_id in bracket.members:
                if trial_id not in bracket.scores and trial_id not in waiting:
                    bracket.promoted.add(trial_id)  # it was running, or about to run

    def bracket_of(self, trial_id: str) -> Bracket | None:
        """The bracket of a trial; None if the trial never had one."""
        return self._bracket_of.get(trial_id)

    def live_trials(self) -> list[Trial]:
        """The trials that have not ended, the oldest first."""
        return list(self._trials.values())

    @property
    def budgets(self) -> list[int]:
        """The budgets of all rungs. The bracket with most trials has each of them."""
        return [budget for _, budget in self._band[0]]

    def close_bracket(self) -> None:
        """The newest bracket takes no more trials. The next trial opens another one."""
        if self.brackets:
            self.brackets[-1].closed = True

    def has_rung(self, trial_id: str) -> bool:
        """Whether a trial has a rung to reach, in its bracket or alone."""
        return trial_id in self._bracket_of and trial_id in self._current_bracket(trial_id).members

    def _current_bracket(self, trial_id: str) -> Bracket:
        """The bracket that decides on a trial: its own, or that in which it goes on alone."""
        return self.alone.get(trial_id) or self._bracket_of[trial_id]

    # -- called by Tune -----------------------------------------------------------------------------------------------

    def on_trial_add(self, tune_controller, trial: Trial) -> None:
        """Adds a new trial to the current bracket. A trial that Tune starts again after a failure keeps its bracket.

        Raises:
            ValueError: metric or mode is not set.
        """
        if self._own_metric is None or self._own_mode is None:
            raise ValueError("HyperBandForBOHB needs a metric and a mode, here or in tune.TuneConfig.")
        self._trials[trial.trial_id] = trial
        if trial.trial_id in self._bracket_of:
            return
        if self._has_baseline and not self._bracket_of:
            self.baseline = trial.trial_id
        if not self.brackets or not self.brackets[-1].open:
            # The band's next bracket; they are in the order of their size. After the last, the next band begins.
            self.brackets.append(Bracket(list(self._band[len(self.brackets) % len(self._band)])))
            self._active.append(self.brackets[-1])
        bracket = self._bracket_of[trial.trial_id] = self.brackets[-1]
        bracket.added += 1
        bracket.members.append(trial.trial_id)
        trial.config = {**(trial.config or {}), "rungs": bracket.budgets()}

    def on_trial_result(self, tune_controller, trial: Trial, result: dict) -> str:
        """Decides whether a trial continues, is paused or is stopped.

        Below its rung a trial continues. At its rung the model gets the result, whatever the decision is. A result with
        the key "failed" stops a trial that cannot continue; it counts as a bad result at the trial's next rung.

        Returns:
            CONTINUE, PAUSE or STOP of TrialScheduler.

        Raises:
            RuntimeError: a function trainable reported at its rung without a checkpoint, so that it would start from
                zero when it is resumed. This ends the search.
        """
        if self._time_attr not in result:
            logger.warning("Trial %s: a report without %r is ignored.", trial.trial_id, self._time_attr)
            return TrialScheduler.CONTINUE
        decision = self._decide(tune_controller, trial, result)
        can_pause = SHOULD_CHECKPOINT in result and trial.trial_id in self._trials
        return (
            TrialScheduler.PAUSE if self.pause_all and can_pause and decision == TrialScheduler.CONTINUE else decision
        )

    def _decide(self, tune_controller, trial: Trial, result: dict) -> str:
        bracket = self._current_bracket(trial.trial_id)
        bracket.promoted.discard(trial.trial_id)
        if "failed" in result:
            self._fail(tune_controller, trial.trial_id)
            return TrialScheduler.STOP
        if trial.trial_id not in bracket.members:  # it has had its last rung
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
                f"Trial {trial.trial_id} reported at its rung, {where}, without a checkpoint. It would start from zero "
                "when it is resumed. Report a checkpoint at each of config['rungs']."
            )
        self._promote_if_complete(tune_controller, bracket, current=trial.trial_id)
        bracket = self._current_bracket(trial.trial_id)
        if trial.trial_id in bracket.members and trial.trial_id not in bracket.scores:
            if trial.trial_id not in self.alone or not any(b.promoted for b in self._active):
                return TrialScheduler.CONTINUE  # it was promoted just now and keeps its slot
            bracket.promoted.add(trial.trial_id)  # a baseline that trains alone gives its slot to a promoted trial
        if trial.trial_id in bracket.members:
            self._searcher(tune_controller).on_pause(trial.trial_id)
            return TrialScheduler.PAUSE
        return TrialScheduler.STOP

    def on_trial_error(self, tune_controller, trial: Trial) -> None:
        """Counts a failed trial as a bad result at its rung, unless Tune starts it again or node_fault is set."""
        if trial.status == Trial.ERROR:  # before this call Tune sets it only if it will start the trial again
            return
        if self.node_fault:
            self._leave(trial.trial_id)
        else:
            self._fail(tune_controller, trial.trial_id)

    def _fail(self, tune_controller, trial_id: str) -> None:
        bracket = self._current_bracket(trial_id)
        if trial_id in bracket.members and trial_id not in bracket.scores:
            self._record(tune_controller, trial_id, -math.inf)
        self._leave(trial_id)

    def on_trial_complete(self, tune_controller, trial: Trial, result: dict) -> None:
        """Removes a trial that has ended by itself from its bracket."""
        self._leave(trial.trial_id)

    def on_trial_remove(self, tune_controller, trial: Trial) -> None:
        """Removes a trial that was stopped while it was pending or paused from its bracket."""
        self._leave(trial.trial_id)

    def choose_trial_to_run(self, tune_controller) -> Trial | None:
        """Chooses the trial for a free slot.

        Returns:
            A promoted trial, of the oldest bracket that has one; else a trial that goes on alone; else a pending
            trial. None if there is none, or if the searcher's max_concurrent trials are running.
        """
        if self.pause_all:
            return None
        searcher = self._searcher(tune_controller)
        for bracket in list(self._active):
            self._promote_if_complete(tune_controller, bracket)
        self._active = [b for b in self._active if b.members or b.open]
        limit = searcher.max_concurrent if searcher.max_concurrent > 0 else math.inf
        promoted = [(b, t) for b in self._active for t in b.members if t in b.promoted and t in self._trials]
        # Trials that ran before a restart come first.
        promoted.sort(key=lambda pair: (pair[1] not in searcher.running, pair[1] in self.alone))
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
        """One line for each bracket that is not over."""
        return "\n".join(
            f"bracket {b.rungs}: at {b.budget}, {len(b.members)} trials, {len(b.scores)} results" for b in self._active
        )

    # -- rungs --------------------------------------------------------------------------------------------------------

    @staticmethod
    def _searcher(tune_controller) -> TuneBOHB:
        searcher = tune_controller.search_alg
        while not isinstance(searcher, TuneBOHB):
            searcher = getattr(searcher, "searcher", None)
            if searcher is None:
                raise TypeError("HyperBandForBOHB needs hpo.bohb.searcher.TuneBOHB as the search algorithm.")
        return searcher

    def _record(self, tune_controller, trial_id: str, score: float) -> None:
        """Keeps the first score of a trial at the current rung (higher is better), and gives it to the model."""
        bracket = self._current_bracket(trial_id)
        if trial_id in bracket.scores:
            return
        score = score if math.isfinite(score) else -math.inf  # NaN has no order
        bracket.scores[trial_id] = score
        self._searcher(tune_controller).on_rung_result(trial_id, bracket.budget, -score)

    def _leave(self, trial_id: str) -> None:
        self._current_bracket(trial_id).drop(trial_id)
        self._trials.pop(trial_id, None)

    def _promote_if_complete(self, tune_controller, bracket: Bracket, current: str | None = None) -> None:
        """If all trials of a bracket have a result at the current rung, promotes the best and stops the others.

        A rung waits for the trials of its bracket only, without those that were lost. If all trials of the search have
        been suggested, the last bracket does not wait for more.

        Args:
            tune_controller: stops the trials.
            bracket: the bracket.
            current: the trial whose report is handled, if any. It is running, so on_trial_result stops or continues it.
        """
        if bracket.open and not tune_controller.search_alg.is_finished():
            return
        if bracket.last_rung or not bracket.members or any(t not in bracket.scores for t in bracket.members):
            return
        if any(t not in self._trials for t in bracket.members):  # after a restart, until all trials were added again
            return
        next_size = math.ceil(bracket.added / self._reduction_factor ** (bracket.rung + 1) - 1e-9)
        ranked = sorted(bracket.members, key=lambda t: -bracket.scores[t])  # of equal scores the older trial is first
        finite = [t for t in ranked if bracket.scores[t] > -math.inf]
        best = finite[:next_size]
        others = [t for t in bracket.members if t not in best]
        bracket.rung += 1
        if self.baseline in finite and self.baseline in others:  # it goes on alone
            others.remove(self.baseline)
            left = [(1, budget) for _, budget in bracket.rungs[bracket.rung :]]
            own = Bracket(left, added=1, members=[self.baseline], promoted={self.baseline} - {current})
            self.alone[self.baseline] = own
            self._active.append(own)
        bracket.scores = {}
        bracket.members = [t for t in bracket.members if t in best]
        bracket.promoted = {t for t in best if t != current}
        for trial_id in others:
            if trial_id == current:
                self._trials.pop(trial_id)
            else:
                tune_controller.stop_trial(self._trials[trial_id])
