"The house: packages in one direction, narrow stages, names in one place. What a change reruns is shown by making it."

import ast
import graphlib
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import cmid
from cmid.study.code import digest
from tests.tools import style

ROOT = Path(__file__).parents[2]


MODULES = style.library(ROOT)
STAGES = style.stages(ROOT)
TASKS = "probe", "classify", "segment", "change", "detect"


def test_every_module_lies_in_a_package():
    assert {style.package(name) for name in MODULES} == set(style.LAYERS)
    for name in MODULES:
        assert (ROOT / "cmid" / (name.replace(".", "/") + ".py")).is_file(), name


@pytest.mark.parametrize("name", MODULES)
def test_a_package_imports_only_earlier_ones(name):
    order = {layer: i for i, layer in enumerate(style.LAYERS)}
    for other in style.imports(MODULES[name], MODULES):
        assert order[style.package(other)] <= order[style.package(name)], f"{name} imports {other}"


def test_no_module_imports_itself_in_a_circle():
    direct = {name: style.imports(source, MODULES) for name, source in MODULES.items()}
    assert {*graphlib.TopologicalSorter(direct).static_order()} == {*MODULES}  # raises `CycleError`


def test_settings_import_base_alone():
    for name in MODULES:
        if style.package(name) == "settings":
            assert all(style.package(o) == "base" for o in style.imports(MODULES[name], MODULES)), name


def test_no_task_imports_another():
    tasks = {f"tasks.{name}" for name in TASKS}
    for name in tasks:
        others = style.reached(MODULES[name], MODULES, skip=()) & tasks - {name}
        assert not others, f"{name} imports {others}"


def from_imports(source):
    "(module, name) of every `from cmid.x import name`."
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom))
    return [
        (node.module, alias.name) for node in nodes for alias in node.names if (node.module or "").startswith("cmid")
    ]


@pytest.mark.parametrize("name", [*MODULES, *STAGES])
def test_nobody_imports_a_private_name(name):
    private = [pair for pair in from_imports(MODULES.get(name) or STAGES[name]) if pair[1].startswith("_")]
    assert not private


@pytest.mark.parametrize("name", [*MODULES, *STAGES])
def test_nobody_reads_a_private_name_of_a_module(name):
    tree = ast.parse(MODULES.get(name) or STAGES[name])
    modules = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cmid")
        for alias in node.names
        if f"{node.module}.{alias.name}".removeprefix("cmid.") in MODULES
    }
    read = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("_")]
    assert not [node.attr for node in read if isinstance(node.value, ast.Name) and node.value.id in modules]


def test_modules_are_loaded_by_name_in_two_places_only():
    "`base.params` loads a section's schema when it is asked for, `study.readme` a command to read its help."
    assert {name for name in MODULES if "import_module" in MODULES[name]} == {"base.params", "study.readme"}


def defined(statement):
    "Names that a statement of a module defines: a function, a class, or constants."
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [statement.name]
    targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
    nodes = (node for target in targets if target for node in ast.walk(target))
    return [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def public_names(source):
    "Functions, classes and constants that a module defines, without an underscore."
    names = {name for statement in ast.parse(source).body for name in defined(statement)}
    return {name for name in names if not name.startswith("_")}


def test_public_names_are_functions_classes_and_constants():
    assigned = "A, (B, C) = 1, x\nD: int = 2\n_E = C.f = 3\nA = [o for o in D]\n"
    assert public_names(assigned + "def f():\n    g = 5\n\n\nclass H:\n    I = 6") == {*"ABCDfH"}


def test_a_public_name_has_one_home():
    homes = Counter(name for source in MODULES.values() for name in public_names(source))
    assert not {name for name, count in homes.items() if count > 1}


@pytest.mark.parametrize("task", TASKS)
def test_the_stage_of_a_task_is_narrow(task):
    found = style.reached(STAGES[task], MODULES)
    assert len(found) <= 22, sorted(found)


def test_the_tower_is_low():
    floors = style.floors(MODULES)
    assert max(floors.values()) <= 7, {name: floor for name, floor in floors.items() if floor > 7}


def test_modules_and_functions_are_short():
    sizes = {name: source.count("\n") + 1 for name, source in MODULES.items()}
    assert not {name: size for name, size in sizes.items() if size > 600}
    counts = {
        f"{name}.{node.name}:{node.lineno}": style.statements(node)
        for name, source in MODULES.items()
        for node in style.functions(source)
    }
    assert not {name: count for name, count in counts.items() if count > 15}
    assert style.median(counts.values()) < 6
    assert not sum(map(style.semicolons, MODULES.values()))


# What a change reruns


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    at = tmp_path_factory.mktemp("house") / "cmid"
    shutil.copytree(ROOT / "cmid", at, ignore=shutil.ignore_patterns("__pycache__"))
    return at


def digests(package):
    return {name: digest(ROOT / f"nbs/pipeline/{name}.ipynb", package)["all"] for name in STAGES}


def changed_by(package, module, old, new):
    "Stages whose digest is another one after a change to the text of a module."
    path = package / module
    text = path.read_text(encoding="utf-8")
    assert re.search(old, text), f"{old} is not in {module}"
    before = digests(package)
    path.write_text(re.sub(old, new, text, count=1), encoding="utf-8")
    after = digests(package)
    path.write_text(text, encoding="utf-8")
    return {name for name in STAGES if before[name] != after[name]}


def test_the_digest_of_the_copy_is_the_digest(package):
    assert digests(package) == digests(ROOT / "cmid")


@pytest.mark.parametrize("section", [name for name in STAGES if (ROOT / f"cmid/settings/{name}.py").is_file()])
def test_a_new_key_of_a_section_changes_its_own_stage_alone(package, section):
    found = changed_by(package, f"settings/{section}.py", r"\nclass (\w+\(.*)", r"\nclass \1\n    novelty: int = 0\n")
    opened = {"apply"} if section in TASKS else set()  # it opens networks of every task, whose cards hold the section
    assert found - opened == {section}


def test_a_reworded_health_alarm_reruns_no_fine_tuning(package):
    found = changed_by(package, "train/health.py", r"(def alarms\()", r"WORDS = 'reworded'\n\n\n\1")
    assert "pretrain" in found and found <= {"pretrain", "report"}


def test_the_diagram_and_the_examples_rerun_no_training(package):
    for module in ("viz/diagram.py", "study/examples.py", "study/runner.py"):
        found = changed_by(package, module, r"\Z", "\nNOVELTY = 1\n")
        assert not found - {"report"}, (module, found)


def test_a_comment_and_a_docstring_change_nothing(package):
    assert not changed_by(package, "tasks/detect.py", r"\Z", "\n# a comment\n")


# What a user types


def test_names_that_a_user_types():
    for name in cmid.__all__:
        assert getattr(cmid, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'load_bakbone'"):
        _ = cmid.load_bakbone
    assert set(cmid.__all__) <= set(dir(cmid))


def test_import_cmid_loads_nothing():
    code = "import sys; before = {*sys.modules}; import cmid; print(sorted({*sys.modules} - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['cmid']"
