"""What a search may claim: edges of ranges, hyperparameters without effect, the model against chance, the metric.

Hyperparameters are tested on random suggestions only. The model varies all hyperparameters together, towards good
results. So among its trials even a hyperparameter without any effect correlates with good results. docs/results.md has
the numbers.
"""

import itertools
import math

import numpy as np
import scipy.special
import scipy.stats
from statsmodels.stats.nonparametric import rank_compare_2indep

from hpo.results.tables import COLUMNS, KNOWN_SETTING, METRICS, badness, hyperparameter_columns, origin, ranked

ALPHA = 0.05  # of all edges together, of all effects together, and of each comparison with the model's suggestions
MIN_RANDOM = 10  # random trials for the tests of hyperparameters
MIN_KIND = 4  # model-based and random trials each, to compare them
MIN_PAIRS = 6  # trials for a rank correlation; its interval needs more than 4
LOW = 0.5  # Kendall's tau below it: two metrics agree on less than three of four pairs of trials
RESAMPLES = 100  # of the bootstrap of the importance


def audit(run: dict, trials: list[dict], iterations: list[dict]) -> tuple[list[str], list[list[str]]]:
    """What can be said of a search, at any time.

    Args:
        run: the content of run.json. That of an older version has no "edges", and nothing is said about them.
        trials: the rows of trials.csv.
        iterations: the rows of iterations.csv.

    Returns:
        Sentences, and the table of rank correlations, whose first row is the header. No rows: too few results.
    """
    metric, rungs = run["arguments"]["metric"], sorted({t["training_iteration"] for t in trials} - {0})
    if not rungs or not math.isfinite(badness(ranked(trials, metric)[0], metric)):
        return [], []
    values = {name: results(iterations, name) for name in METRICS}
    first = dict(values[metric].get(rungs[0], {}))
    # A failed trial that never came to a rung is as bad as one with NaN. In a bracket that begins at a later rung, it
    # may have a result at the first one.
    failed = [t["trial_id"] for t in trials if t["status"] == "failed" and t["training_iteration"] == 0]
    first |= dict.fromkeys(failed, math.inf)
    drawn = [t for t in trials if origin(t) == "random" and t["trial_id"] in first]
    losses = np.array([first[t["trial_id"]] for t in drawn])
    warnings, table = correlations(values, metric, rungs)
    said = edges(run.get("edges", {}), drawn, losses, ranked(trials, metric)[0], rungs[0])
    said += no_effect(trials, iterations, metric, drawn, losses, rungs[0])
    return said + of_the_model(trials, values, metric, rungs, first) + warnings, table


def results(iterations: list[dict], metric: str) -> dict[int, dict[str, float]]:
    """The finite results of each iteration by trial, lower is better. Of an iteration that ran twice, the second."""
    found: dict[int, dict[str, float]] = {}
    for row in iterations:
        if math.isfinite(badness(row, metric)):
            found.setdefault(row["training_iteration"], {})[row["trial_id"]] = badness(row, metric)
    return found


def holm(p_values: list[float]) -> np.ndarray:
    """The p values after Holm's correction (1979): the chance of any false alarm among them stays below ALPHA.

    Not that of statsmodels, which collects garbage each time: half a second in a search.
    """
    order, n = np.argsort(p_values), len(p_values)
    corrected = np.empty(n)
    corrected[order] = np.minimum(1, np.maximum.accumulate(np.sort(p_values) * np.arange(n, 0, -1)))
    return corrected


def words(column: str) -> str:
    """A column of trials.csv as it is written in a sentence."""
    return column.replace("_", " ")


# ---------------------------------------------------------------------------------------------------------------------
# hyperparameters


def position(edge: dict, value: float) -> float:
    """Where a value lies in its domain: 0 at the lower edge, 1 at the upper one."""
    if "choices" in edge:
        return edge["choices"].index(value) / (len(edge["choices"]) - 1)
    lower, upper = edge["lower"], edge["upper"]
    if edge["log"]:
        lower, upper, value = math.log(lower), math.log(upper), math.log(value)
    return (value - lower) / (upper - lower)


