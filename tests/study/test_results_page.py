"The page of all results: every row, a plain table without its script, and safe with any text from a file."

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from cmid.base.files import load_yaml, write_json, write_whole
from cmid.study import results_page as page_module
from cmid.study.comparisons import accuracy_rows
from cmid.study.examples import as_seed, example_results
from cmid.study.results_page import all_results, embedded_json, results_page
from cmid.study.study_pages import study_page
from tests.study.conftest import STUDY

ROOT = Path(__file__).parents[2]
EVIL = '</script><img src=x onerror="alert(1)">'
VOID = {"meta", "img", "br", "wbr"}


class Page(HTMLParser):
    "Elements, cells of the table, and texts of scripts."

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.rows, self.scripts = [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts[-1] += data
        elif "td" in self.open:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A project with results of its own, a study of two seeds, and one that takes its backbones."
    folder = tmp_path_factory.mktemp("project")
    values = load_yaml(ROOT / "params.yaml")
    inits = ["cmid-resnet18", "random-resnet18"]
    values["study"] = STUDY | dict(backbones=["resnet18"], baselines=inits[1:], inits=inits, apply={}, detect=[])
    write_whole(folder / "params.yaml", yaml.safe_dump(values))
    example_results(folder)
    for name in ("two/seed-0", "two/seed-1", "lent"):
        shutil.copytree(folder / "results", folder / "studies" / name / "results")
    as_seed(folder / "studies/two/seed-1", 1)
    write_whole(folder / "studies/two/params.yaml", "seeds: [0, 1]\n")
    write_whole(folder / "studies/lent/params.yaml", "models: paid\n")
    shutil.copytree(folder / "results/pretrain", folder / "studies/paid/results/pretrain")
    write_whole(folder / "studies/paid/params.yaml", "stages: [pretrain]\n")
    record(folder / "studies/paid/results", images=400, parameters=dict(epochs=10), trained_s=90.0, device="GPU")
    for seed, seconds in ((0, 100.0), (1, 300.0)):
        facts = dict(images=1000, parameters=dict(epochs=20), trained_s=seconds, device="CPU")
        record(folder / f"studies/two/seed-{seed}/results", **facts)
    better = folder / "studies/two/seed-1/results/segment/land/cmid-resnet18/metrics.json"
    shutil.copy(better.parents[1] / "random-resnet18/metrics.json", better)
    return folder


def record_at(file, facts):
    write_json(file, json.loads(file.read_text()) | facts)


def record(results, **facts):
    record_at(results / "pretrain/cmid-resnet18/run.json", facts)


def only(project, tmp_path, study):
    "A copy of the project with one of its studies, and no results of its own: resampling takes seconds"
    shutil.copytree(project / "studies" / study, tmp_path / "only/studies" / study)
    shutil.copy(project / "params.yaml", tmp_path / "only")
    return tmp_path / "only"


@pytest.fixture(scope="module")
def results(project):
    "Studies and rows: resampling takes seconds."
    return all_results(project)


@pytest.fixture(scope="module")
def html(project):
    return results_page(project)


def found(results, **wanted):
    return [row for row in results[1] if all(row[key] == value for key, value in wanted.items())]


def test_every_study_and_every_score_is_there(results):
    studies, rows = results
    assert [study["name"] for study in studies] == ["default", "lent", "paid", "two"]
    assert not any(study["fault"] for study in studies)
    tasks = {row["task"] for row in rows if row["study"] == "default" and row["init"] == "cmid-resnet18"}
    beginnings = "linear probe", "kNN", "fine-tuned", "segmentation", "change, BIT", "change, diff", "purity", "correct"
    assert all(any(task.startswith(beginning) for task in tasks) for beginning in beginnings)
    assert {row["commit"] for row in rows} == {"0" * 8}
    assert {row["device"] for row in rows} == {"made up"}
    (two,) = [study for study in studies if study["name"] == "two"]
    assert two["command"].startswith("cmid_study studies/two")


def test_a_row_of_one_seed_has_its_own_interval(project, results):
    own = next(o for o in accuracy_rows(project, "probe") if o["init"] == "cmid-resnet18" and o["fraction"] == 1)
    (row,) = found(results, study="default", init="cmid-resnet18", task="linear probe, accuracy")
    assert (row["score"], row["low"], row["high"]) == (own["accuracy"], own["low"], own["high"])
    assert row["difference"] == pytest.approx(own["against"][0]["difference"])
    assert (row["images"], row["seeds"], row["reference"]) == ([500], [0], "random-resnet18")


def test_a_row_of_two_seeds_reaches_over_both(results):
    (row,) = found(results, study="two", init="cmid-resnet18", task="segmentation, mIoU")
    first, second = row["scores"]
    assert first > second
    assert row["score"] == pytest.approx((first + second) / 2)
    assert row["low"] < second and row["high"] > first
    assert row["seeds"] == [0, 1]


def test_costs_are_means_over_seeds_or_those_of_the_study_that_paid(results):
    (row,) = found(results, study="two", init="cmid-resnet18", task="kNN, accuracy")
    assert (row["seen"], row["seconds"], row["trained_on"]) == (20_000, 200.0, "CPU")
    (row,) = found(results, study="lent", init="cmid-resnet18", task="kNN, accuracy")
    assert (row["seen"], row["seconds"], row["trained_on"]) == (4_000, 90.0, "GPU")
    (row,) = found(results, study="two", init="random-resnet18", task="kNN, accuracy")
    assert (row["seen"], row["seconds"]) == (None, None)


def test_without_its_script_it_is_a_plain_table(results, html):
    _, rows = results
    page = Page(html)
    shown = [cells for cells in page.rows if cells]
    assert len(shown) == len(rows)
    for cells, row in zip(shown, rows):
        assert cells[0] == row["study"]
        assert cells[5] == f"{100 * row['score']:.1f}"
    ids = {attributes.get("id") for _, attributes in page.elements}
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert links and all(link.removeprefix("#") in ids for link in links)


def test_it_fetches_nothing_and_runs_its_own_script_alone(results, html):
    page = Page(html)
    assert not [a for tag, a in page.elements if tag in ("link", "iframe", "object", "img") or "src" in a]
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    data, script = page.scripts
    mark = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{mark}'"
    assert json.loads(data) == json.loads(json.dumps(results[1]))
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "http:", "https:"):
        assert unsafe not in script.replace("http://www.w3.org/2000/svg", "")


