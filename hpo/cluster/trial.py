"""One trial in its worker process: what is around the `train` function of the script.

Imports nothing slow at its top. A worker process is up within seconds, and imports torch when its first trial begins:
Tune waits for a process that starts, see ray_private.py.
"""

import contextlib
import functools
import gc
import math
import shutil
import socket
import tempfile
import time
import traceback
from pathlib import Path

from ray import tune

from hpo import errors
from hpo.files import sync
from hpo.results.provenance import hardware


class TrialContext:
    """What `train` needs to know of its trial, in each of the trial's processes.

    Args:
        group: the ranks of the trial, see hpo/squad/group.py.
        folder: where to write checkpoints.
        checkpoint: the checkpoint to go on from; None for a new trial.
        stop_file: see Setup.
        scores: path of the files for the scores of each question, without their iteration, see
            hpo/results/intervals.py.
    """

    def __init__(self, group, folder: str, checkpoint: str | None, stop_file: Path, scores: Path):
        self.group, self.folder, self.checkpoint, self._stop_file = group, folder, checkpoint, stop_file
        self._scores = scores
        self._asked_at = 0.0
        self.start_iteration()

    def start_iteration(self) -> None:
        """The iteration begins now. `report` calls it too."""
        self._started_at = self._part_since = time.time()
        self._part, self._seconds = "training", {}

    def seconds(self) -> float:
        """Seconds since the iteration began."""
        return time.time() - self._started_at

    def begin(self, part: str) -> None:
        """From now on the iteration's time is that of "evaluation" or "checkpoints", see SlotTime."""
        self._seconds[self._part] = self._seconds.get(self._part, 0.0) + time.time() - self._part_since
        self._part, self._part_since = part, time.time()

    def must_stop(self) -> bool:
        """Whether the search is about to stop, so that the trial should save and report. Looks once a second."""
        stop = False
        if time.time() > self._asked_at + 1:
            self._asked_at = time.time()
            stop = self._stop_file.exists()
        return self.group.broadcast_flag(stop)

    def keep_scores(self, losses, pairs: list[tuple[float, float]], iteration: int) -> None:
        """Writes the scores of each question at a rung. All ranks call it, and rank 0 writes.

        For the arguments see intervals.scores_of.
        """
        if self.group.rank == 0:
            from hpo.results import intervals

            file = self._scores.with_name(f"{self._scores.name}-{iteration}.npz")
            intervals.save(file, intervals.scores_of(losses, pairs))

    def report(self, metrics: dict, checkpoint: Path | None = None) -> None:
        """Reports metrics to Tune. Does not return where Tune pauses or ends the trial.

        All ranks call it, and rank 0 reports.

        Args:
            metrics: of an iteration.
            checkpoint: a folder in `folder`, complete in all ranks. Tune takes it over.
        """
        goes_on = False
        try:
            if self.group.rank == 0:
                if checkpoint:
                    sync(*checkpoint.rglob("*"), checkpoint)
                self.begin("report")
                parts = {f"{part}_seconds": seconds for part, seconds in self._seconds.items() if part != "training"}
                memory = gpu_memory()
                times = {"started_at": self._started_at, "ended_at": time.time(), "node": socket.gethostname()}
                self.send({**parts, **times, "hardware": hardware(), **memory, **metrics}, checkpoint)
                goes_on = True
        finally:  # Tune ends a paused trial by SystemExit, raised in tune.report
            goes_on = self.group.broadcast(goes_on)
        if not goes_on:
            from hpo.squad.ranks import TrialPaused

            raise TrialPaused
        self.start_iteration()

    def send(self, metrics: dict, checkpoint: Path | None) -> None:
        """Hands a report of rank 0 to Tune. Raises where the trial is paused or ended."""
        tune.report(metrics, checkpoint=checkpoint and tune.Checkpoint.from_directory(checkpoint))


def bundles(setup) -> list[dict[str, float]]:
    """The resources of a trial: one bundle a rank.

    Ray lets processes that ask for a part of a GPU share one, and sets CUDA_VISIBLE_DEVICES for them.
    """
    ranks = max(1, setup.gpus_per_trial)
    return [{"CPU": setup.cpus_per_trial / ranks, "GPU": min(1, setup.gpus_per_trial)}] * ranks


