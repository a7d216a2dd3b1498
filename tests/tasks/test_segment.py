"Segmentation: every pixel counted once, batches of any size, crops that repeat, and whole scenes from tiles."

import json
import os
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix, f1_score, jaccard_score, precision_recall_fscore_support
from torch.utils._python_dispatch import TorchDispatchMode

from cmid.base.errors import CmidError
from cmid.base.params import Params
from cmid.base.runtime import step_generator
from cmid.base.scores import mean_iou
from cmid.data.labelled import IGNORE, palette
from cmid.method import backbones
from cmid.data.labelled import windows
from cmid.tasks.dense import blended, decided
from cmid.tasks.finetune import resolved
from cmid.method.backbones import STRIDES, Pyramid
from cmid.tasks.dense import pixel_loss
from cmid.tasks.finetune import largest_image
from cmid.tasks.segment import PUBLISHED_SEGMENTATION, BinPooling, SegmentationCrops, Segmenter, pixel_confusion, scaled_crop, photometric_distortion, error_overlay, fine_tune_segmentation, segmentation_examples, paint_mask, segmentation_figure, segmentation_scene_figure, segmentation_scores, segment, inference_tiles, upernet, window_of_mixed_classes
from cmid.train.checkpoint import export_backbone

CPU = torch.device("cpu")
PAPER = Params(profile="paper").segment
PLAIN = Params(profile="smoke").segment.model_copy(
    update=dict(crop=64, epochs=1, batch=2, channels=16, precision="float32")
)
NETWORKS = "resnet18", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"
quiet = lambda line: None
changed = lambda settings, **o: settings.model_copy(update=o)


class Fake:
    "Labelled images in memory."

    task, folder = "segment", "fake"

    def __init__(self, items, train, test, classes=3):
        self.items, self.splits, self.classes = (
            items,
            dict(train=np.asarray(train), test=np.asarray(test)),
            [f"c{i}" for i in range(classes)],
        )
        self.bands, self.sizes, self.names = (
            len(items[0][0]),
            np.array([y.shape for _, y in items]),
            [f"img/{i}.png" for i in range(len(items))],
        )

    def __len__(self):
        return len(self.items)

    def image(self, i):
        x = self.items[i][0].view()
        x.flags.writeable = False
        return x

    def mask(self, i):
        y = self.items[i][1].view()
        y.flags.writeable = False
        return y


