"""How busy the slots are and how long a search takes, in simulated time. And the cost of a decision.

    .venv/bin/python bench/scheduling.py          # about ten minutes
    .venv/bin/python bench/scheduling.py --ray    # and two real Ray runs of 1,000 trials that do nothing, minutes more

Each row runs the real searcher and scheduler in hpo/plan/simulator.py, on whole bands of max_t 50 and reduction factor
4. There are about ten trials per slot, and at least three bands. Suggestions are random, and the n-th trial is the same
in all rows. Otherwise a search could win by chance, because a trial of batch size 1 takes longer than one of 2.

"Ray's own" is Ray's HyperBandForBOHB, and ASHA is its AsyncHyperBandScheduler. ASHA and random search at full length
end after as many iterations as ours. The tail is the time after the last new trial got its slot. The cost of a decision
is that of the model-based search.
"""

import argparse
import logging
import math
import os
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path

import common

# isort: split
import ray
import ray.tune.schedulers
import ray.tune.search.bohb
import ray.tune.tune
from ray import tune
from ray.tune.experiment import Trial

from hpo.bohb.brackets import band_size
from hpo.bohb.scheduler import HyperBandForBOHB
from hpo.bohb.searcher import TuneBOHB
from hpo.cluster import ray_private
from hpo.plan.simulator import Simulation

SPACE = {"lr": tune.loguniform(5e-6, 2e-4), "per_device_bs": tune.choice([1, 2]), "wd": tune.choice([0.0, 0.01])}
MAX_T, REDUCTION_FACTOR = 50, 4
REAL = 1000  # trials of a real run
BAND = band_size(MAX_T, REDUCTION_FACTOR)
# Median seconds of an iteration of the demo by batch size, with two trials at a time on two cores that were otherwise
# idle. From iterations.csv of the second of the two runs behind demo_iterations.csv.
SECONDS = {1: 2.55, 2: 1.66}


def loss(config: dict, t: int) -> float:
    """Best at lr 1e-4, falls with t."""
    return (math.log10(config["lr"]) + 4) ** 2 + 1 / t


def seconds(config: dict, t: int) -> float:
    """Simulated seconds of one iteration. All iterations of a trial take the same time."""
    return SECONDS[config["per_device_bs"]]


def make(kind: str, seed: int, random_fraction: float = 1):
    """The searcher and the scheduler of one kind of search."""
    options = {"time_attr": "training_iteration", "metric": "loss", "mode": "min", "max_t": MAX_T}
    bohb = {**options, "reduction_factor": REDUCTION_FACTOR, "stop_last_trials": False}
    scheduler = {
        "ours": lambda: HyperBandForBOHB(**bohb),
        "longest first": lambda: LongestFirst(**bohb),
        "Ray's own": lambda: ray.tune.schedulers.HyperBandForBOHB(**bohb),
        "ASHA": lambda: ray.tune.schedulers.AsyncHyperBandScheduler(**options),
        "random, full": ray.tune.schedulers.FIFOScheduler,
    }[kind]()
    rays_model = kind == "Ray's own" and random_fraction < 1
    searcher_class = ray.tune.search.bohb.TuneBOHB if rays_model else TuneBOHB
    searcher = searcher_class(seed=seed, bohb_config={"random_fraction": random_fraction})
    searcher.set_search_properties("loss", "min", SPACE)
    return searcher, scheduler


