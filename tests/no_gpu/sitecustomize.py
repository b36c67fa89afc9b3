"""Stands in for CUDA where a GPU of the tests is a device file with nothing behind it. On PYTHONPATH, Python loads
it at its start.

When gpu_check is imported, or run as a program, both of its checks are replaced: they pass, or fail with the text in
GPU_CHECK_SAYS, or end the process with the exit code in GPU_CHECK_EXITS. And DeepSpeed is told that a CPU can train in
fp16, which torch can and DeepSpeed refuses: the arithmetic is that of a GPU. (ZeRO stage 0 needs nothing of that.)
"""

import importlib.abc
import importlib.machinery
import os
import sys


def stand_in(*_) -> str:
    if "GPU_CHECK_EXITS" in os.environ:
        os._exit(int(os.environ["GPU_CHECK_EXITS"]))
    if "GPU_CHECK_SAYS" in os.environ:
        raise RuntimeError(os.environ["GPU_CHECK_SAYS"])
    return "no GPU, and a test that does without"


def no_checks(gpu_check) -> None:
    gpu_check.visible = gpu_check.check = stand_in


def fp16(cpu_accelerator) -> None:
    cpu_accelerator.CPU_Accelerator.is_fp16_supported = lambda self: True


# what is done to a module when it has been imported
CHANGES = {"hpo.cluster.gpu_check": no_checks, "deepspeed.accelerator.cpu_accelerator": fp16}


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name in CHANGES else None
        if spec is not None:
            load = spec.loader.exec_module

            def exec_module(module):
                load(module)
                CHANGES[name](module)

            spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())

if sys.orig_argv[1:3] == ["-m", "hpo.cluster.gpu_check"]:  # Python would load it without the Finder
    sys.path.insert(0, os.getcwd())
    from hpo.cluster import gpu_check

    code = gpu_check.main()
    sys.stdout.flush()
    os._exit(code)
