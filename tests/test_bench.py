"""That benchmarks still run, at a size that says nothing: those that no other test comes near."""

import json
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
