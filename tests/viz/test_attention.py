"Attention maps are what the networks compute: against q k^T by hand, place by place, on real Swins and ViTs."

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cmid.base.errors import CmidError
from cmid.method import backbones
from cmid.viz.attention import (
    COSINE,
    SELF,
    Looks,
    attention_figure,
    attention_metrics,
    captured,
    cosine_map,
    entropy,
    keep_mass,
    look,
    swin_attention,
    vit_attention,
)

ROOT = Path(__file__).parents[2]
SWIN = "swin_tiny_patch4_window7_224"


def lively(name, side, bands=3):
    "An encoder whose attention is far from even: what is learnt of a network without training is loud."
    torch.manual_seed(0)
    encoder = backbones.create(name, bands, side).eval()
    block = encoder.model.layers[-1].blocks[-1] if name == SWIN else encoder.model.blocks[-1]
    with torch.no_grad():
        block.attn.qkv.weight.mul_(6)
        if name == SWIN:
            block.attn.relative_position_bias_table.normal_()
    return encoder, block


def given(layer, encoder, images):
    "What a layer is given in a forward pass."
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, o: seen.append(o[0]))
    with torch.no_grad():
        encoder(images)
    hook.remove()
    return seen[0]


def scores(attn, x, heads):
    "q k^T / sqrt(d) of tokens (N, C): (heads, N, N)."
    q, k, _ = attn.qkv(x).view(len(x), 3, heads, -1).permute(1, 2, 0, 3)
    return q @ k.mT / q.shape[-1] ** 0.5


