"""What watches over the trials, and waits for storage: without a cluster.

With one: test_run.py, test_faults.py and test_slurm.py.
"""

import json
import os
import signal
import types
from pathlib import Path

import numpy as np
import pytest
import ray

from hpo import errors, files, host_memory
from hpo.cluster import launch, preemption, storage, watchdogs
from hpo.cluster import state as state_file


class Clock:
    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(watchdogs.time, "time", lambda: self.now)


def trial(trial_id, status, actor=None):
    return types.SimpleNamespace(
        trial_id=trial_id, status=status, temporary_state=types.SimpleNamespace(ray_actor=actor), error_file=None
    )


@pytest.fixture()
def killed(monkeypatch):
    ended = []
    monkeypatch.setattr(ray, "kill", ended.append)
    return ended


def test_a_process_that_does_not_change_over_is_ended(monkeypatch, killed):
    clock, said = Clock(monkeypatch), []
    watchdog, waiting = watchdogs.Watchdog(30, said.append), trial("a", "PENDING", "actor")
    for _ in range(7):
        watchdog.on_step_end(0, [waiting, trial("b", "PENDING")])  # b waits for a slot, and has none to end
        clock.now += 5
    assert not killed
    watchdog.on_step_end(0, [waiting])
    assert killed == ["actor"] and said == ["trial a has not reported for 35 s: its process is ended"]
    watchdog.on_step_end(0, [trial("a", "PENDING")])  # waits for another
    for _ in range(8):
        clock.now += 5
        watchdog.on_step_end(0, [trial("a", "PENDING")])
    watchdog.on_step_end(0, [trial("a", "PENDING", "another")])
    assert killed == ["actor"]  # its time begins anew


def test_a_search_that_stood_still_does_not_take_its_trials_for_hung(monkeypatch, killed):
    clock = Clock(monkeypatch)
    watchdog, running = watchdogs.Watchdog(30, print), trial("a", "RUNNING", "actor")
    watchdog.on_trial_start(0, [running], running)
    for gap in (5, 3600, 5):  # an hour in which the driver could not look
        clock.now += gap
        watchdog.on_step_end(0, [running])
    assert not killed
    for _ in range(5):
        clock.now += 5
        watchdog.on_step_end(0, [running])
    assert killed == ["actor"]


