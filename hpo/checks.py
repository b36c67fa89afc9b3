"""Checks of what the user hands in that need files or the machine. All raise BadInput with one line.

Imports nothing slow at its top: bad input is refused before the slow imports of the script.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import math
import sys
import tempfile
from pathlib import Path

from hpo import arguments, code_copy, errors, machines
from hpo.errors import BadInput
from hpo.squad import loading

TESTED_WITH = "2.60.0"  # Ray; hpo/cluster/ray_private.py depends on its private parts
OFFLOAD = ("offload", "cpu_offload")  # how the names of DeepSpeed's settings for it begin


def arguments_of_program(description: str) -> argparse.Namespace:
    """The arguments of the command line, checked. Bad input ends the program: one line, and exit code 2.

    Switches the garbage collector off, which saves a second: the imports that follow leave no garbage.
    exits.exit_codes switches it on again.

    Args:
        description: its first line is for --help.
    """
    gc.disable()
    with errors.exit_on_bad_input():
        return check(arguments.parse(description.split("\n")[0]))


def check(args: argparse.Namespace) -> argparse.Namespace:
    """Checks model, data, ds_config, output folder and tracker.

    Sets args.ds_config, and the defaults of --gpus_per_trial and --precision, which depend on the machine.

    With --resume, if the run has other code, this first restarts the program with that code and does not return.

    Returns:
        The arguments.
    """
    try:
        if args.resume and not args.new_code:
            code_copy.go_on_with_copy(arguments.run_dir(args))
        warn_of_other_ray()
        if not args.prefetch:  # it runs on a login node
            check_resources(args)
        args.ds_config = read_ds_config(args)
        if not args.plan:
            check_tracker(args.report_to)
            if not args.resume and not args.prefetch and not arguments.starts_check_again(args):
                check_output(arguments.run_dir(args))
            check_names(args)
    except OSError as error:  # no permission, a loop of links, a name too long
        raise BadInput(f"{error.filename}: {error.strerror}") from None
    return args


def warn_of_other_ray() -> None:
    """Prints a warning where another Ray is installed than this program was tested with."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # the import of Ray will tell
        if (installed := importlib.metadata.version("ray")) != TESTED_WITH:
            print(f"WARNING: Ray {installed} is installed; this program was tested with Ray {TESTED_WITH}", flush=True)


def check_resources(args: argparse.Namespace) -> None:
    """GPUs and CPUs of a trial. The default is one GPU, or none where there are none.

    Those of --from_check have run on its nodes: this machine may have fewer.
    """
    if args.from_check is not None:
        return
    where = "a node for trials (see cluster.env, or the options of sbatch)" if args.cluster else "this machine"
    cpus = machines.node_cpus(args)
    if args.cpus_per_trial > cpus:  # first: to look for GPUs is slow
        raise BadInput(f"--cpus_per_trial {args.cpus_per_trial}: {where} has {cpus}")
    gpus = machines.nodes(args)[1]
    if args.gpus_per_trial is None:
        args.gpus_per_trial = min(1, gpus)
    args.precision = args.precision or ("fp16" if args.gpus_per_trial else "fp32")
    if args.gpus_per_trial > gpus:
        raise BadInput(f"--gpus_per_trial {args.gpus_per_trial}: {where} has {gpus}")


def check_tracker(report_to: str) -> None:
    """The package of the experiment tracker is installed."""
    package = arguments.TRACKER_PACKAGES[report_to]
    module = "tensorboardX" if report_to == "tensorboard" else report_to
    found = package and importlib.util.find_spec(module)
    if package and not (found and found.origin):  # without an origin it is only a folder of that name
        raise BadInput(f"--report_to {report_to}: the package is missing: {sys.executable} -m pip install {package}")


def check_output(run_dir: Path) -> None:
    """The run folder does not exist, and can be made."""
    if run_dir.exists():
        raise BadInput(f"--run_name {run_dir.name}: {run_dir} exists already, and nothing there is overwritten")
    parent = next(p for p in run_dir.parents if p.exists())
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise BadInput(f"--output_dir {run_dir.parent}: cannot be written: {error.strerror}") from None


