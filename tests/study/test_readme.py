"README.md is what nbs/index.ipynb shows, and what it says can be done can be done."

import json
import re
from pathlib import Path

import nbformat
import pytest
import torch

from cmid.base.files import load_yaml
from cmid.study import readme
from cmid.study.smoke import smoke_study
from cmid.study.study import study_params, with_set

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / o for o in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
TEXT = PAGES[0].read_text(encoding="utf-8")
ALL = "\n".join(o.read_text(encoding="utf-8") for o in PAGES)


def links(text):
    return re.findall(r"\]\((?![a-z]+:|#)([^)\s#]+)", re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S))


def test_rendered():
    files = readme.page(nbformat.read(ROOT / "nbs/index.ipynb", as_version=4))
    assert files.pop("README.md").decode() == TEXT, "run make readme"
    assert {o.relative_to(ROOT).as_posix(): o.read_bytes() for o in (ROOT / "nbs/images").iterdir()} == files


STUDIES = sorted(o.parent for o in ROOT.glob("studies/*/params.yaml"))
MADE = {o.__name__: o for o in (readme.notebook_table, readme.stage_table, readme.command_table)} | {
    f"study {o.name}": lambda root, o=o: readme.study_page(root, o) for o in STUDIES
}


@pytest.mark.parametrize("name", MADE)
def test_tables_are_those_of_today(name):
    assert readme.rebased(MADE[name](ROOT)) in TEXT, "run make notebooks"


@pytest.mark.parametrize("page", PAGES, ids=lambda o: o.stem)
def test_links_lead_somewhere(page):
    assert not [o for o in links(page.read_text(encoding="utf-8")) if not (ROOT / o).exists()]


def test_links_of_the_notebook_lead_somewhere():
    found = links(
        "\n".join(
            "".join(o["source"])
            for o in json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]
            if o["cell_type"] == "markdown"
        )
    )
    assert found and not [o for o in found if not (ROOT / "nbs" / o).exists()]


def test_nothing_is_left_of_the_notebook():
    assert not re.search(r"#\|| at 0x|<Figure|<IPython|Traceback|Warning:|/tmp/", TEXT)


def test_commands_exist():
    settings, targets = (ROOT / "settings.ini").read_text(), (ROOT / "Makefile").read_text()
    named = set(re.findall(r"\bcmid_[a-z]+\b", ALL))
    assert len(named) > 3 and not [o for o in named if f"{o}=cmid." not in settings]
    made = set(re.findall(r"(?:^|`)make ([a-z]+)", ALL, flags=re.M))
    assert made >= {"repro", "test"} and not [o for o in made if f"\n{o}:" not in targets]


def test_parameters_exist():
    params = load_yaml(ROOT / "params.yaml")
    given = re.findall(r"-S (\S+=\S+)", TEXT)
    assert given
    for o in given:
        with_set(params, o)
    assert set(re.findall(r"dvc exp run (\w+)", TEXT)) <= set(load_yaml(ROOT / "dvc.yaml")["stages"])
    for study, block in re.findall(r"cmid_study (studies/\w[\w-]*)((?: \\\n  --set \S+)+)", TEXT):
        for o in re.findall(r"--set (\S+)", block):
            with_set(study_params(params, load_yaml(ROOT / study / "params.yaml")), o)


def test_five_lines_for_ones_own_images(monkeypatch):
    import timm

    section = TEXT.split("## Your own images in five lines")[1].split("\n## ")[0]
    blocks = re.findall(r"```\w+\n(.*?)```", section, flags=re.S)
    assert sum(len(o.splitlines()) for o in blocks) == 5
    monkeypatch.chdir(ROOT)
    monkeypatch.chdir(smoke_study(models=["cmid-resnet18"]))
    names = dict(images=torch.zeros(2, 3, 64, 64))
    exec(blocks[1], names)
    sides = [o.shape[-1] for o in names["maps"]]
    assert sides == sorted(sides, reverse=True) and names["maps"][-1].shape == (2, 512, 2, 2)
    plain, ours = (
        eval(re.search(r"timm\.create_model\([^`]*\)", section)[0]).state_dict(),
        names["encoder"].model.state_dict(),
    )
    assert set(plain) <= set(ours) and all(torch.equal(v, ours[k]) for k, v in plain.items())
