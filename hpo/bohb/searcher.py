"""The searcher of BOHB. It suggests hyperparameters."""

import copy
from collections.abc import Callable
from typing import Any

import ConfigSpace
import numpy as np
import ray.tune.search.bohb
from ray.tune.search import Searcher
from ray.tune.search.sample import Domain
from ray.tune.search.variant_generator import assign_value, parse_spec_vars
from ray.tune.utils.util import unflatten_list_dict

from hpo.bohb import steps
from hpo.bohb.kde import Job, Model


def convert(space: dict) -> tuple[ConfigSpace.ConfigurationSpace, dict[str, Domain]]:
    """Converts a search space of Tune. Ray's own conversion forgets the steps of a quantized range.

    Args:
        space: the search space. It may be nested.

    Returns:
        The space of ConfigSpace, with flat names such as "train_loop_config/lr", and the quantized ranges by flat name.
        ConfigSpace has the indices of their values, whole numbers.

    Raises:
        ValueError: Ray or ConfigSpace cannot convert a domain.
    """
    space, quantized = copy.deepcopy(space), {}
    for path, domain in parse_spec_vars(space)[1]:
        if steps.is_quantized(domain):
            quantized["/".join(map(str, path))] = domain
            assign_value(space, path, steps.of_indices(domain))
    return ray.tune.search.bohb.TuneBOHB.convert_search_space(space), quantized


