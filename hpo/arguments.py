"""The command line: flags, their defaults, and checks of their values.

Imports the standard library only. So `--help` and a wrong flag or number are answered at once, before the slow imports
of the script. As a program, python -m hpo.arguments, it is that check alone: head_node.slurm runs it before it starts
anything. Exit code 3: --resume of a run that is done.
"""

import argparse
import json
import math
import os
import re
import sys
import time
from pathlib import Path

from hpo import known, machines, ranges
from hpo.bohb.brackets import band_size
from hpo.code_copy import ROOT
from hpo.errors import BadInput
from hpo.results.slots import slots_that_passed
from hpo.results.tables import MODES, mean_iteration_seconds
from hpo.squad.scores import ARTICLES

# Arguments that a run does not keep:
NOT_OF_THE_SEARCH = (
    "given", "cluster", "ranges", "known", "ds_config", "resume", "new_code", "prefetch", "plan",
    "seconds_per_iteration", "check", "from_check", "earlier_check", "earlier_results",
)  # fmt: skip
ENDS = ("num_samples", "gpu_hours", "hours")  # what ends a search; None: this does not
AFTER = ("finish", "repeats")  # how many trainings follow the search
OLDER = {  # older runs have no such flags
    "report_to": "tensorboard", "precision": "fp32", "metric_language": "en", "drop_bad_answers": False, "lora_r": 0,
    "lora_alpha": None, "lora_target_modules": "", "gradient_accumulation_steps": 1, "gradient_checkpointing": False,
    "try": [], "baseline": False, "gpu_hours": None, "hours": None, "warm_start": [], "finish": 0, "repeats": 0,
}  # fmt: skip
TRACKER_PACKAGES = {"none": None, "tensorboard": "tensorboardX", "mlflow": "mlflow-skinny", "wandb": "wandb"}
PRECISIONS = ("fp16", "bf16", "fp32")
NOTHING_TO_DO = 3  # exit code of python -m hpo.arguments
LEAST = {
    "max_t": 1, "reduction_factor": 2, "num_samples": 1, "cpus_per_trial": 1, "gpus_per_trial": 0,
    "max_concurrent_trials": 0, "max_train_samples": 1, "max_eval_samples": 1, "seed": 0, "lora_r": 0,
    "gradient_accumulation_steps": 1, "finish": 0, "repeats": 0,
}  # fmt: skip


