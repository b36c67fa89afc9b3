"""bohb.py against Ray's own classes: every difference has a test that Ray's classes fail and ours pass.

The parametrised tests run with both pairs; what Ray's pair does is asserted too, so that a test cannot pass for both.
Numbers in names are those of the list in README.md, "What is corrected".
"""

import json
import logging
import math
import pickle
import random
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import ray.tune.schedulers
import ray.tune.search.bohb
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.result import SHOULD_CHECKPOINT
from ray.tune.schedulers import TrialScheduler
from ray.tune.trainable import wrap_function

from hpo.bohb import brackets, kde, scheduler, searcher
from hpo.plan.simulator import SimulatedTrial, Simulation

SPACE = {
    "train_loop_config": {
        "lr": tune.loguniform(5e-6, 2e-4),
        "per_device_bs": tune.choice([1, 2]),
        "wd": tune.choice([0.0, 0.01]),
    }
}
RAYS = (ray.tune.search.bohb.TuneBOHB, ray.tune.schedulers.HyperBandForBOHB)
OURS = (searcher.TuneBOHB, scheduler.HyperBandForBOHB)


def loss(config, t):
    """Best at lr 8e-5, falls with t."""
    searched = config["train_loop_config"]
    return math.log(searched["lr"] / 8e-5) ** 2 + 3 * math.exp(-t / 10) + 0.1 * searched["per_device_bs"]


def pair(classes, seed=0, max_t=50, reduction_factor=4, stop_last_trials=False, mode="min", space=SPACE, **searcher):
    search_class, scheduler_class = classes
    search_alg = search_class(seed=seed, **searcher)
    search_alg.set_search_properties("eval_loss", mode, space)
    scheduler = scheduler_class(
        time_attr="training_iteration",
        metric="eval_loss",
        mode=mode,
        max_t=max_t,
        reduction_factor=reduction_factor,
        stop_last_trials=stop_last_trials,
    )
    return search_alg, scheduler


def simulate(classes, num_samples=34, slots=1, train=loss, max_t=50, sim={}, **options):
    search_alg, scheduler = pair(classes, max_t=max_t, **options)
    simulation = Simulation(search_alg, scheduler, num_samples, train, slots=slots, max_t=max_t, **sim)
    simulation.run()
    return search_alg, scheduler, simulation


# Each new search builds a model on made-up losses first, which has tests of its own: thousands of searches need not.
unchecked = mock.patch.object(searcher.TuneBOHB, "_check_model", lambda self: None)


def results_per_budget(num_samples: int, max_t: int, reduction_factor: float) -> dict[int, int]:
    """How many results each budget will hold when num_samples trials have run without a failure."""
    counts: dict[int, int] = {}
    left = num_samples
    while left > 0:
        for bracket in brackets.rungs(max_t, reduction_factor):
            n = min(left, bracket[0][0])
            left -= n
            for i, (_, budget) in enumerate(bracket):
                if n:
                    counts[budget] = counts.get(budget, 0) + math.ceil(n / reduction_factor**i - 1e-9)
    return counts


def told(search_alg) -> Counter:
    """How many results the model was told of, by budget."""
    return Counter({budget: len(losses) for budget, losses in search_alg.bohber.losses.items()})


# -- 1: enough results at one budget ----------------------------------------------------------------------------------


def test_1_default_band_reaches_the_model():
    """At least a third of the suggestions after the eighth result at one budget are model-based, for every seed."""
    for seed in range(20):
        search_alg, _, simulation = simulate(OURS, seed=seed)
        eighth = next(i for i in range(34) if Counter(o["budget"] for o in search_alg.observations[:i]).most_common(1)
                      and Counter(o["budget"] for o in search_alg.observations[:i]).most_common(1)[0][1] >= 8)  # fmt: skip
        assert eighth <= 9
        later = list(search_alg.suggested.values())[eighth + 1 :]  # one suggestion is made ahead of time
        assert sum(s["model_based"] for s in later) >= len(later) / 3


