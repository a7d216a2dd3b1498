"How a console command ends: one line and a status, as the user's shell sees it."

import subprocess
import sys

import pytest

SCRIPT = """
from cmid.base.errors import CmidError, cli

@cli
def cmid_example():
    {body}

cmid_example()
"""


def run(body):
    "Status and lines on standard error of a command."
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(body=body)], capture_output=True, text=True)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize(
    "body, status, line",
    [
        ("raise CmidError('a.yaml: wrong;\\n mend it')", 1, "cmid_example: a.yaml: wrong; mend it"),
        ("open('/nowhere/a.txt')", 1, "cmid_example: [Errno 2] No such file or directory: '/nowhere/a.txt'"),
        ("raise KeyboardInterrupt", 130, "cmid_example: stopped"),
        ("raise KeyboardInterrupt('run again to resume')", 130, "cmid_example: run again to resume"),
        ("pass", 0, None),
    ],
)
def test_a_command_ends_in_one_line(body, status, line):
    assert run(body) == (status, [line] if line else [])


def test_a_defect_keeps_its_traceback():
    status, lines = run("raise KeyError('x')")
    assert status == 1
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "KeyError: 'x'"
