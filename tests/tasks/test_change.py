"Change detection: the published recipe, every pixel counted, and networks of any family, bands and size."

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, jaccard_score, precision_score, recall_score
from torch import nn

from cmid.base.errors import CmidError
from cmid.base.params import Params
from cmid.data import sample
from cmid.method import backbones
from cmid.tasks.change import (
    BIT,
    PUBLISHED_CHANGE,
    TokenAttention,
    ChangeNet,
    TransformerLayer,
    ChangePairs,
    Tokenizer,
    change,
    change_counts,
    change_mask,
    fine_tune_change_heads,
    change_scores,
    change_splits,
    change_curves_figure,
    change_error_image,
    change_figure,
    published_f1,
    score_change_heads,
    pairs_to_show,
)
from cmid.tasks.finetune import resolved
from cmid.train.checkpoint import export_backbone

CPU = torch.device("cpu")
PAPER = Params(profile="paper").change
changed = lambda settings, **o: settings.model_copy(update=o)
QUICK = changed(PAPER, epochs=1, batch=2, crop=64, optimiser="adamw", lr=1e-3, weight_decay=0.01, precision="float32")
quiet = lambda line: None


class Fake:
    "Labelled pairs in memory."

    task, folder, classes = "change", Path("fake"), ["unchanged", "changed"]

    def __init__(self, first, second, masks, **splits):
        self.a, self.b, self.m, self.splits = first, second, masks, {k: np.asarray(v) for k, v in splits.items()}
        self.bands, self.names, self.sizes = (
            len(first[0]),
            [f"{i}.png" for i in range(len(first))],
            np.array([o.shape for o in masks]),
        )

    def image(self, i):
        return self.a[i]

    def second(self, i):
        return self.b[i]

    def mask(self, i):
        return self.m[i]

    def __len__(self):
        return len(self.a)


def noise(n, bands=3, side=64, tested=1):
    "Pairs that say nothing, the last ones to be tested on."
    rng = np.random.default_rng(0)
    h, w = (side, side) if isinstance(side, int) else side
    a, b = rng.integers(0, 256, (2, n, bands, h, w), "uint8")
    return Fake(a, b, (rng.random((n, h, w)) < 0.3).astype("uint8"), train=range(n - tested), test=range(n - tested, n))


@pytest.fixture(scope="module")
def places():
    "Four generated places of 64 px: in three of them something was built or torn down."
    found = [sample.two_dates("residential", "test", i, changes=0 if i == 3 else 3, size=64) for i in range(4)]
    a, b = ([o[d].transpose(2, 0, 1) for o in found] for d in (0, 1))
    return Fake(
        a,
        b,
        [(o[2] > 0).astype("uint8") for o in found],
        train=range(4),
        test=range(4),
        half=[0, 1],
        rest=[2, 3],
        mixed=[1, 2],
        still=[3],
        none=[],
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Folders of untrained backbones by architecture and bands, made once."
    at, made = tmp_path_factory.mktemp("models"), {}

    def get(name="resnet18", bands=3, side=64):
        if (name, bands, side) not in made:
            torch.manual_seed(0)
            card = dict(
                mean=[0.45] * bands,
                std=[0.2] * bands,
                bands=[f"b{i}" for i in range(bands)],
                method="random",
                parameters={},
                data_hash=None,
                data_licence=None,
                provenance={},
                health={},
            )
            made[name, bands, side] = export_backbone(
                backbones.create(name, bands, side), at / f"{name}-{bands}-{side}", card
            )
        return made[name, bands, side]

    return get


# --- the recipe


def test_paper_profile_is_the_published_recipe():
    s = PAPER
    assert (
        s.epochs,
        s.batch,
        s.momentum,
        s.channels,
        s.tokens,
        s.encoder_layers,
        s.decoder_layers,
        s.crop,
        s.warmup_steps,
    ) == (200, 8, 0.99, 32, 4, 1, 8, 256, 0)
    for name, want in dict(
        resnet50=("sgd", 0.002, 5e-4, 0.0), swin_base_patch4_window7_224=("adamw", 6e-5, 0.01, 0.3)
    ).items():
        r = resolved(s, name, PUBLISHED_CHANGE)
        assert (r.optimiser, r.lr, r.weight_decay, r.drop_path) == want


# --- the network


def test_a_layer_is_pytorchs():
    torch.manual_seed(0)
    ours, theirs = (
        TransformerLayer(16, 4, 4),
        nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True),
    )
    a = ours.attention
    theirs.self_attn.in_proj_weight.data, theirs.self_attn.in_proj_bias.data = (
        torch.cat([o.weight.data for o in (a.query, a.key, a.value)]),
        torch.zeros(48),
    )
    for to, of in (
        (theirs.self_attn.out_proj, a.out),
        (theirs.norm1, ours.norm),
        (theirs.norm2, ours.mlp[0]),
        (theirs.linear1, ours.mlp[1]),
        (theirs.linear2, ours.mlp[3]),
    ):
        to.load_state_dict(of.state_dict())
    x = torch.randn(2, 7, 16)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_attention_is_its_formula():
    "Heads that are wider than the channels allow, a head at a time."
    torch.manual_seed(0)
    a = TokenAttention(6, 3, 5)
    x, t = torch.randn(2, 4, 6), torch.randn(2, 9, 6)
    q, k, v = (f(o).split(5, -1) for f, o in ((a.query, x), (a.key, t), (a.value, t)))
    want = torch.cat([torch.softmax(i @ j.transpose(1, 2) / 5**0.5, -1) @ l for i, j, l in zip(q, k, v)], -1)
    assert torch.allclose(a(x, t), want @ a.out.weight.T + a.out.bias, atol=1e-5)