def test_1_workshop_setting_is_seen_through():
    """12 samples, max_t 5, reduction factor 4: with Ray's classes never a model; with ours as soon as there are 8 results."""
    def picks(classes, seed):
        search_alg, _ = pair(classes, seed=seed, max_t=5)
        get_config, infos = search_alg.bohber.get_config, []

        def spy(budget=None):
            config, info = get_config(budget)
            infos.append(info["model_based_pick"])
            return config, info

        search_alg.bohber.get_config = spy
        scheduler = pair(classes, max_t=5)[1]
        Simulation(search_alg, scheduler, 12, loss, max_t=5).run()
        return sum(infos)

    assert sum(picks(RAYS, seed) for seed in range(20)) == 0
    assert sum(picks(OURS, seed) for seed in range(20)) > 0
    assert results_per_budget(12, 5, 4) == {1: 8, 5: 6}


# -- 2: a model that fails says so ------------------------------------------------------------------------------------


def break_model(search_alg):
    def broken(*args, **kwargs):
        raise AttributeError("as after a change of an interface")

    for pair_of in search_alg.bohber.kde_models.values():
        for density in pair_of.values():
            density.pdf = broken
            del density.data


def test_2_failure_of_the_model_is_not_random_search():
    suggested = {}
    for classes in (RAYS, OURS):
        search_alg, _, _ = simulate(classes)
        search_alg.bohber.random_fraction = 0
        assert search_alg.bohber.kde_models
        break_model(search_alg)
        try:
            suggested[classes] = search_alg.suggest("new")
        except AttributeError as error:
            suggested[classes] = str(error)
    assert isinstance(suggested[RAYS], dict)  # a random suggestion
    assert isinstance(suggested[OURS], str)


def test_2_model_is_tried_before_the_search(monkeypatch):
    monkeypatch.setattr(kde.BOHB, "new_result", lambda *args, **kwargs: args[0].configs.update({1: []}))
    with pytest.raises(RuntimeError, match="model cannot be built"):
        pair(OURS)


# -- 3: every result reaches the model --------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("stop_last_trials", [False, True])
def test_3_all_results_reach_the_model_once(slots, stop_last_trials):
    search_alg, _, _ = simulate(OURS, slots=slots, stop_last_trials=stop_last_trials)
    assert told(search_alg) == {3: 22, 12: 6 + 8, 50: 2 + 2 + 4}
    seen = Counter((o["trial_id"], o["budget"]) for o in search_alg.observations)
    assert set(seen.values()) == {1}

    rays, _, _ = simulate(RAYS, slots=slots, stop_last_trials=stop_last_trials)
    assert told(rays).total() < 44


def test_3_values_are_those_reported():
    search_alg, _, simulation = simulate(OURS, slots=2)
    reported = {(trial_id, t): value for _, _, trial_id, t, value in simulation.reports}
    for o in search_alg.observations:
        assert o["loss"] == reported[o["trial_id"], o["budget"]]


def test_3_mode_max():
    """With mode max the model is told of the negative, and the largest are promoted."""
    low, _, low_simulation = simulate(OURS)
    high, _, high_simulation = simulate(OURS, mode="max", train=lambda config, t: -loss(config, t))
    assert [o["loss"] for o in high.observations] == [o["loss"] for o in low.observations]
    assert [r[2:4] for r in high_simulation.reports] == [r[2:4] for r in low_simulation.reports]


# -- 4: brackets ------------------------------------------------------------------------------------------------------


def test_4_brackets_end_at_max_t_and_share_budgets():
    assert brackets.rungs(50, 4) == [[(22, 3), (6, 12), (2, 50)], [(8, 12), (2, 50)], [(4, 50)]]
    assert brackets.rungs(27, 3) == [[(27, 1), (9, 3), (3, 9), (1, 27)], [(12, 3), (4, 9), (2, 27)], [(6, 9), (2, 27)], [(4, 27)]]
    assert brackets.rungs(1, 4) == [[(1, 1)]]
    assert brackets.band_size(50, 4) == 34

    rays = pair(RAYS, max_t=50, reduction_factor=3)[1]
    budgets = set()
    for s in range(rays._s_max_1):
        if rays._get_r0(s):
            bracket = rays._create_bracket(s)
            budgets.add(bracket._cumul_r)
            for _ in range(s):
                bracket.successive_halving("eval_loss", 1)
                budgets.add(bracket._cumul_r)
    assert len(budgets) == 10  # 1 3 9 27, 5 15 45, 16 48, 50: hardly one has enough results for a model
    assert {budget for bracket in brackets.rungs(50, 3) for _, budget in bracket} == {1, 5, 16, 50}


