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
from cmid.data.scenes import two_dates
from cmid.method import backbones
from cmid.tasks import change as module
from cmid.tasks.change import (
    BIT,
    PUBLISHED_CHANGE,
    ChangeNet,
    ChangePairs,
    TokenAttention,
    Tokenizer,
    TransformerLayer,
    change,
    change_counts,
    change_curves_figure,
    change_error_image,
    change_figure,
    change_mask,
    change_scores,
    change_splits,
    fine_tune_change_heads,
    pairs_to_show,
    published_f1,
    score_change_heads,
)
from cmid.tasks.finetune import resolved
from tests.tools.runs import changed, quiet

CPU = torch.device("cpu")
PAPER = Params(profile="paper").change


QUICK = changed(PAPER, epochs=1, batch=2, crop=64, optimiser="adamw", lr=1e-3, weight_decay=0.01, precision="float32")


class Memory:
    "Labelled pairs in memory."

    task, folder, classes = "change", Path("fake"), ["unchanged", "changed"]

    def __init__(self, first, second, masks, **splits):
        self.first, self.later, self.masks = first, second, masks
        self.splits = {name: np.asarray(index, int) for name, index in splits.items()}
        self.bands = len(first[0])
        self.names = [f"{i}.png" for i in range(len(first))]
        self.sizes = np.array([mask.shape for mask in masks])

    def image(self, i):
        return self.first[i]

    def second(self, i):
        return self.later[i]

    def mask(self, i):
        return self.masks[i]

    def __len__(self):
        return len(self.first)


def noise(n, bands=3, size=(64, 64)):
    "Pairs of random images and masks, the last one in the test split."
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 256, (2, n, bands, *size), "uint8")
    masks = (rng.random((n, *size)) < 0.3).astype("uint8")
    return Memory(first, second, masks, train=range(n - 1), test=[n - 1])


@pytest.fixture(scope="module")
def places():
    "Four generated places of 64 px: in three of them something was built or torn down."
    pairs = [two_dates("residential", "test", i, changes=0 if i == 3 else 3, size=64) for i in range(4)]
    first, second = ([pair[date].transpose(2, 0, 1) for pair in pairs] for date in (0, 1))
    masks = [(mask > 0).astype("uint8") for _, _, mask in pairs]
    splits = dict(train=range(4), test=range(4), half=[0, 1], rest=[2, 3], mixed=[1, 2], still=[3], none=[])
    return Memory(first, second, masks, **splits)


# --- the recipe


def test_the_paper_profile_is_the_published_recipe():
    s = PAPER
    assert (s.epochs, s.batch, s.momentum, s.crop, s.warmup_steps) == (200, 8, 0.99, 256, 0)
    assert (s.channels, s.tokens, s.encoder_layers, s.decoder_layers) == (32, 4, 1, 8)
    resnet = resolved(s, "resnet50", PUBLISHED_CHANGE)
    assert (resnet.optimiser, resnet.lr, resnet.weight_decay, resnet.drop_path) == ("sgd", 0.002, 5e-4, 0.0)
    swin = resolved(s, "swin_base_patch4_window7_224", PUBLISHED_CHANGE)
    assert (swin.optimiser, swin.lr, swin.weight_decay, swin.drop_path) == ("adamw", 6e-5, 0.01, 0.3)


# --- the transformer


def copy_layer(ours, theirs):
    "Give PyTorch's layer the weights of ours."
    attention = ours.attention
    weights = [linear.weight.data for linear in (attention.query, attention.key, attention.value)]
    theirs.self_attn.in_proj_weight.data = torch.cat(weights)
    theirs.self_attn.in_proj_bias.data = torch.zeros(48)
    theirs.self_attn.out_proj.load_state_dict(attention.out.state_dict())
    theirs.norm1.load_state_dict(ours.norm.state_dict())
    theirs.norm2.load_state_dict(ours.mlp[0].state_dict())
    theirs.linear1.load_state_dict(ours.mlp[1].state_dict())
    theirs.linear2.load_state_dict(ours.mlp[3].state_dict())


