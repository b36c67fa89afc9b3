"""What --repeats has found: how much the result of a training depends on its seed.

The best trial of a search has the best of many scores, so its own score is too good on average (the winner's curse).
Its repeats have the same hyperparameters and other seeds. All are scored on the questions that trials are compared on:
the repeats show the luck of the seed, and the test of the best model shows that of the questions.
"""

import math
import statistics
from pathlib import Path

from scipy import stats

from hpo.files import read_csv
from hpo.results.intervals import CONFIDENCE, came_to_a_rung, finalists
from hpo.results.tables import METRICS, MODES, badness, in_words

FOLDER = "repeats"  # in the run folder; it has trials.csv and iterations.csv


def of_repeats(seed: int, number: int) -> list[int]:
    """The seeds of the repeats of a trial. Far from each other: epoch e of a training is shuffled with seed + e."""
    return [(seed + 1000 * i) % 2**32 for i in range(1, number + 1)]


def load(run_dir: Path) -> list[dict]:
    """The rows of the repeats that have ended, in the order of their seeds. Empty where there are none."""
    file = run_dir / FOLDER / "trials.csv"
    rows = read_csv(file) if file.exists() else []
    return sorted((row for row in rows if row["status"] in ("completed", "failed")), key=lambda row: row["seed"])


def scores(repeats: list[dict], metric: str) -> list[float]:
    """The scores of the repeats that were trained to the end."""
    return [row[metric] for row in repeats if row["status"] == "completed" and math.isfinite(row[metric])]


def spread(values: list[float]) -> str:
    """Mean and standard deviation in words. One value has no deviation."""
    text = f"mean {statistics.fmean(values):.4f}"
    return text + (f", standard deviation {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def next_training(values: list[float]) -> tuple[float, float]:
    """The interval in which one more training falls with a probability of 95 %, if scores are normal, and not the same.

    Source: the prediction interval of a normal sample, for example Hahn and Meeker, "Statistical Intervals", 1991.
    """
    n, scale = len(values), statistics.stdev(values) * math.sqrt(1 + 1 / len(values))
    low, high = stats.t.interval(CONFIDENCE, n - 1, statistics.fmean(values), scale)
    return float(low), float(high)


def in_sentences(run_dir: Path, trials: list[dict], metric: str, baseline: str | None) -> list[str]:
    """The repeats in words, for log and report. Empty where there are none.

    Args:
        run_dir: the run folder.
        trials: the rows of trials.csv.
        metric: trials are compared by it.
        baseline: the trial id of the baseline, or None.
    """
    repeats, compared, said = load(run_dir), finalists(trials, metric), []
    if not repeats or not compared:
        return []
    best = compared[0]
    ids = {"best trial": best["trial_id"], "baseline": None if baseline == best["trial_id"] else baseline}
    found = {name: [row for row in repeats if row["repeat_of"] == trial_id] for name, trial_id in ids.items()}
    for name, rows in found.items():
        if rows:
            said.append(f"Repeats of the {name} ({ids[name]}) {rows_in_words(rows)}.")
    for trial_id in dict.fromkeys(row["repeat_of"] for row in repeats if row["repeat_of"] not in ids.values()):
        rows = [row for row in repeats if row["repeat_of"] == trial_id]
        said.append(f"Repeats of an earlier best trial ({trial_id}) {rows_in_words(rows)}.")
    values = scores(found["best trial"], metric)
    trained = max((row["training_iteration"] for row in found["best trial"]), default=0)
    if values and best["training_iteration"] == trained:  # not if all trials that were trained to the end have failed
        said.append(curse_in_words(best, values, came_to_a_rung(trials), len(compared), metric))
    minus = differences_by_seed(found["best trial"], found["baseline"], metric)
    if len(minus) > 1:
        ends = of_differences(minus)
        how = "95 % t interval of what other seeds would give" if ends else "all with the same difference"
        said.append(
            "Repeats of the best trial minus those of the baseline with the same seed: "
            f"{metric} {in_words(statistics.fmean(minus), ends, '+')} on average ({len(minus)} seeds, {how}). This "
            "favours the best trial, which was selected on these questions."
        )
    return said


def differences_by_seed(rows: list[dict], others: list[dict], metric: str) -> list[float]:
    """Repeats of one trial minus those of another with the same seed. Those that were not completed are left out."""
    one, other = ({row["seed"]: v for row in half for v in scores([row], metric)} for half in (rows, others))
    return [one[seed] - other[seed] for seed in one if seed in other]


def of_differences(minus: list[float]) -> tuple[float, float] | None:
    """The 95 % t interval of a mean difference of pairs (Student 1908). None where all differences are the same."""
    if max(minus) - min(minus) < 1e-9:  # EM of n questions is k / n, with errors of rounding
        return None
    ends = stats.ttest_1samp(minus, 0).confidence_interval(CONFIDENCE)
    return float(ends.low), float(ends.high)


def rows_in_words(rows: list[dict]) -> str:
    """The seeds of repeats, and in each metric their scores, with mean and standard deviation."""
    text = f"with seed {', '.join(str(row['seed']) for row in rows)}"
    failed = sum(row["status"] == "failed" for row in rows)
    text += f", {failed} failed" if failed else ""
    found = {metric: scores(rows, metric) for metric in METRICS}
    each = [f"{metric} {', '.join(f'{v:.4f}' for v in vs)} ({spread(vs)})" for metric, vs in found.items() if vs]
    return text + (f": {'; '.join(each)}" if each else "")


def curse_in_words(best: dict, values: list[float], number: int, compared: int, metric: str) -> str:
    """By how much the score of the best trial is better than those of its repeats, and what to expect of another one.

    Args:
        best: the row of the best trial.
        values: the scores of its repeats.
        number: of all trials that came to a rung.
        compared: the number of finalists, which were trained as far as the best trial.
        metric: trials are compared by it.
    """
    gap = badness({metric: statistics.fmean(values)}, metric) - badness(best, metric)
    of = f"{number} trial" + "s" * (number > 1)
    as_far = f"{compared} of them {'were' if compared > 1 else 'was'} trained as far"
    text = f"Winner's curse: the {metric} of the best trial, {best[metric]:.4f}, is the best of {of} ({as_far}). "
    by = f"{abs(gap):.4f} {'worse' if gap < 0 else 'better'} than" if gap else "the same as"
    text += f"It is {by} " + ("its repeat." if len(values) == 1 else f"the mean of its {len(values)} repeats.")
    if len(values) == 1:
        return text + " The spread is not known: it needs two repeats."
    if len(set(values)) == 1:
        return text + " All repeats have the same score, so no interval can be computed."
    low, high = next_training(values)
    low, high = max(low, 0.0), min(high, 1.0) if MODES[metric] == "max" else high  # no loss is negative
    text += f" One more training is expected from {low:.4f} to {high:.4f} (95 % prediction interval)"
    if low <= best[metric] <= high:
        return text + (
            ": the best trial is inside, so no luck of its seed is seen. The luck of the questions is in all of these "
            "scores; only the test shows it."
        )
    return text + f": the best trial is {'worse' if gap < 0 else 'better'} than that."
