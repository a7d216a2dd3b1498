"Attention maps equal what the networks compute: against q k^T by hand, place by place, on real Swins and ViTs."

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
    AttentionMaps,
    attention_figure,
    attention_maps,
    attention_metrics,
    capture_attention,
    cosine_map,
    keep_mass,
    normalised_entropy,
    swin_attention,
    vit_attention,
)

ROOT = Path(__file__).parents[2]
SWIN = "swin_tiny_patch4_window7_224"
RUN_STAGE = """
import sys
from cmid.study.runner import run_notebook
notebook, out, init = sys.argv[1:]
run_notebook(notebook, out, dict(smoke=True, init=init))
"""


def last_block(encoder):
    blocks = encoder.model.layers[-1].blocks if encoder.name == SWIN else encoder.model.blocks
    return blocks[-1]


def uneven(encoder):
    "An encoder whose attention is far from uniform; without training it nearly is."
    block = last_block(encoder)
    with torch.no_grad():
        block.attn.qkv.weight.mul_(6)
        if encoder.name == SWIN:
            block.attn.relative_position_bias_table.normal_()
    return encoder, block


def uneven_encoder(name, side):
    torch.manual_seed(0)
    return uneven(backbones.create(name, img_size=side).eval())


def input_of(layer, encoder, images):
    "What a layer gets in a forward pass."
    inputs = []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        encoder(images)
    hook.remove()
    return inputs[0]


def scores(attention, x, heads):
    "q k^T / sqrt(d) of tokens (N, C): (heads, N, N)."
    q, k, _ = attention.qkv(x).view(len(x), 3, heads, -1).permute(1, 2, 0, 3)
    return q @ k.mT / q.shape[-1] ** 0.5


class SwinByHand:
    "What each place of one map (h, w, C) receives, query by query, from the geometry alone; no padding beside a shift."

    def __init__(self, block, x, heads=24):
        self.h, self.w, channels = x.shape
        self.window, self.shift, self.heads = block.window_size, block.shift_size, heads
        tokens = x.reshape(-1, channels)
        padding = torch.zeros(1, channels)
        with_padding = scores(block.attn, torch.cat([tokens, padding]), heads)
        self.scores = with_padding[:, :-1, :-1]
        self.to_padding = with_padding[:, :-1, -1]
        rows, columns = self.window
        self.bias = block.attn.relative_position_bias_table.view(2 * rows - 1, 2 * columns - 1, heads)

    def rolled(self, row, column):
        "Where a place of the image is in the rolled map."
        return (row - self.shift[0]) % self.h, (column - self.shift[1]) % self.w

    def region(self, row, column):
        "Places attend to each other within a window, if they did not come from opposite edges."
        y, x = self.rolled(row, column)
        return y // self.window[0], x // self.window[1], row < self.shift[0], column < self.shift[1]

    def weights(self, row, column):
        "Attention of one query: places of the image (None for padding) and (heads, places)."
        y, x = self.rolled(row, column)
        (rows, columns), query = self.window, row * self.w + column
        top, left = y // rows * rows, x // columns * columns
        keys, values = [], []
        for i in range(top, top + rows):
            for j in range(left, left + columns):
                bias = self.bias[y - i + rows - 1, x - j + columns - 1]
                if i >= self.h or j >= self.w:
                    keys.append(None)
                    values.append(self.to_padding[:, query] + bias)
                    continue
                place = (i + self.shift[0]) % self.h, (j + self.shift[1]) % self.w
                if self.region(*place) == self.region(row, column):
                    keys.append(place[0] * self.w + place[1])
                    values.append(self.scores[:, query, keys[-1]] + bias)
        return keys, torch.stack(values).softmax(0)

    def received(self):
        "(heads, h, w), each of sum 1."
        received = torch.zeros(self.heads, self.h * self.w)
        for row in range(self.h):
            for column in range(self.w):
                for key, weight in zip(*self.weights(row, column)):
                    if key is not None:
                        received[:, key] += weight
        return (received / received.sum(1, keepdim=True)).view(self.heads, self.h, self.w)


