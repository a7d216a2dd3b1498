"""What `mkdocs build` adds to the notebooks: pages without hidden cells, navigation by package, an index of names,
links, anchors of functions, and formulas as MathML (no script has to be fetched)."""

import ast
import html
import json
import posixpath
import re
import shutil
from configparser import ConfigParser
from pathlib import Path

import latex2mathml.converter
import nbformat
from mkdocs.structure.files import File
from mkdocs.structure.nav import Link

from cmid.study.readme import directives, shown_cell
from cmid.study.results_page import results_page

ROOT = Path(__file__).parents[1]
STAGING = ROOT / ".cache/docs"
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
    apply="Apply: maps, tables and files for elsewhere",
    study="Study: stages and report",
    bench="Bench: speed and scale",
    pipeline="Stages, as DVC runs them",
)
RENDERED = "index", "map", "studies"  # pages of prose and tables, which show no code
PAGES = "how-long", "methodology", "grid", "scale", "safety"
RESULTS = "results.html"  # of all studies, beside the pages
MOVED = {f"{name}.ipynb": f"{name}.md" for name in RENDERED} | {"../studies/README.md": "studies.md"}
LINK = r'href="([^"]*\.(?:ipynb|md|yaml|ini|lock|dvc|cff|py|json)(?:#[^"]*)?|(?:\.\./)+[^"]*)"'


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


def is_hidden(cell):
    "Whether a cell is of no use to a reader of the site"
    told = directives(cell.source) if cell.cell_type == "code" else {}
    names = {name.split()[0] for name in told if name}
    return bool(names & {"hide", "default_exp"}) or told.get("include") == "false"


def stage_notebook(path, to):
    "A notebook without hidden cells and without nbdev's directives."
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not is_hidden(cell)]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            lines = cell.source.splitlines()
            cell.source = "\n".join(line for line in lines if not line.startswith("#|")).strip()
    to.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, to)


def stage_page(path, to):
    "A page of prose and tables, as Markdown."
    shown = [shown_cell(cell)[0] for cell in nbformat.read(path, as_version=4).cells]
    to.write_text("\n\n".join(text for texts in shown for text in texts) + "\n", encoding="utf-8")


def stage():
    "Fill the folder that the site is built from."
    shutil.rmtree(STAGING, ignore_errors=True)
    STAGING.mkdir(parents=True)
    for folder, _ in folders():
        for path in folder.glob("*.ipynb"):
            stage_notebook(path, STAGING / folder.name / path.name)
    for page in PAGES:
        stage_notebook(ROOT / f"nbs/{page}.ipynb", STAGING / f"{page}.ipynb")
    for page in RENDERED:
        stage_page(ROOT / f"nbs/{page}.ipynb", STAGING / f"{page}.md")
    shutil.copytree(ROOT / "nbs/images", STAGING / "images")
    shutil.copy(Path(__file__).parent / "extra.css", STAGING / "extra.css")


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
    intro = "Every public function and class, with the notebook that defines, shows and tests it."
    lines = ["# All names", "", intro, ""]
    for folder, package in folders()[:-1]:
        lines += [f"## cmid.{package}", "", "| name | gives |", "| --- | --- |"]
        for path in sorted(folder.glob("*.ipynb")):
            for name, text in public_names(path).items():
                text = text.replace("|", "\\|").replace("<", "&lt;")
                lines.append(f"| [`{name}`]({folder.name}/{path.name}#{name}) | {text} |")
        lines.append("")
    return "\n".join(lines)


def on_config(config):
    stage()
    config.docs_dir = str(STAGING)
    nav = [{"Home": "index.md"}]
    for folder, package in folders():
        pages = [{title(path): f"{folder.name}/{path.name}"} for path in sorted(folder.glob("*.ipynb"))]
        nav.append({PACKAGES[package]: pages})
    nav += [{title(ROOT / f"nbs/{page}.ipynb"): f"{page}.md"} for page in RENDERED[1:]]
    nav += [{title(ROOT / f"nbs/{page}.ipynb"): f"{page}.ipynb"} for page in PAGES]
    nav.append({"All names": "names.md"})
    config.nav = nav
    return config


def on_nav(nav, config, files):
    "The page of all results is no page of the theme: it stands in the navigation as a link."
    after = next(i for i, item in enumerate(nav.items) if item.title == title(ROOT / "nbs/studies.ipynb"))
    nav.items.insert(after + 1, Link("All results, to filter and sort", RESULTS))
    return nav


def on_post_build(config):
    Path(config.site_dir, RESULTS).write_text(results_page(ROOT, home="index.html"), encoding="utf-8")


def on_files(files, config):
    files.append(File.generated(config, "names.md", content=names_page()))
    return files


def located(link, page):
    "A link of a notebook as a path below the site's folder, or as the address of a file of the repository."
    path, mark, anchor = link.partition("#")
    if not path or re.match(r"[a-z]+:|/", path):
        return link
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), path))
    target = MOVED.get(target, target)
    if target.startswith("../"):
        target = f"{SOURCE}/{target.removeprefix('../')}"
    return f"{target}{mark}{anchor}"


def resolved(link, page, files):
    "Where a link of a notebook leads on the site: to a page, or to a file of the repository."
    target = located(link, page)
    path, mark, anchor = target.partition("#")
    file = files.get_file_from_path(path)
    if file:
        return f"{file.url_relative_to(page.file)}{mark}{anchor}"
    return target if "://" in target else link


def on_page_markdown(text, page, config, files):
    "Links of the rendered pages, which lie in the site's folder itself; code is left alone."
    if page.file.src_uri.removesuffix(".md") not in RENDERED:
        return text
    parts = re.split(r"(```.*?```|`[^`\n]+`)", text, flags=re.S)
    parts[::2] = [re.sub(r"(?<=\]\()[^)\s]+", lambda match: located(match[0], page), part) for part in parts[::2]]
    return "".join(parts)


def with_formulas(text):
    "HTML with its formulas as MathML; code is left alone."

    def formula(match):
        display = "block" if match[1] == "$$" else "inline"
        return latex2mathml.converter.convert(html.unescape(match[2]).strip(), display=display)

    parts = re.split(
        r"(<pre.*?</pre>|<code.*?</code>|<script.*?</script>|<style.*?</style>|<svg.*?</svg>)", text, flags=re.S
    )
    parts[::2] = [re.sub(r"(\$\$|\$)(?=\S)([^$<]+?)\1", formula, part) for part in parts[::2]]
    return "".join(parts)


def on_page_content(text, page, config, files):
    def change(match):
        return f'href="{html.escape(resolved(html.unescape(match[1]), page, files))}"'

    text = with_formulas(re.sub(LINK, change, text))
    path = ROOT / "nbs" / page.file.src_uri
    if path.suffix == ".ipynb" and path.exists():
        for name in public_names(path):
            plain = rf'<span class="(n[cf])">{name}</span>'
            text = re.sub(plain, rf'<span class="\1" id="{name}">{name}</span>', text, count=1)
    return text
