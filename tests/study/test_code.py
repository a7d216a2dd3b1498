"What the digest of a stage covers beside Python: the templates and the style sheet of the report."

import shutil
from pathlib import Path

import pytest

from cmid.study.code import TEMPLATES, UNCOUNTED, digest

ROOT = Path(__file__).parents[2]
STAGES = sorted((ROOT / "nbs/pipeline").glob("*.ipynb"))


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("code") / "cmid"
    return shutil.copytree(ROOT / "cmid", folder, ignore=shutil.ignore_patterns("__pycache__"))


def digests(package):
    return {o.stem: digest(o, package)["all"] for o in STAGES}


@pytest.mark.parametrize("file", ["report.css", "report.html.j2", "scores.html.j2"])
def test_a_template_reruns_the_report_and_nothing_else(package, file):
    before = digests(package)
    path = package / "study/templates" / file
    path.write_text(path.read_text() + "\n")
    after = digests(package)
    assert [o for o in before if before[o] != after[o]] == ["report"]


def test_names_in_the_code_are_modules():
    for name in {*TEMPLATES, *UNCOUNTED}:
        assert (ROOT / "cmid" / f"{name.replace('.', '/')}.py").is_file(), name
    for folder in TEMPLATES.values():
        assert list((ROOT / "cmid" / folder).iterdir()), folder
