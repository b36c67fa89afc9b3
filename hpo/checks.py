"""What a user hands in, checked before anything is created: arguments, search space, ds_config, model, data.

Imports nothing slow, so that a wrong argument costs a few seconds. Every check raises BadInput with one line.
"""

import argparse
import csv
import importlib.util
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import safetensors
import torch
from ray.tune.search.sample import Categorical, Domain, Quantized

from hpo import errors
from hpo.squad import data

MODES_OF_USE = ("resume", "prefetch", "plan", "seconds_per_iteration")  # arguments that are not the search's
TRACKERS = {"none": None, "tensorboard": None, "mlflow": "mlflow-skinny", "wandb": "wandb"}  # --report_to: what to pip install
PRECISIONS = ("fp16", "bf16", "fp32")  # --precision
CLUSTER = ("NUM_WORKERS", "GPUS_PER_NODE", "CPUS_PER_NODE")  # in cluster.env


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong argument is one line and not the whole usage."""

    def error(self, message):
        raise errors.BadInput(message)


def check(args: argparse.Namespace, search_space: dict) -> tuple[dict, tuple | None]:
    """Checks all that needs no download and fills in defaults of `args`.

    Returns:
        The DeepSpeed configuration, and (training, validation) examples where the data set is a folder, else None.
    """
    args.run_name = args.run_name or f"bloom_bohb-{os.environ.get('SLURM_JOB_ID', time.strftime('%Y%m%d-%H%M%S'))}"
    if not re.fullmatch(r"[\w.-]+", args.run_name) or args.run_name in (".", ".."):
        raise errors.BadInput(f"--run_name {args.run_name}: letters, digits, '.', '_' and '-' only")
    check_search_space(search_space)
    try:
        if args.plan:
            check_values(args)
            # As on a GPU: what kind of GPU to ask for is a question of the plan, on whatever machine it is made.
            return read_ds_config(Path(args.deepspeed), max(1, args.gpus_per_trial), args.precision), None
        run_dir = Path(args.output_dir).absolute() / args.run_name
        # Slurm has started the job again, after its time limit or the loss of its node
        args.resume |= int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0 and (run_dir / "run.json").exists()
        if args.resume:
            load_arguments(args, run_dir, describe(search_space))
        elif not args.prefetch:
            check_output(run_dir)
        check_values(args)
        check_tracker(args.report_to)
        return check_files(args)
    except OSError as error:  # no permission, a loop of links, a name too long
        raise errors.BadInput(f"{error.filename}: {error.strerror}") from None


def check_values(args: argparse.Namespace) -> None:
    """The part of `check` that looks at numbers."""
    for name, least in {
        "max_t": 1, "reduction_factor": 2, "num_samples": 1, "cpus_per_trial": 1, "gpus_per_trial": 0,
        "max_concurrent_trials": 0, "max_train_samples": 1, "max_eval_samples": 1, "seed": 0,
    }.items():  # fmt: skip
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < least:
                raise errors.BadInput(f"--{name} {value}: must be at least {least}")
    if args.trial_timeout is not None and not 0 < args.trial_timeout < math.inf:
        raise errors.BadInput(f"--trial_timeout {args.trial_timeout}: must be above 0")
    if args.seed >= 2**32:
        raise errors.BadInput(f"--seed {args.seed}: must be below 2**32")
    if not 0 < args.num_train_epochs < math.inf:
        raise errors.BadInput(f"--num_train_epochs {args.num_train_epochs}: must be above 0")
    if not args.prefetch:  # on a login node
        check_resources(args)


def check_tracker(report_to: str) -> None:
    """Raises BadInput where the package of an experiment tracker is not installed."""
    package = TRACKERS[report_to]
    found = package and importlib.util.find_spec(report_to)
    if package and not (found and found.origin):  # without an origin it is only a folder of that name
        raise errors.BadInput(f"--report_to {report_to}: the package is missing: {sys.executable} -m pip install {package}")


def check_files(args: argparse.Namespace) -> tuple[dict, tuple | None]:
    """The part of `check` that looks at files."""
    for name in ("model", "dataset"):
        value = getattr(args, name)
        if not Path(value).is_dir() and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", value):
            raise errors.BadInput(f"--{name} {value}: neither a folder nor the name of a repository on the hub")
    if Path(args.model).is_dir():
        check_model_folder(Path(args.model))
    ds_config = read_ds_config(Path(args.deepspeed), args.gpus_per_trial or 0, args.precision)
    return ds_config, load_examples(args.dataset) if Path(args.dataset).is_dir() else None


def machines() -> tuple[int, int, int]:
    """(nodes, GPUs a node, CPUs a node) for trials: this machine, or on a cluster what cluster.env says."""
    if "RAY_ADDRESS" in os.environ:
        return tuple(int(os.environ.get(name, 1)) for name in CLUSTER)
    return 1, torch.cuda.device_count(), len(os.sched_getaffinity(0))


def check_resources(args: argparse.Namespace) -> None:
    """GPUs and CPUs a trial; the default is one GPU, or none where there are none."""
    where = "a worker node (cluster.env)" if "RAY_ADDRESS" in os.environ else "this machine"
    _, gpus, cpus = machines()
    if args.gpus_per_trial is None:
        args.gpus_per_trial = min(1, gpus)
    args.precision = args.precision or ("fp16" if args.gpus_per_trial else "fp32")
    for name, have in {"gpus_per_trial": gpus, "cpus_per_trial": cpus}.items():
        if getattr(args, name) > have:
            raise errors.BadInput(f"--{name} {getattr(args, name)}: {where} has {have}")


def use_cluster_env(folder: Path) -> None:
    """For a plan on a login node: the machines are those of cluster.env, when Slurm is here."""
    if shutil.which("sbatch") and (folder / "cluster.env").exists():
        script = 'set -a; source ./cluster.env > /dev/null; env -0'
        try:
            done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            raise errors.BadInput(f"{folder}/cluster.env: not done after 60 s") from None
        found = dict(line.split("=", 1) for line in done.stdout.split("\0") if "=" in line)
        for name in CLUSTER:
            if not re.fullmatch(r"\d+", found.get(name, "")):
                raise errors.BadInput(f"{folder}/cluster.env: {name} is {found.get(name, 'missing')}: not a number")
        os.environ.update({name: found[name] for name in CLUSTER}, RAY_ADDRESS="none: this is a plan")


def slots(args: argparse.Namespace) -> int:
    """How many trials can run at a time: on a cluster once all workers are in."""
    nodes, gpus, cpus = machines()
    room = nodes * min(cpus // args.cpus_per_trial, gpus // args.gpus_per_trial if args.gpus_per_trial else cpus)
    return min(room, args.max_concurrent_trials or room)


def check_search_space(space: dict) -> None:
    """Raises BadInput where nothing can be drawn from a domain, or the train function misses a hyperparameter."""
    searched = space.get("train_loop_config", {})
    for name in ("lr", "per_device_bs", "wd"):
        if name not in searched:
            raise errors.BadInput(f"search space: {name} is missing from train_loop_config")
    for name, domain in searched.items():
        if isinstance(domain, dict):  # tune.grid_search
            raise errors.BadInput(f"search space: {name}: BOHB draws from a domain such as tune.choice or tune.loguniform")
        if isinstance(getattr(domain, "sampler", None), Quantized):
            raise errors.BadInput(f"search space: {name}: BOHB cannot keep to the steps of a quantized domain")
        if isinstance(domain, Categorical) and not domain.categories:
            raise errors.BadInput(f"search space: {name} has nothing to choose from")
        if hasattr(domain, "lower") and not domain.lower < domain.upper:
            raise errors.BadInput(f"search space: {name}: lower {domain.lower} is not below upper {domain.upper}")
    if not any(isinstance(domain, Domain) for domain in searched.values()):
        raise errors.BadInput("search space: there is nothing to search")


def grid_size(space: dict) -> int:
    """Trials of a full grid: all choices, ten values of each range."""
    domains = [domain for domain in space["train_loop_config"].values() if isinstance(domain, Domain)]
    return math.prod(len(domain.categories) if isinstance(domain, Categorical) else 10 for domain in domains)


def largest(domain) -> float:
    """The largest value of a domain, or the value itself where it is fixed."""
    return max(getattr(domain, "categories", None) or [getattr(domain, "upper", domain)])


def smallest(domain) -> float:
    """The smallest value of a domain, or the value itself where it is fixed."""
    return min(getattr(domain, "categories", None) or [getattr(domain, "lower", domain)])


def read_ds_config(path: Path, gpus_per_trial: int, precision: str | None) -> dict:
    """The DeepSpeed configuration of a file. The kind of mixed precision is not its business, see precision.py."""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise errors.BadInput(f"--deepspeed {path}: {error}") from None
    if not isinstance(config, dict):
        raise errors.BadInput(f"--deepspeed {path}: not a JSON object")
    for key in ("optimizer", "scheduler"):  # torch's AdamW with each trial's lr and weight decay, nothing to compile
        if key in config:
            raise errors.BadInput(f"--deepspeed {path}: remove {key!r}: it is made from each trial's lr and weight decay")
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if config.setdefault(key, "auto") != "auto":
            raise errors.BadInput(f'--deepspeed {path}: {key} must be "auto": the batch size is searched')
    for key in ("zero_optimization", "fp16", "bf16"):
        if not isinstance(config.get(key, {}), dict):
            raise errors.BadInput(f"--deepspeed {path}: {key} is not a JSON object")
        if key != "zero_optimization" and config.setdefault(key, {}).setdefault("enabled", "auto") != "auto":
            raise errors.BadInput(f'--deepspeed {path}: {key}: enabled must be "auto": --precision decides')
    if "torch_autocast" in config:
        raise errors.BadInput(f"--deepspeed {path}: remove 'torch_autocast': --precision decides, and stage 0 has it")
    clip = config.setdefault("gradient_clipping", "auto")
    if clip != "auto" and (type(clip) not in (int, float) or not 0 < clip < math.inf):
        raise errors.BadInput(f'--deepspeed {path}: gradient_clipping {clip!r}: must be "auto" or above 0')
    for key, least in {"loss_scale": 0, "initial_scale_power": 0, "loss_scale_window": 1, "min_loss_scale": 1}.items():
        value = config.get("fp16", {}).get(key, least)
        if type(value) not in (int, float) or not least <= value < 2**32:
            raise errors.BadInput(f"--deepspeed {path}: fp16: {key} {value!r}: must be a number from {least} on")
    if any(key.startswith(("offload", "cpu_offload")) for key in config.get("zero_optimization", {})):
        raise errors.BadInput(f"--deepspeed {path}: offload is not supported: it needs an optimizer that DeepSpeed compiles")
    stage = config.setdefault("zero_optimization", {}).setdefault("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise errors.BadInput(f"--deepspeed {path}: zero_optimization: stage {stage!r} is none of 0, 1, 2, 3")
    if stage and precision == "fp16" and not gpus_per_trial:
        raise errors.BadInput(f"--deepspeed {path}: DeepSpeed has no fp16 on a CPU at ZeRO stage {stage}: --precision fp32, or stage 0")
    if stage == 3:
        if gpus_per_trial < 2:
            raise errors.BadInput(f"--deepspeed {path}: stage 3 splits a model over GPUs, and a trial has one: use stage 0 to 2, or --gpus_per_trial")
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True  # or a checkpoint has no weights to load
    return config


def check_model_folder(path: Path) -> None:
    """Raises BadInput unless a folder looks like what save_pretrained leaves, tokenizer included."""
    try:
        assert json.loads((path / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise errors.BadInput(f"--model {path}: no config.json with a model_type in this folder") from None
    if not [*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin")]:
        raise errors.BadInput(f"--model {path}: no weights (*.safetensors) in this folder")
    if not (path / "tokenizer_config.json").exists():
        raise errors.BadInput(f"--model {path}: no tokenizer_config.json in this folder")
    try:
        parameters(path)
    except Exception as error:  # SafetensorError is none of the usual kinds
        raise errors.BadInput(f"--model {path}: weights that cannot be read: {error}") from None


def parameters(folder: Path) -> int:
    """How many parameters a model folder's weights have."""
    count = 0
    for file in folder.glob("*.safetensors"):
        with safetensors.safe_open(file, framework="pt") as weights:
            count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())
    return count or sum(file.stat().st_size for file in folder.glob("pytorch_model*.bin")) // 2