def swin_by_hand(block, x, heads=24):
    "What each place of one map (h, w, C) receives, query by query, from the geometry alone; no padding beside a shift."
    (h, w, C), (wh, ww), (sh, sw) = x.shape, block.window_size, block.shift_size
    s, table = (
        scores(block.attn, x.reshape(-1, C), heads),
        block.attn.relative_position_bias_table.view(2 * wh - 1, 2 * ww - 1, heads),
    )
    zero = scores(block.attn, torch.cat([x.reshape(-1, C), torch.zeros(1, C)]), heads)[
        :, :-1, -1
    ]  # of a place with padding, which is a token of zeros
    rolled = lambda r, c: ((r - sh) % h, (c - sw) % w)
    room = lambda r, c: (
        rolled(r, c)[0] // wh,
        rolled(r, c)[1] // ww,
        r < sh,
        c < sw,
    )  # window; and which edge it came from
    got = torch.zeros(heads, h * w)
    for r in range(h):
        for c in range(w):
            (a, b), keys, values = rolled(r, c), [], []
            for y in range(a // wh * wh, a // wh * wh + wh):
                for z in range(b // ww * ww, b // ww * ww + ww):
                    inside = y < h and z < w
                    at = ((y + sh) % h, (z + sw) % w)
                    if inside and room(*at) != room(r, c):
                        continue
                    keys.append(at[0] * w + at[1] if inside else None)
                    values.append(
                        (s[:, r * w + c, keys[-1]] if inside else zero[:, r * w + c])
                        + table[a - y + wh - 1, b - z + ww - 1]
                    )
            for k, p in zip(keys, torch.stack(values).softmax(0)):
                if k is not None:
                    got[:, k] += p
    return (got / got.sum(1, keepdim=True)).view(heads, h, w)


# side it was built for, images given: one window; windows of 2 x 2; padded windows of 7 x 7; not square; one window, not square
@pytest.mark.parametrize(
    "side, size",
    [
        (64, (64, 64)),
        (128, (128, 128)),
        (224, (224, 224)),
        (64, (128, 128)),
        (224, (64, 128)),
        (128, (128, 256)),
        (96, (96, 160)),
    ],
)
@torch.no_grad()
def test_swin_is_q_times_k(side, size):
    encoder, block = lively(SWIN, side)
    images = torch.randn(2, 3, *size)
    got = swin_attention(encoder, images)
    x = given(block.norm1, encoder, images)
    assert got.shape == (2, 24, size[0] // 32, size[1] // 32) and torch.allclose(
        got.sum((2, 3)), torch.ones(2, 24), atol=1e-5
    )
    want = torch.stack([swin_by_hand(block, o) for o in block.norm1(x)])
    assert torch.allclose(got, want, atol=1e-5) and want.amax() > 2 * want.mean()  # and far from even


@torch.no_grad()
def test_shifted_windows_are_rolled_back():
    torch.manual_seed(0)
    encoder = backbones.create(SWIN, img_size=448).eval()
    block = encoder.model.layers[-1].blocks[-1]
    assert block.window_size == (7, 7) and block.shift_size == (3, 3)  # as timm builds it
    block.attn.qkv.weight.mul_(6)
    block.attn.relative_position_bias_table.normal_()
    images = torch.randn(1, 3, 448, 448)
    x = block.norm1(given(block.norm1, encoder, images))
    assert torch.allclose(swin_attention(encoder, images)[0], swin_by_hand(block, x[0]), atol=1e-5)
    assert look(encoder, images)[1:] == (SELF, "places of the same window", "last block, windows of 7 x 7, shifted")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_224"])
@pytest.mark.parametrize("side, size", [(64, (64, 64)), (224, (224, 224)), (64, (64, 128))])
@torch.no_grad()
def test_vit_is_q_times_k(name, side, size):
    encoder, block = lively(name, side)
    images = torch.randn(2, 3, *size)
    heads = block.attn.num_heads
    h, w = size[0] // 16, size[1] // 16
    a = torch.stack([scores(block.attn, o, heads).softmax(-1) for o in given(block.attn, encoder, images)])
    for queries, rows in (("places", a[:, :, 1:, 1:].mean(2)), ("class", a[:, :, 0, 1:])):
        want = (rows / rows.sum(-1, keepdim=True)).view(2, heads, h, w)
        assert (
            torch.allclose(vit_attention(encoder, images, queries), want, atol=1e-6) and want.amax() > 2 * want.mean()
        )


@torch.no_grad()
def test_vit_without_class_token():
    encoder = backbones.create("vit_little_patch16_reg1_gap_256", img_size=64).eval()
    assert encoder.model.num_prefix_tokens == 1 and not encoder.model.has_class_token
    images = torch.randn(1, 3, 64, 64)
    assert (
        torch.equal(vit_attention(encoder, images, "class"), vit_attention(encoder, images, "places"))
        and look(encoder, images, "class").asking == "all places"
    )
    assert vit_attention(encoder, images).shape[2:] == (4, 4)  # the register token is no place


@pytest.mark.parametrize("name", [SWIN, "vit_tiny_patch16_224", "resnet18"])
@torch.no_grad()
def test_looking_changes_nothing(name):
    torch.manual_seed(0)
    encoder = backbones.create(name, img_size=64).eval()
    images = torch.randn(3, 3, 64, 64)
    before, state = encoder(images)[-1], {k: v.clone() for k, v in encoder.state_dict().items()}
    hooks = lambda: [
        (n, len(m._forward_pre_hooks), len(m._forward_hooks), getattr(m, "fused_attn", None))
        for n, m in encoder.named_modules()
    ]
    was = hooks()
    look(encoder, images)
    assert (
        torch.equal(encoder(images)[-1], before)
        and hooks() == was
        and all(torch.equal(v, state[k]) for k, v in encoder.state_dict().items())
    )
    if name != "resnet18":
        block = encoder.model.layers[-1].blocks[-1] if name == SWIN else encoder.model.blocks[-1]
        with captured(block.attn):
            assert torch.allclose(encoder(images)[-1], before, atol=1e-5)
        with pytest.raises(ZeroDivisionError):
            with captured(block.attn):
                1 / 0
        assert hooks() == was


def test_dropout_is_not_in_the_weights():
    encoder, block = lively("vit_tiny_patch16_224", 64)
    block.attn.attn_drop.p = 0.5
    encoder.train()
    images = torch.randn(1, 3, 64, 64)
    with captured(block.attn) as seen, torch.no_grad():
        encoder(images)
    assert torch.allclose(seen[0].sum(-1), torch.ones(1, 3, 17), atol=1e-5)


@torch.no_grad()
def test_cosine_of_a_cnn():
    encoder = backbones.create("resnet18", 13, 64).eval()
    images = torch.randn(2, 13, 64, 96)
    f = encoder(images)[-1].double().numpy()
    p = f.mean((2, 3), keepdims=True)
    cosine = (f * p).sum(1) / np.sqrt((f**2).sum(1) * (p**2).sum(1))
    assert cosine.min() > 0 and np.allclose(
        cosine_map(encoder, images)[:, 0], cosine / cosine.sum((1, 2), keepdims=True), atol=1e-6
    )
    assert look(encoder, images).kind == COSINE


def test_kept_is_the_smallest_set_that_holds_the_mass():
    rng = np.random.default_rng(0)
    for mass in (0.05, 0.3, 0.6, 0.95, 1.0):
        maps = torch.from_numpy(rng.dirichlet(np.full(12, 0.3), 50)).view(50, 3, 4)
        kept = keep_mass(maps, mass)
        held = (maps * kept).sum((1, 2))
        weakest = torch.where(kept, maps, 2.0).amin((1, 2))
        assert (held >= mass * (1 - 1e-5)).all() and (held - weakest < mass).all()  # holds it; not without its weakest
        assert (torch.where(kept, -1.0, maps).amax((1, 2)) <= weakest).all()  # and nothing stronger was left out


def test_entropy_against_its_definition():
    p = np.random.default_rng(0).dirichlet(np.ones(20), 7)
    want = -(p * np.log(p)).sum(1) / np.log(20)
    assert np.allclose(entropy(torch.from_numpy(p).view(7, 4, 5)), want)


def test_a_broken_backbone_is_named():
    encoder = backbones.create("vit_tiny_patch16_224", img_size=64).eval()
    with torch.no_grad():
        encoder.model.blocks[-1].attn.qkv.weight.fill_(float("nan"))
    with pytest.raises(CmidError, match="not finite"):
        look(encoder, torch.randn(1, 3, 64, 64))


def test_the_figure_says_what_it_is():
    looks = Looks(torch.full((2, 9, 4, 4), 1 / 16), COSINE, "the pooled feature", "last map")
    fig = attention_figure(torch.rand(2, 1, 64, 64), looks, 0.5, "its one network", ["river", ""])
    said = fig._supxlabel.get_text()
    assert all(o in said for o in (COSINE, "not attention", "its one network", "50%", "last map"))
    assert [a.get_ylabel() for a in fig.axes[::2]] == ["image", "mean", "holds 50%"] + [
        f"head {i}" for i in (1, 3, 4, 6, 7, 9)
    ]
    assert fig.axes[0].get_title() == "river" and fig.axes[4].get_xlabel() == "50% of area" and fig.get_figwidth() < 4.5


def test_stage(tmp_path):
    "Alone, for a baseline that is asked for its teacher's class token: it has neither, and says so."
    metrics = attention_metrics(look(backbones.create("resnet18", img_size=64).eval(), torch.randn(2, 3, 64, 64)), 0.6)
    assert (
        json.loads(json.dumps(metrics)) == metrics
        and metrics["places"] == 4
        and metrics["heads"] == 1
        and 0.5 <= metrics["mass_area"] <= metrics["mass_area_even"] == 0.75
    )
    out = tmp_path / "out.ipynb"
    subprocess.run(
        [
            sys.executable,
            "-c",
            f"from cmid.study.stage import run_notebook; run_notebook('nbs/pipeline/attention.ipynb', {str(out)!r}, dict(smoke=True, init='random-resnet18'))",
        ],
        cwd=ROOT,
        check=True,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
    )
    text = out.read_text()
    assert "random-resnet18: its one network; cosine with the pooled feature" in text and "image/png" in text
