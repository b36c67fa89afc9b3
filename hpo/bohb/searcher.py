"""The searcher of BOHB: suggests hyperparameters."""

import copy
from typing import Any

import ConfigSpace
import numpy as np
import ray.tune.search.bohb
from ray.tune.search import Searcher
from ray.tune.utils.util import unflatten_list_dict

from hpo.bohb.kde import Job, Model


class TuneBOHB(Searcher):
    """Suggests configurations. Learns from results at rungs only; HyperBandForBOHB hands them over.

    `suggested` maps a trial id to {"config", "model_based"}. `observations` lists the results that the model has, each
    {"trial_id", "budget", "loss"}. Together they are the audit of the search.

    Args:
        space: search space of ConfigSpace. None: Tune hands over its own, see set_search_properties.
        bohb_config: arguments of the model, see hpbandster's config generator BOHB.
        metric: to compare trials by. None: that of Tune.
        mode: "min" or "max". None: that of Tune.
        points_to_evaluate: configurations to suggest first.
        seed: of all random draws.
        max_concurrent: the number of trials that may run at a time; 0 is no limit.

    Raises:
        RuntimeError: the installed hpbandster, ConfigSpace and statsmodels cannot make a model-based suggestion.
    """

    def __init__(
        self,
        space: ConfigSpace.ConfigurationSpace | None = None,
        bohb_config: dict | None = None,
        metric: str | None = None,
        mode: str | None = None,
        points_to_evaluate: list[dict] | None = None,
        seed: int | None = None,
        max_concurrent: int = 0,
    ):
        super().__init__(metric=metric, mode=mode)
        self.max_concurrent = max_concurrent
        self.suggested: dict[str, dict[str, Any]] = {}
        self.observations: list[dict[str, Any]] = []
        self.trial_to_params: dict[str, dict] = {}  # the configuration of each live trial, as ConfigSpace has it
        self.running: set[str] = set()
        self.paused: set[str] = set()
        self._space, self._bohb_config, self._seed = space, bohb_config or {}, seed
        self._points_to_evaluate = list(points_to_evaluate or [])
        self._restored: tuple[dict, set[str]] | None = None  # a state that waits for the search space
        if space is not None:
            self._make_model()

    def _make_model(self) -> None:
        if self._seed is not None:
            self._space.seed(self._seed)
        self._check_model()
        self.bohber = Model(self._space, self._seed, **self._bohb_config)

    def _check_model(self):
        """Builds a model of made-up losses, so that a search does not learn after a day that it cannot build one."""
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
        """Everything that the next suggestion depends on, as plain data."""
        live = {trial_id: self._configuration(values=config) for trial_id, config in self.trial_to_params.items()}
        return {
            "model": self.bohber.get_state(),
            "suggested": self.suggested,
            "observations": self.observations,
            "live": {trial_id: configuration.get_array().tolist() for trial_id, configuration in live.items()},
            "running": sorted(self.running),
            "paused": sorted(self.paused),
        }

    def set_state(self, state: dict[str, Any], live: set[str]) -> None:
        """Goes on from a state, at once or as soon as the search space is known.

        A running trial stays running, because the scheduler resumes it first.

        Args:
            state: from get_state.
            live: the live trials. One that the state has and that is not live was saved after its final report and
                before Tune removed it. It holds no slot any more.
        """
        self.suggested, self.observations = state["suggested"], state["observations"]
        if self._space is None:
            self._restored = state, live
            return
        self.bohber.set_state(state["model"])
        self.trial_to_params = {
            trial_id: dict(self._configuration(vector=np.array(vector))) for trial_id, vector in state["live"].items()
        }
        self.running, self.paused = set(state["running"]), set(state["paused"])
        for trial_id in (self.running | self.paused) - live:
            self.on_trial_complete(trial_id)

    def _configuration(self, **of) -> ConfigSpace.Configuration:
        return ConfigSpace.Configuration(self._space, **of)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec) -> bool:
        """Takes metric, mode and search space over from Tune, then a state that waited for the search space."""
        if self._space is not None:
            return False
        super().__init__(metric=metric or self.metric, mode=mode or self.mode)
        self._space = ray.tune.search.bohb.TuneBOHB.convert_search_space(config)
        self._make_model()
        if self._restored:
            restored, self._restored = self._restored, None
            self.set_state(*restored)
        return True

    def densities(self) -> dict | None:
        """The model as plain data, for figures; None as long as there is no model.

        Returns:
            {"budget", "hyperparameters", "good", "bad"}. Each of the n hyperparameters has a name and {"kind":
            "continuous", "lower", "upper", "log"} or {"kind": "categorical", "categories"}. Both densities are
            {"points": m lists of n coordinates in [0, 1], or indices of categories, "bandwidths": n numbers}.
        """
        if self._space is None or not self.bohber.kde_models:
            return None
        described = {}
        for name, domain in self._space.items():
            if isinstance(domain, ConfigSpace.CategoricalHyperparameter):
                choices = [value.item() if isinstance(value, np.generic) else value for value in domain.choices]
                description = {"kind": "categorical", "categories": choices}
            else:
                ends = {"lower": float(domain.lower), "upper": float(domain.upper)}
                description = {"kind": "continuous", **ends, "log": bool(domain.log)}
            described[name.rpartition("/")[2]] = description
        pair = {
            kind: {"points": kde.data.tolist(), "bandwidths": kde.bw.tolist()}
            for kind, kde in self.bohber.current().items()
        }
        return {"budget": int(max(self.bohber.kde_models)), "hyperparameters": described, **pair}

    def suggest(self, trial_id: str) -> dict | None:
        """The configuration of a new trial, in plain Python types; None while max_concurrent trials are running."""
        if 0 < self.max_concurrent <= len(self.running):
            return None
        if self._points_to_evaluate:
            config, model_based = self._points_to_evaluate.pop(0), False
        else:
            config, info = self.bohber.get_config()
            model_based = info["model_based_pick"]
        self.trial_to_params[trial_id] = config
        self.running.add(trial_id)
        # ConfigSpace returns np.float64, np.int64 and np.str_, which neither json nor DeepSpeed accepts.
        plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in config.items()}
        plain = unflatten_list_dict(plain)
        self.suggested[trial_id] = {"config": plain, "model_based": model_based}
        return copy.deepcopy(plain)

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        """Does nothing: Tune reports only what the scheduler did not answer with STOP. See on_rung_result."""

    def on_rung_result(self, trial_id: str, budget: int, loss: float) -> None:
        """Tells the model of one result.

        Args:
            trial_id: of the trial.
            budget: of the rung.
            loss: to be minimised; inf for a failed trial, which counts as bad.
        """
        self.observations.append({"trial_id": trial_id, "budget": budget, "loss": loss})
        result = {"budget": budget, "config": self.trial_to_params[trial_id]}
        self.bohber.new_result(Job({"loss": loss}, result))

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        """Forgets a trial that has ended."""
        self.trial_to_params.pop(trial_id, None)
        self.paused.discard(trial_id)
        self.running.discard(trial_id)

    def on_pause(self, trial_id: str) -> None:
        """The trial does not run any more, and may be resumed."""
        self.paused.add(trial_id)
        self.running.discard(trial_id)

    def on_unpause(self, trial_id: str) -> None:
        """The trial is about to run again."""
        self.paused.discard(trial_id)
        self.running.add(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: the state of the search is saved by get_state, in one piece with that of the scheduler."""

    def restore(self, checkpoint_path: str) -> None:
        """Raises NotImplementedError, see save."""
        raise NotImplementedError("use set_state")
