"""Earlier results for a new search. A search through the command line that uses them: tests/test_extend.py."""

import argparse
import json
import math
import shutil

import pytest
from ray import tune

from hpo import known, search_space
from hpo.bohb.scheduler import HyperBandForBOHB
from hpo.bohb.searcher import TuneBOHB
from hpo.cluster import warm_start
from hpo.cluster.state import save_state
from hpo.errors import BadInput
from hpo.results import provenance
from hpo.squad import loading
from simulation import Simulation

LAYERS = {"lr": tune.loguniform(5e-6, 2e-4), "per_device_bs": tune.choice([1, 2]), "warmup": tune.qrandint(0, 40, 10)}
SPACE = {"train_loop_config": LAYERS}
ARGUMENTS = {"model": "a/b", "metric": "eval_loss", "max_t": 50, "reduction_factor": 4, "seed": 1, "num_samples": 34}


def loss(config, t):
    return abs(math.log10(config["train_loop_config"]["lr"]) + 4) + 1 / t


def pair(observations=()):
    searcher = TuneBOHB(seed=0)
    searcher.add_earlier_results(list(observations))
    searcher.set_search_properties("loss", "min", SPACE)
    return searcher, HyperBandForBOHB(metric="loss", mode="min", max_t=50, reduction_factor=4)


@pytest.fixture
def earlier(tmp_path):
    """The folder of a run, and its searcher."""
    searcher, scheduler = pair()
    simulation = Simulation(searcher, scheduler, 34, loss)
    simulation.run()
    rows, configs = {}, {}
    for trial in simulation.trials:
        config = configs[trial.trial_id] = searcher.suggested[trial.trial_id]["config"]["train_loop_config"]
        rows[trial.trial_id] = {
            "trial_id": trial.trial_id, "status": "stopped", "training_iteration": trial.iteration,
            "eval_loss": loss({"train_loop_config": config}, trial.iteration),
        }  # fmt: skip
    folder = tmp_path / "earlier"
    folder.mkdir()
    run = {"arguments": ARGUMENTS, "search_space": search_space.describe(SPACE), "ds_config": {}, "status": "done"}
    (folder / "run.json").write_text(json.dumps(run))
    save_state(folder, {"searcher": searcher.get_state(), "log": {"trials": rows, "configs": configs}})
    return folder, searcher


def test_other_files_of_the_data_set_make_another_search(earlier, tiny_squad, tmp_path, capsys):
    """The path is the same, and the content is not: the results would mislead the model."""
    folder, _ = earlier
    run = json.loads((folder / "run.json").read_text())
    run["arguments"] = ARGUMENTS | {"dataset": str(shutil.copytree(tiny_squad, tmp_path / "squad"))}
    data, files = loading.data_files(run["arguments"]["dataset"])
    run["files"] = {"dataset": provenance.hashes(data, [*files["train"], *files["validation"]])}
    (folder / "run.json").write_text(json.dumps(run))
    args = arguments(folder, dataset=run["arguments"]["dataset"])
    assert warm_start.take(args, SPACE) and args.known == []
    (file,) = files["train"]
    file.write_text(file.read_text() + "\n")
    assert not warm_start.take(args, SPACE) and len(args.known) == warm_start.BEST
    assert "another search (other files of dataset); its 3 best settings are tried first" in capsys.readouterr().out


def test_a_search_after_another_one_draws_other_random_settings():
    drawn = []
    for numbers in ((), (1,), (39,), (39,)):
        searcher = TuneBOHB(seed=42)
        for number in numbers:
            searcher.change_seed(number)
        searcher.set_search_properties("loss", "min", SPACE)
        drawn.append([searcher.suggest(str(i))["train_loop_config"]["lr"] for i in range(3)])
    assert drawn[2] == drawn[3] and len({lr for lrs in drawn[:3] for lr in lrs}) == 9


def arguments(*folders, **changes):
    given = {"resume": False, "plan": False, "known": [], "ds_config": {}, "warm_start": list(map(str, folders))}
    return argparse.Namespace(**ARGUMENTS | given | changes)


