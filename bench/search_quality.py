"""Regret against budget: how good is the best configuration that a search finds? On problems with a known optimum.

    pip install …                                                 # see bench/requirements.txt
    .venv/bin/python bench/search_quality.py                      # about half an hour on two cores
    .venv/bin/python bench/search_quality.py --seeds 5 --methods ours "Ray's own" random
    .venv/bin/python bench/search_quality.py --variants           # other settings of our model, and other models
    .venv/bin/python bench/search_quality.py --warm_starts        # what results of an earlier run give

Every method runs with its defaults and with the same budget in iterations. It runs one trial at a time, unless its name
has a number of slots. `full trainings` are iterations divided by max_t. A trial that is resumed costs only the
iterations that it adds. This holds for SMAC and DEHB too, whose packages would train the same configuration again.

The incumbent is the trial with the best loss among those that were observed at 90 % of a full training or more (Ray's
own trains to 48 of 50). Before there is one, it is the best of those with the longest training. Its regret is its true
loss after a full training minus the loss of the optimum. A method whose package is not installed is left out.

Problems: counting ones (Falkner, Klein & Hutter, "BOHB", ICML 2018, section 5.1; an iteration is 15 draws), the
multi-fidelity Hartmann functions of mf-prior-bench, and the search space of this project. For the latter, the loss is a
Gaussian process on 815 iterations of 53 random configurations of the demo (demo_iterations.csv).
"""

import argparse
import csv
import functools
import importlib.util
import json
import logging
import math
import multiprocessing
import sys
import tempfile
import types
import unittest.mock
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import ConfigSpace
import numpy as np
import ray.tune.schedulers
import ray.tune.search.bohb
import scipy.stats
from ray import tune
from ray.tune.search.sample import Categorical, LogUniform

from hpo.bohb.brackets import band_size, rungs
from hpo.bohb.kde import Model
from hpo.bohb.scheduler import HyperBandForBOHB
from hpo.bohb.searcher import TuneBOHB
from hpo.plan.simulator import Simulation

BUDGETS = [6, 11, 23]  # full trainings; one band is 11.4
FLOOR = 1e-4  # the least regret in geometric means, which cannot have 0
MANY = 10**6  # trials: more than the budget allows

# ---------------------------------------------------------------------------------------------------------------------
# problems


@dataclass
class Problem:
    """A search space with a loss whose optimum is known."""

    space: dict  # of Tune
    max_t: int
    loss: Callable[[dict, int, int], float]  # the observed loss, of (configuration, iterations, seed)
    true: Callable[[dict], float]  # the loss after a full training, without noise
    best: float  # the least true loss


def counting_ones(dimensions: int) -> Problem:
    """Counting ones. The loss is minus the mean of all hyperparameters, where a probability is estimated from draws.

    Args:
        dimensions: number of categorical hyperparameters, and of continuous ones.
    """
    space = {f"c{i}": tune.choice([0, 1]) for i in range(dimensions)}
    space |= {f"p{i}": tune.uniform(0, 1) for i in range(dimensions)}
    names = list(space)

    def true(config: dict) -> float:
        return -sum(config[name] for name in names) / len(names)

    def loss(config: dict, t: int, seed: int) -> float:
        rng = np.random.default_rng([seed, t, hash(tuple(config[name] for name in names)) % 2**32])
        drawn = rng.binomial(15 * t, [config[f"p{i}"] for i in range(dimensions)]) / (15 * t)
        return -(sum(config[f"c{i}"] for i in range(dimensions)) + drawn.sum()) / len(names)

    return Problem(space, 50, loss, true, -1.0)


def hartmann(name: str) -> Problem:
    """A multi-fidelity Hartmann function of mf-prior-bench. An iteration is 2 of its fidelities from 1 to 100.

    Its noise depends on its seed, and there is none for seed 0.
    """
    import mfpbench

    @functools.cache
    def benchmark(seed: int):
        return mfpbench.get(name, seed=seed)

    names = list(benchmark(1).space)
    optimum = benchmark(1).optimum.as_dict()

    def value(config: dict, fidelity: int, seed: int) -> float:
        return float(benchmark(seed).query({n: float(config[n]) for n in names}, at=fidelity).value.value)

    space = {n: tune.uniform(0, 1) for n in names}
    return Problem(
        space, 50, lambda c, t, seed: value(c, 2 * t, seed + 1), lambda c: value(c, 100, 1), value(optimum, 100, 1)
    )


