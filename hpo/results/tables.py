"""The columns of the tables, the direction of each metric, the ranking of trials, and the table of results.

Imports the standard library only, because the command line needs the names of the metrics before slow imports.
"""

import csv
import math
import statistics
from pathlib import Path

from hpo.files import read_csv

# Hyperparameters whose column in trials.csv has another name. Any other hyperparameter has a column with its own name.
COLUMNS = {"lr": "learning_rate", "per_device_bs": "batch_size", "wd": "weight_decay"}
# The metrics of an evaluation, and whether less or more is better.
MODES = {"eval_loss": "min", "exact_match": "max", "f1": "max"}
METRICS = list(MODES)
# Further metrics, of SQuAD 2.0 only: EM and F1 of the questions with an answer, and of those without one. They are
# further columns of trials.csv and iterations.csv.
V2_METRICS = ["HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1"]
# The columns of trials.csv. Hyperparameters that are not in COLUMNS follow as further columns.
TRIAL_FIELDS = [
    "trial_id", *COLUMNS.values(), *METRICS, "training_iteration", "status", "model_based", "resumes", "gpu_minutes",
]  # fmt: skip
# A further column of trials.csv in a search with known settings (KNOWN, --try): True for their trials, else empty.
KNOWN_SETTING = "known"
# How the training of an iteration went: norm of the gradients before clipping (median over the steps), loss scale at
# the end (fp16 only), steps that were skipped because their gradients overflowed, tokens trained on per second.
TRAINING = ["grad_norm", "loss_scale", "skipped_steps", "tokens_per_second"]
# The columns of iterations.csv.
ITERATION_FIELDS = ["trial_id", "training_iteration", *METRICS, "started_at", "ended_at", "node", *TRAINING]
# The status of a trial that has ended. The other ones are pending, running and paused.
ENDED = ("stopped", "completed", "failed")


def hyperparameter_columns(trials: list[dict]) -> list[str]:
    """The columns of trials.csv that are hyperparameters. Empty if there are no trials."""
    keys = trials[0] if trials else {}
    return [key for key in keys if key not in (*TRIAL_FIELDS, *V2_METRICS, KNOWN_SETTING) or key in COLUMNS.values()]


def origin(trial: dict) -> str:
    """Where the hyperparameters of a trial come from: "known", "model" or "random"."""
    return KNOWN_SETTING if trial.get(KNOWN_SETTING) else "model" if trial["model_based"] else "random"


def gain(best: dict, baseline: dict) -> dict[str, float]:
    """The metrics of the best trial minus those of the baseline. Empty if the baseline has not reached max_t."""
    return {name: best[name] - baseline[name] for name in METRICS} if baseline["status"] == "completed" else {}


def in_words(value: float, interval: tuple[float, float] | list[float] | None, sign: str = "") -> str:
    """A value with four decimals, and its interval in brackets, if there is one."""
    return f"{value:{sign}.4f}" + (f" [{interval[0]:{sign}.4f}, {interval[1]:{sign}.4f}]" if interval else "")


def gain_in_words(gained: dict) -> str:
    """What a search has gained over its baseline, as run.json has it."""
    if not gained["gain"]:
        return "not known: the baseline has failed before max_t"
    if not any(gained["gain"].values()):
        return "0, the baseline is the best trial"
    lower = {name: " (lower is better)" for name, mode in MODES.items() if mode == "min"}
    intervals = gained.get("intervals", {})  # older runs have none
    values = {name: in_words(value, intervals.get(name), "+") for name, value in gained["gain"].items()}
    text = ", ".join(f"{name} {value}{lower.get(name, '')}" for name, value in values.items())
    return text + (f"; {in_percent(gained['level'])} intervals" if intervals and "level" in gained else "")


def in_percent(level: float) -> str:
    """A level in words, rounded down to two decimals, such as "99.84 %"."""
    return f"{math.floor(level * 1e4 + 1e-6) / 100:g} %"


def tested_in_words(tested: dict) -> str:
    """The metrics of the test of the best model, as run.json has them, with their intervals."""
    values = {name: tested[name] for name in (*METRICS, *V2_METRICS) if name in tested}
    intervals = tested.get("intervals", {})  # older runs have none
    return ", ".join(
        f"{name} {in_words(math.nan if value is None else value, intervals.get(name))}"
        for name, value in values.items()
    )


