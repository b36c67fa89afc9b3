"""Deletes the checkpoints of a run that no trial needs any more. They are in ray/<trial id>/checkpoint_<number>.

The search keeps two saved states, the last one and the one before it (see TrialLog.save). After an interruption it
may go on from either, so a checkpoint that one of them names is kept.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

UNFINISHED = "saving-*"  # temporary folder of a checkpoint that is being written


def checkpoints_of(run_dir: Path, trial_id: str) -> list[Path]:
    """The checkpoints of a trial on disk, oldest first."""
    return sorted((run_dir / "ray" / trial_id).glob("checkpoint_*"))


def delete_all(run_dir: Path, trial_ids: Iterable[str]) -> None:
    """Deletes all checkpoints of trials that have ended, also one that was never completed."""
    for trial_id in trial_ids:
        for folder in [*checkpoints_of(run_dir, trial_id), *(run_dir / "ray" / trial_id).glob(UNFINISHED)]:
            shutil.rmtree(folder, ignore_errors=True)


def delete_older(run_dir: Path, saved: dict[str, str], saved_before: dict[str, str]) -> None:
    """Deletes the checkpoints of live trials that are older than those of the saved states.

    Args:
        run_dir: the run folder.
        saved: by trial, the checkpoint that the last saved state names, as a path in the run folder.
        saved_before: the same, of the state before it.
    """
    for trial_id, path in saved.items():
        for folder in checkpoints_of(run_dir, trial_id):
            if folder.name < Path(path).name and str(folder.relative_to(run_dir)) != saved_before.get(trial_id):
                shutil.rmtree(folder, ignore_errors=True)


def delete_except(run_dir: Path, needed: Iterable[str | None] = (), keep_trial: str | None = None) -> None:
    """Deletes the checkpoints of all trials, with exceptions.

    Args:
        run_dir: the run folder.
        needed: checkpoints to keep, as paths in the run folder.
        keep_trial: the trial whose checkpoints all stay, or None.
    """
    needed = set(needed)
    for folder in run_dir.glob(f"ray/*/{UNFINISHED}"):  # left by a worker process that was lost
        shutil.rmtree(folder, ignore_errors=True)
    for folder in run_dir.glob("ray/*/checkpoint_*"):
        if folder.parent.name != keep_trial and str(folder.relative_to(run_dir)) not in needed:
            shutil.rmtree(folder, ignore_errors=True)
