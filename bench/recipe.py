"""The whole demo search against the textbook recipe, at equal settings, one after the other on this machine.

    make demo-data && .venv/bin/python bench/recipe.py        # half an hour on two cores

The textbook recipe: Ray's own TuneBOHB and HyperBandForBOHB; each trial is a fresh process that tokenises the data and
pads it to 512; no checkpoint, so that a promoted trial starts again from zero; eval_loss only, no EM and no F1.
Both search the same space with the same number of trials, iterations and questions, and train with the same engine.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)  # for the processes of trials

import raytune_bayesian  # first: sets up Ray's environment

# isort: split
import ray
from ray import tune
from ray.tune.schedulers import HyperBandForBOHB
from ray.tune.search.bohb import TuneBOHB

from hpo import checks, files
from hpo.bohb.brackets import band_size
from hpo.squad import data

SETTINGS = ["--model", f"{ROOT}/demo/model", "--dataset", f"{ROOT}/demo/squad", "--max_t", "16", "--num_train_epochs", "0.7",
            "--max_eval_samples", "200"]  # fmt: skip
PADDED = 512
LIMIT = 4.0


def textbook_trial(config, run):
    """One trial from its start, whatever was done before."""
    import copy
    import math

    import torch
    import transformers

    import raytune_bayesian
    from hpo.squad import ranks

    # Ray's TuneBOHB suggests numpy values, which torch's DataLoader and DeepSpeed refuse
    searched = {name: value.item() if hasattr(value, "item") else value for name, value in config["train_loop_config"].items()}
    max_t = run["max_t"]
    raytune_bayesian.GROUPS or raytune_bayesian.GROUPS.append(ranks.Group())
    transformers.set_seed(run["seed"])
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run["model"])

    def tokenize(examples):
        texts = [f"Question: {e['question']} Context: {e['context']} Answer: {e['answers']['text'][0]}" for e in examples]
        rows = tokenizer([t + tokenizer.eos_token for t in texts], padding="max_length", truncation=True, max_length=PADDED)
        return [{"input_ids": i, "attention_mask": m, "labels": copy.copy(i)} for i, m in zip(rows.input_ids, rows.attention_mask)]

    class Report(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_evaluate = state.global_step in last_steps

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            iteration = last_steps.index(state.global_step) + 1
            tune.report({"training_iteration": iteration, "eval_loss": metrics["eval_loss"]})

    train, selection = tokenize(run["train_examples"]), tokenize(run["selection_examples"])
    steps = math.ceil(round(len(train) * run["num_train_epochs"]) / searched["per_device_bs"])
    last_steps = [round(t * steps / max_t) for t in range(1, max_t + 1)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(run["model"]),
            args=transformers.TrainingArguments(
                output_dir=folder, learning_rate=searched["lr"], weight_decay=searched["wd"], max_steps=steps,
                per_device_train_batch_size=searched["per_device_bs"], per_device_eval_batch_size=8, deepspeed=run["ds_config"],
                use_cpu=not torch.cuda.is_available(), fp16=torch.cuda.is_available(), save_strategy="no",
                logging_strategy="no", report_to="none", disable_tqdm=True, prediction_loss_only=True,
            ),  # fmt: skip
            train_dataset=train,
            eval_dataset=selection,
            callbacks=[Report()],
        )
        trainer.train()


def textbook(folder: Path) -> tuple[float, int]:
    """Seconds of the search and iterations that were executed."""
    args = raytune_bayesian.parse_arguments([*SETTINGS, "--output_dir", str(folder), "--run_name", "textbook"])
    ds_config, examples = checks.check(args, raytune_bayesian.SEARCH_SPACE)
    train, selection = data.hold_out(examples[0], args.max_eval_samples, args.seed)
    run = {"model": args.model, "ds_config": ds_config, "max_t": args.max_t, "num_train_epochs": args.num_train_epochs, "seed": args.seed,
           "train_examples": train, "selection_examples": selection}  # fmt: skip
    executed = []

    class Count(tune.Callback):
        def on_trial_result(self, iteration, trials, trial, result, **info):
            executed.append(trial.trial_id)

    with tempfile.TemporaryDirectory(prefix="bohb-") as temp_dir, tempfile.TemporaryDirectory() as trials_dir:
        started = time.time()
        raytune_bayesian.start_ray(args, temp_dir, trials_dir)
        results = tune.Tuner(
            tune.with_resources(tune.with_parameters(textbook_trial, run=run), {"cpu": 1, "gpu": args.gpus_per_trial}),
            param_space=raytune_bayesian.SEARCH_SPACE,
            tune_config=tune.TuneConfig(
                metric="eval_loss",
                mode="min",
                num_samples=band_size(args.max_t, args.reduction_factor),
                search_alg=TuneBOHB(seed=args.seed),
                scheduler=HyperBandForBOHB(
                    time_attr="training_iteration", max_t=args.max_t, reduction_factor=args.reduction_factor, stop_last_trials=False
                ),
            ),
            run_config=tune.RunConfig(name="textbook", storage_path=str(folder), verbose=0, callbacks=[Count()]),
        ).fit()
        seconds = time.time() - started
        ray.shutdown()
    if results.errors:  # a baseline that failed is no baseline
        raise results.errors[0]
    return seconds, len(executed)


def ours(folder: Path) -> tuple[float, int, dict]:
    """Seconds of the whole command, test of the best model included, iterations executed, and the result."""
    started = time.time()
    command = [sys.executable, str(ROOT / "raytune_bayesian.py"), *SETTINGS, "--output_dir", str(folder), "--run_name", "ours"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.time() - started
    result = json.loads((folder / "ours" / "best_result.json").read_text())
    return seconds, len(files.read_csv(folder / "ours" / "iterations.csv")), result


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        our_seconds, our_iterations, result = ours(Path(folder))
        their_seconds, their_iterations = textbook(Path(folder))
    ratio = their_seconds / our_seconds
    print(f"{'':<28}{'seconds':>10}{'iterations executed':>22}{'EM, F1':>12}")
    print(f"{'textbook recipe, search only':<28}{their_seconds:>10.0f}{their_iterations:>22}{'not computed':>14}")
    print(f"{'ours, whole command':<28}{our_seconds:>10.0f}{our_iterations:>22}{result['exact_match']:>8.2f}, {result['f1']:.2f}")
    print(f"limit: at least {LIMIT} times")
    print(f"ratio: {ratio:.2f}")