def check_names(args: argparse.Namespace) -> None:
    """Model and data set are folders with the right content, or can be names on the hub."""
    for name in ("model", "dataset"):
        value = getattr(args, name)
        if not Path(value).is_dir():
            from huggingface_hub.utils import HFValidationError, validate_repo_id  # imported late: takes 0.3 s

            try:
                validate_repo_id(value)
            except HFValidationError:
                raise BadInput(f"--{name} {value}: neither a folder nor the name of a repository on the hub") from None
    if Path(args.model).is_dir():
        loading.check_model_folder(Path(args.model))
    if Path(args.dataset).is_dir():
        # as the script calls it, which then finds it in the cache
        loading.load_examples(args.dataset, args.prefetch, args.drop_bad_answers)


def replace_settings(config: dict) -> list[str]:
    """Replaces what the search decides in a DeepSpeed configuration, in place. Returns a line for each setting."""
    lines = []

    def replace(settings: dict, name: str, key: str, by: str):
        if settings.get(key, "auto") != "auto":
            lines.append(f"{name} {json.dumps(settings[key])} is replaced by {by}")

    for key, by in {
        "optimizer": "torch's AdamW with each trial's lr and wd",  # nothing has to be compiled
        "scheduler": "the Trainer's schedule, linear from each trial's lr to 0 if it is not searched",
    }.items():
        replace(config, key, key, by)
        config.pop(key, None)
    for key, by in {
        "train_batch_size": "that of each trial",
        "train_micro_batch_size_per_gpu": "each trial's per_device_bs",
        "gradient_accumulation_steps": "--gradient_accumulation_steps",
    }.items():
        replace(config, key, key, by)
        config[key] = "auto"
    for key in ("fp16", "bf16"):
        replace(config.setdefault(key, {}), f"{key}: enabled", "enabled", "--precision")
        config[key]["enabled"] = "auto"
    zero = config.get("zero_optimization", {})
    for key in [key for key in zero if key.startswith(OFFLOAD)]:  # in many files, as a place to switch it on
        off = not zero[key] or (isinstance(zero[key], dict) and zero[key].get("device", "none") == "none")
        if off or key == "cpu_offload_use_pin_memory":
            del zero[key]
    return lines


def read_ds_config(args: argparse.Namespace) -> dict:
    """The DeepSpeed configuration of --deepspeed, with "auto" where the search or a flag decides.

    Prints a line for each setting that is replaced. --plan assumes a GPU, because it says which GPU to ask for. The
    machine where it runs may have none.
    """
    path = Path(args.deepspeed)
    if args.resume and not args.new_code:
        path = code_copy.ds_config(arguments.run_dir(args), args.deepspeed)
    gpus = max(1, args.gpus_per_trial or 0) if args.plan else args.gpus_per_trial or 0

    def refuse(what: str):
        raise BadInput(f"--deepspeed {path}: {what}") from None

    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        refuse(str(error))
    if not isinstance(config, dict):
        refuse("not a JSON object")
    for key in ("zero_optimization", "fp16", "bf16"):
        if not isinstance(config.get(key, {}), dict):
            refuse(f"{key} is not a JSON object")
    for line in replace_settings(config):
        print(f"--deepspeed {path}: {line}")
    if "torch_autocast" in config:
        refuse("remove 'torch_autocast': --precision decides, and stage 0 has it")
    clip = config.setdefault("gradient_clipping", "auto")
    if clip != "auto" and (type(clip) not in (int, float) or not 0 < clip < math.inf):
        refuse(f'gradient_clipping {clip!r}: must be "auto" or above 0')
    for key, least in {"loss_scale": 0, "initial_scale_power": 0, "loss_scale_window": 1, "min_loss_scale": 1}.items():
        value = config.get("fp16", {}).get(key, least)
        if type(value) not in (int, float) or not least <= value < 2**32:
            refuse(f"fp16: {key} {value!r}: must be a number from {least} on")
    if any(key.startswith(OFFLOAD) for key in config.get("zero_optimization", {})):
        refuse("offload is not supported: it needs an optimizer that DeepSpeed compiles")
    stage = config.setdefault("zero_optimization", {}).setdefault("stage", 0)
    if stage not in (0, 1, 2, 3):
        refuse(f"zero_optimization: stage {stage!r} is none of 0, 1, 2, 3")
    if stage and args.precision == "fp16" and not gpus:
        refuse(f"DeepSpeed has no fp16 on a CPU at ZeRO stage {stage}: --precision fp32, or stage 0")
    if stage == 3:
        if gpus < 2:
            refuse("stage 3 splits a model over GPUs, and a trial has one: use stage 0 to 2, or --gpus_per_trial")
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True  # a checkpoint needs weights
    return config
