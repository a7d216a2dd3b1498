"An exported file gives the numbers of the network that it was made of, by itself and with what it says of itself."

import json

import numpy as np
import onnxruntime
import pytest
import torch

import cmid.apply.export as export
from cmid.apply.export import TOLERANCE, backbone_graph, cmid_export, export_onnx, task_graph
from cmid.apply.graphs import (
    BackboneGraph,
    box_difference,
    detection_difference,
    finish_detections,
    relative_difference,
)
from cmid.base.errors import CmidError
from cmid.tasks.boxes import rotated_iou
from cmid.tasks.card import save_task, task_card
from cmid.tasks.dense import UNET, UNet, UNetCard
from cmid.tasks.load import load_task
from cmid.train.checkpoint import load_backbone
from tests.tools.embeddings import backbone
from tests.tools.networks import made_network, no_images, small_settings

NAMES = dict(resnet="resnet18", vit="vit_tiny_patch16_224", swin="swin_tiny_patch4_window7_224")


def session_of(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(path, images):
    session = session_of(path)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(images=images))))


def images_of(*shape):
    return np.random.default_rng(7).random(shape, np.float32)


def close(found, wanted):
    wanted = wanted.numpy()
    return np.abs(found - wanted).max() <= TOLERANCE * max(1, np.abs(wanted).max())


class Failing(BackboneGraph):
    "Stands for a network that the exporter does not know"

    def forward(self, images):
        raise RuntimeError("no such operator\nand a long trace")


class Changed(BackboneGraph):
    "Stands for an exporter that makes a mistake"

    def forward(self, images):
        *maps, embedding = super().forward(images)
        return *maps, embedding + (0.001 if torch.compiler.is_exporting() else 0)


# Commands


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    "Folder of a backbone, and the file that the command made of it"
    folder = tmp_path_factory.mktemp("export")
    model = backbone(folder / "random-resnet18", bands=4)
    cmid_export([str(model), str(folder / "files"), "--onnx"])
    return model, folder / "files/random-resnet18.onnx"


def test_the_command_writes_one_file_of_the_networks_name(command):
    _, path = command
    assert [o.name for o in path.parent.iterdir()] == ["random-resnet18.onnx"]


def test_a_backbone_gives_maps_and_their_mean_for_any_size_and_batch(command):
    model, path = command
    encoder, card = load_backbone(model)
    mean, std = (torch.tensor(o).view(-1, 1, 1) for o in (card.mean, card.std))
    for shape in ((1, 4, 64, 64), (5, 4, 64, 64), (2, 4, 96, 160)):
        images = images_of(*shape)
        with torch.no_grad():
            wanted = encoder((torch.from_numpy(images) - mean) / std)
        found = run(path, images)
        assert [*found] == ["stride_4", "stride_8", "stride_16", "stride_32", "embedding"]
        assert all(close(found[f"stride_{stride}"], of_map) for stride, of_map in zip((4, 8, 16, 32), wanted))
        assert close(found["embedding"], wanted[-1].mean((2, 3)))


@pytest.mark.parametrize("sides", [(100, 64), (64, 100), (31, 31)])
def test_sides_that_are_not_multiples_of_32_are_refused(command, sides):
    with pytest.raises(Exception, match="cannot be reshaped"):
        run(command[1], images_of(1, 4, *sides))
    assert session_of(command[1]).get_modelmeta().custom_metadata_map["multiple_of"] == "32"


def test_the_file_says_what_a_program_needs(command):
    model, path = command
    facts = session_of(path).get_modelmeta().custom_metadata_map
    held = json.loads((model / "card.json").read_text())
    assert facts["task"] == "backbone"
    assert "inside the graph" in facts["normalisation"]
    assert str(held["mean"]) in facts["normalisation"]
    assert json.loads(facts["bands"]) == held["bands"]
    assert json.loads(facts["card"]) == held
    assert facts["size"] == "multiples of 32 px"
    assert len(facts["card_hash"]) == 64
    assert {"tile", "stretch", "cmid", "input", "output"} <= {*facts}


