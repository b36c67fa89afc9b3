"""Several trials on one GPU: --gpus_per_trial 0.5, 1/3, 0.25."""

import json
import os
import re
import tempfile
from collections import Counter
from types import SimpleNamespace

import pytest
import ray
import torch

from conftest import run_here, run_script
from faulty import write_script
from hpo import arguments, checks, errors, files, machines
from hpo.cluster import trial, watchdogs
from hpo.plan import memory
from hpo.results.slots import slots_of, trials_per_gpu
from slurm_cluster import NO_GPU


@pytest.mark.parametrize("text, value", [
    ("0", 0), ("1", 1), ("2.0", 2), ("1/1", 1), ("0.5", 1 / 2), ("1/2", 1 / 2), (".25", 1 / 4), ("1/3", 1 / 3),
    ("0.333", 1 / 3), ("0.3333", 1 / 3), ("0.2", 1 / 5), ("1/6", 1 / 6), ("1/100", 1 / 100),
])  # fmt: skip
def test_what_a_trial_may_have_of_a_gpu(text, value):
    found = arguments.parse("", ["--gpus_per_trial", text]).gpus_per_trial
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text", ["0.7", "1.5", "0.33", "0.99", "-0.5", "2/3", "1/0", "1/", "1/101", "0.001", "nan", "inf", "half", ""]
)
def test_what_no_trial_may_have_of_a_gpu(text):
    with pytest.raises(errors.BadInput) as error:
        arguments.parse("", [f"--gpus_per_trial={text}"])
    assert str(error.value) == (
        f"--gpus_per_trial {text}: must be whole, or 1/n such as 0.5, 1/3 or 0.25 (n up to 100)"
    )


def test_slots_of_a_node():
    for n in range(2, 101):
        assert trials_per_gpu(1 / n) == n
        for gpus in range(9):
            assert slots_of({"CPU": 999.0, "GPU": float(gpus)}, {"cpu": 1, "gpu": 1 / n}) == gpus * n
    assert slots_of({"CPU": 3.0, "GPU": 2.0}, {"cpu": 1, "gpu": 0.5}) == 3  # as many as there are CPUs
    assert slots_of({"CPU": 9.0, "GPU": 5.0}, {"cpu": 1, "gpu": 2}) == 2
    assert slots_of({"CPU": 9.0}, {"cpu": 2, "gpu": 0}) == 4 and slots_of({"CPU": 9.0}, {"cpu": 2, "gpu": 0.5}) == 0


def test_a_share_needs_a_gpu():
    args = arguments.parse("", ["--gpus_per_trial", "0.5"])
    args.cluster = {"NUM_WORKERS": 2, "GPUS_PER_NODE": 3, "CPUS_PER_NODE": 99}
    checks.check_resources(args)
    assert args.precision == "fp16" and machines.slots(args) == 12
    args.cluster["GPUS_PER_NODE"] = 0
    with pytest.raises(errors.BadInput, match=r"^--gpus_per_trial 0.5: a node for trials \(.*\) has 0$"):
        checks.check_resources(args)


def test_a_resumed_run_keeps_its_share(tmp_path):
    """A run of an older version has a whole number. What no trial may have makes it no folder of a run."""
    (tmp_path / "x").mkdir()
    resume = ["--run_name", "x", "--output_dir", str(tmp_path), "--resume"]
    kept = arguments.kept(arguments.parse("", ["--precision", "fp32"]))

    def resumed(value, *flags):
        facts = {"arguments": kept | {"gpus_per_trial": value}, "search_space": {}}
        (tmp_path / "x" / "run.json").write_text(json.dumps(facts))
        return arguments.parse("", [*resume, *flags]).gpus_per_trial

    for value in (0, 1, 2, 1 / 2, 1 / 3):
        assert resumed(value) == value
    assert resumed(1 / 3, "--gpus_per_trial", "1/3") == 1 / 3
    for flag, given in {"1": "1", "1/3": "0.3333333333333333"}.items():
        with pytest.raises(errors.BadInput) as error:
            resumed(0.5, "--gpus_per_trial", flag)
        message = f"--resume: other arguments than the run's: --gpus_per_trial {given} (the run has 0.5)"
        assert str(error.value) == message
    for value in (0.7, "x", [1], True):
        with pytest.raises(errors.BadInput, match="is not the folder of a run"):
            resumed(value)


