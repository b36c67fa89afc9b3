"""The forecast of memory.py against the memory that a training on this machine's CPU takes.

    .venv/bin/python bench/memory_forecast.py        # minutes: in fp16 a CPU is slow; 3 GB of memory

A random BLOOM of 4 layers and 512 dimensions with a vocabulary of 100,000, 64 million parameters, trains for two optimizer steps on sequences of
256 tokens with the engine of a run; each row in a process of its own. Measured is the most resident memory (VmHWM) above what the process had
before the model: after its imports and a training of a tiny model. The C library is told to give back each block above 1 MB at once, as torch's
allocator would use it again. The forecast is that of `weights`, `optimizer` and the most of training; what it adds for CUDA has no
counterpart on a CPU. The last line is the ratio that is furthest from 1.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import raytune_bayesian  # first: sets up Ray's environment

# isort: split
import launches
import numpy as np
import torch
import transformers

from hpo.plan import memory
from hpo.squad import evaluation, ranks

HIDDEN, LAYERS, HEADS, VOCABULARY = 512, 4, 8, 100_000
BATCH_SIZE, LENGTH, ANSWER, STEPS = 2, 256, 16, 2  # in the second step Adam's state is there
ROWS = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (0, "fp16"), (1, "fp16")]  # ZeRO stage, precision
LIMIT = 0.15  # of the ratio from 1


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name + ":"))


def ds_config(stage: int, parameters: int) -> dict:
    """The bucket just as large as the gradients: of a larger one the CPU would not touch the rest, which a GPU has to hold."""
    config = json.loads((ROOT / "ds_config.json").read_text())
    return config | {"zero_optimization": {"stage": stage, "reduce_bucket_size": parameters}}


def train(stage: int, precision: str) -> None:
    """Prints a row as JSON: forecast and measured memory in bytes, seconds of the forecast."""
    launches.allow_fp16()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    sizes = {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    config = transformers.BloomConfig(vocab_size=VOCABULARY, **sizes)
    parameters = VOCABULARY * HIDDEN + LAYERS * (12 * HIDDEN**2 + 13 * HIDDEN) + 4 * HIDDEN
    run, group = {"ds_config": ds_config(stage, parameters), "precision": precision, "seed": 0}, ranks.Group()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        began = time.time()
        f = memory.forecast(folder, run["ds_config"], precision, BATCH_SIZE, LENGTH, ANSWER, BATCH_SIZE * LENGTH, ANSWER)
        seconds = time.time() - began
        raytune_bayesian.check_gradients(run | {"ds_config": ds_config(stage, 10**6)}, group)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM from here on
        before = status("VmRSS")
        torch.manual_seed(0)
        model = evaluation.fuse_gelu(transformers.BloomForCausalLM(config))
        assert model.num_parameters() == parameters
        rng = np.random.default_rng(0)
        rows = [{"input_ids": rng.integers(3, VOCABULARY, LENGTH), "prompt_length": LENGTH - ANSWER} for _ in range(STEPS * BATCH_SIZE)]
        hyperparameters = {"lr": 1e-5, "wd": 0.01, "per_device_bs": BATCH_SIZE}
        trainer = raytune_bayesian.make_trainer(model, rows, list(range(len(rows))), hyperparameters, run, group, folder, pad_token_id=3)
        trainer.train()
    forecast = f.weights + f.optimizer + max(f.backward, f.step)
    print(json.dumps({"forecast": forecast, "measured": status("VmHWM") - before, "before": before, "seconds": seconds}))


def main() -> None:
    print(f"limit: forecast and measurement within {LIMIT:.0%}")
    print(f"{'ZeRO stage':<12}{'precision':>9}{'forecast GB':>13}{'measured GB':>13}{'ratio':>7}{'seconds of the forecast':>25}")
    ratios = []
    for stage, precision in ROWS:
        command = [sys.executable, __file__, str(stage), precision]
        environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
        row = json.loads(output.splitlines()[-1])
        ratios.append(row["forecast"] / row["measured"])
        print(f"{stage:<12}{precision:>9}{row['forecast'] / 1e9:>13.2f}{row['measured'] / 1e9:>13.2f}{ratios[-1]:>7.2f}{row['seconds']:>25.1f}", flush=True)
    print(f"ratio: {max(ratios, key=lambda ratio: abs(ratio - 1)):.2f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(int(sys.argv[1]), sys.argv[2])
    else:
        main()
