"""How many trials run at a time, and what they need of a GPU that they share.

Imports nothing: the command line asks it before the slow imports of the script.
"""

CONTEXT = 600_000_000  # bytes, assumed: the CUDA context of a process with its kernels, and the workspaces of cuBLAS


def trials_per_gpu(gpus_per_trial: float) -> int:
    """How many trials share a GPU; 1 where a trial has whole GPUs, or none."""
    return round(1 / gpus_per_trial) if 0 < gpus_per_trial < 1 else 1


def gpus_without_cpus(have: dict[str, float], resources: dict[str, float]) -> str:
    """That a node's CPUs are too few for its GPUs, in words. Empty where they are enough, or no trial fits.

    The arguments are those of `slots_of`.
    """
    slots, gpus = slots_of(have, resources), resources["gpu"]
    if not gpus or not slots or slots == slots_of(have, {"gpu": gpus}):
        return ""
    used = f"only {slots * gpus:.3g} of its {have['GPU']:g} GPUs are used"
    trials = f"{slots} trial" + "s" * (slots > 1)
    return f"{used}, because its CPUs are enough for {trials}: a larger --cpus-per-task, or CPUS_PER_NODE"


def slots_that_passed(rows: list[dict], at_a_time: int) -> int:
    """How many trials can run at a time on the nodes of a check that are ok; at most `at_a_time`, unless it is 0."""
    slots = sum(row["slots"] for row in rows if not row["problems"])
    return min(slots, at_a_time or slots)


def bytes_of_gpu(peak: int, sharing: int) -> int:
    """Bytes of a GPU that trials need together, if torch reserves `peak` bytes for each of `sharing` trials."""
    return sharing * (peak + CONTEXT)


def slots_of(have: dict[str, float], resources: dict[str, float]) -> int:
    """How many trials fit into the resources of a node.

    Args:
        have: of the node, {"CPU", "GPU"}; others are not looked at.
        resources: of a trial, {"cpu", "gpu"}.
    """
    room = []
    for name, n in resources.items():
        if n:  # in trials per GPU: with 0.5 GPUs a trial, 2 GPUs have 4 slots. 1 // 0.2 is 4, and not 5
            room.append(have.get(name.upper(), 0) * trials_per_gpu(n) // max(1, n))
    return int(min(room))
