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
import yaml
from PIL import Image

from cmid.base.errors import CmidError
from cmid.base.files import load_yaml, write_json, write_whole
from cmid.base.scores import difference, wilson
from cmid.study import report, results

ROOT = Path(__file__).parents[2]
VOID = {"meta", "img", "br", "source", "wbr"}
INITS = ["cmid-resnet18", "random-resnet18", "imagenet-resnet18", "cmid-resnet50"]


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
        return [a for t, a in self.elements if t == tag]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Made-up results of a study; each test has a copy."
    at = tmp_path_factory.mktemp("made")
    values = load_yaml(ROOT / "params.yaml")
    values["profile"], values["profiles"] = "sample", {"sample": values["profiles"]["sample"]}
    values["study"] = dict(
        backbones=["resnet18", "resnet50"],
        methods=["cmid"],
        baselines=["random-resnet18", "imagenet-resnet18"],
        inits=INITS,
        probes=["scenes"],
        segment=["land"],
        change=["dates"],
        detect=["objects"],
    )
    write_whole(at / "params.yaml", yaml.safe_dump(values, sort_keys=False))
    results.example_results(at)
    return at


@pytest.fixture(scope="module")
def whole(made):
    "The page with all its figures."
    return report.html(made)


@pytest.fixture
def study(made, tmp_path):
    return shutil.copytree(made, tmp_path / "study")


@pytest.fixture
def plain(monkeypatch):
    "Figures are made but not rendered, which is most of a report's time."
    monkeypatch.setattr(report, "_png", lambda draw, colour: draw() and "data:image/png;base64,")
    monkeypatch.setattr(report, "_light", lambda path: "data:image/png;base64,")


def page(study):
    return checked(report.html(study))


def checked(html):
    p = Page(html)
    assert not p.crossed and not p.open, (p.crossed, p.open)
    return p


def change(path, **more):
    write_json(path, json.loads(path.read_text()) | more)


def test_one_file_that_fetches_nothing(whole):
    p = checked(whole)
    assert "Missing" not in p.text and "cannot be" not in p.text
    assert p.all("img") and all(a.get("alt", "").strip() for a in p.all("img"))
    links = [
        v for _, a in p.elements for k, v in a.items() if k in ("src", "srcset", "href", "action", "data", "poster")
    ]
    assert links and all(o.startswith(("data:image/png;base64,", "data:image/jpeg;base64,", "#")) for o in links)
    assert {o[1:] for o in links if o.startswith("#")} <= {a.get("id") for _, a in p.elements}
    assert not p.all("script") and not p.all("link") and "url(" not in report.STYLE and "@import" not in report.STYLE
    assert not [k for _, a in p.elements for k in a if k.startswith("on")]
    assert len([t for t, _ in p.elements if t == "h1"]) == 1 and p.all("html")[0]["lang"] and p.all("main")
    assert len(p.all("source")) > 2 and all(a["media"] == "(prefers-color-scheme: dark)" for a in p.all("source"))


