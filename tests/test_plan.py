"""--plan: trials, hours, disk and memory of a search, on a machine that need not be able to run it."""

import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT, run_here, run_script
from hpo import machines


@pytest.fixture()
def plan(tmp_path, monkeypatch):
    """Runs --plan in an empty folder, with nothing in the cache of the hub."""
    monkeypatch.delenv("SBATCH_TIMELIMIT", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return lambda *arguments, **environment: run_here("--plan", *arguments, **environment)


@pytest.mark.slow
def test_plan_of_the_default_search(tmp_path, monkeypatch):
    """One whole band: brackets, rungs, full trainings. No file is written, and nothing is downloaded."""
    monkeypatch.delenv("SBATCH_TIMELIMIT", raising=False)
    offline = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = run_script("--plan", "--max_concurrent_trials", 4, before=["env", "-C", str(tmp_path)], **offline)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r" +\d", line)]
    assert [row[:4] for row in rows] == [
        ["1", "3", "22", "66"], ["1", "12", "6", "54"], ["1", "50", "2", "76"], ["2", "12", "8", "96"],
        ["2", "50", "2", "76"], ["3", "50", "4", "200"]
    ]  # fmt: skip
    assert "34 trials, 568 iterations: as many as 11.4 full trainings of 50" in done.stdout
    assert "it needs 8 results at one rung" in done.stdout
    assert "on 4 slots it has them after 12 suggestions, so 22 can come" in done.stdout
    assert "hours: with --seconds_per_iteration" in done.stdout and "disk: known once the model is there" in done.stdout
    assert not list(tmp_path.iterdir())


def test_hours_and_disk(plan, tmp_path, tiny_model):
    (tmp_path / "iterations.csv").write_text("trial_id,started_at,ended_at\na,100,130\nb,100,150\n")
    flags = ["--max_concurrent_trials", 1, "--seconds_per_iteration", tmp_path / "iterations.csv"]
    done = plan(*flags, "--model", tiny_model, SBATCH_TIMELIMIT="4:00:00")
    said = done.stdout + done.stderr
    assert "at 40 s an iteration: 6.31 hours, 6.31 slot-hours, 6.31 of them busy" in done.stdout, said
    assert "time limit of a job, 4.00 hours: at least 2 jobs, one after another, by requeueing" in done.stdout
    assert re.search(
        r"disk at its peak: up to 0.0\d+ GB, for \d+ checkpoints of 0.001\d+ GB and the best model", done.stdout
    )


@pytest.mark.parametrize("settings", [[], ["--reduction_factor", 3, 4]])
def test_memory_of_each_gpu(plan, tiny_model, settings):
    """If the model is there, the plan says which GPUs a trial fits on, in fp16, once for all settings."""
    done = plan("--max_concurrent_trials", 1, "--model", tiny_model, *settings)
    says = "memory of a GPU, in GB, at batch size 2, fp16, ZeRO stage 0: weights 0.000141"
    assert done.returncode == 0 and done.stdout.count(says) == 1, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.partition("GPU, GB ")[2].splitlines()[1:]]
    assert [row[:2] for row in rows] == [[size, "yes"] for size in ("16", "24", "32", "40", "80")]
    assert [float(row[2]) for row in rows] == pytest.approx([15, 23, 31, 39, 79], abs=0.5)


def test_memory_of_another_deepspeed_configuration(plan, tmp_path, tiny_model):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    done = plan("--model", tiny_model, "--deepspeed", tmp_path / "ds.json", "--precision", "bf16")
    assert "at batch size 2, bf16, ZeRO stage 1: weights 7.04e-05" in done.stdout, done.stdout + done.stderr
    (tmp_path / "ds.json").write_text("{")
    done = plan("--deepspeed", tmp_path / "ds.json")
    assert done.returncode == 2 and f"--deepspeed {tmp_path}/ds.json" in done.stderr


def test_settings_side_by_side(plan):
    done = plan("--reduction_factor", 3, 4, "--max_concurrent_trials", 4, 8, "--seconds_per_iteration", 36)
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r" +\d", line)]
    assert [row[:4] for row in rows] == [
        ["4", "3", "62", "872"],
        ["8", "3", "62", "872"],
        ["4", "4", "34", "568"],
        ["8", "4", "34", "568"],
    ]
    assert all(float(row[-1]) == pytest.approx(float(row[-2]) * int(row[0]), abs=0.05) for row in rows)  # slot-hours


def test_slots_of_the_cluster(plan, tmp_path):
    """With Slurm, the slots are those of cluster.env."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").touch(mode=0o755)
    done = plan(PATH=f"{tmp_path}/bin:{os.environ['PATH']}", NUM_WORKERS="3", GPUS_PER_NODE="4")
    assert done.stdout.startswith("the nodes for trials have 12 slots"), done.stdout + done.stderr


@pytest.mark.slow
def test_plan_in_a_job_is_for_its_time_limit(tmp_path):
    """Of Slurm the answer of squeue alone. It counts more than a variable of the submission."""
    (tmp_path / "squeue").write_text('#!/bin/sh\necho "$@" > "$0.asked"\necho 4:00:00\n')
    (tmp_path / "squeue").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "VENV": sys.prefix, "SLURM_JOB_ID": "7"}
    environment |= {"SLURMD_NODENAME": "node1", "SBATCH_TIMELIMIT": "1", "NUM_WORKERS": "4", "GPUS_PER_NODE": "0"}
    command = ["bash", "head_node.slurm", "--plan", "--seconds_per_iteration", "60"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "\ntime limit of a job, 4.00 hours: " in done.stdout, done
    assert (tmp_path / "squeue.asked").read_text().endswith(" -j 7\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--max_t", 0], "--max_t 0: must be at least 1"),
        (["--reduction_factor", 4, 1], "--reduction_factor 1: must be at least 2"),
        (["--seconds_per_iteration", "nowhere.csv"], "--seconds_per_iteration nowhere.csv: neither a number nor"),
        (["--seconds_per_iteration", 0], "--seconds_per_iteration 0: must be above 0"),
    ],
)
def test_bad_input(plan, arguments, message):
    done = plan(*arguments)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1 and message in done.stderr


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:00", 7200),
        ("1-0", 86400),
        ("1-12:30", 131400),
        ("1-00:00:01", 86401),
        ("UNLIMITED", None),
        ("", None),
    ],
)
def test_time_limits_in_the_formats_of_slurm(text, seconds):
    assert machines.seconds_of(text) == seconds


def test_trainings_after_the_search_are_counted(plan):
    """Also with a budget, on top of it. Repeats of the baseline only where there is one."""
    flags = ["--max_concurrent_trials", 4, "--seconds_per_iteration", 60, "--finish", 2, "--repeats", 3]
    done = plan(*flags, "--try", "lr=2e-5,per_device_bs=1,wd=0", "--baseline")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["finish", "50", "2", "100"] in [row[:4] for row in rows], done.stderr
    assert ["repeats", "50", "6", "300"] in [row[:4] for row in rows]
    assert "34 trials, 1015 iterations" in done.stdout  # 615 of the search, 100, and 300
    length = re.search(r"time: that of (\d+) iterations", done.stdout)[1]
    assert f"60 s an iteration: {int(length) / 60:.2f} hours" in done.stdout
    done = plan(*flags, "--hours", 5)
    assert "trained to the end, and --finish and --repeats come on top\n" in done.stdout, done.stderr
    assert any(line.split()[:4] == ["repeats", "50", "3", "150"] for line in done.stdout.splitlines())
