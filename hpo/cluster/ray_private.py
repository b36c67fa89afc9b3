"""Every use of a private name of Ray."""

import math
import os
import re
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import ray
import ray._private.state
import ray.train._internal.storage
import ray.tune.execution.tune_controller
import ray.tune.tune
from ray import tune
from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.tune import Checkpoint
from ray.tune.experiment import Trial
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hpo import errors
from hpo.files import sync


def saving_folder() -> tempfile.TemporaryDirectory:
    """Where a running trial writes its checkpoints: beside those that it has reported, so that they become one of them by a change of name.

    What an earlier process of the trial was writing when it was lost goes.
    """
    folder = Path(tune.get_context().get_storage().trial_fs_path)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("saving-*"):
        shutil.rmtree(left, ignore_errors=True)
    return tempfile.TemporaryDirectory(prefix="saving-", dir=folder, ignore_cleanup_errors=True)


def persist_current_checkpoint(self, checkpoint: Checkpoint) -> Checkpoint:
    """Instead of Tune's own, which copies: written once, and there as a whole or not at all."""
    self._check_validation_file()
    shutil.rmtree(self.checkpoint_fs_path, ignore_errors=True)  # of a process that was lost before Tune had heard of it
    os.rename(checkpoint.path, self.checkpoint_fs_path)
    sync(Path(self.checkpoint_fs_path).parent)
    return Checkpoint(self.checkpoint_fs_path, self.storage_filesystem)


ray.train._internal.storage.StorageContext.persist_current_checkpoint = persist_current_checkpoint


class NodeOutOfMemory(RayActorError):
    """Ray or the kernel has ended a process because its node, or the job's part of it, ran out of memory."""