def test_plan_of_trials_that_share_a_gpu(tmp_path, tiny_model, monkeypatch):
    """GPU-hours are a part of the slot-hours. The table of GPUs is for all trials of a GPU together."""
    (tmp_path / "sbatch").touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    done = run_here(
        "--plan", "--gpus_per_trial", 0.25, "--model", tiny_model, "--seconds_per_iteration", 60,
        PATH=f"{tmp_path}:{os.environ['PATH']}", GPUS_PER_NODE="2",
    )  # fmt: skip
    assert done.stdout.startswith("the nodes for trials have 8 slots"), done.stdout + done.stderr
    slot_hours = float(re.search(r"([\d.]+) slot-hours", done.stdout)[1])
    assert f"\na slot takes 0.25 GPUs: {slot_hours / 4:.2f} GPU-hours\n" in done.stdout
    peak = float(re.search(r"at its peak ([\d.]+)", done.stdout)[1])
    together = float(re.search(r"\n4 trials share a GPU: ([\d.]+) in all\n", done.stdout)[1])
    (free,) = re.findall(r"^ +16  +yes +([\d.]+)$", done.stdout, re.MULTILINE)
    assert peak > 0.6 and together == pytest.approx(4 * peak, rel=0.01)  # each has a CUDA context of 0.6 GB
    assert float(free) == pytest.approx(16 - together, abs=0.06)


def test_plan_says_how_many_trials_fit_together():
    def forecast_of(ds_config, batch_size, ranks):
        return memory.Forecast(10**9 * (18 if batch_size == 2 else 12), 0, 0, 0, 0, 0, 0, 0, 0, 0)

    lines = memory.plan(forecast_of, "fp16", {"zero_optimization": {"stage": 3}}, [1, 2], 1, 3).splitlines()
    assert "3 trials share a GPU: 54 in all" in lines
    assert [line.split(maxsplit=3) for line in lines[-5:]] == [
        ["16", "no", "-38.0", "--gpus_per_trial 1, batch size 1, ZeRO stage 3"],
        ["24", "no", "-30.0", "--gpus_per_trial 1"],
        ["32", "no", "-22.0", "--gpus_per_trial 1"],
        ["40", "no", "-14.0", "--gpus_per_trial 1/2"],
        ["80", "yes", "26.0"],
    ]  # fmt: skip


def test_trials_that_do_not_fit_on_their_gpu_are_told_once(monkeypatch):
    """With what a trial reports where torch sees a GPU of 16 GB."""
    said, watch_of = [], lambda sharing: watchdogs.SharedGpus(sharing, said.append)

    def report(watch, trial_id, reserved):
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: int(reserved * 1e9))
        watch.on_trial_result(0, [], SimpleNamespace(trial_id=trial_id), trial.gpu_memory())

    two, one = watch_of(2), watch_of(1)
    report(two, "a", 99)  # on a CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    gpu = SimpleNamespace(total_memory=16 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    report(two, "a", 7)
    report(one, "a", 15.9)
    assert not said
    report(two, "b", 7.5)
    report(two, "c", 9)
    assert said == [
        "WARNING: trial b has reserved 7.5 GB of its GPU, and CUDA takes about 0.6 GB more: 2 such trials do not fit "
        "into its 16 GB. Start a new run with a larger --gpus_per_trial, or with smaller batches"
    ]


