"""How busy the slots are and how long a search takes, in the simulator: ours and Ray's own scheduler, and other settings.

    python bench/scheduling.py        # a few seconds

One iteration takes one unit of time; each search is one whole band with max_t 50. Ours runs the real searcher and scheduler
(simulate.py); so does Ray's, whose trials take the time that its brackets of 3, 12 and 48 iterations give them.
"""

import logging
import math
import statistics
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import ray.tune.schedulers
import ray.tune.search.bohb
from ray import tune

from bohb import HyperBandForBOHB, TuneBOHB, band_size
from simulate import Simulation

SPACE = {"lr": tune.loguniform(5e-6, 2e-4), "per_device_bs": tune.choice([1, 2]), "wd": tune.choice([0.0, 0.01])}
SEEDS = range(5)
MAX_T = 50


def loss(config: dict, t: int) -> float:
    return (math.log10(config["lr"]) + 4) ** 2 + 1 / t


def search(searcher_class, scheduler_class, reduction_factor: int, slots: int, seed: int) -> tuple[float, float, int]:
    """(time of the whole search, share of the slots' time that was busy, iterations)."""
    searcher = searcher_class(seed=seed)
    searcher.set_search_properties("loss", "min", SPACE)
    scheduler = scheduler_class(
        time_attr="training_iteration", metric="loss", mode="min", max_t=MAX_T, reduction_factor=reduction_factor, stop_last_trials=False
    )
    simulation = Simulation(searcher, scheduler, band_size(MAX_T, reduction_factor), loss, slots=slots, max_t=MAX_T)
    simulation.run()
    return simulation.now, len(simulation.reports) / simulation.now / slots, len(simulation.reports)


def medians(*setting) -> list[float]:
    return [statistics.median(values) for values in zip(*(search(*setting, seed) for seed in SEEDS))]


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)  # of hpbandster, which prints its densities
    ours, rays = (TuneBOHB, HyperBandForBOHB), (ray.tune.search.bohb.TuneBOHB, ray.tune.schedulers.HyperBandForBOHB)
    print(f"medians of {len(SEEDS)} seeds            ours                     Ray's own (reduction_factor 4)")
    print("slots  reduction_factor  iterations  time  busy      iterations  time  busy")
    ratios = []
    for slots in (1, 2, 4, 8, 16):
        for reduction_factor in (3, 4, 5):
            time, busy, iterations = medians(*ours, reduction_factor, slots)
            line = f"{slots:5} {reduction_factor:17} {iterations:11.0f} {time:5.0f} {busy:5.0%}"
            if reduction_factor == 4:
                theirs = medians(*rays, reduction_factor, slots)
                line += f"      {theirs[2]:10.0f} {theirs[0]:5.0f} {theirs[1]:5.0%}"
                ratios.append(theirs[0] / time)
            print(line)
    print(f"ratio: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
