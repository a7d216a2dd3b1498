"Opened networks give what the stages scored, and folders of strangers are refused in one line."

import numpy as np
import pytest
import torch

from cmid.base.errors import CmidError
from cmid.tasks.load import load_task
from tests.tools.networks import made_network

NETWORKS = [("resnet18", 3), ("vit_tiny_patch16_224", 5), ("swin_tiny_patch4_window7_224", 3)]
SIZES = [(64, 64), (45, 61)]


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def floats(images):
    return torch.from_numpy(np.asarray(images)).float() / 255


TRUNCATED = "is truncated or not a safetensors file"


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


def test_weights_of_a_stranger_are_refused_in_one_line(tmp_path):
    from safetensors.torch import load_file, save_file

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


def test_loading_changes_no_random_number(tmp_path):
    folder = made_network(tmp_path / "a")
    before = torch.get_rng_state()
    load_task(folder)
    assert (torch.get_rng_state() == before).all()
