"""BOHB that is really BOHB: Ray Tune's TuneBOHB and HyperBandForBOHB, corrected.

Falkner, Klein & Hutter, "BOHB: Robust and Efficient Hyperparameter Optimization at Scale", ICML 2018.
Hyperband decides how long a trial may train; two kernel densities, one over good and one over bad results
at the largest budget that has enough of them, decide what to try next. As they ship, Ray's two classes lose
results on the way to the model, draw from the global random state and fall back to random search without a
word. What differs here, and the test that shows each difference, is listed in tests/test_bohb.py.

    scheduler = HyperBandForBOHB(time_attr="training_iteration", max_t=50, reduction_factor=4, stop_last_trials=False)
    searcher = TuneBOHB(metric="eval_loss", mode="min", seed=0)

The two must be used together: the scheduler hands each result that a trial earned at a rung to the searcher.
Their state is plain data (lists, dictionaries, numbers, strings), so that it can be written as JSON and read back by another version.
"""

import copy
import dataclasses
import logging
import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import ConfigSpace
import numpy as np
import ray.tune.schedulers
import ray.tune.search.bohb
import scipy.stats
import statsmodels.api
from hpbandster.optimizers.config_generators.bohb import BOHB
from ray.tune.experiment import Trial
from ray.tune.result import SHOULD_CHECKPOINT
from ray.tune.schedulers import TrialScheduler
from ray.tune.trainable import FunctionTrainable
from ray.tune.utils.util import unflatten_list_dict

logger = logging.getLogger(__name__)

# Narrowest kernel, in units of a hyperparameter's range. hpbandster's 1e-3 lets a handful of good results that
# lie close together pull every later suggestion onto one point (the same lr to three digits, dozens of times).
# Of 0.001 to 0.3, 0.1 has the lowest regret: bench/search_quality.py --variants.
MIN_BANDWIDTH = 0.1


# ---------------------------------------------------------------------------------------------------------------------
# the plan: brackets and rungs


def rungs(max_t: int, reduction_factor: float) -> list[list[tuple[int, int]]]:
    """The brackets of one band, most aggressive first; each a list of rungs (number of trials, budget).

    Budgets are max_t / reduction_factor**k, rounded down, so that all brackets share them and every bracket ends at
    max_t itself. Ray multiplies a rounded first budget instead: 3, 12, 48 for max_t 50 and reduction_factor 4.
    Number of brackets and of trials as in Ray (Li et al., "Hyperband", JMLR 2018, with rounding to nearest).
    """
    s_max = round(math.log(max_t) / math.log(reduction_factor))
    budgets = [int(max_t / reduction_factor**k + 1e-9) for k in range(s_max + 1)]
    band = []
    for s in range(s_max, -1, -1):
        if budgets[s] < 1:  # a trial cannot train for less than one iteration
            continue
        n = math.ceil((s_max + 1) / (s + 1) * reduction_factor**s - 1e-9)
        band.append([(math.ceil(n / reduction_factor**i - 1e-9), budgets[s - i]) for i in range(s + 1)])
    return band


def band_size(max_t: int, reduction_factor: float) -> int:
    """Number of trials that fill every bracket once."""
    return sum(bracket[0][0] for bracket in rungs(max_t, reduction_factor))


# ---------------------------------------------------------------------------------------------------------------------
# the model


@dataclass
class Job:
    """What hpbandster wants to be told of a result."""

    result: dict
    kwargs: dict
    exception: None = None


