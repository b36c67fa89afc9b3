"""Whole runs through the command line to which something happens: trials that hang, fail or eat memory, a disk that
fills up.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest

from conftest import ROOT, run_script
from faulty import write_script
from hpo import files
from slurm_cluster import wait_for

SMALL = ["--max_t", 4, "--num_train_epochs", 0.2, "--max_eval_samples", 10]


def small_search(model: Path, squad: Path, trials: int) -> list:
    """Arguments of a search with one trial at a time."""
    return ["--model", model, "--dataset", squad, *SMALL, "--max_concurrent_trials", 1, "--num_samples", trials]


def test_a_trial_that_hangs_is_started_again(tmp_path, tiny_model, tiny_squad):
    """The process of a promoted trial stops (SIGSTOP): it is ended, and the trial goes on from its checkpoint in
    another."""
    script = write_script(
        tmp_path / "hangs.py",
        """
def train(config, setup, trial):
    mark = setup.run_dir / ".hung"
    if trial.checkpoint and not mark.exists():
        mark.write_text(Path(trial.folder).parent.name)
        os.kill(os.getpid(), signal.SIGSTOP)
    experiment.train(config, setup, trial)
""",
    )
    arguments = small_search(tiny_model, tiny_squad, 4) + ["--trial_timeout", 45]  # imports take less
    arguments += ["--seed", 2]  # the second of four trials is the best, so it is paused and promoted
    process = run_script(*arguments, "--output_dir", tmp_path, "--run_name", "x", script=script)
    out = process.stdout
    assert process.returncode == 0, out + process.stderr
    hung = (tmp_path / "x" / ".hung").read_text()
    assert f"trial {hung} has not reported for 4" in out, out
    assert re.search(f"trial {hung} .*goes on from iteration 1", out), out
    status = {t["trial_id"]: t["status"] for t in files.read_csv(tmp_path / "x" / "trials.csv")}
    assert set(status.values()) == {"stopped", "completed"} and len(status) == 4 and status[hung] == "completed"


def test_full_disk(tmp_path, tiny_model, tiny_squad):
    """Too little from the start is refused.

    One that is gone for a while, then fills up: the search waits, and goes on by itself.
    """
    if os.getuid() != 0:
        pytest.skip("only root can mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=True)
    lines = []
    try:
        small = small_search(tiny_model, tiny_squad, 12) + ["--output_dir", disk, "--run_name", "x"]
        process = run_script(*small)
        assert process.returncode == 2 and not list(disk.iterdir())
        assert re.fullmatch(
            f".*--output_dir {disk}: the run needs up to 0.0[0-9]+ GB there, and 0.00[0-9]+ GB are free\n",
            process.stderr,
        )
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)

        process = subprocess.Popen(
            [sys.executable, str(ROOT / "raytune_bayesian.py"), *map(str, small)], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip

        def read_to(what, times=1):
            start = len(lines)
            for line in process.stdout:
                lines.append(line)
                if sum(what in line for line in lines[start:]) == times:
                    return
            raise AssertionError("".join(lines))

        read_to("] trial ", 2)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk], check=True)  # in its place
        read_to("waiting for ")
        subprocess.run(["umount", disk], check=True)
        read_to("going on with a search")
        read_to("] trial ", 2)
        with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 4096)
        read_to("waiting for ")
        (disk / "filler").unlink()
        lines.append(process.communicate(timeout=300)[0])
        out = "".join(lines)
        assert (
            process.returncode == 0 and out.count("going on with a search") == 2 and out.count("Best Trial Result") == 1
        ), out
        assert out.count("\nstorage: ") == 2 and re.search("storage: .*o space left on device", out), out
        # Ray logs its own where the disk goes while it makes a folder
        rays = r"ERROR storage\.py:\d+ -- Caught exception when creating directory .*\nTraceback .*\n(  .*\n)+OSError: "
        assert "Traceback" not in re.sub(rays, "", out) and "ended early" not in out
        trials = files.read_csv(disk / "x" / "trials.csv")
        assert {t["status"] for t in trials} == {"stopped", "completed"} and len(trials) == 12
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        subprocess.run(["umount", disk], check=True)


def memory_cgroup(limit: int) -> Path:
    """A new control group for processes of at most so many bytes; for root."""
    first = (
        Path("/sys/fs/cgroup/memory") if Path("/sys/fs/cgroup/memory/cgroup.procs").exists() else Path("/sys/fs/cgroup")
    )
    group = first / f"bohb-test-{os.getpid()}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if first.name == "memory" else "memory.max")).write_text(str(limit))
    return group


def test_a_trial_that_the_kernel_kills_at_the_memory_limit(tmp_path, tiny_model, tiny_squad):
    """As at the limit of a Slurm job: failed and not tried again, as it would need as much again; kill -9 alone is not
    taken for it.
    """
    if os.getuid() != 0:
        pytest.skip("only root can make a control group")
    script = write_script(
        tmp_path / "harmed.py",
        """
