"""The pace that a --check has measured, and the hours of a plan that follow from it."""

import math
import statistics

from hpo import search_space
from hpo.errors import BadInput
from hpo.squad import loading

# Arguments that change the pace, beside the model:
SAME = ("dataset", "metric", "metric_language", "lora_target_modules", "gradient_checkpointing", "precision",
        "gpus_per_trial", "cpus_per_trial")  # fmt: skip


def seconds_per_iteration(pace: dict, forecast, max_t: int, questions: float, selection: int) -> float:
    """The mean duration of an iteration of a search.

    Args:
        pace: {"step_seconds": seconds of an optimizer step by its number of sequences (text), "loss_seconds" and
            "scored_seconds": of an evaluation, by question, without and with EM and F1; "checkpoint_seconds"}.
        forecast: a plan.Forecast of the search. Its trials compute EM and F1 and write a checkpoint at rungs only.
        max_t: iterations of a full training.
        questions: of a full training, counted in each epoch.
        selection: questions of an evaluation.
    """
    training = statistics.fmean(math.ceil(questions / int(n)) * s / max_t for n, s in pace["step_seconds"].items())
    at_rungs = sum(trials for _, _, trials, _ in forecast.rungs) / forecast.iterations
    scored = max(0.0, pace["scored_seconds"] - pace["loss_seconds"])  # below 0 on a busy machine
    return training + selection * (pace["loss_seconds"] + at_rungs * scored) + at_rungs * pace["checkpoint_seconds"]


def of_check(args, space: dict, forecasts: list) -> list[float]:
    """The seconds of an iteration, for each forecast, by the check of --from_check.

    Raises:
        BadInput: it is no folder of a check, or the check was of another model or other settings.
    """
    try:
        check = args.earlier_check
        then, pace = check["arguments"], check["pace"]
        local = loading.local_model(args.model)
        if args.model != then["model"] and str(local and local.absolute()) != check["model_folder"]:
            raise BadInput(f"--from_check {args.from_check}: the check was of --model {then['model']}")
        for name in SAME:
            if getattr(args, name) != then[name]:
                raise BadInput(f"--from_check {args.from_check}: the check was of --{name} {then[name]}")
        if args.ds_config != check["ds_config"]:
            raise BadInput(f"--from_check {args.from_check}: the check was of another ds_config")
        if not check["ok"]:
            print(f"WARNING: --from_check {args.from_check}: not all nodes of the check were ok")
        if search_space.largest_trial(space, args) != check["largest"]:
            raise BadInput(f"--from_check {args.from_check}: the check was of a largest trial with {check['largest']}")
        questions = _questions(args, check, "train", "max_train_samples") * args.num_train_epochs
        selection = _questions(args, check, "selection", "max_eval_samples")
        return [seconds_per_iteration(pace, forecast, args.max_t, questions, selection) for forecast in forecasts]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"--from_check {args.from_check}: not the folder of a check ({error!r})") from None


def _questions(args, check: dict, part: str, flag: str) -> int:
    """The number of training or selection questions of the planned search: the data set is not read for a plan.

    If `flag` is not given now, its value is that of the check.
    """
    now, then, found = getattr(args, flag), check["arguments"][flag], check["questions"][part]
    if now == then:
        return found
    return min(now, found) if then is None and part == "train" else now