def test_a_layer_is_pytorchs():
    torch.manual_seed(0)
    ours = TransformerLayer(16, 4, 4)
    theirs = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    copy_layer(ours, theirs)
    x = torch.randn(2, 7, 16)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_attention_is_its_formula():
    "Heads wider than channels / heads, one head at a time."
    torch.manual_seed(0)
    attention = TokenAttention(6, 3, 5)
    x, tokens = torch.randn(2, 4, 6), torch.randn(2, 9, 6)
    queries = attention.query(x).split(5, -1)
    keys, values = attention.key(tokens).split(5, -1), attention.value(tokens).split(5, -1)
    heads = []
    for q, k, v in zip(queries, keys, values):
        heads.append(torch.softmax(q @ k.transpose(1, 2) / 5**0.5, -1) @ v)
    expected = torch.cat(heads, -1) @ attention.out.weight.T + attention.out.bias
    assert torch.allclose(attention(x, tokens), expected, atol=1e-5)


def test_tokens_are_means_of_pixels():
    torch.manual_seed(0)
    tokenizer, x = Tokenizer(5, 3), torch.randn(2, 5, 4, 6)
    pixels = x.flatten(2).transpose(1, 2)
    weights = (pixels @ tokenizer.attention.weight[:, :, 0, 0].T).softmax(1)
    for image in range(2):
        for token in range(3):
            expected = (weights[image, :, token, None] * pixels[image]).sum(0)
            assert torch.allclose(tokenizer(x)[image, token], expected, atol=1e-5)


@pytest.mark.parametrize("date", [0, 1])
def test_pixels_attend_to_the_tokens_of_their_date(date):
    "Other tokens of one date do not change the maps of the other date."
    torch.manual_seed(0)
    bit, maps = BIT(8, 4, 1, 3), torch.randn(2, 2, 8, 3, 5)
    before, tokens = bit(maps), bit.tokens(maps).clone()
    tokens[:, date] = torch.randn(2, 4, 8)
    bit.tokens = lambda _: tokens
    after = bit(maps)
    assert torch.allclose(after[:, 1 - date], before[:, 1 - date], atol=1e-6)
    assert not torch.allclose(after[:, date], before[:, date], atol=1e-3)


def test_the_size_of_the_transformer():
    bit = BIT(8, 4, 1, 3)
    assert (len(bit.encoder), len(bit.decoder), bit.pos_embed.shape) == (1, 3, (1, 8, 8))


# --- the network


def test_the_heads_differ_by_the_transformer_alone():
    bit, plain = (ChangeNet(backbones.create("resnet18"), head, PAPER) for head in PAPER.heads)
    bit_names, plain_names = ({name for name, _ in model.named_parameters()} for model in (bit, plain))
    assert plain_names < bit_names
    assert all(name.startswith("head.") for name in bit_names - plain_names)


@pytest.fixture(scope="module")
def difference_net():
    torch.manual_seed(0)
    return ChangeNet(backbones.create("resnet18"), "difference", PAPER).eval()


def test_the_difference_does_not_depend_on_the_order_of_dates(difference_net):
    pairs = torch.randn(2, 2, 3, 64, 64)
    with torch.no_grad():
        logits = difference_net(pairs)
        assert torch.allclose(logits, difference_net(pairs.flip(1)), atol=1e-5)
        assert not torch.allclose(logits, difference_net(pairs[:, :1].expand_as(pairs)), atol=1e-3)


def test_the_loss_is_pytorchs_where_pixels_are_labelled(difference_net):
    pairs, masks = torch.randn(2, 2, 3, 64, 64), torch.randint(0, 2, (2, 64, 64), dtype=torch.uint8)
    masks[torch.rand(masks.shape) < 0.4] = 255
    expected = nn.functional.cross_entropy(difference_net(pairs), masks.long(), ignore_index=255)
    assert torch.allclose(difference_net(pairs, masks)["change"], expected)


