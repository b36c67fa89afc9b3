"""A small trial that --check runs on a node: the script's own `train` on a few questions, timed.

Its training has three iterations of STEPS optimizer steps, on the same questions. The largest batch of the search
space is used first:

    iteration 1   warm-up, then a rung: the trial writes its checkpoint, ends, and goes on from the checkpoint
    iteration 2   no rung: optimizer steps and eval_loss are timed
    iteration 3   the end of the training: an evaluation with EM and F1 is timed

Then the first iteration is run with the smallest batch, to time its optimizer steps.
"""

import contextlib
import dataclasses
import functools
import gc
import math
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from hpo import search_space
from hpo.cluster import gpu_check
from hpo.cluster.trial import TrialContext, gpu_memory
from hpo.squad.group import Group
from hpo.squad.ranks import Ranks, TrialPaused
from hpo.squad.setup import Setup

STEPS = 8  # of the first ones fp16 skips some, until its loss scale has settled
QUESTIONS = 32  # for the evaluation


class MeasuringContext(TrialContext):
    """The context of a trial without Tune: keeps its reports, and times its optimizer steps.

    Args:
        group: the ranks of the trial.
        folder: where to write checkpoints.
        checkpoint: the checkpoint to go on from, or None.
        last: the iteration after which the trial is ended, as at a rung.
    """

    def __init__(self, group: Group, folder: str, checkpoint: str | None, last: int):
        super().__init__(group, folder, checkpoint, stop_file=None, scores=Path(folder) / "scores")
        self.last, self.reports, self.saved = last, [], None

    def start_iteration(self) -> None:
        """The iteration begins now."""
        super().start_iteration()
        self.first_step_at = None

    def must_stop(self) -> bool:
        """False. `train` asks after each optimizer step but the last of an iteration."""
        if self.first_step_at is None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.first_step_at = time.time()
        return False

    def begin(self, part: str) -> None:
        """Notes the seconds of an optimizer step. The first step of an iteration has the longest question."""
        if part == "evaluation":
            self.step_seconds = (time.time() - self.first_step_at) / (STEPS - 1)
        super().begin(part)

    def send(self, metrics: dict, checkpoint: Path | None) -> None:
        """Keeps a report. Ends the trial after its last iteration."""
        self.reports.append(metrics | {"step_seconds": self.step_seconds})
        self.saved = checkpoint and str(checkpoint)
        if metrics["training_iteration"] == self.last:
            raise TrialPaused


def small_setup(setup: Setup, batch_size: int, folder: Path) -> Setup:
    """The setup of a search with few questions: evenly spread over the lengths, and the longest.

    Args:
        setup: what all trials share.
        batch_size: sequences of an optimizer step, in all ranks.
        folder: for the checkpoints, in the results folder.
    """
    return dataclasses.replace(
        setup,
        run_dir=folder,
        train=setup.train.take(spread(setup.train.lengths, STEPS * batch_size)),
        selection=setup.selection.take(spread(setup.selection.lengths, QUESTIONS)),
        max_t=3,
        num_train_epochs=3,
    )


def spread(lengths: np.ndarray, count: int) -> np.ndarray:
    """Indices (count,) of sequences: the middle of each of `count` - 1 classes of length, and the longest sequence.

    Some come twice if there are fewer sequences than `count`.
    """
    middles = (np.arange(count - 1) + 0.5) * len(lengths) / max(1, count - 1)
    return np.argsort(lengths, kind="stable")[[*middles.astype(int), len(lengths) - 1]]


def batch_sizes(space: dict, setup: Setup, largest: dict) -> list[tuple[dict, int]]:
    """The largest and the smallest batch of the search space, or one where they are the same.

    Args:
        space: the search space.
        setup: what all trials share.
        largest: see search_space.largest_trial.

    Returns:
        Pairs of a train_loop_config and the sequences of its optimizer step in all ranks.
    """
    searched, ranks, found = space["train_loop_config"], max(1, setup.gpus_per_trial), {}
    names = ("per_device_bs", "gradient_accumulation_steps")
    for choose in (search_space.largest, search_space.smallest):
        config = {name: search_space.values(domain)[0] for name, domain in searched.items()}
        config |= {"lora_r": largest["lora_r"]} if "lora_r" in searched else {}
        config |= {name: int(choose(searched[name])) for name in names if name in searched}
        own = setup.hyperparameters(config)
        found.setdefault(math.prod(own[name] for name in names) * ranks, config)
    return [(config, size) for size, config in found.items()]


