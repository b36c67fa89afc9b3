"""Checks a search space of Ray Tune, and answers questions about its values."""

import ast
import json
import math
import sys
import sysconfig
from itertools import product
from numbers import Integral, Real
from pathlib import Path
from types import ModuleType

import numpy as np
from ray.tune.search.sample import Categorical, Domain, Function, Integer, LogUniform, Normal, Quantized
from ray.tune.search.variant_generator import parse_spec_vars

from hpo.bohb import steps
from hpo.errors import BadInput, one_line
from hpo.results.tables import ITERATION_FIELDS, KNOWN_SETTING, TRIAL_FIELDS


def is_number(value) -> bool:
    """Whether a value is a finite number, and not True or False."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value) -> bool:
    """Whether a value is an int, and not True or False."""
    return isinstance(value, Integral) and not isinstance(value, bool)


# What the values of a hyperparameter must be: torch or the Trainer refuse others, in each trial.
FROM_0 = (lambda v: is_number(v) and v >= 0, "a number from 0 on")
ABOVE_0 = (lambda v: is_number(v) and v > 0, "a number above 0")
BELOW_1 = (lambda v: is_number(v) and 0 <= v < 1, "a number from 0 to below 1")
WHOLE = (lambda v: is_whole(v) and v >= 1, "a whole number from 1 on")
REQUIRED = {"lr": FROM_0, "per_device_bs": WHOLE, "wd": FROM_0}
# Fields of transformers.TrainingArguments that `training_arguments` passes on: a choice. Each has a test that shows its
# effect. Other fields can have one too, such as neftune_noise_alpha, if make_trainer passes them on.
PASSED_ON = {
    "warmup_steps": FROM_0,  # below 1: a share of all steps
    "lr_scheduler_type": (lambda v: isinstance(v, str), "the name of a schedule"),
    "lr_scheduler_kwargs": (lambda v: isinstance(v, dict), "a dictionary"),
    "max_grad_norm": ABOVE_0,
    "adam_beta1": BELOW_1,
    "adam_beta2": BELOW_1,
    "adam_epsilon": ABOVE_0,
    "gradient_accumulation_steps": WHOLE,
}
# Where code of a user reads a hyperparameter from. A dictionary of another name, such as ds_config, has none.
READ_FROM = {"hyperparameters", "hparams", "hp", "params", "config", "cfg", "searched"}  # as in docs/bohb.md
LORA = {"lora_r": WHOLE, "lora_alpha": ABOVE_0}  # read in hpo/squad/lora.py
HYPERPARAMETERS = REQUIRED | PASSED_ON | LORA
WIDER = 5  # a logarithmic range is made wider by this factor, if the best trials crowd at its edge
FLAGS = ("gradient_accumulation_steps", *LORA)  # a flag says the value where it is not searched
INSTEAD = {  # names that a user may try, and what has the effect
    "learning_rate": "lr",
    "weight_decay": "wd",
    "batch_size": "per_device_bs",
    "per_device_train_batch_size": "per_device_bs",
    "warmup_ratio": "warmup_steps: below 1, it is a share of all steps",
    "gradient_clipping": "max_grad_norm",
    "betas": "adam_beta1 and adam_beta2",
    "epochs": "--num_train_epochs",
    "max_steps": "--num_train_epochs",
    "data_seed": "--seed",
    "fp16": "--precision",
    "bf16": "--precision",
    "gradient_checkpointing": "--gradient_checkpointing",
    "activation_checkpointing": "--gradient_checkpointing",
    "lora_target_modules": "--lora_target_modules",
    **{name: f"--{name}" for name in ("num_train_epochs", "seed", "deepspeed", "output_dir", "run_name", "report_to")},
}


def check(space: dict, train, ds_config: dict) -> None:
    """Raises BadInput where a trial would fail, or a hyperparameter would have no effect.

    Args:
        space: the search space, {"train_loop_config": domains and fixed values by name}.
        train: what each trial runs.
        ds_config: the DeepSpeed configuration.
    """
    searched = space.get("train_loop_config")
    if not isinstance(searched, dict) or len(space) > 1:
        raise BadInput("search space: it is a dictionary, train_loop_config, and nothing beside it")
    for name in REQUIRED:
        if name not in searched:
            raise BadInput(f"search space: {name} is missing from train_loop_config")
    for name, domain in searched.items():
        fault = fault_of(name, domain)
        if fault:
            raise BadInput(f"search space: {name}: {fault}")
    if not any(isinstance(domain, Domain) for domain in searched.values()):
        raise BadInput("search space: there is nothing to search")
    check_read(searched, train)
    if "max_grad_norm" in searched and ds_config.get("gradient_clipping", "auto") != "auto":
        raise BadInput('search space: max_grad_norm: set gradient_clipping to "auto" in the file of --deepspeed')
    check_schedule(searched)

    from hpo.bohb.searcher import convert  # imported late, so that most faults are told early

    try:
        convert(space)
    except (ValueError, TypeError, OverflowError) as error:
        raise BadInput(f"search space: BOHB cannot use it: {one_line(error)}") from None


def check_flags(space: dict, args) -> None:
    """Raises BadInput where a flag and a hyperparameter contradict each other, or one has no effect.

    Args:
        space: the search space.
        args: the arguments of the program.
    """
    searched = space["train_loop_config"]
    for name in FLAGS:
        if name in searched and name in args.given:
            raise BadInput(f"--{name} {getattr(args, name)}: the search space has {name} too: remove one of them")
    if not args.lora_r and "lora_r" not in searched:
        if "lora_alpha" in searched:
            raise BadInput("search space: lora_alpha: no adapters: use --lora_r, or add lora_r to the search space")
        for name in ("lora_alpha", "lora_target_modules"):
            if getattr(args, name):
                what = "no adapters: use --lora_r, or add lora_r to the search space"
                raise BadInput(f"--{name} {getattr(args, name)}: {what}")


def fault_of(name: str, domain) -> str | None:
    """What is wrong with a hyperparameter, in words; None where nothing is."""
    if not isinstance(name, str) or not name.isidentifier():
        return "a name has letters, digits and '_' only, and begins with a letter"
    if name in (*TRIAL_FIELDS, *ITERATION_FIELDS, KNOWN_SETTING):
        return f"use {INSTEAD[name]}" if name in INSTEAD else "the tables have another column of this name"
    if not isinstance(domain, Domain):
        if isinstance(domain, dict) and "grid_search" in domain:
            return "BOHB draws from a domain such as tune.choice or tune.loguniform"
        if any(parse_spec_vars({name: domain})[1:]):
            return "a domain inside a dictionary or a list: make it a hyperparameter of its own"
    elif isinstance(domain, Categorical):
        if domain.is_grid():
            return "BOHB draws from a domain such as tune.choice or tune.loguniform"
        if not domain.categories:
            return "there is nothing to choose from"
    else:
        fault = fault_of_range(domain)
        if fault:
            return fault
    wanted = HYPERPARAMETERS.get(name)
    for value in values(domain):
        if wanted and not wanted[0](value):
            return f"{value!r} is not {wanted[1]}"
        try:
            json.dumps(value.item() if isinstance(value, np.generic) else value, allow_nan=False)
        except (TypeError, ValueError):
            return f"{value!r} cannot be written as JSON: use numbers, texts, lists or dictionaries"
    if isinstance(domain, Categorical):
        if any(value in domain.categories[:i] for i, value in enumerate(domain.categories)):  # True is 1, too
            return f"a value is there twice in {domain.domain_str}"
    elif wanted is WHOLE and not isinstance(domain, Integer | Integral):
        return "it draws fractions: use tune.choice, tune.randint or tune.qrandint"
    return None


def fault_of_range(domain: Domain) -> str | None:
    """What is wrong with a range, in words; None where nothing is."""
    if isinstance(domain, Function):
        return "BOHB cannot learn from tune.sample_from: use a range or tune.choice"
    sampler, ends = domain.get_sampler(), (domain.lower, domain.upper)
    kind = getattr(sampler, "sampler", sampler)
    if isinstance(kind, Normal):
        if not all(map(is_number, ends)) or isinstance(sampler, Quantized):
            return "BOHB needs bounds, and a normal distribution has none: use tune.uniform or tune.loguniform"
    if not all(map(is_whole if isinstance(domain, Integer) else is_number, ends)):
        return f"the bounds {domain.domain_str} are not {'whole' if isinstance(domain, Integer) else 'finite'} numbers"
    if not domain.lower < domain.upper:
        return f"lower {domain.lower} is not below upper {domain.upper}"
    if isinstance(kind, LogUniform) and domain.lower <= 0:
        return f"lower {domain.lower} of a logarithmic range must be above 0"
    if isinstance(sampler, Quantized):
        q = sampler.q
        if not is_number(q) or q <= 0 or (isinstance(domain, Integer) and not is_whole(q)):
            return f"the step {q} is not a {'whole ' if isinstance(domain, Integer) else ''}number above 0"
        first, last = steps.first_and_last(domain)
        if last - first >= 2**53:
            return f"the step {q} is too small for the bounds {domain.domain_str}"
    count = number_of_values(domain)
    if count < 2:
        return f"{['no value', 'one value only'][max(count, 0)]} in {text(domain)}: write a fixed value instead"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# what the training does with it


def training_arguments(hyperparameters: dict) -> dict:
    """The hyperparameters of a trial that are fields of transformers.TrainingArguments, by name."""
    return {name: value for name, value in hyperparameters.items() if name in PASSED_ON}


def check_read(searched: dict, train) -> None:
    """Raises BadInput for a hyperparameter that is not passed on, and that the code of the user does not read."""
    from transformers import TrainingArguments  # the script has imported it already

    others = [name for name in searched if name not in HYPERPARAMETERS]
    unread = set(others) - names_read(train) if others else ()
    for name in others:
        if name in unread or name == "seed":  # it is read, for --repeats
            if name in INSTEAD:
                raise BadInput(f"search space: {name}: use {INSTEAD[name]}")
            field = name in TrainingArguments.__dataclass_fields__
            what = "this field of TrainingArguments is not passed on" if field else "the training does not read it"
            raise BadInput(f'search space: {name}: {what}: use hyperparameters["{name}"] in make_trainer, or remove it')


def names_read(train) -> set[str]:
    """The hyperparameters that functions read, by name: see `names_read_by`.

    These are the functions in the module of `train`, and in the user's modules that it imports.
    """
    modules, names = [sys.modules[train.__module__]], set()
    for module in modules:  # which grows
        for node in ast.walk(ast.parse(Path(module.__file__).read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                names |= names_read_by(node)
        for value in vars(module).values():
            name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            other = sys.modules.get(name) if isinstance(name, str) else None
            if other and other not in modules and is_of_user(other):
                modules.append(other)
    return names - {"train_loop_config", "rungs"}  # what a `config` has besides


def names_read_by(function: ast.AST) -> set[str]:
    """The texts that a function looks up in hyperparameters: x["name"], x.get("name"), "name" in x.

    x is an expression with one of READ_FROM, such as `hyperparameters` or `config["train_loop_config"]`. A variable
    instead of a text stands for all texts that the function lets it run over: for name in ("name", "other").
    """
    keys, texts = [], {}
    for node in ast.walk(function):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            source, key = node.value, node.slice
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) in ("get", "pop") and node.args:
            source, key = node.func.value, node.args[0]
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            source, key = node.comparators[0], node.left
        else:
            if isinstance(node, ast.For | ast.comprehension) and isinstance(node.target, ast.Name):
                texts.setdefault(node.target.id, []).extend(getattr(node.iter, "elts", []))
            continue
        if READ_FROM & {getattr(n, "id", getattr(n, "attr", None)) for n in ast.walk(source)}:
            keys.append(key)
    keys += [text for key in keys if isinstance(key, ast.Name) for text in texts.get(key.id, [])]
    return {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def is_of_user(module: ModuleType) -> bool:
    """Whether a module is neither of this package nor installed."""
    file = getattr(module, "__file__", None) or ""
    installed = file.startswith(sysconfig.get_path("stdlib")) or "-packages/" in file
    return file.endswith(".py") and not installed and module.__name__.partition(".")[0] != "hpo"


def check_schedule(searched: dict) -> None:
    """Raises BadInput where a schedule of the learning rate cannot be made, or ignores what is searched."""
    if "lr_scheduler_type" not in searched:
        if "lr_scheduler_kwargs" in searched:
            raise BadInput("search space: lr_scheduler_kwargs: add lr_scheduler_type, whose arguments these are")
        return
    import torch
    from transformers import SchedulerType, get_scheduler

    types = values(searched["lr_scheduler_type"])
    known = {kind.value for kind in SchedulerType} - {"reduce_lr_on_plateau", "greedy"}  # they need a metric each step
    for kind in types:
        if kind not in known:
            raise BadInput(f"search space: lr_scheduler_type: {kind!r} is none of {', '.join(sorted(known))}")
    for name, ignored_by in {
        "warmup_steps": {"constant"},
        "lr_scheduler_kwargs": {"constant", "constant_with_warmup"},
    }.items():
        if name in searched and ignored_by.issuperset(types):
            raise BadInput(f"search space: {name}: the schedule {types[0]!r} does not use it")
    for kind, kwargs in product(types, values(searched.get("lr_scheduler_kwargs", {}))):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=float(smallest(searched["lr"])))
        try:
            schedule = get_scheduler(kind, optimizer, 2, 10, scheduler_specific_kwargs=kwargs)
            for _ in range(10):
                optimizer.step()
                schedule.step()
        except Exception as error:
            of = f"lr_scheduler_type {kind!r} with lr_scheduler_kwargs {kwargs}"
            raise BadInput(f"search space: {of}: {one_line(error)}") from None


# ---------------------------------------------------------------------------------------------------------------------
# the values of a domain


def values(domain) -> list:
    """All choices of a domain, the two ends of a range, or the value itself where it is fixed."""
    if isinstance(domain, Categorical):
        return domain.categories
    if steps.is_quantized(domain):
        return [steps.value(domain, index) for index in steps.first_and_last(domain)]
    if isinstance(domain, Domain):
        return [domain.lower, domain.upper - isinstance(domain, Integer)]  # Tune leaves the upper integer out
    return [domain]


def as_json(value):
    """A value as it is read back from JSON, which has lists for tuples. Other values stay as they are."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return value


