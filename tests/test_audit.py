"""What a search may claim. Simulated random searches show how often a rule is wrong."""

import itertools
import math
import re

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import tune
from statsmodels.stats.multitest import multipletests

from hpo import search_space
from hpo.results import audit

SPACE = {
    "train_loop_config": {
        "lr": tune.loguniform(5e-6, 2e-4),
        "per_device_bs": tune.choice([1, 2, 4]),
        "wd": tune.choice([0.0, 0.01]),
        "dropout": tune.uniform(0.0, 0.5),
    }
}
RUN = {"arguments": {"metric": "eval_loss"}, "edges": search_space.edges(SPACE)}


def make_search(rng, loss, n=34, model_based=0, later=0):
    """A search whose trials all come to iteration 3; the best `later` of them go on to 12.

    Args:
        rng: all draws are its own.
        loss: of a row of trials.csv, at iteration 3; at 12 it is the same.
        n: the number of trials, drawn at random.
        model_based: so many of them, the last ones, are marked as model-based.
        later: the number of trials that are promoted.
    """
    trials = []
    for i in range(n):
        lr, dropout = math.exp(rng.uniform(math.log(5e-6), math.log(2e-4))), rng.uniform(0, 0.5)
        row = {"trial_id": f"t{i}", "learning_rate": lr, "batch_size": int(rng.choice([1, 2, 4]))}
        row |= {"weight_decay": float(rng.choice([0.0, 0.01])), "dropout": dropout, "model_based": i >= n - model_based}
        trials.append(row | {"training_iteration": 3, "status": "stopped"})
        trials[-1]["eval_loss"] = value = float(loss(trials[-1]))
        trials[-1] |= {"exact_match": -value, "f1": -value}
    for row in sorted(trials, key=lambda row: row["eval_loss"])[:later]:
        row["training_iteration"] = 12
    rows = [
        {"trial_id": t["trial_id"], "training_iteration": i} | {name: t[name] for name in audit.METRICS}
        for t in trials
        for i in (3, 12)
        if i <= t["training_iteration"]
    ]
    return trials, rows


@pytest.fixture(autouse=True)
def no_importance(monkeypatch):
    """Most tests do without the bootstrap of the importance, which takes half a second for each search."""
    monkeypatch.setattr(audit, "RESAMPLES", 2)


def place(row) -> float:
    """Where a learning rate lies in its range, from 0 to 1."""
    return math.log(row["learning_rate"] / 5e-6) / math.log(40)


def said_of_edges(trials, rows):
    losses = np.array([t["eval_loss"] for t in trials])
    best = min(trials, key=lambda t: (-t["training_iteration"], t["eval_loss"]))
    return audit.edges(RUN["edges"], trials, losses, best, 3)


def test_false_alarms_of_edges_stay_below_their_rate():
    """Random searches without any effect: 5 % at most say so of any edge. An optimum inside gives no alarm of lr."""
    rng = np.random.default_rng(0)
    alarms = [bool(said_of_edges(*make_search(rng, lambda row: rng.normal()))) for _ in range(300)]
    assert scipy.stats.binomtest(sum(alarms), 300, audit.ALPHA, alternative="greater").pvalue > 0.05, sum(alarms)
    inside = [
        said_of_edges(*make_search(rng, lambda row: 2 * (place(row) - 0.6) ** 2 + 0.1 * rng.normal()))
        for _ in range(60)
    ]
    assert sum("learning rate" in text for said in inside for text in said) <= 3


@pytest.mark.parametrize("optimum, end, wider", [(1.3, "upper", "5e-06 to 0.001"), (-0.3, "lower", "1e-06 to 0.0002")])
def test_edge_beyond_which_the_optimum_lies_is_found(optimum, end, wider):
    rng, n = np.random.default_rng(1), 40
    said = [
        said_of_edges(*make_search(rng, lambda row: 2 * (place(row) - optimum) ** 2 + 0.1 * rng.normal()))
        for _ in range(n)
    ]
    texts = [text for one in said for text in one if f"{end} edge of learning rate" in text]
    assert len(texts) > 0.6 * n and all(f"Try {wider} next." in text for text in texts)


