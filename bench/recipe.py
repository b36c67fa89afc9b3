"""The whole demo search against the textbook recipe, at equal settings, one after the other on this machine.

    make demo-data && .venv/bin/python bench/recipe.py        # half an hour on two cores

The textbook recipe: Ray's own TuneBOHB and HyperBandForBOHB. Each trial is a fresh process that tokenises the data and
pads it to 512. There are no checkpoints, so a promoted trial starts again from zero. It computes eval_loss only, no EM
and no F1. Both search the same space with the same number of trials, iterations and questions, and train with
DeepSpeed.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
from ray import tune
from ray.tune.schedulers import HyperBandForBOHB
from ray.tune.search.bohb import TuneBOHB

import raytune_bayesian
from hpo import arguments, checks, files
from hpo.bohb.brackets import band_size
from hpo.squad import data, loading

SETTINGS = [
    "--model", f"{common.DEMO}/model", "--dataset", f"{common.DEMO}/squad", "--max_t", "16",
    "--num_train_epochs", "0.7", "--max_eval_samples", "200",
]  # fmt: skip
PADDED = 512
LIMIT = 4.0


def textbook_trial(config, args, ds_config, train_examples, selection_examples):
    """One trial from its start, whatever was done before."""
    import copy
    import math

    import torch
    import transformers

    from hpo.squad import group

    # Ray's TuneBOHB suggests numpy values, which torch's DataLoader and DeepSpeed refuse.
    values = config["train_loop_config"].items()
    searched = {name: value.item() if hasattr(value, "item") else value for name, value in values}
    group.join()
    transformers.set_seed(args.seed)
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)

    def tokenize(examples):
        parts = [(e["question"], e["context"], e["answers"]["text"][0]) for e in examples]
        texts = [f"Question: {q} Context: {c} Answer: {a}{tokenizer.eos_token}" for q, c, a in parts]
        rows = tokenizer(texts, padding="max_length", truncation=True, max_length=PADDED)
        return [
            {"input_ids": i, "attention_mask": m, "labels": copy.copy(i)}
            for i, m in zip(rows.input_ids, rows.attention_mask, strict=True)
        ]

    class Report(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_evaluate = state.global_step in last_steps

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            iteration = last_steps.index(state.global_step) + 1
            tune.report({"training_iteration": iteration, "eval_loss": metrics["eval_loss"]})

    train, selection = tokenize(train_examples), tokenize(selection_examples)
    steps = math.ceil(round(len(train) * args.num_train_epochs) / searched["per_device_bs"])
    last_steps = [round(t * steps / args.max_t) for t in range(1, args.max_t + 1)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(args.model),
            args=transformers.TrainingArguments(
                output_dir=folder,
                learning_rate=searched["lr"],
                weight_decay=searched["wd"],
                max_steps=steps,
                per_device_train_batch_size=searched["per_device_bs"],
                per_device_eval_batch_size=8,
                deepspeed=ds_config,
                use_cpu=not torch.cuda.is_available(),
                fp16=torch.cuda.is_available(),
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                prediction_loss_only=True,
            ),
            train_dataset=train,
            eval_dataset=selection,
            callbacks=[Report()],
        )
        trainer.train()


def textbook(folder: Path) -> tuple[float, int]:
    """Seconds of the search and iterations that were executed."""
    argv = [*SETTINGS, "--output_dir", str(folder), "--run_name", "textbook"]
    args = checks.check(arguments.parse("", argv))
    train, selection = data.hold_out(loading.load_examples(args.dataset)[0], args.max_eval_samples, args.seed)
    trainable = tune.with_parameters(
        textbook_trial,
        args=args,
        ds_config=checks.read_ds_config(args),
        train_examples=train,
        selection_examples=selection,
    )
    executed = []

    class Count(tune.Callback):
        def on_trial_result(self, iteration, trials, trial, result, **info):
            executed.append(trial.trial_id)

    started = time.time()
    with common.ray_session(args.gpus_per_trial):
        results = tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1, "gpu": args.gpus_per_trial}),
            param_space=raytune_bayesian.SEARCH_SPACE,
            tune_config=tune.TuneConfig(
                metric="eval_loss",
                mode="min",
                num_samples=band_size(args.max_t, args.reduction_factor),
                search_alg=TuneBOHB(seed=args.seed),
                scheduler=HyperBandForBOHB(
                    time_attr="training_iteration",
                    max_t=args.max_t,
                    reduction_factor=args.reduction_factor,
                    stop_last_trials=False,
                ),
            ),
            run_config=tune.RunConfig(name="textbook", storage_path=str(folder), verbose=0, callbacks=[Count()]),
        ).fit()
        seconds = time.time() - started
    if results.errors:  # a baseline that failed is no baseline
        raise results.errors[0]
    return seconds, len(executed)


def ours(folder: Path) -> tuple[float, int, dict]:
    """Seconds of the whole command, test of the best model included, iterations executed, and the result."""
    started = time.time()
    script = str(common.ROOT / "raytune_bayesian.py")
    command = [sys.executable, script, *SETTINGS, "--output_dir", str(folder), "--run_name", "ours"]
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
    scores = f"{result['exact_match']:>8.2f}, {result['f1']:.2f}"
    print(f"{'ours, whole command':<28}{our_seconds:>10.0f}{our_iterations:>22}{scores}")
    print(f"limit: at least {LIMIT} times")
    print(f"ratio: {ratio:.2f}")