def search(
    kind: str, num_samples: int, slots: int, seed: int, max_reports: int = 10**9, random_fraction: float = 1
) -> dict[str, float]:
    """Runs one search.

    Returns:
        Its simulated seconds (wall), the share of the slots' time that was busy before the tail (before) and in the
        whole search (busy), the numbers of iterations and trials, and the least loss.
    """
    simulation = Simulation(
        *make(kind, seed, random_fraction), num_samples, loss, slots=slots, max_t=MAX_T, seconds=seconds
    )
    simulation.run(max_reports)
    firsts = [start for start, _, _, t, _ in simulation.reports if t == 1]
    tail = max(firsts)
    busy = sum(min(end, tail) - start for start, end, *_ in simulation.reports if start < tail)
    whole = sum(end - start for start, end, *_ in simulation.reports)
    return {
        "wall": simulation.now, "before": busy / tail / slots if tail else 1.0, "busy": whole / simulation.now / slots,
        "iterations": len(simulation.reports), "trials": len(simulation.trials),
        "best": min(report[-1] for report in simulation.reports),
    }  # fmt: skip


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median of each number over several searches."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def utilisation(all_slots: list[int]) -> float:
    """Prints the table; returns the median of Ray's own wall time by ours."""
    print("limit: ours at least 95 % busy before the tail, and a wall time not above Ray's own")
    print("slots  bands  search         trials  iterations  wall h  busy before tail  busy  Ray's wall / ours")
    ratios = []
    for slots in all_slots:
        bands = max(3, math.ceil(10 * slots / BAND))
        seeds = range(5 if slots < 512 else 1)
        ours = [search("ours", bands * BAND, slots, seed) for seed in seeds]
        rows = {"ours": ours, "Ray's own": [search("Ray's own", bands * BAND, slots, seed) for seed in seeds]}
        for kind in ("ASHA", "random, full"):  # these end in the midst of their trials, so they have hardly a tail
            limits = [run["iterations"] for run in ours]
            rows[kind] = [search(kind, 10**9, slots, seed, limit) for seed, limit in zip(seeds, limits, strict=True)]
        walls = [[run["wall"] for run in rows[kind]] for kind in ("Ray's own", "ours")]
        these = [rays / own for rays, own in zip(*walls, strict=True)]
        ratios += these
        for kind, runs in rows.items():
            m = medians(runs)
            line = f"{slots:5} {bands:6}  {kind:13} {m['trials']:7.0f} {m['iterations']:11.0f} {m['wall'] / 3600:7.2f}"
            line += f" {m['before']:17.1%} {m['busy']:5.1%}"
            if kind == "ours":
                line += f"  {statistics.median(these):.2f}, least of {len(these)} seeds {min(these):.2f}"
            print(line, flush=True)
    return statistics.median(ratios)


class LongestFirst(HyperBandForBOHB):
    """Starts the trial with most iterations left to max_t first, promoted or new. Ours starts promoted ones first."""

    def choose_trial_to_run(self, tune_controller):
        """The promoted or pending trial of the bracket whose trials have most iterations left."""
        searcher = self._searcher(tune_controller)
        for bracket in list(self._active):
            self._promote_if_complete(tune_controller, bracket)
        self._active = [b for b in self._active if b.members or b.open]
        for bracket in sorted(self._active, key=lambda b: b.rungs[b.rung - 1][1] if b.rung else 0):
            for trial in (self._trials[t] for t in bracket.members if t in self._trials):
                if trial.status == Trial.PENDING:
                    return trial
                if trial.status == Trial.PAUSED and trial.trial_id in bracket.promoted:
                    bracket.promoted.discard(trial.trial_id)
                    searcher.on_unpause(trial.trial_id)
                    return trial
        return None


def order(all_slots: list[int]) -> None:
    """Prints what another order of the trials that wait would change: medians of 9 seeds."""
    print("\nstarting the trial with most iterations left first, in place of promoted ones first (one model, 9 seeds)")
    print("slots  bands  busy  busy then  wall then / wall [all seeds]  best loss, median  best loss then")
    for bands in (1, 3):
        for slots in all_slots:
            runs = {}
            for kind in ("ours", "longest first"):
                runs[kind] = [search(kind, bands * BAND, slots, seed, random_fraction=1 / 3) for seed in range(9)]
            ratios = [then["wall"] / now["wall"] for now, then in zip(*runs.values(), strict=True)]
            m, then = (medians(of_kind) for of_kind in runs.values())
            seeds = f"[{min(ratios):.2f}, {max(ratios):.2f}]"
            print(
                f"{slots:5} {bands:6} {m['busy']:5.1%} {then['busy']:10.1%} {statistics.median(ratios):16.2f} {seeds} "
                f"{m['best']:18.4f} {then['best']:15.4f}",
                flush=True,
            )


def time_calls(target, names: list[str], times: dict[str, list[float]]) -> None:
    """Replaces methods by ones that add their seconds to `times`."""

    def timed(name, method):
        def call(*args, **kwargs):
            start = time.perf_counter()
            result = method(*args, **kwargs)
            times[name].append(time.perf_counter() - start)
            return result

        return call

    for name in names:
        setattr(target, name, timed(name, getattr(target, name)))