def test_nothing_of_the_machine_is_in_the_file(command):
    content = command[1].read_bytes()
    assert b"site-packages" not in content
    assert b".py" not in content


def refused(capsys, *arguments):
    "The one line that a command ends with"
    with pytest.raises(SystemExit) as stopped:
        cmid_export([str(o) for o in arguments])
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_what_cannot_be_exported_is_refused_in_one_line(command, tmp_path, capsys):
    model, path = command
    before = path.read_bytes()
    assert "name the format that is wanted: --onnx" in refused(capsys, model, tmp_path / "x.onnx")
    assert "exists; give --overwrite" in refused(capsys, model, path, "--onnx")
    assert "is inside of the network's folder" in refused(capsys, model, model / "x.onnx", "--onnx")
    assert "holds no network" in refused(capsys, path.parent, tmp_path / "x.onnx", "--onnx")
    assert "only networks for change detection have heads" in refused(
        capsys, model, tmp_path / "x.onnx", "--onnx", "--head", "bit"
    )
    (tmp_path / "file").write_text("")
    assert "is not a place for a file" in refused(capsys, model, tmp_path / "file", "--onnx")
    assert path.read_bytes() == before
    assert [o.name for o in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Failing, "PyTorch cannot export this network (no such operator)"),
        (Changed, "its results differ from the network"),
    ],
)
def test_a_file_that_is_wrong_does_not_get_its_name(tmp_path, kind, reason, capsys):
    graph = backbone_graph(backbone(tmp_path / "model"))
    graph.module.__class__ = kind
    graph.any_size = False
    out = tmp_path / "out"
    out.mkdir()
    (out / "x.onnx").write_text("the file before")
    with pytest.raises(CmidError) as raised:
        export_onnx(graph, out / "x.onnx")
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)
    assert [(o.name, o.read_text()) for o in out.iterdir()] == [("x.onnx", "the file before")]


@pytest.mark.slow
def test_weights_that_no_file_holds_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LARGEST_FILE", 2**20)
    facts = export_onnx(backbone_graph(backbone(tmp_path / "model")), tmp_path / "out/x.onnx")
    assert facts["files"] == ["x.onnx", "x.onnx.data"]
    assert (tmp_path / "out/x.onnx").stat().st_size < 2**20 < (tmp_path / "out/x.onnx.data").stat().st_size
    assert run(tmp_path / "out/x.onnx", images_of(1, 3, 64, 64))["embedding"].shape == (1, 512)


# Every task on every kind of backbone


@pytest.mark.slow
@pytest.mark.parametrize("kind", NAMES)
def test_backbones(tmp_path, kind):
    graph = backbone_graph(backbone(tmp_path / "model", 4, NAMES[kind]))
    facts = export_onnx(graph, tmp_path / "x.onnx")
    assert facts["difference"] <= TOLERANCE
    assert facts["size"] == ("multiples of 32 px" if kind == "resnet" else "64x64 px")