def run(train, setups: list[tuple[dict, Setup]]) -> dict:
    """Runs the small trial in this process, and on several GPUs in ranks beside it.

    Args:
        train: of the script.
        setups: pairs of a train_loop_config and its small setup; the one with the largest batch first.

    Returns:
        {"step_seconds": a number for each setup, "loss_seconds" and "scored_seconds": of an evaluation of QUESTIONS
        questions without and with EM and F1, "checkpoint_seconds", "peak_bytes": see peak_bytes, the most of all ranks,
        "gpu_bytes": memory of a GPU, or None, "skipped_steps", "steps", "last_skipped_steps": of the last STEPS,
        "eval_loss", "exact_match", "f1"}.
    """
    setup, found = setups[0][1], {}
    if setup.gpus_per_trial:
        gpu_check.visible(setup.precision)
    body = functools.partial(run_rank, train=train, setups=setups, found=found)
    Ranks(body, max(1, setup.gpus_per_trial)).run({})
    return found


def run_rank(_, group: Group, train, setups: list[tuple[dict, Setup]], found: dict) -> None:
    """One rank's part of the small trial. For the arguments see `run`; rank 0 puts the results into `found`."""
    setup = setups[0][1]
    torch.set_num_threads(max(1, setup.cpus_per_trial // group.size))
    check_all_reduce(group)
    with contextlib.ExitStack() as stack:
        folder = None
        if group.rank == 0:
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=setup.run_dir, ignore_cleanup_errors=True))
        folder = group.broadcast(folder)

        def part(number: int, rungs: list[int], last: int, checkpoint: str | None = None) -> MeasuringContext:
            config, own = setups[number]
            context = MeasuringContext(group, folder, checkpoint, last)
            with contextlib.suppress(TrialPaused):
                train({"train_loop_config": config, "rungs": rungs}, own, context)
            gc.collect()
            return context

        first = part(0, [1, 3], last=1)
        resumed = part(0, [1, 3], last=3, checkpoint=group.broadcast(first.saved))
        smallest = [part(number, [3], last=1) for number in range(1, len(setups))]
        peaks = group.gather(peak_bytes())
    if group.rank == 0:
        plain, end = resumed.reports
        reports = [*first.reports, plain, end]
        found |= {name: end[name] for name in ("eval_loss", "exact_match", "f1")}
        found |= {"skipped_steps": sum(r["skipped_steps"] for r in reports), "steps": STEPS * len(reports)}
        found["last_skipped_steps"] = end["skipped_steps"]
        found |= {"step_seconds": [(plain["step_seconds"] + end["step_seconds"]) / 2]}
        found["step_seconds"] += [context.reports[0]["step_seconds"] for context in smallest]
        found |= {"loss_seconds": plain["evaluation_seconds"], "scored_seconds": end["evaluation_seconds"]}
        found |= {"checkpoint_seconds": first.reports[0]["checkpoints_seconds"], "peak_bytes": max(peaks)}
        found["gpu_bytes"] = gpu_memory().get("gpu_bytes")


def check_all_reduce(group: Group) -> None:
    """Adds up a million numbers over the ranks, GPU to GPU. Raises RuntimeError if the sum is wrong."""
    if group.size > 1:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        numbers = torch.full((2**20,), float(group.rank + 1), device=device)
        torch.distributed.all_reduce(numbers)
        if not (numbers == group.size * (group.size + 1) / 2).all():
            raise RuntimeError("NCCL: an all-reduce over the GPUs of a trial gives a wrong sum")


def peak_bytes() -> int:
    """The most memory that torch has held on the GPU of this process; without a GPU, the peak of the process."""
    return gpu_memory().get("gpu_reserved_bytes", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
