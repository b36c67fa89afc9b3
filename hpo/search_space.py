"""Questions about a search space of Ray Tune."""

import math

from ray.tune.search.sample import Categorical, Domain, Quantized

from hpo.errors import BadInput


def check(space: dict) -> None:
    """Raises BadInput where nothing can be drawn from a domain, or `train` would miss a hyperparameter."""
    searched = space.get("train_loop_config", {})
    for name in ("lr", "per_device_bs", "wd"):
        if name not in searched:
            raise BadInput(f"search space: {name} is missing from train_loop_config")
    for name, domain in searched.items():
        if isinstance(domain, dict):  # tune.grid_search
            raise BadInput(f"search space: {name}: BOHB draws from a domain such as tune.choice or tune.loguniform")
        if isinstance(getattr(domain, "sampler", None), Quantized):
            raise BadInput(f"search space: {name}: BOHB cannot keep to the steps of a quantized domain")
        if isinstance(domain, Categorical) and not domain.categories:
            raise BadInput(f"search space: {name} has nothing to choose from")
        if hasattr(domain, "lower") and not domain.lower < domain.upper:
            raise BadInput(f"search space: {name}: lower {domain.lower} is not below upper {domain.upper}")
    if not any(isinstance(domain, Domain) for domain in searched.values()):
        raise BadInput("search space: there is nothing to search")


def describe(space: dict) -> dict[str, str]:
    """The search space as text, by hyperparameter."""

    def text(domain) -> str:
        if isinstance(domain, Categorical):
            return f"choice{domain.domain_str}"
        return f"{domain.sampler or ''}{domain.domain_str}" if isinstance(domain, Domain) else repr(domain)

    return {name: text(domain) for name, domain in space["train_loop_config"].items()}


def check_same(space: dict, earlier: dict[str, str]) -> None:
    """Raises BadInput where a search space is not the one that `describe` has described earlier."""
    now = describe(space)
    for name in now | earlier:
        if now.get(name) != earlier.get(name):
            raise BadInput(f"--resume: search space: {name} is {now.get(name)} now, and {earlier.get(name)} in the run")


def grid_size(space: dict) -> int:
    """The number of trials of a full grid: all choices, ten values of each range."""
    domains = [domain for domain in space["train_loop_config"].values() if isinstance(domain, Domain)]
    return math.prod(len(domain.categories) if isinstance(domain, Categorical) else 10 for domain in domains)


def largest(domain) -> float:
    """The largest value of a domain, or the value itself where it is fixed."""
    return max(getattr(domain, "categories", None) or [getattr(domain, "upper", domain)])


def smallest(domain) -> float:
    """The smallest value of a domain, or the value itself where it is fixed."""
    return min(getattr(domain, "categories", None) or [getattr(domain, "lower", domain)])
