"The pipeline as a whole: contracts between dvc.yaml, params.yaml and the stage notebooks; and a study that is run, edited and run again."

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import papermill
import pytest
import yaml

from cmid.base.params import SECTIONS, Params

ROOT = Path(__file__).parents[2]
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
BODY = {k: v.get("do", v) for k, v in DVC.items()}
INITS = "cmid-resnet18", "random-resnet18"
TASKS = dict(segment="land", change="dates", detect="objects")
NOTEBOOKS = sorted(o.stem for o in (ROOT / "nbs/pipeline").glob("*.ipynb"))


def defaults(stage):
    return {k: v["default"] for k, v in papermill.inspect_notebook(str(ROOT / f"nbs/pipeline/{stage}.ipynb")).items()}


def test_every_notebook_is_a_stage():
    assert set(NOTEBOOKS) == set(BODY) - {"digest"}


@pytest.mark.parametrize("stage", NOTEBOOKS)
def test_parameters_are_known(stage):
    "papermill would set a misspelt -p in silence."
    command = BODY[stage]["cmd"].split()
    assert command[:2] == ["cmid_stage", stage]
    given = [command[i + 1] for i, o in enumerate(command) if o == "-p"]
    known = defaults(stage)
    assert set(given) == set(known) - {"smoke"}, "identity is given by dvc.yaml, and nothing else"
    assert known["smoke"] == "True", "alone, a stage runs on generated imagery"


@pytest.mark.parametrize("stage", NOTEBOOKS)
def test_depends_on_its_digest(stage):
    assert f"digests/{stage}.json" in BODY[stage]["deps"]
    assert f"digests/{stage}.json" in DVC["digest"]["outs"]
    assert not [o for o in BODY[stage]["deps"] if o.startswith(("nbs", "cmid"))], "prose would retrain"


@pytest.mark.parametrize("stage", NOTEBOOKS)
def test_parameters_that_are_read_are_tracked(stage):
    "A stage that reads a section reruns when the section or the profile's changes."
    code = "".join(
        "".join(o["source"])
        for o in json.loads((ROOT / f"nbs/pipeline/{stage}.ipynb").read_text())["cells"]
        if o["cell_type"] == "code"
    )
    section = re.search(r"Stage\('(\w+)', ('(\w+)'|None)", code)
    assert section and section[1] == stage
    assert {"profile", "seed", "device", "deterministic"} <= set(BODY[stage]["params"])
    if section[3]:
        assert {"profile", section[3], f"profiles.${{profile}}.{section[3]}"} <= set(BODY[stage]["params"])


def test_no_output_below_data_and_metrics_only_in_git():
    for name, o in BODY.items():
        for kind in ("outs", "metrics", "plots"):
            for out in o.get(kind, []):
                path, flags = next(iter(out.items())) if isinstance(out, dict) else (out, {})
                assert not path.startswith("data/")
                if flags.get("cache") is False:
                    assert path.startswith("results/") and path.endswith(".json"), f"{name}: {path}"


@pytest.mark.parametrize("profile", list(Params(ROOT).values["profiles"]))
def test_profiles(profile):
    p = Params(ROOT, profile)
    for o in SECTIONS:
        getattr(p, o)
    assert set(p.overlay) == set(SECTIONS) - {"study"}, "dvc.yaml names every section of every profile"


def test_paper_profile_is_the_published_recipe():
    p = Params(ROOT, "paper")
    s = p.pretrain
    assert (p.prepare.side, s.epochs, s.batch, s.warmup_epochs, s.weight_decay, s.betas) == (
        224,
        200,
        64,
        10,
        0.02,
        [0.98, 0.92, 0.99],
    )
    assert (
        s.mask_ratio,
        s.queue,
        s.temperature,
        s.prototypes,
        s.teacher_temperature,
        s.teacher_temperature_epochs,
        s.momentum,
    ) == (0.6, 65536, 0.2, 2048, [0.04, 0.07], 50, [0.996, 1.0])


# A study that is run, edited and run again


