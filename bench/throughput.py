"""Samples a second and peak memory of training: ours against the plain Trainer, which pads to 512 and learns all tokens.

    make demo-data && .venv/bin/python bench/throughput.py        # about five minutes

Lengths are those of SQuAD where it lies beside the repository, in ../shared/squad, else those of the demo. Both train a
random BLOOM of 4 layers and 128 dimensions in batches of 2, with the engine of a run, each in a process of its own; once
with a small vocabulary, so that a token costs about the same in both, and once with BLOOM's. One thread, as a trial has;
seconds are those of its CPU, which other work on the machine disturbs less than a clock; medians of three windows.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import raytune_bayesian  # first: sets up Ray's environment

# isort: split
import numpy as np
import transformers

from hpo.squad import data as squad_data
from hpo.squad import evaluation, ranks

SHARED_SQUAD = ROOT.parent / "shared" / "squad"
QUESTIONS, BATCH_SIZE, PADDED = 2000, 2, 512
HIDDEN, LAYERS, HEADS = 128, 4, 4
SMALL_VOCABULARY, BLOOM_VOCABULARY = 4096, 250_880
WINDOWS = 3
# optimizer steps; a window of ours is as long as the stretches of 50 batches inside which like lengths are grouped
STEPS = {("plain", SMALL_VOCABULARY): 15, ("plain", BLOOM_VOCABULARY): 2, ("ours", SMALL_VOCABULARY): 50, ("ours", BLOOM_VOCABULARY): 50}
LIMIT, MEMORY_LIMIT = 2.2, 0.30


class Clock(transformers.TrainerCallback):
    """CPU seconds of windows of `steps` optimizer steps, after a first step that is not counted."""

    def __init__(self, steps: int):
        self.steps, self.marks = steps, []

    def on_step_end(self, args, state, control, **kwargs):
        if (state.global_step - 1) % self.steps == 0:
            self.marks.append(time.process_time())
            control.should_training_stop = len(self.marks) > WINDOWS


def train(way: str, vocabulary: int) -> None:
    """Prints a row as JSON: samples a second by window, peak memory in GB, tokens a sample."""
    group = ranks.Group()
    transformers.set_seed(0)
    files = squad_data.find_squad_files(SHARED_SQUAD if SHARED_SQUAD.is_dir() else ROOT / "demo" / "squad")
    examples = squad_data.subset(squad_data.read_squad(files["train"]), QUESTIONS, seed=0)
    tokenizer = raytune_bayesian.load_tokenizer(ROOT / "demo" / "model")
    tokenizer = tokenizer.train_new_from_iterator((e["context"] for e in examples), SMALL_VOCABULARY)
    sizes = {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    model = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=vocabulary, **sizes))
    clock, steps = Clock(STEPS[way, vocabulary]), STEPS[way, vocabulary]
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, learning_rate=1e-4, per_device_train_batch_size=BATCH_SIZE, max_steps=WINDOWS * steps + 2,
            deepspeed=json.loads((ROOT / "ds_config.json").read_text()), use_cpu=True, save_strategy="no", logging_strategy="no",
            report_to="none", disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        if way == "plain":
            texts = [f"Question: {e['question']} Context: {e['context']} Answer: {e['answers']['text'][0]}" for e in examples]
            rows = tokenizer([t + tokenizer.eos_token for t in texts], padding="max_length", truncation=True, max_length=PADDED)
            data = [{"input_ids": i, "attention_mask": m, "labels": i} for i, m in zip(rows.input_ids, rows.attention_mask)]
            width = PADDED
            trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=[clock])
        else:
            data = squad_data.tokenize(examples, tokenizer, raytune_bayesian.MAX_LENGTH, training=True)
            width = float(np.median(data.lengths))
            trainer = raytune_bayesian.Trainer(
                model=evaluation.fuse_gelu(model),
                args=arguments,
                train_dataset=data,
                data_collator=lambda batch: evaluation.collate(batch, tokenizer.pad_token_id),
                order=raytune_bayesian.data_order(data.lengths, 1.0, BATCH_SIZE, seed=0),
                group=group,
                callbacks=[clock],
            )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    rates = [steps * BATCH_SIZE / (after - before) for before, after in zip(clock.marks, clock.marks[1:])]
    assert len(rates) == WINDOWS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"rates": rates, "peak": peak, "width": width}))


def main() -> None:
    data = "SQuAD" if SHARED_SQUAD.is_dir() else "the demo"
    print(f"limit: at least {LIMIT} times the samples/s with the small vocabulary; peak memory at least {MEMORY_LIMIT:.0%} lower with BLOOM's")
    print(f"{f'lengths of {data}':<20}{'vocabulary':>12}{'tokens':>8}{'samples/CPU s':>15}{'least-most':>14}{'times':>7}{'peak GB':>9}{'lower':>7}")
    for vocabulary in (SMALL_VOCABULARY, BLOOM_VOCABULARY):
        rows = {}
        for way in ("plain", "ours"):
            command = [sys.executable, __file__, way, str(vocabulary)]
            one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # without it accelerate takes as many threads as there are cores
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=one_thread).stdout
            row = rows[way] = json.loads(output.splitlines()[-1])
            rate, spread = statistics.median(row["rates"]), f"{min(row['rates']):.2f}-{max(row['rates']):.2f}"
            times, lower = rate / statistics.median(rows["plain"]["rates"]), 1 - row["peak"] / rows["plain"]["peak"]
            print(f"{way:<20}{vocabulary:>12,}{row['width']:>8.0f}{rate:>15.2f}{spread:>14}{times:>7.2f}{row['peak']:>9.2f}{lower:>7.0%}", flush=True)
        if vocabulary == SMALL_VOCABULARY:
            ratio = times
    print(f"ratio: {ratio:.2f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(sys.argv[1], int(sys.argv[2]))
    else:
        main()