def value_of(domain, value):
    """A value as a domain has it, such as 0.0 for 0, or a tuple for a list, which JSON makes of it.

    Raises:
        ValueError: the domain has no such value.
    """
    if isinstance(domain, Categorical) or not isinstance(domain, Domain):
        for choice in values(domain):
            equal = choice == value or (isinstance(choice, list | tuple | dict) and as_json(choice) == as_json(value))
            if equal and isinstance(choice, bool) == isinstance(value, bool):  # True is 1, too
                return choice.item() if isinstance(choice, np.generic) else choice
    elif is_number(value):
        least, most = values(domain)
        if steps.is_quantized(domain):
            found = steps.value(domain, steps.index(domain, min(max(value, least), most)))
            if math.isclose(found, value, rel_tol=1e-9):
                return found
        elif least <= value <= most and (value == int(value) or not isinstance(domain, Integer)):
            return int(value) if isinstance(domain, Integer) else float(value)
    raise ValueError(f"{value!r} is not {'in ' * isinstance(domain, Domain)}{text(domain)}")


def setting_of(space: dict, setting: dict) -> dict:
    """The values of a setting for all hyperparameters that are searched, as their domains have them.

    A fixed value of the search space may be in the setting too, for example if it is copied from best_result.json.

    Raises:
        ValueError: a hyperparameter is missing, is not in the search space, or has a value that is not.
    """
    searched, found = space["train_loop_config"], {}
    for name in [*searched, *setting]:
        if name not in searched:
            raise ValueError(f"{name} is not in the search space")
        if name not in setting:
            if isinstance(searched[name], Domain):
                raise ValueError(f"{name} is missing")
            continue
        try:
            value = value_of(searched[name], setting[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if isinstance(searched[name], Domain):
            found[name] = value
    return found


def as_searched(space: dict, config: dict) -> dict:
    """The train_loop_config of a trial with the values of its search space, where it was read from JSON."""
    return config | {n: space["train_loop_config"][n] for n in config} | setting_of(space, config)


def largest(domain) -> float:
    """The largest value of a domain, or the value itself where it is fixed."""
    return max(values(domain))


def smallest(domain) -> float:
    """The smallest value of a domain, or the value itself where it is fixed."""
    return min(values(domain))


def largest_trial(space: dict, args) -> dict:
    """The largest values of what a trial's memory and its number of optimizer steps depend on, by name.

    Beside the names of hyperparameters, "sequences" is what one GPU takes in an optimizer step.

    Args:
        space: the search space.
        args: the arguments of the program: flags say what is not searched.
    """
    searched, names = space["train_loop_config"], ("per_device_bs", "gradient_accumulation_steps", "lora_r")
    found = {name: int(largest(searched[name] if name in searched else getattr(args, name))) for name in names}
    return found | {"sequences": found["per_device_bs"] * found["gradient_accumulation_steps"]}


def number_of_values(domain: Domain) -> float:
    """How many values a domain has; math.inf for a range of floats."""
    if isinstance(domain, Categorical):
        return len(domain.categories)
    if steps.is_quantized(domain):
        first, last = steps.first_and_last(domain)
        return last - first + 1
    return domain.upper - domain.lower if isinstance(domain, Integer) else math.inf


def grid_size(space: dict) -> int:
    """The number of trials of a full grid: all choices, ten values of each range, or all where it has fewer."""
    domains = [domain for domain in space["train_loop_config"].values() if isinstance(domain, Domain)]
    return math.prod(min(number_of_values(d), math.inf if isinstance(d, Categorical) else 10) for d in domains)


def text(domain) -> str:
    """A domain, or a fixed value, as text."""
    if isinstance(domain, Categorical):
        return f"choice{domain.domain_str}"
    if steps.is_quantized(domain):
        return f"{domain.sampler.sampler}{domain.domain_str} in steps of {domain.sampler.q}"
    return f"{domain.sampler or ''}{domain.domain_str}" if isinstance(domain, Domain) else repr(domain)


def edges(space: dict) -> dict[str, dict]:
    """The hyperparameters whose values have an order, by name, for the report. Choices have one from three numbers on.

    Returns:
        {"lower", "upper", "log"} of a range or {"choices"}, sorted, and "next": the values to try next, below the lower
        edge and above the upper one; None where there is none.
    """
    found = {}
    for name, domain in space["train_loop_config"].items():
        if not isinstance(domain, Domain):
            continue
        ends = [value.item() if isinstance(value, np.generic) else value for value in values(domain)]
        if isinstance(domain, Categorical):
            if len(ends) < 3 or not all(map(is_number, ends)):
                continue
            ends = sorted(ends)
            found[name] = {"choices": ends}
            pairs, ratio = (ends[:2], ends[:-3:-1]), ends[0] > 0  # the edge, and the choice beside it
            far = [a * a / b if ratio else 2 * a - b for a, b in pairs]
        else:
            sampler = domain.get_sampler()
            ratio = isinstance(getattr(sampler, "sampler", sampler), LogUniform)
            found[name] = {"lower": ends[0], "upper": ends[1], "log": ratio}
            half = (ends[1] - ends[0]) / 2
            far = [ends[0] / WIDER, ends[1] * WIDER] if ratio else [ends[0] - half, ends[1] + half]
        step = domain.sampler.q if steps.is_quantized(domain) else 1 if all(map(is_whole, ends)) else None
        far = [round(value / step) * step for value in far] if step else far
        far[0] = math.nan if ratio and far[0] <= 0 else far[0]
        nearer = [math.nan if ratio else 0, (1 + ends[-1]) / 2 if not step else math.nan]  # where that is too far
        lower = [v for v in (far[0], nearer[0]) if v < ends[0] and is_allowed(name, ends, v)]
        upper = [v for v in (far[1], nearer[1]) if v > ends[-1] and is_allowed(name, ends, v)]
        found[name]["next"] = [float(f"{tried[0]:.3g}") if tried else None for tried in (lower, upper)]
    return found


def is_allowed(name: str, ends: list, value: float) -> bool:
    """Whether a hyperparameter may have a value beyond its domain, which goes from ends[0] to ends[-1].

    The value of an unknown one stays at 0 or above if its range does, and below 1 if its range is between 0 and 1.
    """
    if name in HYPERPARAMETERS and not HYPERPARAMETERS[name][0](value):
        return False
    share = ends[0] >= 0 and ends[-1] <= 1 and (name not in HYPERPARAMETERS or name == "warmup_steps")
    return (value < 1 or not share) and (value >= 0 or ends[0] < 0)


def describe(space: dict) -> dict[str, str]:
    """The search space as text, by hyperparameter."""
    return {name: text(domain) for name, domain in space["train_loop_config"].items()}


def check_same(space: dict, earlier: dict[str, str]) -> None:
    """Raises BadInput where a search space is not the one that `describe` has described earlier."""
    now = describe(space)
    for name in now | earlier:
        if now.get(name) != earlier.get(name):
            raise BadInput(f"--resume: search space: {name} is {now.get(name)} now, and {earlier.get(name)} in the run")
