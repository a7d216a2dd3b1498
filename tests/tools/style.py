"""Measure how the code reads: widths, statements a function, sizes of modules, imports and the reach of each stage.

    python tests/tools/style.py [CHECKOUT]

CHECKOUT is another checkout of the project, to compare with (default: this one). Generated lines are not counted: only
the code cells of the notebooks that are exported, without blank lines, comments and docstrings.
"""

import ast
import io
import json
import re
import sys
import tokenize
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
EXPORT = re.compile(r"^#\|\s*export(s|i)?\b", re.M)
LAYERS = "base", "settings", "data", "method", "train", "tasks", "viz", "apply", "study", "bench"


def code_cells(notebook):
    "Sources of the exported cells of a notebook."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    sources = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return [source for source in sources if EXPORT.search(source)]


def library(root):
    "Source of every module, by its dotted name below `cmid`."
    found = {}
    for notebook in sorted((root / "nbs").rglob("*.ipynb")):
        module = re.search(r'"#\| default_exp ([\w.]+)"', notebook.read_text(encoding="utf-8"))
        if module and notebook.parent.name != "pipeline":
            found[module[1]] = "\n\n\n".join(code_cells(notebook))
    return found


def is_text(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def code_lines(source):
    "Lines of code without blank lines, comment lines and docstrings."
    lines = source.split("\n")
    texts = [node for node in ast.walk(ast.parse(source)) if is_text(node)]
    hidden = {number for node in texts for number in range(node.lineno, node.end_lineno + 1)}
    return [
        line
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.lstrip().startswith("#") and number not in hidden
    ]


def semicolons(source):
    "Semicolons that join two statements."
    tokens = tokenize.generate_tokens(io.StringIO(source + "\n").readline)
    return sum(token.type == tokenize.OP and token.string == ";" for token in tokens)


def statements(function):
    "Statements of a function: its own and nested ones, without its docstring."
    inner = [node for node in ast.walk(function) if isinstance(node, ast.stmt) and node is not function]
    return sum(not is_text(node) for node in inner)


def functions(source):
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def share(values, part):
    "The value that `part` of all values do not exceed."
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def imports(source, modules):
    "Modules of the package that a source imports."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("cmid.") for name in found if name.startswith("cmid.")} & set(modules)


def reached(source, modules, skip=("smoke", "study.smoke", "study.examples", "study.code")):
    "Every module that a source imports, directly or through others."
    found, waiting = set(), imports(source, modules)
    while waiting:
        name = waiting.pop()
        if name not in found and name not in skip:
            found.add(name)
            waiting |= imports(modules[name], modules)
    return found


def stages(root):
    "Code of every stage's notebook, by the stage's name."
    found = {}
    for notebook in sorted((root / "nbs/pipeline").glob("*.ipynb")):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        lines = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code").split("\n")
        found[notebook.stem] = "\n".join("pass" if line.startswith(("%", "!")) else line for line in lines)
    return found


def package(module):
    return module.split(".")[0]


def floors(modules):
    "How many packages each module stands on: the longest chain of imports, counted where it enters another package."

    def floor(name, known):
        if name not in known:
            below = imports(modules[name], modules) - {name}
            known[name] = max((floor(o, known) + (package(o) != package(name)) for o in below), default=1)
        return known[name]

    known = {}
    for name in modules:
        floor(name, known)
    return known


def listed(values):
    return ", ".join(f"{name} {value}" for name, value in values.items())


def main():
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    modules = library(root)
    lines = [line for source in modules.values() for line in code_lines(source)]
    widths = [len(line) for line in lines]
    counts = [statements(function) for source in modules.values() for function in functions(source)]
    sizes = {name: source.count("\n") + 1 for name, source in modules.items()}
    print(f"modules {len(modules)}, lines of code {len(lines)}, functions {len(counts)}")
    print(f"width p50 {share(widths, 0.5)}, p90 {share(widths, 0.9)}, p99 {share(widths, 0.99)}, most {max(widths)}")
    print(f"over 120 characters {sum(width > 120 for width in widths) / len(widths):.1%}")
    print(f"semicolons {sum(map(semicolons, modules.values()))}")
    print(f"statements a function: median {median(counts):g}, p90 {share(counts, 0.9)}, most {max(counts)}")
    reaches = {name: len(reached(source, modules)) for name, source in stages(root).items()}
    print("longest modules:", listed(dict(sorted(sizes.items(), key=lambda item: -item[1])[:8])))
    print("reach of each stage:", listed(reaches))
    print(f"floors between packages: {max(floors(modules).values())}")


if __name__ == "__main__":
    main()
