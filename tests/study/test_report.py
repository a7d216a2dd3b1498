"The report: whole, honest about what is missing, the same numbers as the results, and safe with any text."

import io
import json
import re
import shutil
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmid.base.errors import CmidError
from cmid.base.files import write_json
from cmid.base.paired import answer_interval
from cmid.base.scores import unpack_answers
from cmid.settings.study import FLOORS
from cmid.study.comparisons import beside_heads, probe_rows, task_rows
from cmid.study.examples import example_accuracy
from cmid.study.report import report_page
from cmid.study.report_claims import headlines
from cmid.study.report_decision import first_screen
from cmid.study.report_html import saved_figure
from cmid.study.report_runs import label_section
from cmid.study.report_words import FLOOR_NAMES, accuracy_sentence, summary
from cmid.study.results import TASK_SCORES, runs

ROOT = Path(__file__).parents[2]
VOID = {"meta", "img", "br", "source", "wbr"}
INITS = ["cmid-resnet18", "random-resnet18", "imagenet-resnet18", "cmid-resnet50"]
COLUMNS = ["cmid-resnet18", "cmid-resnet50", "random-resnet18", "imagenet-resnet18"]
LINKS = "src", "srcset", "href", "action", "data", "poster"


class Page(HTMLParser):
    "Elements, text, and whether every tag is closed in order."

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.open, self.crossed = [], "", [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.crossed.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def links(self):
        return [o[k] for _, o in self.elements for k in LINKS if k in o]

    def handlers(self):
        "Attributes that would run a script"
        return [k for _, o in self.elements for k in o if k.startswith("on")]


def parsed(html):
    page = Page(html)
    assert not page.crossed, page.crossed
    assert not page.open, page.open
    return page


def page_of(study):
    return parsed(report_page(study))


def text_of(study):
    return " ".join(page_of(study).text.split())


@pytest.fixture(scope="module")
def whole(made):
    "The page with all its figures."
    return report_page(made)


# The page as a file


def test_one_file_that_fetches_nothing(whole):
    page = parsed(whole)
    embedded = "data:image/png;base64,", "data:image/jpeg;base64,", "#"
    maps = {o["href"] for o in page.all("a") if o["href"].startswith("../maps/")}  # files beside the page
    assert page.links()
    assert all(o.startswith(embedded) or o in maps for o in page.links())
    assert not page.all("script")
    assert not page.all("link")
    assert not page.handlers()
    style = (ROOT / "cmid/study/templates/report.css").read_text()
    assert "url(" not in style
    assert "@import" not in style


def test_a_page_for_people(whole):
    page = parsed(whole)
    assert whole.startswith("<!doctype html>")
    assert "Missing" not in page.text
    assert "cannot be" not in page.text
    assert page.all("img")
    assert all(o.get("alt", "").strip() for o in page.all("img"))
    ids = {o.get("id") for _, o in page.elements}
    assert {o[1:] for o in page.links() if o.startswith("#")} <= ids
    assert len(page.all("h1")) == 1
    assert page.all("html")[0]["lang"]
    assert page.all("main")


def test_drawn_figures_have_a_dark_form(whole):
    sources = parsed(whole).all("source")
    assert len(sources) > 2
    assert all(o["media"] == "(prefers-color-scheme: dark)" for o in sources)


def test_the_style_sheet_is_in_the_page(whole):
    style = (ROOT / "cmid/study/templates/report.css").read_text()
    assert style.strip() in whole


def test_it_repeats(made, whole):
    assert report_page(made) == whole


# Numbers


def rivals(init):
    return INITS[1:3] if init == "cmid-resnet18" else []


def read(study, stage, init, name="metrics"):
    return json.loads((study / "results" / stage / init / f"{name}.json").read_text())


def accuracy_numbers(study, stage, kind, fraction):
    "Numbers of one table of accuracies, row by row"
    numbers = []
    for init in [*INITS, *(FLOORS["probe"] if stage == "probe" else ())]:
        mine = read(study, f"{stage}/scenes", init)[kind][fraction]
        numbers += [mine["accuracy"], mine["low"], mine["high"]]
        for baseline in rivals(init):
            answers = [read(study, f"{stage}/scenes", o, "answers")[kind][fraction] for o in (init, baseline)]
            numbers += answer_interval(*([unpack_answers(text, 500)] for text in answers))
    return numbers


def task_numbers(study, stage):
    "Numbers of a task's tables, a table a head; that they are right is shown by the notebook"
    numbers = []
    for row in sorted(beside_heads(task_rows(study, stage)), key=lambda o: o["head"] or ""):
        metrics = read(study, f"{stage}/{row['dataset']}", row["init"])
        head = "unet" if row["init"] == "unet" else row["head"]
        score = metrics["heads"][head]["f1"] if row["head"] else metrics[TASK_SCORES[stage]]
        assert row["score"] == pytest.approx(score)
        numbers += [row["score"], row["low"], row["high"]]
        for other in row["against"]:
            numbers += [other["difference"], other["low"], other["high"]]
    return numbers


def purity_numbers(study):
    numbers = []
    for init in INITS:
        metrics = read(study, "features/scenes", init)
        numbers += [metrics["purity"], metrics["low"], metrics["high"]]
        purity = np.array(read(study, "features/scenes", init, "embedding")["purity"])
        for baseline in rivals(init):
            change = purity - read(study, "features/scenes", baseline, "embedding")["purity"]
            half = 1.980099876 * change.std(ddof=1) / 120**0.5  # Student's t of 119
            numbers += [change.mean(), change.mean() - half, change.mean() + half]
    return numbers


def match_numbers(study):
    numbers = []
    for init in INITS:
        metrics = read(study, "correspondence", init)
        numbers += [metrics["accuracy"], metrics["low"], metrics["high"]]
        for baseline in rivals(init):  # both intervals are .05 to either side
            change = metrics["accuracy"] - read(study, "correspondence", baseline)["accuracy"]
            numbers += [change, change - 0.005**0.5, change + 0.005**0.5]
    return numbers


def first_numbers(study):
    "Scores of the first table, line by line; that they are the files' is shown by the check of the claims."
    numbers = []
    for line in first_screen(study).lines:
        numbers += [line["cells"][init]["score"] for init in sorted(line["cells"], key=COLUMNS.index)]
        numbers += [line["floor"]["score"]] if line["floor"] else []
    return numbers


def test_numbers_are_those_of_the_results(made, plain):
    due = first_numbers(made)
    for kind in ("linear", "knn"):
        for fraction in ("0.01", "0.1", "1.0"):
            due += accuracy_numbers(made, "probe", kind, fraction)
    due += accuracy_numbers(made, "classify", "finetune", "1.0")
    for stage in TASK_SCORES:
        due += task_numbers(made, stage)
    due += purity_numbers(made) + match_numbers(made)
    shown = [float(o["value"]) for o in page_of(made).all("data")]
    assert len(shown) == len(due)
    assert np.allclose(shown, due, rtol=0, atol=1e-9)


def test_what_has_no_backbone_is_a_row_and_no_reference(made, plain):
    html = report_page(made).replace("<wbr>", "")
    rows = re.findall(r'<th scope="row">([^<]*)</th>.*?</tr>', html, flags=re.S)
    shown = {name: rows.count(name) for name in FLOOR_NAMES.values()}
    assert shown == {
        "image statistics, no network": 2 * 3,  # of each probe and share of the labels
        "random convolutions": 2 * 3,
        "U-Net from scratch": 1 + 2,  # of segmentation, and beside both heads of change detection
    }
    assert html.count(">no backbone<") == sum(shown.values())
    for text in (*headlines(made), json.dumps(summary(made))):
        assert not re.search("minus (imagestats|randomconv|unet)|for (imagestats|randomconv|unet)", text)
    assert set(summary(made)["probe"]["scenes"]) == {*INITS, *FLOORS["probe"]}
    floors = {name for names in FLOORS.values() for name in names}
    assert {stage for stage, found in runs(made).items() if floors & {run[-1] for run in found}} == {*FLOORS}


def test_alternative_texts_have_the_numbers(made, plain):
    alts = [o["alt"].replace("\u202f", " ") for o in page_of(made).all("img")]
    for due in (
        "Confusion of cmid-resnet18 on scenes: 390 of 500 test images are right; most often wrong: ",
        "t-SNE maps of scenes, an image a point, coloured by class, for cmid-resnet18 (purity 70 %), ",
        "Images of scenes, each with its nearest neighbours by cmid-resnet18: 21 of 30 neighbours",
        "over 64 images 52.0 % are correct, chance 22.0 %",
        "60 % of it lies on 48 % of the area, where an even map would need 62 %",
    ):
        assert any(due in o for o in alts), due


# Words


def test_words_say_no_more_than_the_numbers(made):
    said = {}
    for row in probe_rows(made):
        for other in row["against"] if row["fraction"] == 1 else []:
            said[row["probe"], other["baseline"]] = accuracy_sentence(row, other)
    assert said["linear", "random-resnet18"].endswith("is not explained by chance.")
    few = said["linear", "imagenet-resnet18"]  # 3 points on 500 images
    assert few.endswith("may be chance: the interval includes 0.")


def test_a_baseline_may_be_better(study, plain, change):
    worse = {"1.0": example_accuracy(0.2, 500, train_images=2000)}
    change("probe/scenes/cmid-resnet18/metrics.json", linear=worse)
    (study / "results/probe/scenes/cmid-resnet18/answers.json").unlink()
    said = headlines(study)
    (sentence,) = [o for o in said if "linear" in o and "random" in o]
    assert "20.0" in sentence
    assert "\u221221.0 points" in sentence
    assert sentence.endswith("the baseline is better.")
    text = page_of(study).text
    assert all(o in text for o in said)
    assert not [o for o in said if o.startswith("Warning")]


def test_an_architecture_without_baseline_is_compared_with_none(made, plain):
    assert not [o for o in probe_rows(made) if o["init"] == "cmid-resnet50" and o["against"]]
    assert "nothing to compare with" in page_of(made).text


def test_warnings_are_said_first_and_in_their_place(study, plain, change):
    "The numbers of a run that warned are below what it could have reached."
    warnings = [
        "the local branch idles: its loss <b>6.1</b> is within 2 %",
        "the reconstruction is no better than a flat colour",
    ]
    change("pretrain/cmid-resnet18/metrics.json", warnings=warnings)
    said = headlines(study)
    assert said[:2] == [f"Warning, pretraining of cmid-resnet18: {o}." for o in warnings]
    assert not said[2].startswith("Warning")
    page = page_of(study)
    assert page.text.count(warnings[0] + ".") == 2
    assert len([o for _, o in page.elements if o.get("class") == "alarm"]) == 4
    assert summary(study)["warnings"] == 2


def test_no_classes_no_purity(study, plain, change):
    for init in INITS:
        nothing = dict.fromkeys(("purity", "low", "high", "chance", "purity_2d"))
        change(f"features/scenes/{init}/metrics.json", **nothing, per_class={}, classes=0)
        change(f"features/scenes/{init}/embedding.json", label=None, purity=None, chance=None, classes=[])
    assert "The images have no classes" in page_of(study).text
    assert not [o for o in headlines(study) if "feature space" in o]
    assert summary(study)["features"] == {}


# What is missing or damaged


MISSING = (
    "probe/scenes/random-resnet18",
    "classify/scenes/cmid-resnet18",
    "features/scenes/cmid-resnet50",
    "correspondence/random-resnet18",
    "attention/cmid-resnet50",
    "pretrain/cmid-resnet50",
    "baselines/imagenet-resnet18",
    "prepare/pool",
    "reconstruct/cmid-resnet18",
)


def test_missing_stages_are_named(study, plain):
    assert summary(study)["missing"] == 0
    for run in MISSING:
        shutil.rmtree(study / "results" / run)
    text = text_of(study)
    for run in MISSING:
        assert f"Missing, its stage has not run: {run.replace('/', ' ')}." in text
    assert text.count("Missing") == len(MISSING) == summary(study)["missing"]


def test_nothing_has_run(study, plain):
    shutil.rmtree(study / "results")
    text = text_of(study)
    assert "There is nothing to compare yet." in text
    due = [f"{stage} {' '.join(o)}" for stage, identities in runs(study).items() for o in identities]
    assert all(o in text for o in due)
    empty = dict(probe={}, classify={}, features={}, correspondence={}, reconstruct={})
    assert summary(study) == dict(missing=len(due), warnings=0) | empty


def test_parts_of_a_run_may_be_missing(study, plain, change):
    for file in (
        "pretrain/cmid-resnet18/curve.json",
        "pretrain/cmid-resnet18/epochs.json",
        "reconstruct/cmid-resnet18/figure.png",
        "probe/scenes/cmid-resnet18/run.json",
        "prepare/pool/images.png",
        "classify/scenes/cmid-resnet18/confusion.png",
        "features/scenes/cmid-resnet50/neighbours.png",
        "attention/cmid-resnet18/figure.png",
        "correspondence/cmid-resnet18/figure.png",
    ):
        (study / "results" / file).unlink()
    change("reconstruct/cmid-resnet18/metrics.json", skill=None)
    text = page_of(study).text
    assert "Its curves are missing." in text
    assert "they are flat" in text
    assert "unknown" in text


def test_damaged_results_do_not_take_the_rest_along(study, plain):
    file = study / "results/probe/scenes/cmid-resnet18/metrics.json"
    file.write_text('{"linear": ')
    text = page_of(study).text
    assert "scenes/cmid-resnet18/metrics.json: is not readable JSON" in text
    assert f"/{study.name}" not in text
    assert "is not explained" not in text
    assert "1,000 steps" in text
    with pytest.raises(CmidError, match="run its stage again"):
        summary(study)
    write_json(file, {"linear": {"1.0": {}}, "knn": {}, "chance": 0.1, "test_images": 5})
    assert "has no linear.1.0.accuracy" in page_of(study).text


def test_leftovers_of_another_study_are_named(study, plain):
    shutil.copytree(study / "results/probe/scenes/cmid-resnet18", study / "results/probe/scenes/byol-resnet18")
    assert "no longer has them: results/probe/scenes/byol-resnet18." in page_of(study).text


def test_a_number_that_is_not_there_is_named(study, plain):
    lost = {
        "classify/scenes": "confusion",
        "features/scenes": "per_class",
        "correspondence": "error_px",
        "attention": "mass_area",
        "segment/land": "images",
    }
    for stage, key in lost.items():
        file = study / "results" / stage / "cmid-resnet18/metrics.json"
        metrics = json.loads(file.read_text())
        del metrics[key]
        write_json(file, metrics)
    text = text_of(study)
    for stage, key in lost.items():
        assert f"{stage}/cmid-resnet18/metrics.json: has no {key}" in text
    assert "1,000 steps" in text


@pytest.mark.parametrize(
    "stage, key",
    [("classify/scenes", "finetune"), ("features/scenes", "purity"), ("correspondence", "accuracy")],
)
def test_a_score_that_is_not_there_is_named(study, stage, key):
    file = study / "results" / stage / "cmid-resnet18/metrics.json"
    metrics = json.loads(file.read_text())
    del metrics[key]
    write_json(file, metrics)
    for reads in (headlines, summary):
        with pytest.raises(CmidError, match=f"{stage}/cmid-resnet18/metrics.json: has no {key}"):
            reads(study)


def test_damage_in_form_is_named(study, plain, change):
    change("segment/land/cmid-resnet18/metrics.json", per_image=[[1, 2]])
    text = page_of(study).text
    assert text.count("land/cmid-resnet18/metrics.json: is damaged") == 2  # in short, and in its section
    assert "1,000 steps" in text
    assert "Frozen features" in text
    for reads in (headlines, summary):
        with pytest.raises(CmidError, match="land/cmid-resnet18/metrics.json: is damaged"):
            reads(study)


def test_damaged_labels_are_named(study, plain):
    file = study / "results/labels/land/metrics.json"
    metrics = json.loads(file.read_text())
    damages = dict(images=3, findings=["a"], sizes=[], bands=None)
    said = dict(images="images", findings="findings.0", sizes="sizes", bands="bands")
    for key, value in damages.items():
        write_json(file, metrics | {key: value})
        with pytest.raises(CmidError, match=rf"land/metrics.json: is damaged \(.*{re.escape(said[key])}"):
            label_section(study)
    text = page_of(study).text
    assert text.count("land/metrics.json: is damaged") == 1
    assert "is not explained" in text


# Text and pictures


def test_text_from_results_stays_text(study, plain, change):
    evil = '<script>alert(1)</script><img src=http://x.invalid/a.png onerror="alert(2)">{{ 7 * 7 }}'
    run = "probe/scenes/cmid-resnet18/run.json"
    change(run, device=evil, commit=evil, data=evil, versions={evil: evil}, parameters={evil: [evil]})
    change("prepare/pool/metrics.json", findings=[evil], images=evil)
    change("probe/scenes/cmid-resnet18/metrics.json", classes=evil)
    shutil.copytree((study / "results" / run).parent, study / "results/probe/scenes/<b onclick=x>")
    page = page_of(study)
    assert not page.all("script")
    assert not page.all("b onclick")
    assert all(o["src"].startswith("data:") for o in page.all("img"))
    assert not page.handlers()
    assert "49" not in page.text.split()
    assert page.text.count(evil) >= 6
    assert "<b onclick=x>" in page.text


def embedded(html):
    "Kind and content of an embedded picture"
    kind, content = re.search(r'src="data:image/(\w+);base64,([^"]+)"', html).groups()
    return kind, b64decode(content)


def photograph_file(folder):
    "Smooth light and dark, with a little noise"
    noise = np.random.default_rng(0).normal(0, 4, (300, 400, 3))
    light = 128 + 100 * np.sin(np.arange(400) / 60)[None, :, None]
    Image.fromarray((light + noise).clip(0, 255).astype(np.uint8)).save(folder / "photograph.png")
    return folder / "photograph.png"


def test_photographs_become_jpeg(tmp_path):
    photograph = photograph_file(tmp_path)
    kind, content = embedded(saved_figure(photograph, "x"))
    assert kind == "jpeg"
    assert len(content) < photograph.stat().st_size
    assert Image.open(io.BytesIO(content)).size == (400, 300)


def test_other_pictures_stay_png(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)
    for name, image in dict(noise=Image.fromarray(noise), flat=Image.new("RGB", (400, 300), "#0072b2")).items():
        path = tmp_path / f"{name}.png"
        image.save(path)
        assert embedded(saved_figure(path, "x")) == ("png", path.read_bytes())


# Maps


def test_maps_show_what_was_found_and_who_drew_it(study, plain):
    page = page_of(study)
    text = " ".join(page.text.split())
    assert "Drawn by detect-objects-cmid-resnet18, whose mIoU is 70.0 % on 8 other images" in text
    assert "north/landscape is its only scene; 2.0 % of the pixels have no value." in text
    shown = {o["alt"] for o in page.all("img")}
    assert "Map object-map beside its scene: class 0 1,200, class 1 7." in shown


def test_a_map_of_many_scenes_says_which_is_shown(study, plain, change):
    change("apply/land-map/metrics.json", scenes=1200)
    change("apply/land-map/run.json", files=[f"{i}.tif" for i in range(30)], score=None, notes=["a.tif: is dark"])
    text = text_of(study)
    assert "Drawn by segment-land-cmid-resnet18. Shown is north/landscape, one of 1,200 scenes" in text
    assert "and 18 more" in text
    assert "a.tif: is dark" in text


def test_names_of_files_stay_text(study, plain, change):
    change("apply/land-map/run.json", files=['<b>&".tif'])
    page = page_of(study)
    assert "../maps/land-map/%3Cb%3E%26%22.tif" in page.links()
    assert not page.all("b.tif")


@pytest.mark.parametrize(
    "keys, fault",
    [
        (dict(classes={"a": 0.5, "b": 0.6}), "classes has shares that do not add up to 1"),
        (dict(classes={"a": -1.0, "b": 2.0}), "classes has a negative number"),
        (dict(invalid=2.0), "invalid: Input should be less than or equal to 1"),
        (dict(counted="pixels"), "counted: Input should be 'shares', 'objects' or 'images'"),
    ],
)
def test_a_damaged_map_is_named(study, plain, change, keys, fault):
    change("apply/land-map/metrics.json", **keys)
    assert f"results/apply/land-map/metrics.json: is damaged ({fault}); run its stage again" in text_of(study)
