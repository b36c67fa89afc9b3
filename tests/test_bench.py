"""That benchmarks still run, at a size that says nothing. Not here: those of minutes that call what other tests do (recipe, full_size,
faults, slurm_overhead)."""

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


@pytest.mark.parametrize("way", ["plain", "ours"])
def test_throughput(way, demo_model):
    small = "throughput.QUESTIONS = 20; throughput.WINDOWS = 1; throughput.STEPS = dict.fromkeys(throughput.STEPS, 2)"
    command = f"import sys; sys.path.insert(0, 'bench'); import throughput; {small}; throughput.train('{way}', throughput.SMALL_VOCABULARY)"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert len(row["rates"]) == 1 and row["rates"][0] > 0 and 0.1 < row["peak"] < 10


def test_memory_forecast():
    small = "bench.HIDDEN, bench.LAYERS, bench.VOCABULARY, bench.LENGTH = 64, 2, 2000, 64"
    command = f"import sys; sys.path.insert(0, 'bench'); import memory_forecast as bench; {small}; bench.train(1, 'fp32')"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert 0 < row["forecast"] < 2e8 and row["measured"] > 0 and row["seconds"] < 60


@pytest.mark.parametrize(
    "name, command, says",
    [
        ("turnaround", "bench.SLOTS, bench.STARTS, bench.LATER = 2, 1, 1; sys.argv.append('--starts')", r"1 s later +Tune's own .*\n1 s later +ours .*\n\nratio: "),
        ("turnaround", "bench.TRIALS = 2", r"resumed, warm .*\n\nratio: \d"),
        ("scheduling", "sys.argv += ['--slots', '4', '--trials', '40', '--ray']; bench.REAL = 8", r"\nours: 0 failed, .*\n.*\nratio: \d"),
        ("search_quality", "sys.argv += ['--methods', 'ours', 'random', '--problems', 'demo', '--seeds', '2']", r"\nrandom .*\nratio: \d"),
        ("pauses", "bench.PAUSES = 12", r"\n14 pauses of 2 trials of 2 ranks "),
    ],
)
def test_the_others(name, command, says, demo_model):
    command = f"""
import os, sys
sys.path.insert(0, "bench")
import {name} as bench
os.environ["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", ""), "{ROOT}/bench"])  # trials import it
{command}
bench.main()
"""
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and re.search(says, done.stdout), done.stdout[-2000:] + done.stderr[-2000:]


def test_launches(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import launches

    monkeypatch.setattr(launches, "ROWS", {name: launches.ROWS[name] for name in ("textbook", "ours")})
    launches.main(layers=1, operations=True)
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in launches.ROWS) and re.search(r"\nmessages between two ranks: .*\n\nratio: \d", out)


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


def test_gpu_sh_refuses_a_machine_without_a_gpu(tmp_path, demo_model):
    done = run_gpu_sh(OUT=str(tmp_path / "out"))
    assert done.returncode == 2 and re.fullmatch(r"gpu.sh: no GPU .*\n", done.stderr) and not done.stdout and not (tmp_path / "out").exists()
    done = run_gpu_sh("--tiny", "nonsense")
    assert done.returncode == 2 and "no part 'nonsense'" in done.stderr


def test_gpu_sh_goes_on_after_a_part_that_fails(tmp_path, demo_model):
    """A Python that fails at one part, and hangs in another longer than its limit."""
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\n[[ $2 == fp16 ]] && exit 1\n[[ $2 == pause ]] && exit 124\n[[ $1 == -c ]] && exit 1\necho "at $2"\n')
    python.chmod(0o755)
    done = run_gpu_sh("--tiny", PYTHON=str(python), OUT=str(tmp_path))
    assert done.returncode == 1 and done.stdout.endswith("failed: fp16 pause\n")
    assert re.findall("^at .*", done.stdout, re.M) == ["at speed", "at launches", "at memory", "at evaluation"] and "pause: not done within" in done.stdout
