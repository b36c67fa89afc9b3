"""Known good settings: hyperparameters that the user gives, which the first trials of a search train with.

    KNOWN = [{"lr": 2.5e-5, "per_device_bs": 2, "wd": 0.0}]                       # in the script
    .venv/bin/python raytune_bayesian.py --try lr=2.5e-5,per_device_bs=2,wd=0     # for one run

Imports the standard library only at its top: the command line reads --try before the slow imports.
"""

import ast
import contextlib
import re

from hpo.bohb.brackets import band_size
from hpo.errors import BadInput, one_line


def read(text: str) -> dict[str, str]:
    """The names in the text of a --try, and their values as text. Raises BadInput where it is of another form."""
    setting = {}
    for part in re.split(r",(?=\s*\w+=)", text):  # a list or a dictionary has commas too
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or not name.isidentifier() or name in setting:
            raise BadInput(f"--try {text}: must be name=value,name=value,... with each name once")
        setting[name] = value
    return setting


def value_in(text: str, domain):
    """The value in a text, such as 1 for "1"; the text itself where the domain has that and not the value."""
    from hpo import search_space  # imported late, because it imports Ray

    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text  # such as linear
    for found in (value, text):
        with contextlib.suppress(ValueError):
            return search_space.value_of(domain, found)
    return value


def settings(given: list[dict], space: dict, args) -> list[dict]:
    """The known settings of a new run: those of the script, then those of --try. One that is given twice is there once.

    With --resume there are none yet: Run takes those of run.json.

    Args:
        given: KNOWN of the script.
        space: the search space of the run.
        args: the arguments of the program.

    Returns:
        A value for each hyperparameter that is searched, by name, as the search space has it: 0.0 for 0.

    Raises:
        BadInput: a setting is not one of the search space, or there are more than trials.
    """
    from hpo import search_space  # imported late, because it imports Ray

    if args.resume:
        return []
    if not isinstance(given, list) or not all(isinstance(setting, dict) for setting in given):
        raise BadInput('KNOWN: must be a list of dictionaries such as {"lr": 2.5e-5, "per_device_bs": 2, "wd": 0.0}')
    sources = [(f"KNOWN: {setting}", setting) for setting in given]
    searched = space["train_loop_config"]
    for text in vars(args)["try"]:
        sources += [(f"--try {text}", {name: value_in(v, searched.get(name)) for name, v in read(text).items()})]
    found = []
    for source, setting in sources:
        try:
            values = search_space.setting_of(space, setting)
        except ValueError as error:
            raise BadInput(f"{source}: {error}") from None
        if values in found:
            print(f"{one_line(source)}: this setting is given twice, and is tried once")
        else:
            found.append(values)
    check_number(found, args, "KNOWN, --try")
    if args.baseline and not found:
        raise BadInput("--baseline: it is the first known setting, and there is none: add one to KNOWN, or use --try")
    return found


def check_number(known: list[dict], args, sources: str) -> None:
    """Raises BadInput where there are more known settings than trials. `sources` are the flags that they come from."""
    factors = args.reduction_factor if isinstance(args.reduction_factor, list) else [args.reduction_factor]
    trials = args.num_samples or min(band_size(args.max_t, factor) for factor in factors)  # a plan has several
    ends_by_budget = args.num_samples is None and (args.gpu_hours or args.hours)
    if len(known) > trials and not ends_by_budget:
        raise BadInput(f"--num_samples {trials}: there are {len(known)} known settings ({sources})")


def points(known: list[dict]) -> list[dict]:
    """Known settings in the form of TuneBOHB's points_to_evaluate."""
    return [{f"train_loop_config/{name}": value for name, value in setting.items()} for setting in known]


def in_words(known: list[dict], baseline: bool) -> list[str]:
    """A line for each known setting."""
    names = ["baseline, which is trained to the end"] * baseline
    names += ["known setting"] * (len(known) - len(names))
    texts = [" ".join(f"{name} {value}" for name, value in setting.items()) for setting in known]
    return [f"trial {i}: {text}, {name}" for i, (text, name) in enumerate(zip(texts, names, strict=True), 1)]
