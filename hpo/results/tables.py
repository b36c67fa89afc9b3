"""The columns of the tables, the ranking of trials, and the table of results."""

import math

COLUMNS = {"lr": "learning_rate", "per_device_bs": "batch_size", "wd": "weight_decay"}
METRICS = ["eval_loss", "exact_match", "f1"]
TRIAL_FIELDS = ["trial_id", *COLUMNS.values(), "eval_loss", "exact_match", "f1", "training_iteration", "status",
                "model_based", "resumes", "gpu_minutes"]  # fmt: skip
# How the training went: norm of the gradients before clipping (median of the iteration's steps), loss scale at its end (fp16 only), steps that
# were skipped as their gradients overflowed, tokens trained on a second.
TRAINING = ["grad_norm", "loss_scale", "skipped_steps", "tokens_per_second"]
ITERATION_FIELDS = ["trial_id", "training_iteration", *METRICS, "started_at", "ended_at", "node", *TRAINING]
ENDED = ("stopped", "completed", "failed")  # a trial's status, else pending, running or paused


def badness(row: dict, metric: str) -> float:
    """The value of a metric, such that lower is better and what is missing or NaN is worst."""
    value = row.get(metric)
    if value is None or math.isnan(value):
        return math.inf
    return value if metric == "eval_loss" else -value


def rank(row: dict, metric: str) -> tuple[int, float]:
    """A key to sort by, best first: a trial with a larger completed budget goes before all with a smaller one."""
    return -row["training_iteration"], badness(row, metric)


def ranked(trials: list[dict], metric: str) -> list[dict]:
    """Best first."""
    return sorted(trials, key=lambda row: rank(row, metric))


def result_rows(trials: list[dict], metric: str) -> list[list[str]]:
    """The results as text, best first, under their names."""
    extra = [key for key in (trials[0] if trials else {}) if key not in TRIAL_FIELDS]
    keys = ["trial_id", *COLUMNS.values(), *extra, *METRICS, "training_iteration"]
    names = ["Trial ID", "Learning Rate", "Batch Size", "Weight Decay", *extra, "Eval Loss", "EM", "F1", "Iterations"]
    return [names, *([_show(key, trial.get(key)) for key in keys] for trial in ranked(trials, metric))]


def table(trials: list[dict], metric: str) -> str:
    """The results as a table in Markdown, best first."""
    names, *rows = result_rows(trials, metric)
    widths = [max(len(row[i]) for row in (names, *rows)) for i in range(len(names))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in (names, *rows)]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _show(key: str, value) -> str:
    if value is None:
        return ""
    if key == "learning_rate":
        return f"{value:.3g}"
    return f"{value:.4f}" if key in METRICS else str(value)