def test_tokens_are_averages_of_pixels():
    torch.manual_seed(0)
    t, x = Tokenizer(5, 3), torch.randn(2, 5, 4, 6)
    p = x.flatten(2).transpose(1, 2)
    w = (p @ t.attention.weight[:, :, 0, 0].T).softmax(1)
    assert torch.allclose(
        t(x),
        torch.stack([torch.stack([(w[b, :, l, None] * p[b]).sum(0) for l in range(3)]) for b in range(2)]),
        atol=1e-5,
    )


def test_a_pixel_asks_the_tokens_of_its_date():
    "Of the two halves of the tokens, the first stays with the first date: tokens that are set to nothing do nothing to the other date."
    torch.manual_seed(0)
    b, maps = BIT(8, 4, 1, 3), torch.randn(2, 2, 8, 3, 5)
    plain, tokens = b(maps), b.tokens(maps)
    for date in (0, 1):
        cut = tokens.clone()
        cut[:, date] = torch.randn(2, 4, 8)
        b.tokens = lambda _: cut
        got = b(maps)
        assert torch.allclose(got[:, 1 - date], plain[:, 1 - date], atol=1e-6) and not torch.allclose(
            got[:, date], plain[:, date], atol=1e-3
        )
    assert len(b.encoder) == 1 and len(b.decoder) == 3 and b.pos_embed.shape == (1, 8, 8)


def test_the_heads_differ_by_the_transformer_alone():
    bit, plain = (ChangeNet(backbones.create("resnet18"), o, PAPER) for o in PAPER.heads)
    names = lambda m: {k for k, _ in m.named_parameters()}
    assert (
        names(plain) < names(bit)
        and all(k.startswith("head.") for k in names(bit) - names(plain))
        and names(bit) != names(plain)
    )


