"""What an error means for the search. The one place where errors are told apart; docs/failures.md has the table.

Imports the standard library only: the command line, worker processes and worker_node.slurm load it first of all.
"""

import contextlib
import enum
import errno
import gc
import importlib.metadata
import os
import re
import sys
from pathlib import Path


class Kind(enum.Enum):
    """The values are the words of docs/failures.md."""

    TRIAL = "trial"  # the trial has failed, and would fail again with the same hyperparameters
    MEMORY = "out of memory"  # of the GPU: as TRIAL. Where trials share a GPU, the trial is tried once more
    NODE_MEMORY = "out of the node's memory"  # Ray or the kernel has killed the process: as TRIAL
    PROCESS = "trial and process"  # the trial has failed, and CUDA cannot be used any more in its process
    NODE = "node"  # the node, its GPU or the connection is at fault: the trial is tried again elsewhere
    STORAGE = "storage"  # the file system of the results is full or gone: the search waits
    SETUP = "installation"  # no trial can run with this installation: the search ends


# Regular expressions for the text of an error, its kind, and its meaning. The first one that is found decides.
# torch puts "CUDA error: " before the texts of CUDA.
OLD_DRIVER = "the driver is too old for the CUDA that torch was built with"
TEXTS = [
    (
        "no kernel image is available",
        Kind.SETUP,
        "torch has no kernels for this GPU; the default wheel has none for a V100",
    ),
    ("_STATUS_ARCH_MISMATCH", Kind.SETUP, "cuBLAS or cuDNN has no kernels for this GPU"),
    ("CUDA driver version is insufficient", Kind.SETUP, OLD_DRIVER),
    ("NVIDIA driver on your system is too old", Kind.SETUP, OLD_DRIVER),
    ("PTX was compiled with an unsupported toolchain", Kind.SETUP, OLD_DRIVER),
    ("this GPU has no bf16", Kind.SETUP, "`--precision bf16` needs an A100, an H100 or newer"),
    ("not compiled with CUDA enabled", Kind.SETUP, "a torch for the CPU is installed where a trial has a GPU"),
    ("CUDA out of memory", Kind.MEMORY, "the trial needs more memory than the GPU has"),
    ("CUDA error: out of memory", Kind.MEMORY, "the same, outside of torch's own allocator"),
    ("Cuda failure.*out of memory", Kind.MEMORY, "the same, in NCCL"),
    ("CUBLAS_STATUS_ALLOC_FAILED", Kind.MEMORY, "the same, in cuBLAS"),
    ("CUDNN_STATUS_.*ALLOC.*FAILED", Kind.MEMORY, "the same, in cuDNN"),
    (
        "device-side assert triggered",
        Kind.PROCESS,
        "a kernel refuses a value, for example an index out of range: the fault is in the model or the data",
    ),
    ("uncorrectable ECC error", Kind.NODE, "the GPU's memory is broken"),
    ("unspecified launch failure", Kind.NODE, "the GPU or its driver fails"),
    ("launch timed out and was terminated", Kind.NODE, "the GPU or its driver fails"),
    ("illegal memory access", Kind.NODE, "the GPU or its driver fails, or a kernel has a rare fault"),
    ("GPU is lost", Kind.NODE, "the driver does not reach the GPU any more"),
    ("fallen off the bus", Kind.NODE, "the driver does not reach the GPU any more"),
    ("busy or unavailable", Kind.NODE, "another process holds the GPU"),
    ("no CUDA-capable device is detected", Kind.NODE, "the driver sees no GPU"),
    ("No CUDA GPUs are available", Kind.NODE, "the driver sees no GPU"),
    ("Found no NVIDIA driver", Kind.NODE, "no driver is loaded on this node"),
    ("system not yet initialized", Kind.NODE, "the fabric manager, which connects the GPUs of a node, does not run"),
    ("CUDA driver initialization failed", Kind.NODE, "the driver does not start"),
    ("Unexpected error from cudaGetDeviceCount", Kind.NODE, "the driver does not start"),
    (r"NCCL|\bnccl", Kind.NODE, "the connection to another rank is lost"),
    (r"\bgloo\b", Kind.NODE, "the connection to another rank is lost"),
    ("CUDA (driver |unknown )?error", Kind.NODE, "any other error of CUDA"),
]
# Classes of errors, by name, because importing torch and Ray is slow.
OUT_OF_MEMORY = {
    "torch.OutOfMemoryError": Kind.MEMORY,
    "ray.exceptions.OutOfMemoryError": Kind.NODE_MEMORY,
    "hpo.cluster.ray_private.NodeOutOfMemory": Kind.NODE_MEMORY,
}
LOST = {  # NODE if no text is found
    "torch.distributed.DistError",
    *(f"ray.exceptions.{name}" for name in ("RayActorError", "WorkerCrashedError", "NodeDiedError")),
    *(f"ray.exceptions.{name}" for name in ("LocalRayletDiedError", "OutOfDiskError", "ObjectLostError")),
}
TASK = "ray.exceptions.RayTaskError"  # wraps what was raised in another process
MORE_MEMORY = "the node or the job has too little memory: a larger MEM_PER_NODE"
KILLED = "often it was killed for its memory (MEM_PER_NODE), see logs/"
LEFT = "the node has left the cluster: see the log of its job in logs/"
OF_RAY = {  # what to do about Ray's own errors
    "hpo.cluster.ray_private.NodeOutOfMemory": MORE_MEMORY,
    "ray.exceptions.OutOfMemoryError": MORE_MEMORY,
    "ray.exceptions.WorkerCrashedError": KILLED,
    "ray.exceptions.ActorDiedError": KILLED,
    "ray.exceptions.NodeDiedError": LEFT,
    "ray.exceptions.LocalRayletDiedError": LEFT,
    "ray.exceptions.OutOfDiskError": "make room on the disk of that node (TMPDIR)",
    "ray.exceptions.RayError": "Ray has failed, not the trial: check again, and report it if it comes again",
}
WHAT_TO_DO = {
    Kind.MEMORY: "a smaller batch, a larger --gpus_per_trial, or what --plan proposes",
    Kind.NODE_MEMORY: MORE_MEMORY,
    Kind.TRIAL: "trials would fail like this, see docs/failures.md",
    Kind.PROCESS: "trials would fail like this, see docs/failures.md",
    Kind.NODE: "leave the node out (sbatch --exclude), and report it",
    Kind.STORAGE: "make room, or take another --output_dir",
}
STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN)


