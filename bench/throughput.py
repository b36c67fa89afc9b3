"""Samples a second and peak memory of training: ours against the plain Trainer, which pads to 512, learns all tokens.

    make demo-data && .venv/bin/python bench/throughput.py        # about five minutes

Lengths are those of SQuAD where it is beside the repository, in ../shared/squad, else those of the demo. Both train a
random BLOOM of 4 layers and 128 dimensions in batches of 2 with DeepSpeed, ours with the engine of a trial. Each row
is a process of its own. There are two vocabularies: a small one, so that a token costs about the same in both, and
one of BLOOM's size.

One thread, as in a trial. Seconds are CPU seconds, which other work on the machine disturbs less than seconds of a
clock. The table has medians of three windows.
"""

import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import common
import launches
import numpy as np
import torch
import transformers

import raytune_bayesian
from hpo.squad import data as squad_data
from hpo.squad import models, reading

SHARED_SQUAD = common.ROOT.parent / "shared" / "squad"
QUESTIONS, BATCH_SIZE, PADDED = 2000, 2, 512
HIDDEN, LAYERS, HEADS = 128, 4, 4
SMALL_VOCABULARY, BLOOM_VOCABULARY = 4096, 250_880
WINDOWS = 3
# Optimizer steps of a window. One of ours is as long as the stretches of 50 batches in which like lengths are grouped.
STEPS = {
    ("plain", SMALL_VOCABULARY): 15,
    ("plain", BLOOM_VOCABULARY): 2,
    ("ours", SMALL_VOCABULARY): 50,
    ("ours", BLOOM_VOCABULARY): 50,
}
LIMIT, MEMORY_LIMIT = 2.2, 0.30


class Clock(launches.Watch):
    """CPU seconds of windows of `steps` optimizer steps, after a first step that is not counted."""

    def __init__(self, steps: int, *of_make):
        super().__init__(*of_make)
        self.steps, self.marks = steps, []

    def on_step(self, step, control):
        """Notes the time at the end of a window."""
        if (step - 1) % self.steps == 0:
            self.marks.append(time.process_time())
            control.should_training_stop = len(self.marks) > WINDOWS


def train(way: str, vocabulary: int) -> None:
    """Prints a row as JSON: samples a second by window, peak memory in GB, tokens a sample."""
    transformers.set_seed(0)
    files = reading.find_squad_files(SHARED_SQUAD if SHARED_SQUAD.is_dir() else common.DEMO / "squad")
    examples = squad_data.subset(reading.read_squad(files["train"]), QUESTIONS, seed=0)
    tokenizer = models.load_tokenizer(common.DEMO / "model")
    tokenizer = tokenizer.train_new_from_iterator((e["context"] for e in examples), SMALL_VOCABULARY)
    data = squad_data.tokenize(examples, tokenizer, raytune_bayesian.MAX_LENGTH, training=True)
    width = PADDED if way == "plain" else float(np.median(data.lengths))
    order = raytune_bayesian.data_order(data.lengths, 1.0, BATCH_SIZE, seed=0)
    data = torch.utils.data.Subset(data, order)
    sizes = {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    model = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=vocabulary, **sizes))
    way_of_launches, steps = "textbook" if way == "plain" else way, STEPS[way, vocabulary]
    with tempfile.TemporaryDirectory() as folder:
        made = launches.make(way_of_launches, "fp32", 0, model, data, BATCH_SIZE, folder, PADDED)
        clock = Clock(steps, *made)
        clock.trainer.train()
    rates = [steps * BATCH_SIZE / (after - before) for before, after in itertools.pairwise(clock.marks)]
    assert len(rates) == WINDOWS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"rates": rates, "peak": peak, "width": width}))


def main() -> None:
    """Prints the table."""
    data = "SQuAD" if SHARED_SQUAD.is_dir() else "the demo"
    print(
        f"limit: at least {LIMIT} times the samples/s with the small vocabulary; "
        f"peak memory at least {MEMORY_LIMIT:.0%} lower with BLOOM's"
    )
    titles = f"{'samples/CPU s':>15}{'least-most':>14}{'times':>7}{'peak GB':>9}{'lower':>7}"
    print(f"{f'lengths of {data}':<20}{'vocabulary':>12}{'tokens':>8}{titles}")
    for vocabulary in (SMALL_VOCABULARY, BLOOM_VOCABULARY):
        rows = {}
        for way in ("plain", "ours"):
            command = [sys.executable, __file__, way, str(vocabulary)]
            # Without OMP_NUM_THREADS accelerate takes as many threads as there are cores.
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            row = rows[way] = json.loads(output.splitlines()[-1])
            rate, spread = statistics.median(row["rates"]), f"{min(row['rates']):.2f}-{max(row['rates']):.2f}"
            times, lower = rate / statistics.median(rows["plain"]["rates"]), 1 - row["peak"] / rows["plain"]["peak"]
            numbers = f"{rate:>15.2f}{spread:>14}{times:>7.2f}{row['peak']:>9.2f}{lower:>7.0%}"
            print(f"{way:<20}{vocabulary:>12,}{row['width']:>8.0f}{numbers}", flush=True)
        if vocabulary == SMALL_VOCABULARY:
            ratio = times
    print(f"ratio: {ratio:.2f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(sys.argv[1], int(sys.argv[2]))
    else:
        main()
