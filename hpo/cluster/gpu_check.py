"""Whether the GPUs of this process are there and compute.

    python -m hpo.cluster.gpu_check [number]    # prints the GPUs, exit code 0; or one line on what is wrong

The number is that of the GPUs that there should be. Exit code 1: the same would be wrong on each node, such as a torch
that does not fit; 3: something is wrong on this node.

worker_node.slurm runs it before the node joins. A GPU that cannot compute would fail one trial after another.
"""

import socket
import sys

from hpo import errors

SIZE = 128  # of the matrices: a sum of 128 products of numbers from -3 to 3 is exact in fp16


def visible(precision: str = "fp16") -> None:
    """Raises RuntimeError, with CUDA's reason, if torch sees no GPU, or if the GPU has no such precision.

    It is quick: each trial on a GPU calls it.
    """
    import torch

    if torch.cuda.is_available():  # is_available gives no reason; init below does
        if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise RuntimeError(f"this GPU has no bf16: {torch.cuda.get_device_name()}")
        return
    try:
        torch.cuda.init()
        reason = "CUDA gives no reason"
    except Exception as error:  # AssertionError where torch is one for the CPU
        reason = errors.one_line(error)
    node = socket.gethostname()
    raise RuntimeError(f"CUDA error: a GPU of {node} was given to this process, and CUDA sees none: {reason}")


def check(number: int | None = None) -> str:
    """Multiplies two matrices in fp16 on each GPU. Returns the names of the GPUs.

    Raises RuntimeError if one fails, or if there are fewer than `number`.
    """
    visible()
    import torch

    if torch.cuda.device_count() < (number or 0):
        raise RuntimeError(f"CUDA error: there should be {number} GPUs, and CUDA sees {torch.cuda.device_count()}")
    a = (torch.arange(SIZE * SIZE) % 7 - 3).reshape(SIZE, SIZE).float()
    for i in range(torch.cuda.device_count()):
        on_gpu = a.half().to(f"cuda:{i}")
        if not torch.equal((on_gpu @ on_gpu).float().cpu(), a @ a):
            raise RuntimeError(f"CUDA error: GPU {i} computes a wrong matrix product")
    return "GPUs that compute: " + ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def main() -> int:
    """The command: prints one line and returns the exit code."""
    try:
        print(check(*map(int, sys.argv[1:])))
    except Exception as error:
        print("; ".join(filter(None, [errors.one_line(error), errors.what_to_install(error)])))
        return 1 if errors.kind_of(error) in (errors.Kind.SETUP, errors.Kind.TRIAL) else 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