def test_difference_knows_no_order_of_dates():
    torch.manual_seed(0)
    m = ChangeNet(backbones.create("resnet18"), "difference", PAPER).eval()
    x = torch.randn(2, 2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(m(x), m(x.flip(1)), atol=1e-5) and not torch.allclose(
            m(x), m(x[:, :1].expand_as(x)), atol=1e-3
        )


def operations(node, seen):
    "Names of what a gradient passes"
    if node is not None and node not in seen:
        seen.add(node)
        [operations(o, seen) for o, _ in node.next_functions]
    return {o.name() for o in seen}


def test_the_loss_is_pytorchs_where_pixels_count():
    "And its gradient repeats on a GPU, where that of a loss over maps (nll_loss2d) does not."
    torch.manual_seed(0)
    m = ChangeNet(backbones.create("resnet18"), "difference", PAPER).eval()
    x, y = torch.randn(2, 2, 3, 64, 64), torch.randint(0, 2, (2, 64, 64), dtype=torch.uint8)
    y[torch.rand(y.shape) < 0.4] = 255
    loss = m(x, y)["change"]
    assert torch.allclose(loss, nn.functional.cross_entropy(m(x), y.long(), ignore_index=255))
    names = operations(loss.grad_fn, set())
    assert any("NllLoss" in o for o in names) and not any("NllLoss2D" in o for o in names)
    none = m(x, torch.full_like(y, 255))["change"]
    none.backward()
    assert (
        none.item() == 0
        and all(p.grad is None or not p.grad.any() for p in m.parameters())
        and m.reduce.weight.grad is not None
    )


@pytest.mark.parametrize(
    "name, bands, side, n",
    [
        ("resnet18", 3, 256, 3),
        ("resnet18", 13, 64, 4),
        ("resnet18", 1, 32, 2),
        ("swin_tiny_patch4_window7_224", 3, 224, 2),
        ("swin_tiny_patch4_window7_224", 13, 64, 2),
        ("vit_tiny_patch16_224", 3, 224, 2),
        ("vit_tiny_patch16_224", 13, 64, 4),
    ],
)
def test_any_bands_backbone_and_batch(name, bands, side, n, models):
    "Batches of one pair, of two, and a short one; both heads."
    data = noise(n, bands, side)
    s = changed(QUICK, crop=256, optimiser=None, lr=None, weight_decay=None, decoder_layers=2)
    r, epochs, _ = change(models(name, bands, 64), data, s, on=CPU, say=quiet)
    assert (
        json.loads(json.dumps(r, allow_nan=False)) == r
        and list(r["heads"]) == list(epochs) == ["bit", "difference"]
        and (r["images"], r["train_images"]) == (1, n - 1)
    )
    for o in r["heads"].values():
        assert sum(o["per_image"][0]) == side**2
    assert all(np.isfinite(o[0]["loss"]) for o in epochs.values())


@pytest.mark.parametrize("size", [(250, 243), (33, 70), (20, 150)])
def test_any_size(size, models):
    "Sides that are no multiples of 32, smaller and larger than the cut."
    data = noise(3, 3, size)
    s = changed(QUICK, heads=["bit"], crop=96, decoder_layers=1)
    m, _ = fine_tune_change_heads(models(), data, s, on=CPU, say=quiet)
    assert (
        ChangePairs(data, [0, 1], 96).side == min(96, -(-max(size) // 32) * 32)
        and sum(score_change_heads(m, models(), data, s)[0]["heads"]["bit"]["per_image"][0]) == size[0] * size[1]
    )


def test_a_mask_is_what_the_network_says_of_the_whole_image():
    torch.manual_seed(0)
    m = ChangeNet(backbones.create("resnet18"), "bit", PAPER).eval()
    a, b = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 96), "uint8")
    with torch.no_grad():
        z = m(((torch.from_numpy(np.stack([a, b]))[None] / 255 - 0.4) / 0.2))[0]
    middle = (z[1] - z[0]).median()
    m.classifier[-1].bias.data[1] -= middle  # about half of the pixels each
    got = change_mask(m.train(), a, b, [0.4] * 3, [0.2] * 3, changed(PAPER, crop=128))
    assert (got == (z[1] - z[0] > middle).numpy()).mean() > 0.999 and 0.4 < got.mean() < 0.6


# --- augmentation


def test_pairs_follow_from_seed_and_step(places):
    rows = [2, 0]
    x, y = ChangePairs(places, range(4), 32, 5)[7, rows]
    for seed, step, same in ((5, 7, True), (5, 8, False), (6, 7, False)):
        assert torch.equal(ChangePairs(places, range(4), 32, seed)[step, rows][0], x) == same
    assert x.shape == (2, 2, 3, 32, 32) and y.shape == (2, 32, 32)


def test_both_dates_and_the_mask_move_together():
    "Of images whose pixels are numbered: every pixel of both dates and of the mask is one and the same place."
    place = np.arange(40 * 50).reshape(40, 50)
    high, low = (place // 256 * 30).astype("uint8"), (place % 256).astype("uint8")
    data = Fake([np.stack([high, low])] * 1, [np.stack([high, low])], [(place % 3 == 0).astype("uint8")], train=[0])
    source = ChangePairs(data, [0], 32)
    looks = set()
    import cmid.tasks.change as module

    held, module.COLOUR = module.COLOUR, 0.0
    try:
        for step in range(60):
            x, y = source[step, [0]]
            n = x[0, :, 0].int() // 30 * 256 + x[0, :, 1].int()
            d = n[0, 0, 1] - n[0, 0, 0], n[0, 1, 0] - n[0, 0, 0]
            assert torch.equal(n[0], n[1]) and torch.equal(n[0] % 3 == 0, y[0] == 1) and not (y == 255).any()
            looks.add(tuple(map(int, d)))
    finally:
        module.COLOUR = held
    assert looks == {(a, b) for a in (1, -1) for b in (50, -50)} | {(b, a) for a in (1, -1) for b in (50, -50)}


def test_light_is_drawn_for_each_date():
    "Brightness of the two dates is not the same, stays within a fifth, and dates are swapped about half of the time."
    data = Fake(
        [np.full((1, 32, 32), 100, "uint8")],
        [np.full((1, 32, 32), 200, "uint8")],
        [np.ones((32, 32), "uint8")],
        train=[0],
    )
    means = np.array([ChangePairs(data, [0], 32)[k, [0]][0].float().mean((0, 2, 3, 4)) for k in range(200)])
    swapped = means[:, 0] > means[:, 1]
    low, high = np.sort(means, 1).T
    assert (
        70 < swapped.sum() < 130
        and 79 <= low.min() < 90
        and 110 < low.max() <= 121
        and 159 <= high.min() < 175
        and high.max() <= 241
        and abs(np.corrcoef(low, high)[0, 1]) < 0.2
    )


# --- scores


def test_scores_are_sklearns():
    rng = np.random.default_rng(0)
    for p, q in ((0.5, 0.5), (0.02, 0.3), (0.9, 0.01)):
        truth, guess = [(rng.random((5, 20, 30)) < o).astype("uint8") for o in (p, q)]
        truth[rng.random(truth.shape) < 0.1] = 255
        known = truth != 255
        got = change_scores([change_counts(g, t) for g, t in zip(guess, truth)])
        t, g = truth[known], guess[known]
        assert got == pytest.approx(
            dict(
                precision=precision_score(t, g),
                recall=recall_score(t, g),
                f1=f1_score(t, g),
                iou=jaccard_score(t, g),
                oa=accuracy_score(t, g),
            )
        )


@pytest.mark.parametrize(
    "counts, f1, iou, precision, recall, oa",
    [
        ([3, 1, 2, 4], 6 / 9, 3 / 6, 3 / 4, 3 / 5, 7 / 10),
        ([0, 0, 0, 5], None, None, None, None, 1.0),
        ([0, 2, 0, 3], 0.0, 0.0, 0.0, None, 3 / 5),
        ([0, 0, 2, 3], 0.0, 0.0, None, 0.0, 3 / 5),
        ([0, 0, 0, 0], None, None, None, None, None),
        ([4, 0, 0, 0], 1.0, 1.0, 1.0, 1.0, 1.0),
    ],
)
def test_nothing_to_divide_by_is_nothing(counts, f1, iou, precision, recall, oa):
    assert change_scores(counts) == dict(precision=precision, recall=recall, f1=f1, iou=iou, oa=oa)


def test_published_f1_is_a_mean_over_batches():
    rows = [[8, 2, 2, 88], [0, 0, 0, 100], [1, 0, 8, 91], [0, 1, 0, 99]]
    one = lambda tp, wrong: 2 * tp / (2 * tp + wrong)
    assert published_f1(rows, 2) == pytest.approx((one(8, 4) + one(1, 9)) / 2) and published_f1(
        rows, 3
    ) == pytest.approx((one(9, 12) + 0) / 2)
    assert (
        published_f1(rows, 1) == pytest.approx((one(8, 4) + one(1, 8) + 0) / 3)
        and published_f1(rows[1:2], 1) is None
        and change_scores(rows)["f1"] == pytest.approx(18 / 31)
    )


def test_scores_of_a_split_without_change(places, models):
    "Nothing changed and nothing is called: right, and without a value; in JSON as null."
    s = changed(QUICK, train="half", test="still", heads=["difference"])
    m, _ = fine_tune_change_heads(models(), places, s, on=CPU, say=quiet)
    m["difference"].classifier[-1].bias.data[0] += 99
    r, _ = score_change_heads(m, models(), places, s)
    o = r["heads"]["difference"]
    assert (
        o
        == dict(
            precision=None,
            recall=None,
            f1=None,
            iou=None,
            oa=1.0,
            published_protocol=dict(f1=None),
            per_image=[[0, 0, 0, 64**2]],
        )
        and json.loads(json.dumps(r, allow_nan=False)) == r
    )


# --- the whole


def built(n, side=64):
    "Rough ground that is brighter on the first date; a bright roof that was built or torn down, but in the last pair."
    rng = np.random.default_rng(0)
    a, b = (
        rng.integers(60, 120, (n, 3, side, side)).astype("uint8"),
        rng.integers(40, 100, (n, 3, side, side)).astype("uint8"),
    )
    m = np.zeros((n, side, side), "uint8")
    for i in range(n - 1):
        t, l = rng.integers(0, side // 2, 2)
        h, w = rng.integers(24, 36, 2)
        at = np.s_[t : t + h, l : l + w]
        (a, b)[i % 2][(i, slice(None), *at)] += 120
        m[(i, *at)] = 1
    return Fake(a, b, m, train=range(n), test=range(n))


@pytest.fixture(scope="module")
def overfit(models):
    data, s, said = built(4), changed(QUICK, epochs=80, batch=4, lr=2e-3), []
    return *fine_tune_change_heads(models(), data, s, 1, CPU, said.append), s, said, data


def test_overfits_a_few_pairs(overfit, models):
    "F1 of both heads on the pairs that were learnt from; the one without change stays without."
    m, epochs, s, said, data = overfit
    r, _ = score_change_heads(m, models(), data, s)
    assert r["scored_on_training"] is True and (r["images"], r["train_images"], r["epoch"]) == (4, 4, 80)
    for k, o in r["heads"].items():
        assert (
            o["f1"] >= 0.9
            and {n: o[n] for n in ("precision", "recall", "f1", "iou", "oa")} == change_scores(o["per_image"])
            and o["published_protocol"]["f1"] == o["f1"]
        )
        assert [i for i, n in enumerate(o["per_image"]) if n[0] + n[2] == 0] == [3] and o["per_image"][3][1] < 40
    assert (
        said[0] == "bit"
        and "difference" in said
        and len([o for o in said if o.startswith("epoch ")]) == 160
        and all("\n" not in o for o in said)
    )
    assert epochs["bit"][-1]["lr"] == pytest.approx(2e-3 / 80) and epochs["bit"][0]["lr"] == pytest.approx(2e-3)


def test_figures_show_each_head(overfit, models):
    m, epochs, s, _, data = overfit
    pairs = score_change_heads(m, models(), data, s, 3)[1]
    assert [o["truth"].any() for o in pairs] == [True, True, False]
    fig = change_figure(pairs)
    assert (
        [o.get_title() for o in fig.axes[:5]] == ["date 1", "date 2", "truth", "bit", "difference"]
        and len(fig.axes) == 15
        and [o.get_text() for o in fig.legends[0].get_texts()] == ["hit", "missed", "false alarm", "unchanged"]
    )
    drawn = np.asarray(fig.axes[3].images[0].get_array())
    guess, truth = pairs[0]["guesses"]["bit"], pairs[0]["truth"]
    assert (drawn == change_error_image(guess, truth)).all() and (
        (drawn == 255).all(-1) == ((guess == 1) & (truth == 1))
    ).all()
    assert [o.get_title("left") for o in change_curves_figure(epochs).axes[:3]] == [
        "loss, bit",
        "loss, difference",
        "learning rate",
    ]
    for bands in (1, 2, 13):
        change_figure(
            [
                dict(
                    first=np.zeros((bands, 8, 8), "uint8"),
                    second=np.zeros((bands, 8, 8), "uint8"),
                    truth=np.full((8, 8), 255, "uint8"),
                    guesses=dict(bit=np.zeros((8, 8), "uint8")),
                )
            ]
        )


def test_two_runs_agree_bit_for_bit(places, models):
    "Whatever was drawn from the global generators before; another seed differs."
    s, runs = changed(QUICK, epochs=2, heads=["bit"], train="half", test="rest", decoder_layers=1), []
    for seed in (3, 3, 4):
        torch.rand(len(runs) + 1)
        m, e = fine_tune_change_heads(models(), places, s, seed, CPU, quiet)
        runs.append((m["bit"].state_dict(), e))
    (a, one), (b, two), (c, three) = runs
    assert (
        all(torch.equal(a[k], b[k]) for k in a)
        and one == two
        and one != three
        and not torch.equal(a["reduce.weight"], c["reduce.weight"])
    )


def test_shown_pairs_have_one_without_change(places):
    assert (
        pairs_to_show(places, range(4), 3) == [0, 2, 3]
        and pairs_to_show(places, [3]) == [3]
        and pairs_to_show(places, [2, 1]) == [1, 2]
        and pairs_to_show(places, range(4), 1) == [3]
    )


# --- what is wrong, in one line


@pytest.mark.parametrize(
    "over, says",
    [
        (
            dict(train="haf"),
            r"change.train: fake has no split 'haf' \(did you mean 'half'\?\); known: train, test, half",
        ),
        (dict(test="none"), "change.test: split 'none' of fake is empty"),
        (dict(train="half", test="mixed"), "fake: 1 images are in both 'half' and 'mixed', the first is 1.png"),
        (dict(train="still", test="half"), "fake: no pixel of split 'still' is marked as changed"),
    ],
)
def test_splits_that_cannot_be(over, says, places, models):
    with pytest.raises(CmidError, match=says) as e:
        change(models(), places, changed(QUICK, **over), on=CPU, say=quiet)
    assert "\n" not in str(e.value)


def test_other_bands_and_another_task(places, models):
    with pytest.raises(
        CmidError, match="fake: images have 3 bands, .*resnet18-13-64 was made for 13; take the same bands"
    ):
        change(models(bands=13), places, QUICK, on=CPU, say=quiet)
    odd = Fake(places.a, places.b, [places.m[0], places.m[1] + np.uint8(2)], train=[0], test=[1])
    with pytest.raises(
        CmidError, match="fake: the mask of 1.png holds [23], but classes are 0 to 1: .* cmid_stage labels"
    ):
        change(models(), odd, QUICK, on=CPU, say=quiet)
    other = Fake(places.a, places.b, places.m, train=[0], test=[1])
    other.task = "segment"
    with pytest.raises(CmidError, match="fake: is for segment, not for change"):
        change_splits(other, QUICK)


def test_a_loss_that_is_not_finite_ends_in_one_line(places, models):
    with pytest.raises(CmidError, match="loss is not finite at step .*lower change.lr"):
        change(
            models(), places, changed(QUICK, optimiser="sgd", lr=1e9, epochs=9, heads=["difference"]), on=CPU, say=quiet
        )