def test_pairs_without_labels_have_no_gradient(difference_net):
    difference_net.zero_grad(set_to_none=True)
    loss = difference_net(torch.randn(1, 2, 3, 64, 64), torch.full((1, 64, 64), 255, dtype=torch.uint8))["change"]
    loss.backward()
    assert loss.item() == 0
    assert difference_net.reduce.weight.grad is not None
    assert not any(p.grad.any() for p in difference_net.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "name, bands, side, n",
    [
        ("resnet18", 3, 128, 3),
        ("resnet18", 1, 32, 2),
        ("swin_tiny_patch4_window7_224", 13, 64, 2),
        ("vit_tiny_patch16_224", 13, 64, 4),
        ("resnet18", 3, 256, 3),
        ("resnet18", 13, 64, 4),
        ("swin_tiny_patch4_window7_224", 3, 224, 2),
        ("vit_tiny_patch16_224", 3, 224, 2),
    ],
)
def test_any_bands_backbone_and_batch(random_backbone, name, bands, side, n):
    "Batches of one pair, of two, and an incomplete one; both heads."
    data = noise(n, bands, (side, side))
    s = changed(QUICK, crop=256, optimiser=None, lr=None, weight_decay=None, decoder_layers=2)
    result, epochs, _ = change(random_backbone(name, bands), data, s, on=CPU, say=quiet)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert list(result["heads"]) == list(epochs) == ["bit", "difference"]
    assert (result["images"], result["train_images"]) == (1, n - 1)
    assert all(sum(scores["per_image"][0]) == side**2 for scores in result["heads"].values())
    assert all(np.isfinite(run[0]["loss"]) for run in epochs.values())


@pytest.mark.parametrize("size", [(150, 143), (33, 70), (20, 150), (250, 243)])
def test_any_size(random_backbone, size):
    "Sides that are not multiples of 32, smaller and larger than the crop."
    data = noise(3, 3, size)
    s = changed(QUICK, heads=["bit"], crop=96, decoder_layers=1)
    models, _ = fine_tune_change_heads(random_backbone(), data, s, on=CPU, say=quiet)
    result, _ = score_change_heads(models, random_backbone(), data, s)
    assert ChangePairs(data, [0, 1], 96).side == min(96, -(-max(size) // 32) * 32)
    assert sum(result["heads"]["bit"]["per_image"][0]) == size[0] * size[1]


def test_a_mask_is_the_prediction_of_the_whole_image():
    "The bias is set so that about half of the pixels are changed."
    torch.manual_seed(0)
    model = ChangeNet(backbones.create("resnet18"), "bit", PAPER).eval()
    pair = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 96), "uint8")
    with torch.no_grad():
        unchanged, changed_logits = model((torch.from_numpy(pair)[None] / 255 - 0.4) / 0.2)[0]
    margin = changed_logits - unchanged
    model.classifier[-1].bias.data[1] -= margin.median()
    mask = change_mask(model.train(), *pair, [0.4] * 3, [0.2] * 3, changed(PAPER, crop=128))
    assert (mask == (margin > margin.median()).numpy()).mean() > 0.999
    assert 0.4 < mask.mean() < 0.6


# --- training pairs


def test_pairs_depend_on_seed_and_step_alone(places):
    def pairs(seed, step):
        return ChangePairs(places, range(4), 32, seed).example(step, [2, 0])

    first, masks = pairs(5, 7)
    assert torch.equal(pairs(5, 7)[0], first)
    assert not torch.equal(pairs(5, 8)[0], first)
    assert not torch.equal(pairs(6, 7)[0], first)
    assert first.shape == (2, 2, 3, 32, 32)
    assert masks.shape == (2, 32, 32)