def decisions(kind: str, trials: int) -> dict[str, float]:
    """Mean milliseconds of a call, by method, while the last 300 of so many trials are suggested."""
    searcher, scheduler = make(kind, 0, random_fraction=1 / 3)
    times: dict[str, list[float]] = defaultdict(list)
    time_calls(searcher, ["suggest"], times)
    time_calls(scheduler, ["on_trial_result", "choose_trial_to_run"], times)
    simulation = Simulation(searcher, scheduler, trials, loss, slots=8, max_t=MAX_T, seconds=seconds)
    while len(simulation.trials) < trials - 300:
        simulation.run(len(simulation.reports) + 10)
    times.clear()
    while len(simulation.trials) < trials:
        simulation.run(len(simulation.reports) + 10)
    return {name: 1000 * statistics.mean(values) for name, values in times.items()}


def cost(sizes: list[int]) -> None:
    """Prints the table of decisions, for searches with so many trials."""
    print("\nmean milliseconds of a decision at 8 slots; limit: 5 at 10,000 trials, growth about linear")
    print("search     trials  suggest  on_trial_result  choose_trial_to_run")
    for kind, trials in [("Ray's own", min(sizes))] + [("ours", size) for size in sizes]:
        ms = decisions(kind, trials)
        print(
            f"{kind:9} {trials:7} {ms['suggest']:8.2f} {ms['on_trial_result']:16.2f} {ms['choose_trial_to_run']:20.2f}",
            flush=True,
        )


def nothing(config: dict) -> None:
    """A trial that trains nothing, and reports a checkpoint at each rung."""
    checkpoint = tune.get_checkpoint()
    start = int((Path(checkpoint.path) / "t").read_text()) if checkpoint else 0
    for t in range(start + 1, config["rungs"][-1] + 1):
        result = {"loss": loss(config, t), "training_iteration": t}
        if t in config["rungs"]:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                (Path(folder) / "t").write_text(str(t))
                tune.report(result, checkpoint=tune.Checkpoint.from_directory(folder))
        else:
            tune.report(result)


def real(trials: int, loop: str, controller: type) -> float:
    """Runs a search in Ray. Prints the seconds per trial, and the share of the time that decisions take.

    Args:
        trials: number of trials.
        loop: the name of the row.
        controller: the class of Tune's control loop to use.

    Returns:
        Seconds of the run.
    """
    ray.tune.tune.TuneController = controller
    searcher = TuneBOHB(seed=0)
    scheduler = HyperBandForBOHB(time_attr="training_iteration", max_t=4, reduction_factor=4, stop_last_trials=False)
    times: dict[str, list[float]] = defaultdict(list)
    time_calls(searcher, ["suggest"], times)
    time_calls(scheduler, ["on_trial_result", "choose_trial_to_run"], times)
    with tempfile.TemporaryDirectory() as folder:
        start, cpu = time.perf_counter(), time.process_time()
        results = tune.Tuner(
            tune.with_resources(nothing, {"cpu": len(os.sched_getaffinity(0)) / 4}),  # four at a time
            param_space=SPACE,
            tune_config=tune.TuneConfig(
                metric="loss",
                mode="min",
                num_samples=trials,
                search_alg=searcher,
                scheduler=scheduler,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        ).fit()
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    spent = {name: sum(values) for name, values in times.items()}
    each = ", ".join(f"{name} {total / trials * 1000:.2f} ms a trial" for name, total in spent.items())
    print(
        f"{loop}: {results.num_errors} failed, {wall:.0f} s, {wall / trials:.3f} s a trial, "
        f"of which the driver's CPU {cpu / trials:.3f} s; "
        f"decisions {sum(spent.values()) / wall:.1%} of the time: {each}",
        flush=True,
    )
    return wall


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, nargs="+", default=[4, 8, 64, 512])
    parser.add_argument("--trials", type=int, nargs="+", default=[1000, 10_000], help="for the cost of a decision")
    parser.add_argument("--order", type=int, nargs="+", help="numbers of slots for a comparison of orders")
    parser.add_argument("--ray", action="store_true", help="also real Ray runs of 1,000 trials")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)  # of hpbandster, which prints its densities
    ratio = utilisation(args.slots)
    cost(args.trials)
    if args.order:
        order(args.order)
    if args.ray:
        limit = "limit: our control loop no slower than Tune's own"
        print(f"\nreal Ray, {REAL} trials that do nothing, 4 slots, max_t 4; {limit}")
        with common.ray_session():
            walls = [
                real(REAL, "Tune's own", ray_private.TuneController.__mro__[1]),
                real(REAL, "ours", ray_private.TuneController),
            ]
        print(f"Tune's seconds by ours: {walls[0] / walls[1]:.2f}")
    print(f"ratio: {ratio:.2f}")


if __name__ == "__main__":
    main()