def demo() -> Problem:
    """eval_loss of the demo, as a Gaussian process.

    It models the logarithm of the loss over log lr, log iteration, batch size and weight decay.
    """
    rows = list(csv.DictReader((Path(__file__).parent / "demo_iterations.csv").open()))
    scales = np.array([0.25, 0.5, 1.0, 3.0])  # length scales, as shares of the range: weight decay hardly matters

    def point(lr: float, bs: float, wd: float, t: float) -> list[float]:
        return [math.log(lr / 5e-6) / math.log(40), math.log(t) / math.log(16), bs - 1, wd / 0.01]

    columns = ("learning_rate", "batch_size", "weight_decay", "training_iteration")
    x = np.array([point(*(float(r[name]) for name in columns)) for r in rows]) / scales
    y = np.log([float(r["eval_loss"]) for r in rows])

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / 2)

    weights = np.linalg.solve(kernel(x, x) + 0.01 * np.eye(len(x)), y - y.mean())

    def losses(points: list[list[float]]) -> np.ndarray:
        return np.exp(y.mean() + kernel(np.array(points) / scales, x) @ weights)

    def true(config: dict) -> float:
        return float(losses([point(config["lr"], config["per_device_bs"], config["wd"], 16)])[0])

    def loss(config: dict, t: int, seed: int) -> float:
        return float(losses([point(config["lr"], config["per_device_bs"], config["wd"], t)])[0])

    space = {"lr": tune.loguniform(5e-6, 2e-4), "per_device_bs": tune.choice([1, 2]), "wd": tune.choice([0.0, 0.01])}
    grid = [point(lr, bs, wd, 16) for lr in np.geomspace(5e-6, 2e-4, 1000) for bs in (1, 2) for wd in (0, 0.01)]
    return Problem(space, 16, loss, true, float(losses(grid).min()))


@functools.cache
def problem(name: str) -> Problem:
    """The problem of a name in PROBLEMS."""
    if name == "demo":
        return demo()
    return counting_ones(int(name[-1])) if name.startswith("counting") else hartmann(name)


PROBLEMS = ["demo", "counting_ones_4", "counting_ones_8", "mfh3_good", "mfh3_bad", "mfh6_good", "mfh6_bad"]

# ---------------------------------------------------------------------------------------------------------------------
# methods


class Spent(Exception):
    """The budget is used up."""


class Ledger:
    """Counts the iterations of a search, and keeps its observations.

    Args:
        p: the problem.
        seed: of the noise.
    """

    def __init__(self, p: Problem, seed: int):
        self.problem, self.seed, self.budget = p, seed, BUDGETS[-1] * p.max_t
        self.spent = 0
        self.seen: list[tuple[int, int, float, dict]] = []  # (spent by then, iterations, loss, configuration)
        self.trained: dict[tuple, int] = {}

    def step(self, config: dict, t: int) -> float:
        """The loss at iteration t of a trial that has run the iterations before it. Costs one iteration.

        Raises:
            Spent: the budget is used up.
        """
        return self.train(config, t, cost=1)

    def train(self, config: dict, t: int, cost: int | None = None) -> float:
        """The loss after t iterations.

        Args:
            config: the configuration.
            t: iterations.
            cost: iterations to pay for. None: those that this configuration has not had yet.

        Raises:
            Spent: the budget is used up.
        """
        config = {name: config[name] for name in self.problem.space}
        key = tuple(config.values())
        if cost is None:
            cost = max(0, t - self.trained.get(key, 0))
            self.trained[key] = max(t, self.trained.get(key, 0))
        self.spent += cost
        if self.spent > self.budget:
            raise Spent
        loss = self.problem.loss(config, t, self.seed)
        self.seen.append((self.spent, t, loss, config))
        return loss

    def regrets(self) -> list[float]:
        """The regret of the incumbent at each of BUDGETS."""
        values = []
        for budget in BUDGETS:
            seen = [s for s in self.seen if s[0] <= budget * self.problem.max_t]
            longest = min(max(s[1] for s in seen), math.ceil(0.9 * self.problem.max_t))
            config = min((s for s in seen if s[1] >= longest), key=lambda s: s[2])[3]
            values.append(self.problem.true(config) - self.problem.best)
        return values