def gpu_memory() -> dict[str, int]:
    """The most of its GPU that this process has reserved so far, and all that the GPU has, in bytes.

    It is what torch has reserved; CUDA itself takes more. Empty on a CPU.
    """
    import torch

    if not torch.cuda.is_available():
        return {}
    whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return {"gpu_reserved_bytes": torch.cuda.max_memory_reserved(), "gpu_bytes": whole}


def run(config: dict, train, setup) -> None:
    """The trainable that Tune calls. It returns at the end of the full training.

    Args:
        config: {"train_loop_config": hyperparameters, "rungs": iterations where the trial may be paused}.
        train: called as train(config, setup, context) in each rank.
        setup: what all trials share, see hpo/squad/setup.py.
    """
    from hpo.cluster import gpu_check
    from hpo.squad import ranks

    try:
        if setup.gpus_per_trial:
            gpu_check.visible(setup.precision)
        body = functools.partial(run_rank, train=train, setup=setup)
        ranks.of_this_process(body, max(1, setup.gpus_per_trial)).run(config)
    except Exception as error:
        report_failure(error, setup)


def run_rank(config: dict, group, train, setup) -> None:
    """One rank's part of a trial, from its start or its last checkpoint."""
    import torch

    from hpo.cluster import ray_private
    from hpo.squad import models

    ray_private.rename_checkpoints()
    gc.collect()  # what the trial before it has left
    torch.set_num_threads(max(1, setup.cpus_per_trial // group.size))
    with contextlib.ExitStack() as stack:
        folder = group.broadcast(stack.enter_context(checkpoint_folder(setup)) if group.rank == 0 else None)
        checkpoint = tune.get_checkpoint() if group.rank == 0 else None
        checkpoint = group.broadcast(checkpoint and checkpoint.path)
        # If the checkpoint is of a full training, the search or the process ended after the trial's last report.
        ended = group.broadcast(bool(checkpoint) and group.rank == 0 and models.is_of_full_training(Path(checkpoint)))
        try:
            if not ended:
                scores = setup.run_dir / "scores" / Path(folder).parent.name
                train(config, setup, TrialContext(group, folder, checkpoint, setup.stop_file, scores))
        finally:
            gc.collect()
            if setup.shares_gpu:  # torch keeps freed memory, which the other trials on this GPU may need
                torch.cuda.empty_cache()


def trial_folder(setup) -> Path:
    """The folder of the running trial in the run folder. Its checkpoints are there."""
    return Path(setup.run_dir) / "ray" / tune.get_context().get_trial_id()


def checkpoint_folder(setup) -> tempfile.TemporaryDirectory:
    """The folder in which a running trial writes its checkpoints.

    It is in the folder of the trial's checkpoints, so Tune can take a checkpoint over by renaming it. Removes what a
    lost process of the trial has left.
    """
    folder = trial_folder(setup)
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob("saving-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    return tempfile.TemporaryDirectory(prefix="saving-", dir=folder, ignore_cleanup_errors=True)


def first_time_out_of_memory(setup) -> bool:
    """Whether the running trial was not out of memory before. Notes it in the trial's folder."""
    file = trial_folder(setup) / "out_of_memory.txt"
    first = not file.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(traceback.format_exc())
    return first


def report_failure(error: Exception, setup) -> None:
    """Reports a failed trial to Tune as a result, or raises it if Tune should start the trial again.

    An error that would come again with the same hyperparameters is a result. Storage and installation errors say
    nothing about the hyperparameters: the search stops.
    """
    kind, reason = errors.kind_of(error), errors.one_line(f"{type(error).__name__} {error}")
    result = {"training_iteration": 0, setup.metric: math.nan}
    if kind is errors.Kind.STORAGE:
        tune.report({**result, "storage": f"{reason} (on {socket.gethostname()})"})
    elif kind is errors.Kind.SETUP:
        tune.report({**result, "setup": f"{reason} (on {socket.gethostname()}); {errors.what_to_install(error)}"})
    elif kind is errors.Kind.NODE or isinstance(error, errors.TrialFailed):
        raise error
    elif kind is errors.Kind.MEMORY and setup.shares_gpu and first_time_out_of_memory(setup):
        raise error  # Tune starts the trial again: its neighbour may have taken the memory
    elif kind is errors.Kind.PROCESS:
        raise errors.TrialFailed(reason) from error
    else:
        file = trial_folder(setup) / "error.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(traceback.format_exc())
        tune.report({**result, "failed": f"{reason} ({file})"})
