"Encoders and heads against the reference numbers (`CMID_PARITY`: the folder that holds them)."

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
from cmid.train.checkpoint import from_published, to_published

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


def fill(sd, published=lambda k: k):
    "Weights of a state dict, drawn by the published name; counters stay"
    return {k: named_fill(published(k), v.shape) if v.is_floating_point() else v.clone() for k, v in sd.items()}


def close(got, want, tol):
    want = torch.as_tensor(want)
    err = (got - want).abs().max()
    assert got.dtype == want.dtype and got.shape == want.shape
    assert err <= tol * want.abs().max(), f"off by {err / want.abs().max():.1e} of the largest value, {tol} allowed"


def rounding(f32, f64):
    "How far the reference's own float32 is from its float64: batch statistics over 18 values, 53 layers deep, depend on the order of sums"
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
    z, (dtype, tol) = numbers("backbone_resnet50"), PRECISIONS[precision]
    e = create("resnet50")
    assert sorted(e.state_dict()) == sorted(z["state_dict_keys"])
    e.load_state_dict(fill(e.state_dict()))
    e.to(dtype).train(training)
    masks = torch.from_numpy(z["mask"]).bool() if masked else None
    if training and precision == "f32":
        tol = max(tol, rounding(z[f"f32/{case}"], z[f"f64/{case}"]))
    close(e(torch.from_numpy(z[image]).to(dtype), masks)[-1], z[f"{precision}/{case}"], tol)
    if training:
        close(e.model.bn1.running_mean, z[f"{precision}/bn1_running_mean_after"], PRECISIONS[precision][1])


def test_masks_of_blocks_and_of_the_stem_are_the_same():
    z = numbers("backbone_resnet50")
    fine = torch.from_numpy(z["mask"]).bool()
    assert torch.equal(repeat_to(fine[:, ::8, ::8], (24, 24)), fine)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_swin_base(precision):
    z, (dtype, tol) = numbers("backbone_swin"), PRECISIONS[precision]
    e = create("swin_base_patch4_window7_224")
    e.model.load_state_dict(from_published(fill(to_published(e.model.state_dict()), lambda k: f"model.{k}"), e.model))
    e.mask_token.copy_(named_fill("mask_token", e.mask_token.shape))
    e.to(dtype).eval()
    x, masks = torch.from_numpy(z["x"]), torch.from_numpy(z["mask"]).bool()
    close(
        e(fill_mean(x, masks[:, ::8, ::8]).to(dtype), masks)[-1], z[f"base/out_masked_{precision}"], tol
    )  # masked pixels hold the mean
    if precision == "f32":
        close(e(x)[-1], z["base/out_nomask_f32"], tol)


def swin_tiny():
    m = timm.models.SwinTransformer(
        embed_dim=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), num_classes=0, dynamic_img_size=True
    )
    return SwinEncoder(m, "tiny", 3, 224, [16, 32, 64, 128], [4, 8, 16, 32], 16).eval()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_swin_from_stored_weights(precision):
    z, (dtype, tol) = numbers("backbone_swin"), PRECISIONS[precision]
    e, head = swin_tiny(), "tiny/mmcv_sd/"
    published = {k.removeprefix(head): torch.from_numpy(z[k]) for k in z.files if k.startswith(head)}
    ours = from_published(published, e.model)
    e.model.load_state_dict(ours)
    e.to(dtype)
    close(e(torch.from_numpy(z["x"]).to(dtype))[-1], z[f"tiny/out_{precision}"], tol)
    for k in [k for k in z.files if k.startswith("tiny/timm_sd/")]:
        assert np.array_equal(ours[k.removeprefix("tiny/timm_sd/")], z[k])
    back = to_published(ours)
    assert back.keys() == published.keys() and all(torch.equal(back[k], published[k]) for k in back)


def weights(z, case):
    return {k.removeprefix(f"{case}/sd/"): torch.from_numpy(z[k]) for k in z.files if k.startswith(f"{case}/sd/")}


def prototype_head(z, case):
    sd = weights(z, case)
    assert (sd.pop("last_layer.weight_g") == 1).all()
    head = PrototypeHead(32, 64, 16, 48, batch_norm=case == "local_bn")
    head.load_state_dict(
        {k: v for k, v in sd.items() if k.startswith("mlp.")} | {"weight_v": sd["last_layer.weight_v"][..., 0]}
    )
    return head


@pytest.mark.parametrize("case", ["local_bn", "local_nobn"])
def test_prototype_head(case):
    z = numbers("heads")
    x = torch.from_numpy(z[f"{case}/x"])
    head = prototype_head(z, case)
    close(head.eval()(x), z[f"{case}/eval_out"], 2e-6)
    close(head.train()(x), z[f"{case}/train_out"], 2e-6)
    for k in [k for k in z.files if k.startswith(f"{case}/after_train/")]:
        close(head.get_buffer(k.removeprefix(f"{case}/after_train/")), z[k], 2e-6)
    close(prototype_head(z, case).double().train()(x.double()), z[f"{case}/train_out_f64"], 1e-9)


def test_projector():
    z = numbers("heads")
    sd = weights(z, "mlp")
    x = torch.from_numpy(z["mlp/x"])
    p = Projector(32, 64, 16)
    p.load_state_dict({k.replace("layer.0.0", "mlp.0").replace("layer.0.3", "mlp.2"): v for k, v in sd.items()})
    close(p.mlp(x), z["mlp/out"], 2e-6)
    close(p(x), z["mlp/normalized_out"], 2e-6)
    close(
        p(x[:, :, None, None].expand(-1, -1, 2, 3)), z["mlp/normalized_out"], 2e-6
    )  # a constant map averages to itself


@pytest.mark.parametrize("stride", [4, 32])
def test_pixel_decoder(stride):
    z = numbers("heads")
    case = f"mim_head{stride}"
    x = torch.from_numpy(z[f"{case}/x"])
    d = PixelDecoder(x.shape[1], stride)
    d.load_state_dict({k.replace("decoder_pred.", ""): v for k, v in weights(z, case).items()})
    close(d(x), z[f"{case}/out"], 2e-6)