def test_text_from_files_stays_text(project, tmp_path):
    evil = shutil.copytree(project, tmp_path / "evil")
    file = evil / "results/probe/scenes/cmid-resnet18/run.json"
    write_json(file, json.loads(file.read_text()) | dict(device=EVIL, commit=EVIL))
    record(evil / "results", images=4, parameters=dict(epochs=1), device=EVIL)
    shutil.rmtree(evil / "studies/two")
    (evil / "studies/lent").rename(evil / "studies/<img src=x onerror=alert(2)>")
    page = Page(results_page(evil))
    assert len(page.scripts) == 2
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    assert [cells for cells in page.rows if any(EVIL in cell for cell in cells)]
    assert EVIL in {row["device"] for row in json.loads(page.scripts[0])}
    assert "<img src=x onerror=alert(2)>" in {row["study"] for row in json.loads(page.scripts[0])}


@pytest.mark.parametrize("text", [EVIL, "<!--<script>", "\u2028\u2029", "&lt;", '"\\', "{{ 7 * 7 }}"])
def test_embedded_json_holds_any_text(text):
    written = embedded_json({text: [text]})
    assert json.loads(written) == {text: [text]}
    assert not re.search("[<>&\u2028\u2029]", written)


def test_what_is_wrong_with_a_study_is_named_and_the_others_stand(project, tmp_path):
    broken = shutil.copytree(project, tmp_path / "broken")
    (broken / "studies/two/seed-1/results/segment/land/cmid-resnet18/metrics.json").write_text("{")
    write_whole(broken / "studies/lent/params.yaml", "models: nobody\n")
    html = results_page(broken)
    faults = re.findall(r'<p class="note">([^<]*)', html)
    assert ["nobody" in fault for fault in faults] == [True, False]
    assert "segment/land/cmid-resnet18/metrics.json: is not readable JSON" in faults[1]
    assert {cells[0] for cells in Page(html).rows if cells} == {"default"}


