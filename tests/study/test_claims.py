"Claims: each sentence of the report rests on files and keys, and is refused where they say something else."

import json
import re
from pathlib import Path

import pytest

from cmid.base.errors import CmidError
from cmid.base.files import write_json
from cmid.study.comparisons import accuracy_rows
from cmid.study.report import report_page
from cmid.study.report_claims import (
    Claim,
    Evidence,
    check_claims,
    check_still_said,
    claim_records,
    read_claims,
    scored_rows,
    study_claims,
    value_at,
)
from cmid.study.report_decision import first_screen

ROOT = Path(__file__).parents[2]
MINE = "probe/scenes/cmid-resnet18/metrics.json"


def texts(claims):
    return [claim.text for claim in claims]


def starting(claims, beginning):
    (text,) = [text for text in texts(claims) if text.startswith(beginning)]
    return text


def test_every_number_of_every_claim_is_in_its_file(made):
    claims = first_screen(made).all_claims()
    check_claims(made, claims)
    check_still_said(claims, first_screen(made).all_claims())
    without = [claim.text for claim in claims if not claim.evidence]
    assert all(text.startswith("Backbones") for text in without)  # made-up runs do not say what they trained on
    for claim in study_claims(made, scored_rows(made)):
        for evidence in claim.evidence:
            content = json.loads((made / evidence.file).read_text())
            assert value_at(content, evidence.key) == pytest.approx(evidence.value)


def test_a_comparison_names_both_files(made):
    (claim,) = [
        o for o in study_claims(made, scored_rows(made)) if "linear" in o.text and "for random-resnet18" in o.text
    ]
    files = {(o.file, o.key) for o in claim.evidence}
    for init in ("cmid-resnet18", "random-resnet18"):
        assert (f"results/probe/scenes/{init}/metrics.json", "linear.1.0.accuracy") in files


@pytest.mark.parametrize(
    "path, key, value",
    [
        (MINE, "linear.1.0.accuracy", 0.9),
        (MINE, "test_images", 501),
        ("classify/scenes/random-resnet18/metrics.json", "finetune.1.0.accuracy", 0.1),
        ("segment/land/cmid-resnet18/metrics.json", "miou", 0.99),
        ("change/dates/cmid-resnet18/metrics.json", "heads.bit.f1", 0.99),
        ("detect/objects/cmid-resnet18/metrics.json", "map", 0.99),
        ("features/scenes/cmid-resnet18/metrics.json", "purity", 0.99),
        ("correspondence/cmid-resnet18/metrics.json", "accuracy", 0.99),
        ("reconstruct/cmid-resnet18/metrics.json", "skill", 0.99),
    ],
)
def test_a_number_that_changes_afterwards_is_refused_by_file_and_key(study, path, key, value):
    records = json.loads(
        json.dumps(claim_records(study_claims(study, scored_rows(study))))
    )  # as results/report/metrics.json has them
    check_claims(study, read_claims(records))
    set_key(study / "results" / path, key, value)
    with pytest.raises(CmidError, match=f"^results/{path}: {re.escape(key)} is {value}, but a claim"):
        check_claims(study, read_claims(records))


def set_key(file, key, value):
    "Write another value at a dotted key."
    content = json.loads(file.read_text())
    holder = content
    *path, last = re.findall(r"\d\.\d+|[^.]+", key)
    for name in path:
        holder = holder[name]
    assert last in holder
    holder[last] = value
    write_json(file, content)


@pytest.mark.parametrize(
    "path, key",
    [
        (MINE, "linear.1.0.accuracy"),
        ("segment/land/cmid-resnet18/metrics.json", "miou"),
        ("change/dates/cmid-resnet18/metrics.json", "heads.difference.f1"),
    ],
)
def test_a_score_that_its_counts_contradict_stops_the_report(study, plain, path, key):
    set_key(study / "results" / path, key, 0.9)
    with pytest.raises(
        CmidError, match=f"{path}: {re.escape(key)} is 0.9, but a claim of the report rests on 0\\.[0-8]"
    ):
        report_page(study)


