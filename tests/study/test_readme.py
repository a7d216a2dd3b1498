"The rendered pages are what their notebooks show, and what they say can be done can be done."

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from cmid.base.files import load_yaml
from cmid.settings.task import Task
from cmid.study.front_page import decided_by_seeds, front_table
from cmid.study.readme import PAGES, command_table, notebook_table, rendered_pages, stage_table
from cmid.study.smoke import smoke_study
from cmid.study.study import study_params, with_set
from cmid.study.study_pages import all_studies, study_page

ROOT = Path(__file__).parents[2]
FILES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "studies/README.md")]
README = FILES[0].read_text(encoding="utf-8")
ALL = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
STUDIES = sorted(path.parent for path in ROOT.glob("studies/*/params.yaml"))
PACKAGES = [path.name.partition("_")[2] for path in sorted(ROOT.glob("nbs/[0-9]_*"))]


def without_code(text):
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)


def links(text):
    return re.findall(r"\]\((?![a-z]+:|#)([^)\s#]+)", without_code(text))


def shown_text(notebook):
    "Markdown outputs of a page, as they were executed."
    cells = json.loads((ROOT / "nbs" / notebook).read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", []) if "data" in output]
    return "\n".join("".join(output["data"].get("text/markdown", "")) for output in outputs)


def test_rendered():
    files = rendered_pages(ROOT)
    for path, content in files.items():
        assert (ROOT / path).read_bytes() == content, f"{path}: run make readme"
    pictures = {path.relative_to(ROOT).as_posix() for path in (ROOT / "nbs/images").iterdir()}
    assert pictures == set(files) - set(PAGES)


def test_the_front_page_is_short():
    assert len(README.splitlines()) <= 150


def test_the_front_table_is_that_of_today():
    shown = shown_text("index.ipynb")
    assert front_table(ROOT, ROOT / "studies/aid-h100") in shown, "run make notebooks"
    assert decided_by_seeds(ROOT, ROOT / "studies/aid-grid") in shown, "run make notebooks"


def test_the_tables_of_studies_are_those_of_today():
    assert all_studies(ROOT) in shown_text("studies.ipynb"), "run make notebooks"


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_a_study_has_its_page(study):
    assert study_page(ROOT, study) in shown_text("studies.ipynb")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_map_names_every_notebook(package):
    assert notebook_table(ROOT, package) in shown_text("map.ipynb"), "run make notebooks"


@pytest.mark.parametrize("table", [stage_table, command_table])
def test_the_map_names_stages_and_commands(table):
    assert table(ROOT) in shown_text("map.ipynb"), "run make notebooks"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    assert not [link for link in links(path.read_text(encoding="utf-8")) if not (path.parent / link).exists()]


@pytest.mark.parametrize("path", sorted(ROOT.glob("nbs/**/*.ipynb")), ids=lambda path: path.stem)
def test_links_of_a_notebook_lead_somewhere(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert not [link for link in links(text) if not (path.parent / link).exists()]


def test_nothing_is_left_of_the_notebook():
    assert not re.search(r"#\|| at 0x|<Figure|<IPython|Traceback|Warning:|/tmp/", README)


def test_commands_exist():
    settings = (ROOT / "settings.ini").read_text()
    targets = (ROOT / "Makefile").read_text()
    recipes = [load_yaml(study / "params.yaml").get("recipes") or {} for study in STUDIES]
    named = set(re.findall(r"\bcmid_[a-z]+\b", ALL)).difference(*recipes)
    assert len(named) > 3
    assert not [name for name in named if f"{name}=cmid." not in settings]
    made = set(re.findall(r"(?:^|`)make ([a-z-]+)", ALL, flags=re.M))
    assert made >= {"repro", "test"}
    assert not [name for name in made if f"\n{name}:" not in targets]


def test_parameters_exist():
    params = load_yaml(ROOT / "params.yaml")
    given = re.findall(r"-S (\S+=\S+)", ALL)
    assert given
    for assignment in given:
        with_set(params, assignment)
    stages = set(load_yaml(ROOT / "dvc.yaml")["stages"])
    assert set(re.findall(r"dvc exp run (\w+)", ALL)) <= stages


def test_commands_of_studies_set_what_exists():
    params = load_yaml(ROOT / "params.yaml")
    found = re.findall(r"cmid_study (studies/\w[\w-]*)((?: \\\n  --set \S+)+)", ALL)
    assert found
    for study, block in found:
        for assignment in re.findall(r"--set (\S+)", block):
            with_set(study_params(params, load_yaml(ROOT / study / "params.yaml")), assignment)


def block_below(heading, language):
    "The code block of a section of the README."
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.search(rf"```{language}\n(.*?)```", section, flags=re.S)[1]


def test_the_lines_that_use_a_backbone(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.chdir(smoke_study(models=["cmid-resnet18"]))
    names = dict(images=torch.zeros(2, 3, 64, 64))
    exec(block_below("Use a backbone", "python"), names)
    sides = [found.shape[-1] for found in names["maps"]]
    assert sides == sorted(sides, reverse=True)
    assert names["embeddings"].shape == (2, 512)


def test_the_labels_of_the_front_page_are_understood():
    tasks = yaml.safe_load(block_below("Your own labels", "yaml"))["tasks"]
    assert [Task.model_validate(entry).task for entry in tasks.values()] == ["segment"]