def test_the_limit_follows_the_slowest_iteration(monkeypatch, killed):
    clock = Clock(monkeypatch)
    watchdog, running = watchdogs.Watchdog(None, print), trial("a", "RUNNING", "actor")
    watchdog.on_trial_start(0, [running], running)

    def silent(seconds):
        for _ in range(seconds // 10):
            clock.now += 10
            watchdog.on_step_end(0, [running])

    silent(7200)  # before the first iteration
    assert not killed
    watchdog.on_trial_result(0, [running], running, {"started_at": 0.0, "ended_at": 100.0})
    silent(1000)
    assert not killed
    silent(10)
    assert killed == ["actor"]


def test_a_ray_that_runs_already_gets_no_folders(monkeypatch):
    """It has its own; one in /tmp would stay there when the program is killed."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with launch.ray_folders() as folders:
        assert all(Path(folder).is_dir() for folder in folders)
    assert not any(Path(folder).exists() for folder in folders)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr("tempfile.TemporaryDirectory", None)
    with launch.ray_folders() as folders:
        assert folders == ("", "")


CUDA = "Failure # {} (occurred at noon)\nray::ImplicitFunc.train() (pid=9, ip={})\n"
CUDA += "RuntimeError: CUDA error: an illegal memory access\n"


@pytest.mark.parametrize("network", ["10.0.0.", "2001:db8::"])
def test_a_node_whose_gpu_fails_is_given_up_while_others_work(monkeypatch, tmp_path, network):
    nodes = [
        {"NodeManagerAddress": f"{network}{i}", "Alive": True, "Resources": {f"slurm_job_7{i}": 1.0}} for i in (1, 2)
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    said, text = [], ""
    watch, victim = watchdogs.FaultyNodes(tmp_path, said.append), trial("a", "RUNNING")
    victim.error_file = str(tmp_path / "error.txt")
    for number, node in enumerate((2, 1, 1), 1):  # one is an accident, and so is as many as elsewhere
        assert not said
        text += CUDA.format(number, f"{network}{node}")
        (tmp_path / "error.txt").write_text(text)
        watch.on_trial_recover(0, [], victim)
    assert said == ["worker 71 is given up: a GPU of its node fails"]
    assert (
        tmp_path / "bad-71"
    ).read_text() == "a GPU fails here, 2 times so far: CUDA error: an illegal memory access\n"
    (tmp_path / "bad-71").unlink()
    (tmp_path / "error.txt").write_text(
        text.replace("an illegal memory access", "device-side assert triggered")
    )  # the trial's own
    watch.on_trial_error(0, [], victim)
    assert not (tmp_path / "bad-71").exists()
    (tmp_path / "error.txt").write_text(text)
    nodes.pop()  # the only one that is left
    watch.on_trial_error(0, [], victim)
    assert not (tmp_path / "bad-71").exists()


@pytest.mark.parametrize(
    "group, file",
    [("0::/a/b", "sys/fs/cgroup/a/memory.events"), ("4:memory:/a/b", "sys/fs/cgroup/memory/a/b/memory.oom_control")],
)
def test_kills_by_the_kernel_are_read_from_both_kinds_of_control_groups(tmp_path, group, file):
    for path, text in {
        "proc/self/cgroup": f"9:pids:/\n{group}\n",
        file: "oom 5\nunder_oom 0\noom_kill 3\noom_group_kill 1\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert host_memory.oom_kills(tmp_path) == 3
    (tmp_path / file).unlink()
    assert host_memory.oom_kills(tmp_path) == 0


def test_storage_that_stays_away_or_full_is_not_waited_for_for_ever(tmp_path):
    assert not storage.wait_for_storage(tmp_path / "gone", 0, 0.3)
    assert not storage.wait_for_storage(tmp_path, 10**18, 0.3)
    (tmp_path / "checkpoint").write_bytes(b"x" * 10**6)
    assert storage.wait_for_storage(tmp_path, 10**6, 0.3)


def test_files_and_folders_are_on_the_disk_before_they_count(monkeypatch, tmp_path):
    """Folders where the file system can do it."""
    (tmp_path / "file").touch()
    synced, refused = [], tmp_path

    def fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append(path)
        if path == refused:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    files.sync(tmp_path / "file", tmp_path)
    assert synced == [tmp_path / "file", tmp_path]
    refused = tmp_path / "file"
    with pytest.raises(OSError):
        files.sync(tmp_path / "file", tmp_path)


@pytest.mark.parametrize("code", errors.STORAGE)
def test_errors_of_storage_are_known_as_they_come_out_of_tune(code):
    assert errors.is_storage(OSError(code, "text")) and errors.is_storage(
        RuntimeError(f"Traceback …\n{OSError(code, os.strerror(code))}")
    )
    assert not errors.is_storage(RuntimeError("CUDA error"))


def test_a_termination_is_not_lost_where_python_swallows_exceptions():
    """SystemExit out of a signal handler is only printed when the handler happens to run in a finalizer."""

    class Finalizer:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            list(range(1000))  # the handler runs here

    scheduler = types.SimpleNamespace(pause_all=False)
    before = {how: signal.getsignal(how) for how in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        preemption.stop_on_signals()
        drain = preemption.PauseOnSignal(scheduler, None, None, None)
        drain.setup()
        drain.on_step_end(0, [])
        Finalizer()
        with pytest.raises(SystemExit) as ended:
            drain.on_step_end(1, [])
    finally:
        for how, handler in before.items():
            signal.signal(how, handler)
    assert ended.value.code == 143 and not scheduler.pause_all


# -- the state of a search --------------------------------------------------------------------------------------------


def test_a_state_is_data_and_comes_back_as_it_was(tmp_path):
    state = {"searcher": {"losses": [[3, [0.1, float("inf")]]]}, "live": [], "best": None}
    state_file.save_state(tmp_path, state | {"numpy": np.float64(0.25)})
    head, body = map(json.loads, (tmp_path / "state.jsonl").read_text().split("\n"))
    assert head["version"] == state_file.VERSION and body == state | {"numpy": 0.25}
    assert state_file.load_state(tmp_path) == body
    with pytest.raises(TypeError, match="cannot be saved as JSON"):
        state_file.save_state(tmp_path, {"object": object()})
    assert state_file.load_state(tmp_path) == body  # nothing was overwritten


def test_a_damaged_state_gives_way_to_the_one_before_it(tmp_path, capsys):
    for number in (1, 2):
        state_file.save_state(tmp_path, {"number": number})
    file = tmp_path / "state.jsonl"
    file.write_bytes(file.read_bytes()[:-3])
    assert (
        state_file.load_state(tmp_path) == {"number": 1}
        and "is damaged; using the state before it" in capsys.readouterr().out
    )


def test_a_state_of_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(state_file, "VERSION", 99)
    state_file.save_state(tmp_path, {})
    monkeypatch.undo()
    refused = "state.jsonl has version 99, and this program reads 2 and 3: go on with the commit in run.json"
    with pytest.raises(RuntimeError, match=refused):
        state_file.load_state(tmp_path)


def test_the_pickle_of_an_older_version_is_not_read(tmp_path):
    (tmp_path / "state.pkl").write_bytes(b"0" * 64 + b"\ncos\nsystem\n(S'touch read'\ntR.")
    with pytest.raises(RuntimeError, match="state.pkl is of an older version of this program"):
        state_file.load_state(tmp_path)