def check_disk(output_dir: Path, needed: int) -> None:
    """Raises BadInput when there is less free than the run needs at its peak, in bytes."""
    free = shutil.disk_usage(next(p for p in (output_dir, *output_dir.parents) if p.exists())).free
    if free < needed:
        raise errors.BadInput(f"--output_dir {output_dir}: the run needs up to {needed / 1e9:.3g} GB there, and {free / 1e9:.3g} GB are free")


def seconds_per_iteration(value: str) -> float:
    """The value of --seconds_per_iteration: a number, or the file iterations.csv of an earlier run, whose mean it is."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            with open(value, newline="") as file:
                seconds = statistics.mean(float(row["ended_at"]) - float(row["started_at"]) for row in csv.DictReader(file))
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:  # StatisticsError is a ValueError
            raise errors.BadInput(f"--seconds_per_iteration {value}: neither a number nor the iterations.csv of a run ({error})") from None
    if not 0 < seconds < math.inf:
        raise errors.BadInput(f"--seconds_per_iteration {value}: must be above 0")
    return seconds


def seconds_of(limit: str) -> int | None:
    """Seconds of a time limit as Slurm writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    if not re.fullmatch(r"(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2})", limit):
        return None
    days, _, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        hours, minutes, seconds = (parts + [0, 0])[:3]
    else:
        hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def time_limit(folder: Path) -> int | None:
    """Seconds of the head job's time limit, as far as it is known before the job: SBATCH_TIMELIMIT, or #SBATCH --time."""
    script = folder / "head_node.slurm"
    written = re.search(r"^#SBATCH (?:--time=|-t )(\S+)", script.read_text() if script.exists() else "", re.MULTILINE)
    return seconds_of(os.environ.get("SBATCH_TIMELIMIT", written.group(1) if written else ""))