@pytest.mark.slow
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("task", ["classify", "segment"])
def test_logits_of_images(tmp_path, task, kind):
    model = made_network(tmp_path / f"{task}-land-random", task, 3, 4, NAMES[kind])
    export_onnx(task_graph(model), tmp_path / "x.onnx")
    images = images_of(2, 4, 64, 64)
    with torch.no_grad():
        wanted = load_task(model)(torch.from_numpy(images))
    found = run(tmp_path / "x.onnx", images)
    assert close(found["logits"], wanted)
    if task == "classify":
        assert close(found["probabilities"], wanted.softmax(1))
    assert json.loads(session_of(tmp_path / "x.onnx").get_modelmeta().custom_metadata_map["classes"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("head", ["bit", "difference"])
def test_logits_of_pairs(tmp_path, head, kind):
    model = made_network(tmp_path / "change-dates-random", "change", 2, 3, NAMES[kind], heads=("bit", "difference"))
    export_onnx(task_graph(model, head), tmp_path / "x.onnx")
    pairs = images_of(3, 2, 3, 64, 64)
    with torch.no_grad():
        wanted = load_task(model, head)(torch.from_numpy(pairs))
    assert close(run(tmp_path / "x.onnx", pairs)["logits"], wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", NAMES)
def test_detections_finished_from_a_file_are_those_of_the_network(tmp_path, kind):
    model = made_network(tmp_path / "detect-objects-random", "detect", 3, 3, NAMES[kind], settings=dict(score=0.2))
    export_onnx(task_graph(model), tmp_path / "x.onnx")
    images, network = images_of(2, 3, 64, 64), load_task(model)
    found = run(tmp_path / "x.onnx", images)
    with torch.no_grad():
        wanted = network(torch.from_numpy(images))
    for boxes, scores, want in zip(found["boxes"], found["scores"], wanted):
        got = finish_detections(boxes, scores, network.network.settings)
        x, y = got["boxes"][:, :2].T
        inside = (x >= 0) & (x < 64) & (y >= 0) & (y < 64)  # as `load_task` leaves out what lies in the frame
        got = {key: value[inside] for key, value in got.items()}
        assert len(want["scores"]) > 3
        assert torch.allclose(got["scores"].sort().values, want["scores"].sort().values, atol=1e-5)
        assert (rotated_iou(want["boxes"], got["boxes"]).max(1).values > 0.99).all()


MANY = dict(channels=64, head_hidden=64, proposals=400, score=0.2)  # so many that rounding decides which are kept


@pytest.mark.slow
def test_a_detector_of_many_proposals_agrees_whatever_way_ties_went(tmp_path):
    model = made_network(tmp_path / "detect-objects-random", "detect", 15, side=256, settings=MANY)
    facts = export_onnx(task_graph(model), tmp_path / "x.onnx")
    assert facts["difference"] <= TOLERANCE / 10
    black = np.zeros((3, 3, 256, 256), np.float32)  # every anchor of a kind has the same objectness
    found, graph = run(tmp_path / "x.onnx", black), task_graph(model).module
    assert [*found] == graph.outputs
    assert detection_difference(graph, torch.from_numpy(black), [*found.values()]) <= TOLERANCE


@pytest.mark.slow
def test_a_file_that_keeps_other_proposals_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "PROPOSAL_NMS_IOU", 0.75)
    model = made_network(tmp_path / "detect-objects-random", "detect", 3, side=64)
    with pytest.raises(CmidError, match="was not written, its results are .* proposals that its own scores do not"):
        export_onnx(task_graph(model), tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


def test_what_is_not_a_number_never_agrees():
    a = torch.tensor([1.0, 2])
    assert relative_difference(a, torch.tensor([1.0, torch.nan])) == torch.inf
    assert relative_difference(a, torch.tensor([1.0, torch.inf])) == torch.inf
    box = torch.tensor([[5.0, 5, 4, 2, 0]])
    assert box_difference(box, box * torch.nan) == torch.inf


@pytest.mark.slow
@pytest.mark.parametrize("task", ["segment", "change"])
def test_a_network_without_a_backbone(tmp_path, task):
    classes, dates = (2, 2) if task == "change" else (3, 1)
    card = task_card(
        task,
        UNET,
        "land",
        "none",
        no_images(task, classes, 64, {}),
        small_settings(task, 64),
        UNetCard(3, ["red", "green", "blue"], [0.4] * 3, [0.2] * 3),
        {},
        dict(commit="0" * 40, versions={}),
    )
    torch.manual_seed(0)
    model = save_task(tmp_path / f"{task}-land-none", UNet(3, classes, dates=dates), card)
    export_onnx(task_graph(model), tmp_path / "x.onnx")
    images = images_of(2, *([2] if task == "change" else []), 3, 96, 64)
    with torch.no_grad():
        wanted = load_task(model)(torch.from_numpy(images))
    assert close(run(tmp_path / "x.onnx", images)["logits"], wanted)
