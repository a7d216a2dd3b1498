"Opened networks give what the stages scored, bit for bit; folders of strangers are refused in one line."

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cmid.base.errors import CmidError
from cmid.base.params import Params
from cmid.data.dataset import Prepared
from cmid.data.labelled import Labelled
from cmid.study.smoke import smoke_study
from cmid.tasks.card import save_task, task_card, task_scores
from cmid.tasks.change import change, change_mask
from cmid.tasks.classify import classify, predict_logits
from cmid.tasks.dense import blended, decided
from cmid.tasks.detect import detect, detect_image
from cmid.tasks.finetune import normalised
from cmid.tasks.load import load_task
from cmid.tasks.segment import segment
from cmid.train.checkpoint import read_card
from tests.tools.networks import FIRST, made_network
from tests.tools.runs import changed, quiet

CPU = torch.device("cpu")
NETWORKS = [("resnet18", 3), ("vit_tiny_patch16_224", 5)]
SIZES = [(64, 64), (45, 61)]  # an odd one is padded
TRUNCATED = "is truncated or not a safetensors file"


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def floats(images):
    return torch.from_numpy(np.asarray(images)).float() / 255


def opened_bytes(opened):
    "An opened network as `blended` takes it: bytes in, logits out."
    return lambda x: opened(x.float() / 255)


def as_scored(opened, seen=None):
    "The network of an opened one as the stages call it, which is given what it gave."
    card = opened.card

    def predict(x):
        logits = opened.network(normalised(x, card.mean, card.std))
        if seen is not None:
            seen.append(logits)
        return logits

    return predict


# --- random networks of every kind, on images of odd sizes


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name, bands", [*NETWORKS, ("swin_tiny_patch4_window7_224", 3)])
@torch.no_grad()
def test_segmentation_is_as_in_scoring(tmp_path, name, bands, size):
    opened = load_task(made_network(tmp_path / "a", "segment", bands=bands, architecture=name))
    image, seen = pixels(0, bands, *size), []
    blended(as_scored(opened, seen), image, 64, 0.0)
    assert torch.equal(seen[0][..., : size[0], : size[1]], opened(floats(image)[None]))
    large = pixels(1, bands, 100, 150)
    scored = blended(as_scored(opened), large, 64, 0.5)
    assert torch.equal(scored, blended(opened_bytes(opened), large, 64, 0.5))


@pytest.mark.parametrize("name, bands", NETWORKS)
@pytest.mark.parametrize("head", ["bit", "difference"])
@torch.no_grad()
def test_change_is_as_in_scoring(tmp_path, name, bands, head):
    folder = made_network(tmp_path / "a", "change", bands=bands, architecture=name, heads=("difference", "bit"))
    opened = load_task(folder, head)
    first, second = pixels(0, 2, bands, 45, 61)
    settings = changed(Params(profile="smoke").change, crop=64, batch=4)
    scored = change_mask(opened.network, first, second, opened.card.mean, opened.card.std, settings)
    pair = np.stack([first, second])
    assert (scored == decided(blended(opened_bytes(opened), pair, 64, 0.0))).all()
    seen = []
    blended(as_scored(opened, seen), pair, 64, 0.0)
    assert torch.equal(seen[0][..., :45, :61], opened(floats(pair)[None]))


@pytest.mark.parametrize("task", ["segment", "change"])
@torch.no_grad()
def test_a_unet_is_as_in_scoring(tmp_path, task):
    folder = made_network(tmp_path / "a", task, classes=2, bands=5, heads=["unet"], network="unet")
    opened, dates, seen = load_task(folder), [2] * (task == "change"), []
    assert opened.card.backbone is None
    image = pixels(0, *dates, 5, 45, 61)
    blended(as_scored(opened, seen), image, 64, 0.0)
    assert torch.equal(seen[0][..., :45, :61], opened(floats(image)[None]))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name, bands", NETWORKS)
