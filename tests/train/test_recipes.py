"Recipes: each trains, in checkpoints of its own; under DVC, a changed one reruns its own runs alone."

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from cmid.base.files import load_yaml
from cmid.base.params import Params, merge
from cmid.method.model import CMID
from cmid.study.digest import cmid_digest, start_digest
from cmid.study.study import study_params, with_set
from cmid.train.pretrain import MODEL_KEYS, build_cmid, pretrain_learner, pretrain_summary, run_pretraining
from tests.tools.runs import changed, quiet
from tests.tools.study import environment

ROOT = Path(__file__).parents[2]
SMOKE = Params(ROOT, "smoke")
LOSSES = "reconstruction", "contrast", "distillation"


class Pool:
    "Eight images, 64 px."

    bands, side, mean, std = 3, 64, [0.5] * 3, [0.2] * 3

    def __init__(self):
        self.pixels = np.random.default_rng(0).integers(0, 256, (8, 3, 64, 64), dtype=np.uint8)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.pixels[i]


def learner(recipe, folder=None, **values):
    "Two epochs of one step each."
    torch.manual_seed(0)
    settings = changed(SMOKE.recipe(recipe), **values)
    cpu = torch.device("cpu")
    return pretrain_learner(Pool(), np.arange(8), settings, "resnet10t", on=cpu, folder=folder, say=quiet)


@pytest.mark.parametrize("recipe", SMOKE.recipes())
def test_every_recipe_trains(recipe):
    learn = run_pretraining(learner(recipe, epochs=1, warmup_epochs=0))
    weights = learn.cmid.settings.weights.model_dump()
    summary = pretrain_summary(learn)
    assert [summary[name] > 0 for name in LOSSES] == [weights[name] > 0 for name in LOSSES]
    assert np.isfinite(summary["total"])


def test_byol_is_what_the_method_of_this_name_was():
    settings = SMOKE.recipe("byol")
    assert settings == changed(SMOKE.pretrain, variant="byol")
    torch.manual_seed(0)
    model = build_cmid(settings, "resnet10t", side=64)
    torch.manual_seed(0)
    sizes = {key: getattr(settings, key) for key in MODEL_KEYS if key != "variant"}
    same = CMID("resnet10t", 3, 64, "byol", **sizes)
    ours, theirs = model.state_dict(), same.state_dict()
    assert model.queue is None
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_recipes_do_not_share_checkpoints(tmp_path):
    folders = {learner(recipe, tmp_path).checkpoints.folder for recipe in SMOKE.recipes()}
    assert len(folders) == len(SMOKE.recipes())
    run_pretraining(learner("cmid", tmp_path), until=1)
    other, again = learner("published", tmp_path), learner("cmid", tmp_path)
    assert other.checkpoints.restore(other) == 0
    assert again.checkpoints.restore(again) == 1
    edited = learner("cmid", tmp_path, temperature=0.3)
    assert edited.checkpoints.restore(edited) == 0


def test_a_recipe_has_a_start_of_its_own(tmp_path, monkeypatch, capsys):
    values = merge(load_yaml(ROOT / "params.yaml"), dict(recipes=dict(onward=dict(start="imagenet"))))
    values["study"] |= dict(methods=["cmid", "onward"], apply={})
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "digests/starts").mkdir(parents=True)
    (tmp_path / "digests/starts/gone.json").write_text("{}")
    monkeypatch.setenv("CMID_ROOT", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["cmid_digest", "--folders", "digests/folders.json", "--starts", "digests"])
    cmid_digest()
    written = {path.name: load_yaml(path) for path in (tmp_path / "digests/starts").iterdir()}
    assert written == {"cmid.json": dict(start=None), "onward.json": dict(start="imagenet")}
    assert start_digest(Params(tmp_path), "mim") == dict(start=None)


def test_a_study_adds_recipes_and_sets_their_keys():
    base = load_yaml(ROOT / "params.yaml")
    values = study_params(base, dict(recipes=dict(thin=dict(mask_ratio=0.3))), ["recipes.mim.epochs=7"])
    assert values["recipes"]["thin"] == dict(mask_ratio=0.3)
    assert values["recipes"]["mim"] == base["recipes"]["mim"] | dict(epochs=7)
    with pytest.raises(Exception, match="recipes.mim.epoch is not a parameter .did you mean 'epochs'"):
        with_set(base, "recipes.mim.epoch=7")


# --- under DVC


def written_by(stage):
    "Paths of everything that a stage writes."
    found = []
    for kind in ("outs", "metrics", "plots"):
        found += [next(iter(o)) if isinstance(o, dict) else o for o in stage.get(kind, [])]
    return found


def put(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def pipeline(tmp_path):
    "The stage `pretrain` of dvc.yaml, whose command makes empty files, with the recipes cmid and mim."
    stage = load_yaml(ROOT / "dvc.yaml")["stages"]["pretrain"]
    paths = written_by(stage)
    folders = " ".join(sorted({str(Path(o).parent) for o in paths}))
    stage |= dict(cmd=f"mkdir -p {folders} && touch {' '.join(paths)}")
    put(tmp_path, "dvc.yaml", yaml.safe_dump(dict(stages=dict(pretrain=stage)), sort_keys=False))
    values = load_yaml(ROOT / "params.yaml")
    values["study"]["methods"] = ["cmid", "mim"]
    put(tmp_path, "params.yaml", yaml.safe_dump(values))
    for name in ("pretrain.json", "starts/cmid.json", "starts/mim.json"):
        put(tmp_path, f"digests/{name}", "{}")
    put(tmp_path, f"prepared/{values['pretrain']['dataset']}/pixels", "")
    put(tmp_path, f"prepared/{values['health']['labelled']}/manifest.json", "")
    subprocess.run(["dvc", "init", "-q", "--no-scm"], cwd=tmp_path, check=True, env=environment(tmp_path))
    return tmp_path


def reran(folder, **changes):
    "Names of the runs that `dvc repro` makes after a change of params.yaml."
    values = merge(load_yaml(folder / "params.yaml"), changes)
    put(folder, "params.yaml", yaml.safe_dump(values))
    done = subprocess.run(["dvc", "repro"], cwd=folder, env=environment(folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r"Running stage 'pretrain@([^']+)'", done.stdout))


@pytest.mark.slow
def test_a_changed_recipe_reruns_its_own_runs_alone(pipeline):
    both = {"cmid-resnet18", "mim-resnet18"}
    assert reran(pipeline) == both
    assert reran(pipeline, recipes=dict(mim=dict(mask_ratio=0.5), unused=dict(epochs=3))) == {"mim-resnet18"}
    put(pipeline, "digests/starts/cmid.json", '{"start": "imagenet"}')
    assert reran(pipeline) == {"cmid-resnet18"}
    assert reran(pipeline, pretrain=dict(lr=0.1)) == both
