"""Searches and plans that must not change when code is moved. All are simulated, without training and without Ray.

They are compared with goldens.json. This command records them again; say in the commit why they change:

    .venv/bin/python tests/test_goldens.py

`demo` stays as it is: the trials of a search of the demo's model in one slot, with their losses at rungs.
"""

import contextlib
import json
import random
import re
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
FILE = Path(__file__).with_name("goldens.json")
SEARCHES = 20
REFUSED = [  # command lines that end with exit code 2 and one line
    "--max_t 0", "--max_t three", "--reduction_factor 1", "--reduction_factor 3 4", "--num_samples 0",
    "--cpus_per_trial 0", "--cpus_per_trial 9999", "--gpus_per_trial -1", "--gpus_per_trial 99",
    "--max_concurrent_trials -1", "--max_train_samples 0", "--max_eval_samples 0", "--seed -1", "--seed 4294967296",
    "--num_train_epochs 0", "--num_train_epochs nan", "--trial_timeout 0", "--metric loss",
    "--metric_language fr", "--precision int8",
    "--report_to comet", "--nonsense", "--model no/such/model", "--model .", "--dataset no/such/data", "--dataset .",
    "--deepspeed none.json", "--deepspeed list.json", "--deepspeed offload.json",
    "--run_name a/b", "--run_name taken", "--resume --run_name none", "--output_dir file",
    "--plan --seconds_per_iteration soon", "--plan --seconds_per_iteration 0",
]  # fmt: skip
PLANS = [(34, 50, 4, 1), (34, 50, 4, 4), (25, 16, 4, 2), (68, 81, 3, 8)]  # trials, max_t, reduction factor, slots


def search(seed: int) -> list[list]:
    """Runs a search that is stopped and resumed three times.

    Returns:
        A row for each trial: lr, batch size, weight decay, whether the model suggested it, iterations.
    """
    from simulation import Simulation
    from test_bohb import OURS, loss, pair

    chance = random.Random(seed)
    slots, options = chance.randint(1, 4), {"max_t": 16, "seed": seed}
    simulation = Simulation(*pair(OURS, **options), 50, loss, slots=slots, max_t=16)
    for _ in range(3):
        simulation.run(len(simulation.reports) + chance.randint(1, 60))
        simulation = simulation.restart(*pair(OURS, **options), saved=chance.random() < 0.5)
    simulation.run()
    last = {trial_id: t for _, _, trial_id, t, _ in simulation.reports}
    rows = []
    for trial_id, suggestion in simulation.search_alg.searcher.suggested.items():
        searched = suggestion["config"]["train_loop_config"]
        values = [searched[name] for name in ("lr", "per_device_bs", "wd")]
        rows.append([*values, suggestion["model_based"], last[trial_id]])
    return rows


def plan(num_samples: int, max_t: int, reduction_factor: int, slots: int) -> str:
    from hpo.plan import plan
    from test_bohb import SPACE

    setting = {"num_samples": num_samples, "max_t": max_t, "reduction_factor": reduction_factor, "slots": slots}
    return plan.plan(SPACE, [setting], [plan.forecast(SPACE, **setting)], [60.0], (10**9, 10**9), 86400)


def refusals(folder: Path) -> list[str]:
    """The message of each command line in REFUSED, run in a folder."""
    from conftest import run_here

    (folder / "results" / "taken").mkdir(parents=True)
    files = {
        "list": [],
        "offload": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "file").touch()

    def run(command: str) -> str:
        with contextlib.chdir(folder):
            done = run_here(*command.split(), CUDA_VISIBLE_DEVICES="")
        assert done.returncode == 2 and done.stdout == "", (command, done)
        return re.sub(r"(this machine has) \d+", r"\1 N", done.stderr.replace(f"{folder}/", ""))

    return [run(command) for command in REFUSED]


@pytest.fixture(scope="module")
def goldens() -> dict:
    return json.loads(FILE.read_text())


@pytest.mark.parametrize("seed", range(SEARCHES))
def test_searches(goldens, seed):
    found, expected = search(seed), goldens["searches"][seed]
    assert [row[1:] for row in found] == [row[1:] for row in expected]
    assert [row[0] for row in found] == pytest.approx([row[0] for row in expected], rel=1e-9)


def test_the_demo_s_search(goldens):
    """Where each trial trains to the losses of the real one, each suggestion is that of the real search."""
    from simulation import Simulation
    from test_bohb import OURS, pair

    trials = goldens["demo"]
    losses = {lr: losses for lr, *_, losses in trials}

    def train(config, t):
        return losses[config["train_loop_config"]["lr"]][str(t)]

    searcher, scheduler = pair(OURS, max_t=16, seed=42, max_concurrent=1)
    simulation = Simulation(searcher, scheduler, len(trials), train, max_t=16, rungs_only=True)
    simulation.run()
    suggested = searcher.suggested.values()
    found = [[*each["config"]["train_loop_config"].values(), each["model_based"]] for each in suggested]
    assert found == [trial[:4] for trial in trials]
    reached = {trial.config["train_loop_config"]["lr"]: str(trial.iteration) for trial in simulation.trials}
    assert reached == {lr: max(losses, key=int) for lr, *_, losses in trials}


@pytest.mark.parametrize("number", range(len(PLANS)))
def test_plans(goldens, number):
    assert plan(*PLANS[number]).splitlines() == goldens["plans"][number]


def test_refusals(goldens, tmp_path):
    assert dict(zip(REFUSED, refusals(tmp_path), strict=True)) == goldens["refusals"]


if __name__ == "__main__":
    goldens = {
        "demo": json.loads(FILE.read_text())["demo"],
        "plans": [plan(*setting).splitlines() for setting in PLANS],
        "searches": [search(seed) for seed in range(SEARCHES)],
    }
    with tempfile.TemporaryDirectory() as folder:
        goldens["refusals"] = dict(zip(REFUSED, refusals(Path(folder)), strict=True))
    FILE.write_text(json.dumps(goldens, indent=1).replace("\n   ", " ").replace("\n  ]", " ]") + "\n")