def looks_in_words(tests: list[dict]) -> str:
    """How often the test set was looked at: the tests of run.json, with their dates and trials."""
    times = "once" if len(tests) == 1 else f"{len(tests)} times"
    return f"The test set was looked at {times}: " + ", ".join(f"{t['date']} (trial {t['trial_id']})" for t in tests)


def leakage_in_words(leakage: dict[str, dict[str, int]]) -> list[str]:
    """Near-duplicates of selection and test in the training set, a line each. It may be a warning.

    Args:
        leakage: as in run.json. Older runs have none, or none for the selection.
    """
    lines, what = [], "{passages} of {of_passages} passages and {questions} of {of_questions} questions"
    for part, where, effect in (
        ("selection", "held out have a near-duplicate in the rest of the training set", "left out of the selection"),
        ("test", "of the validation set have a near-duplicate in the training set", "affected"),
    ):
        if part in leakage:
            affected = leakage[part]["affected"]
            none_left = part == "selection" and affected == leakage[part]["of_questions"]
            warning = "WARNING: " * (none_left or part == "test" and affected > 0)
            effect = "affected and stay, as no others are left" if none_left else effect
            lines.append(f"{warning}{what} {where}: {{affected}} questions are {effect}".format_map(leakage[part]))
    return lines


def mean_iteration_seconds(path: Path) -> float:
    """The mean duration of the iterations in an iterations.csv.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not an iterations.csv, or it has no rows.
    """
    try:
        seconds = [row["ended_at"] - row["started_at"] for row in read_csv(path)]
    except (KeyError, TypeError, csv.Error):
        raise ValueError("not every row has started_at and ended_at") from None
    if not seconds:
        raise ValueError("no rows")
    return statistics.fmean(seconds)


def badness(row: dict, metric: str) -> float:
    """The value of a metric with its sign such that lower is better. A missing value or NaN is the worst."""
    value = row.get(metric)
    if value is None or math.isnan(value):
        return math.inf
    return value if MODES[metric] == "min" else -value


def rank(row: dict, metric: str) -> tuple[int, float]:
    """A sort key, best first. A trial with a larger completed budget is before all trials with a smaller one."""
    return -row["training_iteration"], badness(row, metric)


def ranked(trials: list[dict], metric: str) -> list[dict]:
    """The rows of trials, best first."""
    return sorted(trials, key=lambda row: rank(row, metric))


def result_rows(trials: list[dict], metric: str, versus: dict[str, tuple] | None = None) -> list[list[str]]:
    """The table of results as text cells, best trial first. The first row is the header.

    A search with known settings has a column more: where the hyperparameters come from.

    Args:
        trials: the rows of trials.csv.
        metric: of the search.
        versus: the differences of finalists to the best trial, see intervals.versus_best; a further column.
    """
    extra = [key for key in hyperparameter_columns(trials) if key not in COLUMNS.values()]
    keys = ["trial_id", *COLUMNS.values(), *extra, *METRICS, "training_iteration"]
    names = ["Trial ID", "Learning Rate", "Batch Size", "Weight Decay", *extra, "Eval Loss", "EM", "F1", "Iterations"]
    rows = [names, *([format_value(key, trial.get(key)) for key in keys] for trial in ranked(trials, metric))]
    if any(trial.get(KNOWN_SETTING) for trial in trials):
        origins = ["Origin", *(origin(trial) for trial in ranked(trials, metric))]
        rows = [[*row, cell] for row, cell in zip(rows, origins, strict=True)]
    if versus:
        found = [versus.get(trial["trial_id"]) for trial in ranked(trials, metric)]
        cells = [f"{names[keys.index(metric)]} vs Best", *(in_words(v[0], v[1:], "+") if v else "" for v in found)]
        rows = [[*row, cell] for row, cell in zip(rows, cells, strict=True)]
    return rows


def table(trials: list[dict], metric: str, versus: dict[str, tuple] | None = None) -> str:
    """The table of results in Markdown, best trial first. For the arguments see `result_rows`."""
    header, *rows = result_rows(trials, metric, versus)
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def format_value(column: str, value) -> str:
    """A cell of the results as text: learning rates with three digits, metrics with four decimals."""
    if value is None:
        return ""
    if column == "learning_rate":
        return f"{value:.3g}"
    return f"{value:.4f}" if column in METRICS else str(value)
