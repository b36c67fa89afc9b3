"""The scores of each question, their 95 % intervals, and which trials differ from the best one.

Questions on one passage are answered well or badly together, so passages are the units, and not questions. A score has
the BCa interval of the bootstrap over passages (Davison and Hinkley, "Bootstrap Methods and their Application", 1997,
chapter 5.3). A difference of two trials has the t interval of a ratio (Cochran, "Sampling Techniques", 1977, chapter
6.4): losses have long tails, and with few passages the bootstrap is too sure at the high levels that are needed here.
The intervals say what other passages would change, and not what another seed of the training would.

The folder scores/ of a run has these files, with one row a question:

    selection.npz               id, passage, answer_tokens, has_answer of the questions that trials are compared on
    <trial id>-<iteration>.npz  eval_loss (nats, the sum over the answer tokens), exact_match and f1 at a rung
    test.npz                    all of these for best_model, on the test questions
"""

import io
import itertools
import math
import zipfile
import zlib
from collections.abc import Container
from pathlib import Path

import numpy as np
from scipy import stats

from hpo.files import write_atomically
from hpo.results.tables import METRICS, V2_METRICS, badness, in_percent, in_words, ranked

CONFIDENCE = 0.95
RESAMPLES = 9999
SHOWN = 8  # trials in a sentence
MIN_PASSAGES = 10  # with fewer, the interval of a score has the truth in it far less often than its level says

# ---------------------------------------------------------------------------------------------------------------------
# files


def questions_of(data) -> dict[str, np.ndarray]:
    """What selection.npz has of a TokenizedSquad."""
    ids = np.array([reference["id"] for reference in data.references], str)
    tokens, has_answer = data.answer_lengths.astype(np.int32), [bool(r["answers"]["text"]) for r in data.references]
    return {
        "id": ids, "passage": data.passages.astype(np.int32), "answer_tokens": tokens,
        "has_answer": np.array(has_answer, bool),
    }  # fmt: skip


def scores_of(losses: np.ndarray, pairs: list[tuple[float, float]]) -> dict[str, np.ndarray]:
    """What <trial id>-<iteration>.npz has: 9 bytes a question before compression.

    Args:
        losses: (n,), the summed cross entropy of each question (nats).
        pairs: n times (exact match, F1).
    """
    exact_match, f1 = np.array(pairs, np.float32).T
    return {"eval_loss": losses.astype(np.float32), "exact_match": exact_match.astype(bool), "f1": f1}


