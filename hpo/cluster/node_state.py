"""What a node says of itself for --check: its GPUs, versions, disks, and whether it sees the results folder."""

import contextlib
import socket
import tempfile
import time
from pathlib import Path

from hpo import disk, errors, machines
from hpo.cluster import gpu_check
from hpo.results.provenance import nvidia_smi, versions

SHARED_SECONDS = 60  # until a file of another node is seen: NFS keeps what it knows of a folder for up to a minute
LOCAL_BYTES = 10**9  # free on the node-local disk: Ray's logs and objects, and temporary files of the trials


def look(shared: Path, node_id: str, gpus: bool, needed: int, ray_folder: Path) -> dict:
    """Looks at the node of this process.

    Args:
        shared: the folder where the head has written the file "head", and the node writes one of its own.
        node_id: the name of that file.
        gpus: whether trials use GPUs.
        needed: bytes that the whole search needs in the results folder.
        ray_folder: a folder of Ray on this node. It is in /tmp where the path of TMPDIR is long.

    Returns:
        {"gpus": their names, "driver", "versions", "disks": {name: see disk.room}, "problems": one
        line each, "can_run": whether a trial can be tried}.
    """
    gpu_names, driver, at_gpus = look_at_gpus() if gpus else ("", None, [])
    disks, at_disks, temporary = {}, [], Path(tempfile.gettempdir())
    places = [("TMPDIR", temporary, LOCAL_BYTES, "make room, or take another folder")]
    places += [("results", shared, needed, "make room, or take another folder")]
    places += [("Ray's folder", ray_folder, LOCAL_BYTES, "make room, or set a TMPDIR with a shorter path")]
    for name, folder, least, what_to_do in places:
        try:
            if name == "Ray's folder" and folder.stat().st_dev == temporary.stat().st_dev:
                continue
            disks[name] = disk.room(folder)._asdict()
        except OSError as error:
            at_disks.append(f"{name} ({folder}): {error.strerror}")
            continue
        if disks[name]["bytes"] < least:
            what = "{:.3g} GB are free ({by}), and {:.3g} are needed"
            what = what.format(disks[name]["bytes"] / 1e9, least / 1e9, by=disks[name]["by"])
            at_disks.append(f"{name} ({folder}): {what}: {what_to_do}")
        if disks[name]["files"] < machines.FILES:
            at_disks.append(f"{name} ({folder}): room for {disks[name]['files']} more files: remove some")
    at_results = exchange(shared, node_id)
    found = {"gpus": gpu_names, "driver": driver, "versions": versions(), "disks": disks}
    return found | {"problems": at_gpus + at_disks + at_results, "can_run": not at_gpus + at_results}


def look_at_gpus() -> tuple[str, str | None, list[str]]:
    """Names of the GPUs of this process, the version of the driver, and what is wrong."""
    try:
        names, found = gpu_check.check().partition(": ")[2], nvidia_smi()
        return names, found[0][1] if found else None, []
    except Exception as error:  # whatever CUDA raises
        return "", None, [in_words(error)]


def exchange(shared: Path, node_id: str) -> list[str]:
    """Reads the file of the head, and writes that of this node. Returns what is wrong."""
    if not appears(shared / "head"):
        what = f"a file of the head in {shared} is not seen within {SHARED_SECONDS} s"
        return [f"results: {what}: take an --output_dir that all nodes share"]
    try:
        (shared / node_id).write_text(socket.gethostname())
    except OSError as error:
        return [f"results: {shared} cannot be written: {error.strerror}"]
    return []


def appears(file: Path) -> bool:
    """Waits for a file of another node, at most SHARED_SECONDS. Returns whether it can be read."""
    deadline = time.time() + SHARED_SECONDS
    while time.time() < deadline:
        with contextlib.suppress(OSError):
            if file.read_text():
                return True
        time.sleep(0.5)
    return False


def in_words(error: Exception) -> str:
    """An error in one line, with what to do about it."""
    reason = errors.one_line(f"{type(error).__name__} {error}")
    return f"{reason}: {errors.what_to_do(error)}"