@given(max_t=st.integers(1, 300), reduction_factor=st.integers(2, 10))
def test_4_rungs_are_sound(max_t, reduction_factor):
    band = brackets.rungs(max_t, reduction_factor)
    assert band
    for bracket in band:
        sizes, budgets = zip(*bracket)
        assert budgets[-1] == max_t and list(budgets) == sorted(set(budgets)) and budgets[0] >= 1
        assert list(sizes) == sorted(sizes, reverse=True) and sizes[-1] >= 1
        for larger, smaller in zip(sizes, sizes[1:]):
            assert smaller <= math.ceil(larger / reduction_factor)


@given(num_samples=st.integers(1, 80), max_t=st.integers(1, 60), reduction_factor=st.integers(2, 5), slots=st.integers(1, 9))
@settings(deadline=None, max_examples=40)
def test_4_forecast_of_results_holds(num_samples, max_t, reduction_factor, slots):
    search_alg, _, _ = simulate(
        OURS, num_samples=num_samples, max_t=max_t, reduction_factor=reduction_factor, slots=slots, train=lambda c, t: loss(c, t)
    )
    assert told(search_alg) == results_per_budget(num_samples, max_t, reduction_factor)


# -- 5: a pause without a checkpoint ----------------------------------------------------------------------------------


def report_without_checkpoint(classes):
    search_alg, scheduler = pair(classes)
    simulation = Simulation(search_alg, scheduler, 34, loss)
    trial = SimulatedTrial("a", search_alg.suggest("a"))
    trial.get_trainable_cls = lambda: wrap_function(lambda config: None)
    trial.status = Trial.RUNNING
    scheduler.on_trial_add(simulation, trial)
    return scheduler.on_trial_result(simulation, trial, {"training_iteration": 3, "eval_loss": 1.0})


def test_5_a_pause_without_a_checkpoint_is_an_error():
    assert report_without_checkpoint(RAYS) == TrialScheduler.PAUSE
    with pytest.raises(RuntimeError, match="without a checkpoint"):
        report_without_checkpoint(OURS)


# -- 6: state that can be saved ----------------------------------------------------------------------------------------


def test_6_brackets_and_searcher_can_be_pickled_without_trials():
    search_alg, scheduler, _ = simulate(OURS)
    brackets = pickle.loads(pickle.dumps(scheduler.brackets))
    assert brackets == scheduler.brackets and scheduler._trials == {}
    again = pickle.loads(pickle.dumps(search_alg))
    assert [again.suggest(str(i)) for i in range(5)] == [search_alg.suggest(str(i)) for i in range(5)]


# -- 7: no barrier over the whole cluster -----------------------------------------------------------------------------


def halved_while_others_run(classes, num_samples, fault=lambda trial_id, iteration: None):
    """Whether the first bracket went to its second rung while a trial of another bracket was running."""
    search_alg, scheduler = pair(classes)
    simulation = Simulation(search_alg, scheduler, num_samples, loss, slots=4, fault=fault)
    promoted_at = {}
    start = simulation._schedule

    def spy(trial):
        if trial.iteration == 3 and int(trial.trial_id) < 22:
            others = [t for t in simulation.trials if t.status == Trial.RUNNING and int(t.trial_id) >= 22]
            promoted_at.setdefault(trial.trial_id, bool(others))
        start(trial)

    simulation._schedule = spy
    simulation.run()
    return any(promoted_at.values())


def test_7_a_lost_trial_does_not_hold_up_its_bracket():
    def crash(trial_id, iteration):  # when the next bracket has been begun already
        return "crash" if trial_id == "00021" and iteration == 2 else None

    assert not halved_while_others_run(RAYS, 34, crash)
    assert halved_while_others_run(OURS, 34, crash)