def gpus_per_trial(text: str) -> int | float:
    """The value of --gpus_per_trial: a whole number, or 1/n for n = 2 to 100. Raises BadInput where it is another."""
    share = re.fullmatch(r"1/(\d{1,3})", text)
    try:
        value = 1 / int(share[1]) if share else float(text)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if value.is_integer():
        return int(value)
    n = round(1 / value) if 0.01 <= value < 1 else 0
    if n < 2 or abs(n * value - 1) > 0.001:  # 0.333 is 1/3
        raise BadInput(f"--gpus_per_trial {text}: must be whole, or 1/n such as 0.5, 1/3 or 0.25 (n up to 100)")
    return 1 / n


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises BadInput with one line, where argparse prints its whole usage."""

    def error(self, message):
        """Raises BadInput."""
        raise BadInput(message)


def make_parser(description: str) -> Parser:
    """The flags, with their defaults and help texts."""
    parser = Parser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--model", default="bigscience/bloom-560m", help="causal language model: name on the hub, or folder "
        "(default: %(default)s)")  # fmt: skip
    add("--dataset", default="rajpurkar/squad", help="name on the hub, or folder with train*.json and dev*.json [.gz], "
        "in the form of SQuAD v1.1 or 2.0 (default: %(default)s)")  # fmt: skip
    add("--drop_bad_answers", action="store_true", help="leave out answers that cannot be used, such as those that "
        "are not at their answer_start, and questions that have no other; the log says how many")  # fmt: skip
    add("--max_train_samples", type=int, help="train on at most this many questions (default: all)")
    add("--max_eval_samples", type=int, help="use at most this many questions for selection (default: 1000) and for "
        "the test (default: all)")  # fmt: skip
    add("--num_train_epochs", type=float, default=2.0, help="length of a full training (default: %(default)s)")
    add("--max_t", type=int, default=50, help="iterations of a full training; each ends with an evaluation "
        "(default: %(default)s)")  # fmt: skip
    add("--reduction_factor", type=int, nargs="+", default=[4], help="at a rung one of this many trials is promoted "
        "(default: 4)")  # fmt: skip
    add("--num_samples", type=int, help="number of trials in all, with --resume those that are done included "
        "(default: one whole band, or what --gpu_hours and --hours allow)")  # fmt: skip
    add("--gpu_hours", type=float, help="budget of the search: it takes as many trials as can end within it, each "
        "trained to the end of its bracket (on a machine without GPUs: slot-hours)")  # fmt: skip
    add("--hours", type=float, help="the same for hours of search; time in queues and after interruptions is not "
        "counted")  # fmt: skip
    add("--gpus_per_trial", type=gpus_per_trial, help="default: 1, and 0 on a machine without GPUs; several: one "
        "process for each; 0.5, 1/3, 0.25: two, three, four trials share a GPU")  # fmt: skip
    add("--cpus_per_trial", type=int, default=1, help="of all processes of a trial together (default: %(default)s)")
    add("--max_concurrent_trials", type=int, nargs="+", default=[0], help="0: as many as there are slots, the default")
    add("--metric", choices=list(MODES), default="eval_loss", help="trials are compared by it (default: %(default)s)")
    add("--metric_language", choices=list(ARTICLES), default="en", help="of the answers, for EM and F1: en normalises "
        "them as SQuAD does, the others as MLQA does (default: en)")  # fmt: skip
    add("--precision", choices=PRECISIONS, help="of training (default: fp16, and fp32 on a machine without GPUs)")
    add("--lora_r", type=int, default=0, help="rank of LoRA adapters, which are trained in place of the model's own "
        "weights (default: 0, no adapters)")  # fmt: skip
    add("--lora_alpha", type=float, help="the adapters are scaled by lora_alpha / r (default: 2 r, so that the scale "
        "does not depend on r; peft's own is 8)")  # fmt: skip
    add("--lora_target_modules", default="", help="layers that get an adapter: names separated by commas, or "
        "all-linear (default: peft's own for the architecture)")  # fmt: skip
    add("--gradient_accumulation_steps", type=int, default=1, help="batches of per_device_bs sequences in one "
        "optimizer step (default: 1)")  # fmt: skip
    add("--gradient_checkpointing", action="store_true", help="compute activations again in the backward pass: less "
        "memory, the same training, slower")  # fmt: skip
    add("--deepspeed", default=str(ROOT / "ds_config.json"), help="DeepSpeed configuration (default: the project's)")
    add("--try", action="append", default=[], metavar="SETTING", help="one of the first trials trains with these "
        "hyperparameters, such as lr=2.5e-5,per_device_bs=2,wd=0; may be given several times, and follows KNOWN of the "
        "script")  # fmt: skip
    add("--warm_start", nargs="+", action="extend", default=[], metavar="RUN_FOLDER", help="earlier runs: the results "
        "of a run of the same search enter the model; of another one, the best settings are tried first")  # fmt: skip
    add("--baseline", action="store_true", help="train the first known setting (KNOWN, --try) to the end, also if it "
        "loses, and say what the search has gained over it")  # fmt: skip
    add("--finish", type=int, default=0, metavar="N", help="after the search train to the end up to N of the "
        "trials that were stopped although they were not clearly worse than promoted ones (default: 0)")  # fmt: skip
    add("--repeats", type=int, default=0, metavar="N", help="at the end train the best trial, and the baseline, N "
        "times more with other seeds, and say how much their results differ (default: 0)")  # fmt: skip
    add("--seed", type=int, default=42, help="of the search, the split and each training (default: 42)")
    add("--output_dir", default="results", help="the run folder is <output_dir>/<run_name> (default: results)")
    add("--run_name", help="default: bloom_bohb-<job id, or time>, and check-<job id, or time> with --check")
    add("--report_to", choices=TRACKER_PACKAGES, default="tensorboard", help="experiment tracker "
        "(default: tensorboard)")  # fmt: skip
    add(
        "--trial_timeout",
        type=float,
        help="seconds until a silent trial is restarted (default: 10 times the slowest iteration, at least 600)",
    )
    add("--resume", action="store_true", help="go on with the run of --run_name, with its arguments; "
        "a larger --num_samples, --gpu_hours or --hours adds trials, also to a run that is done; --finish and "
        "--repeats add trainings")  # fmt: skip
    add("--new_code", action="store_true", help="with --resume: use the code of this checkout and the ds_config "
        "file as it is now, in place of the run's own copies")  # fmt: skip
    add("--prefetch", action="store_true", help="download model, tokenizer and data, try the model, and end")
    add("--plan", action="store_true", help="print what the search would run and need, and end; takes several values "
        "of --reduction_factor and --max_concurrent_trials, to compare them")  # fmt: skip
    add("--seconds_per_iteration", help="for --plan: a number, or the iterations.csv of an earlier run")
    add("--check", action="store_true", help="run a small trial on each node, print what is wrong and a plan, and end")
    add("--from_check", help="for --plan: the run folder of a --check, whose measurements give the hours")
    return parser


def parse(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line and checks all values that can be checked alone.

    With --resume, or after Slurm has requeued the job, the arguments are those of the run.

    Args:
        description: for --help.
        argv: the command line; None for the program's own.

    Returns:
        The arguments. `given` is the set of names that the command line has. `cluster` has the numbers of cluster.env;
        it is None if the trials run on this machine, and with --from_check. `ranges` has the variables that change the
        search space. `known` and `earlier_results` are empty: they need the search space. `earlier_check` is the
        check.json of --from_check.

    Raises:
        BadInput: an argument is wrong.
    """
    parser = make_parser(description)
    args = parser.parse_args(argv)
    parser.set_defaults(**dict.fromkeys(vars(args)))
    args.given = {name for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    args.ranges, args.known, args.earlier_results = ranges.read(os.environ), [], []
    check_combinations(args)
    if not args.plan:
        args.reduction_factor, args.max_concurrent_trials = args.reduction_factor[0], args.max_concurrent_trials[0]
    default = "check" if args.check else "bloom_bohb"
    args.run_name = args.run_name or f"{default}-{os.environ.get('SLURM_JOB_ID', time.strftime('%Y%m%d-%H%M%S'))}"
    if not re.fullmatch(r"[\w.-]+", args.run_name) or args.run_name in (".", ".."):
        raise BadInput(f"--run_name {args.run_name}: letters, digits, '.', '_' and '-' only")
    # Slurm starts a job again after its time limit, or after it has lost a node.
    restarted = int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0 and (run_dir(args) / "run.json").exists()
    args.resume |= restarted and not args.plan and not args.check
    args.new_code &= not restarted  # it has been taken when the job began
    if args.resume:
        load_from_run(args)
    if args.from_check is not None:
        take_from_check(args)
    check_values(args)
    if args.seconds_per_iteration is not None:
        args.seconds_per_iteration = seconds_per_iteration(args.seconds_per_iteration)
    if args.plan and has_budget(args) and args.seconds_per_iteration is None and args.from_check is None:
        raise BadInput(f"--plan: {' '.join(budget_in_words(args))}: needs --seconds_per_iteration or --from_check")
    if not args.plan and not has_budget(args):
        args.num_samples = args.num_samples or band_size(args.max_t, args.reduction_factor)
    if args.from_check is not None:
        args.cluster = None
    else:
        args.cluster = machines.read_cluster_env() if args.plan else machines.cluster_of_job()
    return args


def check_combinations(args: argparse.Namespace) -> None:
    """Raises BadInput where one flag does not go with another, or needs one that is not given."""
    for other in ("plan", "prefetch", "resume"):
        if args.check and getattr(args, other):
            raise BadInput(f"--check: not with --{other}")
    if args.plan and args.resume:
        raise BadInput("--plan: not with --resume")
    if args.new_code and not args.resume:
        raise BadInput("--new_code: only with --resume")
    for name in ("reduction_factor", "max_concurrent_trials"):
        if not args.plan and len(getattr(args, name)) > 1:
            raise BadInput(f"--{name}: several values only with --plan")
    for name in ("seconds_per_iteration", "from_check"):
        if not args.plan and getattr(args, name) is not None:
            raise BadInput(f"--{name}: only with --plan")
    if args.from_check is not None and args.seconds_per_iteration is not None:
        raise BadInput("--from_check: not with --seconds_per_iteration")


def has_budget(args: argparse.Namespace) -> bool:
    """Whether the search ends by a budget of time."""
    return args.gpu_hours is not None or args.hours is not None


def budget_in_words(args: argparse.Namespace) -> list[str]:
    """The budgets of the search, such as "100 GPU-hours". Empty where there are none."""
    unit = "GPU-hours" if args.plan or args.gpus_per_trial else "slot-hours"
    pairs = (args.gpu_hours, unit), (args.hours, "hours")
    return [f"{number:g} {unit}" for number, unit in pairs if number is not None]


def run_dir(args: argparse.Namespace) -> Path:
    """The run folder."""
    return Path(args.output_dir).absolute() / args.run_name


def starts_check_again(args: argparse.Namespace) -> bool:
    """Whether the run folder has the --check of this same job, which Slurm has requeued, as after a lost node."""
    if not args.check or not machines.slurm_job() or int(os.environ.get("SLURM_RESTART_COUNT", 0)) == 0:
        return False
    try:
        return json.loads((run_dir(args) / "check.json").read_text())["job"] == machines.slurm_job()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_values(args: argparse.Namespace) -> None:
    """Raises BadInput where a number is out of its range."""
    for name, least in LEAST.items():
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < least:
                raise BadInput(f"--{name} {value}: must be at least {least}")
    for name in ("trial_timeout", "lora_alpha", "num_train_epochs", "gpu_hours", "hours"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise BadInput(f"--{name} {value}: must be above 0")
    layers = args.lora_target_modules.split(",") if args.lora_target_modules else []
    if not all(re.fullmatch(r"[\w.-]+", name) for name in layers) or ("all-linear" in layers and len(layers) > 1):
        what = "names separated by commas, or all-linear alone"
        raise BadInput(f"--lora_target_modules {args.lora_target_modules}: {what}")
    for text in vars(args)["try"]:
        known.read(text)
    for folder in [] if args.resume else args.warm_start:
        try:
            (Path(folder) / "run.json").stat()
        except OSError as error:
            raise BadInput(f"--warm_start {folder}: not a run folder: run.json: {error.strerror}") from None
    if args.seed >= 2**32:
        raise BadInput(f"--seed {args.seed}: must be below 2**32")


def take_from_check(args: argparse.Namespace) -> None:
    """Reads the check of --from_check. Arguments that the command line does not give are those of the check.

    So are the variables that change the search space. The slots are those of the nodes that were ok, as in the plan
    that the check has printed.

    Raises:
        BadInput: it is no folder of a check, no small trial has run, or no node was ok and no slots are given.
    """
    try:
        args.earlier_check = json.loads((Path(args.from_check) / "check.json").read_text())
        earlier = args.earlier_check["arguments"]
        own = args.given | {"run_name", "output_dir"}
        if {"max_t", "reduction_factor", "gpu_hours", "hours"} & args.given:
            own |= {"num_samples"}  # a whole band, as for any plan, or what fits
        for name in earlier.keys() & vars(args).keys() - own:
            value = earlier[name]
            setattr(args, name, [value] if name in ("reduction_factor", "max_concurrent_trials") else value)
            args.given |= {"precision"} & {name}  # it is not a default: the plan of memory is for it
        if args.earlier_check["pace"] is None:
            raise BadInput(f"--from_check {args.from_check}: no node has run the small trial, so there is no pace")
        args.ranges = ranges.read(args.earlier_check.get("environment", {})) | args.ranges
        passed = slots_that_passed(args.earlier_check["nodes"], earlier["max_concurrent_trials"])
        if "max_concurrent_trials" not in args.given:
            args.max_concurrent_trials = [passed]
        if not passed and not all(args.max_concurrent_trials):
            raise BadInput(f"--from_check {args.from_check}: no node was ok: give the slots, --max_concurrent_trials")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"--from_check {args.from_check}: not the folder of a check ({error!r})") from None


def kept(args: argparse.Namespace) -> dict:
    """The arguments that a run keeps in run.json."""
    return {name: value for name, value in vars(args).items() if name not in NOT_OF_THE_SEARCH}


def of_run(args: argparse.Namespace) -> tuple[dict, dict[str, str], bool]:
    """The arguments and the `ranges` of the run that --run_name and --output_dir name, and whether it is done.

    Raises:
        BadInput: it is no run folder.
    """
    try:
        run = json.loads((run_dir(args) / "run.json").read_text())
        earlier = OLDER | run["arguments"]
        dict(run["search_space"])
        list(map(known.read, earlier["try"]))
        if earlier["gpus_per_trial"] is not None:
            earlier["gpus_per_trial"] = gpus_per_trial(str(earlier["gpus_per_trial"]))
        for name, value in kept(args).items():
            if name in ("run_name", "gpus_per_trial"):
                continue
            number = (int, float, type(None)) if value is None or name in ENDS else (int, float)
            kind = number if value is None or name in ENDS or isinstance(value, float) else type(value)
            if not (earlier[name] in PRECISIONS if name == "precision" else isinstance(earlier[name], kind)):
                raise ValueError(name)
        return earlier, ranges.read(dict(run.get("environment", {}))), run.get("status") == "done"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, BadInput):
        raise BadInput(
            f"--resume: {run_dir(args)} is not the folder of a run: --run_name and --output_dir say which"
        ) from None


