"Pretraining that goes on from given weights, and baselines from files: what is loaded, recorded, seen by DVC, refused."

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from cmid.base.errors import CmidError
from cmid.base.files import load_yaml
from cmid.base.params import Params, merge
from cmid.method.backbones import create
from cmid.study.digest import start_digest, weights_digest
from cmid.study.study import study_params
from cmid.train.checkpoint import export_backbone, load_backbone
from cmid.train.convert import STUDY, from_cmid, to_cmid
from cmid.train.export import export_pretrained
from cmid.train.pretrain import pretrain_learner, run_pretraining
from cmid.train.start import read_start
from tests.tools.runs import quiet

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
FACTS = STUDY | dict(method="cmid", parameters={}, data_hash="abc", data_licence=None, provenance={}, health={})
SWIN = "swin_tiny_patch4_window7_224"


class Pool:
    "What a learner needs of a prepared dataset: images of 64 px."

    side, hash = 64, "pool"

    def __init__(self, bands=3):
        self.bands, self.mean, self.std = bands, [0.4] * bands, [0.2] * bands
        self.pixels = np.random.default_rng(0).integers(0, 256, (8, bands, 64, 64), dtype=np.uint8)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return self.pixels[index]


def learner(backbone="resnet10t", folder=None, start=None, bands=3, say=quiet, seed=0):
    torch.manual_seed(seed)
    settings = Params(profile="smoke").pretrain.model_copy(update=dict(epochs=2, batch=4, start=start))
    return pretrain_learner(Pool(bands), np.arange(8), settings, backbone, on=CPU, folder=folder, say=say)


@pytest.fixture
def earlier(tmp_path):
    torch.manual_seed(5)
    encoder = create("resnet10t", img_size=128)
    torch.nn.init.normal_(encoder.mask_token)
    return export_backbone(encoder, tmp_path / "earlier", FACTS | dict(mean=[0.1, 0.2, 0.3], std=[0.3, 0.2, 0.1]))


def encoder_state(learn, branch="student"):
    return getattr(learn.model, branch).encoder.model.state_dict()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_student_and_teacher_start_there_and_all_else_is_as_from_random_weights(earlier):
    given, _ = load_backbone(earlier)
    random, begun = learner(), learner(start=str(earlier))
    for branch in ("student", "teacher"):
        assert equal(encoder_state(begun, branch), given.model.state_dict())
    assert begun.model.student.encoder.mask_token.abs().max() == 0
    before, after = random.model.state_dict(), begun.model.state_dict()
    others = [key for key in before if ".encoder.model." not in key]
    assert others
    assert all(torch.equal(before[key], after[key]) for key in others)


def test_inputs_are_normalised_as_the_start_was_and_the_card_says_where_it_comes_from(tmp_path, earlier):
    said = []
    learn = run_pretraining(learner(start=str(earlier), say=said.append))
    views = learn.cmid.views
    torch.testing.assert_close(views.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(views.std.flatten(), torch.tensor([0.3, 0.2, 0.1]))
    folder = export_pretrained(learn.model, Pool(), tmp_path / "out", "cmid", dict(seed=0), {}, {}, learn.start)
    card = load_backbone(folder)[1]
    assert (card.mean, card.std) == ([0.1, 0.2, 0.3], [0.3, 0.2, 0.1])
    sha = hashlib.sha256((earlier / "model.safetensors").read_bytes()).hexdigest()
    wanted = dict(hash=sha, architecture="resnet10t", method="cmid", data_hash="abc", img_size=128)
    assert card.parameters["start"] == wanted | dict(start=f"{tmp_path.name}/earlier"), "no path of this machine"
    assert f"goes on from {tmp_path.name}/earlier (cmid, {sha[:8]})" in "\n".join(said)


@pytest.mark.slow
def test_a_checkpoint_of_another_start_is_another_run(tmp_path, earlier):
    runs = tmp_path / "runs"
    run_pretraining(learner(folder=runs), until=1)
    from_it = run_pretraining(learner(folder=runs, start=str(earlier)), until=1)
    moved = shutil.copytree(earlier, tmp_path / "moved")
    again = learner(folder=runs, start=str(moved))
    assert again.checkpoints.restore(again) == 1, "the same weights elsewhere are the same start"
    encoder = create("resnet10t", img_size=128)
    other = export_backbone(encoder, tmp_path / "other", FACTS)
    new = learner(folder=runs, start=str(other))
    assert new.checkpoints.restore(new) == 0
    differences = new.checkpoints.others()[from_it.checkpoints.folder]
    assert re.fullmatch(r"start: \w+ then, \w+ now", differences)


def test_without_a_start_the_identity_of_a_run_has_no_such_key(tmp_path):
    learn = learner(folder=tmp_path)
    assert "start" not in learn.checkpoints.parameters
    assert "start" not in learn.checkpoints.parameters["settings"]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", pytest.param(SWIN, marks=pytest.mark.slow)])
def test_position_tables_of_another_side_are_resampled(tmp_path, name):
    encoder = create(name, img_size=224)
    folder = export_backbone(encoder, tmp_path / "large", FACTS)
    images = SimpleNamespace(bands=3, side=64)
    start = read_start(str(folder), name, images)
    learn = learner(name, start=str(folder))
    mine, theirs = encoder_state(learn), start.weights
    tables = [key for key in mine if mine[key].shape != theirs[key].shape]
    assert tables
    assert all(key == "pos_embed" or key.endswith("bias_table") for key in tables)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine if key not in tables)
    assert learn.model.student.encoder(torch.zeros(1, 3, 64, 64))[-1].isfinite().all()


