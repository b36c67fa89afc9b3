"""Results of earlier runs for a new search: --warm_start.

The observations of a run of the same search enter the model at once. If the run differs, in its model or data for
example, its losses say little about the new ones, but its best hyperparameters may still be good: they are tried first.
"""

import contextlib
import json
from pathlib import Path

from hpo import arguments, code_copy, known, search_space
from hpo.cluster.state import FILE, load_state
from hpo.errors import BadInput
from hpo.results.provenance import changed_files
from hpo.results.tables import ranked
from hpo.squad import loading

BEST = 3  # settings that are taken from a run that differs
# Arguments that change neither the loss of a trial at a rung nor which rungs there are; another seed is another draw.
OF_NO_INFLUENCE = {
    "output_dir", "run_name", "report_to", "trial_timeout", "num_samples", "gpu_hours", "hours", "cpus_per_trial",
    "max_concurrent_trials", "try", "baseline", "warm_start", "seed", "deepspeed",
}  # fmt: skip


def take(args, space: dict) -> list[tuple[dict, int, float]]:
    """Reads the runs of --warm_start, prints what is taken of each, and adds settings to args.known.

    With --resume and a saved state nothing is read: the state has these results.

    Args:
        args: the arguments of the program.
        space: the search space.

    Returns:
        The observations for TuneBOHB.add_earlier_results.

    Raises:
        BadInput: a folder is not that of a run with results, or there are more known settings than trials.
    """
    observations = []
    has_state = args.resume and (arguments.run_dir(args) / FILE).exists()
    for folder in [] if has_state else dict.fromkeys(Path(folder).resolve() for folder in args.warm_start):
        run, state = read(folder)
        differs = differences(run, args, space)
        if not differs:
            found = state["searcher"]["observations"]
            points = known.points(
                [search_space.setting_of(space, state["log"]["configs"][o["trial_id"]]) for o in found]
            )
            observations += [(point, o["budget"], o["loss"]) for point, o in zip(points, found, strict=True)]
            print(f"--warm_start {folder}: {len(found)} results at rungs enter the model")
            if not (folder / code_copy.NAME).exists():
                print(f"WARNING: the code of {folder} is not known: leave it out if a trial trains in another way now")
            if changed := code_copy.changed(folder):
                print(
                    f"WARNING: {', '.join(changed[:3])} changed since: if it trains in another way, leave that run out"
                )
        else:
            settings, reason = best_settings(state["log"], run["arguments"]["metric"], space)
            args.known += [setting for setting in settings if setting not in args.known]
            what = f"its {len(settings)} best settings are tried first" if settings else "nothing is taken"
            what += f" (others are not in the search space: {reason})" * bool(reason)
            print(f"--warm_start {folder}: another search ({', '.join(differs)}); {what}")
    known.check_number(args.known, args, "--warm_start")
    return observations


def read(folder: Path) -> tuple[dict, dict]:
    """run.json and the saved state of a run. Raises BadInput where there are none."""
    try:
        run, state = json.loads((folder / "run.json").read_text()), load_state(folder)
        if state is None:
            why = "no trial has reached a rung, or the run is of an older version"
            raise BadInput(f"--warm_start {folder}: it has no {FILE}: {why}")
        dict(run["search_space"]), run["ds_config"], run["arguments"]["metric"], state["log"]["configs"]
        if not state["searcher"]["observations"]:
            raise BadInput(f"--warm_start {folder}: no trial of this run has reached a rung")
        return run, state
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise BadInput(f"--warm_start {folder}: not the folder of a run that can be read ({error})") from None


def differences(run: dict, args, space: dict) -> list[str]:
    """What makes an earlier run another search, in words. Empty where its losses are comparable with the new ones."""
    now, then = vars(args), arguments.OLDER | run["arguments"]
    now = now | {"reduction_factor": now["reduction_factor"][0]} if args.plan else now  # a plan can have several
    names = [name for name in then if name in now and name not in OF_NO_INFLUENCE]
    words = [f"{name} {then[name]}" for name in names if resolved(now[name]) != resolved(then[name])]
    searched = search_space.describe(space)
    for name in searched | run["search_space"]:
        if searched.get(name) != run["search_space"].get(name):
            words.append(f"{name} {run['search_space'].get(name, 'not searched')}")
    return words + ["ds_config"] * (run["ds_config"] != args.ds_config) + other_files(run, args)


def other_files(run: dict, args) -> list[str]:
    """Whether model or data set of an earlier run had other files, in words. Older runs do not tell."""
    words = []
    find = {"model": loading.model_folder, "dataset": lambda dataset: loading.data_files(dataset)[0]}
    for name, entry in run.get("files", {}).items():
        with contextlib.suppress(BadInput):  # it is not there: a plan can be made without it
            folder = find[name](getattr(args, name)) if name in find else None
            if folder and changed_files(entry["sha256"], folder):
                words.append(f"other files of {name}")
    return words


def resolved(value):
    """The absolute path where a value names a folder, else the value: "demo/model" and its full path are the same."""
    if isinstance(value, str) and Path(value).is_dir():
        return str(Path(value).resolve())
    return value


def best_settings(log: dict, metric: str, space: dict) -> tuple[list[dict], str]:
    """The best settings of a run that are in a search space, best first, and why the last other one is not."""
    settings, reason = [], ""
    for row in ranked(list(log["trials"].values()), metric):
        try:
            setting = search_space.setting_of(space, log["configs"][row["trial_id"]])
        except ValueError as error:
            reason = str(error)
            continue
        has_result = row["training_iteration"] > 0 and row["status"] != "failed"
        if has_result and len(settings) < BEST and setting not in settings:
            settings.append(setting)
    return settings, reason
