"""The ranks of a trial and their messages. A rank is one process with one GPU. Nothing of Ray in here."""

import datetime
import gc
import os

import torch

import hpo

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # otherwise DeepSpeed, when it is imported, looks for others and warns
START = 600  # seconds that the ranks may take to meet
# Ranks wait for rank 0 while Ray Tune decides at a rung. The watchdog of the search ends trials that hang.
PATIENCE = datetime.timedelta(days=7)


class Group:
    """The ranks of a trial, as one of them sees it. A group of one rank sends nothing.

    Args:
        rank: 0 <= rank < size.
        size: number of ranks.
        messages: the gloo process group for Python objects; None for one rank.
    """

    def __init__(self, rank: int = 0, size: int = 1, messages=None):
        self.rank, self.size, self.messages = rank, size, messages
        self.gradients_checked = False  # in this process, see precision.check_gradients

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

    def broadcast_flag(self, value: bool) -> bool:
        """Rank 0's value, in all ranks. Faster than `broadcast`: it is called at every step."""
        if self.size == 1:
            return value
        flag = torch.tensor(value)
        torch.distributed.broadcast(flag, src=0, group=self.messages)
        return flag.item()

    def mean(self, value: float, device) -> torch.Tensor | float:
        """The mean over all ranks, as a tensor on a device: the CPU does not wait for it."""
        if self.size == 1:
            return value
        mean = torch.full((), float(value), device=device)
        torch.distributed.all_reduce(mean)
        return mean / self.size

    def share(self, batches: list) -> list[tuple]:
        """This rank's share of batches, as (batch, whether it counts).

        All ranks get the same number, because at ZeRO stage 3 they must call the model equally often. Where the
        batches do not divide evenly, the last one is repeated and does not count.
        """
        full = batches + batches[-1:] * (-len(batches) % self.size)
        return [(batch, i < len(batches)) for i, batch in list(enumerate(full))[self.rank :: self.size]]


ONE_RANK = Group()


def join(rank: int = 0, size: int = 1, folder: str | None = None) -> Group:
    """Prepares this process for DeepSpeed as one of the ranks of its trials.

    Args:
        rank: of this process.
        size: number of ranks.
        folder: on their node, where the ranks meet; None for one rank.

    Raises:
        torch.distributed.DistError: the ranks have not met within START seconds.
    """
    with hpo.hidden("mlflow"):  # of DeepSpeed's autotuner
        import deepspeed.ops

    # Each process sees one GPU, its own, as number 0. No port is named that another trial could take.
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    os.environ.update(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")  # all ranks are on one node
    # DeepSpeed would compile one op, communication on a CPU, which is not used. Not compiling it saves minutes, the
    # need for a compiler, and waiting for the lock of a build that was killed.
    deepspeed.ops.__compatible_ops__ = {}
    store = torch.distributed.FileStore(f"{folder}/store", size) if folder else torch.distributed.HashStore()
    store.set_timeout(datetime.timedelta(seconds=START))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    messages = torch.distributed.new_group(backend="gloo", timeout=PATIENCE) if size > 1 else None
    imports_are_done()
    return Group(rank, size, messages)


def imports_are_done() -> None:
    """Enables the garbage collector, which worker processes start without, see launch.start_ray.

    Imports leave half a million objects that are never freed. gc.freeze keeps collections from visiting them.
    """
    gc.collect()
    gc.freeze()
    gc.enable()