def test_studies_whose_seeds_are_wrong_or_none_leave_the_others(project, tmp_path):
    other = shutil.copytree(project, tmp_path / "other")
    write_whole(other / "studies/lent/params.yaml", "seeds: null\nmodels: paid\n")
    write_whole(other / "studies/two/params.yaml", "seeds: 2\n")
    write_whole(other / "studies/paid/params.yaml", "stages: [pretrain\n")
    studies, rows = all_results(other)
    faults = {study["name"]: study["fault"] for study in studies}
    assert "seeds: must be a list" in faults["two"]
    assert "studies/paid/params.yaml" in faults["paid"]
    assert faults["default"] == ""
    assert "default" in {row["study"] for row in rows}
    write_whole(other / "studies/none/params.yaml", "seeds: null\nnote: Not begun.\n")
    assert study_page(other, other / "studies/none").startswith("## none\n\nNot begun.")


def test_what_differs_between_seeds_is_shown(project, tmp_path):
    other = shutil.copytree(project, tmp_path / "seeds")
    for path in other.glob("studies/two/seed-1/results/**/run.json"):
        write_json(path, json.loads(path.read_text()) | dict(commit="f" * 40, changed=True, device="abacus"))
    (row,) = found(all_results(other), study="two", init="cmid-resnet18", task="kNN, accuracy")
    assert (row["commit"], row["changed"]) == ("00000000 / ffffffff", True)
    assert row["device"] == "made up / abacus"
    (two,) = [study for study in all_results(other)[0] if study["name"] == "two"]
    assert (two["commits"], two["changed"]) == (["00000000", "ffffffff"], True)
    (cells, *_) = [o for o in Page(results_page(other)).rows if o and o[0] == "two" and o[3] == "cmid"]
    assert "seeds 0, 1, 00000000 / ffffffff with changes" in cells[10]
    assert cells[10].endswith("made up / abacus")


def faults_of(results):
    "Study -> what is wrong with it, of those that have something"
    return {study["name"]: study["fault"] for study in results[0] if study["fault"]}


FAULTY_RECORDS = [
    ("probe/scenes", dict(commit=5), "commit: Input should be a valid string"),
    ("probe/scenes", dict(parameters=5), "parameters: Input should be a valid dictionary"),
    ("probe/scenes", dict(run=[]), "run: Input should be a valid dictionary"),
    ("pretrain", dict(parameters=5), "parameters: Input should be a valid dictionary"),
    ("pretrain", dict(parameters=dict(epochs="a")), "parameters.epochs: Input should be a valid integer"),
    ("pretrain", dict(images="a"), "images: Input should be a valid integer"),
    ("pretrain", dict(seconds="a"), "seconds: Input should be a valid number"),
]


AT_ALL = dict(accuracy=0.5, low=0.4, high=0.6, correct=250, train_images=100)
FAULTY_SCORES = [
    (
        "probe/scenes",
        dict(knn={"1.0": AT_ALL | dict(accuracy=None)}),
        "knn.1.0.accuracy: Input should be a valid number",
    ),
    ("probe/scenes", dict(linear={"1.0": AT_ALL | dict(low="a")}), "linear.1.0.low: Input should be a valid number"),
    ("probe/scenes", dict(linear={"x": AT_ALL}), "'x' is no share of the labels"),
    ("classify/scenes", dict(finetune=5), "finetune: Input should be a valid dictionary"),
    ("correspondence", dict(accuracy="a"), "accuracy: Input should be a valid number"),
    ("features/scenes", dict(high="a"), "high: Input should be a valid number"),
]


FAULTY = [("run.json", *o) for o in FAULTY_RECORDS] + [("metrics.json", *o) for o in FAULTY_SCORES]


@pytest.mark.parametrize("name, stage, content, said", FAULTY)
def test_a_file_of_another_form_is_named_with_its_key(project, tmp_path, name, stage, content, said):
    other = only(project, tmp_path, "two")
    file = f"studies/two/seed-1/results/{stage}/cmid-resnet18/{name}"
    record_at(other / file, content)
    (fault,) = faults_of(all_results(other)).values()
    assert fault.startswith(f"{file}: is damaged ({said}")