def edges(domains: dict, drawn: list[dict], losses: np.ndarray, best: dict, rung: int) -> list[str]:
    """A sentence for each edge that the best trials crowd at.

    The rule: the best quarter of the random trials lies nearer to the edge than the others (one-sided Mann-Whitney
    test, Holm's correction over all edges), and the best trial of the search lies in the outer tenth of the range, or
    has the outermost choice.
    Where hyperparameters have no effect, a search says so at any edge with a chance of at most ALPHA.

    Args:
        domains: "edges" of run.json. An edge that cannot be moved has None in "next".
        drawn: the random trials with a result at the first rung.
        losses: their results.
        best: the best trial.
        rung: the iteration of the first rung.
    """
    if len(losses) < MIN_RANDOM:
        return []
    top = losses <= np.sort(losses)[math.ceil(len(losses) / 4) - 1]
    if top.sum() > len(losses) / 2 or not np.isfinite(losses[top]).all():  # ties: there is no best quarter
        return []
    found = []
    for name, edge in domains.items():
        column = COLUMNS.get(name, name)
        places = np.array([position(edge, t[column]) for t in drawn])
        for end, value in enumerate(edge["next"]):
            if value is not None:
                near, at = places, position(edge, best[column])
                near, at = (near, at) if end else (1 - near, 1 - at)
                p = scipy.stats.mannwhitneyu(near[top], near[~top], alternative="greater").pvalue
                found.append((column, edge, end, at, p))
    said = []
    for (column, edge, end, at, _), p in zip(found, holm([f[-1] for f in found]), strict=True):
        if p < ALPHA and at >= (1 if "choices" in edge else 0.9):
            values = list(edge.get("choices", [edge.get("lower"), edge.get("upper")]))
            if "choices" in edge:
                wider = "the choices " + ", ".join(f"{v:g}" for v in sorted([*values, edge["next"][end]]))
            else:
                values[end] = edge["next"][end]
                wider = f"{values[0]:g} to {values[1]:g}"
            said.append(
                f"The best trials crowd at the {['lower', 'upper'][end]} edge of {words(column)} (corrected p = "
                f"{p:.2g}, {len(losses)} random trials at iteration {rung}; at most 5 % of searches without any effect "
                f"say this). Try {wider} next."
            )
    return said


def groups(values: list) -> np.ndarray:
    """The group of each value: the value itself if there are at most five, otherwise the third of the sorted values."""
    distinct = sorted({str(value) for value in values})
    if len(distinct) <= 5 or not all(isinstance(value, int | float) for value in values):
        return np.array([distinct.index(str(value)) for value in values])
    return np.ceil(3 * scipy.stats.rankdata(values) / len(values)).astype(int)


def effect(values: list, losses: np.ndarray) -> float:
    """The p value of the Kruskal-Wallis test over `groups`, by permutation. It also sees an optimum inside the range.

    NaN where there is one group only, or all results are the same.
    """
    group = groups(values)
    if len(np.unique(group)) < 2 or len(np.unique(losses)) < 2:
        return math.nan
    ranks = scipy.stats.rankdata(losses)  # infinite results too
    samples = [ranks[group == g] for g in np.unique(group)]

    def statistic(*parts, axis=-1):
        return sum(part.sum(axis=axis) ** 2 / part.shape[axis] for part in parts)  # H, but for constants

    return scipy.stats.permutation_test(
        samples, statistic, alternative="greater", n_resamples=1999, vectorized=True, rng=0
    ).pvalue


def importance(trials: list[dict], iterations: list[dict], columns: list[str], metric: str, rung: int) -> dict:
    """The share of each hyperparameter in PED-ANOVA's importance, and its range in bootstrap samples of trials.

    The range has the 2.5 and 97.5 percentiles of RESAMPLES samples (Efron 1979). It is no interval of a true share:
    with few trials the share itself is too low or too high, see docs/results.md.

    Returns:
        (share, lower, upper) by column; empty where PED-ANOVA finds no importance at all.
    """
    import optuna

    from hpo.results import figures  # slow, like optuna

    study = figures.studies(trials, iterations, columns, metric).get(rung)
    if study is None or len(study.trials) < figures.MIN_RESULTS:
        return {}
    evaluator, rng = optuna.importance.PedAnovaImportanceEvaluator(), np.random.default_rng(0)

    def shares(sample: list) -> list[float]:
        other = optuna.create_study(direction=study.direction)
        other.add_trials(sample)
        found = evaluator.evaluate(other)
        total = sum(found.values())
        return [found.get(name, 0) / total if total > 0 else math.nan for name in columns]

    all_trials = study.trials  # a copy each time
    point = shares(all_trials)
    drawn = rng.choice(len(all_trials), (RESAMPLES, len(all_trials)))
    sampled = np.array([shares([all_trials[i] for i in indices]) for indices in drawn])
    sampled = sampled[np.isfinite(sampled).all(axis=1)]
    if not np.isfinite(point).all() or not len(sampled):
        return {}
    low, high = np.percentile(sampled, [2.5, 97.5], axis=0)
    return {name: (point[i], low[i], high[i]) for i, name in enumerate(columns)}