def test_7_a_bracket_that_gets_no_more_trials_is_halved():
    """26 samples: 22 fill the first bracket, 4 of 8 the second, which then waits for nobody."""
    search_alg, scheduler, _ = simulate(OURS, num_samples=26, slots=2)
    assert told(search_alg) == {3: 22, 12: 6 + 4, 50: 2 + 1}
    assert all(bracket.last_rung and not bracket.members for bracket in scheduler.brackets)


# -- 8: a retried trial keeps its place -------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [RAYS, OURS], ids=["ray", "ours"])
def test_8_a_retried_trial_keeps_bracket_and_budget(classes):
    faults = iter(["retry"])

    def retry(trial_id, iteration):  # the third trial loses its process when the next bracket is being filled
        return next(faults, None) if (trial_id, iteration) == ("00002", 7) else None

    always_best = {"00002": -9.0}
    search_alg, scheduler = pair(classes)
    simulation = Simulation(search_alg, scheduler, 34, lambda config, t: loss(config, t), slots=4, fault=retry)
    train = simulation.train
    simulation.train = lambda config, t: always_best["00002"] if config is simulation.trials[2].config else train(config, t)
    simulation.run()
    brackets = [b for band in scheduler._hyperbands for b in band if b] if classes is RAYS else scheduler.brackets
    if classes is RAYS:
        holding = [b for b in brackets if any(t.trial_id == "00002" for t in b._all_trials)]
        assert len(holding) == 2  # it was put into a second bracket
    else:
        assert scheduler._bracket_of["00002"] is brackets[0]
        assert [o["budget"] for o in search_alg.observations if o["trial_id"] == "00002"] == [3, 12, 50]


# -- 9: max_concurrent holds for resumed trials too -------------------------------------------------------------------


def most_at_a_time(classes):
    search_alg, scheduler = pair(classes, max_concurrent=2)
    simulation = Simulation(search_alg, scheduler, 34, loss, slots=8)
    simulation.run()
    edges = sorted([(s, 1) for s, *_ in simulation.reports] + [(e, -1) for _, e, *_ in simulation.reports])
    return max(np.cumsum([change for _, change in edges]))


def test_9_max_concurrent_bounds_resumed_trials():
    assert most_at_a_time(RAYS) > 2
    assert most_at_a_time(OURS) == 2


# -- 10: values and reports that are no use ---------------------------------------------------------------------------


def test_10_nan_is_worst_and_never_promoted():
    def diverges(config, t):
        return math.nan if config["train_loop_config"]["lr"] > 1e-4 else loss(config, t)

    search_alg, scheduler, simulation = simulate(OURS, train=diverges, slots=3)
    promoted = {trial_id for _, _, trial_id, t, _ in simulation.reports if t > 12}
    first = {trial_id for trial_id in promoted if int(trial_id) < 22}
    assert first and all(search_alg.suggested[t]["config"]["train_loop_config"]["lr"] <= 1e-4 for t in first)
    assert all(o["loss"] == math.inf or math.isfinite(o["loss"]) for o in search_alg.observations)

    def promoted_by_rays(order):
        """Ray's halving of three trials of which one is NaN depends on the order in which they came."""
        scheduler = pair(RAYS, max_t=9, reduction_factor=3)[1]
        bracket = scheduler._create_bracket(1)
        values = {"nan": math.nan, "good": 1.0, "bad": 2.0}
        trials = {name: SimulatedTrial(name, {}) for name in order}
        for name in order:
            bracket._live_trials[trials[name]] = {"training_iteration": 3, "eval_loss": values[name]}
        bracket._n = 3
        return bracket.successive_halving("eval_loss", -1)[0][0].trial_id

    assert len({promoted_by_rays(order) for order in (["nan", "good", "bad"], ["good", "bad", "nan"], ["bad", "nan", "good"])}) > 1


def test_10_a_report_without_time_does_not_end_the_search(caplog):
    result = {"eval_loss": 1.0, SHOULD_CHECKPOINT: True}
    for classes in (RAYS, OURS):
        search_alg, scheduler = pair(classes)
        simulation = Simulation(search_alg, scheduler, 34, loss)
        trial = SimulatedTrial("a", search_alg.suggest("a"))
        scheduler.on_trial_add(simulation, trial)
        if classes is RAYS:
            with pytest.raises(KeyError):
                scheduler.on_trial_result(simulation, trial, dict(result))
        else:
            with caplog.at_level(logging.WARNING):
                assert scheduler.on_trial_result(simulation, trial, dict(result)) == TrialScheduler.CONTINUE
            assert "without 'training_iteration'" in caplog.text