def simulated(
    classes, ledger: Ledger, searcher_options: dict, slots: int = 1, earlier: list = (), **scheduler_options
) -> None:
    """Runs a searcher and a scheduler of Tune in the simulator; `earlier` is for our add_earlier_results."""
    searcher_class, scheduler_class = classes
    searcher = searcher_class(seed=ledger.seed, **searcher_options)
    if earlier:
        searcher.add_earlier_results(earlier)
    searcher.set_search_properties("loss", "min", ledger.problem.space)
    options = {"time_attr": "training_iteration", "metric": "loss", "mode": "min", "max_t": ledger.problem.max_t}
    full_length = scheduler_class is ray.tune.schedulers.FIFOScheduler
    scheduler = scheduler_class() if full_length else scheduler_class(**options, **scheduler_options)
    Simulation(searcher, scheduler, MANY, ledger.step, slots, max_t=ledger.problem.max_t).run()


RANDOM = {"bohb_config": {"random_fraction": 1}}


def ours(ledger: Ledger, model: type[Model] = Model, slots: int = 1, **settings) -> None:
    """Our TuneBOHB and HyperBandForBOHB, with a model and its settings."""
    with unittest.mock.patch("hpo.bohb.searcher.Model", model):
        simulated((TuneBOHB, HyperBandForBOHB), ledger, {"bohb_config": settings}, slots, reduction_factor=4)


def warm_start(ledger: Ledger, change: str, enters_model: bool) -> None:
    """Ours, after one band on an earlier problem, which is not counted.

    Args:
        ledger: of the problem.
        change: "same": the earlier problem is this one, with other draws; "related": its continuous hyperparameters are
            moved by a tenth of their range; "opposite": what is best there is worst here.
        enters_model: whether its results enter the model. If not, its three best settings are tried first.
    """
    p, sign = ledger.problem, -1 if change == "opposite" else 1
    earlier = TuneBOHB(seed=ledger.seed + 1000)
    earlier.set_search_properties("loss", "min", p.space)
    scheduler = HyperBandForBOHB(metric="loss", mode="min", max_t=p.max_t, reduction_factor=4)
    moved = moved_by_a_tenth(p.space) if change == "related" else lambda config: config
    loss = lambda config, t: sign * p.loss(moved(config), t, ledger.seed + 1000)  # noqa: E731
    Simulation(earlier, scheduler, band_size(p.max_t, 4), loss, max_t=p.max_t).run()
    found = [(earlier.suggested[o["trial_id"]]["config"], o["budget"], o["loss"]) for o in earlier.observations]
    options, results = {}, found
    if not enters_model:
        longest = sorted((o for o in found if o[1] == p.max_t), key=lambda o: o[2])
        options, results = {"points_to_evaluate": [config for config, *_ in longest[:3]]}, []
    simulated((TuneBOHB, HyperBandForBOHB), ledger, options, earlier=results, reduction_factor=4)


def moved_by_a_tenth(space: dict) -> Callable[[dict], dict]:
    """Moves the continuous hyperparameters of a configuration up by a tenth of their range, and the last tenth down."""

    def move(config: dict) -> dict:
        config = dict(config)
        for name, domain in space.items():
            if not isinstance(domain, Categorical):
                log = isinstance(domain.get_sampler(), LogUniform)
                low, high, x = (math.log(v) if log else v for v in (domain.lower, domain.upper, config[name]))
                x = x + (high - low) / 10 if x < high - (high - low) / 10 else x - (high - low) / 10
                config[name] = math.exp(x) if log else x
        return config

    return move


class SmallestBudget(Model):
    """The model of the smallest budget with enough results. Ours takes the largest."""

    def new_result(self, job, update_model=True):
        """Fits the densities of each budget. hpbandster fits none below its largest model."""
        larger = {
            budget: self.kde_models.pop(budget) for budget in list(self.kde_models) if budget > job.kwargs["budget"]
        }
        super().new_result(job, update_model)
        self.kde_models |= larger

    def get_config(self, budget=None):
        """Suggests from the densities of the smallest budget."""
        every = self.kde_models
        self.kde_models = {budget: every[budget] for budget in sorted(every)[:1]}
        try:
            return super().get_config()
        finally:
            self.kde_models = every


