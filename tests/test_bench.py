"""Benchmarks still run, at a size that says nothing.

Not here: recipe, full_size, faults, slurm_overhead, turnaround --starts and --keeping. They take minutes and run what
other tests run.
"""

import json
import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT


def test_evaluation(monkeypatch, demo_model, capsys):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import evaluation

    for name, value in {"QUESTIONS": 12, "TURNS": 2, "STEPS": 1, "BLOOM_VOCABULARY": 2000}.items():
        monkeypatch.setattr(evaluation, name, value)
    evaluation.main()
    out = capsys.readouterr().out
    assert out.count("12 of 12") == 6 and "\nratio: " in out


def run_bench(name, code):
    """Runs code in a process of its own, with the benchmark as `bench`."""
    command = f"import sys; sys.path.insert(0, 'bench'); import {name} as bench\n{code}"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("way", ["plain", "ours"])
def test_throughput(way, demo_model):
    small = "bench.QUESTIONS, bench.WINDOWS, bench.STEPS = 20, 1, dict.fromkeys(bench.STEPS, 2)"
    out = run_bench("throughput", f"{small}\nbench.train('{way}', bench.SMALL_VOCABULARY)")
    row = json.loads(out.splitlines()[-1])
    assert len(row["rates"]) == 1 and row["rates"][0] > 0 and 0.1 < row["peak"] < 10


def test_memory_forecast():
    small = "bench.HIDDEN, bench.LAYERS, bench.VOCABULARY, bench.LENGTH = 64, 2, 2000, 64"
    row = json.loads(run_bench("memory_forecast", f"{small}\nbench.train(1, 'fp32')").splitlines()[-1])
    assert 0 < row["forecast"] < 2e8 and row["measured"] > 0 and row["seconds"] > 0


REAL = "sys.argv += ['--slots', '4', '--trials', '40', '--ray']; bench.REAL = 8"
QUALITY = "sys.argv += ['--methods', 'ours', 'random', '--problems', 'demo', '--seeds', '2']"


@pytest.mark.parametrize(
    "name, code, says",
    [
        ("startup", "bench.TURNS = 1", r"\na wrong search space .*\n\nratio: \d"),
        ("turnaround", "bench.TRIALS = 2", r"resumed, warm .*\n\nratio: \d"),
        ("scheduling", REAL, r"\nours: 0 failed, .*\n.*\nratio: \d"),
        ("search_quality", QUALITY, r"\nrandom .*\nratio: \d"),
        ("pauses", "bench.PAUSES = 12", r"\n14 pauses of 2 trials of 2 ranks "),
    ],
)
def test_the_others(name, code, says, demo_model, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "bench"), prepend=os.pathsep)  # trials import it
    out = run_bench(name, f"{code}\nbench.main()")
    assert re.search(says, out), out[-2000:]


def test_launches(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import launches

    monkeypatch.setattr(launches, "ROWS", {name: launches.ROWS[name] for name in ("textbook", "ours")})
    launches.main(layers=1, operations=True)
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in launches.ROWS)
    assert re.search(r"\nmessages between two ranks: .*\n\nratio: \d", out)


def run_gpu_sh(*arguments, **environment):
    command = ["bash", ROOT / "bench" / "gpu.sh", *arguments]
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)


@pytest.mark.parametrize("part", ["fp16", "pause", "speed", "launches", "memory", "evaluation"])
def test_part_for_a_gpu(part, tmp_path, demo_model):
    done = run_gpu_sh("--tiny", part, OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / f"{part}.txt").read_text() in done.stdout and len(done.stdout.splitlines()) > 3
    results = json.loads((tmp_path / f"{part}.json").read_text())
    assert results and not any("failed" in result for result in results)
    if part == "pause":
        assert all(result["equal"]["paused"] for result in results)


def test_claims():
    small = "bench.SEARCHES, bench.MANY, bench.IMPORTANCE = 1, 60, {25: 1}"
    out = run_bench("claims", f"{small}\nbench.main()").splitlines()
    assert len(out) == 10 and out[-2].startswith("BOHB, optimum 1.2 | "), out
    assert out[-1].startswith("importance in searches of 25 trials: "), out


def test_gpu_sh_refuses_a_machine_without_a_gpu(tmp_path, demo_model):
    done = run_gpu_sh(OUT=str(tmp_path / "out"))
    assert done.returncode == 2 and re.fullmatch(r"gpu.sh: no GPU .*\n", done.stderr) and not done.stdout
    assert not (tmp_path / "out").exists()
    done = run_gpu_sh("--tiny", "nonsense")
    assert done.returncode == 2 and "no part 'nonsense'" in done.stderr


def test_gpu_sh_goes_on_after_a_part_that_fails(tmp_path, demo_model):
    """A Python that fails at one part, and hangs in another longer than its limit."""
    python = tmp_path / "python"
    lines = ["[[ $2 == fp16 ]] && exit 1", "[[ $2 == pause ]] && exit 124", "[[ $1 == -c ]] && exit 1", 'echo "at $2"']
    python.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    python.chmod(0o755)
    done = run_gpu_sh("--tiny", PYTHON=str(python), OUT=str(tmp_path))
    assert done.returncode == 1 and done.stdout.endswith("failed: fp16 pause\n")
    went_on = ["at speed", "at launches", "at memory", "at evaluation"]
    assert re.findall("^at .*", done.stdout, re.M) == went_on and "pause: not done within" in done.stdout