@pytest.fixture
def two_gpus(ray_token):
    """A Ray cluster with four CPUs and two GPUs that are not there. Yields the environment of a script that joins."""
    before = dict(os.environ)
    environment = {
        "PYTHONPATH": os.pathsep.join([str(NO_GPU), os.environ["PYTHONPATH"]]),
        "RAY_AUTH_TOKEN_PATH": str(ray_token),
    }
    os.environ.update(environment)
    with tempfile.TemporaryDirectory(prefix="bohb-") as folder:
        ray.init(num_cpus=4, num_gpus=2, _temp_dir=folder, include_dashboard=False, log_to_driver=False)
        cluster_env = {"NUM_WORKERS": "1", "GPUS_PER_NODE": "2", "CPUS_PER_NODE": "4"}
        yield environment | cluster_env | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        ray.shutdown()
    os.environ.clear()
    os.environ.update(before)


SHARING = """
def train(config, setup, trial):
    # The first four trials wait for each other: the first one is always out of memory, the second one once.
    name, marks = Path(trial.folder).parent.name, setup.run_dir / "marks"
    marks.mkdir(exist_ok=True)
    tries = len(list(marks.glob(f"{name}+*")))
    (marks / f"{name}+{tries}+{os.environ['CUDA_VISIBLE_DEVICES']}").touch()
    deadline = time.time() + 200
    while len(first := sorted(marks.glob("*+0+*"), key=lambda mark: mark.stat().st_mtime_ns)) < 4:
        assert time.time() < deadline, "there are no four trials side by side"
        time.sleep(0.1)
    always, once = (mark.name.partition("+")[0] for mark in first[:2])
    if name == always or (name == once and tries == 0):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    experiment.train(config, setup, trial)
"""


def test_two_trials_on_each_gpu(tmp_path, tiny_model, tiny_squad, two_gpus):
    """Four trials run side by side on two GPUs. A trial that is out of memory is tried once more, and fails alone."""
    done = run_script(
        "--model", tiny_model, "--dataset", tiny_squad, "--max_t", 2, "--num_train_epochs", 0.1, "--max_eval_samples",
        5, "--num_samples", 6, "--gpus_per_trial", 0.5, "--output_dir", tmp_path, "--run_name", "x",
        script=write_script(tmp_path / "sharing.py", SHARING), **two_gpus,
    )  # fmt: skip
    out, folder = done.stdout, tmp_path / "x"
    assert done.returncode == 0, out + done.stderr
    assert "2 trials share each GPU\nsearch: 6 trials on 4 slots," in out
    first = sorted((folder / "marks").glob("*+0+*"), key=lambda mark: mark.stat().st_mtime_ns)
    assert Counter(mark.name.rpartition("+")[2] for mark in first[:4]) == {"0": 2, "1": 2}

    always, once = (mark.name.partition("+")[0] for mark in first[:2])
    for name in (always, once):
        assert re.search(f"trial {name} .* goes on from iteration 0: .*CUDA out of memory", out), out
    assert re.search(f"trial {always} .* failed after 0 iterations: OutOfMemoryError CUDA out of memory", out), out
    assert out.count("goes on from iteration") == 2 and out.count(" failed after ") == 1
    rows = {row["trial_id"]: row for row in files.read_csv(folder / "trials.csv")}
    assert rows[always]["status"] == "failed" and len(rows) == 6
    assert {row["status"] for name, row in rows.items() if name != always} <= {"stopped", "completed"}

    run = json.loads((folder / "run.json").read_text())
    assert run["arguments"]["gpus_per_trial"] == 0.5
    assert run["gpu_minutes"]["allocated"] == pytest.approx(run["slot_minutes"]["allocated"] / 2)
    iterations = files.read_csv(folder / "iterations.csv")
    busy = sum(row["ended_at"] - row["started_at"] for row in iterations) / 60
    assert run["gpu_minutes"]["busy"] == pytest.approx(busy / 2)
