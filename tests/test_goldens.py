"""What moving code must not change: searches and plans, compared with those that were recorded before. Simulated: no training, no Ray.

    .venv/bin/python tests/test_goldens.py        # records them again in goldens.json; say in the commit why they change
"""

import json
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
FILE = Path(__file__).with_name("goldens.json")
SEARCHES = 20
PLANS = [(34, 50, 4, 1), (34, 50, 4, 4), (25, 16, 4, 2), (68, 81, 3, 8)]  # trials, max_t, reduction factor, slots


def search(seed: int) -> list[list]:
    """The trials of a search that is stopped and taken up again: lr, batch size, weight decay, by the model, iterations."""
    from test_bohb import OURS, loss, pair

    from simulate import Simulation

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
        rows.append([searched["lr"], searched["per_device_bs"], searched["wd"], suggestion["model_based"], last[trial_id]])
    return rows


def plan(num_samples: int, max_t: int, reduction_factor: int, slots: int) -> str:
    import simulate
    from test_bohb import SPACE

    setting = {"num_samples": num_samples, "max_t": max_t, "reduction_factor": reduction_factor, "slots": slots}
    return simulate.plan(SPACE, [setting], [simulate.forecast(SPACE, **setting)], 60.0, 10**9, 86400)


@pytest.fixture(scope="module")
def goldens() -> dict:
    return json.loads(FILE.read_text())


@pytest.mark.parametrize("seed", range(SEARCHES))
def test_searches(goldens, seed):
    found, expected = search(seed), goldens["searches"][seed]
    assert [row[1:] for row in found] == [row[1:] for row in expected]
    assert [row[0] for row in found] == pytest.approx([row[0] for row in expected], rel=1e-9)


@pytest.mark.parametrize("number", range(len(PLANS)))
def test_plans(goldens, number):
    assert plan(*PLANS[number]).splitlines() == goldens["plans"][number]


if __name__ == "__main__":
    goldens = {"plans": [plan(*setting).splitlines() for setting in PLANS], "searches": [search(seed) for seed in range(SEARCHES)]}
    FILE.write_text(json.dumps(goldens, indent=1).replace("\n   ", " ").replace("\n  ]", " ]") + "\n")