def no_effect(trials, iterations, metric: str, drawn: list[dict], losses: np.ndarray, rung: int) -> list[str]:
    """A sentence for each hyperparameter whose effect cannot be measured. The arguments are those of the others."""
    if len(losses) < MIN_RANDOM:
        return []
    tested = {name: effect([t[name] for t in drawn], losses) for name in hyperparameter_columns(trials)}
    tested = {name: p for name, p in tested.items() if math.isfinite(p)}
    without = {name: p for name, p in zip(tested, holm(list(tested.values())), strict=True) if p >= ALPHA}
    share = importance(trials, iterations, list(tested), metric, rung) if without and len(tested) > 1 else {}
    said = []
    for name, p in without.items():
        shown = "; its share of the importance is {:.2f}, and {:.2f} to {:.2f} in 95 of 100 resamples of the trials"
        more = shown.format(*share[name]) if name in share else ""
        said.append(
            f"No effect of {words(name)} could be measured at iteration {rung} (Kruskal-Wallis test, corrected p = "
            f"{p:.2g}, {len(losses)} random trials{more})."
        )
    return said


# ---------------------------------------------------------------------------------------------------------------------
# the model


def of_the_model(trials: list[dict], values: dict, metric: str, rungs: list[int], first: dict) -> list[str]:
    """Whether the model-based suggestions were better than the random ones, and where the best trial came from.

    At the first rung all trials are compared, at a later one only those that start there: promoted ones had to pass the
    same comparison before. A trial starts at its first iteration with an EM. With EM or F1 as the metric every
    iteration has one, so only the first rung is used. The p value is of the one-sided Mann-Whitney test.

    Args:
        trials: the rows of trials.csv.
        values: `results` of each metric.
        metric: trials are compared by it.
        rungs: their iterations.
        first: results at the first rung by trial. Infinite ones are of trials that have failed before they came to a
            rung. At a later rung they count as the worst too, if they have passed the one before without an EM.
    """
    kinds, said = {t["trial_id"]: origin(t) for t in trials}, []
    best = ranked(trials, metric)[0]
    if "model" in kinds.values() and origin(best) != "model":
        source = "a known setting" if origin(best) == KNOWN_SETTING else "a random suggestion"
        said.append(f"The best trial, {best['trial_id']}, is {source} and not one of the model.")
    start: dict[str, int] = {}
    for iteration in sorted(values["exact_match"]):
        for trial_id in values["exact_match"][iteration]:
            start.setdefault(trial_id, iteration)
    for before, rung in zip([0, *rungs], rungs, strict=False):
        if before == 0:
            fair = first
        else:
            fair = {i: loss for i, loss in values[metric].get(rung, {}).items() if start.get(i, 0) >= rung}
            passed = {i for t, found in values[metric].items() if before <= t < rung for i in found}
            fair |= {i: math.inf for i in passed if first.get(i) == math.inf and i not in start and i not in fair}
        model, random = ([-loss for i, loss in fair.items() if kinds.get(i) == kind] for kind in ("model", "random"))
        if min(len(model), len(random)) < MIN_KIND:
            continue
        p = scipy.stats.mannwhitneyu(model, random, alternative="greater").pvalue
        chance, ends = chance_of_better(model, random)
        interval = f"90 % interval {100 * ends[0]:.0f} to {100 * ends[1]:.0f}, " if ends else ""
        how = "more" if p < ALPHA else "not measurably more"
        said.append(
            f"At iteration {rung} a model-based suggestion was better than a random one in "
            f"{100 * chance:.0f} of 100 pairs, {how} than by chance ({interval}one-sided p = {p:.2g}, "
            f"{len(model)} model-based, {len(random)} random)."
        )
    return said