def test_what_to_try_next_is_allowed():
    space = {
        "lr": tune.loguniform(5e-6, 2e-4),
        "per_device_bs": tune.choice([4, 1, 2]),
        "wd": tune.choice([0.0, 0.01]),
        "warmup_steps": tune.quniform(0.0, 0.2, 0.05),
        "lora_r": tune.lograndint(2, 33),
        "adam_beta1": tune.uniform(0.8, 0.99),
        "optimizer": tune.choice(["a", "b", "c"]),
        "dropout": tune.uniform(0.0, 0.8),
        "fixed": 1,
    }
    found = {name: edge["next"] for name, edge in search_space.edges({"train_loop_config": space}).items()}
    assert found == {
        "lr": [1e-6, 1e-3],
        "per_device_bs": [None, 8],
        "warmup_steps": [None, 0.3],
        "lora_r": [None, 160],  # 2 / 5 is no whole number above 0
        "adam_beta1": [0.705, 0.995],
        "dropout": [None, 0.9],
    }


def test_choices_have_edges_too():
    rng = np.random.default_rng(2)
    trials, rows = make_search(rng, lambda row: -row["batch_size"] + 0.1 * rng.normal())
    (text,) = said_of_edges(trials, rows)
    assert "upper edge of batch size" in text and "Try the choices 1, 2, 4, 8 next." in text


def test_the_best_trial_must_have_the_outermost_choice():
    """The last but one of eleven lies at 0.9 of the range."""
    domains = {"x": {"choices": list(range(11)), "next": [None, 12]}}
    trials = [{"trial_id": str(i), "x": i % 11} for i in range(44)]
    losses = np.array([-float(t["x"]) for t in trials])
    assert len(audit.edges(domains, trials, losses, {"x": 10}, 1)) == 1
    assert audit.edges(domains, trials, losses, {"x": 9}, 1) == []


def test_effects_are_measured_and_their_absence_is_not_claimed_too_often():
    """A learning rate with its best value inside its range has an effect. Others have a false effect in 5 % at most."""
    rng, p_values = np.random.default_rng(3), []
    for _ in range(100):
        trials, _ = make_search(rng, lambda row: 2 * (place(row) - 0.5) ** 2 + 0.05 * rng.normal())
        losses = np.array([t["eval_loss"] for t in trials])
        names = ("learning_rate", "weight_decay", "dropout")
        p_values.append([audit.effect([t[name] for t in trials], losses) for name in names])
    significant = (np.array(p_values) < 0.05).mean(axis=0)
    assert significant[0] > 0.9 and max(significant[1:]) <= 0.11, significant


def test_audit_of_a_search():
    """Only lr has an effect. The model-based trials are like the random ones. EM says the opposite of eval_loss."""
    rng = np.random.default_rng(4)
    trials, rows = make_search(rng, lambda row: -place(row) + 0.05 * rng.normal(), model_based=14, later=9)
    for row in rows:
        row["exact_match"] = row["eval_loss"]
    said, table = audit.audit(RUN, trials, rows)
    text = "\n".join(said)
    for name in ("batch size", "weight decay", "dropout"):
        assert f"No effect of {name} could be measured at iteration 3 (Kruskal-Wallis test, corrected p = " in text
    assert "upper edge of learning rate" in text and "20 random trials" in text and "share of the importance" in text
    assert "At iteration 3 a model-based suggestion was better than a random one in " in text
    assert "of 100 pairs, not measurably more than by chance (90 % interval " in text
    assert "WARNING: eval_loss at 3 and exact_match at 3 rank the trials differently (Kendall's tau -1.00" in text
    assert "f1 at 3" not in text and ["eval_loss at 3", "f1 at 3", "34", "1.00", "1.00 to 1.00"] in table
    assert [row[:3] for row in table[-1:]] == [["eval_loss at 3", "eval_loss at 12", "9"]]


