"Seeds are pinned, so that a run of an older version can be repeated and resumed; a record holds only what is known."

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

import cmid
from cmid.base import runtime
from cmid.base.runtime import provenance, step_generator

ROOT = Path(__file__).parents[2]
SEEDS = [6262535349803285907, 2330999334775523360, 3550634350471688302, 8356416239501728886]


def test_seeds_of_steps_are_pinned():
    cases = (0, 0, 0), (0, 1, 0), (0, 0, 1), (7, 12345, 3)
    seeds = [step_generator(*case).initial_seed() for case in cases]
    assert seeds == SEEDS


def test_a_step_draws_the_same_whatever_came_before():
    expected = torch.rand(3, generator=step_generator(0, 5))
    torch.rand(100)
    torch.rand(100, generator=step_generator(0, 4))
    assert torch.equal(torch.rand(3, generator=step_generator(0, 5)), expected)


def test_seeds_are_in_the_range_that_torch_takes():
    for seed in (0, 1, 2**63 - 1):
        assert 0 <= step_generator(seed, 10**9, 1023).initial_seed() < 2**63


# What Git says, and what it does not say


def git(folder, *args):
    who = ["-c", "user.name=cmid", "-c", "user.email=cmid@example.com"]
    done = subprocess.run(["git", *who, *args], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, capsys):
    "A study of one file of code, committed."
    runtime._note_once.cache_clear()
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs/a.ipynb").write_text("{}")
    (tmp_path / "params.yaml").write_text("seed: 0\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "x")
    return tmp_path


def known(folder):
    record = provenance(folder=folder)
    return record["commit"], record["changed"]


def test_a_change_of_code_counts_and_one_of_parameters_does_not(repository, capsys):
    commit = git(repository, "rev-parse", "HEAD")
    assert known(repository) == (commit, False)
    (repository / "params.yaml").write_text("seed: 1\n")
    assert known(repository) == (commit, False)
    (repository / "nbs/b.ipynb").write_text("{}")
    assert known(repository) == (commit, True)
    assert capsys.readouterr().err == ""


def test_a_study_in_a_folder_of_a_larger_repository(repository):
    study = repository / "below"
    (study / "nbs").mkdir(parents=True)
    (study / "nbs/a.ipynb").write_text("{}")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "y")
    assert known(study)[1] is False
    (study / "nbs/a.ipynb").write_text("[]")
    assert known(study)[1] is True


def test_a_repository_without_a_commit(tmp_path, capsys):
    git(tmp_path, "init", "-q")
    (tmp_path / "dvc.yaml").write_text("")
    assert known(tmp_path) == (None, True)
    assert capsys.readouterr().err == ""


def test_a_repository_of_another_user_is_said_and_nothing_is_claimed(repository, monkeypatch, capsys):
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)  # it may trust this folder
    assert known(repository) == (None, None)
    assert known(repository) == (None, None)
    said = capsys.readouterr().err
    assert said.count("\n") == 1, "one line, once"
    assert said.startswith(
        f"note: {repository}: Git does not describe this code, so the run records null (the repository"
    )
    assert f"git config --global --add safe.directory {repository}" in said


def test_git_is_missing(repository, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert known(repository) == (None, None)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "No such file or directory: 'git'" in said


def test_git_fails_in_another_way(repository, capsys):
    (repository / ".git/index").write_bytes(b"not an index")
    commit, changed = known(repository)
    assert commit == git(repository, "rev-parse", "HEAD")
    assert changed is None, "not known is not unchanged"
    assert "index file" in capsys.readouterr().err


def test_there_is_no_repository(tmp_path_factory, capsys, monkeypatch):
    folder = tmp_path_factory.mktemp("nowhere")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(folder.parent))
    assert known(folder) == (None, None)
    assert capsys.readouterr().err == ""


# A package that is not installed


def test_versions_without_metadata(monkeypatch):
    def nothing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(runtime, "version", nothing)
    monkeypatch.delitem(sys.modules, "fastai", raising=False)
    versions = provenance()["versions"]
    assert versions["cmid"] == cmid.__version__
    assert versions["torch"] == torch.__version__
    assert versions["fastai"] is None, "neither installed nor loaded"


def test_the_version_is_that_of_the_code_that_runs():
    "The metadata of an editable install may be of an earlier version."
    assert provenance()["versions"]["cmid"] == cmid.__version__
    assert f"version = {cmid.__version__}" in (ROOT / "settings.ini").read_text(encoding="utf-8")