def test_results_of_the_same_search_enter_the_model(earlier, capsys):
    """As if the new search had observed them: the same model, and suggestions from it at once."""
    folder, before = earlier
    args = arguments(folder, seed=2)
    observations = warm_start.take(args, SPACE)
    found = len(before.observations)
    assert len(observations) == found > 34 and args.known == []
    unknown = f"WARNING: the code of {folder} is not known: leave it out if a trial trains in another way now\n"
    assert capsys.readouterr().out == f"--warm_start {folder}: {found} results at rungs enter the model\n{unknown}"
    searcher = TuneBOHB(seed=3, bohb_config={"random_fraction": 0})
    searcher.add_earlier_results(observations)
    searcher.set_search_properties("loss", "min", SPACE)
    assert searcher.densities() == before.densities()
    searcher.suggest("new")
    assert searcher.suggested["new"]["model_based"]


def test_a_state_that_is_restored_has_the_earlier_results(earlier):
    """So the next suggestions are those without the interruption, and nothing counts twice."""
    observations = warm_start.take(arguments(earlier[0]), SPACE)
    whole = Simulation(*pair(observations), 40, loss)
    whole.run()
    cut = Simulation(*pair(observations), 40, loss)
    cut.run(max_reports=100)
    resumed = cut.restart(*pair(observations), saved=True)
    resumed.run()
    searcher, expected = resumed.search_alg.searcher, whole.search_alg.searcher
    assert searcher.suggested == expected.suggested and searcher.bohber.losses == expected.bohber.losses
    assert sum(map(len, searcher.bohber.losses.values())) == len(searcher.observations) + len(observations)


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"model": "c/d"}, "model a/b"), ({"max_t": 27}, "max_t 50"), ({"ds_config": {"fp16": {}}}, "ds_config")],
)
def test_the_best_settings_of_another_search_come_first(earlier, capsys, changes, what):
    folder, before = earlier
    args = arguments(folder, **changes)
    assert warm_start.take(args, SPACE) == []
    text = f"--warm_start {folder}: another search ({what}); its 3 best settings are tried first\n"
    assert capsys.readouterr().out == text
    budget = max(o["budget"] for o in before.observations)
    best = min((o for o in before.observations if o["budget"] == budget), key=lambda o: o["loss"])
    assert args.known[0] == before.suggested[best["trial_id"]]["config"]["train_loop_config"]
    assert len(args.known) == 3 and known.points(args.known)


def test_settings_outside_the_search_space_are_not_taken(earlier, capsys):
    narrow = {"train_loop_config": LAYERS | {"lr": tune.loguniform(1, 2)}}
    args = arguments(earlier[0])
    assert warm_start.take(args, narrow) == [] and args.known == []
    out = capsys.readouterr().out
    assert "another search (lr LogUniform(5e-06, 0.0002)); nothing is taken (others are not in the search" in out


def test_bad_folders(earlier, tmp_path):
    folder, searcher = earlier
    older = argparse.Namespace(**vars(arguments(folder)) | {"lora_r": 8})  # a flag that the earlier run did not have
    assert warm_start.take(older, SPACE) == [] and len(older.known) == 3
    assert len(warm_start.take(arguments(folder, folder), SPACE)) == len(searcher.observations)  # once
    with pytest.raises(BadInput, match="nowhere: not the folder of a run that can be read"):
        warm_start.take(arguments(tmp_path / "nowhere"), SPACE)
    with pytest.raises(BadInput, match="--num_samples 2: there are 3 known settings"):
        warm_start.take(arguments(folder, model="c/d", num_samples=2), SPACE)
    (folder / "state.jsonl").write_text("broken")
    with pytest.raises(BadInput, match="earlier: not the folder of a run that can be read"):
        warm_start.take(arguments(folder), SPACE)
    (folder / "state.jsonl").unlink()
    with pytest.raises(BadInput, match="earlier: it has no state.jsonl: no trial"):
        warm_start.take(arguments(folder), SPACE)