def test_importance_has_a_range_of_resamples(monkeypatch):
    """Of 100 resamples, as in a search: the shares add up to 1, each within its range. More trials: it is shorter."""
    monkeypatch.setattr(audit, "RESAMPLES", 100)
    widths = []
    for n in (20, 80):
        trials, rows = make_search(np.random.default_rng(14), lambda row: 2 * (place(row) - 0.5) ** 2, n=n)
        found = audit.importance(trials, rows, ["learning_rate", "dropout"], "eval_loss", 3)
        assert sum(share for share, _, _ in found.values()) == pytest.approx(1)
        assert all(0 <= low <= share <= high <= 1 and low < high for share, low, high in found.values()), found
        widths.append(found["learning_rate"][2] - found["learning_rate"][1])
    assert widths[1] < widths[0]


def test_rankings_of_few_trials_that_differ():
    """It is not a warning, as the interval is wide."""
    orders = {"eval_loss": [0, 1, 2, 3, 4, 5, 6], "exact_match": [2, 4, 0, 6, 1, 3, 5], "f1": [0, 1, 2, 3, 4, 6, 5]}
    values = {name: {3: {f"t{i}": float(x) for i, x in enumerate(order)}} for name, order in orders.items()}
    (said,), rows = audit.correlations(values, "eval_loss", [3])
    assert said == (
        "Too few trials to know whether these pairs rank the trials in the same way: eval_loss at 3 and exact_match "
        "at 3 (Kendall's tau 0.24, 95 % interval -0.47 to 0.76, 7 trials)."
    )
    assert rows[1][2:] == ["7", "0.24", "-0.47 to 0.76"]


def test_model_that_is_better_than_chance_and_best_trial_that_is_not_its_own():
    rng = np.random.default_rng(5)
    trials, rows = make_search(rng, lambda row: rng.normal() - 3 * row["model_based"], n=24, model_based=10)
    text = "\n".join(audit.audit(RUN, trials, rows)[0])
    assert "of 100 pairs, more than by chance (" in text and "The best trial" not in text
    for row in [trials[0], next(r for r in rows if r["trial_id"] == "t0")]:
        row["eval_loss"] = -9.0
    assert "The best trial, t0, is a random suggestion" in "\n".join(audit.audit(RUN, trials, rows)[0])
    trials[0]["known"] = True
    assert "The best trial, t0, is a known setting" in "\n".join(audit.audit(RUN, trials, rows)[0])


def test_trials_that_were_promoted_are_not_compared_with_chance_again():
    """At 12 both kinds had to be among the best at 3. Trials that begin at 12 are compared there."""
    rng = np.random.default_rng(6)
    trials, rows = make_search(rng, lambda row: rng.normal(), model_based=17, later=20)
    assert not any("At iteration 12" in text for text in audit.audit(RUN, trials, rows)[0])
    began_later = {t["trial_id"] for t in trials if t["training_iteration"] == 12}
    for row in rows:  # as in a bracket whose first rung is 12: EM is computed at rungs only
        if row["trial_id"] in began_later and row["training_iteration"] == 3:
            row["exact_match"] = row["f1"] = None
    assert any("At iteration 12" in text for text in audit.audit(RUN, trials, rows)[0])


@pytest.mark.parametrize("model_based, random, chance", [(11, 14, 0.5), (11, 14, 0.9), (20, 10, 0.9), (40, 20, 0.95)])
def test_interval_of_the_chance_covers_the_true_value(model_based, random, chance):
    """Of two normal distributions. The plain interval of Brunner and Munzel, at 90 %, has it in 83 to 90 %."""
    rng, shift, covered, known = np.random.default_rng(13), math.sqrt(2) * scipy.stats.norm.ppf(chance), 0, 0
    for _ in range(600):
        _, ends = audit.chance_of_better(list(rng.normal(shift, 1, model_based)), list(rng.normal(0, 1, random)))
        if ends:
            known += 1
            covered += ends[0] <= chance <= ends[1]
    assert known > 500 and covered / known > 0.85, (known, covered / known)