FAULTY_PARAMETERS = [
    ("models: 5", "models: must be the name of a study (got 5)"),
    ("datasets: 5", "datasets: must hold names, each with its keys (got 5)"),
    ("datasets: {aid: 5}", "datasets.aid: must hold keys and values (got 5)"),
    ("weight_files: 5", "weight_files: must hold names, each with its keys (got 5)"),
]


@pytest.mark.parametrize("text, said", FAULTY_PARAMETERS)
def test_parameters_of_another_form_are_named_with_their_key(project, tmp_path, text, said):
    other = only(project, tmp_path, "lent")
    write_whole(other / "studies/lent/params.yaml", text)
    assert faults_of(all_results(other)) == {"lent": f"studies/lent/params.yaml: {said}"}


def test_damage_of_any_kind_costs_its_study_and_no_other(project, tmp_path):
    other = shutil.copytree(project, tmp_path / "damaged")
    record_at(other / "studies/two/seed-1/results/probe/scenes/cmid-resnet18/run.json", dict(parameters=5))
    (other / "studies/lent/results/probe/loop").symlink_to("loop")
    (other / "studies/paid/results/nowhere").symlink_to("nobody")
    html = results_page(other)
    notes = [line for line in html.splitlines() if line.startswith('<p class="note">')]
    assert "studies/lent/results/probe/loop: cannot be read; remove it" in notes[0]
    assert "studies/paid/results/nowhere: cannot be read; remove it" in notes[1]
    assert "studies/two/seed-1/results/probe/scenes/cmid-resnet18/run.json: is damaged (parameters" in notes[2]
    assert {cells[0] for cells in Page(html).rows if cells} == {"default"}


@pytest.mark.parametrize("error", [AttributeError, TypeError, ValueError, KeyError, OSError])
def test_what_no_schema_foresees_names_the_study_and_what_python_said(project, tmp_path, monkeypatch, error):
    other = only(project, tmp_path, "lent")
    shutil.copytree(project / "results/probe", other / "results/probe")

    def failing(runs, own, root):
        if own:
            raise error("as\nthey say")
        return []

    monkeypatch.setattr(page_module, "run_rows", failing)
    (fault,) = faults_of(all_results(other)).values()
    assert fault.startswith(f"the files of the study lent are damaged ({error.__name__}: ")
    assert "they say" in fault and "\n" not in fault


def test_notes_of_a_comparison_are_to_be_read(project, tmp_path):
    other = only(project, tmp_path, "two")
    values = load_yaml(other / "params.yaml")
    inits = ["cmid-resnet18", "byol-resnet18", "random-resnet18"]
    values["study"] |= dict(methods=["cmid", "byol"], inits=inits)
    write_whole(other / "params.yaml", yaml.safe_dump(values))
    example_results(other)
    for init, epochs in (("cmid", 10), ("byol", 30)):
        facts = dict(images=100, parameters=dict(epochs=epochs))
        record_at(other / f"results/pretrain/{init}-resnet18/run.json", facts)
    for seed in (0, 1):
        shutil.rmtree(other / f"studies/two/seed-{seed}")
    shutil.move(other / "results", other / "studies/two/results")
    write_whole(other / "studies/two/params.yaml", "reference: cmid-resnet18\n")
    rows = [cells for cells in Page(results_page(other)).rows if cells and cells[3].startswith("byol")]
    assert rows
    for cells in rows:
        assert "one seed" in cells[7]
        assert "unequal cost: 3,000 images seen in pretraining against 1,000" in cells[7]


def test_a_comparison_that_cannot_be_made_says_why(project, tmp_path):
    other = only(project, tmp_path, "two")
    for seed in (0, 1):
        file = other / f"studies/two/seed-{seed}/results/probe/scenes/random-resnet18/run.json"
        record_at(file, dict(data="other images"))
    results = all_results(other)
    (row,) = found(results, init="cmid-resnet18", task="kNN, accuracy")
    assert (row["difference"], row["says"]) == (None, "not comparable")
    (cells,) = [o for o in Page(results_page(other)).rows if o and o[2].startswith("kNN, acc") and o[3] == "cmid"]
    assert "not comparable" in cells[7]
    assert row["notes"] and all(note in cells[7] for note in row["notes"])