def describe(space: dict) -> dict[str, str]:
    """The search space as text."""

    def text(domain) -> str:
        if isinstance(domain, Categorical):
            return f"choice{domain.domain_str}"
        return f"{domain.sampler or ''}{domain.domain_str}" if isinstance(domain, Domain) else repr(domain)

    return {name: text(domain) for name, domain in space["train_loop_config"].items()}


def load_arguments(args: argparse.Namespace, run_dir: Path, space: dict[str, str]) -> None:
    """With --resume: takes the arguments of the run; those given again, and the search space, must be the same."""
    try:
        run = json.loads((run_dir / "run.json").read_text())
        older = {"report_to": "tensorboard", "precision": "fp32"}  # runs that had no choice: their folders are read, their state is not
        earlier, earlier_space = older | run["arguments"], dict(run["search_space"])
        for name, value in vars(args).items():
            if name not in ("given", "run_name", *MODES_OF_USE):
                kind = (int, float, type(None)) if value is None else (int, float) if isinstance(value, float) else type(value)
                if not (earlier[name] in PRECISIONS if name == "precision" else isinstance(earlier[name], kind)):
                    raise ValueError(name)
    except (OSError, ValueError, KeyError, TypeError):
        raise errors.BadInput(f"--resume: {run_dir} is not the folder of a run: --run_name and --output_dir say which") from None
    earlier = {name: value for name, value in earlier.items() if name not in ("run_name", "output_dir")}  # say which run
    kept = args.trial_timeout if "trial_timeout" in args.given else earlier["trial_timeout"]  # may have been what went wrong
    earlier.pop("trial_timeout")
    given = {name: getattr(args, name) for name in sorted(args.given & set(earlier))}
    other = [f"--{name} {value} (the run has {earlier[name]})" for name, value in given.items() if value != earlier[name]]
    if other:
        raise errors.BadInput(f"--resume: other arguments than the run's: {', '.join(other)}")
    for name in space | earlier_space:
        if space.get(name) != earlier_space.get(name):
            raise errors.BadInput(f"--resume: search space: {name} is {space.get(name)} now, and {earlier_space.get(name)} in the run")
    for name, value in (earlier | {"trial_timeout": kept}).items():
        setattr(args, name, value)


