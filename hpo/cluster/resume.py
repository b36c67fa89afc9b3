"""Going on with a search: its state in one file, and a search algorithm that hands out its unfinished trials again.

Ray Tune's own restore knows neither the scheduler's brackets nor the losers of a rung, and hangs (ray#39900). Here the state
of searcher, scheduler and record is saved as one piece, between two events, so that its parts always agree; on resume Tune
starts anew and gets the live trials back as paused ones, each with its id, hyperparameters and last checkpoint.
"""

import copy
from pathlib import Path

from ray.train._internal.session import _TrainingResult
from ray.tune import Checkpoint
from ray.tune.experiment import Trial
from ray.tune.experiment.config_parser import _create_trial_from_spec
from ray.tune.search import SearchGenerator
from ray.tune.utils import flatten_dict, merge_dicts


class ResumableSearch(SearchGenerator):
    """Tune's SearchGenerator around a searcher, which first hands out the live trials of an earlier run.

    One that was running or paused comes back paused: the scheduler resumes it. One that waited for a slot waits again, so
    that no suggestion is drawn earlier than it would have been.

    Args:
        searcher: with its state restored.
        run_dir: the run's folder; it may have been moved.
        live: their {"trial_id", "config", "status", "checkpoint" (path in run_dir, or None), "training_iteration"}, oldest first.
        created: how many trials the earlier run had made.
    """

    def __init__(self, searcher, run_dir: Path, live: list[dict] = (), created: int = 0):
        super().__init__(searcher)
        self.run_dir = run_dir
        # Tune takes one at a time of those that wait for a slot: the others first.
        self.live, self.draining = sorted(live, key=lambda trial: trial["status"] == Trial.PENDING), False
        self._counter = created

    def is_finished(self) -> bool:
        return not self.live and super().is_finished()

    def next_trial(self) -> Trial | None:
        if self.live:
            return self._again(**self.live.pop(0))
        return None if self.draining else super().next_trial()

    def _again(self, trial_id: str, config: dict, status: str, checkpoint: str | None, training_iteration: int) -> Trial:
        spec = copy.deepcopy(self._experiment.spec)
        spec["config"] = merge_dicts(spec["config"], config)
        trial = _create_trial_from_spec(
            spec, self._parser, evaluated_params=flatten_dict(config), experiment_tag=trial_id, trial_id=trial_id
        )
        trial.init_local_path()  # a loser is stopped without ever being started here
        if checkpoint and not (self.run_dir / checkpoint).exists():
            print(f"trial {trial_id} starts from zero: {self.run_dir / checkpoint} is missing", flush=True)
        elif checkpoint:
            metrics = {"training_iteration": training_iteration}
            trial.on_checkpoint(_TrainingResult(Checkpoint(self.run_dir / checkpoint), metrics))
            trial.storage.current_checkpoint_index = int(checkpoint.rsplit("_", 1)[1])
            trial.run_metadata.last_result = {**metrics, "config": trial.config}
        trial.set_status(Trial.PENDING if status == Trial.PENDING else Trial.PAUSED)
        return trial
