"Locks of folders, between processes and on disks without them."

import errno
import os
import subprocess
import sys

import pytest

from cmid.base import files
from cmid.base.files import take_lock

HOLDER = """import sys
from cmid.base.files import take_lock
print(take_lock(sys.argv[1]) is not None, flush=True)
sys.stdin.read()"""
needs_locks = pytest.mark.skipif(files.fcntl is None, reason="no locks here")


@needs_locks
def test_the_lock_ends_with_its_process(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "a")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "True\n"
        assert take_lock(tmp_path / "a") is None
    finally:
        other.kill()
        other.communicate()
    os.close(take_lock(tmp_path / "a"))
    assert os.listdir(tmp_path / "a") == []


@needs_locks
def test_a_folder_that_was_replaced_is_not_taken(tmp_path, monkeypatch):
    lock = files.fcntl.flock

    def replaced(descriptor, how):
        lock(descriptor, how)
        (tmp_path / "a").rename(tmp_path / "b")
        (tmp_path / "a").mkdir()

    monkeypatch.setattr(files.fcntl, "flock", replaced)
    assert take_lock(tmp_path / "a") is None


@needs_locks
def test_a_disk_without_locks_lets_everybody_in_and_says_so(tmp_path, monkeypatch, capsys):
    def none(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", none)
    for descriptor in [take_lock(tmp_path) for _ in range(2)]:
        os.close(descriptor)
    assert "has no locks here; make sure that no other process writes there" in capsys.readouterr().err