def check_output(run_dir: Path) -> None:
    """Raises BadInput where the run's folder exists or could not be made."""
    if run_dir.exists():
        raise errors.BadInput(f"--run_name {run_dir.name}: {run_dir} exists already, and nothing there is overwritten")
    parent = next(p for p in run_dir.parents if p.exists())
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise errors.BadInput(f"--output_dir {run_dir.parent}: cannot be written: {error.strerror}") from None


def load_examples(dataset: str, download: bool = False) -> tuple[list[dict], list[dict]]:
    """The training and the validation questions of a folder, or of a repository on the hub with parquet files."""
    try:
        if Path(dataset).is_dir():
            files = data.find_squad_files(Path(dataset))
            return data.read_squad(files["train"]), data.read_squad(files["validation"])
        import datasets

        folder = hub_snapshot(dataset, "dataset", ["*.parquet"], download)
        files = {split: sorted(map(str, folder.rglob(f"{split}*.parquet"))) for split in ("train", "validation")}
        loaded = {split: list(data) for split, data in datasets.load_dataset("parquet", data_files=files).items()}
        for split, examples in loaded.items():
            data.check_examples(examples, f"{dataset}, {split}")
        return loaded["train"], loaded["validation"]
    except ValueError as error:
        raise errors.BadInput(f"--dataset {error}") from None