class TuneController(ray.tune.execution.tune_controller.TuneController):
    """Tune's own, corrected where a process is lost, and with each slot's process kept. docs/upstream.md has this for Ray.

    Tune's own ends the search when Ray ends a process for its memory, and retries one that the kernel has killed for it; here such a
    trial has failed, and is not tried again, as it would need as much again. A trial whose node has failed it too often has failed
    too, but the scheduler does not hear of it as a bad result. A process that is lost, or fails, while it changes over to its next trial costs that trial all its
    retries with Tune's own, or it is never started; here the trial is started again in another process.

    Tune's own starts one process after the other, and as soon as a warm one is free, which takes the trial over, ends the one that is
    starting: with rungs shorter than that start, slots stay empty. And while trials wait for the others of their rung it ends all idle
    processes but one, so that those that are promoted start in fresh ones. Here processes start side by side, as many as there are slots,
    and each stays as long as a trial may need it.
    """

    START = 120.0  # seconds that a process may take to start before a warm one takes its trial over
    HANGS = 1200.0  # and before it is ended, and the trial started again in another

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        task_failed = self._actor_manager._actor_task_failed
        self._oom_kills: dict[str, ray.ObjectRef] = {}  # by node, when it was first seen: control groups may be older than a search
        self._told_of: Counter = Counter()  # kills since then, by node
        self._looked_at = 0.0
        self._actor_cache._max_num_objects = defaultdict(lambda: math.inf)  # _cleanup_cached_actors has the limit

        def _actor_task_failed(tracked_actor_task, exception: Exception) -> None:
            if isinstance(exception, OutOfMemoryError):
                exception = NodeOutOfMemory(error_msg=f"out of memory: {str(exception).splitlines()[0]}")
            elif isinstance(exception, RayActorError):
                found = re.search(r"^\s*ip: (\S+)$", str(exception), re.MULTILINE)
                if found and self._killed_for_memory(found.group(1)):
                    exception = NodeOutOfMemory(error_msg="out of memory: the kernel has killed its process at the memory limit of job or node")
            task_failed(tracked_actor_task, exception)

        self._actor_manager._actor_task_failed = _actor_task_failed

    def step(self) -> None:
        since = time.time() - self._looked_at
        if since > 5:
            self._looked_at = time.time()
            for node in ray.nodes():
                if node["Alive"] and node["NodeID"] not in self._oom_kills:
                    self._oom_kills[node["NodeID"]] = self._ask_for_oom_kills(node["NodeID"])
            for trial in self._pending_trials:
                if not self._has_slot(trial) or trial in self._resetting_trials:
                    continue
                if since > 15:  # the search itself stood still: what has come up since then it has not heard yet
                    vars(self._trial_to_actor[trial]).pop("starting_since", None)
                elif self._starting_for(trial) > self.HANGS:
                    print(f"trial {trial.trial_id}: its process has not started for {self.HANGS:.0f} s and is ended", flush=True)
                    ray.kill(self._actor_manager._live_actors_to_ray_actors_resources[self._trial_to_actor[trial]][0])
        super().step()

    @staticmethod
    def _ask_for_oom_kills(node: str) -> ray.ObjectRef:
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        return ray.remote(errors.oom_kills).options(num_cpus=0, max_retries=0, scheduling_strategy=here).remote()

    def _killed_for_memory(self, address: str) -> bool:
        """Whether the kernel has killed more processes on a lost process's node than are accounted for; asks the node, at most 20 s."""
        node = next((n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeManagerAddress"] == address), None)
        if node not in self._oom_kills:
            return False
        try:
            before, now = ray.get([self._oom_kills[node], self._ask_for_oom_kills(node)], timeout=20)
        except RayError:  # the node is on its way out too
            return False
        more = now - before > self._told_of[node]
        self._told_of[node] += more
        return more

    def _maybe_cache_trial_actor(self, trial: Trial) -> bool:
        if not self._reuse_actors:
            return False
        actor = self._trial_to_actor[trial]
        if not self._actor_manager.is_actor_started(actor) or actor not in self._started_actors:
            return False
        self._actor_cache.cache_object(trial.placement_group_factory, actor)
        self._trial_to_actor.pop(trial)
        self._actor_to_trial.pop(actor)
        trial.set_ray_actor(None)
        return True

    def _cleanup_cached_actors(self, force_all: bool = False) -> None:
        waiting = len(self._paused_trials) + len(self._pending_trials)
        while self._search_alg.is_finished() and self._actor_cache.num_cached_objects > waiting:
            self._end_warm_process(self._trials[0].placement_group_factory)  # all trials ask for the same resources
        super()._cleanup_cached_actors(force_all)

    def _has_slot(self, trial: Trial) -> bool:
        return self._trial_to_actor.get(trial) in self._actor_manager._live_actors_to_ray_actors_resources

    def _is_starting(self, trial: Trial) -> bool:
        """Whether a process of its own is starting in a slot; not one that takes long, on a sick node perhaps, or is one too many."""
        if not self._has_slot(trial) or trial in self._resetting_trials:
            return False
        at_a_time = getattr(getattr(self._search_alg, "searcher", None), "_max_concurrent", 0)
        if 0 < at_a_time < self._actor_manager.num_live_actors:
            return False
        return self._starting_for(trial) < self.START

    def _starting_for(self, trial: Trial) -> float:
        """Seconds since the process of a trial was first seen to start."""
        return time.time() - vars(self._trial_to_actor[trial]).setdefault("starting_since", time.time())

    def _maybe_update_trial_queue(self) -> None:
        # One trial waits for a slot, so that none is suggested long before it starts; those that have one, where their process starts, do not count.
        none_waits = all(self._has_slot(trial) for trial in self._pending_trials)
        self.update_max_pending_trials(max(1, len(self._pending_trials) + none_waits))
        super()._maybe_update_trial_queue()
        self.update_max_pending_trials(1)  # elsewhere it says how many may ask for a slot at a time: the scheduler's choice comes first

    def _maybe_add_actors(self) -> None:
        if getattr(self._scheduler_alg, "draining", False):
            return
        super()._maybe_add_actors()
        for trial in self._pending_trials & self._staged_trials:  # where Tune has tried one that is starting
            self._maybe_reuse_cached_actor(trial)

    def _maybe_reuse_cached_actor(self, trial: Trial) -> bool:
        if self._is_starting(trial):
            return False
        bundles = trial.placement_group_factory
        while trial not in self._resetting_trials and self._actor_cache.has_cached_object(bundles):
            ray_actor, _ = self._actor_manager._live_actors_to_ray_actors_resources[self._actor_cache._cached_objects[bundles][0]]
            process = ray._private.state.actors(ray_actor._actor_id.hex())
            if process.get("State") == "ALIVE":
                break
            # Lost while it was idle, with its node perhaps: of that nobody tells Tune.
            self._killed_for_memory(process.get("Address", {}).get("IPAddress"))  # counts it, if so
            self._end_warm_process(bundles)
        return super()._maybe_reuse_cached_actor(trial)

    def _end_warm_process(self, bundles) -> None:
        actor = self._actor_cache.pop_cached_object(bundles)
        actor.set_on_stop(None)
        actor.set_on_error(None)
        self._remove_actor(tracked_actor=actor)

    def _actor_failed(self, tracked_actor, exception: Exception) -> None:
        self._resetting_trials.discard(self._actor_to_trial.get(tracked_actor))
        super()._actor_failed(tracked_actor, exception)

    def _trial_task_failure(self, trial: Trial, exception: Exception) -> None:
        if trial.status == Trial.PENDING and trial in self._trial_to_actor:  # as _actor_failed, where the process is still there
            self._resetting_trials.discard(trial)
            self._unstage_trial_with_resources(trial)
            self._set_trial_status(trial, Trial.RUNNING)
        if trial.status == Trial.RUNNING:  # else _actor_failed has dealt with it
            super()._trial_task_failure(trial, exception)

    def _on_trial_reset(self, trial: Trial, success: bool) -> None:
        if success:
            super()._on_trial_reset(trial, success)
        else:
            self._trial_task_failure(trial, RuntimeError("its process did not let go of the trial before it"))

    def _process_trial_failure(self, trial: Trial, exception: Exception) -> None:
        its_own = isinstance(exception, (NodeOutOfMemory, errors.TrialFailed))  # else the node's: most of what is its own the train function reports
        if its_own:
            trial.max_failures = 0
        self._scheduler_alg.node_fault = not its_own
        super()._process_trial_failure(trial, exception)
        self._scheduler_alg.node_fault = False


ray.tune.tune.TuneController = TuneController  # what Tuner.fit() makes