def test_a_number_that_changes_while_the_report_is_made_stops_it(study, plain, monkeypatch):
    "The sections are drawn between the claims and their check."
    from cmid.study import report

    def meanwhile(root):
        set_key(root / "results/reconstruct/cmid-resnet18/metrics.json", "skill", 0.5)

    monkeypatch.setattr(report, "REPORT_SECTIONS", [("Parameters", (), meanwhile)])
    with pytest.raises(CmidError, match="^results/reconstruct/cmid-resnet18/metrics.json: skill is 0.5, but a claim"):
        report_page(study)


def test_a_claim_that_no_longer_follows_is_refused():
    old = Claim("a is better", [Evidence("results/x/metrics.json", "a", 1)])
    with pytest.raises(CmidError, match="^results/x/metrics.json: a: no longer gives the claim 'a is better'"):
        check_still_said([old], [Claim("a is worse", [])])


def test_evidence_is_shown_and_escaped(study, plain, change):
    evil = '</script><img src=x onerror="alert(1)">'
    change("pretrain/cmid-resnet18/metrics.json", warnings=[evil])
    page = report_page(study)
    assert "onerror=&#34;alert(1)" in page
    assert "<img src=x" not in page
    shown = page.replace("<wbr>", "")
    assert f"<code>results/{MINE}</code>: <code>linear.1.0.accuracy</code> = 0.612" in shown
    assert f'title="results/{MINE}: linear.1.0.accuracy"' in shown


# What the data decide


def test_the_sentence_counts_what_the_table_shows(made):
    verdicts = []
    for line in first_screen(made).lines:
        verdicts += [o["verdict"] for o in line["cells"]["cmid-resnet18"]["against"] if "random" in o["baseline"]]
    (text,) = [o for o in texts(first_screen(made).decisions) if "than random-resnet18" in o]
    better, scores = verdicts.count("better"), len(verdicts)
    assert f"is better than random-resnet18 in {better} of {scores} scores" in text
    assert text.endswith(f"in {verdicts.count('undecided') or 'none'} the data do not decide.")


def test_floors_stand_beside_the_backbones_and_are_no_reference(made):
    lines = {line["title"]: line for line in first_screen(made).lines}
    assert lines["change detection by BIT, dates"]["floor"]["init"] == "unet"
    assert lines["linear probe, scenes"]["floor"]["init"] in ("imagestats", "randomconv")
    assert not [o for line in lines.values() for o in line["cells"] if o in ("unet", "imagestats", "randomconv")]


def test_what_would_change_it(study, change):
    images = dict(images=400, parameters=dict(dataset="pool", epochs=10))
    change("pretrain/cmid-resnet18/run.json", **images)
    change("segment/land/cmid-resnet18/metrics.json", scored_on_training=True)
    claims = first_screen(study).caveats
    assert "saw 4,000 images with repeats, one for 49,542 of" in starting(claims, "Short training: cmid-resnet18")
    assert "One seed (0)" in starting(claims, "One seed")
    assert "land" in starting(claims, "segmentation, land: scored on its training images")
    undecided = [o for o in study_claims(study, scored_rows(study)) if o.text.endswith("the interval includes 0.")]
    assert undecided
    assert "now)" in starting(claims, "More test images, if the differences stay: about")
    check_claims(study, claims)


def test_more_images_are_asked_for_where_the_interval_includes_0(made):
    rows = [o for o in accuracy_rows(made, "probe") if o["fraction"] == 1 and o["against"]]
    for row in rows:
        for other in row["against"]:
            asked = any(row["dataset"] in o and "now)" in o for o in texts(first_screen(made).caveats))
            assert asked or not other["low"] <= 0 <= other["high"]


def test_what_is_missing_is_said(study):
    (study / "results/correspondence/cmid-resnet18/metrics.json").unlink()
    assert starting(first_screen(study).caveats, "Not run yet").endswith(
        "1 of the study's runs (correspondence cmid-resnet18)."
    )


def test_the_committed_claims_hold():
    "What results/report/metrics.json claims is what the committed results say."
    records = json.loads((ROOT / "results/report/metrics.json").read_text()).get("claims", [])
    check_claims(ROOT, read_claims(records))
