"""Which error means what, the check of a node's GPUs, and what ends a search at once."""

import errno
import json
import os
import re
import subprocess
import sys

import pytest
import ray
import torch
from ray.exceptions import ActorDiedError

from conftest import ROOT, run_script
from faulty import write_script
from hpo import errors, files
from hpo.cluster import ray_private
from hpo.errors import Kind
from slurm_cluster import NO_GPU

HELP = (  # torch adds it to each error of CUDA
    "\nSearch for `cudaErrorX' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for more "
    "information.\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below "
    "might be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
TOO_OLD = "The NVIDIA driver on your system is too old (found version 12080). Please update your GPU driver"
NCCL = (
    "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled cuda error\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
)
WHOLE = [  # errors as torch and Ray raise them, one for each row of errors.TEXTS in its order
    (torch.AcceleratorError, "CUDA error: no kernel image is available for execution on the device" + HELP, Kind.SETUP),
    (
        RuntimeError,
        "CUDA error: CUBLAS_STATUS_ARCH_MISMATCH when calling `cublasGemmEx( handle, opa, opb)`",
        Kind.SETUP,
    ),
    (
        torch.AcceleratorError,
        "CUDA error: CUDA driver version is insufficient for CUDA runtime version" + HELP,
        Kind.SETUP,
    ),
    (RuntimeError, TOO_OLD, Kind.SETUP),
    (
        torch.AcceleratorError,
        "CUDA error: the provided PTX was compiled with an unsupported toolchain." + HELP,
        Kind.SETUP,
    ),
    (RuntimeError, "this GPU has no bf16: Tesla V100-SXM2-16GB", Kind.SETUP),
    (AssertionError, "Torch not compiled with CUDA enabled", Kind.SETUP),
    (
        torch.OutOfMemoryError,
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB",
        Kind.MEMORY,
    ),
    (torch.AcceleratorError, "CUDA error: out of memory" + HELP, Kind.MEMORY),
    (torch.distributed.DistBackendError, NCCL + "Cuda failure 2 'out of memory'", Kind.MEMORY),
    (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", Kind.MEMORY),
    (RuntimeError, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", Kind.MEMORY),
    (torch.AcceleratorError, "CUDA error: device-side assert triggered" + HELP, Kind.PROCESS),
    (torch.AcceleratorError, "CUDA error: uncorrectable ECC error encountered" + HELP, Kind.NODE),
    (torch.AcceleratorError, "CUDA error: unspecified launch failure" + HELP, Kind.NODE),
    (torch.AcceleratorError, "CUDA error: the launch timed out and was terminated" + HELP, Kind.NODE),
    (torch.AcceleratorError, "CUDA error: an illegal memory access was encountered" + HELP, Kind.NODE),
    (
        RuntimeError,
        "Unable to determine the device handle for GPU0000:3B:00.0: GPU is lost.  "
        "Reboot the system to recover this GPU",
        Kind.NODE,
    ),
    (RuntimeError, "NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.", Kind.NODE),
    (torch.AcceleratorError, "CUDA error: CUDA-capable device(s) is/are busy or unavailable" + HELP, Kind.NODE),
    (torch.AcceleratorError, "CUDA error: no CUDA-capable device is detected" + HELP, Kind.NODE),
    (RuntimeError, "No CUDA GPUs are available", Kind.NODE),
    (RuntimeError, "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU", Kind.NODE),
    (torch.AcceleratorError, "CUDA error: system not yet initialized" + HELP, Kind.NODE),
    (RuntimeError, "CUDA driver initialization failed, you might not have a CUDA gpu.", Kind.NODE),
    (
        RuntimeError,
        "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling NumCudaDevices()",
        Kind.NODE,
    ),
    (torch.distributed.DistBackendError, NCCL + "Cuda failure 'unknown error'", Kind.NODE),
    (
        RuntimeError,
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:21482",
        Kind.NODE,
    ),
    (torch.AcceleratorError, "CUDA error: an error that nobody has seen yet" + HELP, Kind.NODE),
]
OTHERS = [
    (torch.AcceleratorError, "CUDA error: all CUDA-capable devices are busy or unavailable" + HELP, Kind.NODE),
    (RuntimeError, "CUDA driver error: unknown error", Kind.NODE),
    (RuntimeError, "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", Kind.MEMORY),
    (torch.OutOfMemoryError, "no word of CUDA", Kind.MEMORY),
    (torch.distributed.DistBackendError, "no word of a library", Kind.NODE),
    (ConnectionError, "a rank is lost", Kind.NODE),
    (FileNotFoundError, "no such checkpoint", Kind.NODE),
    (OSError, os.strerror(errno.ENOSPC), Kind.STORAGE),
    (FloatingPointError, "eval_loss is nan after 3 iterations", Kind.TRIAL),
    (ValueError, "cannot read question 7", Kind.TRIAL),
    (MemoryError, "", Kind.TRIAL),
    (errors.CannotTrain, "the optimizer gets gradients that are 1.53e-05 times those of the loss", Kind.SETUP),
    (errors.TrialFailed, "ValueError cannot read question 7", Kind.PROCESS),
]


@pytest.mark.parametrize("cls, text, kind", WHOLE + OTHERS)
def test_what_an_error_means(cls, text, kind):
    try:
        error = cls(text)
    except TypeError:  # a class that only torch itself fills
        error = RuntimeError(text)
    assert errors.kind_of(error) is kind
    installed = errors.what_to_install(error)
    assert bool(installed) == (kind is Kind.SETUP)
    assert ("https://download.pytorch.org/whl/cu126" in installed) == (
        kind is Kind.SETUP and "bf16" not in text and cls is not errors.CannotTrain
    )


@pytest.mark.parametrize("error, kind", [
    (ActorDiedError(), Kind.NODE),  # a rank
    (ray.exceptions.WorkerCrashedError(), Kind.NODE),
    (ray.exceptions.NodeDiedError("n1"), Kind.NODE),
    (ray.exceptions.OutOfDiskError("full"), Kind.NODE),
    (ray.exceptions.OutOfMemoryError("Task was killed"), Kind.NODE_MEMORY),
    (ray_private.NodeOutOfMemory(error_msg="out of memory: the kernel has killed its process"), Kind.NODE_MEMORY),
    (ray.exceptions.RayTaskError("f", "text", ValueError("bad")).as_instanceof_cause(), Kind.TRIAL),
    (ray.exceptions.RayTaskError("f", "text", errors.TrialFailed("bad")).as_instanceof_cause(), Kind.PROCESS),
    (ray.exceptions.RayTaskError("f", "text", ConnectionError("lost")).as_instanceof_cause(), Kind.NODE),
    (ray.exceptions.RayTaskError("f", os.strerror(errno.ENOSPC), errors.TrialFailed("bad")), Kind.PROCESS),
    (ray.exceptions.RayTaskError("f", "device-side assert triggered", ConnectionError("lost")), Kind.NODE),
    (ray.exceptions.RayTaskError("f", "text", ray.exceptions.RayError("its cause isn't serializable")), Kind.TRIAL),
])  # fmt: skip
def test_what_an_error_of_ray_means(error, kind):
    assert errors.kind_of(error) is kind


def test_each_text_decides_alone_and_stands_in_the_documentation():
    """Each row decides its own example, and no row before it does; docs/failures.md has them in the same order."""
    for (pattern, kind, _), (_, text, expected) in zip(errors.TEXTS, WHOLE, strict=True):
        assert kind is expected and next(row[0] for row in errors.TEXTS if re.search(row[0], text)) == pattern, text
    page = (ROOT / "docs" / "failures.md").read_text()
    rows = re.findall(r"^\| `(.+)` \| (.+) \| (.+) \|$", page, re.MULTILINE)
    assert rows == [(pattern.replace("|", "\\|"), kind.value, meaning) for pattern, kind, meaning in errors.TEXTS]
    assert all(f"| {kind.value} |" in page for kind in Kind)


def test_what_to_install_fits_the_error():
    version = torch.__version__.partition("+")[0]
    command = f"pip install torch=={version} --index-url https://download.pytorch.org/whl/cu126"
    for text, words in [
        (WHOLE[0][1], "V100 (sm_70)"),
        (TOO_OLD, "newer NVIDIA driver (580"),
        ("Torch not compiled with CUDA enabled", "install a torch with CUDA"),
    ]:
        assert words in errors.what_to_install(text) and command in errors.what_to_install(text)
    assert (
        f"torch=={version}" in (ROOT / "requirements.txt").read_text()
        and f"/{command}\n" in (ROOT / "docs" / "failures.md").read_text()
    )


def test_one_line():
    assert (
        errors.one_line("a\n b\tc") == "a b c"
        and errors.one_line("abc", 2) == "ab"
        and errors.one_line(OSError("abc"), -2) == "bc"
    )


# -- the check of the GPUs
# ------------------------------------------------------------------------------------------------------


def gpu_check(**environment):
    done = subprocess.run(
        [sys.executable, "-m", "hpo.cluster.gpu_check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )
    assert done.stdout.count("\n") == 1, done
    return done.returncode, done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_check_fails_without_cuda():
    code, line = gpu_check(PYTHONPATH="")
    assert code == (3 if torch.version.cuda else 1), line  # 1: a torch for the CPU, which is the same on each node
    assert re.match("CUDA error: a GPU of .* was given to this process, and CUDA sees none: ", line), line


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_check_passes_with_a_gpu():
    code, line = gpu_check(PYTHONPATH="")
    assert code == 0 and torch.cuda.get_device_name(0) in line


@pytest.mark.parametrize(
    "text, code, says",
    [
        (WHOLE[0][1], 1, "a V100 (sm_70) needs a torch"),
        (TOO_OLD, 1, "install a newer NVIDIA driver"),
        ("CUDA error: unspecified launch failure", 3, None),  # of this node alone
    ],
)
def test_the_check_says_in_one_line_what_is_wrong(text, code, says):
    ended, line = gpu_check(PYTHONPATH=str(NO_GPU), GPU_CHECK_SAYS=text)
    assert ended == code and line.startswith(errors.one_line(text)), line
    assert f"; {says}" in line if says else line == text + "\n"


def test_a_gpu_that_computes_wrong_is_found(monkeypatch):
    """The GPU is played by the CPU, in fp16 too."""
    from hpo.cluster import gpu_check

    to, wrong = torch.Tensor.to, []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
    monkeypatch.setattr(torch.Tensor, "to", lambda self, where: to(self, "cpu") + (where in wrong))
    assert gpu_check.check() == gpu_check.check(2) == "GPUs that compute: GPU 0, GPU 1"
    with pytest.raises(RuntimeError, match="^CUDA error: there should be 3 GPUs, and CUDA sees 2$"):
        gpu_check.check(3)
    wrong.append("cuda:1")
    with pytest.raises(RuntimeError, match="^CUDA error: GPU 1 computes a wrong matrix product$"):
        gpu_check.check()


# -- what ends a search
# -----------------------------------------------------------------------------------------------------------

FAULT = """
def train(config, setup, trial):
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
"""


@pytest.mark.slow
def test_an_error_of_the_installation_ends_the_search_at_once(tmp_path, tiny_model, tiny_squad):
    """With what to install; no trial has failed for it, so that --resume goes on with all of them."""
    script = write_script(tmp_path / "fault.py", FAULT)
    arguments = ["--model", tiny_model, "--dataset", tiny_squad, "--max_t", 4, "--num_train_epochs", 0.2,
    "--max_eval_samples", 10,
                 "--max_concurrent_trials", 1, "--num_samples", 6]  # fmt: skip
    name = ["--output_dir", tmp_path, "--run_name", "x"]
    process = run_script(*arguments, *name, script=script)
    assert process.returncode == 1, process.stdout + process.stderr
    says = (
        r"no kernel image is available for execution on the device \(on \S+\); a V100 \(sm_70\) needs a torch that was "
    )
    says += "built for CUDA 12.6: pip install torch=="
    assert re.search(says, process.stderr), process.stderr
    assert (
        "failed after" not in process.stdout
        and json.loads((tmp_path / "x" / "run.json").read_text())["status"] == "failed"
    )
    process = run_script("--resume", *name)
    assert process.returncode == 0, process.stdout + process.stderr
    trials = files.read_csv(tmp_path / "x" / "trials.csv")
    assert len(trials) == 6 and {t["status"] for t in trials} == {"stopped", "completed"}


ASSERTS = """
def train(config, setup, trial):
    mark = setup.run_dir / ".assert"
    if not mark.exists():
        mark.write_text(f"{Path(trial.folder).parent.name} {os.getpid()}")
        raise RuntimeError("CUDA error: device-side assert triggered")
    if mark.read_text().endswith(f" {os.getpid()}"):
        raise RuntimeError("this process cannot use CUDA any more")
    experiment.train(config, setup, trial)
"""


@pytest.mark.slow
def test_a_device_side_assert_fails_the_trial_and_ends_its_process(tmp_path, tiny_model, tiny_squad):
    """It is not tried again, and the trials after it have another process."""
    script = write_script(tmp_path / "asserts.py", ASSERTS)
    process = run_script(
        "--model", tiny_model, "--dataset", tiny_squad, "--max_t", 4, "--num_train_epochs", 0.2, "--max_eval_samples",
        10,
        "--max_concurrent_trials", 1, "--num_samples", 6, "--output_dir", tmp_path, "--run_name", "x", script=script,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    hit = (tmp_path / "x" / ".assert").read_text().split()[0]
    trials = files.read_csv(tmp_path / "x" / "trials.csv")
    assert [t["trial_id"] for t in trials if t["status"] == "failed"] == [hit], process.stdout
    assert re.search(f"trial {hit} .*failed after 0 iterations: .*device-side assert triggered", process.stdout), (
        process.stdout
    )


def test_an_error_while_the_folder_is_gone_is_one_of_storage(tmp_path):
    """Whatever the system says of it. Another error is not, and an error of storage stays as it is."""
    missing, full = FileNotFoundError(2, "No such file or directory"), OSError(28, "No space left on device")
    found = errors.of_storage(missing, tmp_path / "gone")
    assert errors.is_storage(found) and "it is gone ([Errno 2]" in str(found)
    assert errors.of_storage(missing, tmp_path) is None and errors.of_storage(full, tmp_path) is full
    assert errors.of_storage(ValueError("gone"), tmp_path / "gone") is None
