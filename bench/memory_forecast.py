"""The forecast of hpo/plan/memory.py against the memory that a training takes on the CPU of this machine.

    .venv/bin/python bench/memory_forecast.py        # minutes, because fp16 is slow on a CPU; 3 GB of memory

A random BLOOM of 4 layers and 512 dimensions with a vocabulary of 100,000, 64 million parameters, trains for two
optimizer steps on sequences of 256 tokens with the engine of a trial. Each row is a process of its own.

Measured is the largest resident memory (VmHWM) above that of the process before it makes the model, after its imports
and the training of a tiny model. The C library is told to give back each free block above 1 MB at once: without that it
keeps memory that torch's allocator on a GPU would use again. The forecast is that of weights, optimizer and the larger
one of training's two phases. What it adds for CUDA has no counterpart on a CPU. The last line is the ratio of forecast
and measurement that is furthest from 1.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import launches
import numpy as np
import torch
import transformers

import raytune_bayesian
from hpo.plan import memory
from hpo.squad import evaluation, precision

HIDDEN, LAYERS, HEADS, VOCABULARY = 512, 4, 8, 100_000
BATCH_SIZE, LENGTH, ANSWER, STEPS = 2, 256, 16, 2  # in the second step Adam's state is there
ROWS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (0, "fp16"), (1, "fp16")]  # ZeRO stage, precision
LIMIT = 0.15  # of the ratio from 1


def status(name: str) -> int:
    """Bytes that a line of /proc/self/status names."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def ds_config(stage: int, parameters: int) -> dict:
    """The DeepSpeed configuration with a bucket that is as large as the gradients.

    In a larger bucket the CPU would never touch the rest. A GPU has to hold that too.
    """
    zero = {"stage": stage, "reduce_bucket_size": parameters}
    return common.ds_config(stage) | {"zero_optimization": zero}


def train(stage: int, kind: str) -> None:
    """Prints a row as JSON: forecast and measured memory in bytes, seconds of the forecast.

    Args:
        stage: ZeRO stage.
        kind: "fp16", "bf16" or "fp32".
    """
    launches.allow_fp16()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    sizes = {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    config = transformers.BloomConfig(vocab_size=VOCABULARY, **sizes)
    parameters = VOCABULARY * HIDDEN + LAYERS * (12 * HIDDEN**2 + 13 * HIDDEN) + 4 * HIDDEN
    rng = np.random.default_rng(0)
    rows = [
        {"input_ids": rng.integers(3, VOCABULARY, LENGTH), "prompt_length": LENGTH - ANSWER}
        for _ in range(STEPS * BATCH_SIZE)
    ]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        setup = common.setup_of_questions(rows, rows, stage, kind, ds_config=ds_config(stage, parameters))
        began = time.time()
        sizes = BATCH_SIZE, LENGTH, ANSWER, BATCH_SIZE * LENGTH, ANSWER
        f = memory.forecast(folder, setup.ds_config, kind, *sizes)
        seconds = time.time() - began
        small = common.setup_of_questions(rows, rows, stage, kind, ds_config=ds_config(stage, 10**6))
        precision.check_once(raytune_bayesian.make_trainer, {"seed": 0}, small, common.one_rank())
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins here
        before = status("VmRSS")
        torch.manual_seed(0)
        model = evaluation.fuse_gelu(transformers.BloomForCausalLM(config))
        assert model.num_parameters() == parameters
        hyperparameters = {"lr": 1e-5, "wd": 0.01, "per_device_bs": BATCH_SIZE, "seed": 0}
        trainer = raytune_bayesian.make_trainer(model, rows, hyperparameters, setup, common.one_rank(), folder, 3)
        trainer.train()
    forecast, measured = f.weights + f.optimizer + max(f.backward, f.step), status("VmHWM") - before
    print(json.dumps({"forecast": forecast, "measured": measured, "before": before, "seconds": seconds}))


def main() -> None:
    """Prints the table."""
    print(f"limit: forecast and measurement within {LIMIT:.0%}")
    head = f"{'ZeRO stage':<12}{'precision':>9}{'forecast GB':>13}{'measured GB':>13}{'ratio':>7}"
    print(f"{head}{'seconds of the forecast':>25}")
    ratios = []
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
    for stage, kind in ROWS:
        command = [sys.executable, __file__, str(stage), kind]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | malloc).stdout
        row = json.loads(output.splitlines()[-1])
        ratios.append(row["forecast"] / row["measured"])
        line = f"{stage:<12}{kind:>9}{row['forecast'] / 1e9:>13.2f}{row['measured'] / 1e9:>13.2f}{ratios[-1]:>7.2f}"
        print(f"{line}{row['seconds']:>25.1f}", flush=True)
    print(f"ratio: {max(ratios, key=lambda ratio: abs(ratio - 1)):.2f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(int(sys.argv[1]), sys.argv[2])
    else:
        main()