class Remembering(Model):
    """Keeps its suggestions, as vectors."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.suggested = []

    def get_config(self, budget=None):
        """Suggests, and keeps the suggestion."""
        config, info = super().get_config()
        self.suggested.append(ConfigSpace.Configuration(self.configspace, config).get_array())
        return config, info


class NoDuplicates(Remembering):
    """Leaves out candidates that are near an earlier suggestion: within 5 % of the range in each dimension."""

    def candidates(self, good):
        """Draws candidates, without those near an earlier suggestion unless all are near one."""
        candidates = super().candidates(good)
        distances = [np.abs(candidates - known).max(axis=1) for known in self.suggested]
        fresh = candidates[np.min(distances, axis=0) > 0.05] if distances else candidates
        return fresh if len(fresh) else candidates


class PendingAreBad(Remembering):
    """Counts suggestions without a result as bad results."""

    def new_result(self, job, update_model=True):
        """Adds a result, which is no longer pending."""
        result = ConfigSpace.Configuration(self.configspace, job.kwargs["config"]).get_array()
        self.suggested = [each for each in self.suggested if not np.array_equal(each, result)]
        super().new_result(job, update_model)

    def density(self, kde, points):
        """The density, where that of the bad results has a kernel at each pending suggestion too."""
        if self.suggested and any(kde is pair["bad"] for pair in self.kde_models.values()):
            kde = types.SimpleNamespace(bw=kde.bw, data=np.concatenate([kde.data, self.suggested]))
        return super().density(kde, points)


def rays_own(ledger: Ledger) -> None:
    """Ray's TuneBOHB and HyperBandForBOHB."""
    np.random.seed(ledger.seed)  # its model draws from there
    simulated((ray.tune.search.bohb.TuneBOHB, ray.tune.schedulers.HyperBandForBOHB), ledger, {}, reduction_factor=4)


def hyperband(ledger: Ledger) -> None:
    """Our scheduler with random suggestions."""
    ours(ledger, random_fraction=1)


def asha(ledger: Ledger) -> None:
    """Ray's AsyncHyperBandScheduler with random suggestions."""
    simulated((TuneBOHB, ray.tune.schedulers.AsyncHyperBandScheduler), ledger, RANDOM)


def random_search(ledger: Ledger) -> None:
    """Random suggestions, each trained to the end."""
    simulated((TuneBOHB, ray.tune.schedulers.FIFOScheduler), ledger, RANDOM)


def optuna_tpe(ledger: Ledger) -> None:
    """Optuna's TPESampler and HyperbandPruner."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    p = ledger.problem

    def objective(trial):
        config = {
            name: trial.suggest_categorical(name, domain.categories)
            if isinstance(domain, Categorical)
            else trial.suggest_float(name, domain.lower, domain.upper, log=name == "lr")
            for name, domain in p.space.items()
        }
        for t in range(1, p.max_t + 1):
            loss = ledger.step(config, t)
            trial.report(loss, t)
            if trial.should_prune():
                raise optuna.TrialPruned
        return loss

    pruner = optuna.pruners.HyperbandPruner(max_resource=p.max_t)
    sampler = optuna.samplers.TPESampler(seed=ledger.seed)
    name = f"seed {ledger.seed}"  # fixed, because the pruner chooses a trial's bracket by it
    study = optuna.create_study(sampler=sampler, pruner=pruner, study_name=name)
    study.optimize(objective, n_trials=MANY)


def config_space(ledger: Ledger) -> ConfigSpace.ConfigurationSpace:
    """The search space of the problem, for DEHB and SMAC."""
    space = ray.tune.search.bohb.TuneBOHB.convert_search_space(ledger.problem.space)
    space.seed(ledger.seed)
    return space


def first_budget(p: Problem) -> int:
    """The shortest training, for DEHB and SMAC: the first rung of our largest bracket."""
    return rungs(p.max_t, 4)[0][0][1]


def smac_hyperband(ledger: Ledger) -> None:
    """SMAC's MultiFidelityFacade."""
    from smac import MultiFidelityFacade, Scenario
    from smac.runhistory.dataclasses import TrialValue

    p = ledger.problem

    def target(config, seed: int = 0, budget: float = 0) -> float:
        return ledger.train(dict(config), round(budget))

    with tempfile.TemporaryDirectory() as folder:
        scenario = Scenario(
            config_space(ledger), output_directory=Path(folder), deterministic=True, n_trials=MANY,
            min_budget=first_budget(p), max_budget=p.max_t, seed=ledger.seed,
        )  # fmt: skip
        smac = MultiFidelityFacade(scenario, target, logging_level=False, overwrite=True)
        while True:  # ask and tell, because SMAC's runner would treat Spent as a crash of the trial
            info = smac.ask()
            smac.tell(info, TrialValue(cost=target(info.config, budget=info.budget)), save=False)