@torch.no_grad()
def test_classification_is_as_in_scoring(tmp_path, name, bands, batch):
    opened = load_task(made_network(tmp_path / "a", "classify", bands=bands, architecture=name))
    images = pixels(0, batch, bands, 64, 64)
    scored = predict_logits(opened.network, images, range(batch), opened.card.mean, opened.card.std)
    assert torch.equal(scored, opened(floats(images)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 2])  # in training: one tile a step is another memory format
@pytest.mark.parametrize("name, bands", NETWORKS)
@torch.no_grad()
def test_detections_are_as_in_scoring(tmp_path, name, bands, batch, size):
    folder = made_network(tmp_path / "a", "detect", bands=bands, architecture=name, settings=dict(batch=batch))
    opened = load_task(folder)
    image = pixels(0, bands, *size)
    scored = detect_image(opened.network, image, opened.network.settings, opened.card.mean, opened.card.std)
    found = opened(floats(image)[None])[0]
    assert len(scored["boxes"])
    for key, value in scored.items():
        assert torch.equal(value, found[key])


# --- networks that were trained here


@pytest.fixture(scope="module")
def smoke():
    root = smoke_study(prepared=["scenes"], models=["random-resnet18"], labelled=["land", "dates", "objects"])
    return root, Params(root)


def kept(smoke, task, function, images, scores=True):
    "Metrics of one run, its models by head, and the folder that they are kept in."
    root, params = smoke
    init, trained = root / "models/random-resnet18", {}
    settings = changed(getattr(params, task), epochs=2 if task == "classify" else 1)
    metrics, *_ = function(init, images, settings, 0, CPU, quiet, trained=trained.update)
    models = trained.get("models") or {FIRST[task]: trained["model"]}
    first, *others = models
    facts = task_scores(task, metrics), dict(commit=None)
    card = task_card(task, first, "land", init.name, images, trained["settings"], read_card(init), *facts)
    folder = save_task(root / f"models/{task}", models[first], card, {head: models[head] for head in others})
    return metrics, models, folder


def test_a_trained_segmenter_is_kept(smoke):
    labelled = Labelled(smoke[0] / "prepared/land")
    metrics, models, folder = kept(smoke, "segment", segment, labelled)
    opened, model = load_task(folder), models["upernet"]
    card, image = opened.card, labelled.image(0)
    assert card.scores["mIoU"].score == metrics["miou"]
    assert card.classes == list(labelled.classes)
    assert (card.tile, card.settings["lr"], card.settings["drop_path"]) == (smoke[1].segment.crop, 0.01, 0.0)
    scored = blended(lambda x: model(normalised(x, card.mean, card.std)), image, card.tile, 0.0)
    assert torch.equal(scored, blended(opened_bytes(opened), image, card.tile, 0.0))


def test_trained_heads_of_change_detection_are_kept(smoke):
    labelled = Labelled(smoke[0] / "prepared/dates")
    metrics, models, folder = kept(smoke, "change", change, labelled)
    pair = np.stack([labelled.image(0), labelled.second(0)])
    for head, model in models.items():
        opened = load_task(folder, head)
        assert opened.card.scores[f"F1 ({head})"].score == metrics["heads"][head]["f1"]
        settings = changed(smoke[1].change, epochs=1)
        scored = change_mask(model, *pair, opened.card.mean, opened.card.std, settings)
        assert (scored == decided(blended(opened_bytes(opened), pair, settings.crop, 0.0))).all()


def test_a_trained_detector_is_kept(smoke):
    labelled = Labelled(smoke[0] / "prepared/objects")
    metrics, models, folder = kept(smoke, "detect", detect, labelled)
    opened, model = load_task(folder), models["oriented-rcnn"]
    assert opened.card.scores["mAP"].score == pytest.approx(metrics["map"])
    image = np.ascontiguousarray(labelled.image(0)[:, : opened.card.tile - 9, : opened.card.tile])
    scored = detect_image(model, image, model.settings, opened.card.mean, opened.card.std)
    with torch.no_grad():
        found = opened(floats(image)[None])[0]
    assert len(scored["boxes"])
    assert all(torch.equal(scored[key], found[key]) for key in scored)