def test_trials_that_fail_in_a_later_bracket_are_the_worst_there():
    """Half of the model-based trials of a bracket that begins at 12 fail at 7. They have a result at 3, without EM."""
    trials, rows = [], []
    for i in range(24):
        kind = "first" if i < 8 else "random" if i < 14 else "model" if i < 19 else "failing"
        result, last = {"first": (2.0, 3), "random": (1.0, 12), "model": (0.5, 12), "failing": (0.1, 7)}[kind]
        trial = {"trial_id": f"t{i}", "learning_rate": 1e-5, "batch_size": 1, "weight_decay": 0.0}
        trial |= {"status": "stopped", "model_based": kind in ("model", "failing")}
        trial |= {"training_iteration": last, "eval_loss": result + i / 1e3}
        at = [3] if kind == "first" else [3, 7, 12][: 2 if kind == "failing" else 3]
        rung = {"first": 3, "failing": None}.get(kind, 12)
        for t in at:
            em = 0.5 if t == rung else None
            row = {"trial_id": trial["trial_id"], "training_iteration": t, "eval_loss": trial["eval_loss"]}
            rows.append(row | {"exact_match": em, "f1": em})
        if kind == "failing":
            trial |= {"status": "failed", "training_iteration": 0, "eval_loss": None}
        trials.append(trial | {"exact_match": None, "f1": None})
    text = "\n".join(audit.audit(RUN | {"edges": {}}, trials, rows)[0])
    assert "At iteration 12 a model-based suggestion was better than a random one in 50 of 100 pairs" in text, text
    assert "At iteration 3 a model-based suggestion was better than a random one in 50 of 100 pairs" in text, text


def test_failed_trial_is_as_bad_as_can_be():
    """The trials with a learning rate in the upper half fail: an effect, and the best trials are at the lower edge."""
    rng = np.random.default_rng(7)
    trials, rows = make_search(rng, place)
    failed = {t["trial_id"] for t in trials if place(t) > 0.5}
    for trial in trials:
        if trial["trial_id"] in failed:
            trial |= dict.fromkeys(audit.METRICS) | {"status": "failed", "training_iteration": 0}
    said, _ = audit.audit(RUN, trials, [row for row in rows if row["trial_id"] not in failed])
    text = "\n".join(said)
    assert "lower edge of learning rate" in text and "34 random trials" in text and "effect of learning" not in text


def test_older_runs_say_nothing_of_edges():
    rng = np.random.default_rng(8)
    trials, rows = make_search(rng, lambda row: -place(row))
    said, _ = audit.audit({"arguments": {"metric": "eval_loss"}}, trials, rows)
    assert said and not any("edge" in text for text in said)


@pytest.mark.parametrize("metric", audit.METRICS)
def test_same_result_everywhere(metric):
    """For example EM 0 of all trials: nothing is ranked, and nothing claimed but that."""
    trials, rows = make_search(np.random.default_rng(9), lambda row: 0.0, model_based=10, later=8)
    said, table = audit.audit(RUN | {"arguments": {"metric": metric}}, trials, rows)
    assert not any("edge" in text or "WARNING" in text or "No effect" in text for text in said)
    assert "all are the same" in table[1]


cell = st.one_of(st.sampled_from([None, math.nan, math.inf, 0.0]), st.floats(-1e3, 1e3))