def train(config, setup, trial):
    for fault in ("kill", "memory"):
        mark = setup.run_dir / f".fault-{fault}"
        if not mark.exists():
            mark.write_text(Path(trial.folder).parent.name)
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            held = [b"x" * 2**27 for _ in range(64)]  # 8 GiB
            time.sleep(60)
    experiment.train(config, setup, trial)
""",
    )
    group = memory_cgroup(6 * 2**30)
    try:
        arguments = ["--model", tiny_model, "--dataset", tiny_squad, "--max_t", 2, "--num_train_epochs", 0.2,
        "--max_eval_samples", 10,
                     "--max_concurrent_trials", 1, "--num_samples", 3, "--output_dir", tmp_path, "--run_name",
                     "x"]  # fmt: skip
        inside = ["bash", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "-"]
        no_monitor = {"RAY_memory_monitor_refresh_ms": "0"}  # Ray's own is tested above
        process = run_script(*arguments, script=script, before=inside, **no_monitor)
    finally:
        wait_for("the end of all processes", lambda: not (group / "cgroup.procs").read_text(), 400)
        group.rmdir()
    out = process.stdout
    assert process.returncode == 0, out + process.stderr
    killed, hungry = ((tmp_path / "x" / f".fault-{fault}").read_text() for fault in ("kill", "memory"))
    status = {t["trial_id"]: t["status"] for t in files.read_csv(tmp_path / "x" / "trials.csv")}
    assert (
        (status[killed], status[hungry]) == ("completed", "failed") if killed != hungry else status[hungry] == "failed"
    ), out
    assert re.search(f"trial {killed} .*goes on from iteration 0", out), out
    assert re.search(f"trial {hungry} .*failed after 0 iterations: .*the kernel has killed its process", out), out
    assert out.count("goes on from iteration") == 1 and len(status) == 3


def test_a_search_cut_between_a_report_and_its_consequences(tmp_path, tiny_model, tiny_squad):
    """Saved when a trial's report has ended it and Tune has not said so yet, then killed: once each where it lost
    its bracket, and where
    it was trained fully. And a process that is lost after its trial's last report. Each is known to have ended, and
    the slot is free.
    """
    marks = [tmp_path / name for name in ("paused", "completed", "lost")]
    script = write_script(
        tmp_path / "cut.py",
        f"""
def train(config, setup, trial):
    experiment.train(config, setup, trial)
    if Path("{marks[1]}").exists() and not Path("{marks[2]}").exists():
        Path("{marks[2]}").touch()
        os._exit(9)


def save_and_cut(run_dir, state):
    save_state(run_dir, state)
    live = {{trial["trial_id"] for trial in state["live"]}}
    ended = set(state["searcher"]["running"]) - live
    for mark in map(Path, {[str(mark) for mark in marks[:2]]}):
        if not mark.exists() and any(state["log"]["trials"][trial]["status"] == mark.name for trial in ended):
            mark.touch()
            os.killpg(0, 9)


if __name__ == "__main__":
    from hpo.cluster import session
    from hpo.results.trial_log import TrialLog

    save_state, session.save_state = session.save_state, save_and_cut
    # It saves at each change, on a slow disk too.
    TrialLog.save_interval = property(lambda self: 0, lambda self, seconds: None)
""",
    )
    name = ["--output_dir", tmp_path, "--run_name", "x"]
    arguments = small_search(tiny_model, tiny_squad, 6) + ["--seed", 2]  # the fourth trial is not the best
    for begin, code, mark in zip([arguments, ["--resume"], ["--resume"]], [-9, -9, 0], marks, strict=False):
        process = run_script(*begin, *name, script=script, timeout=300)
        assert process.returncode == code and mark.exists(), process.stdout + process.stderr
    trials = files.read_csv(tmp_path / "x" / "trials.csv")
    ends = Counter((t["training_iteration"], t["status"]) for t in trials)
    assert ends == {(1, "stopped"): 3, (4, "completed"): 1 + 2}, process.stdout
    pairs = [(i["trial_id"], i["training_iteration"]) for i in files.read_csv(tmp_path / "x" / "iterations.csv")]
    assert len(pairs) == len(set(pairs))


FAULTS = """
def train(config, setup, trial):
    faults = ["nan", "data", "gpu memory", "overflow", "memory", "lost", "no change", "fails", None]
    for i, fault in enumerate(faults):  # each once, by the first trials in their order
        mark = setup.run_dir / f".fault-{i}"
        if not mark.exists():
            mark.write_text(Path(trial.folder).parent.name)
            break
    if fault == "nan":
        config = {**config, "train_loop_config": {**config["train_loop_config"], "lr": 1e30}}
    elif fault == "data":
        setup = dataclasses.replace(setup, train=Unreadable(**vars(setup.train)))
    elif fault == "gpu memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")  # no GPU here
    elif fault == "memory":
        held = []
        for _ in range(112):  # 14 GiB, or to where it is ended
            held.append(b"x" * 2**27)
            time.sleep(0.1)
        time.sleep(60)
    elif fault == "overflow":  # in fp16, which torch has on a CPU too
        ds_config = {**setup.ds_config, "fp16": {"enabled": "auto", "initial_scale_power": 4}}
        setup = dataclasses.replace(setup, precision="fp16", ds_config=ds_config)
        with unittest.mock.patch.object(experiment.Trainer, "compute_loss", overflow):
            return experiment.train(config, setup, trial)
    elif fault:  # the next trial of this process comes to harm, once
        from ray.train._internal.session import _TrainSession

        def reset(*args, **kwargs):
            if fault == "lost":
                os._exit(9)
            raise RuntimeError("cannot change over")

        def finish(self, timeout=0, honest=_TrainSession.finish):
            honest(self, timeout)
            self.training_thread.is_alive = lambda: timeout > 0

        if fault == "no change":
            _TrainSession.finish = finish
        else:
            _TrainSession.reset = reset
    experiment.train(config, setup, trial)