def test_numbers_are_those_of_the_results(study, plain):
    shown = [float(a["value"]) for a in page(study).all("data")]
    read = lambda stage, init, name="metrics": json.loads(
        (study / "results" / stage / init / f"{name}.json").read_text()
    )
    rivals = lambda init: INITS[1:3] if init == "cmid-resnet18" else []
    due = []
    for stage, kind, f in [("probe", k, f) for k in ("linear", "knn") for f in ("0.01", "0.1", "1.0")] + [
        ("classify", "finetune", "1.0")
    ]:
        for i in INITS:
            m = read(f"{stage}/scenes", i)[kind][f]
            due += [m["accuracy"], m["low"], m["high"]]
            for b in rivals(i):
                o = read(f"{stage}/scenes", b)[kind][f]
                due += [m["accuracy"] - o["accuracy"], *difference(m["correct"], 500, o["correct"], 500)]
    for stage in results.TASKS:  # the arithmetic is that of the notebook; here, that the page shows it
        for o in sorted(results.task_rows(study, stage), key=lambda o: o["head"] or ""):  # a table a head
            due += [o["score"], o["low"], o["high"]] + [
                a[k] for a in o["against"] for k in ("difference", "low", "high")
            ]
            m = read(f"{stage}/{o['dataset']}", o["init"])
            assert o["score"] == pytest.approx(m["heads"][o["head"]]["f1"] if o["head"] else m[results.TASKS[stage]])
    for i in INITS:
        m, p = read("features/scenes", i), np.array(read("features/scenes", i, "embedding")["purity"])
        due += [m["purity"], m["low"], m["high"]]
        for b in rivals(i):
            d = p - read("features/scenes", b, "embedding")["purity"]
            half = 1.959963984540054 * d.std(ddof=1) / 120**0.5
            due += [d.mean(), d.mean() - half, d.mean() + half]
    for i in INITS:
        m = read("correspondence", i)
        due += [m["accuracy"], m["low"], m["high"]]
        for b in rivals(i):  # both intervals are .05 to either side
            d = m["accuracy"] - read("correspondence", b)["accuracy"]
            due += [d, d - 0.005**0.5, d + 0.005**0.5]
    assert np.allclose(shown, due, rtol=0, atol=1e-9) and len(shown) == len(due)


def test_intervals_by_hand(study):
    # 306 of 500: z = 1.96, p = .612: centre (p + z^2/2n) / (1 + z^2/n) = .611146, half width .042566
    row = next(
        o
        for o in results.probe_rows(study)
        if (o["init"], o["probe"], o["fraction"]) == ("cmid-resnet18", "linear", 1.0)
    )
    assert row["correct"] == 306 and (row["low"], row["high"]) == wilson(306, 500)
    assert (
        abs((row["low"] + row["high"]) / 2 - 0.611146) < 1e-5 and abs((row["high"] - row["low"]) / 2 - 0.042566) < 1e-5
    )
    against = {o["baseline"]: o for o in row["against"]}
    assert list(against) == ["random-resnet18", "imagenet-resnet18"]
    o = against["random-resnet18"]
    (l1, u1), (l2, u2) = wilson(306, 500), wilson(205, 500)
    assert (
        abs(o["low"] - (0.202 - ((0.612 - l1) ** 2 + (u2 - 0.41) ** 2) ** 0.5)) < 1e-12
        and abs(o["high"] - (0.202 + ((u1 - 0.612) ** 2 + (0.41 - l2) ** 2) ** 0.5)) < 1e-12
    )


def test_words_say_no_more_than_the_numbers(study, plain):
    said = {
        (o["probe"], a["baseline"]): report.sentence(o, a)
        for o in results.probe_rows(study)
        if o["fraction"] == 1
        for a in o["against"]
    }
    assert said["linear", "random-resnet18"].endswith("is not explained by chance.")
    assert said["linear", "imagenet-resnet18"].endswith(
        "may be chance: the interval includes 0."
    )  # 3 points on 500 images
    change(
        study / "results/probe/scenes/cmid-resnet18/metrics.json",
        linear={"1.0": results._accuracy(0.2, 500, train_images=2000)},
    )
    worse = [o for o in report.headlines(study) if "linear" in o and "random" in o]
    assert not [o for o in report.headlines(study) if o.startswith("Warning")]
    assert (
        len(worse) == 1
        and "20.0" in worse[0]
        and "\u221221.0 points" in worse[0]
        and worse[0].endswith("the baseline is better.")
    )
    text = page(study).text
    assert all(o in text for o in report.headlines(study))


def test_an_architecture_without_baseline_is_compared_with_none(study, plain):
    assert not [o for o in results.probe_rows(study) if o["init"] == "cmid-resnet50" and o["against"]]
    assert "nothing to compare with" in page(study).text