class Study:
    "A copy of the project with the smoke profile and a little generated imagery."

    def __init__(self, at):
        self.at = at
        files = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\0")
        for o in filter(None, files):
            if (ROOT / o).is_file() and not o.startswith(("results/", "studies/")):
                (at / o).parent.mkdir(parents=True, exist_ok=True)
                (at / o).write_bytes((ROOT / o).read_bytes())
        for o in ("data.dvc", "dvc.lock"):
            (at / o).unlink(missing_ok=True)
        text = (at / "params.yaml").read_text()
        (at / "params.yaml").write_text(
            re.sub(r"^profile: \w+", "profile: smoke", text, flags=re.M).replace("device: auto", "device: cpu")
        )
        from cmid.study.smoke import smoke_data, smoke_tasks

        smoke_data(at)
        smoke_tasks(at, TASKS.values())
        git = lambda *a: subprocess.run(
            ["git", "-c", "user.name=cmid", "-c", "user.email=cmid@example.com", *a],
            cwd=at,
            check=True,
            capture_output=True,
        )
        git("init", "-q")
        git("add", "-A")
        git("commit", "-qm", "study")

    def repro(self, *more, fails=False, command=("repro",)):
        "Names of the stages that ran."
        env = os.environ | dict(
            PYTHONPATH=str(self.at),
            PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            CMID_ROOT=str(self.at),
            OMP_NUM_THREADS="1",
        )
        done = subprocess.run(["dvc", *command, *more], cwd=self.at, env=env, capture_output=True, text=True)
        assert (done.returncode != 0) == fails, done.stdout[-3000:] + done.stderr[-3000:]
        self.said = done.stdout + done.stderr
        return re.findall(r"Running stage '([^']+)'", self.said)

    def edit(self, path, old, new):
        p = self.at / path
        text = p.read_text(encoding="utf-8")
        assert old in text, f"{path}: {old}"
        p.write_text(text.replace(old, new, 1), encoding="utf-8")

    def metrics(self, *parts):
        return json.loads(self.at.joinpath("results", *parts, "metrics.json").read_text())


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    s = Study(tmp_path_factory.mktemp("study"))
    s.first = s.repro()
    return s


def test_everything_runs_once(study):
    assert set(study.first) == {
        "digest",
        "prepare@pool",
        "prepare@scenes",
        *(f"labels@{o}" for o in TASKS.values()),
        *(f"{s}@{d}-{i}" for s, d in TASKS.items() for i in INITS),
        "pretrain@cmid-resnet18",
        "baselines@random-resnet18",
        "reconstruct@cmid-resnet18",
        "report",
        *(f"{s}@scenes-{i}" for s in ("probe", "classify", "features") for i in INITS),
        *(f"{s}@{i}" for s in ("attention", "correspondence") for i in INITS),
    }
    assert study.repro() == []


def test_what_is_left(study):
    assert {o.name for o in (study.at / "models").iterdir()} == {"cmid-resnet18", "random-resnet18"}
    assert study.metrics("probe", "scenes", "cmid-resnet18")["test_images"] == 3
    run = json.loads((study.at / "results/pretrain/cmid-resnet18/run.json").read_text())
    assert {
        "commit",
        "changed",
        "device",
        "versions",
        "seconds",
        "peak_memory_mb",
        "images_per_s",
        "data",
        "parameters",
        "run",
    } <= set(run)
    assert (
        len((study.at / "results/pretrain/cmid-resnet18/curves/plots/metrics/total.tsv").read_text().splitlines()) == 7
    )  # a head, 2 epochs of 3 steps
    assert "<html" in (study.at / "reports/report.html").read_text()
    assert "resnet18" in (study.at / "reports/pretrain-cmid-resnet18.ipynb").read_text()


def test_every_task_is_scored_and_in_the_report(study):
    for stage, d in TASKS.items():
        for i in INITS:
            assert study.metrics(stage, d, i)["images"] == 2
    said = json.loads((study.at / "results/report/metrics.json").read_text())
    page = (study.at / "reports/report.html").read_text()
    assert (
        said["missing"] == 0
        and {*said["segment"]["land"]} == {*INITS}
        and {*said["change"]["dates"]["cmid-resnet18"]} == {"bit", "difference"}
        and "Oriented detection" in page
    )


def test_tasks_and_inits_may_be_left_out(study):
    "As they are for what follows, which would train each anew with every edit."
    for k, o in TASKS.items():
        study.edit("params.yaml", f"  {k}: [{o}]", f"  {k}: []")
    study.edit("params.yaml", "inits: [cmid-resnet18, random-resnet18]", "inits: [cmid-resnet18]")
    assert set(study.repro()) == {"digest", "report"} and study.repro() == []


def test_timm_loads_the_export_by_itself(study):
    import timm
    import torch

    m = timm.create_model(
        "resnet18", num_classes=0, checkpoint_path=str(study.at / "models/cmid-resnet18/model.safetensors")
    )
    from cmid.train.checkpoint import load_backbone

    encoder, _ = load_backbone(study.at / "models/cmid-resnet18")
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(m.eval().forward_features(x), encoder(x)[-1])


def test_prose_reruns_nothing_but_digests(study):
    before = study.metrics("pretrain", "cmid-resnet18")
    study.edit("nbs/pipeline/pretrain.ipynb", "# Pretrain", "# Pretraining, in other words")
    study.edit("nbs/20_cmid.ipynb", "# CMID", "# The method")
    study.edit("cmid/views.py", '"Luma of RGB', '"Brightness of RGB')  # a docstring
    assert study.repro() == ["digest"]
    assert study.metrics("pretrain", "cmid-resnet18") == before


def test_code_of_a_module_reruns_what_reaches_it(study):
    "They are named here, and run below."
    study.edit("cmid/probe.py", "import", "import sys\nimport")
    assert study.repro("digest") == ["digest"]
    wanted = study.repro("--dry")
    assert {o for o in wanted if o.startswith(("prepare", "pretrain"))} == set() and {
        "probe@scenes-cmid-resnet18",
        "classify@scenes-cmid-resnet18",
    } <= set(wanted)