def stripes(n=4, size=(64, 64), bands=3, classes=3, seed=0):
    "Images in which a class is a level of brightness, with some noise and an ignored corner."
    rng = np.random.default_rng(seed)
    items = []
    for _ in range(n):
        y = np.repeat(np.repeat(rng.integers(0, classes, (-(-size[0] // 16), -(-size[1] // 16))), 16, 0), 16, 1)[
            : size[0], : size[1]
        ].astype("uint8")
        x = (40 + 80 * y[None] + rng.integers(0, 30, (bands, *size))).astype("uint8")
        y[:4, :4] = IGNORE
        items.append((x, y))
    return Fake(items, range(n - 1), [n - 1], classes)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Folders of untrained backbones by architecture and bands, made once."
    at, made = tmp_path_factory.mktemp("models"), {}

    def get(name="resnet18", bands=3, side=64):
        if (key := (name, bands, side)) not in made:
            torch.manual_seed(0)
            card = dict(
                mean=[0.4] * bands,
                std=[0.25] * bands,
                bands=[f"b{i}" for i in range(bands)],
                method="random",
                parameters={},
                data_hash=None,
                data_licence=None,
                provenance={},
                health={},
            )
            made[key] = export_backbone(backbones.create(name, bands, side), at / f"{name}-{bands}-{side}", card)
        return made[key]

    return get


# --- the recipe


def test_paper_profile_is_the_published_recipe():
    s = PAPER
    r, w = (resolved(s, o, PUBLISHED_SEGMENTATION) for o in ("resnet50", "swin_base_patch4_window7_224"))
    assert (s.epochs, s.batch, s.crop, s.scale, s.channels, s.auxiliary, s.warmup_steps, s.test) == (
        50,
        8,
        512,
        [0.5, 2.0],
        512,
        0.4,
        100,
        "test",
    )
    assert (r.optimiser, r.lr, r.momentum, r.weight_decay, r.drop_path) == ("sgd", 0.01, 0.9, 1e-4, 0.0) and (
        w.optimiser,
        w.lr,
        w.weight_decay,
        w.drop_path,
    ) == ("adamw", 6e-5, 0.01, 0.3)


def test_drop_path_reaches_the_backbone(models):
    model, *_ = fine_tune_segmentation(models(), stripes(2), [0], changed(PLAIN, drop_path=0.3, batch=1), on=CPU, say=quiet)
    assert max(o.drop_prob for o in model.modules() if type(o).__name__ == "DropPath") == pytest.approx(0.3)


# --- pyramid


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [(64, 64), (96, 32)])
def test_four_maps_of_any_encoder(name, size):
    p = Pyramid(backbones.create(name, 2, 64)).eval()
    maps = p(torch.randn(1, 2, *size))
    assert [tuple(o.shape) for o in maps] == [
        (1, c, size[0] // s, size[1] // s) for c, s in zip(p.channels, STRIDES)
    ] and p.strides == [4, 8, 16, 32]


def test_own_maps_are_passed_on_and_a_single_one_is_rescaled():
    for name, level in (("resnet18", 3), ("vit_tiny_patch16_224", 2)):
        p, x = Pyramid(backbones.create(name, 3, 64)).eval(), torch.randn(1, 3, 64, 64)
        maps, own = p(x), p.encoder(x)
        assert torch.equal(maps[level], own[-1])
    assert torch.equal(maps[3], F.max_pool2d(own[0], 2)) and p.channels == [48, 96, 192, 192]
    assert torch.allclose(maps[1], F.conv_transpose2d(own[0], p.levels[1][0].weight, p.levels[1][0].bias, 2), atol=1e-5)


# --- network


@pytest.mark.parametrize("h,w", [(1, 1), (2, 3), (7, 16), (12, 5)])
def test_bins_are_adaptive_pooling(h, w):
    for k in (1, 2, 3, 6):
        x = torch.randn(2, 3, h, w, dtype=torch.float64)
        assert torch.allclose(BinPooling(k)(x), F.adaptive_avg_pool2d(x, k))


def test_the_decoder_still_has_the_parts_that_are_replaced():
    d = upernet([8, 16, 24, 32], 16)
    kinds = [[type(o).__name__ for o in (b[0], *b[1])] for b in d.psp.blocks]
    assert (
        kinds == [["Bins", "Conv2d", "GroupNorm", "ReLU"]] * 4
        and [b[0].size for b in d.psp.blocks] == [1, 2, 3, 6]
        and not [o for o in d.modules() if isinstance(o, torch.nn.AdaptiveAvgPool2d)]
    )
    maps = [torch.randn(1, c, 32 // s, 64 // s) for c, s in zip((8, 16, 24, 32), (1, 2, 4, 8))]
    kept = [o.clone() for o in maps]
    assert d([None, None, *maps]).shape == (1, 16, 32, 64) and all(map(torch.equal, maps, kept))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("bands", [1, 13])
def test_one_image_is_a_batch(name, bands):
    "A training step on a single crop of 64 px reaches every parameter but the mask token."
    torch.manual_seed(0)
    m = Segmenter(backbones.create(name, bands, 64), 3, 16)
    losses = m(torch.randn(1, bands, 64, 64), torch.randint(0, 3, (1, 64, 64), dtype=torch.uint8))
    sum(losses.values()).backward()
    assert list(losses) == ["segmentation", "auxiliary"]
    assert [k for k, p in m.named_parameters() if p.grad is None] == ["pyramid.encoder.mask_token"] and all(
        p.grad.isfinite().all() for p in m.parameters() if p.grad is not None
    )
    assert m.eval()(torch.randn(2, bands, 96, 32)).shape == (2, 3, 96, 32)


def test_auxiliary_loss_is_weighted_or_absent():
    x, y = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64), dtype=torch.uint8)
    torch.manual_seed(0)
    m = Segmenter(backbones.create("resnet18", 3, 64), 3, 16, 0.4).eval()
    with torch.no_grad():
        a = m(x, y)["auxiliary"]
        m.weight = 0.8
        assert torch.allclose(m(x, y)["auxiliary"], 2 * a)
        want = F.cross_entropy(F.interpolate(m.auxiliary(m.pyramid(x)[2]), (64, 64), mode="bilinear"), y.long())
        assert torch.allclose(a, 0.4 * want)
    assert Segmenter(backbones.create("resnet18", 3, 64), 3, 16, 0.0).auxiliary is None


def test_loss_is_torch_s_where_pixels_are_labelled():
    x = torch.randn(2, 4, 5, 6, requires_grad=True)
    y = torch.randint(0, 4, (2, 5, 6), dtype=torch.uint8)
    y[0, :3] = IGNORE
    assert torch.allclose(pixel_loss(x, y), F.cross_entropy(x, y.long(), ignore_index=IGNORE))
    assert pixel_loss(x.half(), y).dtype == torch.float32


def test_a_batch_without_labels_is_no_step():
    x = torch.randn(1, 4, 5, 6, requires_grad=True)
    loss = pixel_loss(x, torch.full((1, 5, 6), IGNORE, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == 0 and torch.equal(x.grad, torch.zeros_like(x))


# --- crops


def test_window_avoids_crops_of_one_class():
    y = np.zeros((8, 8), "uint8")
    y[:, 6:] = 1
    y[0] = IGNORE
    tries = torch.tensor([[0.0, 0.0], [0.5, 0.3], [0.9, 0.99]])
    assert (
        window_of_mixed_classes(y, 4, 4, tries) == (4, 4)
        and window_of_mixed_classes(y, 4, 4, tries[:2]) == (2, 1)
        and window_of_mixed_classes(np.full_like(y, IGNORE), 4, 4, tries) == (4, 4)
    )
    y[:] = np.arange(8) % 4
    assert window_of_mixed_classes(y, 4, 4, tries) == (0, 0)


def test_a_crop_at_scale_one_is_a_piece_of_the_image():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (5, 40, 50), "uint8"), rng.integers(0, 3, (40, 50), "uint8")
    a, b = scaled_crop(x, y, 32, 1.0, torch.tensor([[0.5, 0.5]]), torch.zeros(5, dtype=torch.uint8))
    assert np.array_equal(a, x[:, 4:36, 9:41]) and np.array_equal(b, y[4:36, 9:41])


@pytest.mark.parametrize("size", [(509, 544), (33, 200), (1, 1), (64, 64)])
@pytest.mark.parametrize("scale", [0.5, 0.73, 1.37, 2.0])
def test_crops_of_any_image_have_their_size(size, scale):
    "What is labelled is at least what the image gives, and beyond it everything is fill and ignored."
    x, y = np.full((2, *size), 77, "uint8"), np.zeros(size, "uint8")
    a, b = scaled_crop(x, y, 96, scale, torch.tensor([[0.3, 0.8]]), torch.tensor([5, 6], dtype=torch.uint8))
    assert a.shape == (2, 96, 96) and b.shape == (96, 96)
    inside = b != IGNORE
    h, w = inside.any(1).sum().item(), inside.any(0).sum().item()
    assert (
        inside[:h, :w].all()
        and (a[:, inside] == 77).all()
        and (a[0][~inside] == 5).all()
        and (a[1][~inside] == 6).all()
    )
    for got, n in zip((h, w), size):
        assert got == 96 if round(96 / scale) <= n else abs(got - max(1, n * scale)) <= 1


def test_image_and_mask_stay_together():
    "Of images whose brightness is their class, crops agree with their masks but for the borders that bilinear scaling blurs."
    data = stripes(3, (200, 150))
    c = SegmentationCrops(data, 64, [0.5, 2.0], [0.4] * 3, seed=3)
    far, moved = [], []
    for step in range(6):
        x, y = c[step, np.array([0, 2])]
        for a, b in zip(x.float(), y):
            level = [a[0][b == k].mean().item() for k in range(3) if (b == k).sum() > 200]
            far.append(all(u + 15 < v for u, v in zip(level, level[1:])))
            moved.append(b)
    assert all(far) and len({o.numpy().tobytes() for o in moved}) == 12


def test_crops_are_those_of_seed_and_step():
    data, rows = stripes(3, (80, 80)), np.array([2, 0])
    get = lambda seed, step: SegmentationCrops(data, 64, [0.5, 2.0], [0.4] * 3, seed)[step, rows]
    same = lambda a, b: all(map(torch.equal, a, b))
    assert same(get(1, 5), get(1, 5)) and not same(get(1, 5), get(1, 6)) and not same(get(1, 5), get(2, 5))


def test_colours_move_whole_images():
    "Equal pixels stay equal; other bands than three keep their differences, but for one factor; of three, hue and saturation move too."
    draws = lambda *values: torch.stack(
        [photometric_distortion(torch.tensor(values).view(-1, 1, 1).expand(-1, 2, 2), step_generator(0, i)) for i in range(80)]
    )
    out = draws(0.3, 0.4, 0.5)
    assert (out == out[..., :1, :1]).all() and out.min() >= 0 and out.max() <= 1
    steps = draws(0.3, 0.35, 0.4, 0.45)[..., 0, 0].diff(dim=1) / 0.05
    assert (
        torch.allclose(steps, steps[:, :1].expand(-1, 3), atol=1e-4)
        and 0.5 <= steps.min() < 0.6
        and 1.4 < steps.max() <= 1.5001
    )
    own = draws(0.3, 0.35, 0.4)[..., 0, 0].diff(dim=1)
    assert (
        0.2 < (torch.isclose(own[:, 0], own[:, 1], atol=1e-5)).float().mean() < 0.8
    )  # a hue that turns takes the middle out of the middle


# --- scores


def test_scores_by_hand():
    "Two images of one split, counted together: a mean of the images' scores would say something else."
    one = pixel_confusion(np.array([[0, 0], [0, 255]], "uint8"), np.array([[0, 0], [1, 1]], "uint8"), 3)
    two = pixel_confusion(np.array([[1]], "uint8"), np.array([[1]], "uint8"), 3)
    assert one.tolist() == [[2, 1, 0], [0, 0, 0], [0, 0, 0]] and two.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    s = segmentation_scores(one + two, ["a", "b", "c"])
    assert (
        s["miou"] == pytest.approx((2 / 3 + 1 / 2) / 2)
        and s["mf1"] == pytest.approx((0.8 + 2 / 3) / 2)
        and s["oa"] == 0.75
    )
    assert s["per_class"]["a"] == dict(
        iou=pytest.approx(2 / 3), f1=pytest.approx(0.8), precision=1.0, recall=pytest.approx(2 / 3), pixels=3
    )
    assert s["per_class"]["c"] == dict(iou=None, f1=None, precision=None, recall=None, pixels=0)
    assert np.mean([mean_iou(one), mean_iou(two)]) != pytest.approx(s["miou"])


def test_a_class_that_is_never_there_but_predicted_counts_as_zero():
    s = segmentation_scores(np.array([[3, 0, 1], [0, 2, 0], [0, 0, 0]]), ["a", "b", "c"])
    assert (
        s["per_class"]["c"]["iou"] == 0
        and s["miou"] == pytest.approx((3 / 4 + 1 + 0) / 3)
        and s["mf1"] == pytest.approx((6 / 7 + 1 + 0) / 3)
    )


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    k = 5
    truth, guess = rng.integers(0, k, 3000), rng.integers(0, k, 3000)
    guess[::2] = truth[::2]
    kept = rng.random(3000) < 0.8
    n = pixel_confusion(
        np.where(kept, truth, IGNORE).astype("uint8").reshape(50, 60), guess.astype("uint8").reshape(50, 60), k
    )
    t, g = truth[kept], guess[kept]
    assert n.tolist() == confusion_matrix(t, g).tolist()
    s = segmentation_scores(n, list("abcde"))
    p, r, f, count = precision_recall_fscore_support(t, g)
    assert (
        s["miou"] == pytest.approx(jaccard_score(t, g, average="macro"))
        and s["mf1"] == pytest.approx(f1_score(t, g, average="macro"))
        and s["oa"] == pytest.approx((t == g).mean())
    )
    for key, want in dict(iou=jaccard_score(t, g, average=None), precision=p, recall=r, f1=f, pixels=count).items():
        assert [o[key] for o in s["per_class"].values()] == pytest.approx(list(want))


def test_many_confusions_at_once():
    n = np.random.default_rng(0).integers(0, 9, (7, 2, 3, 3))
    n[0, 0, 2] = n[0, 0, :, 2] = 0
    got = mean_iou(n)
    assert got.shape == (7, 2) and got.ravel() == pytest.approx(
        [segmentation_scores(o, list("abc"))["miou"] for o in n.reshape(-1, 3, 3)]
    )


# --- the whole task


def test_stripes_are_learnt_and_every_pixel_is_scored(models):
    data = stripes(4, (75, 101))
    data.items[3][1][10:20] = IGNORE
    s = changed(PLAIN, epochs=12, optimiser="adamw", lr=2e-3, overlap=0.5, warmup_steps=4)
    metrics, epochs, kept = segment(models(), data, s, on=CPU, say=quiet, keep=[3])
    n = np.array(metrics["confusion"])
    truth = data.mask(3)
    assert (
        n.sum() == (truth != IGNORE).sum()
        and metrics["per_image"] == [n.ravel().tolist()]
        and [o["pixels"] for o in metrics["per_class"].values()] == [(truth == k).sum() for k in range(3)]
    )
    assert (
        n.tolist() == pixel_confusion(truth, kept[3], 3).tolist()
        and list(kept) == [3]
        and metrics["oa"] > 1.5 * max(n.sum(1)) / n.sum()
        and epochs[-1]["loss"] < epochs[0]["loss"]
    )
    assert set(metrics) == {
        "images",
        "classes",
        "miou",
        "mf1",
        "oa",
        "per_class",
        "confusion",
        "per_image",
        "epoch",
        "train_images",
        "scored_on_training",
    } and (metrics["images"], metrics["train_images"], metrics["epoch"], metrics["scored_on_training"]) == (
        1,
        3,
        12,
        False,
    )
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_two_runs_agree_bit_for_bit(models):
    run = lambda seed: segment(models(), stripes(), changed(PLAIN, epochs=2), seed, CPU, quiet)[:2]
    a, b, c = run(0), run(0), run(1)
    assert a == b and a[1] != c[1]


@pytest.mark.parametrize(
    "name,bands,crop,size",
    [
        ("resnet18", 13, 64, (40, 70)),
        ("swin_tiny_patch4_window7_224", 3, 224, (64, 64)),
        ("vit_tiny_patch16_224", 13, 96, (70, 40)),
    ],
)
def test_any_network_bands_and_sizes(models, name, bands, crop, size):
    "A batch of two and a batch of one, images smaller than the crop, and inference on odd sizes."
    data = stripes(4, size, bands)
    lines = []
    metrics, *_ = segment(models(name, bands), data, changed(PLAIN, crop=crop), on=CPU, say=lines.append)
    assert sum(map(sum, metrics["confusion"])) == (data.mask(3) != IGNORE).sum() and any(
        "saturation" in o for o in lines
    ) == (bands != 3)


def test_scoring_what_was_learnt_from_is_said(models):
    data = stripes(2)
    data.splits["test"] = data.splits["train"]
    assert segment(models(), data, changed(PLAIN, batch=1), on=CPU, say=quiet)[0]["scored_on_training"] is True


def test_tiles_cover_and_blend(models):
    "A network that says what it sees says the same of a whole image, whatever the tiles."
    x = np.random.default_rng(0).integers(0, 256, (2, 150, 101), "uint8")
    got = blended(lambda o: o.float(), x, 64, 0.25, on=CPU)
    assert torch.allclose(got, torch.from_numpy(x).float(), atol=1e-3)
    seen = np.zeros((160, 128), int)
    for t, l, b, r in inference_tiles((150, 101), changed(PLAIN, overlap=0.25)):
        seen[t:b, l:r] += 1
    assert seen.min() >= 1 and seen.max() > 1


def test_a_large_scene_needs_little_beside_its_logits():
    "Of 12 classes: logits, weights and mask, and no second copy of the logits."
    logits = lambda x: x[:, :1].float() * torch.arange(12.0).view(-1, 1, 1)
    image = np.full((1, 1024, 1024), 9, "uint8")
    large = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            o = f(*args, **(kwargs or {}))
            large.update(
                {x.untyped_storage().data_ptr(): x for x in [o] if isinstance(x, torch.Tensor) and x.nbytes >= 2**23}
            )
            return o

    with Watch():
        mask = decided(blended(logits, image, 128, 0.0))
    assert (
        (mask == 11).all() and mask.dtype == np.uint8 and [tuple(o.shape) for o in large.values()] == [(12, 1024, 1024)]
    )


# --- what cannot be


def test_bad_input_is_one_line(models):
    data = stripes()
    run = lambda d=data, bands=3, **o: segment(models(bands=bands), d, changed(PLAIN, **o), on=CPU, say=quiet)
    none = Fake([(x, np.full_like(y, IGNORE)) for x, y in data.items], [0, 1], [2])
    far, other, odd = stripes(), stripes(), stripes()
    far.splits["test"] = np.array([2, 3])
    other.task = "change"
    odd.items[3][1][0, 5] = 77
    empty = stripes()
    empty.splits["test"] = np.array([], int)
    half = Fake([(x, y if i else np.full_like(y, IGNORE)) for i, (x, y) in enumerate(data.items)], [0], [2])
    for call, why in {
        lambda: run(
            train="trian"
        ): r"segment.train: fake has no split 'trian' \(did you mean 'train'\?\); known: train, test",
        lambda: run(test="val"): "segment.test: fake has no split 'val'",
        lambda: run(none): "no pixel of the 2 images of split 'train' is labelled",
        lambda: run(half): "no pixel of the 1 images of split 'train'",
        lambda: run(far): "fake: 1 images are in both 'train' and 'test', the first is img/2.png",
        lambda: run(other): "fake: is for change, not for segment",
        lambda: run(empty): "segment.test: split 'test' of fake is empty",
        lambda: run(
            odd
        ): r"fake: the mask of img/3.png holds 77, but classes are 0 to 2: .* cmid_stage labels -p dataset fake",
        lambda: run(bands=4): r"fake: images have 3 bands, \S+ was made for 4",
        lambda: run(crop=32, batch=1): "segment.batch: batch norm would see one crop of 32 px",
        lambda: run(lr=1e30, epochs=3): "loss is not finite at step",
    }.items():
        with pytest.raises(CmidError, match=why) as e:
            call()
        assert "\n" not in str(e.value)


# --- figures


def test_colours_tell_classes_apart():
    from matplotlib.colors import to_rgb

    from cmid.tasks.segment import ERROR_COLOUR

    assert (
        len(np.unique(palette(21).round(3), axis=0)) == 21
        and palette(40).shape == (40, 3)
        and np.array_equal(palette(40)[:5], palette(5))
    )
    assert (
        min(np.abs(palette(21) - to_rgb(ERROR_COLOUR)).max(1)) > 0.1 and min(np.abs(palette(21) - 1).max(1)) > 0.1
    )  # errors and what is ignored are no class
    assert paint_mask(np.array([[1, IGNORE]]), 2).tolist() == [[palette(2)[1].tolist(), [1, 1, 1]]]


def test_errors_are_where_truth_and_prediction_differ():
    from matplotlib.colors import to_rgb

    from cmid.tasks.segment import ERROR_COLOUR

    x = error_overlay(np.full((3, 1, 3), 100, "uint8"), np.array([[0, 1, IGNORE]], "uint8"), np.array([[0, 0, 0]], "uint8"))[0]
    assert np.ptp(x[0]) == 0 and tuple(x[1]) == to_rgb(ERROR_COLOUR) and x[2].tolist() == [1, 1, 1]


@pytest.mark.parametrize("bands,classes", [(1, 2), (3, 6), (13, 30)])
def test_figures_of_any_scene(bands, classes):
    data = stripes(3, (70, 300), bands, min(classes, 3))
    data.classes = [f"a class with a long name {i}" for i in range(classes)]
    seen = segmentation_examples(
        data,
        [0, largest_image(data, [1, 2])],
        {i: np.full(y.shape, classes - 1, "uint8") for i, (_, y) in enumerate(data.items)},
    )
    a, b = segmentation_figure(seen, data.classes), segmentation_scene_figure(seen[0], data.classes, inference_tiles(data.sizes[0], PLAIN))
    panels = [o for o in a.axes if o.images]
    assert (
        len(panels) == 8
        and [o.get_title() for o in panels[:4]] == ["image", "truth", "prediction", "errors"]
        and len([o for o in b.axes if o.images]) == 4
    )
    assert {f"a class with a long name {i}" for i in {0, 1, min(classes, 3) - 1, classes - 1}} | {
        "wrong",
        "not labelled",
    } <= {t.get_text() for t in a.legends[0].get_texts()}
    assert len(b.axes[0].patches) == len(windows(96, 320, 64, 0))
    [o.savefig(os.devnull, format="png") for o in (a, b)]


@pytest.mark.parametrize("size", [(3, 3000), (3000, 5), (1, 1), (1, 900)])
def test_figures_of_strips(size):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, size).astype("uint8")
    data = Fake([(rng.integers(0, 256, (3, *size)).astype("uint8"), y)], [0], [0])
    seen = segmentation_examples(data, [0], {0: y})
    for fig, most in (
        (segmentation_figure(seen, data.classes), 280),
        (segmentation_scene_figure(seen[0], data.classes, inference_tiles(size, PLAIN)), 700),
    ):
        fig.savefig(os.devnull, format="png")
        shapes = {o.images[0].get_array().shape[:2] for o in fig.axes if o.images}
        k = -(-max(size) // most)
        assert shapes == {tuple(n // min(k, n) for n in size)}


def test_scores_are_written_before_anything_is_drawn():
    "A fault of a figure never costs a training."
    for name in ("segment", "change"):
        cells = json.loads((Path(__file__).parents[2] / f"nbs/pipeline/{name}.ipynb").read_text())["cells"]
        code = "".join(s for c in cells for s in [*c["source"], chr(10)] if c["cell_type"] == "code")
        assert 0 < code.index("stage.finish(") < code.index("stage.figure(")


def test_the_largest_image_of_a_split():
    data = Fake(
        [(np.zeros((3, h, w), "uint8"), np.zeros((h, w), "uint8")) for h, w in ((9, 9), (5, 20), (4, 4))], [0], [0, 2]
    )
    assert largest_image(data, [0, 2]) == 0 and largest_image(data, [0, 1, 2]) == 1