def test_both_dates_and_the_mask_move_together(monkeypatch):
    "Each pixel holds its number: at every place both dates and the mask come from one pixel."
    monkeypatch.setattr(module, "COLOUR_RANGE", 0.0)
    number = np.arange(40 * 50).reshape(40, 50)
    image = np.stack([number // 256 * 30, number % 256]).astype("uint8")
    source = ChangePairs(Memory([image], [image], [(number % 3 == 0).astype("uint8")], train=[0]), [0], 32)
    orientations = set()
    for step in range(60):
        pairs, masks = source.example(step, [0])
        pairs = (255 * pairs).round()
        first, second = pairs[0, :, 0].int() // 30 * 256 + pairs[0, :, 1].int()
        assert torch.equal(first, second)
        assert torch.equal(first % 3 == 0, masks[0] == 1)
        assert not (masks == 255).any()
        orientations.add((int(first[0, 1] - first[0, 0]), int(first[1, 0] - first[0, 0])))
    upright = {(1, 50), (1, -50), (-1, 50), (-1, -50)}
    assert orientations == upright | {(down, right) for right, down in upright}


@pytest.mark.parametrize("quarters", range(4))
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_pair_is_rotated_then_mirrored(quarters, mirrored, monkeypatch):
    "As torch does to each pair alone, in one batch with another orientation; the dates keep their order or change it."
    drawn = iter([0, 0, quarters, int(mirrored), 1, 0, 0, 0, 0, 0])
    monkeypatch.setattr(module, "COLOUR_RANGE", 0.0)
    monkeypatch.setattr(torch, "randint", lambda *given, **named: torch.tensor(next(drawn)))
    data = noise(2, 3, (32, 32))
    pairs, masks = ChangePairs(data, [0, 1], 32).example(0, [0, 1])
    for k, (turns, flip) in enumerate([(quarters, mirrored), (0, False)]):
        expected = torch.from_numpy(np.stack([data.image(k), data.second(k)])).rot90(turns, (-2, -1))
        mask = torch.from_numpy(np.array(data.mask(k))).rot90(turns, (-2, -1))
        axes = [-1] if flip else []
        dates = expected.flip(axes).flip([0] if k == 0 else [])
        assert torch.allclose(255 * pairs[k], dates.float(), atol=1e-3)
        assert torch.equal(masks[k], mask.flip(axes))


def test_each_turn_is_drawn_as_often(places):
    _, turns, factors, _ = ChangePairs(places, range(4), 32)[0, np.arange(4).repeat(500)]
    transposed, down, across, swapped = turns.T
    assert swapped.float().mean().item() == pytest.approx(0.5, abs=0.05)
    counts = torch.bincount(4 * transposed + 2 * down + across, minlength=8)
    assert counts.min() > 190
    assert counts.max() < 310
    assert factors.shape == (3, 4000)
    assert factors.mean().item() == pytest.approx(1, abs=0.01)
    assert factors.std().item() == pytest.approx(0.4 / 12**0.5, abs=0.005)


def test_brightness_is_drawn_for_each_date():
    "The brightness of a date changes by up to a fifth, independently of the other date."
    grey, mask = np.full((1, 32, 32), 100, "uint8"), np.ones((32, 32), "uint8")
    source = ChangePairs(Memory([grey], [2 * grey], [mask], train=[0]), [0], 32)
    means = np.array([255 * source.example(step, [0])[0].mean((0, 2, 3, 4)) for step in range(200)])
    low, high = np.sort(means, 1).T
    assert 79 <= low.min() < 90
    assert 110 < low.max() <= 121
    assert 159 <= high.min() < 175
    assert high.max() <= 241
    assert abs(np.corrcoef(low, high)[0, 1]) < 0.2
    assert 70 < (means[:, 0] > means[:, 1]).sum() < 130  # dates are swapped about half of the time


# --- scores


@pytest.mark.parametrize("true_share, predicted_share", [(0.5, 0.5), (0.02, 0.3), (0.9, 0.01)])
def test_scores_are_scikit_learns(true_share, predicted_share):
    rng = np.random.default_rng(0)
    truth, guess = ((rng.random((5, 20, 30)) < share).astype("uint8") for share in (true_share, predicted_share))
    truth[rng.random(truth.shape) < 0.1] = 255
    scores = change_scores([change_counts(g, t) for g, t in zip(guess, truth)])
    t, g = truth[truth != 255], guess[truth != 255]
    expected = dict(precision=precision_score(t, g), recall=recall_score(t, g), f1=f1_score(t, g))
    assert scores == pytest.approx(expected | dict(iou=jaccard_score(t, g), oa=accuracy_score(t, g)))


@pytest.mark.parametrize(
    "counts, f1, iou, precision, recall, oa",
    [
        ([3, 1, 2, 4], 6 / 9, 3 / 6, 3 / 4, 3 / 5, 7 / 10),
        ([0, 0, 0, 0], None, None, None, None, None),
        ([4, 0, 0, 0], 1.0, 1.0, 1.0, 1.0, 1.0),
    ],
)
def test_scores_by_hand(counts, f1, iou, precision, recall, oa):
    assert change_scores(counts) == dict(precision=precision, recall=recall, f1=f1, iou=iou, oa=oa)


def test_published_f1_is_a_mean_over_batches():
    rows = [[8, 2, 2, 88], [0, 0, 0, 100], [1, 0, 8, 91], [0, 1, 0, 99]]
    assert published_f1(rows, 1) == pytest.approx((16 / 20 + 2 / 10 + 0) / 3)
    assert published_f1(rows, 2) == pytest.approx((16 / 20 + 2 / 11) / 2)
    assert published_f1(rows, 3) == pytest.approx((18 / 30 + 0) / 2)
    assert published_f1(rows[1:2], 1) is None
    assert change_scores(rows)["f1"] == pytest.approx(18 / 31)


# --- whole runs


def buildings(n, side=64):
    "Noise, brighter at the first date; a bright roof was built or torn down in all pairs but the last."
    rng = np.random.default_rng(0)
    first = rng.integers(60, 120, (n, 3, side, side)).astype("uint8")
    second = rng.integers(40, 100, (n, 3, side, side)).astype("uint8")
    masks = np.zeros((n, side, side), "uint8")
    for i in range(n - 1):
        top, left = rng.integers(0, side // 2, 2)
        height, width = rng.integers(24, 36, 2)
        roof = np.s_[..., top : top + height, left : left + width]
        (first, second)[i % 2][i][roof] += 120
        masks[i][roof] = 1
    return Memory(first, second, masks, train=range(n), test=range(n))


@pytest.fixture(scope="module")
def overfit(random_backbone):
    "Networks, epochs, lines, metrics and pairs of a run that is long enough to fit its training pairs."
    data, lines = buildings(4), []
    s = changed(QUICK, epochs=80, batch=4, lr=2e-3)
    models, epochs = fine_tune_change_heads(random_backbone(), data, s, 1, CPU, lines.append)
    return models, epochs, lines, *score_change_heads(models, random_backbone(), data, s, 3)


@pytest.mark.slow
def test_both_heads_fit_a_few_pairs(overfit):
    "F1 on the training pairs; in the pair without change hardly any is predicted."
    _, _, _, result, _ = overfit
    assert result["scored_on_training"] is True
    assert (result["images"], result["train_images"], result["epoch"]) == (4, 4, 80)
    for scores in result["heads"].values():
        assert scores["f1"] >= 0.9
        total = change_scores(scores["per_image"])
        assert {name: scores[name] for name in total} == total
        assert scores["published_protocol"]["f1"] == scores["f1"]
        without_change = [i for i, (tp, _, fn, _) in enumerate(scores["per_image"]) if tp + fn == 0]
        assert without_change == [3]
        assert scores["per_image"][3][1] < 40


@pytest.mark.slow
def test_the_learning_rate_decays_linearly_and_epochs_are_reported(overfit):
    _, epochs, lines, _, _ = overfit
    assert epochs["bit"][0]["lr"] == pytest.approx(2e-3)
    assert epochs["bit"][-1]["lr"] == pytest.approx(2e-3 / 80)
    assert lines[0] == "bit"
    assert "difference" in lines
    assert len([line for line in lines if line.startswith("epoch ")]) == 160
    assert all("\n" not in line for line in lines)


def test_a_split_without_change_has_no_f1(random_backbone, places):
    "Nothing changed and no change is predicted: the accuracy is 1, other scores are null in JSON."
    s = changed(QUICK, train="half", test="still", heads=["difference"])
    models, _ = fine_tune_change_heads(random_backbone(), places, s, on=CPU, say=quiet)
    models["difference"].classifier[-1].bias.data[0] += 99
    result, _ = score_change_heads(models, random_backbone(), places, s)
    scores = dict(precision=None, recall=None, f1=None, iou=None, oa=1.0)
    scores |= dict(published_protocol=dict(f1=None), per_image=[[0, 0, 0, 64**2]])
    assert result["heads"]["difference"] == scores
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_two_runs_agree_bit_for_bit(random_backbone, places):
    "Whatever the state of the global random generator; another seed differs."
    s, runs = changed(QUICK, epochs=2, heads=["bit"], train="half", test="rest", decoder_layers=1), []
    for seed in (3, 3, 4):
        torch.rand(len(runs) + 1)
        models, epochs = fine_tune_change_heads(random_backbone(), places, s, seed, CPU, quiet)
        runs.append((models["bit"].state_dict(), epochs))
    (first, first_epochs), (second, second_epochs), (third, third_epochs) = runs
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first_epochs == second_epochs != third_epochs
    assert not torch.equal(first["reduce.weight"], third["reduce.weight"])


# --- figures


def test_one_pair_without_change_is_shown(places):
    assert pairs_to_show(places, range(4), 3) == [0, 2, 3]
    assert pairs_to_show(places, [3]) == [3]
    assert pairs_to_show(places, [2, 1]) == [1, 2]
    assert pairs_to_show(places, range(4), 1) == [3]


def made_up_pair(bands, truth, **guesses):
    image = np.zeros((bands, *truth.shape), "uint8")
    return dict(first=image, second=image, truth=truth, guesses=guesses)


def test_the_figure_shows_the_errors_of_each_head():
    rng = np.random.default_rng(0)
    truth, bit, difference = rng.integers(0, 2, (3, 8, 8)).astype("uint8")
    fig = change_figure([made_up_pair(3, truth, bit=bit, difference=difference)] * 3)
    titles = ["date 1", "date 2", "ground truth", "bit", "difference"]
    assert [ax.get_title() for ax in fig.axes[:5]] == titles
    assert len(fig.axes) == 15
    legend = [text.get_text() for text in fig.legends[0].get_texts()]
    assert legend == ["hit", "missed", "false alarm", "unchanged"]
    shown = np.asarray(fig.axes[3].images[0].get_array())
    assert (shown == change_error_image(bit, truth)).all()
    assert ((shown == 255).all(-1) == ((bit == 1) & (truth == 1))).all()


@pytest.mark.parametrize("bands", [1, 2, 13])
def test_the_figure_takes_any_bands_and_ignored_pixels(bands):
    fig = change_figure([made_up_pair(bands, np.full((8, 8), 255, "uint8"), bit=np.zeros((8, 8), "uint8"))])
    assert [text.get_text() for text in fig.legends[0].get_texts()][-1] == "not labelled"


def test_the_curves_of_each_head():
    run = [dict(epoch=epoch, step=epoch, loss=1 / epoch, lr=0.1) for epoch in (1, 2)]
    axes = change_curves_figure(dict(bit=run, difference=run)).axes
    assert [ax.get_title("left") for ax in axes[:3]] == ["loss, bit", "loss, difference", "learning rate"]


# --- errors


@pytest.mark.parametrize(
    "splits, why",
    [
        (dict(train="haf"), r"change.train: fake has no split 'haf' \(did you mean 'half'\?\)"),
        (dict(test="none"), "change.test: split 'none' of fake is empty"),
        (dict(train="half", test="mixed"), "fake: 1 image is in both 'half' and 'mixed', the first is 1.png"),
        (dict(train="still", test="half"), "fake: no pixel of split 'still' is marked as changed"),
    ],
)
def test_bad_splits_are_errors_of_one_line(places, splits, why):
    with pytest.raises(CmidError, match=why) as error:
        change_splits(places, changed(QUICK, **splits))
    assert "\n" not in str(error.value)


def test_another_task_is_an_error(places):
    other = Memory(places.first, places.later, places.masks, train=[0], test=[1])
    other.task = "segment"
    with pytest.raises(CmidError, match="fake: its task is segment, not change"):
        change_splits(other, QUICK)


def test_other_bands_and_wrong_masks_are_errors(random_backbone, places):
    why = "fake: images have 3 bands, but .*resnet18-13-64 takes 13; use the same bands"
    with pytest.raises(CmidError, match=why):
        change(random_backbone(bands=13), places, QUICK, on=CPU, say=quiet)
    wrong = Memory(places.first, places.later, [places.masks[0], places.masks[1] + np.uint8(2)], train=[0], test=[1])
    why = "fake: the mask of 1.png holds [23], but classes are 0 to 1: .* cmid_stage labels"
    with pytest.raises(CmidError, match=why):
        change(random_backbone(), wrong, QUICK, on=CPU, say=quiet)


def test_a_loss_that_is_not_finite_is_an_error(random_backbone, places):
    s = changed(QUICK, optimiser="sgd", lr=1e9, epochs=9, heads=["difference"])
    with pytest.raises(CmidError, match="loss is not finite at step .*lower change.lr"):
        change(random_backbone(), places, s, on=CPU, say=quiet)