def load_from_run(args: argparse.Namespace) -> None:
    """Takes over the arguments of the run that --run_name and --output_dir name.

    Arguments that are given again must be the same, except --trial_timeout, which may have been too short, --finish and
    --repeats, and those that say when the search ends: number of trials, GPU-hours, hours. If you change one of these,
    those that you do not give again no longer apply. The number may be smaller only before the run is done (see
    Run.take_over). The variables of the environment that change the search space must be the same, too.

    Raises:
        BadInput: it is no run folder, or another argument is given.
    """
    earlier, ranges_of_run, done = of_run(args)
    for name in ("run_name", "output_dir"):  # they say where the run is: it may have been moved
        earlier.pop(name, None)
    for name in {"trial_timeout", *AFTER} & args.given:
        earlier.pop(name)
    ends = {name: getattr(args, name) if name in args.given else None for name in ENDS}
    changed = any(ends[name] is not None and ends[name] != earlier[name] for name in ENDS)
    fewer = done and (ends["num_samples"] or math.inf) < (earlier["num_samples"] or 0)
    if changed and not fewer:
        earlier |= ends
    other = [
        f"--{name} {getattr(args, name)} (the run has {earlier[name]})"
        for name in sorted(args.given & set(earlier))
        if getattr(args, name) != earlier[name]
    ]
    for name in sorted(args.ranges.keys() & ranges_of_run.keys()):
        if ranges.numbers(name, args.ranges[name]) != ranges.numbers(name, ranges_of_run[name]):
            other.append(f"{name}={args.ranges[name]} in the environment (the run has {ranges_of_run[name]})")
    if other:
        raise BadInput(f"--resume: other arguments than the run's: {', '.join(other)}")
    for name, value in earlier.items():
        setattr(args, name, value)
    args.ranges = ranges_of_run | args.ranges  # search_space.check_same refuses a variable that is new