def test_10_crash_is_a_bad_result_at_its_rung():
    def crash(trial_id, iteration):
        return "crash" if (trial_id, iteration) in {("00003", 2), ("00004", 1)} else None

    search_alg, _, _ = simulate(OURS, sim={"fault": crash})
    lost = [(o["trial_id"], o["budget"], o["loss"]) for o in search_alg.observations if o["trial_id"] in ("00003", "00004")]
    assert sorted(lost) == [("00003", 3, math.inf), ("00004", 3, math.inf)]
    assert told(search_alg) == {3: 22, 12: 14, 50: 8}


def test_10_a_fault_of_a_node_is_no_result():
    """The trial has failed all the same, and its bracket goes on without it."""
    search_alg, scheduler = pair(OURS)

    def fault(trial_id, iteration):
        scheduler.node_fault = trial_id == "00004"
        return "crash" if trial_id in ("00004", "00007") and iteration == 2 else None

    simulation = Simulation(search_alg, scheduler, 34, loss, fault=fault)
    simulation.run()
    assert [t.trial_id for t in simulation.trials if t.status == Trial.ERROR] == ["00004", "00007"]
    assert "00004" not in {o["trial_id"] for o in search_alg.observations}
    assert [o["loss"] for o in search_alg.observations if o["trial_id"] == "00007"] == [math.inf]
    assert told(search_alg) == Counter(results_per_budget(34, 50, 4)) - Counter({3: 1})


def test_10_all_trials_of_a_rung_crash():
    search_alg, scheduler, simulation = simulate(OURS, num_samples=10, sim={"fault": lambda *_: "crash"}, slots=3)
    assert all(t.status == Trial.ERROR for t in simulation.trials) and told(search_alg) == {3: 10}


# -- 11: random stream ------------------------------------------------------------------------------------------------


def suggestions(classes, global_seed):
    np.random.seed(global_seed)
    random.seed(global_seed)
    search_alg, _, simulation = simulate(classes, seed=7)
    return [trial.config["train_loop_config"] for trial in simulation.trials]


def test_11_same_seed_same_suggestions():
    assert suggestions(RAYS, 1) != suggestions(RAYS, 2)
    assert suggestions(OURS, 1) == suggestions(OURS, 2)
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    simulate(OURS)
    assert (np.random.get_state()[1] == before).all()  # and leaves the global stream alone
    assert [s["config"] for s in simulate(OURS, seed=1)[0].suggested.values()] != [
        s["config"] for s in simulate(OURS, seed=2)[0].suggested.values()
    ]


# -- 12: plain types --------------------------------------------------------------------------------------------------


def test_12_suggestions_are_plain_python():
    space = {"a": tune.choice([1, 2]), "b": tune.choice(["x", "y"]), "c": tune.uniform(0, 1), "d": tune.choice([True, False]),
             "e": tune.randint(1, 9)}  # fmt: skip
    numpys = [v for i in range(9) for v in pair(RAYS, space=space)[0].suggest(str(i)).values() if isinstance(v, np.generic)]
    assert numpys
    for i in range(9):
        config = pair(OURS, space=space, seed=i)[0].suggest("a")
        assert {k: type(v) for k, v in config.items()} == {"a": int, "b": str, "c": float, "d": bool, "e": int}
        json.dumps(config)


# -- 13: the model does not collapse ----------------------------------------------------------------------------------


def lr_spread(classes):
    """Standard deviation of model-based suggestions, in ranges of log lr, after good results at one lr only."""
    search_alg, _ = pair(classes)
    for i in range(8):
        config = {"train_loop_config/lr": 8e-5 * 1.001**i if i < 4 else 1e-5 * 1.2**i, "train_loop_config/per_device_bs": 1 + i % 2,
                  "train_loop_config/wd": 0.0}  # fmt: skip
        search_alg.bohber.new_result(kde.Job({"loss": float(i)}, {"budget": 3, "config": config}))
    search_alg.bohber.random_fraction = 0
    lrs = [search_alg.suggest(str(i))["train_loop_config"]["lr"] for i in range(50)]
    return np.std(np.log(lrs)) / math.log(2e-4 / 5e-6)


