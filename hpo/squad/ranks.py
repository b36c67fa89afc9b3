"""A trial on several GPUs: one process, a rank, for each. Nothing of SQuAD or of the search in here.

Rank 0 is the trial's own process, the only one that Tune knows. It starts the others once, in the placement group that Tune has made for the
trial, so that they are gone when Tune gives that up; they stay from trial to trial, and end with rank 0, whatever ends it. A TorchTrainer
inside a Tune function would not do: after a pause it keeps its workers' resources.
"""

import contextlib
import datetime
import gc
import importlib
import os
import tempfile
import threading

import ray
import torch
from ray.exceptions import RayTaskError
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hpo import errors
from hpo.errors import Kind

START = 600  # seconds that the ranks may take to meet
PATIENCE = datetime.timedelta(days=7)  # for Tune to decide what becomes of a trial at its rung; a hung trial is the Watchdog's business


class Stopped(Exception):
    """In a rank other than 0: Tune has paused or ended the trial."""


class Group:
    """The ranks of a trial, as one of them sees it. With one rank, nothing is sent anywhere.

    Args:
        rank, size: 0 <= rank < size.
        folder: where the ranks meet, on their node; None for one rank.
    """

    def __init__(self, rank: int = 0, size: int = 1, folder: str | None = None):
        import deepspeed.ops

        self.rank, self.size, self.others = rank, size, []
        self.checked = False  # whether gradients were checked in this process
        # Each process sees one GPU, its own, as number 0.
        os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        # The one op that DeepSpeed would compile here, communication on a CPU, is not needed. Not compiling it saves
        # minutes and the need for a compiler, and no lock of a killed build is there to wait for.
        deepspeed.ops.__compatible_ops__ = {}
        os.environ.update(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")  # all are on one node: nobody else is to connect
        # No port is named, which another trial could take: one rank has nobody to meet, several meet in a file.
        store = torch.distributed.FileStore(f"{folder}/store", size) if folder else torch.distributed.HashStore()
        store.set_timeout(datetime.timedelta(seconds=START))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        self.messages = torch.distributed.new_group(backend="gloo", timeout=PATIENCE) if size > 1 else None
        # The half million objects of the imports stay for good: without this, each of the two collections a trial makes
        # walks them all.
        gc.collect()
        gc.freeze()

    def broadcast(self, value=None):
        """The value that rank 0 gave."""
        if self.size == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0, group=self.messages)
        return values[0]

    def gather(self, value) -> list:
        """The values of all ranks, in each of them."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self.messages)
        return values

    def any(self, value: bool) -> bool:
        """Whether it is true in rank 0: as `broadcast`, but quick enough for each step."""
        if self.size == 1:
            return value
        flag = torch.tensor(value)
        torch.distributed.broadcast(flag, src=0, group=self.messages)
        return flag.item()

    def mean(self, value: float, device) -> torch.Tensor | float:
        """The mean over all ranks, on their device: the CPU does not wait for it."""
        if self.size == 1:
            return value
        mean = torch.full((), float(value), device=device)
        torch.distributed.all_reduce(mean)
        return mean / self.size

    def mine(self, batches: list) -> list[tuple]:
        """This rank's share of batches, as (batch, whether it counts): all ranks get as many, the last one perhaps once more.

        With ZeRO 3 the ranks have to call the model equally often.
        """
        full = batches + batches[-1:] * (-len(batches) % self.size)
        return [(batch, i < len(batches)) for i, batch in list(enumerate(full))[self.rank :: self.size]]

    @contextlib.contextmanager
    def trial(self, config: dict):
        """In rank 0, around its own part of a trial: the other ranks do theirs.

        Raises:
            errors.TrialFailed: one rank has failed at what would come again.
            OSError: storage is full or gone, or another rank's process is lost.
            Exception: of one rank, where no trial can run with this installation.
        """
        if self.size == 1:
            yield
            return
        killed_before = errors.oom_kills()
        futures = [actor.train.remote(config) for actor in self.others]
        over, lost = threading.Event(), []
        watch = threading.Thread(target=self._watch, args=(futures, over, lost), daemon=True)
        watch.start()
        try:
            yield
            ray.get(futures)
        except FloatingPointError:  # comes from numbers that all ranks have: each ends its part
            over.set()
            _, at_work = ray.wait(futures, num_returns=len(futures), timeout=START)
            if at_work:
                raise ConnectionError("a rank does not end its part of a trial") from None
            raise
        except Exception as error:
            over.set()
            watch.join()
            ended, _ = ray.wait(futures, num_returns=len(futures), timeout=5)
            for future in ended:
                try:
                    ray.get(future)
                except Exception as its_error:
                    lost.append(its_error)
            for actor in self.others:
                ray.kill(actor)
            cause = _cause([error, *lost], errors.oom_kills() > killed_before)
            if cause is error:
                raise
            raise cause from (lost[0] if lost else error)
        finally:
            over.set()
            watch.join()

    def _watch(self, futures: list, over: threading.Event, lost: list) -> None:
        """Lets rank 0 out of a collective that will never come to its end, when another rank has ended early."""
        pending = list(futures)
        while pending and not over.is_set():
            done, pending = ray.wait(pending, timeout=1)
            try:
                ray.get(done)
            except Exception as error:
                if over.wait(5):  # rank 0 fails by itself, as on the same numbers
                    return
                lost.append(error)
                for actor in self.others:  # gloo's connections break
                    ray.kill(actor)
                if torch.cuda.is_available():  # NCCL's have to be aborted, those of DeepSpeed's own groups too
                    with contextlib.suppress(Exception):
                        torch.distributed.distributed_c10d._abort_process_group()
                if not over.wait(60):
                    os._exit(1)  # the trial starts again from its checkpoint, in another process
                return


def _cause(raised: list[Exception], killed: bool) -> Exception:
    """What to make of the errors of several ranks, of which all but one have perhaps only lost the connection to that one."""
    raised = [error.cause if isinstance(error, RayTaskError) else error for error in raised]
    kinds = [(errors.kind_of(error), error) for error in raised]
    for first in (Kind.STORAGE, Kind.SETUP):
        for kind, error in kinds:
            if kind is first:
                return error
    for kind, error in kinds:
        if kind is not Kind.NODE:
            return errors.TrialFailed(errors.one_line(f"{type(error).__name__} {error}"))
    if killed:
        return errors.TrialFailed("out of memory: the kernel has killed a rank at the memory limit of job or node")
    return ConnectionError("a rank is lost: " + " | ".join(errors.one_line(error, 200) for error in raised))


@ray.remote(max_restarts=0)
class Rank:
    """The process of a rank other than 0."""

    def __init__(self, module: str, run: dict, rank: int, size: int, folder: str):
        self.module, self.run = importlib.import_module(module), run
        self.group = Group(rank, size, folder)

    def train(self, config: dict) -> None:
        with contextlib.suppress(Stopped):
            self.module.train_rank(config, self.run, self.group)


def start(module: str, run: dict, size: int) -> Group:
    """Rank 0's group: of its own process alone, or with others, in the bundles of the placement group of this process, the first of
    which is its own.

    Args:
        module: whose `train_rank(config, run, group)` each rank runs.
    """
    if size == 1:
        return Group()
    here = ray.util.get_current_placement_group()
    bundles = placement_group_table(here)["bundles"]
    folder, run, others = tempfile.mkdtemp(), ray.put(run), []  # the folder goes with that of all trials
    for rank in range(1, size):
        strategy = PlacementGroupSchedulingStrategy(here, placement_group_bundle_index=rank)
        resources = {"num_cpus": bundles[rank].get("CPU", 0), "num_gpus": bundles[rank].get("GPU", 0)}
        others.append(Rank.options(scheduling_strategy=strategy, **resources).remote(module, run, rank, size, folder))
    try:
        group = Group(0, size, folder)
    except Exception as error:  # no fault of the trial's: an OSError, so that Tune starts it again in another process
        raise ConnectionError(f"the ranks have not met within {START} s: {errors.one_line(error, 200)}") from error
    group.others = others
    return group