def hub_snapshot(name: str, repo_type: str, patterns: list[str], download: bool) -> Path:
    """Folder with the files of a hub repository: from the cache without asking the network, unless `download` is set.

    A cache may hold a part only, and does not know it: then `download` completes it.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    what = {"repo_id": name, "repo_type": repo_type, "allow_patterns": patterns}
    if not download:
        try:
            return Path(huggingface_hub.snapshot_download(**what, local_files_only=True))
        except LocalEntryNotFoundError:
            pass
    try:
        return Path(huggingface_hub.snapshot_download(**what))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = errors.one_line(error, 200)
        raise errors.BadInput(
            f"--{repo_type} {name}: neither a folder nor in the cache, and the hub does not give it; "
            f"run with --prefetch where there is a network ({reason})"
        ) from None


def local_model(model: str) -> Path | None:
    """The model's folder if it is on this machine; asks no network. Raises BadInput where it is no model."""
    if Path(model).is_dir():
        check_model_folder(Path(model))
        return Path(model)
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(model, local_files_only=True))
    except (OSError, ValueError):
        return None


def model_folder(model: str, download: bool = False) -> Path:
    """Folder with configuration, weights and tokenizer of a model."""
    if Path(model).is_dir():
        return Path(model).absolute()
    folder = hub_snapshot(model, "model", ["*.json", "*.safetensors", "*.model", "*.txt"], download)
    try:
        check_model_folder(folder)
    except errors.BadInput as error:
        raise errors.BadInput(f"--model {model}: {str(error).split(': ', 1)[1]}; run with --prefetch where there is a network") from None
    return folder
