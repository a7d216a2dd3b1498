"Networks that are kept: equal bytes, whole folders, and cards of strangers that are refused in one line."

import json

import pytest

from cmid.base.errors import CmidError
from cmid.method import backbones
from cmid.tasks.card import TASK_FORMAT, read_task_card, save_task, task_settings
from cmid.train.checkpoint import export_backbone, read_card
from tests.tools.cards import random_card
from tests.tools.networks import backbone_card, build, made_card, made_network, small_settings

TASKS = "classify", "segment", "change", "detect"


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    parent = tmp_path_factory.mktemp("models")
    return {task: made_network(parent / task, task, heads=("bit", "difference")) for task in TASKS}


@pytest.mark.parametrize("task", TASKS)
def test_a_folder_holds_weights_card_and_text_and_nothing_else(folders, task):
    names = {"model.safetensors", "card.json", "README.md"}
    names |= {"model-difference.safetensors"} if task == "change" else set()
    assert {path.name for path in folders[task].iterdir()} == names
    assert read_task_card(folders[task]).task == task


def test_equal_networks_are_equal_bytes(folders, tmp_path):
    again = made_network(tmp_path / "change", "change", heads=("bit", "difference"))
    assert bytes_of(again) == bytes_of(folders["change"])
    other = made_network(tmp_path / "other", "change", heads=("bit", "difference"), seed=1)
    assert bytes_of(other)["card.json"] == bytes_of(again)["card.json"]
    assert bytes_of(other)["model.safetensors"] != bytes_of(again)["model.safetensors"]


def test_the_card_comes_back_as_it_was_written(tmp_path):
    source = dict(bands=[2, 1, 0], types={"uint16": dict(low=[0, 1, 2], high=[9.5, 10, 11])}, nodata=[0, None, -1.5])
    given = dict(source=source, resolution=0.25, valid_range=[[0, 10], [1, 11], [2, 12]])
    card = read_task_card(made_network(tmp_path / "a", "segment", **given))
    dumped = card.model_dump()
    assert {key: dumped[key] for key in given} == given
    text = (tmp_path / "a/README.md").read_text()
    assert "| uint16 | band 2 | 1 | 10 |" in text
    assert "0.25 m a pixel" in text
    assert "| band 3 | 0.45000 | 0.20000 | 2 to 12 |" in text
    assert "| score | 0.5000 | 0.4000 to 0.6000 | 10 images |" in text


@pytest.mark.parametrize("task", TASKS)
def test_the_number_of_processes_is_not_of_the_network(task):
    encoder = backbones.create("resnet18", 3, 64)
    cards = [made_card(task, 2, encoder, small_settings(task, processes=count)) for count in (1, 2)]
    assert cards[0] == cards[1]
    assert "batch" in cards[0].settings and task_settings(cards[0]).processes == 1


def test_cards_with_the_number_of_processes_are_read(tmp_path):
    folder = made_network(tmp_path / "a")
    held = json.loads((folder / "card.json").read_text())
    held["settings"]["processes"] = 2
    (folder / "card.json").write_text(json.dumps(held))
    assert task_settings(read_task_card(folder)) == task_settings(read_task_card(made_network(tmp_path / "b")))


def test_the_text_says_how_each_task_is_used(folders):
    texts = {task: (folder / "README.md").read_text() for task, folder in folders.items()}
    assert "cmid_apply . FIRST OUT --second SECOND" in texts["change"]
    assert 'network = load_task(".", "difference")' in texts["change"]
    assert all("cmid_apply . IMAGES OUT" in texts[task] for task in ("classify", "segment", "detect"))
    assert "| threshold: score | 0.05 |" in texts["detect"]
    assert "logits (B, 3, H, W)" in texts["segment"]
    assert "| 1 | changed | `#0072b2` |" in texts["change"]
    assert all("| 1 | class 1 | `#009e73` |" in texts[task] for task in ("classify", "segment", "detect"))


def test_a_backbone_and_a_network_do_not_replace_each_other(tmp_path):
    encoder = backbones.create("resnet18", 3, 64)
    export_backbone(encoder, tmp_path / "backbone", random_card())
    settings = small_settings("segment")
    card = made_card("segment", 3, encoder, settings)
    with pytest.raises(CmidError, match="holds files that are not a fine-tuned network's"):
        save_task(tmp_path / "backbone", build("segment", encoder, 3, settings, "upernet"), card)
    network = made_network(tmp_path / "network")
    with pytest.raises(CmidError, match=r"holds files that are not a backbone's \(card.json\)"):
        export_backbone(encoder, network, random_card())
    with pytest.raises(CmidError, match="is the card of a fine-tuned network, not of a backbone; open it with load_ta"):
        read_card(network)
    with pytest.raises(CmidError, match="is the card of a backbone, not of a fine-tuned network; open it with load_ba"):
        read_task_card(tmp_path / "backbone")


