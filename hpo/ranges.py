"""The search space of a run: that of the script, or with ranges and choices that the environment changes.

    LR_LOWER=1e-5 LR_UPPER=1e-4 BS_CHOICES=1,2,4 WD_CHOICES=0,0.1 sbatch head_node.slurm

Imports the standard library only at its top: the command line reads these variables before the slow imports.
"""

import copy
import math

from hpo.errors import BadInput

VARIABLES = {"LR_LOWER": "lr", "LR_UPPER": "lr", "BS_CHOICES": "per_device_bs", "WD_CHOICES": "wd"}
FORMS = {"lr": "a number", "per_device_bs": "whole numbers separated by commas", "wd": "numbers separated by commas"}


def numbers(variable: str, text: str) -> list[float]:
    """The numbers in the text of a variable. Raises BadInput where it is of another form."""
    name = VARIABLES[variable]
    try:
        values = [int(word) if name == "per_device_bs" else float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        values = []
    if not values or (name == "lr" and len(values) > 1) or not all(-math.inf < value < math.inf for value in values):
        raise BadInput(f"{variable}={text} in the environment: must be {FORMS[name]}")
    return values


def read(variables: dict[str, str]) -> dict[str, str]:
    """Those of some variables that change the search space, as text. Raises BadInput where one is of another form."""
    given = [name for name in VARIABLES if variables.get(name, "").strip()]  # an empty one is not set
    found = {name: ",".join(variables[name].replace(",", " ").split()) for name in given}
    for name, text in found.items():
        numbers(name, text)
    return found


def space_of_run(space: dict, train, args) -> dict:
    """The search space of the script, with the changes of the environment. Both are checked.

    Args:
        space: SEARCH_SPACE of the script. It stays as it is.
        train: what each trial runs.
        args: the arguments of the program. `ranges` has the variables, of this environment or of the resumed run.

    Raises:
        BadInput: see search_space.check; or a variable does not fit to the script's search space.
    """
    from hpo import search_space  # imported late, because it imports Ray

    search_space.check(space, train, args.ds_config)
    if args.ranges:
        space = changed(space, args.ranges)
        try:
            search_space.check(space, train, args.ds_config)
        except BadInput as error:
            given = " ".join(f"{variable}={text}" for variable, text in args.ranges.items())
            raise BadInput(f"{given} in the environment: {error}") from None
    search_space.check_flags(space, args)
    return space


def changed(space: dict, variables: dict[str, str]) -> dict:
    """A search space with other bounds of lr, and other choices. A range stays of its kind, such as loguniform.

    Raises:
        BadInput: the hyperparameter is not a range, or not a choice.
    """
    from ray.tune.search.sample import Categorical, Float

    from hpo.search_space import text as in_words

    searched = dict(space["train_loop_config"])
    for variable, text in variables.items():
        name, values = VARIABLES[variable], numbers(variable, text)
        domain = copy.copy(searched[name])
        if not isinstance(domain, Float if name == "lr" else Categorical):
            wanted = "a range of numbers" if name == "lr" else "a choice"
            what = f"{name} is {in_words(domain)} in SEARCH_SPACE, and not {wanted}"
            raise BadInput(f"{variable}={text} in the environment: {what}")
        if name == "lr":
            setattr(domain, variable.removeprefix("LR_").lower(), values[0])
        else:
            domain = Categorical(values).uniform()
        searched[name] = domain
    return {"train_loop_config": searched}


def changes(space: dict, variables: dict[str, str]) -> list[str]:
    """A line for each hyperparameter that the environment has changed.

    Args:
        space: the search space of the run.
        variables: that have changed it.
    """
    from hpo.search_space import text as in_words

    lines = []
    for name in dict.fromkeys(VARIABLES[variable] for variable in variables):
        given = " ".join(f"{variable}={text}" for variable, text in variables.items() if VARIABLES[variable] == name)
        lines.append(f"{given} in the environment: {name} is {in_words(space['train_loop_config'][name]).lower()}")
    return lines