class TrialFailed(Exception):
    """A trial has failed and would fail again. Its processes cannot be used any more."""


class CannotTrain(Exception):
    """This DeepSpeed cannot train with this ds_config in this precision, or it uses wrong gradients."""


def is_storage(error: BaseException | str) -> bool:
    """Whether an error says that a file system is full or gone."""
    if isinstance(error, OSError) and error.errno in STORAGE:
        return True
    of_libraries = ("(os error 28)", "inline_container", "PytorchStreamWriter")  # of Rust and C++
    return any(text in str(error) for text in (*map(os.strerror, STORAGE), *of_libraries))


def of_storage(error: BaseException, folder: Path) -> BaseException | None:
    """An error of the run folder's file system. So is each OSError while the folder is gone. None for another error."""
    if is_storage(error):
        return error
    if isinstance(error, OSError) and not folder.exists():
        return OSError(errno.ESTALE, f"it is gone ({error})", str(folder))
    return None


def kind_of(error: BaseException | str) -> Kind:
    """What an error, or its text, means. An unknown one is the trial's: NaN, broken data, a mistake in the code."""
    names = _class_names(error)
    if TASK in names:
        return kind_of(error.cause)
    if isinstance(error, TrialFailed):
        return Kind.PROCESS
    if isinstance(error, CannotTrain):
        return Kind.SETUP
    if is_storage(error):
        return Kind.STORAGE
    for name in names:
        if name in OUT_OF_MEMORY:
            return OUT_OF_MEMORY[name]
    for pattern, kind, _ in TEXTS:
        if re.search(pattern, str(error)):
            return kind
    return Kind.NODE if isinstance(error, OSError) or LOST.intersection(names) else Kind.TRIAL


def _class_names(error: BaseException | str) -> list[str]:
    """The names of the class of an error and of the classes above it, the most special first."""
    return [f"{c.__module__}.{c.__qualname__}" for c in type(error).__mro__]


def gpu_fault(text: str) -> str | None:
    """The last CUDA error in a traceback, if the node is at fault."""
    found = re.findall("CUDA error.*", text)
    return found[-1] if found and kind_of(found[-1]) is Kind.NODE else None


def what_to_do(error: BaseException | str) -> str:
    """What a user can do about an error, in a few words."""
    names = _class_names(error)
    if TASK in names:
        return what_to_do(error.cause)
    of_ray = next((OF_RAY[name] for name in names if name in OF_RAY), None)
    return of_ray or what_to_install(error) or WHAT_TO_DO[kind_of(error)]


def what_to_install(error: BaseException | str) -> str:
    """What to install, for an error of the installation; otherwise an empty text."""
    if kind_of(error) is not Kind.SETUP:
        return ""
    if isinstance(error, CannotTrain):
        return "take another ZeRO stage in ds_config, another --precision, or the DeepSpeed of requirements.txt"
    torch = importlib.metadata.version("torch").partition("+")[0]
    wheel = f"pip install torch=={torch} --index-url https://download.pytorch.org/whl/cu126"
    if re.search("no kernel image|ARCH_MISMATCH", str(error)):
        old = f"a V100 (sm_70) needs a torch that was built for CUDA 12.6: {wheel}"
        return f"{old}; a GPU that is newer than an H100 needs the default wheel"
    if "no bf16" in str(error):
        return "take --precision fp16"
    if "not compiled" in str(error):
        default = "install a torch with CUDA: the default wheel (A100, H100; driver 580 or newer)"
        return f"{default}, or, for a V100 or an older driver: {wheel}"
    driver = "install a newer NVIDIA driver (580 or newer for the default wheel)"
    return f"{driver}, or a torch that was built for CUDA 12.6: {wheel}"


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """The text of an error on one line: its first `limit` characters, or its last ones if the limit is negative."""
    text = " ".join(str(error).split())
    return text[:limit] if limit > 0 else text[limit:]


class BadInput(Exception):
    """What the user gave cannot be used; the message, one line, says what and where."""

    def __str__(self):
        return " ".join(super().__str__().split())


@contextlib.contextmanager
def exit_on_bad_input():
    """Ends the program on BadInput: one line, and exit code 2."""
    try:
        yield
    except BadInput as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        gc.freeze()  # skips the last garbage collection of all that was imported: a second
        sys.exit(2)