@pytest.mark.slow
def test_a_converted_published_checkpoint_is_a_start(tmp_path):
    torch.manual_seed(1)
    published = from_cmid(export_backbone(create(SWIN), tmp_path / "own", FACTS), tmp_path / "published.pth")
    folder = to_cmid(published, tmp_path / "converted", SWIN)
    start = read_start("converted", SWIN, SimpleNamespace(bands=3, side=224), tmp_path)
    assert equal(start.weights, load_backbone(folder)[0].model.state_dict())
    assert start.facts["method"] == "cmid, published weights"
    assert start.mean == STUDY["mean"]


@pytest.mark.parametrize(
    "start, backbone, bands, message",
    [
        ("earlier", "resnet18", 3, "pretrain.start: earlier holds resnet10t, but study.backbones names resnet18; "),
        ("earlier", "resnet10t", 5, "pretrain.start: earlier takes 3 bands, but the images have 5; "),
        ("erlier", "resnet10t", 3, "pretrain.start: .*there is no backbone here; name a backbone folder, imagenet or"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(tmp_path, earlier, start, backbone, bands, message):
    with pytest.raises(CmidError, match=message) as raised:
        read_start(start, backbone, SimpleNamespace(bands=bands, side=64), tmp_path)
    assert "\n" not in str(raised.value)


def test_weights_of_timm_that_cannot_be_fetched_are_refused_in_one_line(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network\nat all")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(CmidError, match="pretrain.start: pretrained weights of 'resnet18' cannot be") as raised:
        read_start("imagenet", "resnet18", SimpleNamespace(bands=3, side=64))
    assert "\n" not in str(raised.value)


def study(folder, **changes):
    values = merge(load_yaml(ROOT / "params.yaml"), changes)
    values["study"]["apply"] = {}
    (folder / "params.yaml").write_text(yaml.safe_dump(values))
    return Params(folder)


def test_dvc_sees_other_weights(tmp_path, earlier):
    entry = dict(architecture="resnet10t", file="w.pth", layout="timm", mean=[0.5] * 3, std=[0.5] * 3, licence=None)
    (tmp_path / "w.pth").write_bytes(b"1")
    inits = dict(backbones=["resnet10t"], baselines=["file-w"], inits=["file-w"])
    params = study(tmp_path, study=inits, weight_files=dict(w=entry), pretrain=dict(start="earlier"))
    start, weights = start_digest(params, "cmid"), weights_digest(params)
    export_backbone(create("resnet10t", img_size=64), earlier, FACTS)
    (tmp_path / "w.pth").write_bytes(b"2")
    assert start_digest(params, "cmid") != start
    assert weights_digest(params) != weights


def test_a_start_need_not_fit_a_backbone_that_the_study_does_not_begin_from_it(tmp_path, earlier):
    inits = dict(backbones=["resnet10t", "resnet18"], methods=["cmid", "onward"], baselines=[])
    changes = dict(recipes=dict(onward=dict(start="earlier")))
    used = ["onward-resnet10t", "cmid-resnet18"]
    assert start_digest(study(tmp_path, study=inits | dict(inits=used), **changes), "onward")
    params = study(tmp_path, study=inits | dict(inits=[*used, "onward-resnet18"]), **changes)
    with pytest.raises(CmidError, match="recipes.onward.start: earlier holds resnet10t"):
        start_digest(params, "onward")


def test_the_stages_depend_on_the_hashes_of_weights():
    stages = load_yaml(ROOT / "dvc.yaml")["stages"]
    written = {key for out in stages["folders"]["outs"] for key in out}
    assert {"digests/starts", "digests/weights.json"} <= written
    assert "digests/starts/${item.recipe}.json" in stages["pretrain"]["deps"]
    assert "digests/weights.json" in stages["baselines"]["do"]["deps"]


def test_the_command_writes_the_hashes_and_refuses_what_is_not_there(tmp_path):
    def digest():
        code = "from cmid.study.digest import cmid_digest; cmid_digest()"
        command = [sys.executable, "-c", code, "--folders", "digests/folders.json", "--starts", "digests"]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    study(tmp_path)
    assert digest().returncode == 0
    assert json.loads((tmp_path / "digests/starts/cmid.json").read_text()) == dict(start=None)
    assert json.loads((tmp_path / "digests/weights.json").read_text()) == {}
    study(tmp_path, pretrain=dict(start="nowhere"))
    done = digest()
    assert done.returncode == 1
    assert "pretrain.start: " in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_study_elsewhere_still_finds_the_weights(tmp_path, monkeypatch):
    from cmid.study import study as module

    (tmp_path / "w.pth").write_bytes(b"1")
    (tmp_path / "earlier").mkdir()
    entry = dict(architecture="resnet10t", file="w.pth", layout="timm", mean=[0.5] * 3, std=[0.5] * 3, licence=None)
    base = load_yaml(ROOT / "params.yaml")
    values = study_params(base, dict(weight_files=dict(w=entry), pretrain=dict(start="earlier")))
    anchored = module._anchored(values, tmp_path)
    assert anchored["weight_files"]["w"]["file"] == str(tmp_path / "w.pth")
    assert anchored["pretrain"]["start"] == str(tmp_path / "earlier")