class Model(BOHB):
    """hpbandster's pair of kernel densities a budget, sampled from a random stream of its own.

    hpbandster's own get_config draws from the global np.random and turns any exception into a random suggestion.
    Here an exception is an exception: a model that cannot be used must not look like one that is.
    """

    def __init__(self, configspace: ConfigSpace.ConfigurationSpace, seed: int | None = None, **kwargs):
        super().__init__(configspace, **{"min_bandwidth": MIN_BANDWIDTH, **kwargs})
        self.rng = np.random.RandomState(seed)
        self.space_seed, self.sampled = int(self.rng.randint(2**31)), 0  # of the random suggestions, and how many were drawn
        configspace.seed(self.space_seed)

    def get_state(self) -> dict[str, Any]:
        """All that the next suggestion depends on, as plain data. Budgets are written as [budget, value], as JSON's keys are strings."""
        name, keys, *rest = self.rng.get_state()
        return {
            "rng": [name, keys.tolist(), *rest],
            "space_seed": self.space_seed,
            "sampled": self.sampled,
            "configs": [[budget, [array.tolist() for array in arrays]] for budget, arrays in self.configs.items()],
            "losses": [[budget, [float(loss) for loss in losses]] for budget, losses in self.losses.items()],
            "densities": [
                [budget, {kind: {"data": kde.data.tolist(), "bw": kde.bw.tolist()} for kind, kde in pair.items()}]
                for budget, pair in self.kde_models.items()
            ],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a state: the same suggestions follow, to the last digit."""
        name, keys, *rest = state["rng"]
        self.rng.set_state((name, np.array(keys, np.uint32), *rest))
        self.space_seed, self.sampled = state["space_seed"], state["sampled"]
        self.configspace.seed(self.space_seed)
        for _ in range(self.sampled):  # ConfigSpace has no public way to its random stream
            self.configspace.sample_configuration()
        self.configs = {budget: [np.array(array) for array in arrays] for budget, arrays in state["configs"]}
        self.losses = {budget: list(losses) for budget, losses in state["losses"]}
        density = statsmodels.api.nonparametric.KDEMultivariate
        self.kde_models = {
            budget: {kind: density(np.array(kde["data"]), self.kde_vartypes, np.array(kde["bw"])) for kind, kde in pair.items()}
            for budget, pair in state["densities"]
        }

    def new_result(self, job: Job, update_model: bool = True) -> None:
        """Adds one result and refits the densities of its budget."""
        budget = job.kwargs["budget"]
        known = len(self.configs.get(budget, []))
        with warnings.catch_warnings():  # of statsmodels to its own developers
            warnings.simplefilter("ignore")
            super().new_result(job, update_model)
        if len(self.configs[budget]) == known:  # hpbandster forgets results below its largest model
            self.configs[budget].append(ConfigSpace.Configuration(self.configspace, job.kwargs["config"]).get_array())
            self.losses[budget].append(job.result["loss"])
        if budget in self.kde_models:
            # The rule of thumb ignores that the kernel of a category with c choices is a density up to (c-1)/c only.
            widest = np.where(self.vartypes > 0, (self.vartypes - 1) / np.maximum(self.vartypes, 1), np.inf)
            for kde in self.kde_models[budget].values():
                kde.bw = np.minimum(kde.bw, np.maximum(widest, 1e-6))

    def get_config(self, budget: float | None = None) -> tuple[dict, dict]:
        """Suggests a configuration; info["model_based_pick"] says where it came from (budget is not used)."""
        if not self.kde_models or self.rng.rand() < self.random_fraction:
            self.sampled += 1
            return dict(self.configspace.sample_configuration()), {"model_based_pick": False}
        kde = self.kde_models[max(self.kde_models)]
        candidates = self._candidates(kde["good"])
        good, bad = self._density(kde["good"], candidates), self._density(kde["bad"], candidates)
        ratio = np.maximum(bad, 1e-32) / np.maximum(good, 1e-32)
        best = candidates[np.argmin(ratio)]
        return dict(ConfigSpace.Configuration(self.configspace, vector=best)), {"model_based_pick": True}

    def impute_conditional_data(self, array: np.ndarray) -> np.ndarray:
        """As hpbandster's, whose loop over all results is a refit's largest cost, but only where there is a gap to fill."""
        return super().impute_conditional_data(array) if np.isnan(array).any() else array

    def _density(self, kde, points: np.ndarray) -> np.ndarray:
        """Density at points (m, d), shape (m,). statsmodels' own pdf is infinite at a category that its data lacks."""
        kernels = np.ones((len(points), len(kde.data)))
        for j, (bw, choices) in enumerate(zip(kde.bw, self.vartypes)):
            x, data = points[:, j, None], kde.data[None, :, j]
            if choices == 0:
                # the normal density; scipy.stats checks its arguments for longer than it computes
                kernels *= np.exp(-(((x - data) / bw) ** 2) / 2) / math.sqrt(2 * math.pi) / bw
            else:  # Aitchison & Aitken
                kernels *= np.where(x == data, 1 - bw, bw / max(choices - 1, 1))
        return kernels.mean(axis=1)

    def _candidates(self, good) -> np.ndarray:
        """num_samples points around those of the good density, shape (num_samples, d), in [0, 1] or category indices."""
        centres = good.data[self.rng.randint(len(good.data), size=self.num_samples)]
        candidates = np.empty_like(centres)
        for j, (bw, choices) in enumerate(zip(good.bw, self.vartypes)):
            centre = centres[:, j]
            if choices == 0:
                scale = self.bw_factor * bw
                candidates[:, j] = scipy.stats.truncnorm.rvs(
                    -centre / scale, (1 - centre) / scale, loc=centre, scale=scale, random_state=self.rng
                )
            else:
                keep = self.rng.rand(len(centre)) < 1 - bw
                candidates[:, j] = np.where(keep, centre, self.rng.randint(choices, size=len(centre)))
        return candidates


# ---------------------------------------------------------------------------------------------------------------------
# the searcher


class TuneBOHB(ray.tune.search.bohb.TuneBOHB):
    """Suggests configurations; learns from rungs only, told by HyperBandForBOHB. Arguments as for Ray's class.

    `suggested` maps a trial id to its {"config", "model_based"}, `observations` lists what the model was told, each
    {"trial_id", "budget", "loss"}: together they are the audit of the search.

    Raises:
        RuntimeError: when the installed hpbandster, ConfigSpace and statsmodels cannot make a model-based suggestion.
    """

    def __init__(self, *args, **kwargs):
        self.suggested: dict[str, dict[str, Any]] = {}
        self.observations: list[dict[str, Any]] = []
        self._restored: tuple[dict, set[str]] | None = None  # a state that waits for the search space
        super().__init__(*args, **kwargs)

    def _setup_bohb(self):
        super()._setup_bohb()
        self._check_model()
        self.bohber = Model(self._space, self._seed, **(self._bohb_config or {}))

    def _check_model(self):
        """A search must not discover after a day that its model could not be built: build one now, on made-up losses."""
        model = Model(copy.deepcopy(self._space), 0, **{**(self._bohb_config or {}), "random_fraction": 0})
        try:
            for loss in range(2 * (len(self._space) + 1)):
                job = Job({"loss": loss}, {"budget": 1, "config": dict(model.configspace.sample_configuration())})
                model.new_result(job)
            _, info = model.get_config()
            assert info["model_based_pick"], f"no model after {loss + 1} results"
        except Exception as error:
            raise RuntimeError(f"BOHB's model cannot be built with the installed packages: {error!r}") from error

    @property
    def model_based(self) -> int:
        """How many of the suggestions came from the model."""
        return sum(s["model_based"] for s in self.suggested.values())

    def get_state(self) -> dict[str, Any]:
        """All that the next suggestion depends on, as plain data. Configurations of live trials are vectors of the search space."""
        return {
            "model": self.bohber.get_state(),
            "suggested": self.suggested,
            "observations": self.observations,
            "live": {trial_id: self._configuration(values=config).get_array().tolist() for trial_id, config in self.trial_to_params.items()},
            "running": sorted(self.running),
            "paused": sorted(self.paused),
        }

    def set_state(self, state: dict[str, Any], live: set[str]) -> None:
        """Goes on from a state, at once or as soon as the search space is known.

        A running trial stays running: the scheduler will resume it first. A trial that is not in `live` was saved after its final report
        and before Tune removed it: it holds no slot any more.
        """
        self.suggested, self.observations = state["suggested"], state["observations"]
        if self._space is None:
            self._restored = state, live
            return
        self.bohber.set_state(state["model"])
        self.trial_to_params = {trial_id: dict(self._configuration(vector=np.array(vector))) for trial_id, vector in state["live"].items()}
        self.running, self.paused = set(state["running"]), set(state["paused"])
        for trial_id in (self.running | self.paused) - live:
            self.on_trial_complete(trial_id)

    def _configuration(self, **of) -> ConfigSpace.Configuration:
        return ConfigSpace.Configuration(self._space, **of)

    def set_search_properties(self, metric, mode, config, **spec) -> bool:
        """As in Ray's class; then takes over a state that waited for the search space."""
        done = super().set_search_properties(metric, mode, config, **spec)
        if self._restored:
            restored, self._restored = self._restored, None
            self.set_state(*restored)
        return done

    def suggest(self, trial_id: str) -> dict | None:
        """The configuration of a new trial, in plain Python types; None while max_concurrent trials are under way."""
        if self._max_concurrent > 0 and len(self.running) >= self._max_concurrent:
            return None
        if self._points_to_evaluate:
            config, model_based = self._points_to_evaluate.pop(0), False
        else:
            config, info = self.bohber.get_config()
            model_based = info["model_based_pick"]
        self.trial_to_params[trial_id] = config
        self.running.add(trial_id)
        # ConfigSpace hands out np.float64, np.int64 and np.str_, which neither json nor DeepSpeed accepts
        plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in config.items()}
        plain = unflatten_list_dict(plain)
        self.suggested[trial_id] = {"config": plain, "model_based": model_based}
        return copy.deepcopy(plain)

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        """Nothing: Tune reports here only what the scheduler did not answer with STOP. See on_rung_result."""

    def on_rung_result(self, trial_id: str, budget: int, loss: float) -> None:
        """Tells the model of one result, to be minimised; inf for a crashed trial, which counts as bad."""
        self.observations.append({"trial_id": trial_id, "budget": budget, "loss": loss})
        self.bohber.new_result(Job({"loss": loss}, {"budget": budget, "config": self.trial_to_params[trial_id]}))

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Forgets a trial that ended."""
        self.trial_to_params.pop(trial_id, None)
        self.paused.discard(trial_id)
        self.running.discard(trial_id)


# ---------------------------------------------------------------------------------------------------------------------
# the scheduler


@dataclass
class Bracket:
    """One run of successive halving. Trials are known by their ids."""

    rungs: list[tuple[int, int]]  # (number of trials, budget) of each rung
    rung: int = 0  # the one being worked on
    added: int = 0  # trials that ever came in, failed ones included
    members: list[str] = field(default_factory=list)  # still in the race, in the order they came
    scores: dict[str, float] = field(default_factory=dict)  # results at this rung, higher is better
    promoted: set[str] = field(default_factory=set)  # wait to be resumed

    @property
    def budget(self) -> int:
        return self.rungs[self.rung][1]

    @property
    def last_rung(self) -> bool:
        return self.rung == len(self.rungs) - 1

    @property
    def full(self) -> bool:
        return self.added >= self.rungs[0][0]

    def budgets(self) -> list[int]:
        return [budget for _, budget in self.rungs]

    def drop(self, trial_id: str) -> None:
        if trial_id in self.members:
            self.members.remove(trial_id)
        self.promoted.discard(trial_id)


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
                raise TypeError("HyperBandForBOHB needs bohb.TuneBOHB as the search algorithm.")
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
