"""The demo, whole: the search on its model and data learns something, and finds the better hyperparameters."""

import json
import os
import re
import statistics
from collections import Counter

import raytune_bayesian
from conftest import ROOT, run_script
from hpo import files
from hpo.plan import plan
from hpo.results import tables

MAKEFILE = (ROOT / "Makefile").read_text()


def test_demo_search_learns(tmp_path, demo_model):
    """The command of `make demo`, into a folder of the test's own."""
    command = re.search(r"raytune_bayesian.py (--model demo/model .*?)--run_name demo\n", MAKEFILE, re.DOTALL).group(1)
    arguments = command.replace("\\\n", " ").replace("demo/", f"{ROOT}/demo/").split()
    process = run_script(*arguments, "--output_dir", tmp_path, "--run_name", "demo", timeout=900)
    assert process.returncode == 0, process.stdout + process.stderr
    log = (process.stdout + process.stderr).splitlines()
    # After one iteration EM does not show what was learnt. The log may warn of that, and of nothing else.
    others = [line for line in log if not re.match("WARNING: .* rank the trials differently", line)]
    assert len(log) < 400 and not [line for line in others if re.search("(?i)warn|deprecat|traceback", line)], (
        process.stdout + process.stderr
    )
    assert "what the search may claim (docs/results.md):" in log
    folder = tmp_path / "demo"
    trials = files.read_csv(folder / "trials.csv")
    run = json.loads((folder / "run.json").read_text())
    best = json.loads((folder / "best_result.json").read_text())
    completed = [t for t in trials if t["status"] == "completed"]
    print("\n" + "\n".join(process.stdout.splitlines()[-40:]))
    assert len(trials) >= 20 and len(completed) == 6
    assert best["exact_match"] >= 0.5 and run["tests"][-1]["exact_match"] >= 0.5
    searched = best["config"]["train_loop_config"]
    assert searched["lr"] > 5e-5  # of 5e-6 to 2e-4
    k = run["model_based_suggestions"]["k"]
    assert k >= 5
    # what the model suggested is better than what was drawn at random, at the rung that all of a bracket came to
    iterations = files.read_csv(folder / "iterations.csv")
    first = {i["trial_id"]: i["eval_loss"] for i in iterations if i["training_iteration"] == 1}
    chosen = tables.ranked(trials, "eval_loss")[0]["trial_id"]
    assert 2 * first[chosen] < max(
        first.values()
    )  # hyperparameters matter; by the last rung a good search has only good ones left
    from_model = [first[t["trial_id"]] for t in trials[:16] if t["model_based"]]
    at_random = [first[t["trial_id"]] for t in trials[:16] if not t["model_based"]]
    assert sum(from_model) / len(from_model) < sum(at_random) / len(at_random)
    # the plan foretold it: trials at each rung, and how long it takes, given the mean time of an iteration
    arguments = run["arguments"]
    slots = len(os.sched_getaffinity(0))
    size = {name: arguments[name] for name in ("num_samples", "max_t", "reduction_factor")}
    expected = plan.forecast(raytune_bayesian.SEARCH_SPACE, **size, slots=slots)
    at_rungs = Counter(i["training_iteration"] for i in iterations if i["exact_match"] is not None)
    assert at_rungs == {r: sum(n for _, rung, n, _ in expected.rungs if rung == r) for r in (1, 4, 16)}
    assert len(iterations) == expected.iterations
    mean = statistics.mean(i["ended_at"] - i["started_at"] for i in iterations)
    took = max(i["ended_at"] for i in iterations) - min(i["started_at"] for i in iterations)
    print(
        f"iterations took {took:.1f} s, {expected.time * mean:.1f} s by the plan at {mean:.3f} s each, on {slots} slots"
    )


def test_demo_set_is_sound(demo_model):
    """SQuAD v1.1 format, several references, articles of the two sets apart, and a tokenizer that loses nothing."""
    from transformers import AutoTokenizer

    from hpo.squad import reading

    files = reading.find_squad_files(demo_model.parent / "squad")
    train, dev = reading.read_squad(files["train"]), reading.read_squad(files["validation"])
    assert len(train) >= 2000 and len(dev) >= 300
    assert not {e["title"] for e in train} & {e["title"] for e in dev}
    assert not {e["context"] for e in train} & {e["context"] for e in dev}
    assert sum(len(e["answers"]["text"]) > 1 for e in dev) > len(dev) / 2
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    for text in ("naïve café — 東京 🙂", "tabs\tand  spaces", "\u00a0İ"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
