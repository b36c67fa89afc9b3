"""Quantized domains of Tune, such as tune.quniform. A value is k q; the searcher works with its index k."""

from ray.tune.search.sample import Domain, Integer, LogUniform, Normal, Quantized


def is_quantized(domain) -> bool:
    """Whether a domain is a quantized range."""
    sampler = domain.get_sampler() if isinstance(domain, Domain) else None
    return isinstance(sampler, Quantized) and not isinstance(sampler.sampler, Normal)


def first_and_last(domain: Domain) -> tuple[int, int]:
    """The smallest and the largest index that Tune can draw from a quantized range. Last < first if there is none.

    Source: `Quantized.sample` in ray.tune.search.sample, Ray 2.60.
    """
    q = domain.sampler.q
    if isinstance(domain, Integer):  # with q = 1 Tune leaves the upper bound out, as without q
        return -(-domain.lower // q), domain.upper // q - (q == 1)
    return round(domain.lower / q), round(domain.upper / q)  # Tune refuses other bounds than multiples of q


def value(domain: Domain, index: int) -> int | float:
    """The value of an index, never outside the bounds: 3 * 0.1 is above 0.3."""
    return min(max(domain.cast(index * domain.sampler.q), domain.cast(domain.lower)), domain.cast(domain.upper))


def index(domain: Domain, value: float) -> int:
    """The index of a value."""
    return round(value / domain.sampler.q)


def of_indices(domain: Domain) -> Integer:
    """The domain of the indices, whose upper bound Tune leaves out."""
    first, last = first_and_last(domain)
    indices = Integer(first, last + 1)
    return indices.loguniform() if isinstance(domain.sampler.sampler, LogUniform) else indices.uniform()