def test_13_suggestions_keep_a_width():
    assert lr_spread(RAYS) < 0.002  # 0.7 % of lr, as a standard deviation; 0.06 % was seen
    assert lr_spread(OURS) > 0.005  # 2 %; 4 % was seen, and 0.6 % with a floor of 0.01


def test_13_a_category_that_the_good_lack_is_not_chosen_for_it():
    """statsmodels' density is infinite where its data lacks a category: such a suggestion would always win."""
    search_alg, _ = pair(OURS)
    for i in range(16):
        config = {"train_loop_config/lr": 2e-5 * 1.1**i, "train_loop_config/per_device_bs": 1 if i < 8 else 2, "train_loop_config/wd": 0.0}
        search_alg.bohber.new_result(kde.Job({"loss": float(i)}, {"budget": 3, "config": config}))
    search_alg.bohber.random_fraction = 0
    picks = [search_alg.suggest(str(i))["train_loop_config"]["per_device_bs"] for i in range(50)]
    assert picks.count(1) > 40


# -- the whole search, whatever happens -------------------------------------------------------------------------------


@unchecked
@given(
    num_samples=st.integers(1, 50),
    max_t=st.integers(1, 50),
    reduction_factor=st.integers(2, 5),
    slots=st.integers(1, 10),
    max_concurrent=st.integers(0, 5),
    seed=st.integers(0, 10**6),
    stop_last_trials=st.booleans(),
)
@settings(deadline=None, max_examples=1000)
def test_invariants_under_faults(num_samples, max_t, reduction_factor, slots, max_concurrent, seed, stop_last_trials):
    """Never hangs; no (trial, budget) told twice; no more trials at a rung than planned; all trials accounted for."""
    chance = random.Random(seed)
    durations: dict[str, float] = {}
    lost: set[str] = set()  # trials of a node that has died

    def fault(trial_id, iteration):
        if trial_id in lost:
            lost.discard(trial_id)
            return "retry"
        kind = chance.choices([None, "crash", "retry", "out of retries", "node"], [40, 2, 2, 1, 1])[0]
        if kind == "node":
            running = [t.trial_id for t in simulation.trials if t.status == Trial.RUNNING and t.trial_id != trial_id]
            lost.update(chance.sample(running, chance.randint(0, len(running))))
            return "retry"
        scheduler.node_fault = kind == "out of retries"
        return "crash" if kind == "out of retries" else kind

    def seconds(config):
        return durations.setdefault(str(config["train_loop_config"]), chance.uniform(0.1, 3))

    def noisy(config, t):
        return chance.choice([math.nan, math.inf]) if chance.random() < 0.05 else loss(config, t)

    search_alg, scheduler = pair(
        OURS, max_t=max_t, reduction_factor=reduction_factor, seed=seed, max_concurrent=max_concurrent, stop_last_trials=stop_last_trials
    )
    simulation = Simulation(search_alg, scheduler, num_samples, noisy, slots=slots, max_t=max_t, fault=fault, seconds=seconds)
    simulation.run()
    assert len(simulation.trials) == num_samples == len(search_alg.suggested)
    assert set(Counter((o["trial_id"], o["budget"]) for o in search_alg.observations).values()) <= {1}
    assert told(search_alg).total() == len(search_alg.observations)
    assert not search_alg.running and not search_alg.paused and not scheduler._trials
    through = Counter((id(scheduler.bracket_of(o["trial_id"])), o["budget"]) for o in search_alg.observations)
    for bracket in scheduler.brackets:
        for size, budget in bracket.rungs:
            assert through[id(bracket), budget] <= size
    for trial in simulation.trials:
        assert trial.status in (Trial.TERMINATED, Trial.ERROR)


