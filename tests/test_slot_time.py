"""Slot time: each second of each slot is counted once, and idle nodes are given back."""

import types

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.experiment import Trial

from hpo.cluster import idle_nodes
from hpo.results import slot_time

STATES = [Trial.RUNNING, Trial.PAUSED, Trial.PENDING, Trial.TERMINATED, Trial.ERROR]


def make(slots, num_samples=34, at_a_time=0, reported=True):
    log = types.SimpleNamespace(num_samples=num_samples, trials={})
    made = slot_time.SlotTime(log, {"cpu": 1, "gpu": 1}, at_a_time, types.SimpleNamespace())
    made.slots, made.reported = slots, reported
    return made


def tell(made, iteration, took, **more):
    times = {"started_at": 100.0, "ended_at": 100.0 + took}
    result = {"training_iteration": iteration, "node_ip": "10.0.0.1", **times, **more}
    made.on_trial_result(0, [], types.SimpleNamespace(trial_id="a"), result)


def trials(*states):
    return [types.SimpleNamespace(status=state) for state in states]


@pytest.mark.parametrize(
    "reported, states, num_samples, at_a_time, expected",
    [
        (False, "R", 34, 0, {"running": 10, "start-up": 30}),
        (True, "RRPP", 34, 0, {"running": 20, "rungs": 20}),
        (True, "RPT", 3, 0, {"running": 10, "tail": 30}),
        (True, "RPPPP", 5, 0, {"running": 10, "rungs": 30}),  # the paused trials will need the slots
        (True, "RPPPP", 34, 2, {"running": 10, "rungs": 10, "not asked for": 20}),
        (True, "RRRR", 34, 0, {"running": 40}),
    ],
)
def test_idle_time_is_counted_under_its_cause(reported, states, num_samples, at_a_time, expected):
    names = {"R": Trial.RUNNING, "P": Trial.PAUSED, "T": Trial.TERMINATED}
    made = make(4, num_samples, at_a_time, reported)
    made.log.trials = dict.fromkeys(range(len(states)))
    made.add(10, trials(*(names[s] for s in states)))
    assert {name: seconds for name, seconds in made.spent.items() if seconds} == expected | {"search": 10}


STEPS = st.lists(st.tuples(st.floats(0, 9), st.lists(st.sampled_from(STATES), max_size=9)), max_size=9)


@given(STEPS, st.integers(9, 12), st.integers(0, 9))
def test_parts_add_up_to_slots_times_time(steps, slots, at_a_time):
    made = make(slots, at_a_time=at_a_time)
    for seconds, states in steps:
        made.add(seconds, trials(*states))
    assert made.minutes()["allocated"] == pytest.approx(slots * sum(seconds for seconds, _ in steps) / 60)


def test_iteration_that_is_run_again_is_counted_apart():
    """Its evaluation is not counted twice. A part of an iteration, saved before a planned stop, is training."""
    made = make(1)
    for _ in range(2):
        tell(made, 1, 60, evaluation_seconds=36, checkpoints_seconds=6)
    tell(made, 1, 12, partial=True)
    made.spent["running"] = 150.0
    minutes = made.minutes()
    expected = {"training": 0.5, "evaluation": 0.6, "checkpoints": 0.1, "run again": 1.0, "change-over": 0.3}
    assert {name: minutes[name] for name in expected} == pytest.approx(expected)
    lines = slot_time.summary(minutes, iterations=2, max_t=16, num_samples=34, grid=40).splitlines()
    assert (
        lines[0].startswith("slot time: 2.5 slot-minutes: training 0.5 (20%), ") and "run again 1.0 (40%)" in lines[0]
    )
    assert lines[1].startswith("cost: 2 iterations, as many as 0.1 full trainings; ")
    assert "would take 34 full trainings" in lines[1]


def test_lost_trial_counts_as_fault_until_it_starts_again():
    made, trial = make(4), types.SimpleNamespace(trial_id="a")
    made.on_trial_recover(0, [], trial)
    made.add(10, trials(Trial.RUNNING, Trial.PENDING))
    made.on_trial_start(0, [], trial)
    made.add(10, trials(Trial.RUNNING, Trial.RUNNING))
    assert (made.spent["faults"], made.spent["rungs"], made.spent["running"]) == (10, 20 + 20, 10 + 20)


class SomeTrial(types.SimpleNamespace):
    def is_finished(self):
        return self.status in (Trial.TERMINATED, Trial.ERROR)


@pytest.fixture()
def release(tmp_path, monkeypatch):
    """An IdleNodeRelease for two nodes of two slots, which looks at each step. All trials were suggested."""
    nodes = [
        {
            "Alive": True,
            "NodeManagerAddress": f"10.0.0.{i}",
            "Resources": {"CPU": 2, "GPU": 2, f"slurm_job_10{i}": 1},
        }
        for i in (1, 2)
    ]
    monkeypatch.setattr(idle_nodes.ray, "nodes", lambda: nodes)
    made = make(4, num_samples=3)
    made.log.trials = dict.fromkeys("abc")
    release = idle_nodes.IdleNodeRelease(made, 1e-9, tmp_path)
    release.EVERY = 0.0
    return release


def look(release, *live):
    for _ in range(2):
        release.on_step_end(0, list(live))
    return sorted(path.name for path in release.folder.iterdir())


def start(release, trial, address=None):
    release.on_trial_start(0, [], trial)
    if address:
        release.on_trial_result(0, [], trial, {"node_ip": address})


def test_idle_node_is_given_back(release):
    trial = SomeTrial(trial_id="a", status=Trial.RUNNING)
    start(release, trial, "10.0.0.1")
    assert look(release, trial) == ["release-102"]
    assert look(release, trial) == ["release-102"]  # never the other one


def test_node_that_a_trial_needs_stays(release):
    """All nodes stay while a trial starts, because its node is not known yet."""
    a, b, c = (SomeTrial(trial_id=name, status=Trial.RUNNING) for name in "abc")
    start(release, a, "10.0.0.1")
    b.status = c.status = Trial.PAUSED
    assert look(release, a, b, c) == []  # all three may run at the same time
    c.status, b.status = Trial.TERMINATED, Trial.PENDING
    assert look(release, a, b, c) == []
    b.status = Trial.RUNNING  # resumed on the second node, in a process that was there
    release.on_trial_result(0, [], b, {"node_ip": "10.0.0.1"})
    start(release, b)
    assert look(release, a, b, c) == []
    start(release, b, "10.0.0.2")
    assert look(release, a, b, c) == []
    release.slot_time.log.trials.popitem()  # one trial was not suggested yet
    start(release, b, "10.0.0.1")
    assert look(release, a, b, c) == []


def test_nodes_that_the_repeats_need_stay(release):
    trial = SomeTrial(trial_id="a", status=Trial.RUNNING)
    start(release, trial, "10.0.0.1")
    release.following = 3
    assert look(release, trial) == []
    release.following = 2
    assert look(release, trial) == ["release-102"]


def test_resume_adds_to_the_saved_times():
    first, second = make(1), make(1)
    first.add(10, trials(Trial.RUNNING))
    second.set_state(first.get_state())
    second.add(5, trials(Trial.RUNNING))
    assert second.spent["running"] == 15