@settings(max_examples=60)
@given(
    st.lists(st.tuples(cell, cell, st.sampled_from([0, 1, 4]), st.booleans(), st.booleans()), max_size=14),
    st.sampled_from(audit.METRICS),
    st.sampled_from([None, "adam", 3, 0.5]),
)
def test_any_tables_can_be_audited(found, metric, extra):
    """Failed trials, NaN, ties, none at all, SQuAD 2.0, further hyperparameters of any type."""
    trials, rows = [], []
    for i, (loss, em, iteration, model_based, known) in enumerate(found):
        row = {"trial_id": f"t{i}", "learning_rate": 1e-5 * (1 + i), "batch_size": 1 + i % 2, "weight_decay": 0.0}
        metrics = {"eval_loss": loss, "exact_match": em, "f1": em, "HasAns_f1": em}
        status = "stopped" if iteration else "failed"
        row |= {"dropout": 0.1, "optimizer": extra if i % 2 else "other", "training_iteration": iteration}
        trials.append(row | metrics | {"status": status, "model_based": model_based and not known})
        if known:
            trials[-1]["known"] = True
        rows += [{"trial_id": f"t{i}", "training_iteration": t} | metrics for t in (1, 4) if t <= iteration]
    said, table = audit.audit(RUN | {"arguments": {"metric": metric}}, trials, rows)
    assert all("nan" not in text for text in said) and all(len(row) == 5 for row in table)


@pytest.mark.parametrize("p_values", [[0.2], [0.04, 0.01, 0.03], [0.5, 0.5, 0.001, 0.02], [0.0, 1.0]])
def test_holm_is_that_of_statsmodels(p_values):
    assert audit.holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])


@pytest.mark.parametrize("n", [6, 9, 20, 60])
@pytest.mark.parametrize("r", [0.0, 0.6, 0.9])
def test_interval_of_kendalls_tau_covers_the_true_value(n, r):
    """Of pairs from a normal distribution with correlation r, tau is 2 asin(r) / pi. At least 92 % is asserted: the
    interval is an approximation.
    """
    rng, covered = np.random.default_rng(10), 0
    for _ in range(400):
        a, b = rng.multivariate_normal([0, 0], [[1, r], [r, 1]], size=n).T
        _, _, low, high = audit.kendall(dict(enumerate(a)), dict(enumerate(b)))
        covered += low <= 2 / math.pi * math.asin(r) <= high
    assert covered / 400 > 0.92, covered / 400


def test_interval_of_kendalls_tau_with_ties():
    """EM of 40 questions, by trial: a third of the pairs have the same. The true tau-b is that of 20,000 trials."""
    rng = np.random.default_rng(11)

    def trials(n):
        skill = rng.normal(size=n)
        return skill + rng.normal(size=n), rng.binomial(40, scipy.special.expit(0.2 * skill + 1)) / 40

    true, covered = float(scipy.stats.kendalltau(*trials(20_000)).statistic), 0
    for _ in range(400):
        _, _, low, high = audit.kendall(*(dict(enumerate(values)) for values in trials(25)))
        covered += low <= true <= high
    assert covered / 400 > 0.92, covered / 400


@pytest.mark.parametrize("n, model_based", [(12, 4), (25, 15), (60, 40)])
def test_false_claims_of_the_model_stay_below_their_rate(n, model_based):
    """Where the model's suggestions are as random ones, 5 % of searches at most say that they are better. The 90 %
    interval has the true chance, one half.
    """
    rng, claims, covered, searches = np.random.default_rng(12), 0, 0, 400
    for _ in range(searches):
        trials, rows = make_search(rng, lambda row: rng.normal(), n=n, model_based=model_based)
        values = {name: audit.results(rows, name) for name in audit.METRICS}
        said = audit.of_the_model(trials, values, "eval_loss", [3], values["eval_loss"][3])
        (text,) = [t for t in said if "At" in t]
        claims += ", more than by chance" in text
        interval = re.search(r"90 % interval (\d+) to (\d+)", text)
        covered += interval is None or int(interval[1]) <= 50 <= int(interval[2])
    assert scipy.stats.binomtest(claims, searches, audit.ALPHA, alternative="greater").pvalue > 0.05, claims
    assert covered / searches > 0.85, covered / searches


def test_thirds_are_by_rank_and_choices_stay():
    assert list(audit.groups([0.1 * i for i in range(9)])) == list(itertools.chain([1] * 3, [2] * 3, [3] * 3))
    assert list(audit.groups(["b", "a", "b", None])) == [2, 1, 2, 0]
