"Encoders and heads against reference numbers; `CMID_PARITY` names their folder."

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from cmid.method.backbones import SwinEncoder, create
from cmid.method.heads import PixelDecoder, Projector, PrototypeHead
from cmid.method.images import repeat_to
from cmid.method.masking import fill_mean
from cmid.train.convert import from_published, to_published

ROOT = os.environ.get("CMID_PARITY")
pytestmark = pytest.mark.skipif(not ROOT, reason="CMID_PARITY is not set: no reference numbers")
PRECISIONS = dict(f32=(torch.float32, 2e-6), f64=(torch.float64, 1e-9))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def numbers(name):
    return np.load(Path(ROOT) / f"{name}.npz", allow_pickle=False)


def named_fill(key, shape):
    spec = importlib.util.spec_from_file_location("named_fill", Path(ROOT) / "named_fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return torch.from_numpy(module.named_fill(key, shape))


def unchanged(key):
    return key


def fill(sd, published=unchanged):
    "Weights of a state dict, filled by the published name; counters stay."
    filled = {}
    for key, value in sd.items():
        filled[key] = named_fill(published(key), value.shape) if value.is_floating_point() else value.clone()
    return filled


def close(got, want, tol):
    want = torch.as_tensor(want)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    error = (got - want).abs().max() / want.abs().max()
    assert error <= tol, f"differs by {error:.1e} of the largest value, {tol} allowed"


def rounding(f32, f64):
    "Difference of the reference's own float32 and float64: batch statistics of 18 values depend on the order of sums."
    return float(np.abs(f32 - f64).max() / np.abs(f64).max())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "case,training,image,masked",
    [
        ("eval_nomask", False, "x", False),
        ("eval_masked", False, "x_masked", True),
        ("train_masked", True, "x_masked", True),
    ],
)
def test_resnet50(precision, case, training, image, masked):
    z, (dtype, tolerance) = numbers("backbone_resnet50"), PRECISIONS[precision]
    encoder = create("resnet50")
    assert sorted(encoder.state_dict()) == sorted(z["state_dict_keys"])
    encoder.load_state_dict(fill(encoder.state_dict()))
    encoder.to(dtype).train(training)
    masks = torch.from_numpy(z["mask"]).bool() if masked else None
    last_map = encoder(torch.from_numpy(z[image]).to(dtype), masks)[-1]
    allowed = tolerance
    if training and precision == "f32":
        allowed = max(tolerance, rounding(z[f"f32/{case}"], z[f"f64/{case}"]))
    close(last_map, z[f"{precision}/{case}"], allowed)
    if training:
        close(encoder.model.bn1.running_mean, z[f"{precision}/bn1_running_mean_after"], tolerance)


def test_masks_of_blocks_and_of_the_stem_are_the_same():
    z = numbers("backbone_resnet50")
    fine = torch.from_numpy(z["mask"]).bool()
    assert torch.equal(repeat_to(fine[:, ::8, ::8], (24, 24)), fine)


def published_swin_key(key):
    return f"model.{key}"


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_swin_base(precision):
    z, (dtype, tolerance) = numbers("backbone_swin"), PRECISIONS[precision]
    encoder = create("swin_base_patch4_window7_224")
    published = fill(to_published(encoder.model.state_dict()), published_swin_key)
    encoder.model.load_state_dict(from_published(published, encoder.model))
    encoder.mask_token.copy_(named_fill("mask_token", encoder.mask_token.shape))
    encoder.to(dtype).eval()
    x, masks = torch.from_numpy(z["x"]), torch.from_numpy(z["mask"]).bool()
    filled = fill_mean(x, masks[:, ::8, ::8]).to(dtype)
    close(encoder(filled, masks)[-1], z[f"base/out_masked_{precision}"], tolerance)
    if precision == "f32":
        close(encoder(x)[-1], z["base/out_nomask_f32"], tolerance)


def swin_tiny():
    model = timm.models.SwinTransformer(
        embed_dim=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), num_classes=0, dynamic_img_size=True
    )
    return SwinEncoder(model, "tiny", 3, 224, [16, 32, 64, 128], [4, 8, 16, 32], 16).eval()


def stored(z, prefix):
    "Tensors whose keys have a prefix, without it."
    return {key.removeprefix(prefix): torch.from_numpy(z[key]) for key in z.files if key.startswith(prefix)}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_swin_from_stored_weights(precision):
    z, (dtype, tolerance) = numbers("backbone_swin"), PRECISIONS[precision]
    encoder = swin_tiny()
    ours = from_published(stored(z, "tiny/mmcv_sd/"), encoder.model)
    encoder.model.load_state_dict(ours)
    encoder.to(dtype)
    close(encoder(torch.from_numpy(z["x"]).to(dtype))[-1], z[f"tiny/out_{precision}"], tolerance)


def test_swin_keys_convert_both_ways():
    z = numbers("backbone_swin")
    published = stored(z, "tiny/mmcv_sd/")
    ours = from_published(published, swin_tiny().model)
    for key, value in stored(z, "tiny/timm_sd/").items():
        assert torch.equal(ours[key], value)
    back = to_published(ours)
    assert back.keys() == published.keys()
    assert all(torch.equal(back[key], published[key]) for key in back)


def weights(z, case):
    return stored(z, f"{case}/sd/")


def prototype_head(z, case):
    sd = weights(z, case)
    assert (sd.pop("last_layer.weight_g") == 1).all()
    sd["weight_v"] = sd.pop("last_layer.weight_v")[..., 0]
    head = PrototypeHead(32, 64, 16, 48, batch_norm=case == "local_bn")
    head.load_state_dict({key: value.view(head.state_dict()[key].shape) for key, value in sd.items()})
    return head


@pytest.mark.parametrize("case", ["local_bn", "local_nobn"])
def test_prototype_head(case):
    z = numbers("heads")
    x = torch.from_numpy(z[f"{case}/x"]).mT[None]  # one view, places in rows
    head = prototype_head(z, case)
    close(head.eval()(x)[0].mT, z[f"{case}/eval_out"], 2e-6)
    close(head.train()(x)[0].mT, z[f"{case}/train_out"], 2e-6)
    for name, value in stored(z, f"{case}/after_train/").items():
        close(head.get_buffer(name), value, 2e-6)
    close(prototype_head(z, case).double().train()(x.double())[0].mT, z[f"{case}/train_out_f64"], 1e-9)


def test_projector():
    z = numbers("heads")
    sd = weights(z, "mlp")
    x = torch.from_numpy(z["mlp/x"])
    projector = Projector(32, 64, 16)
    projector.load_state_dict({k.replace("layer.0.0", "mlp.0").replace("layer.0.3", "mlp.2"): v for k, v in sd.items()})
    close(projector.mlp(x), z["mlp/out"], 2e-6)
    close(projector(x), z["mlp/normalized_out"], 2e-6)


@pytest.mark.parametrize("stride", [4, 32])
def test_pixel_decoder(stride):
    z = numbers("heads")
    case = f"mim_head{stride}"
    x = torch.from_numpy(z[f"{case}/x"])
    decoder = PixelDecoder(x.shape[1], stride)
    decoder.load_state_dict({k.replace("decoder_pred.", ""): v for k, v in weights(z, case).items()})
    close(decoder(x), z[f"{case}/out"], 2e-6)
