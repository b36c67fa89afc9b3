"""What is left on a file system and of a quota. There is no quota here: the commands' own forms of output stand in."""

import os
import shutil

import pytest

from hpo import disk, machines
from hpo.errors import BadInput

QUOTA = """Disk quotas for user alice (uid 1000):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
      /dev/sda1  123456*  120000  250000  604800    1234       0       0       0
"""
LUSTRE = """     /lustre/project/a-long-name
                   1234  0   2000       -      12     400     500       -
"""


@pytest.mark.parametrize(
    "text, left",
    [
        (QUOTA, [((250000 - 123456) * 1024, None)]),
        (LUSTRE, [((2000 - 1234) * 1024, 488)]),
        (LUSTRE.replace("1234", "3000*"), [(0, 488)]),
        (QUOTA.replace("250000", "0"), [(0, None)]),  # the soft limit, which is passed
        ("Disk quotas for user root (uid 0): none\n", []),
        ("", []),
        ("Some quotas are not available: one two three four five six seven eight\n", []),
    ],
)
def test_what_a_quota_leaves(text, left):
    found = disk.left_of_quota(text, "quota")
    assert [(room.bytes, room.files if room.files < disk.NO_LIMIT else None) for room in found] == left


@pytest.mark.parametrize("command, text", [("quota", QUOTA), ("lfs", LUSTRE)])
def test_the_smallest_room_counts(tmp_path, monkeypatch, command, text):
    without = disk.room(tmp_path / "not" / "there")
    assert without.by == "the file system" and 0 < without.bytes < shutil.disk_usage(tmp_path).total
    program = tmp_path / command
    program.write_text(f'#!/bin/sh\necho "$0 $*" >> {tmp_path}/asked\ncat <<END\n{text}END\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (expected,) = disk.left_of_quota(text, command)
    assert disk.room(tmp_path / "not" / "there")[::2] == (expected.bytes, f"{command}'s limit")
    assert len((tmp_path / "asked").read_text().splitlines()) == 1
    needs = rf"the run needs up to 5 GB there, and \d\S* GB are free \({command}'s limit\)$"
    with pytest.raises(BadInput, match=needs):
        machines.check_disk(tmp_path, 5 * 10**9)
    if command == "lfs":
        with pytest.raises(BadInput, match=r"the run needs up to 2000 files there, and 488 are free$"):
            machines.check_disk(tmp_path, 1)


def test_a_quota_command_that_fails_does_not_count(tmp_path, monkeypatch):
    program = tmp_path / "quota"
    program.write_text("#!/nowhere\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert disk.room(tmp_path).by == "the file system"