def nothing_to_do(args: argparse.Namespace, run: dict) -> bool:
    """Whether a run, by its run.json, is done, and neither trials, a larger budget nor further trainings are wanted."""
    more = any(getattr(args, name) > run["arguments"].get(name, 0) for name in AFTER)
    return run.get("status") == "done" and not more and not grows(args, run)


def grows(args: argparse.Namespace, run: dict) -> bool:
    """Whether more trials, or a larger budget, are wanted than a run has, by its run.json."""
    return any((getattr(args, name) or math.inf) > (run["arguments"].get(name) or math.inf) for name in ENDS)


def seconds_per_iteration(value: str) -> float:
    """The value of --seconds_per_iteration: a number, or the mean of an iterations.csv. Raises BadInput."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = mean_iteration_seconds(Path(value))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"--seconds_per_iteration {value}: neither a number nor the iterations.csv of a run ({error})"
            ) from None
    if not 0 < seconds < math.inf:
        raise BadInput(f"--seconds_per_iteration {value}: must be above 0")
    return seconds


if __name__ == "__main__":
    from hpo.errors import exit_on_bad_input

    sys.argv[0] = "raytune_bayesian.py"
    with exit_on_bad_input():
        args = parse("")
    if args.resume and nothing_to_do(args, json.loads((run_dir(args) / "run.json").read_text())):
        sys.exit(NOTHING_TO_DO)