@pytest.mark.parametrize(
    "side, size",
    [
        pytest.param(64, (64, 64), id="one window"),
        pytest.param(128, (128, 128), id="one larger window"),
        pytest.param(224, (224, 224), id="one window of 7 x 7"),
        pytest.param(64, (128, 128), id="windows of 2 x 2"),
        pytest.param(224, (64, 128), id="padded windows of 7 x 7, not square"),
        pytest.param(128, (128, 256), id="not square"),
        pytest.param(96, (96, 160), id="padded windows of 3 x 3, not square"),
    ],
)
@torch.no_grad()
def test_swin_attention_by_hand(side, size):
    encoder, block = uneven_encoder(SWIN, side)
    images = torch.randn(2, 3, *size)
    maps = swin_attention(encoder, images)
    assert maps.shape == (2, 24, size[0] // 32, size[1] // 32)
    assert torch.allclose(maps.sum((2, 3)), torch.ones(2, 24), atol=1e-5)

    tokens = block.norm1(input_of(block.norm1, encoder, images))
    wanted = torch.stack([SwinByHand(block, x).received() for x in tokens])
    assert torch.allclose(maps, wanted, atol=1e-5)
    assert wanted.amax() > 2 * wanted.mean()  # far from uniform, so the comparison means something


@torch.no_grad()
def test_shifted_windows_are_rolled_back():
    encoder, block = uneven_encoder(SWIN, 448)
    assert (block.window_size, block.shift_size) == ((7, 7), (3, 3))  # as timm builds it
    images = torch.randn(1, 3, 448, 448)
    tokens = block.norm1(input_of(block.norm1, encoder, images))
    assert torch.allclose(swin_attention(encoder, images)[0], SwinByHand(block, tokens[0]).received(), atol=1e-5)
    description = SELF, "places of the same window", "last block, windows of 7 x 7, shifted"
    assert attention_maps(encoder, images)[1:] == description


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_224"])
@pytest.mark.parametrize("side, size", [(64, (64, 64)), (224, (224, 224)), (64, (64, 128))])
@torch.no_grad()
def test_vit_attention_by_hand(name, side, size):
    encoder, block = uneven_encoder(name, side)
    images = torch.randn(2, 3, *size)
    heads = block.attn.num_heads
    weights = [scores(block.attn, x, heads).softmax(-1) for x in input_of(block.attn, encoder, images)]
    weights = torch.stack(weights)
    for queries, received in (("places", weights[:, :, 1:, 1:].mean(2)), ("class", weights[:, :, 0, 1:])):
        wanted = (received / received.sum(-1, keepdim=True)).view(2, heads, size[0] // 16, size[1] // 16)
        assert torch.allclose(vit_attention(encoder, images, queries), wanted, atol=1e-6)
        assert wanted.amax() > 2 * wanted.mean()


@torch.no_grad()
def test_vit_without_class_token():
    encoder = backbones.create("vit_little_patch16_reg1_gap_256", img_size=64).eval()
    assert encoder.model.num_prefix_tokens == 1
    assert not encoder.model.has_class_token
    images = torch.randn(1, 3, 64, 64)
    from_places = vit_attention(encoder, images, "places")
    assert torch.equal(vit_attention(encoder, images, "class"), from_places)
    assert attention_maps(encoder, images, "class").asking == "all places"
    assert from_places.shape[2:] == (4, 4)  # the register token is not a place


def hooks(encoder):
    "Hooks and fused attention of all modules."
    return [
        (name, len(module._forward_pre_hooks), len(module._forward_hooks), getattr(module, "fused_attn", None))
        for name, module in encoder.named_modules()
    ]


@pytest.mark.parametrize("name", [SWIN, "vit_tiny_patch16_224", "resnet18"])
@torch.no_grad()
def test_reading_attention_changes_nothing(name):
    torch.manual_seed(0)
    encoder = backbones.create(name, img_size=64).eval()
    images = torch.randn(3, 3, 64, 64)
    last_map = encoder(images)[-1]
    state = {key: value.clone() for key, value in encoder.state_dict().items()}
    hooks_before = hooks(encoder)
    attention_maps(encoder, images)
    assert torch.equal(encoder(images)[-1], last_map)
    assert hooks(encoder) == hooks_before
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("name", [SWIN, "vit_tiny_patch16_224"])
@torch.no_grad()
def test_capture_ends_after_an_error(name):
    encoder = backbones.create(name, img_size=64).eval()
    images = torch.randn(1, 3, 64, 64)
    hooks_before, last_map = hooks(encoder), encoder(images)[-1]
    with pytest.raises(ZeroDivisionError):
        with capture_attention(last_block(encoder).attn):
            assert torch.allclose(encoder(images)[-1], last_map, atol=1e-5)  # unfused, the same
            raise ZeroDivisionError
    assert hooks(encoder) == hooks_before


def test_dropout_is_not_in_the_weights():
    encoder, block = uneven_encoder("vit_tiny_patch16_224", 64)
    block.attn.attn_drop.p = 0.5
    encoder.train()
    with capture_attention(block.attn) as weights, torch.no_grad():
        encoder(torch.randn(1, 3, 64, 64))
    assert torch.allclose(weights[0].sum(-1), torch.ones(1, 3, 17), atol=1e-5)


@torch.no_grad()
def test_cosine_map_of_a_cnn():
    encoder = backbones.create("resnet18", 13, 64).eval()
    images = torch.randn(2, 13, 64, 96)
    features = encoder(images)[-1].double().numpy()
    pooled = features.mean((2, 3), keepdims=True)
    cosine = (features * pooled).sum(1) / np.sqrt((features**2).sum(1) * (pooled**2).sum(1))
    assert cosine.min() > 0
    wanted = cosine / cosine.sum((1, 2), keepdims=True)
    assert np.allclose(cosine_map(encoder, images)[:, 0], wanted, atol=1e-6)
    assert attention_maps(encoder, images).kind == COSINE


@pytest.mark.parametrize("mass", (0.05, 0.3, 0.6, 0.95, 1.0))
def test_kept_is_the_smallest_set_that_holds_the_mass(mass):
    maps = torch.from_numpy(np.random.default_rng(0).dirichlet(np.full(12, 0.3), 50)).view(50, 3, 4)
    kept = keep_mass(maps, mass)
    held = (maps * kept).sum((1, 2))
    weakest_kept = torch.where(kept, maps, 2.0).amin((1, 2))
    strongest_left = torch.where(kept, -1.0, maps).amax((1, 2))
    assert (held >= mass * (1 - 1e-5)).all()
    assert (held - weakest_kept < mass).all()  # without its weakest place it does not hold the mass
    assert (strongest_left <= weakest_kept).all()


def test_entropy_against_its_definition():
    p = np.random.default_rng(0).dirichlet(np.ones(20), 7)
    wanted = -(p * np.log(p)).sum(1) / np.log(20)
    assert np.allclose(normalised_entropy(torch.from_numpy(p).view(7, 4, 5)), wanted)


def test_a_damaged_backbone_is_named():
    encoder = backbones.create("vit_tiny_patch16_224", img_size=64).eval()
    with torch.no_grad():
        last_block(encoder).attn.qkv.weight.fill_(float("nan"))
    with pytest.raises(CmidError, match="not finite"):
        attention_maps(encoder, torch.randn(1, 3, 64, 64))


def test_metrics_of_a_cnn_are_json():
    encoder = backbones.create("resnet18", img_size=64).eval()
    metrics = attention_metrics(attention_maps(encoder, torch.randn(2, 3, 64, 64)), 0.6)
    assert json.loads(json.dumps(metrics)) == metrics
    assert (metrics["places"], metrics["heads"], metrics["mass_area_even"]) == (4, 1, 0.75)
    assert 0.5 <= metrics["mass_area"] <= 0.75


def test_the_figure_describes_itself():
    maps = AttentionMaps(torch.full((2, 9, 4, 4), 1 / 16), COSINE, "the pooled feature", "last map")
    fig = attention_figure(torch.rand(2, 1, 64, 64), maps, 0.5, "its one network", ["river", ""])
    caption = fig._supxlabel.get_text()
    for words in (COSINE, "not attention", "its one network", "50%", "last map"):
        assert words in caption
    heads = [f"head {i}" for i in (1, 3, 4, 6, 7, 9)]
    assert [ax.get_ylabel() for ax in fig.axes[::2]] == ["image", "mean", "holds 50%", *heads]
    assert fig.axes[0].get_title() == "river"
    assert fig.axes[4].get_xlabel() == "50% of area"
    assert fig.get_figwidth() < 4.5


@pytest.mark.slow
def test_stage_of_a_baseline(tmp_path):
    "A ResNet baseline has no attention, and the stage's output says so."
    copy = tmp_path / "out.ipynb"
    command = [sys.executable, "-c", RUN_STAGE, "nbs/pipeline/attention.ipynb", str(copy), "random-resnet18"]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    text = copy.read_text()
    assert "random-resnet18: its one network; cosine with the pooled feature" in text
    assert "image/png" in text