@pytest.mark.parametrize(
    "images, shown", [((1000, 1000), "20,000"), ((1000, 400), "8,000 to 20,000"), ((1000, None), "20,000, unknown for")]
)
def test_costs_that_differ_between_seeds_are_shown_as_a_range(project, tmp_path, images, shown):
    other = only(project, tmp_path, "two")
    for seed, n in enumerate(images):
        record(other / f"studies/two/seed-{seed}/results", images=n)
    cells = [o for o in Page(results_page(other)).rows if o and o[3] == "cmid"]
    assert cells and all(o[8].startswith(shown) for o in cells)


def test_the_opening_says_which_accuracies_are_left_out(project, html):
    opening = html[html.index('<p class="quiet">') : html.index("</header>")]
    assert "every score" not in opening.lower()
    assert "Left out are kNN and fine-tuning with part of the labels" in opening
    fractions = {(o["probe"], o["fraction"]) for o in accuracy_rows(project, "probe")}
    assert {("linear", 0.1), ("knn", 0.01), ("knn", 0.1)} <= fractions
    shown = {cells[2] for cells in Page(html).rows if cells}
    assert not [task for task in shown if "10 %" in task or task.startswith("kNN, 1")]


def test_a_study_that_borrows_from_a_grid_has_the_cost_of_its_seeds(project, tmp_path):
    grid = shutil.copytree(project, tmp_path / "grid")
    write_whole(grid / "studies/lent/params.yaml", "models: two\n")
    rows = found(all_results(grid), study="lent", init="cmid-resnet18", task="kNN, accuracy")
    assert [(row["seen"], row["seconds"], row["trained_on"]) for row in rows] == [(20_000, 100.0, "CPU")]
    shutil.copytree(grid / "studies/lent/results", grid / "studies/lent/seed-1/results")
    as_seed(grid / "studies/lent/seed-1", 1)
    write_whole(grid / "studies/lent/params.yaml", "models: two\nseeds: [1]\n")
    rows = found(all_results(grid), study="lent", init="cmid-resnet18", task="kNN, accuracy")
    assert [(row["seen"], row["seconds"]) for row in rows] == [(20_000, 300.0)]


@pytest.mark.parametrize("number", ["NaN", "-Infinity"])
def test_a_score_that_is_no_number_is_named(project, tmp_path, number):
    broken = shutil.copytree(project, tmp_path / "broken")
    file = "studies/paid/results/pretrain/cmid-resnet18/run.json"
    text = (broken / file).read_text()
    (broken / file).write_text(text.replace("90.0", number))
    studies, _ = all_results(broken)
    (fault,) = [study["fault"] for study in studies if study["name"] == "lent"]
    assert "pretrain/cmid-resnet18/run.json: is not readable JSON" in fault


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
@pytest.mark.parametrize(
    "filter, choice, shown", [(4, "none", "0110"), (4, "resnet18", "1000"), (4, "all", "1111"), (1, "none", "0011")]
)
def test_a_filter_shows_what_it_names(filter, choice, shown):
    one = dict(study="a", dataset="b", task="c", method="d", init="e", score=0.5, low=None, high=None, seen=None)
    rows = [
        one | dict(dataset=dataset, backbone=backbone)
        for dataset, backbone in (("b", "resnet18"), ("b", ""), (None, ""), (None, "none too"))
    ]
    script = (ROOT / "cmid/study/templates/results_page.js").read_text()
    given = json.dumps(dict(rows=rows, script=script, filter=filter, choice=choice))
    page = Path(__file__).with_name("page.js")
    done = subprocess.run(["node", page], input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "".join(str(int(o)) for o in json.loads(done.stdout)) == shown


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_the_script_parses():
    script = ROOT / "cmid/study/templates/results_page.js"
    assert subprocess.run(["node", "--check", script], capture_output=True).returncode == 0
