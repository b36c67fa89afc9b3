"""The model of BOHB: kernel densities of the good and of the bad results at each budget."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import ConfigSpace
import numpy as np
import scipy.stats
import statsmodels.api
from hpbandster.optimizers.config_generators.bohb import BOHB

# The narrowest kernel, in units of a hyperparameter's range. With hpbandster's 0.001 a few good results that lie close
# together pull all later suggestions onto one point. Of 0.001 to 0.3, 0.1 has the lowest regret:
# bench/search_quality.py --variants.
MIN_BANDWIDTH = 0.1


@dataclass
class Job:
    """A result in the form that hpbandster expects."""

    result: dict
    kwargs: dict
    exception: None = None


class Model(BOHB):
    """hpbandster's pairs of kernel densities, sampled from a random stream of their own.

    hpbandster's get_config draws from the global np.random and turns every exception into a random suggestion. Here an
    exception is raised: a model that cannot be used must not look like one that is.

    Args:
        configspace: the search space, with d hyperparameters.
        seed: of the random stream.
        **kwargs: of hpbandster's class.
    """

    def __init__(self, configspace: ConfigSpace.ConfigurationSpace, seed: int | None = None, **kwargs):
        super().__init__(configspace, **{"min_bandwidth": MIN_BANDWIDTH, **kwargs})
        self.rng = np.random.RandomState(seed)
        self.space_seed, self.sampled = int(self.rng.randint(2**31)), 0  # of random suggestions, and their number
        configspace.seed(self.space_seed)

    def get_state(self) -> dict[str, Any]:
        """Everything that the next suggestion depends on, as plain data.

        Dictionaries by budget are lists of [budget, value], because the keys of JSON are strings.
        """
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
        """Goes on from a state. The same suggestions follow, to the last digit."""
        name, keys, *rest = state["rng"]
        self.rng.set_state((name, np.array(keys, np.uint32), *rest))
        self.space_seed, self.sampled = state["space_seed"], state["sampled"]
        self.configspace.seed(self.space_seed)
        for _ in range(self.sampled):  # ConfigSpace has no public way to set its random stream
            self.configspace.sample_configuration()
        self.configs = {budget: [np.array(array) for array in arrays] for budget, arrays in state["configs"]}
        self.losses = {budget: list(losses) for budget, losses in state["losses"]}
        density = statsmodels.api.nonparametric.KDEMultivariate
        self.kde_models = {
            budget: {
                kind: density(np.array(kde["data"]), self.kde_vartypes, np.array(kde["bw"]))
                for kind, kde in pair.items()
            }
            for budget, pair in state["densities"]
        }

    def new_result(self, job: Job, update_model: bool = True) -> None:
        """Adds a result and fits the densities of its budget again."""
        budget = job.kwargs["budget"]
        known = len(self.configs.get(budget, []))
        with warnings.catch_warnings():  # statsmodels warns its own developers
            warnings.simplefilter("ignore")
            super().new_result(job, update_model)
        if len(self.configs[budget]) == known:  # hpbandster drops results below the budget of its largest model
            self.configs[budget].append(ConfigSpace.Configuration(self.configspace, job.kwargs["config"]).get_array())
            self.losses[budget].append(job.result["loss"])
        if budget in self.kde_models:
            # The bandwidth of a category with c choices is at most (c-1)/c; statsmodels' rule of thumb ignores that.
            widest = np.where(self.vartypes > 0, (self.vartypes - 1) / np.maximum(self.vartypes, 1), np.inf)
            for kde in self.kde_models[budget].values():
                kde.bw = np.minimum(kde.bw, np.maximum(widest, 1e-6))

    def get_config(self, budget: float | None = None) -> tuple[dict, dict]:
        """Suggests a configuration. The info says with "model_based_pick" whether it came from the model.

        Args:
            budget: is not used.
        """
        if not self.kde_models or self.rng.rand() < self.random_fraction:
            self.sampled += 1
            return dict(self.configspace.sample_configuration()), {"model_based_pick": False}
        kde = self.current()
        candidates = self.candidates(kde["good"])
        good, bad = self.density(kde["good"], candidates), self.density(kde["bad"], candidates)
        ratio = np.maximum(bad, 1e-32) / np.maximum(good, 1e-32)
        best = candidates[np.argmin(ratio)]
        return dict(ConfigSpace.Configuration(self.configspace, vector=best)), {"model_based_pick": True}

    def current(self) -> dict | None:
        """The densities {"good", "bad"} that suggestions come from, at the largest budget; None without a model."""
        return self.kde_models[max(self.kde_models)] if self.kde_models else None

    def impute_conditional_data(self, array: np.ndarray) -> np.ndarray:
        """Does nothing where no value is missing: hpbandster's loop over all results is the largest cost of a fit."""
        return super().impute_conditional_data(array) if np.isnan(array).any() else array

    def density(self, kde, points: np.ndarray) -> np.ndarray:
        """The density at points (m, d), shape (m,).

        statsmodels' own pdf is infinite at a category that its data lacks.

        Args:
            kde: one of the densities.
            points: in [0, 1], or indices of categories.
        """
        kernels = np.ones((len(points), len(kde.data)))
        for j, (bw, choices) in enumerate(zip(kde.bw, self.vartypes, strict=True)):
            x, data = points[:, j, None], kde.data[None, :, j]
            if choices == 0:  # the normal density; scipy.stats takes longer to check its arguments than to compute it
                kernels *= np.exp(-(((x - data) / bw) ** 2) / 2) / math.sqrt(2 * math.pi) / bw
            else:  # Aitchison & Aitken
                kernels *= np.where(x == data, 1 - bw, bw / max(choices - 1, 1))
        return kernels.mean(axis=1)

    def candidates(self, good) -> np.ndarray:
        """Draws num_samples points around those of the good density, shape (num_samples, d)."""
        centres = good.data[self.rng.randint(len(good.data), size=self.num_samples)]
        candidates = np.empty_like(centres)
        for j, (bw, choices) in enumerate(zip(good.bw, self.vartypes, strict=True)):
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