def save(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an .npz file atomically, and its folder."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, content.getvalue())


def load(run_dir: Path, trial: dict, iteration: int | None = None) -> dict[str, np.ndarray] | None:
    """The scores of a trial at a rung, and its questions. None where they are missing, or damaged.

    Older runs have none, or for a short time had those of the last rung only, as <trial id>.npz.

    Args:
        run_dir: the run folder.
        trial: its row in trials.csv.
        iteration: of the rung; None: the last one that the trial has reached.
    """
    folder, iteration = run_dir / "scores", trial["training_iteration"] if iteration is None else iteration
    file, of_older = folder / f"{trial['trial_id']}-{iteration}.npz", folder / f"{trial['trial_id']}.npz"
    try:
        arrays = dict(np.load(file if file.exists() else of_older))
        found = arrays | dict(np.load(folder / "selection.npz"))
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return None
    return found if arrays.get("iteration", iteration) == iteration else None


# ---------------------------------------------------------------------------------------------------------------------
# intervals


def interval(sums: np.ndarray, sizes: np.ndarray, proportion: bool) -> tuple[float, float] | None:
    """The 95 % interval of sum(sums) / sum(sizes), for passages that are drawn at random.

    Args:
        sums: (m,), the scores of a passage, added up.
        sizes: (m,), the number of its questions, or of their answer tokens.
        proportion: a score from 0 to 1, such as EM.

    Returns:
        (low, high). None with fewer than MIN_PASSAGES, where a score is NaN or infinite, and where all passages have
        the same score other than 0 or 1: nothing shows how much passages differ.
    """
    if len(sums) < MIN_PASSAGES or not np.isfinite(sums).all():
        return None
    ratios = sums / sizes
    if np.ptp(ratios) == 0:  # the bootstrap would give an interval without width
        if not proportion or ratios[0] not in (0, 1):
            return None
        exact = stats.binomtest(int(ratios[0]) * len(sums), len(sums)).proportion_ci(CONFIDENCE)  # Clopper and Pearson
        return float(exact.low), float(exact.high)
    found = stats.bootstrap(
        (sums, sizes),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 10**6 // len(sums)),
        confidence_level=CONFIDENCE,
        rng=np.random.default_rng(0),  # the same data have the same interval
    ).confidence_interval
    return float(found.low), float(found.high)


def of_passages(values: np.ndarray, scores: dict, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(sums, sizes) of `interval`, from one value a question: (n,)."""
    weights = scores["answer_tokens"] if metric == "eval_loss" else np.ones(len(values))
    _, passage = np.unique(scores["passage"], return_inverse=True)
    return np.bincount(passage, values), np.bincount(passage, weights)


def score_intervals(scores: dict | None, v2: bool = False) -> dict[str, tuple[float, float]]:
    """The interval of each metric, by its name, from the arrays of `load`; of V2_METRICS too, where v2 is true.

    Empty where there are no scores. A metric without questions, or whose interval is not known, is missing.
    """
    if not scores:
        return {}
    found = {name: interval(*of_passages(scores[name], scores, name), name != "eval_loss") for name in METRICS}
    if v2:
        for name, metric in zip(V2_METRICS, ("exact_match", "f1") * 2, strict=True):
            some = scores["has_answer"] == name.startswith("HasAns")
            passages = {"passage": scores["passage"][some]}
            found[name] = interval(*of_passages(scores[metric][some], passages, metric), proportion=True)
    return {name: ends for name, ends in found.items() if ends}


def mean(scores: dict, metric: str) -> float:
    """A metric, over all questions."""
    sums, sizes = of_passages(scores[metric], scores, metric)
    return float(sums.sum() / sizes.sum())


def difference(scores: dict, others: dict, metric: str, level: float = CONFIDENCE) -> tuple[float, float, float] | None:
    """A metric of one trial minus that of another on the same questions, and its interval: (difference, low, high).

    None for a single passage, where a score is NaN or infinite, and where all passages differ by the same.
    """
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        sums, sizes = of_passages(scores[metric].astype(float) - others[metric], scores, metric)
    m = len(sums)
    if m < 2 or not np.isfinite(sums).all():
        return None
    ratio = sums.sum() / sizes.sum()
    error = np.sqrt(m / (m - 1) * ((sums - ratio * sizes) ** 2).sum()) / sizes.sum()
    if ratio != 0 and error <= 1e-9 * abs(ratio):
        return None
    half = stats.t.ppf((1 + level) / 2, m - 1) * error
    return float(ratio), float(ratio - half), float(ratio + half)


def finalists(trials: list[dict], metric: str) -> list[dict]:
    """The trials with as many iterations as the best one, which is the first. Empty while none has reached a rung."""
    rows = ranked(trials, metric)
    return [row for row in rows if row["training_iteration"] == rows[0]["training_iteration"] > 0]


def of_gain(run_dir: Path, trials: list[dict], best: dict, baseline: dict) -> dict[str, tuple[float, float]]:
    """The interval of each metric of the best trial minus the baseline's. Both are rows of `trials`.

    The best trial was chosen among all trials, so the interval has the level of `versus_best`.
    """
    scores, level = [load(run_dir, row) for row in (best, baseline)], level_of(trials)
    found = {name: difference(*scores, name, level) for name in METRICS} if all(scores) else {}
    return {name: ends[1:] for name, ends in found.items() if ends}


def came_to_a_rung(trials: list[dict]) -> int:
    """The number of trials that have a result: the best trial was chosen among these."""
    return sum(row["training_iteration"] > 0 for row in trials)


def level_of(trials: list[dict]) -> float:
    """The level of each comparison with the best trial: Bonferroni's, for all other trials that came to a rung.

    Not for the finalists alone: they were promoted for their scores on the same questions.
    """
    return 1 - (1 - CONFIDENCE) / max(1, came_to_a_rung(trials) - 1)


def versus_best(run_dir: Path, trials: list[dict], metric: str) -> dict[str, tuple[float, float, float]]:
    """The finalists minus the best trial in a metric, with intervals: {trial id: (difference, low, high)}.

    Finalists have the same iteration as the best trial. With k other trials in the search, each interval has the level
    1 - 0.05 / k (Bonferroni). So the finalist that is truly best is the best trial, or one whose interval has 0 in it,
    in 95 % of searches (Gupta's subset selection; Hsu, "Multiple Comparisons", 1996, chapter 4). docs/results.md has
    what was measured.
    """
    rows, level = finalists(trials, metric), level_of(trials)
    scores = {row["trial_id"]: load(run_dir, row) for row in rows}
    if not rows or scores[rows[0]["trial_id"]] is None:
        return {}
    best = scores.pop(rows[0]["trial_id"])
    found = {trial_id: difference(own, best, metric, level) for trial_id, own in scores.items() if own}
    return {trial_id: ends for trial_id, ends in found.items() if ends}


# ---------------------------------------------------------------------------------------------------------------------
# words


def best_in_words(run_dir: Path, best: dict) -> str:
    """The metrics of the best trial on the questions that trials are compared on, with their intervals."""
    ends = score_intervals(load(run_dir, best))
    return ", ".join(f"{name} {in_words(best[name], ends.get(name))}" for name in METRICS)


def stopped_in_doubt(run_dir: Path, trials: list[dict], metric: str, alone: Container[str]) -> list[dict]:
    """Trials that were stopped at a rung although they are not clearly worse than one that went on from there.

    Each stopped trial is compared, at its last rung, with the worst of the trials that were promoted there, in any
    bracket, also if they have failed since. It is listed unless the whole 95 % interval of the difference is on the
    worse side. The intervals are those of one comparison: of many stopped trials some are listed, or not, by chance.

    Args:
        run_dir: the run folder.
        trials: the rows of trials.csv.
        metric: trials are compared by it.
        alone: ids of trials that went on without a promotion, see HyperBandForBOHB. None is compared with them.

    Returns:
        Their rows of trials.csv: those at the largest rung first, of these the best first. None of a run without
        scores.
    """
    found, worse = [], badness({metric: 1.0}, metric)
    for rung, stopped in itertools.groupby(ranked(trials, metric), lambda row: row["training_iteration"]):
        stopped = [row for row in stopped if row["status"] == "stopped" and math.isfinite(badness(row, metric))]
        promoted = [row for row in trials if row["training_iteration"] > rung]
        failed = [row for row in trials if row["training_iteration"] == rung and row["status"] == "failed"]
        promoted = [row for row in [*promoted, *failed] if row["trial_id"] not in alone]
        later = [load(run_dir, row, rung) for row in promoted if stopped]
        later = [scores for scores in later if scores and math.isfinite(mean(scores, metric))]
        if not later:
            continue
        last = max(later, key=lambda scores: worse * mean(scores, metric))
        for row in stopped:
            scores = load(run_dir, row)
            apart = difference(scores, last, metric) if scores else None
            if apart and min(worse * apart[1], worse * apart[2]) <= 0:
                found.append(row)
    return found


def ties_in_words(trials: list[dict], versus: dict[str, tuple[float, float, float]], metric: str) -> list[str]:
    """Sentences on the finalists that may be as good as the best trial. None where there is no other finalist.

    Args:
        trials: the rows of trials.csv.
        versus: from versus_best.
        metric: trials are compared by it.
    """
    level, others = in_percent(level_of(trials)), [row["trial_id"] for row in finalists(trials, metric)[1:]]
    without = [trial_id for trial_id in others if trial_id not in versus]
    said = [f"No interval, so no comparison with the best trial: {', '.join(without)}."] * bool(without)
    if not versus:
        return said
    ties = [trial_id for trial_id, (_, low, high) in versus.items() if low <= 0 <= high]
    if not ties:
        others = f"each of the other {len(versus)} finalists" if len(versus) > 1 else "the other finalist"
        return [f"The best trial differs in {metric} from {others} with scores ({level} intervals).", *said]
    of = f"{len(ties)} of the other {len(versus)} finalists" if len(versus) > 1 else "The other finalist"
    of += " with scores" * bool(without)
    how = f"{level} intervals: in 95 % of searches, the one that is truly best is the best trial or named here"
    return [f"{of} cannot be told apart from the best trial in {metric} ({how}): {', '.join(ties)}.", *said]


def doubts_in_words(stopped: list[dict], finished: int) -> list[str]:
    """A sentence on the trials of `stopped_in_doubt`. No sentence where there are none.

    Args:
        stopped: the trials.
        finished: the number of trials that --finish has trained so far.
    """
    if not stopped:
        return []
    shown = [f"{row['trial_id']} (at {row['training_iteration']})" for row in stopped[:SHOWN]]
    more = f" and {len(stopped) - SHOWN} more" if len(stopped) > SHOWN else ""
    number = "1 trial was" if len(stopped) == 1 else f"{len(stopped)} trials were"
    return [
        f"{number} stopped and never trained to the end, although not clearly worse than a trial that went on from the "
        f"same rung: {', '.join(shown)}{more}. --resume --finish {finished + 1} trains the first one to the end, "
        f"{finished + 2} the first two, and so on."
    ]
