"""Starting and ending Ray, and waiting for storage."""

import contextlib
import os
import platform
import sys
import tempfile
from pathlib import Path

import ray

import hpo
from hpo import code_copy, errors
from hpo.cluster import preemption, session  # noqa: F401  session: loaded before a search begins, see code_copy
from hpo.cluster.run import Run
from hpo.cluster.state import keep_last_state
from hpo.cluster.storage import wait_for_storage
from hpo.results import checkpoints, terminal

STORAGE_PATIENCE = 3600  # seconds that a full or lost file system is waited for
MAX_STORAGE_WAITS = 10  # in all
# For the C library of worker processes. Each trial is a new thread, for which glibc would keep memory of its own. And
# it would return each block above 32 MB to the system at once, such as the logits of a batch on a CPU, and get the
# next one as new pages. Before 2.35 glibc takes no such threshold, and setting only one of the two makes it worse.
MALLOC = {"MALLOC_ARENA_MAX": "1"}
if platform.libc_ver()[0] == "glibc" and tuple(map(int, platform.libc_ver()[1].split(".")[:2])) >= (2, 35):
    MALLOC |= {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


def start_ray(gpus_per_trial: float, temp_dir: str, trials_dir: str, code: Path = code_copy.ROOT) -> None:
    """Joins the cluster that RAY_ADDRESS names, or starts Ray on this machine, with a token that only this user has.

    Args:
        gpus_per_trial: 0 hides the GPUs from all processes.
        temp_dir: for Ray's sockets and logs, when it is started here.
        trials_dir: for temporary files of the worker processes, when Ray is started here.
        code: the folder with the package hpo for the worker processes.
    """
    environment = {
        # A trial of a big model may need more than Ray's 2 s to free its memory, before its process takes the next.
        "TUNE_FUNCTION_THREAD_TIMEOUT_S": "600",
        "HF_HUB_OFFLINE": "1",  # everything was loaded before
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not gpus_per_trial:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    options = {"log_to_driver": False, "logging_level": "ERROR"}
    if "RAY_ADDRESS" not in os.environ:
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            token = Path(temp_dir) / "token"
            token.touch(mode=0o600)
            token.write_text(os.urandom(32).hex())
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
        environment["TMPDIR"] = trials_dir
        options |= {"_temp_dir": temp_dir, "include_dashboard": False, "num_cpus": len(os.sched_getaffinity(0))}
        # Otherwise Ray starts a process for each CPU at once. No trial can use them: they lack the variables below.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    os.environ.update(environment)
    with hpo.hidden("mlflow", "wandb"):  # Tune and save_pretrained would import these three later, with the trackers
        import deepspeed  # noqa: F401
        import ray.air.integrations.mlflow
        import ray.air.integrations.wandb  # noqa: F401
    with contextlib.chdir(code):  # worker processes look for modules in this process's current folder first
        # The garbage collector would take a sixth of a trial's start: imports leave no garbage. See imports_are_done.
        ray.init(**options, runtime_env={"env_vars": environment | MALLOC, "worker_process_setup_hook": "gc.disable"})
    preemption.stop_on_signals()  # after Ray has set its own handlers


@contextlib.contextmanager
def ray_folders():
    """Two temporary folders with mode 0700: for Ray's sockets and logs, and for files of the worker processes.

    Two empty names where Ray runs already (RAY_ADDRESS): it has its own.
    """
    if "RAY_ADDRESS" in os.environ:
        yield "", ""
        return
    private = {"prefix": "bohb-", "ignore_cleanup_errors": True}
    short = None if len(tempfile.gettempdir()) < 26 else "/tmp"  # the names of Ray's sockets have at most 107 bytes
    with tempfile.TemporaryDirectory(dir=short, **private) as temp_dir, tempfile.TemporaryDirectory(**private) as tmp:
        yield temp_dir, tmp


@contextlib.contextmanager
def ray_session(run: Run):
    """Ray, from its start to its end, however the search ends; keeps the status in run.json.

    When the file system of the run is full or gone, waits for it and then starts this program again with --resume.
    """
    environment, storage_error = dict(os.environ), None
    with ray_folders() as folders:
        try:
            start_ray(run.setup.gpus_per_trial, *folders, run.folder / code_copy.NAME)
            yield
        except BaseException as error:
            storage_error = errors.of_storage(error, run.folder)
            if not storage_error:
                early = isinstance(error, preemption.Preempted) or not isinstance(error, Exception)
                run.write("interrupted" if early else "failed")
                raise
        finally:
            ray.shutdown()
    if storage_error:
        restart_after_storage(storage_error, run, environment)
        with contextlib.suppress(OSError):
            run.write("interrupted")
        raise storage_error
    checkpoints.delete_except(run.folder)  # not before: after an interruption best_model may be made again
    keep_last_state(run.folder)
    run.write("done")


def restart_after_storage(error: Exception, run: Run, environment: dict[str, str]) -> None:
    """Waits for storage, then replaces this program by itself with --resume. Returns if it has waited in vain.

    Args:
        error: what has failed.
        run: the run folder.
        environment: of the program, as it was before Ray changed it.
    """
    waits = int(environment.get("STORAGE_WAITS", 0))
    if waits == MAX_STORAGE_WAITS:
        return
    minutes = STORAGE_PATIENCE / 60
    print(f"storage: {errors.one_line(error, -500)}", flush=True)
    print(f"waiting for {run.folder} and room in it, at most {minutes:.0f} minutes", flush=True)
    try:
        preemption.stop_on_signals()
        there = wait_for_storage(run.folder, run.needed, STORAGE_PATIENCE)
    except (preemption.Preempted, KeyboardInterrupt):
        return
    if there:
        where = ["--run_name", run.folder.name, "--output_dir", str(run.folder.parent)]
        command = [sys.executable, sys.argv[0], "--resume", *where]
        terminal.leave()
        os.execve(sys.executable, command, environment | {"STORAGE_WAITS": str(waits + 1)})
