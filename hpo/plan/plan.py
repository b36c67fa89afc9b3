"""The plan of a search: a forecast by simulation, and as text."""

import math
import random
import statistics
from dataclasses import dataclass

from ray.tune.search.sample import Domain

from hpo.bohb.scheduler import HyperBandForBOHB
from hpo.bohb.searcher import TuneBOHB
from hpo.files import columns
from hpo.plan.simulator import Simulation


@dataclass
class Forecast:
    """What to expect of a search whose iterations all take equally long."""

    rungs: list[tuple[int, int, int, int]]  # (bracket, rung at iteration, trials that come to it, iterations run for it)
    suggested: int  # trials suggested before there is a model
    model_based: int  # suggestions made once there is one; BOHB still draws a third of them at random
    checkpoints: int  # most on disk at a time
    iterations: int  # in all
    time: float  # of the whole search, in iterations
    busy: list[float]  # share of the slots' time that is spent on iterations, in each tenth of the time

    def disk(self, checkpoint_bytes: int) -> int:
        """Bytes at the peak: the checkpoints and, at most as large, the best model."""
        return checkpoint_bytes * (self.checkpoints + 1)


def forecast(space: dict, num_samples: int, max_t: int, reduction_factor: int, slots: int) -> Forecast:
    """Runs the searcher and the scheduler of a search on random losses.

    With many slots most suggestions are made before the first rung is through, so few can be the model's.
    """
    rng = random.Random(0)
    searcher = TuneBOHB(seed=0, bohb_config={"random_fraction": 0})
    searcher.set_search_properties("loss", "min", space)
    scheduler = HyperBandForBOHB(
        time_attr="training_iteration", metric="loss", mode="min", max_t=max_t, reduction_factor=reduction_factor
    )
    most = 0

    def train(config: dict, t: int) -> float:
        nonlocal most
        most = max(most, simulation.checkpoints())
        return rng.random()

    simulation = Simulation(searcher, scheduler, num_samples, train, slots=slots, max_t=max_t)
    simulation.run()
    rungs = []
    for number, bracket in enumerate(scheduler.brackets, 1):
        below = 0
        for _, budget in bracket.rungs:
            came = sum(o["budget"] == budget and scheduler.bracket_of(o["trial_id"]) is bracket for o in searcher.observations)
            rungs.append((number, budget, came, came * (budget - below)))
            below = budget
    tenth = simulation.now / 10
    busy = [
        sum(max(0.0, min(end, (i + 1) * tenth) - max(start, i * tenth)) for start, end, *_ in simulation.reports) / tenth / slots
        for i in range(10)
    ]
    return Forecast(
        rungs,
        next((i for i, s in enumerate(searcher.suggested.values()) if s["model_based"]), num_samples),
        searcher.model_based,
        # Besides: the best trial's; and where a trial has written a new one, the old one stays until the state is saved twice.
        most + 1 + 2 * min(slots, num_samples),
        len(simulation.reports),
        simulation.now,
        busy,
    )


def plan(
    space: dict, settings: list[dict], forecasts: list[Forecast], seconds: float | None, checkpoint_bytes: int | None, time_limit: int | None
) -> str:
    """The plan of a search as text; of several settings, one line each.

    Args:
        space: the search space.
        settings: each {"num_samples", "max_t", "reduction_factor", "slots"}.
        forecasts: one a setting.
        seconds: of one iteration, if known.
        checkpoint_bytes: size of one checkpoint, if known.
        time_limit: of one job, in seconds, if there is one.
    """
    rows = [["slots", "reduction factor", "trials", "iterations", "full trainings", "model-based", "busy", "iterations' time"]]
    rows[0] += ["hours", "slot-hours"] if seconds else []
    rows[0] += ["disk GB"] if checkpoint_bytes else []
    for s, f in zip(settings, forecasts):
        row = [s["slots"], s["reduction_factor"], s["num_samples"], f.iterations, f"{f.iterations / s['max_t']:.1f}", f.model_based]
        row += [f"{statistics.mean(f.busy):.0%}", f"{f.time:.0f}"]
        row += [f"{f.time * seconds / 3600:.2f}", f"{f.time * seconds / 3600 * s['slots']:.2f}"] if seconds else []
        row += [f"{f.disk(checkpoint_bytes) / 1e9:.3g}"] if checkpoint_bytes else []
        rows.append(row)
    if len(settings) > 1:
        return columns(rows)
    (s,), (f,) = settings, forecasts
    wide = [["bracket", "rung at iteration", "trials", "iterations", "share"]]
    wide += [[bracket, budget, trials, run, f"{run / f.iterations:.0%}"] for bracket, budget, trials, run in f.rungs]
    dimensions = sum(isinstance(domain, Domain) for domain in space["train_loop_config"].values())
    lines = [
        columns(wide),
        "",
        f"{s['num_samples']} trials, {f.iterations} iterations: as many as {f.iterations / s['max_t']:.1f} full trainings of {s['max_t']}",
        f"model: it needs {2 * (dimensions + 1)} results at one rung (2 (d + 1), {dimensions} hyperparameters); on {s['slots']} slots it has them after "
        f"{f.suggested} suggestions, so {f.model_based} can come from it; a third of these stays random",
        f"time: that of {f.time:.0f} iterations one after another, slots {statistics.mean(f.busy):.0%} busy; by tenths of the time: "
        + " ".join(f"{share:.0%}" for share in f.busy),
    ]
    if seconds:
        hours = f.time * seconds / 3600
        lines.append(f"at {seconds:.3g} s an iteration: {hours:.2f} hours, {hours * s['slots']:.2f} slot-hours, {f.iterations * seconds / 3600:.2f} of them busy")
        if time_limit:
            jobs = math.ceil(f.time * seconds / max(60, time_limit - 360))  # it is warned 5 minutes before, and takes one to start
            lines.append(f"time limit of a job, {time_limit / 3600:.2f} hours: " + ("it fits" if jobs == 1 else f"at least {jobs} jobs, one after another, by requeueing"))
        else:
            lines.append("time limit of a job: not known, set SBATCH_TIMELIMIT")
    else:
        lines.append("hours: with --seconds_per_iteration, a number or the iterations.csv of an earlier run")
    if checkpoint_bytes:
        size = f"{f.disk(checkpoint_bytes) / 1e9:.3g} GB, for {f.checkpoints} checkpoints of {checkpoint_bytes / 1e9:.3g} GB and the best model"
        lines.append(f"disk at its peak: up to {size}")
    else:
        lines.append("disk: known once the model is there (--prefetch)")
    return "\n".join(lines)
