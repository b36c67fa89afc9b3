"""The searcher: suggests configurations."""

import copy
from typing import Any

import ConfigSpace
import numpy as np
import ray.tune.search.bohb
from ray.tune.utils.util import unflatten_list_dict

from hpo.bohb.kde import Job, Model


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