class TuneBOHB(Searcher):
    """Suggests configurations. It learns from results at rungs only, which it gets from HyperBandForBOHB.

    It replaces ray.tune.search.bohb.TuneBOHB and takes the same arguments.

    Args:
        space: the search space, of ConfigSpace or of Tune. None: Tune passes its param_space before the search.
        bohb_config: arguments of the model, those of hpbandster's config generator BOHB.
        metric: key of a result by which trials are compared. None: the metric of Tune.
        mode: "min" or "max". None: the mode of Tune.
        points_to_evaluate: configurations to suggest first, with flat names such as "train_loop_config/lr". They
            use up no random number: the suggestions after them begin as those of a search without them.
        seed: seed of all random draws. None: each search is another one.
        max_concurrent: the number of trials that may run at a time; 0 is no limit.

    Attributes:
        suggested: {"config", "model_based"} by trial id, of all trials; with "known": True for points_to_evaluate.
        observations: the results that the model was given, in this order, each {"trial_id", "budget", "loss"}.
        allows_trial: called before each suggestion, if set. None: none now. False: none any more, and the search ends
            after the trials that it has.
        slots: the number of trials that the cluster has room for, where it is known. One more is suggested: it waits
            for a slot. A suggestion that is made later knows more results.
        running: ids of the trials that hold a slot, or are about to get one.
        paused: ids of the trials that are paused at a rung.

    Raises:
        RuntimeError: no model-based suggestion can be made with the installed hpbandster, ConfigSpace and statsmodels.
    """

    def __init__(
        self,
        space: dict | ConfigSpace.ConfigurationSpace | None = None,
        bohb_config: dict | None = None,
        metric: str | None = None,
        mode: str | None = None,
        points_to_evaluate: list[dict] | None = None,
        seed: int | None = None,
        max_concurrent: int = 0,
    ):
        super().__init__(metric=metric, mode=mode)
        self.max_concurrent = max_concurrent
        self.allows_trial: Callable[[], bool | None] | None = None
        self.slots: int | None = None
        self.suggested: dict[str, dict[str, Any]] = {}
        self.observations: list[dict[str, Any]] = []
        self.trial_to_params: dict[str, dict] = {}  # configurations of the trials that have not ended, flat
        self.running: set[str] = set()
        self.paused: set[str] = set()
        self._quantized: dict[str, Domain] = {}  # by flat name; their values in trial_to_params are indices
        if isinstance(space, dict):
            space, self._quantized = convert(space)
        self._space, self._bohb_config, self._seed = space, bohb_config or {}, seed
        self._points_to_evaluate = list(points_to_evaluate or [])
        self._earlier: list[tuple[dict, int, float]] = []
        self._restored: tuple[dict, set[str]] | None = None  # arguments of set_state, until the search space is known
        if space is not None:
            self._make_model()

    def _make_model(self) -> None:
        if self._seed is not None:
            self._space.seed(self._seed)
        self._check_model()
        self.bohber = Model(self._space, self._seed, **self._bohb_config)
        for config, budget, loss in self._earlier:
            self.bohber.new_result(Job({"loss": loss}, {"budget": budget, "config": self._with_indices(config)}))

    def _with_indices(self, config: dict) -> dict:
        """A flat configuration as the model has it: with indices in place of values of quantized ranges."""
        return config | {name: steps.index(d, config[name]) for name, d in self._quantized.items()}

    def add_earlier_results(self, results: list[tuple[dict, int, float]]) -> None:
        """Gives the model results of an earlier search. Must be called before the search space is known.

        They are not among `observations`. A state that is restored has them already: it replaces the model's results.

        Args:
            results: configuration with flat names, budget, and loss, to be minimised. It is inf if the trial failed.

        Raises:
            RuntimeError: the model is made already.
        """
        if self._space is not None:
            raise RuntimeError("earlier results must be added before the search space is known")
        self._earlier = results

    def change_seed(self, number: int) -> None:
        """Changes the seed, so that the random suggestions are not those of an earlier search with the same seed.

        Must be called before the search space is known.

        Args:
            number: above 0; the same number gives the same settings.
        """
        if self._seed is not None:
            self._seed = (self._seed + 7919 * number) % 2**32

    def _check_model(self):
        """Fits a model to made-up losses. A model that cannot work is an error now, not after a day of training."""
        model = Model(copy.deepcopy(self._space), 0, **{**self._bohb_config, "random_fraction": 0})
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
        """The number of suggestions that came from the model."""
        return sum(s["model_based"] for s in self.suggested.values())

    def get_state(self) -> dict[str, Any]:
        """Everything that the next suggestion depends on, as data for JSON."""
        live = {trial_id: self._configuration(values=config) for trial_id, config in self.trial_to_params.items()}
        return {
            "model": self.bohber.get_state(),
            "suggested": self.suggested,
            "observations": self.observations,
            "live": {trial_id: configuration.get_array().tolist() for trial_id, configuration in live.items()},
            "running": sorted(self.running),
            "paused": sorted(self.paused),
            "points_to_evaluate": self._points_to_evaluate,
        }

    def set_state(self, state: dict[str, Any], live: set[str]) -> None:
        """Restores a state. If Tune has not passed the search space yet, the state waits for it.

        A trial that was running counts as running, because the scheduler resumes it first.

        Args:
            state: from get_state. Its "live" may have further trials, with their configurations, with flat names.
            live: ids of the trials that have not ended. A trial that the state has and that is not among them was saved
                after its final report and before Tune removed it. It no longer holds a slot.
        """
        self.suggested, self.observations = state["suggested"], state["observations"]
        # The state says how many points are left. Their values are the caller's: JSON turns tuples into lists.
        given, left = self._points_to_evaluate, len(state.get("points_to_evaluate", []))
        self._points_to_evaluate = given[len(given) - left :]
        if self._space is None:
            self._restored = state, live
            return
        self.bohber.set_state(state["model"])
        self.trial_to_params = {
            trial_id: dict(
                self._configuration(values=self._with_indices(config))
                if isinstance(config, dict)
                else self._configuration(vector=np.array(config))
            )
            for trial_id, config in state["live"].items()
        }
        self.running, self.paused = set(state["running"]), set(state["paused"])
        for trial_id in (self.running | self.paused) - live:
            self.on_trial_complete(trial_id)

    def _configuration(self, **of) -> ConfigSpace.Configuration:
        return ConfigSpace.Configuration(self._space, **of)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec) -> bool:
        """Sets metric, mode and search space to those of Tune, and restores a state that waits for the search space.

        Args:
            metric: key of a result.
            mode: "min" or "max".
            config: the search space, as Tune has it.
            **spec: is not used.

        Returns:
            False if the search space was known already; then nothing is changed.
        """
        if self._space is not None:
            return False
        super().__init__(metric=metric or self.metric, mode=mode or self.mode)
        self._space, self._quantized = convert(config)
        self._make_model()
        if self._restored:
            restored, self._restored = self._restored, None
            self.set_state(*restored)
        return True

    def densities(self) -> dict | None:
        """The two densities that the next model-based suggestion uses, as data for JSON.

        They are drawn from these numbers: for a continuous hyperparameter, a density is the mean of normal kernels, one
        at each point, whose standard deviation is the bandwidth. A coordinate x stands for the value
        lower + x (upper - lower), or lower (upper / lower)**x if log is true.

        Returns:
            None if there is no model yet. Otherwise a dictionary with

            - budget: the rung whose results the model has.
            - hyperparameters: by name, {"kind": "continuous", "lower", "upper", "log"} or {"kind": "categorical",
              "categories"}. Their order is that of the coordinates of a point.
            - good, bad: {"points", "bandwidths"}. A point is a list with one number per hyperparameter: a coordinate
              in [0, 1], or the index of a category. There is one bandwidth per hyperparameter.
        """
        if self._space is None or not self.bohber.kde_models:
            return None
        described = {}
        for name, domain in self._space.items():
            if isinstance(domain, ConfigSpace.CategoricalHyperparameter):
                choices = [value.item() if isinstance(value, np.generic) else value for value in domain.choices]
                description = {"kind": "categorical", "categories": choices}
            else:
                lower, upper = domain.lower, domain.upper
                if name in self._quantized:
                    lower, upper = (steps.value(self._quantized[name], index) for index in (lower, upper))
                ends = {"lower": float(lower), "upper": float(upper)}
                description = {"kind": "continuous", **ends, "log": bool(domain.log)}
            described[name.rpartition("/")[2]] = description
        pair = {
            kind: {"points": kde.data.tolist(), "bandwidths": kde.bw.tolist()}
            for kind, kde in self.bohber.current().items()
        }
        return {"budget": int(max(self.bohber.kde_models)), "hyperparameters": described, **pair}

    def suggest(self, trial_id: str) -> dict | str | None:
        """Suggests the configuration of a new trial.

        Args:
            trial_id: id of the new trial.

        Returns:
            The configuration, in plain Python types. None while max_concurrent trials are running, or one more
            than there are slots, or allows_trial says so. Searcher.FINISHED where allows_trial says that none follows.
        """
        if 0 < self.max_concurrent <= len(self.running):
            return None
        if self.slots is not None and len(self.running) > self.slots:
            return None
        allowed = self.allows_trial() if self.allows_trial else True
        if not allowed:
            return None if allowed is None else Searcher.FINISHED
        known = bool(self._points_to_evaluate)
        if known:
            config, model_based = self._with_indices(self._points_to_evaluate.pop(0)), False
        else:
            config, info = self.bohber.get_config()
            model_based = info["model_based_pick"]
        self.trial_to_params[trial_id] = config
        self.running.add(trial_id)
        # ConfigSpace returns np.float64, np.int64 and np.str_, which neither json nor DeepSpeed accepts.
        plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in config.items()}
        plain |= {name: steps.value(domain, plain[name]) for name, domain in self._quantized.items()}
        plain = unflatten_list_dict(plain)
        self.suggested[trial_id] = {"config": plain, "model_based": model_based} | ({"known": True} if known else {})
        return copy.deepcopy(plain)

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        """Does nothing. Tune calls it only if the decision was not STOP; on_rung_result gets all results."""

    def on_rung_result(self, trial_id: str, budget: int, loss: float) -> None:
        """Gives the model one observation. The scheduler calls it once for each trial and rung.

        Args:
            trial_id: id of the trial.
            budget: budget of the rung.
            loss: the result, to be minimised. It is inf if the trial failed.
        """
        self.observations.append({"trial_id": trial_id, "budget": budget, "loss": loss})
        result = {"budget": budget, "config": self.trial_to_params[trial_id]}
        self.bohber.new_result(Job({"loss": loss}, result))

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Removes a trial that has ended. Its observations stay."""
        self.trial_to_params.pop(trial_id, None)
        self.paused.discard(trial_id)
        self.running.discard(trial_id)

    def on_pause(self, trial_id: str) -> None:
        """Notes that a trial is paused at its rung. It no longer counts as running."""
        self.paused.add(trial_id)
        self.running.discard(trial_id)

    def on_unpause(self, trial_id: str) -> None:
        """Notes that a trial is about to be resumed."""
        self.paused.discard(trial_id)
        self.running.add(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Does nothing. Use get_state, together with the scheduler's: one without the other cannot be restored."""

    def restore(self, checkpoint_path: str) -> None:
        """Raises NotImplementedError. Use set_state, see `save`."""
        raise NotImplementedError("TuneBOHB is restored by set_state, together with HyperBandForBOHB")