def dehb(ledger: Ledger) -> None:
    """DEHB with one worker."""
    from dehb import DEHB
    from loguru import logger

    logger.disable("dehb")
    p, space = ledger.problem, config_space(ledger)
    with tempfile.TemporaryDirectory() as folder:
        search = DEHB(
            cs=space,
            dimensions=len(space),
            min_fidelity=first_budget(p),
            max_fidelity=p.max_t,
            seed=ledger.seed,
            n_workers=1,
            output_path=folder,
        )
        while True:
            job = search.ask()
            t = max(1, round(float(job["fidelity"])))
            cost = ledger.spent
            loss = ledger.train(dict(job["config"]), t)
            search.tell(job, {"fitness": loss, "cost": ledger.spent - cost})


METHODS = {  # name: (function, package)
    "ours": (ours, "ray"),
    "Ray's own": (rays_own, "ray"),
    "random": (random_search, "ray"),
    "Hyperband": (hyperband, "ray"),
    "ASHA": (asha, "ray"),
    "Optuna": (optuna_tpe, "optuna"),
    "DEHB": (dehb, "dehb"),
    "SMAC": (smac_hyperband, "smac"),
}
VARIANTS = {  # name: arguments of `ours`
    "bandwidth 0.001": {"min_bandwidth": 0.001},
    "bandwidth 0.03": {"min_bandwidth": 0.03},
    "bandwidth 0.2": {"min_bandwidth": 0.2},
    "bandwidth 0.3": {"min_bandwidth": 0.3},
    "bandwidth factor 1": {"bandwidth_factor": 1},
    "256 candidates": {"num_samples": 256},
    "random 10 %": {"random_fraction": 0.1},
    "random 100 %": {"random_fraction": 1},
    "smallest budget": {"model": SmallestBudget},
    "no duplicates": {"model": NoDuplicates},
    "8 slots": {"slots": 8},
    "8 slots, pending are bad": {"slots": 8, "model": PendingAreBad},
}

WARM_STARTS = {
    "same search": ("same", True),
    "same, best settings": ("same", False),
    "related, best settings": ("related", False),
    "opposite, best settings": ("opposite", False),
    "opposite, enters the model": ("opposite", True),
}

# ---------------------------------------------------------------------------------------------------------------------
# runs and tables


def run(job: tuple[str, str, int]) -> tuple[str, str, int, list[float]]:
    """Runs one (problem, method, seed). Returns these and the regrets."""
    name, method, seed = job
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    ledger = Ledger(problem(name), seed)
    try:
        if method in METHODS:
            METHODS[method][0](ledger)
        elif method in WARM_STARTS:
            warm_start(ledger, *WARM_STARTS[method])
        else:
            ours(ledger, **VARIANTS[method])
    except Spent:
        pass
    return name, method, seed, ledger.regrets()


def all_runs(
    problems: list[str], methods: list[str], seeds: int, keep: Path | None
) -> dict[tuple[str, str, int], list[float]]:
    """Regrets by (problem, method, seed). Results in the file `keep` are used, and new ones are added to it."""
    known = [json.loads(line) for line in keep.read_text().splitlines()] if keep and keep.exists() else []
    results = {(name, method, seed): regrets for name, method, seed, regrets in known}
    jobs = [(p, m, seed) for seed in range(seeds) for p in problems for m in methods]
    with multiprocessing.Pool(2) as pool:
        for *job, regrets in pool.imap_unordered(run, [job for job in jobs if job not in results]):
            results[tuple(job)] = regrets
            if keep:
                with keep.open("a") as file:
                    file.write(json.dumps([*job, regrets]) + "\n")
    return {job: results[job] for job in jobs}