def chance_of_better(one: list[float], other: list[float]) -> tuple[float, tuple[float, float] | None]:
    """The probability that a draw of the first kind is higher (a tie is half), and its 90 % interval.

    The interval has the variance of Brunner and Munzel (2000) on the logit scale, as in Pauly, Asendorf and Konietschke
    (Biometrical Journal 2016): near 0 and 1 the plain one is too short. None where all of one kind are higher.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        compared = rank_compare_2indep(one, other)
    p, error = float(compared.prob1), math.sqrt(compared.var_prob)
    if not 0 < p < 1 or not error > 0:
        return p, None
    half = scipy.stats.t.ppf(1 - ALPHA, compared.df) * error / (p * (1 - p))  # of two sides, as the test has one
    low, high = scipy.special.expit(scipy.special.logit(p) + np.array([-half, half]))
    return p, (float(low), float(high))


# ---------------------------------------------------------------------------------------------------------------------
# the metric


def kendall(one: dict[str, float], other: dict[str, float]) -> tuple[int, float, float, float]:
    """Kendall's tau-b of two results by trial, with its 95 % interval: (number of trials, tau, lower, upper).

    The interval is that of Fisher's z with the variance 0.437 / (n - 4) of Fieller, Hartley & Pearson (1957), as in
    Bonett & Wright (2000). A tau of 1 is taken as one that is half a pair lower. NaN where all results are the same.
    """
    both = sorted(one.keys() & other.keys())
    n = len(both)
    if n < MIN_PAIRS:
        return n, math.nan, math.nan, math.nan
    tau = float(scipy.stats.kendalltau([one[i] for i in both], [other[i] for i in both]).statistic)
    most = 1 - 1 / math.comb(n, 2)
    z, width = math.atanh(min(max(tau, -most), most)), 1.96 * math.sqrt(0.437 / (n - 4))
    return n, tau, math.tanh(z - width), math.tanh(z + width)


def correlations(values: dict, metric: str, rungs: list[int]) -> tuple[list[str], list[list[str]]]:
    """Warnings where two rankings of the trials differ, and the table of the rank correlations.

    Args:
        values: `results` of each metric.
        metric: trials are compared by it.
        rungs: their iterations.

    Returns:
        A warning for each tau whose whole interval is below LOW, a sentence on all others below LOW, and the rows of
        the table.
    """
    compared = []
    for rung in rungs:
        for name in METRICS[1:]:
            pair = values["eval_loss"].get(rung, {}), values[name].get(rung, {})
            compared.append((f"eval_loss at {rung}", f"{name} at {rung}", kendall(*pair), ""))
    for rung, later in itertools.combinations(rungs, 2):
        pair = values[metric].get(rung, {}), values[metric].get(later, {})
        selected = ", many of them promoted, which lowers it"
        compared.append((f"{metric} at {rung}", f"{metric} at {later}", kendall(*pair), selected))
    rows, said, unclear = [["Ranking by", "Ranking by", "Trials", "Kendall's tau", "95 % interval"]], [], []
    for one, other, (n, tau, low, high), note in compared:
        if n >= MIN_PAIRS:
            cells = [f"{tau:.2f}", f"{low:.2f} to {high:.2f}"] if math.isfinite(tau) else ["all are the same", ""]
            rows.append([one, other, str(n), *cells])
            if high < LOW:
                said.append(
                    f"WARNING: {one} and {other} rank the trials differently (Kendall's tau {tau:.2f}, 95 % interval "
                    f"{low:.2f} to {high:.2f}, {n} trials{note})."
                )
            elif tau < LOW:
                where = f"Kendall's tau {tau:.2f}, 95 % interval {low:.2f} to {high:.2f}, {n} trials{note}"
                unclear.append(f"{one} and {other} ({where})")
    if unclear:
        pairs = "; ".join(unclear)
        said.append(f"Too few trials to know whether these pairs rank the trials in the same way: {pairs}.")
    return said, rows if len(rows) > 1 else []
