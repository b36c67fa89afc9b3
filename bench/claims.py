"""How often the sentences about edges and effects (hpo/results/audit.py) are wrong, in simulated searches.

    .venv/bin/python bench/claims.py        # eight minutes on one core

At the end: how often the range of the importance, in 95 of 100 resamples, has the share that 1,500 trials give.

The default search: 34 trials, max_t 50, one slot. Of lr the loss is 2 (u - optimum)**2, where u goes from 0 at the
lower edge to 1 at the upper one; batch size, weight decay and x have no effect. The noise has a standard deviation of
0.3 per setting. "pooled" tests all trials, and not the random ones only, as the audit does.
"""

import math
import sys
from pathlib import Path

import numpy as np
from ray import tune

sys.path.insert(0, str(Path(__file__).parent.parent))

from hpo import search_space
from hpo.bohb.scheduler import HyperBandForBOHB
from hpo.bohb.searcher import TuneBOHB
from hpo.plan.simulator import Simulation
from hpo.results import audit

SPACE = {
    "lr": tune.loguniform(5e-6, 2e-4),
    "per_device_bs": tune.choice([1, 2]),
    "wd": tune.choice([0.0, 0.01]),
    "x": tune.uniform(0, 1),
}
EDGES = search_space.edges({"train_loop_config": SPACE})
SEARCHES = 200
MANY = 1500  # trials that show the true importance
IMPORTANCE = {34: 40, 100: 20}  # searches by their number of trials


def search(optimum: float | None, seed: int, random_fraction: float, number: int = 34) -> list[dict]:
    """The trials of a search, with "loss" at iteration 3 and at the last one. optimum None: lr has no effect."""
    rng, noise = np.random.default_rng(seed), {}

    def train(config, t):
        u = math.log(config["train_loop_config"]["lr"] / 5e-6) / math.log(40)
        own = noise.setdefault(str(config["train_loop_config"]), 0.3 * rng.normal())
        return (0 if optimum is None else 2 * (u - optimum) ** 2) + own + 0.1 * rng.normal() + 1 / t

    searcher = TuneBOHB(seed=seed, bohb_config={"random_fraction": random_fraction})
    searcher.set_search_properties("loss", "min", {"train_loop_config": SPACE})
    scheduler = HyperBandForBOHB(
        time_attr="training_iteration", metric="loss", mode="min", max_t=50, reduction_factor=4
    )
    simulation, trials = Simulation(searcher, scheduler, number, train, slots=1, max_t=50), {}
    simulation.run(10**9)
    for _, _, trial_id, t, loss in simulation.reports:
        suggested = searcher.suggested[trial_id]
        values = {audit.COLUMNS.get(name, name): v for name, v in suggested["config"]["train_loop_config"].items()}
        row = trials.setdefault(trial_id, values | {"model_based": suggested["model_based"]})
        row |= {"t": t, "last": loss} | ({"loss": loss} if t == 3 else {})
    return list(trials.values())


def importance(number: int, seed: int) -> dict[str, tuple[float, float, float]]:
    """The share of each hyperparameter in a search of so many trials, and its range, see audit.importance."""
    found = [t for t in search(0.5, seed, 1 / 3, number) if "loss" in t]
    trials = [t | {"trial_id": str(i), "training_iteration": 3, "status": "stopped"} for i, t in enumerate(found)]
    rows = [{"trial_id": t["trial_id"], "training_iteration": 3, "eval_loss": t["loss"]} for t in trials]
    names = [audit.COLUMNS.get(name, name) for name in SPACE]
    return audit.importance(trials, rows, names, "eval_loss", 3)


def main() -> None:
    """Prints the share of searches with each sentence, and the numbers of the importance."""
    names = ["lr, lower", "lr, upper", "x", "wd has an effect", "wd, pooled", "lr has an effect"]
    print("searches with  ", *names, sep=" | ")
    for kind, fraction in (("random", 1.0), ("BOHB", 1 / 3)):
        for optimum in (None, 0.5, 0.8, 1.2):
            found = []
            for seed in range(SEARCHES):
                trials = search(optimum, seed, fraction)
                drawn = [t for t in trials if not t["model_based"]]
                best = min(trials, key=lambda t: (-t["t"], t["last"]))
                losses, pooled = (np.array([t["loss"] for t in some]) for some in (drawn, trials))
                said = " ".join(audit.edges(EDGES, drawn, losses, best, 3))
                of = ["lower edge of learning rate", "upper edge of learning rate", "edge of x"]
                p = [audit.effect([t[name] for t in some], y) for name, some, y in (
                    ("weight_decay", drawn, losses), ("weight_decay", trials, pooled), ("learning_rate", drawn, losses)
                )]  # fmt: skip
                found.append([text in said for text in of] + [value < 0.05 for value in p])
            print(f"{kind}, optimum {optimum}", *(f"{share:.1%}" for share in np.mean(found, axis=0)), sep=" | ")
    true = {name: share for name, (share, _, _) in importance(MANY, 0).items()}
    for number, searches in IMPORTANCE.items():
        found = [importance(number, seed) for seed in range(1, searches + 1)]
        ends = [(true[name], low, high) for shares in found for name, (_, low, high) in shares.items()]
        inside = sum(low <= share <= high for share, low, high in ends)
        print(f"importance in searches of {number} trials: the range has the true share in {inside} of {len(ends)}")


if __name__ == "__main__":
    main()