def overflow(self, *args, honest=experiment.Trainer.compute_loss, **kwargs):
    return honest(self, *args, **kwargs) * 1e30


class Unreadable(TokenizedSquad):
    def __getitem__(self, i):
        raise ValueError("cannot read question 7")
"""


def test_trials_that_go_wrong(tmp_path, tiny_model, tiny_squad):
    """NaN, broken data, out of memory: failed with the reason, not tried again, bad at their rung.

    A lost process: tried again.
    """
    script = write_script(tmp_path / "faults.py", FAULTS)
    total, used = psutil.virtual_memory().total, psutil.virtual_memory().used
    process = run_script(
        *small_search(tiny_model, tiny_squad, 16), "--max_t", 16, "--output_dir", tmp_path,
        "--run_name", "x", script=script, RAY_memory_usage_threshold=str((used + 6 * 2**30) / total),
    )  # fmt: skip
    out = process.stdout
    assert process.returncode == 0, out + process.stderr
    trials = {t["trial_id"]: t for t in files.read_csv(tmp_path / "x" / "trials.csv")}
    hit = [(tmp_path / "x" / f".fault-{i}").read_text() for i in range(9)]
    reasons = [
        "FloatingPointError eval_loss is nan",
        "ValueError cannot read question 7",
        "OutOfMemoryError CUDA out of memory",
        "FloatingPointError fp16: the gradients overflow again and again",
        ".*out of memory: .*running low on memory",
    ]
    for trial, reason in zip(hit, reasons, strict=False):
        lines = [line for line in out.splitlines() if f"trial {trial} " in line]
        assert len(lines) == 1 and re.search(f"failed after 0 iterations: {reason}", lines[0]), lines
        assert (trials[trial]["status"], trials[trial]["training_iteration"]) == ("failed", 0)
    assert len(set(hit)) == 9 and Counter(t["status"] for t in trials.values()) == {
        "failed": 5,
        "stopped": 10,
        "completed": 1,
    }
    lost = [line for line in out.splitlines() if "goes on from iteration 0: " in line]
    assert len(lost) == 3, lost
    for line, reason in zip(
        lost,
        ["The actor is dead", "did not finish resetting from its previous trial", "cannot change over"],
        strict=True,
    ):
        assert re.search(reason, line) and trials[re.search("trial (\\w+)", line).group(1)]["status"] != "failed", line


def test_all_trials_fail(tmp_path, tiny_squad, tiny_model):
    """Each failure is told with its reason; exit code 1; what there is stays."""
    body = "def train(config, setup, trial):\n    raise RuntimeError('not today')\n"
    process = run_script(
        "--model",
        tiny_model,
        "--dataset",
        tiny_squad,
        *SMALL,
        "--output_dir",
        tmp_path,
        "--run_name",
        "x",
        "--max_concurrent_trials",
        1,
        script=write_script(tmp_path / "fails.py", body),
    )
    assert process.returncode == 1, process.stdout + process.stderr
    assert process.stdout.count("failed after 0 iterations") == 4 and process.stdout.count("error.txt)") == 4
    assert (
        "all 4 trials of the first rung failed, the last one: RuntimeError" in process.stderr
        and f"{tmp_path}/x" in process.stderr
    )
    assert [t["status"] for t in files.read_csv(tmp_path / "x" / "trials.csv")] == ["failed"] * 4
    assert json.loads((tmp_path / "x" / "run.json").read_text())["status"] == "failed"
