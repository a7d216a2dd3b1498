"Small fine-tuned networks with random weights, in the form in which the stages keep them."

from types import SimpleNamespace

import torch

from cmid.base.params import Params
from cmid.method import backbones
from cmid.tasks.card import save_task, task_card
from cmid.tasks.change import ChangeNet
from cmid.tasks.classify import Classifier
from cmid.tasks.dense import UNET, UNet, UNetCard
from cmid.tasks.detect import OrientedRCNN
from cmid.tasks.segment import Segmenter
from cmid.train.checkpoint import FORMAT, Card
from tests.tools.cards import random_card

SMALL = dict(
    classify=dict(batch=4),
    segment=dict(batch=4, channels=16),
    change=dict(batch=4, channels=8, decoder_layers=1),
    detect=dict(batch=2, channels=16, head_hidden=32, proposals=50, detections=20, gap=16),
)  # settings that keep networks small
WINDOW = dict(segment="crop", change="crop", detect="tile")  # task -> key of the side of a window
FIRST = dict(classify="linear", segment="upernet", change="bit", detect="oriented-rcnn")


def small_settings(task, side=64, **values):
    "The smoke profile's section of a task, with a small network and windows of `side` px."
    window = {WINDOW[task]: side} if task in WINDOW else {}
    settings = getattr(Params(profile="smoke"), task)
    return type(settings)(**settings.model_dump() | SMALL[task] | window | values)


def build(task, encoder, classes, settings, network):
    "A network with random weights."
    if network == UNET:
        return UNet(encoder.in_chans, classes, dates=2 if task == "change" else 1)
    if task == "classify":
        return Classifier(encoder, classes)
    if task == "segment":
        return Segmenter(encoder, classes, settings.channels, settings.auxiliary)
    if task == "change":
        return ChangeNet(encoder, network, settings)
    return OrientedRCNN(encoder, classes, settings)


def class_names(task, classes):
    return ["unchanged", "changed"] if task == "change" else [f"class {i}" for i in range(classes)]


def backbone_card(encoder):
    entries = random_card([f"band {i + 1}" for i in range(encoder.in_chans)], mean=0.45)
    return Card(
        format=FORMAT, architecture=encoder.name, in_chans=encoder.in_chans, img_size=encoder.img_size, **entries
    )


def unet_entries(encoder):
    "What `task_card` asks of a U-Net, which has no backbone."
    entries = random_card([f"band {i + 1}" for i in range(encoder.in_chans)], mean=0.45)
    return UNetCard(encoder.in_chans, entries["bands"], entries["mean"], entries["std"])


def no_images(task, classes, side, source):
    "What `task_card` asks of the images that a network was trained on, without any."
    manifest = dict(parameters=dict(bands=None, nodata=None, tile=0), stretch=None)
    return SimpleNamespace(classes=class_names(task, classes), side=side, hash="0" * 64, manifest=manifest | source)


def made_card(task="segment", classes=3, encoder=None, settings=None, network=None, side=64, **values):
    "The card of a network; `values` replace entries, such as `source`, `resolution` or `valid_range`."
    settings, network = settings or small_settings(task, side), network or FIRST[task]
    images = no_images(task, classes, side, {})
    score = dict(score=0.5, low=0.4, high=0.6, images=10, on_training=False)
    made = dict(commit="0" * 40, versions={})
    start = unet_entries(encoder) if network == UNET else backbone_card(encoder)
    facts = task, network, "land", "random-resnet18", images, settings, start, dict(score=score), made
    card = task_card(*facts)
    return type(card)(**card.model_dump() | values)


def made_network(
    folder,  # to write
    task="segment",  # classify | segment | change | detect
    classes=3,  # change detection has two
    bands=3,
    architecture="resnet18",
    side=64,  # of windows, and of images for classification, px
    heads=("bit",),  # of change detection: bit, difference, or only unet
    network=None,  # of segmentation: upernet or unet
    seed=0,  # of the weights
    settings=None,  # entries of the task's section, such as dict(overlap=0.5)
    **card,  # entries of the card, such as source=dict(bands=[2, 1, 0], types={}, nodata=0), resolution=0.5
):
    "Folder of a small random network of a task, written by `save_task`; equal arguments give equal bytes."
    torch.manual_seed(seed)
    encoder, classes = backbones.create(architecture, bands, 64), 2 if task == "change" else classes
    given = dict(heads=[o for o in heads if o != UNET] or ["bit"]) if task == "change" else {}
    asked = small_settings(task, side, **given | (settings or {}))
    names = list(heads) if task == "change" else [network or FIRST[task]]
    networks = [build(task, encoder, classes, asked, name) for name in names]
    entries = made_card(task, classes, encoder, asked, names[0], side, **card)
    return save_task(folder, networks[0], entries, dict(zip(names[1:], networks[1:])))