def mean_interval(values: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    if min(values) == max(values):
        return values[0], values[0]
    interval = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=2000, method="percentile", rng=0
    ).confidence_interval
    return interval.low, interval.high


def tables(
    results: dict[tuple[str, str, int], list[float]], problems: list[str], methods: list[str], seeds: int, baseline: str
) -> float:
    """Prints the tables. Returns the geometric mean regret of `baseline`, divided by that of the first method."""
    print(f"regret of the incumbent by full trainings; {seeds} seeds: mean [95 % interval], median")
    width = max(map(len, methods))
    for name in problems:
        print(f"\n{name}\n" + " " * width + "".join(f"{b:>38}" for b in BUDGETS))
        for method in methods:
            line = method.ljust(width)
            for i in range(len(BUDGETS)):
                values = [results[name, method, seed][i] for seed in range(seeds)]
                low, high = mean_interval(values)
                line += f"{np.mean(values):12.4f} [{low:.4f}, {high:.4f}] {np.median(values):.4f}"
            print(line)
    means = "average rank (1 is best), geometric mean regret, the latter by the first method's [95 % interval]"
    print(f"\nover all problems and seeds: {means}")
    print(" " * width + "".join(f"{b:>38}" for b in BUDGETS))
    geometric, ranks, intervals = defaultdict(list), defaultdict(list), defaultdict(list)
    for i in range(len(BUDGETS)):
        regrets = [[max(FLOOR, results[n, m, s][i]) for m in methods] for n in problems for s in range(seeds)]
        rank = scipy.stats.rankdata(regrets, axis=1).mean(axis=0)
        for j, method in enumerate(methods):
            ranks[method].append(rank[j])
            logs, firsts = (
                np.array([np.mean([math.log(max(FLOOR, results[n, m, s][i])) for n in problems]) for s in range(seeds)])
                for m in (method, methods[0])
            )
            geometric[method].append(math.exp(logs.mean()))
            intervals[method].append("[{:.2f}, {:.2f}]".format(*np.exp(mean_interval(list(logs - firsts)))))
    for method in methods:
        cells = [
            f"{r:.2f} {g:.4f} {g / first:6.2f} {interval}"
            for r, g, first, interval in zip(
                ranks[method], geometric[method], geometric[methods[0]], intervals[method], strict=True
            )
        ]
        print(method.ljust(width) + "".join(cell.rjust(38) for cell in cells))
    return math.exp(np.mean(np.log(geometric[baseline])) - np.mean(np.log(geometric[methods[0]])))


def main() -> None:
    """Runs all methods on all problems, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=PROBLEMS)
    parser.add_argument(
        "--variants",
        action="store_true",
        help="compare settings of our model and other models; ratio: that with 0.03 by ours",
    )
    parser.add_argument(
        "--warm_starts", action="store_true", help="what earlier results give; ratio: ours by that of the same search"
    )
    parser.add_argument("--keep", type=Path, help="a file with the results so far; only missing runs are made")
    args = parser.parse_args()
    methods = ["ours", *VARIANTS] if args.variants else args.methods
    if args.warm_starts:
        methods = ["same search", "ours", *list(WARM_STARTS)[1:]]
    problems = list(args.problems)
    for package in sorted({METHODS[m][1] for m in methods if m in METHODS}):
        if not importlib.util.find_spec(package):
            methods = [m for m in methods if METHODS[m][1] != package]
            print(f"{package} is not installed: left out")
    if not importlib.util.find_spec("mfpbench"):
        problems = [p for p in problems if not p.startswith("mfh")]
        print("mf-prior-bench is not installed: its problems are left out")
    results = all_runs(problems, methods, args.seeds, args.keep)
    baseline = "bandwidth 0.03" if args.variants else "Ray's own" if "Ray's own" in methods else methods[-1]
    if args.warm_starts:
        baseline = "ours"
    print(f"ratio: {tables(results, problems, methods, args.seeds, baseline):.2f}")


if __name__ == "__main__":
    main()
