"""That benchmarks still run, at a size that says nothing. Not here: those of minutes that call what other tests do (recipe, full_size,
faults, slurm_overhead)."""

import json
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
