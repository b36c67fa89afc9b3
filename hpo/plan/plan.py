"""The plan of a search: a forecast by simulation, as text for --plan."""

import argparse
import itertools
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ray.tune.search.sample import Domain

from hpo import arguments, errors, known, machines, ranges, search_space
from hpo.bohb.brackets import band_size
from hpo.bohb.scheduler import HyperBandForBOHB
from hpo.bohb.searcher import TuneBOHB
from hpo.errors import BadInput
from hpo.files import columns
from hpo.plan import pace
from hpo.plan.budget import Budget
from hpo.plan.simulator import Simulation
from hpo.results.slots import trials_per_gpu
from hpo.squad import loading

MAX_ITERATIONS = 100_000  # iterations; the time of a plan with a budget grows with the square of its length


@dataclass
class Forecast:
    """What to expect of a search whose iterations all take the same time."""

    trials: int  # of the search
    # (bracket, iteration of the rung, trials that reach it, iterations for it); then those of further_trainings
    rungs: list[tuple[int | str, int, int, int]]
    suggested: int  # suggestions before there is a model
    model_based: int  # suggestions after that; BOHB draws a third of these at random
    checkpoints: int  # the largest number on disk at a time
    iterations: int  # of all trials
    time: float  # from start to end of the search, in durations of one iteration
    busy: list[float]  # in each tenth of the time, the share of the slots' time that is spent on iterations

    def disk(self, checkpoint_bytes: int, best_model_bytes: int) -> int:
        """Bytes on disk at the peak: all checkpoints, and the best model.

        Args:
            checkpoint_bytes: the size of one checkpoint.
            best_model_bytes: the size of the best model.
        """
        return checkpoint_bytes * self.checkpoints + best_model_bytes


