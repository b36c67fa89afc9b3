"""The model: kernel densities of good and of bad results."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import ConfigSpace
import numpy as np
import scipy.stats
import statsmodels.api
from hpbandster.optimizers.config_generators.bohb import BOHB

# Narrowest kernel, in units of a hyperparameter's range. hpbandster's 1e-3 lets a handful of good results that
# lie close together pull every later suggestion onto one point (the same lr to three digits, dozens of times).
# Of 0.001 to 0.3, 0.1 has the lowest regret: bench/search_quality.py --variants.
MIN_BANDWIDTH = 0.1


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