def test_missing_stages_are_named(study, plain):
    gone = (
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
    assert report.summary(study)["missing"] == 0
    for o in gone:
        shutil.rmtree(study / "results" / o)
    text = page(study).text
    assert (
        all(f"Missing, its stage has not run: {o.replace('/', ' ')}." in text for o in gone)
        and text.count("Missing") == len(gone) == report.summary(study)["missing"]
    )
    shutil.rmtree(study / "results")
    text = page(study).text
    assert "There is nothing to compare yet." in text and all(
        f"{stage} {' '.join(o)}" in text for stage, due in results.cells(study).items() for o in due
    )
    assert report.summary(study) == dict(
        missing=sum(len(o) for o in results.cells(study).values()),
        warnings=0,
        probe={},
        classify={},
        features={},
        correspondence={},
        reconstruct={},
    )


def test_parts_of_a_run_may_be_missing(study, plain):
    for o in (
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
        (study / "results" / o).unlink()
    change(study / "results/reconstruct/cmid-resnet18/metrics.json", skill=None)
    text = page(study).text
    assert "Its curves are missing." in text and "they are flat" in text and "unknown" in text


def test_damaged_results_do_not_take_the_rest_along(study, plain):
    (study / "results/probe/scenes/cmid-resnet18/metrics.json").write_text('{"linear": ')
    text = page(study).text
    assert (
        "scenes/cmid-resnet18/metrics.json: is no readable JSON" in text
        and "/" + study.name not in text
        and "is not explained" not in text
        and "1,000 steps" in text
    )
    with pytest.raises(CmidError, match="run its stage again"):
        report.summary(study)
    write_json(
        study / "results/probe/scenes/cmid-resnet18/metrics.json",
        {"linear": {"1.0": {}}, "knn": {}, "chance": 0.1, "test_images": 5},
    )
    assert "has no linear.1.0.accuracy" in page(study).text


def test_other_studies_results_are_not_mixed_in(study, plain):
    shutil.copytree(study / "results/probe/scenes/cmid-resnet18", study / "results/probe/scenes/byol-resnet18")
    assert "byol-resnet18" not in {o["init"] for o in results.probe_rows(study)}
    assert "no longer has them: results/probe/scenes/byol-resnet18." in page(study).text


def test_text_from_results_stays_text(study, plain):
    evil = '<script>alert(1)</script><img src=http://x.invalid/a.png onerror="alert(2)">{{ 7 * 7 }}'
    run = study / "results/probe/scenes/cmid-resnet18/run.json"
    change(run, device=evil, commit=evil, data=evil, versions={evil: evil}, parameters={evil: [evil]})
    change(study / "results/prepare/pool/metrics.json", findings=[evil], images=evil)
    change(study / "results/probe/scenes/cmid-resnet18/metrics.json", classes=evil)
    shutil.copytree(run.parent, study / "results/probe/scenes/<b onclick=x>")
    p = page(study)
    assert (
        not p.all("script")
        and not p.all("b onclick")
        and not [a for a in p.all("img") if not a["src"].startswith("data:")]
    )
    assert not [k for _, a in p.elements for k in a if k.startswith("on")] and "49" not in [o for o in p.text.split()]
    assert p.text.count(evil) >= 6 and "<b onclick=x>" in p.text


def test_it_repeats(made, whole):
    assert report.html(made) == whole


def test_examples_do_not_replace_results(study):
    with pytest.raises(CmidError, match="results already"):
        results.example_results(study)


# what later stages brought


def test_what_idled_is_said_first_and_in_its_place(study, plain):
    "Where pretraining warned, the numbers are below what it could have come to."
    change(
        study / "results/pretrain/cmid-resnet18/metrics.json",
        warnings=[
            "the local branch idles: its loss <b>6.1</b> is within 2 %",
            "the reconstruction is no better than a flat colour",
        ],
    )
    said = report.headlines(study)
    assert (
        said[0] == "Warning, pretraining of cmid-resnet18: the local branch idles: its loss <b>6.1</b> is within 2 %."
        and said[1].startswith("Warning")
        and not said[2].startswith("Warning")
    )
    p = page(study)
    assert (
        p.text.count("the local branch idles: its loss <b>6.1</b> is within 2 %.") == 2
        and report.summary(study)["warnings"] == 2
    )
    assert len([a for t, a in p.elements if a.get("class") == "alarm"]) == 4


def test_other_images_are_not_compared(study, plain):
    at = study / "results/features/scenes/random-resnet18/embedding.json"
    o = json.loads(at.read_text())
    change(at, label=o["label"][1:] + [0])
    rows = {o["init"]: o for o in results.score_rows(study, "features")}
    assert [a["baseline"] for a in rows["cmid-resnet18"]["against"]] == ["imagenet-resnet18"] and not [
        o for o in report.headlines(study) if "feature space" in o and "random" in o
    ]


def test_no_classes_no_purity(study, plain):
    for i in INITS:
        at = study / "results/features/scenes" / i
        change(
            at / "metrics.json",
            **dict.fromkeys(("purity", "low", "high", "chance", "purity_2d")),
            per_class={},
            classes=0,
        )
        change(at / "embedding.json", label=None, purity=None, chance=None, classes=[])
    text = page(study).text
    assert (
        "The images have no classes" in text
        and not [o for o in report.headlines(study) if "feature space" in o]
        and report.summary(study)["features"] == {}
    )


@pytest.mark.parametrize(
    "stage, key",
    [
        ("classify/scenes", "finetune"),
        ("classify/scenes", "confusion"),
        ("features/scenes", "purity"),
        ("features/scenes", "per_class"),
        ("correspondence", "accuracy"),
        ("correspondence", "error_px"),
        ("attention", "mass_area"),
    ],
)
def test_a_number_that_is_not_there_is_named(study, plain, stage, key):
    at = study / "results" / stage / "cmid-resnet18/metrics.json"
    m = json.loads(at.read_text())
    del m[key]
    write_json(at, m)
    text = page(study).text
    assert f"{stage}/cmid-resnet18/metrics.json: has no {key}" in text and "1,000 steps" in text


def test_alternative_texts_have_the_numbers(study, plain):
    alts = [a["alt"] for a in page(study).all("img")]
    for due in (
        "Confusion of cmid-resnet18 on scenes: 390 of 500 test images are right; most often wrong: ",
        "t-SNE maps of scenes, an image a point, coloured by class, for cmid-resnet18 (purity 70\u202f%), random-resnet18 (purity 50\u202f%)",
        "Images of scenes, each with its nearest by cmid-resnet18: 21 of 30 neighbours",
        "over 64 images 52.0\u202f% are right, chance 22.0\u202f%",
        "60\u202f% of it lies on 48\u202f% of the area, where an even map would need 62\u202f%",
    ):
        assert [o for o in alts if due in o], due


def test_photographs_become_light(study):
    at = study / "results/attention/cmid-resnet18/figure.png"
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)
    Image.fromarray(np.kron(noise[::4, ::4], np.ones((4, 4, 1), np.uint8))).save(at)
    flat = study / "flat.png"
    Image.new("RGB", (400, 300), "#0072b2").save(flat)
    src = re.search('src="([^"]+)"', report.image(at, "x"))[1]
    if len(b64decode(src.split(",")[1])) < at.stat().st_size:
        assert src.startswith("data:image/jpeg")
    assert (
        Image.open(io.BytesIO(b64decode(src.split(",")[1]))).size == (400, 300)
        and b64decode(re.search('base64,([^"]+)', report.image(flat, "x"))[1]) == flat.read_bytes()
    )


# files that were damaged in shape

EACH = dict(segment="land", change="dates", detect="objects")


def broken(stage, m):
    "Ways in which the metrics of a stage can be wrong, and what is said of each."
    one, head = next(iter(m.get("matches", {"x": 0}))), dict(m.get("heads", {}).get("bit", {}))
    return dict(
        segment=[
            (dict(per_image=[[1, 2]]), "per_image is not of its images"),
            (dict(per_image=[[1, 2]] * 8), "per_image is not of its classes"),
            (dict(per_class=None), "per_class"),
            (dict(per_class={}), "per_class is not of its classes"),
            (dict(miou="x", per_image="x"), "per_image"),
        ],
        change=[
            (dict(heads=dict(foo=head)), "heads.foo"),
            (dict(heads=3), "heads"),
            (dict(heads=dict(bit=head | dict(per_image=[[1, 2]] * 8))), "heads.bit.per_image.0"),
            (dict(heads=dict(bit=head | dict(per_image=[]))), "per_image is not of its images"),
        ],
        detect=[
            (dict(images=3), "truths are not of its images"),
            (dict(matches=m.get("matches", {}) | {one: [[99, 0.9, 1]]}), "matches are not of its images"),
            (dict(matches=m.get("matches", {}) | {one: [[-1, 0.9, 1]]}), "matches are not of its images"),
            (dict(metric="foo"), "metric"),
            (dict(truths={}), "not of the same classes"),
            (dict(truths={}, matches={}), "not of the same classes"),
            (dict(matches=[3]), "matches"),
        ],
        labels=[
            (dict(images=3), "images"),
            (dict(findings=["a"]), "findings.0"),
            (dict(sizes=[]), "sizes"),
            (dict(bands=None), "bands"),
        ],
    )[stage]


@pytest.mark.parametrize("stage", ["segment", "change", "detect"])
def test_damage_in_shape_is_named(study, plain, stage):
    "Words, numbers and rows each end in one line that names the file; the page has it in its place, and stands."
    at = study / "results" / stage / EACH[stage] / "cmid-resnet18/metrics.json"
    m = json.loads(at.read_text())
    for more, said in broken(stage, m):
        change(at, **more)
        for f in (report.headlines, report.summary, lambda o: results.task_rows(o, stage)):
            with pytest.raises(
                CmidError,
                match=rf"cmid-resnet18/metrics.json: is damaged \(.*{re.escape(said)}.*\); run its stage again",
            ):
                f(study)
        write_json(at, m)
    change(at, **more)
    text = page(study).text
    assert (
        text.count(f"{EACH[stage]}/cmid-resnet18/metrics.json: is damaged") == 2
        and "1,000 steps" in text
        and "Frozen features" in text
    )  # in short, and its section
    write_json(at, {k: v for k, v in m.items() if k != "images"})
    with pytest.raises(CmidError, match="metrics.json: has no images; run its stage again"):
        report.summary(study)


def test_damaged_labels_are_named(study, plain):
    at = study / "results/labels/land/metrics.json"
    m = json.loads(at.read_text())
    for more, said in broken("labels", m):
        write_json(at, m | more)
        with pytest.raises(CmidError, match=rf"land/metrics.json: is damaged \(.*{re.escape(said)}"):
            report.annotations(study)
    text = page(study).text
    assert text.count("land/metrics.json: is damaged") == 1 and "is not explained" in text


def test_draws_are_counted_once_as_long_as_files_stay(study, plain, monkeypatch):
    counted = []
    drawn = results._drawn
    monkeypatch.setattr(results, "_drawn", lambda stage, *o: (counted.append(stage), drawn(stage, *o))[1])
    page(study)
    report.summary(study)
    first = len(counted)
    report.headlines(study)
    assert first == len(counted) == 4 * (1 + 2 + 1)  # inits; change has two heads
    results.task_rows(study, "detect")[0]["init"] = "mine"
    assert results.task_rows(study, "detect")[0]["init"] == "cmid-resnet18"
    change(study / "results/detect/objects/cmid-resnet18/metrics.json", scored_on_training=True)
    assert results.task_rows(study, "detect")[0]["on_training"] and len(counted) == first + 4
