"Contracts of params.yaml with the schemas: the same keys, a comment behind each, and nothing heavy to read them."

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cmid.base.key_table import comments, key_table
from cmid.base.params import SECTIONS, Params, check_all, schema

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "params.yaml").read_text(encoding="utf-8")
GROUPS = dict(dataset="datasets", task="tasks")


@pytest.mark.parametrize("name", [*SECTIONS, *GROUPS])
def test_every_key_has_a_comment(name):
    written = comments(TEXT, GROUPS.get(name, name))
    keys = schema(name).model_fields
    assert [key for key in keys if not written.get(key)] == []


@pytest.mark.parametrize("name", [*SECTIONS, *GROUPS])
def test_every_key_is_in_the_table(name):
    rows = key_table(name).splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(schema(name).model_fields)


@pytest.mark.parametrize("name", [*SECTIONS, *GROUPS])
def test_the_page_of_a_section_shows_its_table(name):
    (path,) = (ROOT / "nbs/1_settings").glob(f"[0-9][0-9]_{name}.ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    shown = ["".join(o.get("data", {}).get("text/markdown", "")) for c in cells for o in c.get("outputs", [])]
    assert key_table(name) in shown, "run make notebooks"


def test_lines_fit_the_page():
    assert max(map(len, TEXT.splitlines())) <= 120


@pytest.mark.parametrize("profile", ["sample", "small", "paper", "smoke"])
def test_every_profile_is_valid(profile):
    assert check_all(Params(ROOT, profile)).run.profile == profile


def test_schemas_are_light():
    "Reading parameters loads neither torch nor NumPy's dependants."
    modules = ["cmid.base.params", "cmid.base.key_table", *(f"cmid.settings.{o}" for o in [*SECTIONS, *GROUPS])]
    code = f"import sys, {', '.join(modules)}; print(*{{'torch', 'numpy', 'matplotlib', 'fastai'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_section_imports_its_own_schema_only():
    code = (
        "import sys; from cmid.base.params import Params; Params().probe;"
        "print(*sorted(o for o in sys.modules if o.startswith('cmid.settings.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["cmid.settings.probe"]
