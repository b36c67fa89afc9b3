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

# The narrowest kernel, as a share of a hyperparameter's range. hpbandster's 0.001 is too narrow: if a few good results
# lie close together, all later suggestions come from that one point. Among 0.001 to 0.3, 0.1 has the lowest regret
# (bench/search_quality.py --variants).
MIN_BANDWIDTH = 0.1


@dataclass
class Job:
    """A result in the form that hpbandster expects."""

    result: dict
    kwargs: dict
    exception: None = None


class Model(BOHB):
    """hpbandster's model, with a random stream of its own and without silent failures.

    hpbandster's get_config draws from the global np.random, and it turns every exception into a random suggestion. Here
    the exception is raised, because a user could not see otherwise that the model is never used.

    For each budget with enough results there is a pair of kernel densities, of the good and of the bad results. They
    are described in Falkner, Klein & Hutter, "BOHB", ICML 2018, section 3.2.

    Args:
        configspace: the search space, with d hyperparameters.
        seed: seed of the random stream; None takes one from the system.
        **kwargs: arguments of hpbandster's class, such as random_fraction, num_samples or min_bandwidth.
    """

    def __init__(self, configspace: ConfigSpace.ConfigurationSpace, seed: int | None = None, **kwargs):
        super().__init__(configspace, **{"min_bandwidth": MIN_BANDWIDTH, **kwargs})
        self.rng = np.random.RandomState(seed)
        self.space_seed = int(self.rng.randint(2**31))  # of the random suggestions, which ConfigSpace draws
        self.sampled = 0  # the number of random suggestions so far
        configspace.seed(self.space_seed)

    def get_state(self) -> dict[str, Any]:
        """Everything that the next suggestion depends on, as data for JSON.

        A dictionary by budget becomes a list of [budget, value], because keys are strings in JSON.
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
        """Restores a state. The next suggestions are the same as without the interruption, to the last digit.

        Args:
            state: from get_state.
        """
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
        """Adds a result, and fits the densities of its budget again.

        Args:
            job: result["loss"], to be minimised, may be infinite. kwargs has "budget" and "config".
            update_model: False only adds the result.
        """
        budget = job.kwargs["budget"]
        known = len(self.configs.get(budget, []))
        with warnings.catch_warnings():  # statsmodels warns its own developers
            warnings.simplefilter("ignore")
            super().new_result(job, update_model)
        if len(self.configs[budget]) == known:  # hpbandster drops results below the budget of its largest model
            self.configs[budget].append(ConfigSpace.Configuration(self.configspace, job.kwargs["config"]).get_array())
            self.losses[budget].append(job.result["loss"])
        if budget in self.kde_models:
            # The bandwidth of a hyperparameter with c categories is at most (c-1)/c, where all categories are equally
            # likely. The rule of thumb of statsmodels can exceed that.
            widest = np.where(self.vartypes > 0, (self.vartypes - 1) / np.maximum(self.vartypes, 1), np.inf)
            for kde in self.kde_models[budget].values():
                kde.bw = np.minimum(kde.bw, np.maximum(widest, 1e-6))

    def get_config(self, budget: float | None = None) -> tuple[dict, dict]:
        """Suggests a configuration.

        It is the candidate with the largest ratio of good to bad density. random_fraction of all suggestions, and all
        as long as no budget has enough results, are drawn at random.

        Args:
            budget: is not used.

        Returns:
            The configuration, and {"model_based_pick": whether it came from the model}.
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
        """The densities {"good", "bad"} of the largest budget that has a model; None if there is no model yet."""
        return self.kde_models[max(self.kde_models)] if self.kde_models else None

    def impute_conditional_data(self, array: np.ndarray) -> np.ndarray:
        """Skips hpbandster's loop over all results if no value is missing: it takes most of the time of a fit."""
        return super().impute_conditional_data(array) if np.isnan(array).any() else array

    def density(self, kde, points: np.ndarray) -> np.ndarray:
        """Evaluates a density: the mean over its points of products of kernels.

        The kernel is normal for a continuous hyperparameter, and that of Aitchison & Aitken (1976) for a categorical
        one. The pdf of statsmodels is not used, because it is infinite at a category that the data lacks.

        Args:
            kde: one of the densities, with its points `data` (n, d) and its bandwidths `bw` (d,).
            points: shape (m, d); coordinates in [0, 1], or indices of categories.

        Returns:
            The density at each point, shape (m,).
        """
        kernels = np.ones((len(points), len(kde.data)))
        for j, (bw, choices) in enumerate(zip(kde.bw, self.vartypes, strict=True)):
            x, data = points[:, j, None], kde.data[None, :, j]
            if choices == 0:  # not scipy.stats.norm: it takes longer to check its arguments than to compute the density
                kernels *= np.exp(-(((x - data) / bw) ** 2) / 2) / math.sqrt(2 * math.pi) / bw
            else:
                kernels *= np.where(x == data, 1 - bw, bw / max(choices - 1, 1))
        return kernels.mean(axis=1)

    def candidates(self, good) -> np.ndarray:
        """Draws candidates for a suggestion from the good density, with kernels that are bw_factor times as wide.

        Returns:
            Points of shape (num_samples, d).
        """
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