@unchecked
@given(
    num_samples=st.integers(1, 60),
    max_t=st.integers(1, 50),
    reduction_factor=st.integers(2, 5),
    slots=st.integers(1, 10),
    max_concurrent=st.integers(0, 5),
    seed=st.integers(0, 10**6),
    faulty=st.booleans(),
)
@settings(deadline=None, max_examples=1500)
def test_invariants_under_restarts(num_samples, max_t, reduction_factor, slots, max_concurrent, seed, faulty):
    """As above, with the whole search stopped at random moments, planned or not, and taken up by new objects from its state.

    No trial is lost, and only what was not saved is run again: less than a rung of the trials that ran.
    """
    chance = random.Random(seed)
    options = {"max_t": max_t, "reduction_factor": reduction_factor, "seed": seed, "max_concurrent": max_concurrent}

    def fault(trial_id, iteration):
        return chance.choices([None, "crash", "retry"], [20, 1, 1])[0] if faulty else None

    search_alg, scheduler = pair(OURS, **options)
    simulation = Simulation(search_alg, scheduler, num_samples, loss, slots=slots, max_t=max_t, fault=fault)
    may_repeat = 0
    for _ in range(chance.randint(0, 8)):
        saved = chance.random() < 0.5
        simulation.run(len(simulation.reports) + chance.randint(1, 60), abrupt=not saved)
        if not saved:
            running = [t for t in simulation.trials if t.status == Trial.RUNNING]
            may_repeat += sum(t.iteration - simulation._checkpoints.get(t.trial_id, 0) for t in running)
        simulation = simulation.restart(*pair(OURS, **options), saved)
    simulation.run()
    search_alg, scheduler = simulation.search_alg.searcher, simulation.scheduler
    assert len(search_alg.suggested) == num_samples and not scheduler._trials and not search_alg.running
    told_of = Counter((o["trial_id"], o["budget"]) for o in search_alg.observations)
    assert set(told_of.values()) <= {1} and told(search_alg).total() == len(search_alg.observations)
    assert {o["trial_id"] for o in search_alg.observations} == set(search_alg.suggested)  # each came to a rung, or failed before
    repeats = len(simulation.reports) - len({(trial_id, t) for _, _, trial_id, t, _ in simulation.reports})
    assert faulty or repeats <= may_repeat
    for bracket in scheduler.brackets:
        for size, budget in bracket.rungs:
            mine = {o["trial_id"] for o in search_alg.observations if o["budget"] == budget and scheduler.bracket_of(o["trial_id"]) is bracket}
            assert len(mine) <= size


@unchecked
@given(st.integers(0, 10**6), st.lists(st.integers(1, 60), max_size=6), st.integers(0, 2))
@example(1, [16], 0)  # the trial that was promoted on the spot has to go on first
@settings(deadline=None, max_examples=200)
def test_one_slot_a_planned_stop_changes_nothing(seed, stops, max_concurrent):
    """Same suggestions, same results in the same order as a search that ran through."""
    options = {"max_t": 16, "seed": seed, "max_concurrent": max_concurrent}
    search_alg, scheduler = pair(OURS, **options)
    through = Simulation(search_alg, scheduler, 25, loss, max_t=16)
    through.run()
    simulation = Simulation(*pair(OURS, **options), 25, loss, max_t=16)
    for more in stops:
        simulation.run(len(simulation.reports) + more)
        simulation = simulation.restart(*pair(OURS, **options), saved=True)
    simulation.run()
    assert simulation.search_alg.searcher.suggested == search_alg.suggested
    assert simulation.search_alg.searcher.observations == search_alg.observations
    assert [r[2:] for r in simulation.reports] == [r[2:] for r in through.reports]


def test_cost_of_a_decision_grows_slowly():
    """Counts calls rather than time: a decision looks at live brackets only."""
    search_alg, scheduler, simulation = simulate(OURS, num_samples=3400, max_t=4, slots=4, train=lambda c, t: loss(c, t))
    assert len(scheduler.brackets) > 300 and len(scheduler._active) <= 1


def test_needs_its_own_searcher():
    search_alg = pair(RAYS)[0]
    scheduler = pair(OURS)[1]
    with pytest.raises(TypeError, match="bohb.searcher.TuneBOHB"):
        Simulation(search_alg, scheduler, 3, loss).run()