def test_a_trained_classifier_is_kept(smoke):
    prepared = Prepared(smoke[0] / "prepared/scenes")
    metrics, models, folder = kept(smoke, "classify", classify, prepared)
    opened = load_task(folder)
    run = metrics["finetune"]["1.0"]
    assert opened.card.scores["accuracy"].model_dump() == {key: run[key] for key in ("low", "high")} | dict(
        score=run["accuracy"], images=metrics["test_images"], on_training=False
    )
    test = prepared.splits["test"]
    scored = predict_logits(models["linear"], prepared, test, opened.card.mean, opened.card.std)
    with torch.no_grad():
        assert torch.equal(scored, opened(floats(prepared[test])))
    assert opened.card.side == prepared.side


# --- what is asked for, and what is refused


def test_a_head_of_change_detection_is_chosen(tmp_path):
    folder = made_network(tmp_path / "a", "change", heads=("bit", "difference"))
    images = floats(pixels(0, 1, 2, 3, 64, 64))
    assert type(load_task(folder).network.head).__name__ == "BIT"
    assert type(load_task(folder, "difference").network.head).__name__ == "Identity"
    with torch.no_grad():
        assert (load_task(folder)(images) - load_task(folder, "difference")(images)).abs().max() > 1e-3
    with pytest.raises(CmidError, match="has no head 'bits'; it has bit, difference"):
        load_task(folder, "bits")


def test_images_of_another_shape_or_type_are_refused(tmp_path):
    network = load_task(made_network(tmp_path / "a", bands=5, architecture="resnet18"))
    with pytest.raises(CmidError, match=r"images are \(1, 3, 64, 64\), but this network takes \(B, 5, H, W\)"):
        network(torch.rand(1, 3, 64, 64))
    with pytest.raises(CmidError, match="divide bytes by 255"):
        network(torch.zeros(1, 5, 64, 64, dtype=torch.uint8))
    for shape in ((1, 5, 0, 64), (1, 5, 64, 0)):
        with pytest.raises(CmidError, match="without a pixel"):
            network(torch.zeros(shape))


def test_weights_of_a_stranger_are_refused_in_one_line(tmp_path):
    path = made_network(tmp_path / "a") / "model.safetensors"
    content, tensors = path.read_bytes(), load_file(path)
    key = "head.1.weight"
    wrong = {
        f"{key} is missing": {name: tensor for name, tensor in tensors.items() if name != key},
        f"{key} is (3, 17, 1, 1)": tensors | {key: torch.zeros(3, 17, 1, 1)},
        "more does not belong": tensors | dict(more=torch.zeros(1)),
    }
    for message, held in wrong.items():
        save_file(held, path)
        with pytest.raises(CmidError) as caught:
            load_task(path.parent)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    for damaged in (content[:1000], content[:4], b"", b"\x80\x04K\x01."):
        path.write_bytes(damaged)
        with pytest.raises(CmidError, match=TRUNCATED):
            load_task(path.parent)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        load_task(path.parent)


def test_a_card_that_asks_for_a_huge_network_is_refused_before_it_is_built(tmp_path):
    path = made_network(tmp_path / "a", "change") / "card.json"
    held = json.loads(path.read_text())
    for key, value in dict(decoder_layers=10**12, channels=2**40, tokens=2**40).items():
        path.write_text(json.dumps(held | dict(settings=held["settings"] | {key: value})))
        message = r"tensors, too few for the decoder_layers|card.json: describes no network|model.safetensors: \S+ is"
        with pytest.raises(CmidError, match=message) as caught:
            load_task(path.parent)
        assert "\n" not in str(caught.value)
    path.write_text(json.dumps(held | dict(backbone=held["backbone"] | dict(architecture="vit_giant_patch14_224"))))
    with pytest.raises(CmidError):
        load_task(path.parent)


def test_loading_changes_no_random_number(tmp_path):
    folder = made_network(tmp_path / "a")
    before = torch.get_rng_state()
    load_task(folder)
    assert (torch.get_rng_state() == before).all()