def test_files_of_others_are_not_lost(tmp_path):
    folder = made_network(tmp_path / "a")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(CmidError, match="notes.txt"):
        made_network(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


GAP = dict(detect=dict(gap=0))
WRONG = {
    "newer cmid": dict(format=TASK_FORMAT + 1),
    "task": dict(task="tell"),
    "network: 'bit' is not one of upernet, unet": dict(network="bit"),
    "classes: a name is listed twice": dict(classes=["a", "a", "b"]),
    "colours: has 1 values, but 3 are due": dict(colours=["#000000"]),
    "colours.0": dict(colours=["red", "#000000", "#000000"]),
    "std.0": dict(std=[0.0, 1.0, 1.0]),
    "mean: has 2 values": dict(mean=[0.5, 0.5]),
    "source.bands: has 2 values": dict(source=dict(bands=[0, 1], types={}, nodata=None)),
    "source.types.uint16.low: has 1 values": dict(
        source=dict(bands=None, types={"uint16": dict(low=[0], high=[1, 1, 1])}, nodata=None)
    ),
    "source.types.uint16.low.1: 9 must be below its high: 9": dict(
        source=dict(bands=None, types={"uint16": dict(low=[0, 9, 0], high=[1, 9, 1])}, nodata=None)
    ),
    "valid_range.2: 5 is above 4": dict(valid_range=[[0.0, 1.0], [4.0, 4.0], [5.0, 4.0]]),
    r"classes.1: 'b\nc' has a control character": dict(classes=["a", "b\nc", "d"]),
    r"classes.2: 'd\x1b[2J' has a control character": dict(classes=["a", "b", "d\x1b[2J"]),
    r"classes.0: 'a\u2028b' has a control character": dict(classes=["a\u2028b", "b", "d"]),
    "tile: must be 32 or more for segment, got 0": dict(tile=0),
    "tile: must be 32 or more for segment, got 31": dict(tile=31, overlap=1),
    "overlap: 64 must be smaller than tile: 64": dict(overlap=64),
    "side: only": dict(side=64),
    "settings.train: Field required": dict(settings=dict(crop=5)),
    "in_chans: is 4, but the backbone has 3": dict(in_chans=4),
    "backbone: must hold a JSON object": dict(backbone=None),
    "backbone: architecture": dict(
        backbone=backbone_card(backbones.create("resnet18")).model_dump() | dict(architecture="x")
    ),
    "resolution": dict(resolution=-1.0),
    "why": dict(why="an unknown key"),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_card_is_named_in_one_line(folders, tmp_path, message):
    held = json.loads((folders["segment"] / "card.json").read_text())
    (tmp_path / "card.json").write_text(json.dumps(held | WRONG[message]))
    with pytest.raises(CmidError) as caught:
        read_task_card(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path / "card.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task, key", [("segment", "crop"), ("change", "crop"), ("detect", "tile")])
def test_card_and_settings_have_one_least_tile(folders, tmp_path, task, key):
    "What the settings allow is a card that can be read, and what they refuse is refused in the card."
    held = json.loads((folders[task] / "card.json").read_text())
    for tile, accepted in ((32, True), (31, False), (1, False)):
        for values in (dict(tile=tile, overlap=0), dict(settings=held["settings"] | {key: tile} | GAP.get(task, {}))):
            (tmp_path / "card.json").write_text(json.dumps(held | values))
            if accepted:
                assert read_task_card(tmp_path)
                continue
            with pytest.raises(CmidError, match=f"(tile|settings.{key}): "):
                read_task_card(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff", b"[" * 100_000, b'{"task": 1}'])
def test_what_is_no_card_is_refused(tmp_path, content):
    (tmp_path / "card.json").write_bytes(content)
    with pytest.raises(CmidError) as caught:
        read_task_card(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_empty_folder_has_no_network(tmp_path):
    with pytest.raises(CmidError, match="there is no fine-tuned network here"):
        read_task_card(tmp_path)