def test_code_of_the_method_trains_anew(study):
    "Not only the stage runs again: it must not take up the checkpoint of the old code."
    before = study.metrics("pretrain", "cmid-resnet18")
    study.edit("cmid/reconstruction.py", "return spatial + frequency_weight", "return 2 * spatial + frequency_weight")
    ran = study.repro()
    assert {"pretrain@cmid-resnet18", "probe@scenes-cmid-resnet18"} <= set(ran) and not [
        o for o in ran if o.startswith("prepare")
    ]
    assert (
        study.metrics("pretrain", "cmid-resnet18")["reconstruction"] != before["reconstruction"]
        and "resuming after" not in study.said
    )


def test_code_of_a_cell_reruns_its_stage(study):
    study.edit("nbs/pipeline/reconstruct.ipynb", "stage.finish(", "_ = 1; stage.finish(")
    assert {o.split("@")[0] for o in study.repro()} <= {
        "digest",
        "reconstruct",
        "report",
    } and "reconstruct@cmid-resnet18" in study.repro("--force", "--dry", "reconstruct")


def test_a_mistake_is_one_line(study):
    study.edit("params.yaml", "neighbours: 5", "neighbors: 5")
    study.repro("probe", fails=True)
    assert (
        "params.yaml: probe.neighbors: unknown key (did you mean 'neighbours'?)" in study.said
        and "Traceback" not in study.said
    )
    study.edit("params.yaml", "neighbors: 5", "neighbours: 5")


def test_misspelt_stage_and_parameter(study):
    for given, says in ((["prob"], "no such stage"), (["probe", "-p", "datset", "scenes"], "did you mean 'dataset'")):
        done = subprocess.run(
            [str(Path(sys.executable).parent / "cmid_stage"), *given], cwd=study.at, capture_output=True, text=True
        )
        assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr


def test_a_run_that_collapses_fails_in_one_line_and_leaves_the_old_model(study):
    before = (study.at / "models/cmid-resnet18/model.safetensors").read_bytes()
    study.edit("params.yaml", "pretrain: {epochs: 2,", "pretrain: {lr: 30.0, epochs: 2,")
    study.repro("pretrain", fails=True)
    assert re.search(
        r"cmid_stage: (collapsed: .* \(healthy: about|.* is not finite at step \d+ \(learning rate 30\))", study.said
    ), study.said[-2000:]
    assert "Traceback" not in study.said and "checkpoints of other parameters or code (" in study.said
    assert (study.at / "models/cmid-resnet18/model.safetensors").read_bytes() == before, (
        "DVC removed it before the stage ran"
    )
    study.edit("params.yaml", "pretrain: {lr: 30.0, epochs: 2,", "pretrain: {epochs: 2,")
    study.repro()
    assert (study.at / "models/cmid-resnet18/model.safetensors").read_bytes() == before


def test_wrong_parameters_are_refused_before_anything_is_removed(study):
    kept = lambda: {
        o: o.stat().st_mtime_ns
        for d in ("results", "models", "prepared", "reports")
        for o in sorted((study.at / d).rglob("*"))
        if o.is_file()
    }
    before = kept()
    study.edit("params.yaml", "betas: [0.98, 0.92, 0.99]", "betas: [0.98, 0.92]")
    study.repro(fails=True)
    assert kept() == before and "cmid_digest: params.yaml: pretrain.betas" in study.said
    study.edit("params.yaml", "betas: [0.98, 0.92]", "betas: [0.98, 0.92, 0.99]")


def test_an_experiment_is_listed_and_keeps_checkpoints(study):
    kept = lambda: {o: o.read_bytes() for o in (study.at / "checkpoints").rglob("*.ckpt")}
    before = kept()
    study.repro("-n", "fewer", "-S", "profiles.smoke.probe.neighbours=2", command=("exp", "run"))
    assert before and kept() == before and study.metrics("probe", "scenes", "cmid-resnet18")["knn"]["1.0"]["k"] == 2
    study.repro("--md", "--only-changed", command=("exp", "show"))
    assert "[fewer]" in study.said and "neighbours" in study.said


def test_a_study_without_labels(study):
    values = yaml.safe_load((study.at / "params.yaml").read_text(encoding="utf-8"))
    values["study"]["probes"] = []
    del values["datasets"]["scenes"]
    values["tasks"] = {}
    values["health"]["labelled"] = values["attention"]["dataset"] = values["correspondence"]["dataset"] = "pool"
    for o in ("probe", "classify", "features", "labels", *TASKS):
        shutil.rmtree(study.at / "results" / o)  # as in a fresh clone
    (study.at / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    ran = study.repro()
    assert {o.split("@")[0] for o in ran} >= {"pretrain", "attention", "correspondence", "report"} and not [
        o for o in ran if o.startswith(("probe", "classify", "features"))
    ]
    assert (
        "note: health was" in study.said
        and "scenes" not in json.loads((study.at / "results/report/metrics.json").read_text())["probe"]
    )
