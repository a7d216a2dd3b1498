"""What `mkdocs build` adds to the notebooks: navigation by package, an index of names, links, anchors of functions."""

import ast
import html
import json
import posixpath
import re
from configparser import ConfigParser
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
INI = ConfigParser(delimiters=["="])
INI.read(ROOT / "settings.ini", encoding="utf-8")
SOURCE = f"https://github.com/{INI['DEFAULT']['user']}/{INI['DEFAULT']['repo']}/blob/{INI['DEFAULT']['branch']}"
PACKAGES = dict(
    base="Base: errors, files, parameters",
    settings="Settings: params.yaml, section by section",
    data="Data: images and labels",
    method="Method: CMID itself",
    train="Train: pretraining",
    tasks="Tasks: probes and fine-tuning",
    viz="Figures: what was learnt",
    study="Study: stages and report",
    bench="Bench: speed and scale",
    pipeline="Stages, as DVC runs them",
)
PAGES = "map", "studies", "scale", "safety"


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def title(path):
    "The first heading of a notebook."
    for cell in cells(path):
        heading = re.match(r"# (.+)", "".join(cell["source"]))
        if heading and cell["cell_type"] == "markdown":
            return heading[1].strip()
    return path.stem


def folders():
    "Folders of notebooks in their order, with the name of the package."
    found = [(path, path.name.partition("_")[2]) for path in sorted((ROOT / "nbs").glob("[0-9]_*"))]
    return [*found, (ROOT / "nbs/pipeline", "pipeline")]


def public_names(path):
    "Functions and classes that a notebook exports, with the first line of their docstrings."
    found = {}
    for cell in cells(path):
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or not re.search(r"^#\|\s*export\b", source, re.M):
            continue
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                found[node.name] = (ast.get_docstring(node) or "").partition("\n")[0]
    return found


def names_page():
    "Every public name, package by package, with a link to where it is defined and shown."
    lines = [
        "# All names",
        "",
        "Every public function and class, with the notebook that defines, shows and tests it.",
        "",
    ]
    for folder, package in folders()[:-1]:
        lines += [f"## cmid.{package}", "", "| name | gives |", "| --- | --- |"]
        for path in sorted(folder.glob("*.ipynb")):
            for name, text in public_names(path).items():
                text = text.replace("|", "\\|").replace("<", "&lt;")
                lines.append(f"| [`{name}`]({folder.name}/{path.name}#{name}) | {text} |")
        lines.append("")
    return "\n".join(lines)


def on_config(config):
    nav = [{"Home": "index.ipynb"}]
    for folder, package in folders():
        pages = [{title(path): f"{folder.name}/{path.name}"} for path in sorted(folder.glob("*.ipynb"))]
        nav.append({PACKAGES[package]: pages})
    nav += [{title(ROOT / f"nbs/{page}.ipynb"): f"{page}.ipynb"} for page in PAGES]
    nav.append({"All names": "names.md"})
    config.nav = nav
    return config


def on_files(files, config):
    files.append(File.generated(config, "names.md", content=names_page()))
    return files


def resolved(link, page, files):
    "Where a link of a notebook leads on the site: to a page, or to a file of the repository."
    path, mark, anchor = link.partition("#")
    if not path or re.match(r"[a-z]+:|/", path):
        return link
    folder = posixpath.dirname(page.file.src_uri)
    target = posixpath.normpath(posixpath.join(folder, path))
    if target == "../studies/README.md":
        target = "studies.ipynb"
    if target.startswith("../"):
        return f"{SOURCE}/{target.removeprefix('../')}{mark}{anchor}"
    file = files.get_file_from_path(target)
    return f"{file.url_relative_to(page.file)}{mark}{anchor}" if file else link


def on_page_content(text, page, config, files):
    def change(match):
        return f'{match[1]}="{html.escape(resolved(html.unescape(match[2]), page, files))}"'

    text = re.sub(
        r'(href)="([^"]*\.(?:ipynb|md|yaml|ini|lock|dvc|cff|py|json)(?:#[^"]*)?|(?:\.\./)+[^"]*)"', change, text
    )
    path = ROOT / "nbs" / page.file.src_uri
    if path.suffix == ".ipynb" and path.exists():
        for name in public_names(path):
            text = re.sub(
                rf'<span class="(n[cf])">{name}</span>', rf'<span class="\1" id="{name}">{name}</span>', text, count=1
            )
    return text