def forecast(
    space: dict,
    num_samples: int | None,
    max_t: int,
    reduction_factor: int,
    slots: int,
    ends: Iterable[int] = (),
    first: list[dict] = (),
    baseline: bool = False,
    length: float = math.inf,
    further: dict[str, int] | None = None,
) -> Forecast:
    """Runs the searcher and the scheduler of a search on random losses, in simulated time.

    The losses do not matter: brackets, rungs and the number of promotions do not depend on them. With many slots most
    suggestions are made before a rung has enough results, so few can come from the model.

    Args:
        space: the search space, as Ray Tune has it.
        num_samples: trials of the search; None: as many as `length` allows.
        max_t: iterations of a full training.
        reduction_factor: one of so many trials is promoted at a rung.
        slots: trials that can run at a time.
        ends: the numbers of trials at which the search has ended before, in the middle of a bracket.
        first: the known settings, see known.settings.
        baseline: whether the first of them is trained to the end. Here it loses at its first rung.
        length: the search takes no longer, in durations of one iteration.
        further: numbers of full trainings that follow the search, see further_trainings.
    """
    num_samples = num_samples or math.inf
    rng = random.Random(0)
    searcher = TuneBOHB(seed=0, bohb_config={"random_fraction": 0}, points_to_evaluate=known.points(first))
    searcher.set_search_properties("loss", "min", space)
    scheduler = HyperBandForBOHB(
        metric="loss", mode="min", max_t=max_t, reduction_factor=reduction_factor, baseline=baseline
    )
    most = 0

    def train(config: dict, t: int) -> float:
        nonlocal most
        most = max(most, simulation.checkpoints())
        return 2.0 if baseline and config["train_loop_config"] == first[0] else rng.random()

    simulation = Simulation(searcher, scheduler, num_samples, train, slots=slots, max_t=max_t)
    if length < math.inf:
        budget = Budget(scheduler, lambda: slots, lambda: length - simulation.now, lambda config, t: 1.0)
        searcher.allows_trial = budget.allows_trial
    for trials in (*ends, num_samples):
        simulation.search_alg.num_samples = trials
        simulation.run()
    created, time = simulation.search_alg.created, simulation.now
    rungs = rungs_of(scheduler, searcher)
    checkpoints = [most_checkpoints(created, slots, most)]
    iterations = [(start, end) for start, end, *_ in simulation.reports]
    completed = sum(trials for _, rung, trials, _ in rungs if rung == max_t)
    for name, trainings in (further or {}).items():
        trainings = min(trainings, created - completed) if name == "finish" else trainings
        checkpoints.append(most_checkpoints(trainings, slots))
        rungs += [(name, max_t, trainings, trainings * max_t)] * (trainings > 0)
        starts = [time + i // slots * max_t + t for i in range(trainings) for t in range(max_t)]
        iterations += [(start, start + 1) for start in starts]
        time += math.ceil(trainings / slots) * max_t
    return Forecast(
        trials=created,
        rungs=rungs,
        suggested=next((i for i, s in enumerate(searcher.suggested.values()) if s["model_based"]), created),
        model_based=searcher.model_based,
        checkpoints=max(checkpoints),
        iterations=len(iterations),
        time=time,
        busy=busy_by_tenths(iterations, time, slots),
    )


def rungs_of(scheduler: HyperBandForBOHB, searcher: TuneBOHB) -> list[tuple[int, int, int, int]]:
    """The rungs of all brackets of a search, see Forecast."""
    rungs = []
    for number, bracket in enumerate(scheduler.brackets, 1):
        below = 0
        for _, rung in bracket.rungs:
            reached = [o["trial_id"] for o in searcher.observations if o["budget"] == rung]
            trials = sum(scheduler.bracket_of(trial_id) is bracket for trial_id in reached)
            rungs.append((number, rung, trials, trials * (rung - below)))
            below = rung
    return rungs


def busy_by_tenths(iterations: list[tuple[float, float]], time: float, slots: int) -> list[float]:
    """For each tenth of a time, the share of the slots' time in which they run iterations (start, end)."""
    tenth = time / 10 or 1.0  # there is no time where no trial fits into the length
    return [
        sum(max(0.0, min(end, (i + 1) * tenth) - max(start, i * tenth)) for start, end in iterations) / tenth / slots
        for i in range(10)
    ]


def most_checkpoints(trainings: int, slots: int, paused: int = 0) -> int:
    """The most checkpoints on disk, of trials that are trained on some slots while others are paused.

    One is the best trial's. A trial that writes a checkpoint keeps the one before it until two more states of the
    search are saved.
    """
    return paused + 1 + 2 * min(slots, trainings)


def settings_to_compare(args: argparse.Namespace) -> list[dict]:
    """The settings that a plan compares: {"num_samples" (None: by a budget), "max_t", "reduction_factor", "slots"}."""
    settings = []
    for factor, at_a_time in itertools.product(args.reduction_factor, args.max_concurrent_trials):
        trials = args.num_samples if arguments.has_budget(args) else args.num_samples or band_size(args.max_t, factor)
        setting = {"num_samples": trials, "max_t": args.max_t, "reduction_factor": factor}
        settings.append(setting | {"slots": at_a_time or machines.slots(args, 0)})
    return settings


def further_trainings(args) -> dict[str, int]:
    """Full trainings that follow the search, at most: --finish, then --repeats of the best trial and the baseline."""
    return {"finish": args.finish, "repeats": args.repeats * (1 + args.baseline)}


def band_forecast(args, space: dict, setting: dict) -> Forecast:
    """The forecast of a search of num_samples trials, or of one band where only a budget ends it."""
    trials = setting["num_samples"] or band_size(setting["max_t"], setting["reduction_factor"])
    setting = setting | {"num_samples": trials}
    return forecast(space, **setting, first=args.known, baseline=args.baseline, further=further_trainings(args))


def within_budget(args, space: dict, setting: dict, seconds: float) -> Forecast:
    """The forecast of a search that ends by its budget.

    Args:
        args: the arguments of the program.
        space: the search space.
        setting: {"num_samples", "max_t", "reduction_factor", "slots"}; num_samples is the most trials, or None.
        seconds: duration of an iteration.

    Raises:
        BadInput: no trial can be trained to the end within the budget, or there are too many to simulate.
    """
    hours = [math.inf if args.hours is None else args.hours]
    if args.gpu_hours is not None:
        hours.append(args.gpu_hours / setting["slots"] / (args.gpus_per_trial or 1))
    length, budget = min(hours) * 3600 / seconds, " and ".join(arguments.budget_in_words(args))
    if length * setting["slots"] > MAX_ITERATIONS:
        more = f"more than {MAX_ITERATIONS:,} iterations, too many for a plan"
        raise BadInput(f"{budget}: on {setting['slots']} slots {more}")
    known = {"first": args.known, "baseline": args.baseline}
    found = forecast(space, **setting, **known, length=length, further=further_trainings(args))
    if not found.trials:
        raise BadInput(
            f"{budget}: on {setting['slots']} slots no trial ends within it: a full training takes "
            f"{args.max_t * seconds / 3600:.3g} hours"
        )
    return found


def in_bands(trials: int, max_t: int, reduction_factor: int) -> str:
    """A number of trials as bands, in words."""
    size = band_size(max_t, reduction_factor)
    whole, more = divmod(trials, size)
    bands = [f"{whole} whole band{'s' * (whole > 1)} of {size} trials"] * (whole > 0)
    return " and ".join(bands + [f"{more} trials of a band of {size}"] * (more > 0))


def hours_of(forecast: Forecast, seconds: float, slots: int, gpus_per_trial: float) -> tuple[float, float, float]:
    """Hours of a search from its start to its end, slot-hours and GPU-hours. Idle slots are counted.

    Args:
        forecast: of the search.
        seconds: duration of an iteration.
        slots: trials that can run at a time.
        gpus_per_trial: what a slot takes.
    """
    hours = forecast.time * seconds / 3600
    return hours, hours * slots, hours * slots * gpus_per_trial


def plan(
    space: dict,
    settings: list[dict],
    forecasts: list[Forecast],
    seconds: list[float] | None,
    disk_bytes: tuple[int, int] | None,
    time_limit: int | None,
    gpus_per_trial: float = 0,
) -> str:
    """The plan of one search, or the comparison of several settings with a line for each.

    Args:
        space: the search space.
        settings: each {"num_samples", "max_t", "reduction_factor", "slots"}.
        forecasts: one for each setting.
        seconds: duration of one iteration in each of them, if known.
        disk_bytes: the sizes of a checkpoint and of the best model, if known.
        time_limit: of one Slurm job in seconds, if known.
        gpus_per_trial: with 0 there are no GPU-hours. A comparison has none with 1 either: they are its slot-hours.
    """
    if len(settings) > 1:
        return compare(settings, forecasts, seconds, disk_bytes, gpus_per_trial)
    (s,), (f,) = settings, forecasts
    wide = [["bracket", "rung at iteration", "trials", "iterations", "share"]]
    for numbers, rows in brackets_alike(f.rungs):
        more = f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
        for budget, trials, run in rows:
            wide.append([f"{numbers[0]}{more}", budget, trials, run, f"{run * len(numbers) / f.iterations:.0%}"])
    dimensions = sum(isinstance(domain, Domain) for domain in space["train_loop_config"].values())
    lines = [
        columns(wide),
        "",
        f"{s['num_samples']} trials, {f.iterations} iterations: "
        f"as many as {f.iterations / s['max_t']:.1f} full trainings of {s['max_t']}",
        f"model: it needs {2 * (dimensions + 1)} results at one rung (2 (d + 1), {dimensions} hyperparameters); "
        f"on {s['slots']} slots it has them after {f.suggested} suggestions, so {f.model_based} can come from it; "
        "a third of these stays random",
        f"time: that of {f.time:.0f} iterations one after another, slots {statistics.mean(f.busy):.0%} busy; "
        "by tenths of the time: " + " ".join(f"{share:.0%}" for share in f.busy),
    ]
    if seconds:
        each = seconds[0]
        hours, of_slots, of_gpus = hours_of(f, each, s["slots"], gpus_per_trial)
        busy = f"{of_slots:.2f} slot-hours, {f.iterations * each / 3600:.2f} of them busy"
        lines.append(f"at {each:.3g} s an iteration: {hours:.2f} hours, {busy}")
        if gpus_per_trial:
            gpus = "1 GPU" if gpus_per_trial == 1 else f"{gpus_per_trial:.3g} GPUs"
            lines.append(f"a slot takes {gpus}: {of_gpus:.2f} GPU-hours")
        if time_limit:  # the job is warned 5 minutes before its end, and takes one to start
            jobs = math.ceil(f.time * each / max(60, time_limit - 360))
            fits = "it fits" if jobs == 1 else f"at least {jobs} jobs, one after another, by requeueing"
            lines.append(f"time limit of a job, {time_limit / 3600:.2f} hours: {fits}")
        else:
            lines.append("time limit of a job: none, or not known (SBATCH_TIMELIMIT)")
    else:
        lines.append("hours: with --seconds_per_iteration, a number or the iterations.csv of an earlier run; or after")
        lines.append("  a --check, with --from_check")
    if disk_bytes:
        each = f"{f.checkpoints} checkpoints of {disk_bytes[0] / 1e9:.3g} GB and the best model"
        lines.append(f"disk at its peak: up to {f.disk(*disk_bytes) / 1e9:.3g} GB, for {each}")
    else:
        lines.append("disk: known once the model is there (--prefetch)")
    return "\n".join(lines)


def brackets_alike(rungs: list[tuple[int, int, int, int]]) -> list[tuple[list[int], list[tuple[int, int, int]]]]:
    """Groups brackets of one size: their numbers, and for each rung of one its iteration, trials and iterations for it.

    Args:
        rungs: see Forecast.
    """
    brackets = defaultdict(list)
    for number, *rung in rungs:
        brackets[number].append(tuple(rung))
    alike = defaultdict(list)
    for number, rows in brackets.items():
        alike[tuple(rows), number if isinstance(number, str) else None].append(number)
    return [(numbers, list(rows)) for (rows, _), numbers in alike.items()]


def compare(
    settings: list[dict],
    forecasts: list[Forecast],
    seconds: list[float] | None,
    disk_bytes: tuple[int, int] | None,
    gpus_per_trial: float,
) -> str:
    """A table with a line for each of several settings. The arguments are those of `plan`."""
    head = ["slots", "reduction factor", "trials", "iterations", "full trainings", "model-based", "busy"]
    head += ["iterations' time"]
    hours_of_gpus = bool(seconds) and gpus_per_trial not in (0, 1)
    head += ["hours", "slot-hours"] * bool(seconds) + ["GPU-hours"] * hours_of_gpus
    rows = [head + ["disk GB"] * bool(disk_bytes)]
    for i, (s, f) in enumerate(zip(settings, forecasts, strict=True)):
        row = [s["slots"], s["reduction_factor"], s["num_samples"], f.iterations, f"{f.iterations / s['max_t']:.1f}"]
        row += [f.model_based, f"{statistics.mean(f.busy):.0%}", f"{f.time:.0f}"]
        if seconds:
            hours = hours_of(f, seconds[i], s["slots"], gpus_per_trial)
            row += [f"{number:.2f}" for number in hours[: 2 + hours_of_gpus]]
        if disk_bytes:
            row.append(f"{f.disk(*disk_bytes) / 1e9:.3g}")
        rows.append(row)
    return columns(rows)


def show(args, space: dict, max_length: int, eval_tokens: int) -> None:
    """Prints the plan of a search, or compares the plans of several settings. Then prints which GPUs a trial fits on.

    Args:
        args: the arguments of the program.
        space: the search space.
        max_length: the most tokens of a sequence.
        eval_tokens: tokens of a batch in evaluation, padding included.

    Raises:
        BadInput: the disk of --output_dir is too small. The plan is printed before that.
    """
    model, settings = loading.local_model(args.model), settings_to_compare(args)
    disk_bytes, largest = None, search_space.largest_trial(space, args)
    if model:
        disk_bytes = loading.disk_bytes(model, count_adapters(args, largest["lora_r"], model))
    forecasts = [band_forecast(args, space, setting) for setting in settings]
    seconds, limit = args.seconds_per_iteration and [args.seconds_per_iteration] * len(settings), machines.time_limit()
    if args.from_check is not None:
        seconds = pace.of_check(args, space, forecasts)
    budget = arguments.budget_in_words(args)
    if budget:
        forecasts = [within_budget(args, space, *pair) for pair in zip(settings, seconds, strict=True)]
        settings = [s | {"num_samples": f.trials} for s, f in zip(settings, forecasts, strict=True)]
    for line in [*ranges.changes(space, args.ranges), *known.in_words(args.known, args.baseline)]:
        print(line)
    where = "the nodes for trials have" if args.cluster else "this machine has"
    if args.from_check is not None:
        where = "the nodes that were ok in the check have"
    print(f"{where} {machines.slots(args, 0)} slots; a plan for others: --max_concurrent_trials\n")
    if budget and len(settings) == 1:
        further = further_trainings(args)
        rungs = [rung for rung in forecasts[0].rungs if rung[0] not in further]
        ended = sum(trials for _, iteration, trials, _ in rungs if iteration == args.max_t)
        bands = in_bands(forecasts[0].trials, args.max_t, settings[0]["reduction_factor"])
        more = ", and --finish and --repeats come on top" * any(further.values())
        print(f"within {' and '.join(budget)}: {bands}; {ended} trials are trained to the end{more}\n")
    print(plan(space, settings, forecasts, seconds, disk_bytes, limit, args.gpus_per_trial), flush=True)
    if model is None:
        print("memory of a GPU: known once the model is there (--prefetch)", flush=True)
    else:
        print(f"\n{memory_plan(args, space, largest, model, max_length, eval_tokens)}", flush=True)
    if disk_bytes and len(forecasts) == 1:
        machines.check_disk(Path(args.output_dir).absolute(), forecasts[0].disk(*disk_bytes))


def count_adapters(args, r: int, model: Path) -> int:
    """The number of parameters of adapters of rank r. Raises BadInput where the model cannot have them."""
    if not r and not args.gradient_checkpointing:
        return 0  # without importing torch and transformers
    from hpo.squad import lora

    lora.check(model, r, args.lora_target_modules, args.gradient_checkpointing)
    return lora.count_trained(model, r, args.lora_target_modules)


def memory_plan(args, space: dict, largest: dict, model: Path, max_length: int, eval_tokens: int) -> str:
    """The GPUs that a trial fits on, as text. `largest` is of search_space.largest_trial, the others as for `show`.

    Without --precision the forecast is for fp16, also on a machine that has no GPU: the plan tells which GPU to ask
    for.
    """
    from hpo.plan import memory  # imports torch and transformers, which the rest of the plan does not need
    from hpo.squad.data import ANSWER_ROOM
    from hpo.squad.models import max_positions

    precision = args.precision if "precision" in args.given else "fp16"
    options = {"lora_r": largest["lora_r"]}
    options |= {"target_modules": args.lora_target_modules, "checkpointing": args.gradient_checkpointing}

    def forecast_of(ds_config: dict, batch_size: int, ranks: int) -> memory.Forecast:
        lengths = min(max_length, max_positions(model) or max_length), ANSWER_ROOM, eval_tokens, ANSWER_ROOM
        return memory.forecast(model, ds_config, precision, batch_size, *lengths, ranks, **options)

    sizes = [int(search_space.smallest(space["train_loop_config"]["per_device_bs"])), largest["per_device_bs"]]
    try:
        ranks, sharing = max(1, args.gpus_per_trial), trials_per_gpu(args.gpus_per_trial)
        text = memory.plan(forecast_of, precision, args.ds_config, sizes, ranks, sharing)
    except Exception as error:  # FakeTensors cannot follow every model
        return f"memory of a GPU: no forecast for this model: {errors.one_line(error, 200)}"
    told = [f"LoRA rank {options['lora_r']}"] * (options["lora_r"] > 0)
    told += ["gradient checkpointing"] * args.gradient_checkpointing
    return f"with {' and '.join(told)}: {text}" if told else text
