"""Bad input, as one table: how it is made, which command or function reads it, and what its error must contain.

Every error is one line, and no file that was there before may have changed. Damaged files among good ones (`FILES`)
do not stop a run unless it is told to stop: they are skipped and named. Some tests start real processes, because a
user sees what a function does not show: stages, dropped permissions, hostile files."""

import contextlib
import functools
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import tracemalloc
import warnings
import zlib
from copy import deepcopy
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import rasterio
import safetensors.torch
import torch
import yaml
from PIL import Image

from cmid.base.errors import CmidError
from cmid.base.files import load_yaml
from cmid.base.params import Params, check_all, merge
from cmid.base.runtime import device
from cmid.data.batches import Batches
from cmid.data.dataset import Prepared
from cmid.data.prepare import prepare, prepare_dataset
from cmid.method.backbones import check_pretrainable, create
from cmid.study.runner import run_notebook
from cmid.study.smoke import smoke_tasks
from cmid.study.study import with_set
from cmid.tasks.scene_classes import class_splits, pooled_features
from cmid.train.checkpoint import export_backbone, latest, load, load_backbone, read_card, save
from cmid.train.convert import STUDY
from cmid.train.pretrain import build_cmid
from cmid.train.training import precision_of
from cmid.viz.reconstruct import load_decoder

ROOT = Path(__file__).parents[2]
COMMANDS = {o.name: o.value.split(":")[0] for o in entry_points(group="console_scripts") if o.name.startswith("cmid_")}
ROOTED = hasattr(os, "geteuid") and os.geteuid() == 0

# --- the tools: a command in this process, what a folder holds, things to spoil


def run(name, *args):
    "Status, output and complaints of a console command, called as a console script calls it."
    code, out, err = (
        f"import sys\nfrom {COMMANDS[name]} import {name}\nsys.exit({name}())",
        io.StringIO(),
        io.StringIO(),
    )
    argv, sys.argv = sys.argv, [name, *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            exec(compile(code, name, "exec"), {"__name__": "__main__", "__file__": name})
    except SystemExit as e:
        return e.code or 0, out.getvalue(), err.getvalue()
    finally:
        sys.argv = argv


def process(name, *args, at=None, **env):
    "The same as a process of its own."
    done = subprocess.run(
        [str(Path(sys.executable).with_name(name)), *map(str, args)],
        cwd=at,
        capture_output=True,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS="1") | env,
    )
    return done.returncode, done.stdout, done.stderr


def contents(d, but=(".git", ".studies", "reports")):
    "Every file below a folder, by name and hash."
    files = (o for o in sorted(d.rglob("*")) if not {*but} & {*o.relative_to(d).parts})
    return {
        str(o.relative_to(d)): os.readlink(o)
        if o.is_symlink()
        else hashlib.blake2b(o.read_bytes()).hexdigest()
        if o.is_file()
        else ""
        for o in files
        if o.is_symlink() or not o.is_dir()
    } | {str(o.relative_to(d)): "" for o in d.rglob("*.partial")}


def write_pngs(d, n=3, size=40, mode="RGB", **kw):
    "Noise, one file an image."
    d.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (size, size, 3), "uint8")).convert(mode).save(
            d / f"{i}.png", **kw
        )
    return d


def write_tiff(path, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(
            path, "w", driver="GTiff", count=x.shape[0], height=x.shape[1], width=x.shape[2], dtype=x.dtype
        ) as f:
            f.write(x)


def write_classes(d):
    "Three classes of three images, whose names say both."
    for c in ("ash", "birch", "cedar"):
        write_pngs(d / c)
        for i in range(3):
            im = Image.open(d / c / f"{i}.png")
            im.putpixel((0, 0), (ord(c[0]), i, 0))
            im.save(d / c / f"{c}_{i}.png")
            (d / c / f"{i}.png").unlink()


class Trap:
    "What a pickle can hold: a call that the reader makes."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def trapped(d, **more):
    return dict(format=1, meta=dict(parameters={}), state=Trap(d / "ran")) | more


def bytes_of(o):
    f = io.BytesIO()
    torch.save(o, f)
    return f.getvalue()


@functools.cache
def stock():
    "A study after its stages: prepared scenes with lists, a backbone, a checkpoint, a training set. Made once."
    at = Path(tempfile.mkdtemp(prefix="cmid-stock-"))
    write_classes(at / "data")
    (at / "lists").mkdir()
    for k, n in dict(train=(0, 1), test=(2,)).items():
        (at / f"lists/{k}.txt").write_text("".join(f"{c}/{c}_{i}.png\n" for c in ("ash", "birch", "cedar") for i in n))
    prepare(
        at / "data",
        at / "prepared/scenes",
        side=64,
        lists={k: at / f"lists/{k}.txt" for k in ("train", "test")},
        workers=1,
    )
    prepare(at / "data", at / "prepared/pool", side=64, labelled="none", workers=1)
    export_backbone(
        create("resnet18", img_size=64),
        at / "models/random-resnet18",
        STUDY | dict(method="random", parameters={}, data_hash="0", data_licence=None, provenance={}, health={}),
    )
    save(at / "ckpt/epoch-1.ckpt", dict(w=torch.ones(3)), dict(parameters=dict(lr=0.1, head=dict(dim=8, depth=2))))
    return at


@pytest.fixture(scope="module", autouse=True)
def _stock_is_removed():
    yield
    if stock.cache_info().currsize:
        shutil.rmtree(stock())


def copy_of_stock(part, d, name=None, change=None):
    "A copy of a part of the stock in which one file is changed, or, where the change gives None, gone."
    shutil.copytree(stock() / part, d / part, copy_function=os.link)
    if name is None:
        return
    file = d / part / name
    old = file.read_bytes()
    file.unlink()
    new = change(old)
    if new is not None:
        file.write_bytes(new)


def json_with(**over):
    return lambda b: json.dumps(json.loads(b) | over).encode()


def array_file(x):
    f = io.BytesIO()
    np.save(f, x, allow_pickle=True)
    return lambda b: f.getvalue()


def safetensors_header(h, tail=b""):
    h = json.dumps(h).encode()
    return lambda b: len(h).to_bytes(8, "little") + h + tail


class Case(NamedTuple):
    id: str
    make: Any  # of a folder: put the bad input there
    meet: Any  # a command line with {d} for that folder, or a function of it
    says: Any  # what the line must hold, all of it


def nothing(d):
    pass


# --- parameters


def smoke_values(*sets, **over):
    "The project's parameters in the smoke profile, with some keys set (in the profile too) and others laid over."
    values = merge(load_yaml(ROOT / "params.yaml"), dict(profile="smoke", device="cpu"))
    for o in sets:
        values = with_set(values, o)
    return merge(values, over)


def without_labels():
    "The parameters of a study of images alone."
    values = smoke_values(study=dict(segment=[], change=[], detect=[]))
    values["study"]["apply"] = {}
    return values


def text(values):
    return yaml.safe_dump(deepcopy(values), sort_keys=False)


def without(key):
    values = smoke_values()
    *path, last = key.split(".")
    at = values
    for o in path:
        at = at[o]
    del at[last]
    return values


def parameters_case(id, content, *says):
    "A params.yaml; what every stage does first meets it."

    def make(d):
        o = content() if callable(content) else content
        (d / "params.yaml").write_bytes(o if isinstance(o, bytes) else (o if isinstance(o, str) else text(o)).encode())

    return Case(f"params: {id}", make, lambda d: check_all(Params(d)), says)


def setting_case(id, assignment, *says):
    return parameters_case(id, lambda: smoke_values(assignment), *says)


laughs = "a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(9)
)
merges = "a0: &a0 {k: v}\n" + "".join(f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 10)}]}}\n" for i in range(9))

PARAMS = [
    Case(
        "params: no file",
        lambda d: (d / "sub").mkdir(),
        lambda d: Params(d / "sub"),
        ["no params.yaml here or above", "CMID_ROOT"],
    ),
    parameters_case("no section", lambda: without("probe"), "params.yaml: probe: missing; add the section"),
    parameters_case(
        "no key", lambda: without("pretrain.mask_ratio"), "params.yaml: pretrain.mask_ratio: missing; add it"
    ),
    parameters_case("no datasets", lambda: without("datasets"), "params.yaml: datasets: must hold datasets by name"),
    parameters_case(
        "datasets of nothing",
        lambda: smoke_values() | dict(datasets=None),
        "params.yaml: datasets: must hold datasets by name",
    ),
    parameters_case(
        "no tasks", lambda: without("tasks"), "params.yaml: tasks: must hold images with labels by name; {} for none"
    ),
    parameters_case(
        "tasks of nothing",
        lambda: smoke_values() | dict(tasks=None),
        "params.yaml: tasks: must hold images with labels by name; {} for none",
    ),
    parameters_case(
        "tasks of nothing that are not run",
        lambda: without_labels() | dict(tasks=None),
        "params.yaml: tasks: must hold images with labels by name; {} for none",
    ),
    parameters_case(
        "a task of nothing", lambda: smoke_values() | dict(tasks=dict(land=None)), "params.yaml: tasks.land: missing"
    ),
    parameters_case(
        "a task named like a working folder",
        lambda: smoke_values(tasks={"land.partial": smoke_values()["tasks"]["land"]}),
        "params.yaml: tasks: 'land.partial': the ending .partial is for folders that are being written",
    ),
    parameters_case(
        "a dataset named like a working folder",
        lambda: smoke_values(datasets={"pool.Partial": dict(folder="a", lists="b")}),
        "params.yaml: datasets: 'pool.Partial': the ending .partial is for folders that are being written",
    ),
    *(
        setting_case(
            f"{k}: a split that is none",
            f"{k}.{s}={v}",
            f"params.yaml: {k}.{s}: tasks.{name} has no split '{v}' (did you mean '{s}'?); known: train",
        )
        for k, name, s, v in (
            ("segment", "land", "train", "trian"),
            ("change", "dates", "test", "tset"),
            ("detect", "objects", "test", "tests"),
        )
    ),
    parameters_case(
        "misspelt key",
        lambda: smoke_values(pretrain=dict(mask_ratoi=0.6)),
        "params.yaml: pretrain.mask_ratoi: unknown key (did you mean 'mask_ratio'",
    ),
    parameters_case(
        "misspelt section",
        lambda: smoke_values(pretrian={}),
        "params.yaml: pretrian: unknown section (did you mean 'pretrain'",
    ),
    setting_case("misspelt profile", "profile=smoek", "params.yaml: profile: 'smoek'", "did you mean 'smoke'"),
    setting_case(
        "misspelt dataset",
        "pretrain.dataset=pol",
        "params.yaml: pretrain.dataset: 'pol' is not in datasets (did you mean 'pool'?)",
    ),
    setting_case(
        "misspelt task",
        "study.detect=[objcts]",
        "params.yaml: study.detect: 'objcts' is not in tasks (did you mean 'objects'?)",
    ),
    setting_case(
        "misspelt recipe",
        "study.methods=[cmit]",
        "params.yaml: study.methods: 'cmit' is not in recipes (did you mean 'cmid'?)",
    ),
    setting_case("misspelt device", "device=gpu", "params.yaml: device: 'gpu' is not one of auto, cpu, mps, cuda"),
    setting_case(
        "text for a number", 'pretrain.epochs="3"', "params.yaml: pretrain.epochs: should be a valid integer (got '3')"
    ),
    setting_case(
        "true for a number", "pretrain.batch=true", "params.yaml: pretrain.batch: should be a valid integer (got True)"
    ),
    parameters_case(
        "list for a section",
        lambda: smoke_values() | dict(probe=[1]),
        "params.yaml: probe: must hold keys and values (got [1])",
    ),
    setting_case(
        "a scale twice",
        "detect.scales=[1.0,1.0]",
        "params.yaml: detect.scales: [1.0, 1.0] lists a value twice; remove one",
    ),
    setting_case("no scale", "detect.scales=[]", "params.yaml: detect.scales: List should have at least 1 item"),
    setting_case(
        "a scale of nothing",
        "detect.scales=[0.0]",
        "params.yaml: detect.scales.0: should be greater than or equal to 0.05 (got 0.0)",
    ),
    setting_case(
        "a gap as wide as a tile", "detect.gap=2048", "params.yaml: detect.gap: 2048 must be smaller than tile: 64"
    ),
    setting_case(
        "above its range",
        "pretrain.mask_ratio=1.5",
        "params.yaml: pretrain.mask_ratio: should be less than 1 (got 1.5)",
    ),
    setting_case(
        "below its range",
        "pretrain.batch=0",
        "params.yaml: pretrain.batch: should be greater than or equal to 1 (got 0)",
    ),
    setting_case("not a number", "pretrain.temperature=.nan", "params.yaml: pretrain.temperature: should be"),
    setting_case("infinite", "pretrain.lr=.inf", "params.yaml: pretrain.lr: should be a finite number (got inf)"),
    setting_case("a seed beyond 63 bits", f"seed={2**70}", "params.yaml: seed: should be less than"),
    setting_case(
        "side no multiple of 32", "prepare.side=100", "params.yaml: prepare.side: should be a multiple of 32 (got 100)"
    ),
    setting_case(
        "warm-up longer than the run",
        "pretrain.warmup_epochs=99",
        "params.yaml: pretrain.warmup_epochs: 99 must be smaller than epochs: 2; lower it or raise epochs",
    ),
    setting_case(
        "epoch smaller than a batch",
        "pretrain.epoch_images=3",
        "params.yaml: pretrain.epoch_images: 3 is smaller than batch: 8; raise it, or use 0",
    ),
    setting_case(
        "falling range", "prepare.stretch=[98.0, 2.0]", "params.yaml: prepare.stretch: must be strictly increasing"
    ),
    setting_case(
        "every loss off",
        "pretrain.weights={reconstruction: 0.0, contrast: 0.0, distillation: 0.0}",
        "params.yaml: pretrain.weights: all three are 0",
    ),
    setting_case(
        "learns from its test", "classify.test=train", "params.yaml: classify.test: 'train' is also the train split"
    ),
    setting_case(
        "init of no stage",
        "study.inits=[cmid-resnet19]",
        "params.yaml: study.inits: no stage produces 'cmid-resnet19' (did you mean 'cmid-resnet18'",
    ),
    parameters_case(
        "dataset that leaves its folder",
        lambda: smoke_values(datasets={"../../etc": dict(folder="a", lists="b")}),
        "params.yaml: datasets: '../../etc' is not a valid name",
    ),
    parameters_case(
        "dataset with a slash",
        lambda: smoke_values(datasets={"a/b": dict(folder="a", lists="b")}),
        "params.yaml: datasets: 'a/b' is not a valid name",
    ),
    parameters_case(
        "dataset that is a command",
        lambda: smoke_values(datasets={"x; touch ran": dict(folder="a", lists="b")}),
        "params.yaml: datasets: 'x; touch ran' is not a valid name",
    ),
    setting_case(
        "backbone that leaves its folder",
        "study.backbones=[../../etc, resnet18]",
        "params.yaml: study.backbones: '../../etc' is not a valid name",
    ),
    parameters_case("empty", "", "params.yaml: must hold keys and values"),
    parameters_case("a list", "- a\n- b\n", "params.yaml: must hold keys and values"),
    parameters_case("a tab", "seed: 0\nprepare:\n\tside: 64\n", "params.yaml: not valid YAML at line 3"),
    parameters_case(
        "a key twice", lambda: text(smoke_values()) + "seed: 1\n", "'seed' appears twice: remove one", "at line"
    ),
    parameters_case(
        "a key twice in a section",
        "seed: 0\nprepare:\n  side: 64\n  side: 96\n",
        "params.yaml: not valid YAML at line 4 ('side' appears twice",
    ),
    parameters_case(
        "a tag that calls",
        "seed: !!python/object/apply:os.mkdir [ran]\n",
        "params.yaml: not valid YAML at line 1",
        "python/object/apply",
    ),
    parameters_case("an alias for gigabytes", laughs, "params.yaml: not valid YAML at line 2 (aliases are not read"),
    parameters_case("merges for gigabytes", merges, "params.yaml: not valid YAML at line 2 (aliases are not read"),
    parameters_case("a circle", "a: &a [*a]\n", "aliases are not read"),
    parameters_case("nested without end", "a: " + "[" * 2000, "params.yaml: not valid YAML (nested too deeply)"),
    parameters_case("another encoding", "seed: 0 # é".encode("latin-1"), "params.yaml: is not UTF-8 text"),
    parameters_case("a zero byte", b"seed: 0\0\n", "params.yaml: not valid YAML"),
    parameters_case("two documents", "seed: 0\n---\nseed: 1\n", "params.yaml: not valid YAML at line 2"),
    parameters_case(
        "a number for a key", lambda: smoke_values(prepare={5: 1}), "params.yaml: prepare.5: Keys should be strings"
    ),
    parameters_case("a day that is none", "seed: 2020-13-45\n", "params.yaml: not valid YAML"),
]

# --- what a folder of images may hold, and what is asked of it


def images_case(id, make, options, *says):
    return Case(
        f"prepare: {id}",
        lambda d: (make(d), copy_of_stock("prepared", d)),
        [
            "cmid_prepare",
            "{d}/in",
            "{d}/prepared/scenes",
            *(("--side", "64") if "--side" not in options else ()),
            *options,
        ],
        says,
    )


def good(d):
    write_pngs(d / "in")


def lists(**lines):
    def make(d):
        write_classes(d / "in")
        for k, v in lines.items():
            (d / f"{k}.txt").write_bytes(v if isinstance(v, bytes) else v.encode())

    return make


def lists_case(id, says, *options, **lines):
    return images_case(
        f"list {id}", lists(**lines), ["--lists", ",".join(f"{k}={{d}}/{k}.txt" for k in lines), *options], *says
    )


PREPARE = [
    images_case("no folder", nothing, [], "/in: no such folder"),
    images_case("a file in place of a folder", lambda d: (d / "in").write_text("x"), [], "/in: is not a folder"),
    images_case("empty folder", lambda d: (d / "in").mkdir(), [], "/in: holds no PNG, JPEG or TIFF"),
    images_case(
        "not one good file",
        lambda d: (d / "in").mkdir() or (d / "in/a.png").touch(),
        [],
        "not one image can be used (1 skipped; first: a.png: empty file (0 bytes))",
    ),
    images_case(
        "not one value",
        lambda d: (d / "in").mkdir() or write_tiff(d / "in/a.tif", np.full((2, 40, 40), np.nan, "float32")),
        [],
        "not one image can be used",
    ),
    images_case("side no multiple of 32", good, ["--side", "100"], "side must be a multiple of 32 pixels, got 100"),
    images_case("side 0", good, ["--side", "0"], "side must be a multiple of 32 pixels, got 0"),
    images_case(
        "a band that is not there",
        good,
        ["--bands", "0,7"],
        "/in: bands [0, 7] were asked for, but no image has more than 3: choose from 0 to 2",
    ),
    images_case("a band twice", good, ["--bands", "1,1"], "bands must be different numbers from 0, got [1, 1]"),
    images_case("a band by name", good, ["--bands", "red"], "--bands: must be numbers separated by commas", "'red'"),
    images_case("tile below 0", good, ["--tile", "-1"], "tile must be 0 or a number of pixels, got -1"),
    images_case(
        "stretch that falls",
        good,
        ["--stretch", "98,2"],
        "stretch must be two increasing percentiles from 0 to 100, got [98.0, 2.0]",
    ),
    images_case(
        "stretch of one",
        good,
        ["--stretch", "2"],
        "stretch must be two increasing percentiles from 0 to 100, got [2.0]",
    ),
    images_case(
        "stretch of no numbers",
        good,
        ["--stretch", "nan,nan"],
        "stretch must be two increasing percentiles from 0 to 100",
    ),
    images_case("fewer than no workers", good, ["--workers", "-1"], "workers must be 0 (all cores) or more, got -1"),
    images_case("shards of 0", good, ["--shard_mb", "0"], "shard_mb must be a number above 0"),
    images_case("shards without end", good, ["--shard_mb", "inf"], "shard_mb must be a number above 0, got inf"),
    images_case("unknown kind of labels", good, ["--labelled", "names"], "labelled must be one of", "'names'"),
    images_case(
        "labels of lists without labels",
        good,
        ["--labelled", "lists"],
        "labelled='lists', but no line of a list has a label",
    ),
    images_case("class folders that are none", good, ["--labelled", "folders"], "0.png: is in no class folder"),
    images_case("unknown way with bad files", good, ["--on_error", "ski"], "on_error must be one of", "'ski'"),
    images_case("list without a name", good, ["--lists", "train.txt"], "--lists: 'train.txt' must be NAME=FILE"),
    images_case("a split twice", good, ["--lists", "train=a.txt,train=b.txt"], "--lists: train is named twice"),
    images_case(
        "split that leaves its folder", good, ["--lists", "../x=a.txt"], "lists: '../x' is not a valid split name"
    ),
    images_case(
        "list that is missing",
        good,
        ["--lists", "train={d}/no.txt"],
        "/no.txt: this list cannot be read (No such file or directory)",
    ),
    lists_case("of no text", ["/train.txt: this list is not UTF-8 text"], train=b"\xff\xfe\0"),
    lists_case("that is empty", ["/train.txt: none of its lines names an image", "empty"], train="\r\n\r\n"),
    lists_case(
        "naming missing files only",
        ["/train.txt: none of its lines names an image of the folder (first: x/y.png)"],
        train="x/y.png\r\nx/z.png\r\n",
    ),
    lists_case(
        "with a line without label",
        ["/train.txt: ash_1.png: this line has no label, but others have one"],
        train="ash_0.png 0\nash_1.png\n",
    ),
    lists_case(
        "with two labels of a file",
        ["/test_x.txt: ash/ash_0.png has two labels, 0 and 1"],
        train="ash_0.png 0\n",
        test_x="ash_0.png 1\n",
    ),
    lists_case(
        "train and test overlap",
        ["lists train and test have 1 image in common, the first is 'ash/ash_1.png'; remove each from one list"],
        train="ash_0.png\nash_1.png\n",
        test="ash_1.png\n",
    ),
    lists_case(
        "of one family overlap",
        ["lists train_20 and test_80 have 1 image in common"],
        train_20="ash_0.png\n",
        test_80="ash_0.png\n",
    ),
    Case(
        "prepare: into a folder of other things",
        lambda d: (good(d), (d / "out").mkdir(), (d / "out/mine.txt").write_text("mine")),
        ["cmid_prepare", "{d}/in", "{d}/out"],
        ["/out: exists and is not a prepared folder: name another one"],
    ),
    Case(
        "prepare: below a file",
        lambda d: (good(d), (d / "out").write_text("mine")),
        ["cmid_prepare", "{d}/in", "{d}/out/x"],
        ["Not a directory", "/out/"],
    ),
    Case(
        "sample: into a folder that exists",
        lambda d: write_pngs(d / "data"),
        ["cmid_sample", "{d}/data"],
        ["/data exists: move it away or name another folder"],
    ),
]


def png_bytes(d, **options):
    return (write_pngs(d / "tmp", 1, **options) / "0.png").read_bytes()


def one(name, content):
    "Put one file beside the good ones; `content` makes it from a good PNG."

    def make(d):
        data = png_bytes(d, size=120)
        shutil.rmtree(d / "tmp")
        (d / "in" / name).write_bytes(content(data))

    return make


def jpeg(d, cut=None, **kw):
    f = io.BytesIO()
    Image.fromarray(np.random.default_rng(9).integers(0, 256, (120, 120, 3), "uint8")).save(f, "JPEG", **kw)
    (d / "in/bad.jpg").write_bytes(f.getvalue()[:cut])


def bomb(n):
    "A PNG of a hundred bytes that says it is n x n."

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", n, n, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(99)))
        + chunk(b"IEND", b"")
    )


def cut_tiff(d):
    write_tiff(d / "in/bad.tif", np.ones((3, 90, 90), "float32"))
    os.truncate(d / "in/bad.tif", 9000)


FILES = {  # id: how it is made beside three good PNGs, its name, its reason
    "no image": (one("bad.jpg", lambda b: b"no image"), "bad.jpg", "no PNG, JPEG or TIFF inside"),
    "zero bytes": (one("bad.png", lambda b: b""), "bad.png", "empty file (0 bytes)"),
    "PNG cut in its data": (one("bad.png", lambda b: b[: len(b) // 2]), "bad.png", "damaged or cut short"),
    "PNG cut in its head": (one("bad.png", lambda b: b[:40]), "bad.png", ""),
    "PNG with a wrong checksum": (one("bad.png", lambda b: b[:30] + bytes([b[30] ^ 1]) + b[31:]), "bad.png", ""),
    "JPEG cut short": (lambda d: jpeg(d, 3000), "bad.jpg", "truncated"),
    "TIFF cut short": (cut_tiff, "bad.tif", ""),
    "a page named like an image": (
        one("bad.png", lambda b: b"<html></html>"),
        "bad.png",
        "no PNG, JPEG or TIFF inside",
    ),
    "a pickle named like an image": (
        one("bad.png", lambda b: pickle.dumps(Trap("ran"))),
        "bad.png",
        "no PNG, JPEG or TIFF inside",
    ),
    "a pixel bomb": (lambda d: (d / "in/bad.png").write_bytes(bomb(60_000)), "bad.png", "3600000000 pixels"),
    "a smaller pixel bomb": (lambda d: (d / "in/bad.png").write_bytes(bomb(12_000)), "bad.png", "12000 x 12000 pixels"),
    "a folder named like an image": (lambda d: (d / "in/bad.png").mkdir(), "bad.png", "a folder named like an image"),
    "a link to itself": (lambda d: (d / "in/bad.png").symlink_to(d / "in/bad.png"), "bad.png", "symbolic links"),
    "a link to nowhere": (lambda d: (d / "in/bad.tif").symlink_to(d / "in/no.tif"), "bad.tif", "No such file"),
    "a pipe": (lambda d: os.mkfifo(d / "in/bad.png"), "bad.png", "not a regular file"),
    "another band count": (
        lambda d: write_tiff(d / "in/bad.tif", np.ones((5, 40, 40), "uint8")),
        "bad.tif",
        "band count 5, most files have 3",
    ),
    "complex numbers": (
        lambda d: write_tiff(d / "in/bad.tif", np.ones((3, 40, 40), "complex64")),
        "bad.tif",
        "complex",
    ),
    "a name with a line break": (one("ba\nd.png", lambda b: b), "ba\nd.png", "a line break in its name"),
    "nothing but NaN": (
        lambda d: write_tiff(d / "in/bad.tif", np.full((3, 40, 40), np.nan, "float32")),
        "bad.tif",
        "not one pixel has a value",
    ),
}

# --- prepared folders, models and checkpoints, as a stranger or a full disk may leave them


def prepared_case(id, name, change, *says):
    return Case(
        f"prepared: {id}",
        lambda d: copy_of_stock("prepared", d, f"scenes/{name}", change),
        lambda d: (p := Prepared(d / "prepared/scenes"), p[:], p.source(0)),
        says,
    )


PREPARED = [
    prepared_case(
        "no manifest",
        "manifest.json",
        lambda b: None,
        "prepared/scenes: is not a prepared folder",
        "manifest.json",
        "cmid_prepare",
    ),
    prepared_case("manifest cut short", "manifest.json", lambda b: b[:99], "prepared/scenes: is not a prepared folder"),
    prepared_case(
        "manifest nested without end",
        "manifest.json",
        lambda b: b"[" * 100_000,
        "prepared/scenes: is not a prepared folder",
    ),
    prepared_case(
        "manifest a list",
        "manifest.json",
        lambda b: b"[]",
        "prepared/scenes: is damaged",
        "prepare it again",
    ),
    prepared_case(
        "manifest without a key",
        "manifest.json",
        lambda b: b'{"format": 1}',
        "prepared/scenes: is damaged (KeyError 'side')",
    ),
    prepared_case(
        "manifest of a newer version",
        "manifest.json",
        json_with(format=99),
        "manifest.json: format 99, but this version of cmid reads 1: upgrade cmid",
    ),
    prepared_case(
        "manifest with a side below 0", "manifest.json", json_with(side=-64), "side, bands, mean and std do not agree"
    ),
    prepared_case(
        "manifest that points elsewhere",
        "manifest.json",
        json_with(shards=[dict(file="../../../etc/passwd", count=9)]),
        "passwd: missing or truncated",
    ),
    prepared_case("no shards", "manifest.json", json_with(shards=[]), "prepared/scenes: is damaged"),
    prepared_case(
        "shard missing",
        "images-00000.npy",
        lambda b: None,
        "images-00000.npy: missing or truncated",
        "prepare it again",
    ),
    prepared_case("shard cut short", "images-00000.npy", lambda b: b[:-1], "images-00000.npy: missing or truncated"),
    prepared_case(
        "shard of another shape",
        "images-00000.npy",
        lambda b: b.replace(b"(9, ", b"(8, ", 1),
        "images-00000.npy: damaged",
    ),
    prepared_case(
        "shard that is a pickle",
        "images-00000.npy",
        lambda b: (pickle.dumps(Trap("ran")) + bytes(len(b)))[: len(b)],
        "images-00000.npy: damaged",
    ),
    prepared_case("labels cut short", "labels.npy", lambda b: b[:90], "prepared/scenes: is damaged"),
    prepared_case(
        "labels that are a pickle",
        "labels.npy",
        array_file(np.array([Trap("ran")], object)),
        "prepared/scenes: is damaged",
    ),
    prepared_case(
        "label outside the classes",
        "labels.npy",
        array_file(np.full(9, 3)),
        "labels.npy does not fit the images and classes",
    ),
    prepared_case(
        "split beyond the images",
        "split-train.npy",
        array_file(np.array([9])),
        "split-train.npy names images that do not exist",
    ),
    prepared_case("list of items cut short", "items.csv", lambda b: b[:50], "items.csv: missing or truncated"),
]


def model_case(id, name, change, *says):
    return Case(
        f"model: {id}",
        lambda d: copy_of_stock("models", d, f"random-resnet18/{name}", change),
        lambda d: load_backbone(d / "models/random-resnet18"),
        says,
    )


MODELS = [
    Case(
        "model: no folder",
        nothing,
        lambda d: load_backbone(d / "models/cmid-resnet18"),
        ["models/cmid-resnet18/card.json: there is no backbone here"],
    ),
    model_case("card cut short", "card.json", lambda b: b[:-20], "card.json: is not JSON"),
    model_case("card nested without end", "card.json", lambda b: b"[" * 100_000, "card.json: is not JSON"),
    model_case("card a list", "card.json", lambda b: b"[]", "card.json: must hold a JSON object"),
    model_case(
        "card of a newer version",
        "card.json",
        json_with(format=9),
        "card.json: was written by a newer cmid (format 9); upgrade cmid",
    ),
    model_case("card with an unknown key", "card.json", json_with(colour=1), "card.json: colour: "),
    model_case("card with text for a number", "card.json", json_with(in_chans="3"), "card.json: in_chans: "),
    model_case(
        "card with other bands", "card.json", json_with(in_chans=4), "card.json: mean: has 3 values for 4 bands"
    ),
    model_case("card with a spread below 0", "card.json", json_with(std=[0.1, -0.1, 0.1]), "card.json: std.1: "),
    model_case("card with NaN", "card.json", json_with(mean=[float("nan")] * 3), "card.json: mean.0: "),
    model_case("side no multiple of 32", "card.json", json_with(img_size=100), "card.json: img_size: "),
    model_case(
        "architecture unknown",
        "card.json",
        json_with(architecture="resnet81"),
        "card.json: architecture: backbone 'resnet81' is unknown to timm (did you mean 'resnet18'",
    ),
    model_case(
        "architecture of another family",
        "card.json",
        json_with(architecture="vit_tiny_patch16_224"),
        "model.safetensors: ",
        " is missing",
    ),
    model_case(
        "architecture of a network that cannot be pretrained",
        "card.json",
        json_with(architecture="efficientnet_b0"),
        "model.safetensors: ",
        " is missing",
    ),
    model_case(
        "architecture that is a path",
        "card.json",
        json_with(architecture="../../etc"),
        "card.json: architecture: backbone '../../etc' is unknown",
    ),
    model_case(
        "architecture with an unknown tag",
        "card.json",
        json_with(architecture="resnet18.x"),
        "card.json: architecture: backbone 'resnet18.x' has no weights 'x' in timm",
    ),
    model_case("no weights", "model.safetensors", lambda b: None, "model.safetensors: is missing"),
    model_case(
        "weights cut short",
        "model.safetensors",
        lambda b: b[: 10**6],
        "model.safetensors: is truncated or not a safetensors file",
    ),
    model_case(
        "weights with a header of 4 EB",
        "model.safetensors",
        lambda b: (2**62).to_bytes(8, "little") + b[8:99],
        "model.safetensors: is truncated or not a safetensors file",
    ),
    model_case(
        "weights that claim 4 TB",
        "model.safetensors",
        safetensors_header({"a": dict(dtype="F32", shape=[10**12], data_offsets=[0, 4 * 10**12])}, b"x" * 8),
        "model.safetensors: is truncated or not a safetensors file",
    ),
    model_case(
        "weights whose shape overflows",
        "model.safetensors",
        safetensors_header({"a": dict(dtype="F32", shape=[2**40, 2**40], data_offsets=[0, 8])}, b"x" * 8),
        "model.safetensors: is truncated or not a safetensors file",
    ),
    model_case(
        "weights that are a pickle",
        "model.safetensors",
        lambda b: bytes_of(dict(a=Trap("ran"))),
        "model.safetensors: is truncated or not a safetensors file",
    ),
    model_case(
        "weights with one too many",
        "model.safetensors",
        lambda b: safetensors.torch.save(safetensors.torch.load(b) | dict(extra=torch.ones(1))),
        "model.safetensors: extra does not belong",
    ),
    model_case(
        "weights of another type",
        "model.safetensors",
        lambda b: safetensors.torch.save(
            {k: v.half() if k == "bn1.bias" else v for k, v in safetensors.torch.load(b).items()}
        ),
        "model.safetensors: bn1.bias is",
    ),
    model_case(
        "extras of another encoder",
        "extras.safetensors",
        lambda b: safetensors.torch.save(dict(mask_token=torch.ones(5))),
        "extras.safetensors: mask_token must hold 64",
    ),
    Case(
        "model: a decoder where there is none",
        lambda d: copy_of_stock("models", d),
        lambda d: load_decoder(d / "models/random-resnet18", create("resnet18", img_size=64)),
        ["models/random-resnet18: has no decoder"],
    ),
]


def checkpoint_case(id, change, *says, expect=None):
    return Case(
        f"checkpoint: {id}",
        lambda d: (d / "ckpt").mkdir() or (d / "ckpt/epoch-1.ckpt").write_bytes(change(d)),
        lambda d: load(d / "ckpt/epoch-1.ckpt", expect),
        ["epoch-1.ckpt: ", *says],
    )


def checkpoint_bytes():
    return (stock() / "ckpt/epoch-1.ckpt").read_bytes()


CHECKPOINTS = [
    checkpoint_case("text", lambda d: b"hello", "truncated or altered"),
    checkpoint_case("empty", lambda d: b"", "truncated or altered"),
    checkpoint_case("cut short", lambda d: checkpoint_bytes()[:-100], "truncated or altered"),
    checkpoint_case("a picture", lambda d: png_bytes(d), "truncated or altered"),
    checkpoint_case("other tensors", lambda d: bytes_of([torch.ones(3)]), "is not a training checkpoint of cmid"),
    checkpoint_case(
        "of another form",
        lambda d: bytes_of(dict(format=torch.ones(3), meta=[], state={})),
        "is not a training checkpoint of cmid",
    ),
    checkpoint_case(
        "of a newer version",
        lambda d: bytes_of(dict(format=99, meta={}, state={})),
        "was written by a newer cmid (format 99",
        "upgrade cmid",
    ),
    checkpoint_case(
        "of other parameters",
        lambda d: checkpoint_bytes(),
        "was trained with other parameters (head.dim: 8 then, 16 now, lr: 0.1 then, 0.2 now)",
        expect=dict(lr=0.2, head=dict(dim=16, depth=2)),
    ),
    checkpoint_case("a pickle that calls", lambda d: bytes_of(trapped(d)), "could run code, and was not opened"),
    checkpoint_case("a bare pickle that calls", lambda d: pickle.dumps(Trap(d / "ran")), "truncated or altered"),
    Case(
        "checkpoint: not one can be read",
        lambda d: (d / "ckpt").mkdir() or (d / "ckpt/epoch-1.ckpt").write_bytes(b"x"),
        lambda d: latest(d / "ckpt"),
        ["ckpt: none of its 1 checkpoints can be read; delete them to start again"],
    ),
    Case(
        "convert: no file",
        nothing,
        ["cmid_convert", "{d}/no.pth", "{d}/b", "--backbone", "resnet18"],
        ["/no.pth: there is no such file"],
    ),
    Case(
        "convert: no backbone named",
        nothing,
        ["cmid_convert", "{d}/no.pth", "{d}/b"],
        ["--backbone: name the architecture"],
    ),
    Case(
        "convert: unknown backbone",
        lambda d: torch.save({}, d / "a.pth"),
        ["cmid_convert", "{d}/a.pth", "{d}/b", "--backbone", "resnet81"],
        ["'resnet81' is unknown to timm (did you mean 'resnet18'"],
    ),
    Case(
        "convert: a file of another network",
        lambda d: torch.save(dict(w=torch.ones(3)), d / "a.pth"),
        ["cmid_convert", "{d}/a.pth", "{d}/b", "--backbone", "resnet18"],
        ["/a.pth: bn1.bias is missing"],
    ),
    Case(
        "convert: a pickle that calls",
        lambda d: torch.save(Trap(d / "ran"), d / "a.pth"),
        ["cmid_convert", "{d}/a.pth", "{d}/b", "--backbone", "resnet18"],
        ["/a.pth: holds more than tensors", "was not opened"],
    ),
    Case(
        "convert: into a folder of other things",
        lambda d: (write_pngs(d / "b"), torch.save(create("resnet18").model.state_dict(), d / "a.pth")),
        ["cmid_convert", "{d}/a.pth", "{d}/b", "--backbone", "resnet18"],
        ["/b: holds files that are not a backbone", "choose another folder"],
    ),
    Case(
        "convert: back from no folder",
        nothing,
        ["cmid_convert", "{d}/b", "{d}/a.pth", "--direction", "from_cmid"],
        ["/b/card.json: there is no backbone here"],
    ),
]

# --- what contradicts itself only where it meets data or a machine


def build_with(**changes):
    def meet(d):
        settings = Params(ROOT, "smoke").pretrain.model_copy(update=changes)
        return build_cmid(settings, "resnet18", side=64)

    return meet


def splits(id, *says, **lines):
    def make(d):
        for k, v in lines.items():
            (d / f"{k}.txt").write_text(v)
        prepare(stock() / "data", d / "p", side=32, lists={k: d / f"{k}.txt" for k in lines}, workers=1)

    return Case(f"probe: {id}", make, lambda d: class_splits(Prepared(d / "p"), "train", "test"), says)


def dataset(id, says, **where):
    return Case(
        f"dataset: {id}",
        lambda d: (
            (d / "images").mkdir(),
            (d / "params.yaml").write_text(text(smoke_values(datasets=dict(scenes=where)))),
            copy_of_stock("prepared", d),
        ),
        lambda d: prepare_dataset(Params(d), "scenes"),
        [says],
    )


MEETINGS = [
    dataset(
        "a folder of images that is not there",
        "params.yaml: datasets.scenes.folder: imagse is not a folder",
        folder="imagse",
        lists="images",
    ),
    dataset(
        "a folder of lists that is not there",
        "params.yaml: datasets.scenes.lists: lits is not a folder",
        folder="images",
        lists="lits",
    ),
    dataset("an empty folder of images", "/images: holds no PNG, JPEG or TIFF", folder="images", lists="images"),
    Case(
        "run: a backbone unknown to timm",
        nothing,
        lambda d: create("resnt50"),
        ["backbone 'resnt50' is unknown to timm (did you mean 'resnet50'"],
    ),
    Case(
        "run: a backbone of another kind",
        nothing,
        lambda d: check_pretrainable("efficientnet_b0"),
        ["'efficientnet_b0' is neither ResNet, Swin nor ViT: it can be a baseline, but cannot be pretrained"],
    ),
    Case(
        "run: side no multiple of 32",
        nothing,
        lambda d: create("resnet18", img_size=100),
        ["img_size is 100: it must be a positive multiple of 32"],
    ),
    Case(
        "run: images of another side",
        nothing,
        lambda d: create("resnet18")(torch.zeros(1, 3, 100, 64)),
        ["images are 100 x 64 px: both sides must be multiples of 32"],
    ),
    Case(
        "run: images of other bands",
        nothing,
        lambda d: create("resnet18")(torch.zeros(1, 4, 64, 64)),
        ["images have 4 bands, but resnet18 was built for 3"],
    ),
    Case(
        "run: more matches than cells",
        nothing,
        build_with(matches=5),
        ["matches: 5 is more than the 4 cells of resnet18 at 64 px; lower it or leave it null"],
    ),
    Case(
        "run: batch larger than the data",
        nothing,
        lambda d: Batches(np.zeros((7, 3, 32, 32), "uint8"), range(7), 8),
        ["params.yaml: pretrain.batch: 8 is more than the 7 images of an epoch; lower it"],
    ),
    Case(
        "run: a GPU where there is none",
        nothing,
        lambda d: device("cuda:99"),
        ["params.yaml: device: 'cuda:99' is not on this machine", "use device: auto or cpu"],
    ),
    Case(
        "run: float16 on a CPU",
        nothing,
        lambda d: precision_of("float16", torch.device("cpu")),
        ["params.yaml: pretrain.precision: float16 needs a GPU"],
    ),
    Case(
        "run: a normalisation of other bands",
        nothing,
        lambda d: pooled_features(create("resnet18"), np.zeros((1, 1, 32, 32), "uint8"), [0], [0.5] * 3, [0.5] * 3),
        ["images have 1 band, but mean and std have 3"],
    ),
    splits(
        "a label outside the classes",
        "1 image is in 'test' of a class that 'train' does not have, "
        "the first is cedar/cedar_2.png ('cedar'); correct the lists",
        train="ash_0.png 0\nbirch_0.png 1\n",
        test="ash_1.png 0\ncedar_2.png 2\n",
    ),
    splits(
        "a misspelt split",
        "has no split 'test' (did you mean 'tests'?); it has train, tests",
        train="ash_0.png 0\nbirch_0.png 1\n",
        tests="ash_1.png 0\n",
    ),
    Case(
        "probe: no labels",
        lambda d: copy_of_stock("prepared", d),
        lambda d: class_splits(Prepared(d / "prepared/pool"), "train", "test"),
        ["prepared/pool: has no classes; name a labelled dataset"],
    ),
    Case(
        "probe: train and test the same",
        lambda d: copy_of_stock("prepared", d),
        lambda d: class_splits(Prepared(d / "prepared/scenes"), "train", "train"),
        ["6 images are in both 'train' and 'train'", "list each once"],
    ),
]

# --- the commands of a study


def notebook(code="from cmid.a import f"):
    return json.dumps(
        dict(
            cells=[
                dict(
                    cell_type="code",
                    id="a",
                    metadata=dict(tags=["parameters"]),
                    source=[code],
                    outputs=[],
                    execution_count=None,
                )
            ],
            metadata=dict(kernelspec=dict(name="python3", display_name="", language="python")),
            nbformat=4,
            nbformat_minor=5,
        )
    )


def project(d, module="def f(): pass", cells=None):
    "A package of one module, a stage that imports it, and the digest of an earlier run."
    for name, o in {
        "params.yaml": text(smoke_values()),
        "cmid/a.py": module,
        "nbs/pipeline/probe.ipynb": cells or notebook(),
        "digests/probe.json": "old",
        "digests/gone.json": "old",
    }.items():
        (d / name).parent.mkdir(parents=True, exist_ok=True)
        (d / name).write_text(o)


def digest_case(id, says, **kw):
    return Case(f"digest: {id}", lambda d: project(d, **kw), ["cmid_digest"], says)


def repository(d, own="pretrain: {epochs: 3}", git=True):
    project(d)
    (d / "studies/tiny").mkdir(parents=True)
    (d / "studies/tiny/params.yaml").write_text(own)
    (d / "studies/tiny/results.json").write_text("earlier")
    for o in (
        (
            ["init", "-q"],
            ["add", "."],
            ["-c", "user.name=cmid", "-c", "user.email=cmid@example.com", "commit", "-qm", "x"],
        )
        if git
        else ()
    ):
        subprocess.run(["git", *o], cwd=d, check=True)


def study_case(id, says, *sets, **kw):
    return Case(
        f"study: {id}",
        lambda d: repository(d, **kw),
        ["cmid_study", "{d}/studies/tiny", *(o for s in sets for o in ("--set", s))],
        [says],
    )


def set_case(id, says, *args):
    return Case(f"stage: {id}", project, ["cmid_stage", *args], [says])


STUDIES = [
    Case("digest: outside of a study", nothing, ["cmid_digest"], ["no params.yaml here or above"]),
    digest_case("a module that is no Python", ["/cmid/a.py:2: cannot be parsed"], module="x = 1\ndef (:\n"),
    digest_case("a module with a zero byte", ["/cmid/a.py", ": cannot be parsed", "null bytes"], module="x = 1\0"),
    digest_case(
        "a cell that is no Python",
        ["/nbs/pipeline/probe.ipynb: a cell cannot be parsed", "def (:"],
        cells=notebook("def (:"),
    ),
    digest_case(
        "a notebook cut short", ["/nbs/pipeline/probe.ipynb: is not a readable notebook"], cells=notebook()[:-9]
    ),
    digest_case("a notebook of another form", ["/nbs/pipeline/probe.ipynb: is not a readable notebook"], cells="[1]"),
    Case(
        "digest: no stages",
        lambda d: (project(d), (d / "nbs/pipeline/probe.ipynb").unlink()),
        ["cmid_digest"],
        ["/nbs/pipeline: holds no notebook"],
    ),
    Case(
        "study: no such folder",
        repository,
        ["cmid_study", "{d}/studies/tny"],
        ["/studies/tny: holds no params.yaml; known: tiny"],
    ),
    study_case("no repository", "a study runs in a clone of a commit", git=False),
    study_case(
        "a tag that calls",
        "/studies/tiny/params.yaml: not valid YAML at line 1",
        own="seed: !!python/object/apply:os.mkdir [ran]",
    ),
    study_case(
        "misspelt key", "params.yaml: pretrain.epoch: unknown key (did you mean 'epochs'?)", own="pretrain: {epoch: 3}"
    ),
    study_case(
        "dataset that is a command",
        "params.yaml: datasets: 'x; touch ran' is not a valid name",
        own='datasets: {"x; touch ran": {folder: a, lists: b}, pool: {folder: a, lists: b}, '
        "scenes: {folder: a, lists: b}}",
    ),
    study_case(
        "folder of images that is not there",
        "datasets.pool.folder: data/pool is not a folder; name it with --set datasets.pool.folder=/where/it/is",
    ),
    study_case(
        "folder of labels that is not there",
        "tasks.land.folder: data/segmentation is not a folder; name it with --set tasks.land.folder=/where/it/is",
        *(f"datasets.{o}.{k}=." for o in ("pool", "scenes") for k in ("folder", "lists")),
    ),
    study_case("set without a value", "--set pretrain.epochs: write KEY=VALUE", "pretrain.epochs"),
    study_case(
        "set a misspelt key",
        "--set pretrain.epoch: pretrain.epoch is not a parameter (did you mean 'epochs'?)",
        "pretrain.epoch=3",
    ),
    study_case("set what is no YAML", "--set pretrain.betas: not valid YAML", "pretrain.betas=[1, 2"),
    study_case("set a tag that calls", "--set seed: not valid YAML", "seed=!!python/object/apply:os.mkdir [ran]"),
    study_case(
        "set a wrong type", "params.yaml: pretrain.epochs: should be a valid integer (got '3')", 'pretrain.epochs="3"'
    ),
    set_case("no such stage", "nbs/pipeline/prob.ipynb: no such stage (did you mean 'probe'?)", "prob"),
    set_case("a stage that leaves its folder", "stage: '../../etc' is not a valid name", "../../etc"),
    set_case(
        "an init that leaves its folder", "-p init: '../../etc' is not a valid name", "probe", "-p", "init", "../../etc"
    ),
    set_case(
        "a dataset that is code",
        """-p dataset: "x'); import os #" is not a valid name""",
        "probe",
        "-p",
        "dataset",
        "x'); import os #",
    ),
    set_case("an empty name", "-p init: '' is not a valid name", "probe", "-p", "init", ""),
]

# --- all of them

CASES = [*PARAMS, *PREPARE, *PREPARED, *MODELS, *CHECKPOINTS, *MEETINGS, *STUDIES]


def line_of(meet, d):
    "What a command or a function says when it refuses."
    if callable(meet):
        with pytest.raises((CmidError, OSError)) as e:
            meet(d)
        return str(e.value)
    status, out, err = run(*(o.replace("{d}", str(d)) for o in meet))
    assert status == 1 and err.startswith(meet[0] + ": ") and not out, (status, out, err)
    return err.removesuffix("\n")


@pytest.mark.parametrize("case", CASES, ids=lambda o: o.id)
def test_one_line_and_nothing_lost(case, tmp_path, monkeypatch):
    case.make(tmp_path)
    before = contents(tmp_path)
    monkeypatch.setenv("CMID_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    line = line_of(case.meet, tmp_path)
    assert "\n" not in line and "Traceback" not in line and len(line) < 700
    for o in case.says:
        assert o in line, line
    assert contents(tmp_path) == before and not list(tmp_path.rglob("ran"))


def test_a_smoke_study_has_tasks_of_its_own(tmp_path):
    with pytest.raises(
        CmidError, match="smoke: 'other' is not a task of a smoke study, which has only land, dates, objects"
    ):
        smoke_tasks(tmp_path, ["land", "other"])
    assert not list(tmp_path.iterdir())


def test_every_case_has_a_name_of_its_own():
    names = [o.id for o in CASES]
    assert len(set(names)) == len(names) > 150


@pytest.mark.parametrize(
    "name, args, says",
    [
        ("cmid_prepare", [], "the following arguments are required: folder"),
        ("cmid_prepare", ["a", "b", "--side", "x"], "argument --side: invalid int value: 'x'"),
        ("cmid_prepare", ["a", "b", "--bnads", "1"], "unrecognized arguments: --bnads 1"),
        ("cmid_sample", ["a", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        ("cmid_convert", ["a", "b", "--direction", "sideways"], "argument --direction: invalid choice: 'sideways'"),
        ("cmid_stage", ["probe", "-p", "dataset"], "argument -p: expected 2 arguments"),
        ("cmid_study", [], "the following arguments are required: folder"),
        ("cmid_digest", ["a", "b"], "unrecognized arguments: b"),
    ],
)
def test_a_command_line_that_is_none(name, args, says, tmp_path, monkeypatch):
    "The usage, then one line; status 2, as everywhere."
    monkeypatch.chdir(tmp_path)
    status, out, err = run(name, *args)
    assert (
        status == 2
        and not out
        and "Traceback" not in err
        and says in err.splitlines()[-1]
        and not list(tmp_path.iterdir())
    )


# --- files that are spoilt among good ones


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_named(name, tmp_path):
    "Left out and named, or, where that was asked for, refused before anything is written."
    make, file, reason = FILES[name]
    good(tmp_path)
    make(tmp_path)
    before = contents(tmp_path / "in") if name != "a pipe" else None
    ask = ["cmid_prepare", tmp_path / "in", tmp_path / "out", "--side", "32"]
    status, out, err = run(*ask, "--on_error", "raise")
    if name == "nothing but NaN":
        assert status == 0
        shutil.rmtree(tmp_path / "out")  # it is whole: only tiles and images without a value are left out
    else:
        assert (
            status == 1
            and not out
            and err.count("\n") == 1
            and " ".join(file.split()) in err
            and reason in err
            and sorted(o.name for o in tmp_path.iterdir()) == ["in"]
        ), err
    status, out, err = run(*ask)
    assert (
        status == 0
        and not err
        and len(p := Prepared(tmp_path / "out")) == 3
        and [o.name for o in tmp_path.glob("out*")] == ["out"]
    )
    assert (
        p.manifest["counts"]["skipped"] == 1
        and reason in (p.folder / "skipped.csv").read_text()
        and file in (p.folder / "skipped.csv").read_text()
    )
    assert before is None or contents(tmp_path / "in") == before


def turned(d):
    e = Image.Exif()
    e[0x0112] = 6
    Image.fromarray(np.zeros((40, 80, 3), "uint8")).save(d / "in/odd.png", exif=e)


def holes(d):
    x = np.random.default_rng(0).random((3, 40, 40), "float32")
    x[:, :9] = np.nan
    write_tiff(d / "in/odd.tif", x)


ODD = {  # id: how it is made beside three good PNGs, its name, what the audit says of it
    "a palette": (
        lambda d: Image.open(d / "in/0.png").convert("P").save(d / "in/odd.png"),
        "odd.png",
        "palette: 1 files with a palette, made RGB",
    ),
    "transparency": (
        lambda d: Image.open(d / "in/0.png").convert("RGBA").save(d / "in/odd.png"),
        "odd.png",
        "transparency: 1 files with transparency, which is used as a mask",
    ),
    "grey": (
        lambda d: Image.open(d / "in/0.png").convert("L").save(d / "in/odd.png"),
        "odd.png",
        "grey: 1 grey files, made RGB",
    ),
    "CMYK": (
        lambda d: Image.open(d / "in/0.png").convert("CMYK").save(d / "in/odd.jpg"),
        "odd.jpg",
        "converted-colours: 1 files of CMYK, CIELab or other colours, made RGB",
    ),
    "turned by EXIF": (turned, "odd.png", "turned: 1 files that are turned as their orientation tags say"),
    "NaN in places": (holes, "odd.tif", "invalid-pixels: 1 images with pixels that have no value (0 here)"),
    "a name in other letters": (
        lambda d: shutil.copy(d / "in/0.png", d / 'in/ä 影 [1], "x".PNG'),
        'ä 影 [1], "x".PNG',
        "duplicate: 1 files with the same pixels as another one",
    ),
    "a folder linked into itself": (
        lambda d: (d / "in/me").symlink_to(d / "in", target_is_directory=True),
        "0.png",
        "images   3 of",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_is_read_and_said(name, tmp_path):
    make, file, says = ODD[name]
    good(tmp_path)
    make(tmp_path)
    status, out, err = run("cmid_prepare", tmp_path / "in", tmp_path / "out", "--side", "32")
    p = Prepared(tmp_path / "out")
    assert status == 0 and not err and says in out and file in {p.source(i) for i in range(len(p))}


def test_an_untidy_list_is_read_and_said(tmp_path):
    "Windows line ends, a byte-order mark, a missing file, a file listed twice: read as meant, one audit line each."
    lists(train="\ufeffash\\ash_0.png 0\r\n\r\nbirch_0.png 1\r\nbirch_0.png 1\r\nno such.png 1\r\n")(tmp_path)
    status, out, err = run(
        "cmid_prepare", tmp_path / "in", tmp_path / "out", "--side", "32", "--lists", f"train={tmp_path}/train.txt"
    )
    p = Prepared(tmp_path / "out")
    assert (
        status == 0
        and not err
        and [p.source(i) for i in p.splits["train"]] == ["ash/ash_0.png", "birch/birch_0.png"]
        and p.labels[p.splits["train"]].tolist() == [0, 1]
    )
    assert [o for o in out.splitlines() if o.startswith("warning")] == [
        "warning  missing: 1 lines of train that name no file of the folder (no such.png 1)",
        "warning  repeated: 1 lines of train that name a file again (birch/birch_0.png)",
    ]


DROPPED = """
import os, sys
import matplotlib.backends.backend_agg, matplotlib.figure  # now, because the user below may not read this Python
from cmid.data.prepare_command import cmid_prepare
if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.exit(cmid_prepare())"""


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="rights of another kind")
def test_what_may_not_be_read():
    "An unreadable file or folder among good ones is named; an unreadable input or output is refused."
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        d.chmod(0o755)
        write_pngs(write_pngs(d / "in") / "shut", 1)
        (d / "in/1.png").chmod(0)
        (d / "in/shut").chmod(0)
        (d / "out").mkdir()
        (d / "ours").mkdir()
        write_pngs(d / "none").chmod(0)
        (d / "script.py").write_text(DROPPED)
        if ROOTED:
            os.chown(d / "out", 65534, 65534)
        else:
            (d / "ours").chmod(0o555)

        def ask(*folders):
            command = [sys.executable, d / "script.py", *folders, "--side", "32", "--workers", "1"]
            return subprocess.run(command, cwd="/", capture_output=True, text=True)

        done = ask(d / "in", d / "out/a")
        assert done.returncode == 0, done.stderr
        assert (
            "1.png: Permission denied" in done.stdout
            and "shut: a folder that may not be read" in done.stdout
            and len(Prepared(d / "out/a")) == 2
        )
        for (a, b), says in (
            ((d / "none", d / "out/b"), "/none: no permission to read it: change its permissions"),
            ((d / "in", d / "ours/b"), "Permission denied"),
        ):
            done = ask(a, b)
            assert done.returncode == 1 and done.stderr.count("\n") == 1 and says in done.stderr, done.stderr
        assert [o.name for o in (d / "out").iterdir()] == ["a"] and not list((d / "ours").iterdir())
        for o in ("in/1.png", "in/shut", "none", "ours"):
            (d / o).chmod(0o755)


# --- nothing runs that came as data


def test_the_traps_would_have_run(tmp_path):
    "What the table calls hostile does harm where it is trusted."
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    pickle.loads((tmp_path / "a.pkl").read_bytes())
    assert (tmp_path / "ran").is_dir()
    (tmp_path / "ran").rmdir()
    torch.save(trapped(tmp_path), tmp_path / "a.pth")
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert (tmp_path / "ran").is_dir()
    yaml.unsafe_load(f"!!python/object/apply:os.mkdir [{tmp_path}/too]")
    assert (tmp_path / "too").is_dir()
    assert (
        len(json.dumps(yaml.safe_load("\n".join(laughs.splitlines()[:5])))) > 10**5
        and len(yaml.compose("\n".join(merges.splitlines()[:3])).value) == 3
    )


@pytest.mark.parametrize("small", [laughs, merges], ids=["aliases", "merges"])
def test_a_small_file_takes_little_memory(small, tmp_path):
    (tmp_path / "params.yaml").write_text(small)
    tracemalloc.start()
    with pytest.raises(CmidError):
        load_yaml(tmp_path / "params.yaml")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 * 2**20


def test_marks_and_line_ends_are_no_mistake(tmp_path):
    (tmp_path / "params.yaml").write_bytes("\ufeff".encode() + text(smoke_values()).replace("\n", "\r\n").encode())
    check_all(Params(tmp_path))


def test_a_parameter_is_data_in_a_notebook(tmp_path):
    "Quotes, line breaks and code arrive as they were written, and are not run."
    hostile = f"x'); import os; os.mkdir('{tmp_path}/ran') #\"\"\"\n{{os.mkdir('{tmp_path}/ran')}}\\"
    cells = json.loads(notebook("dataset = 1"))
    cells["cells"].append(
        cells["cells"][0]
        | dict(
            id="b",
            metadata={},
            source=[f"import json; open({str(tmp_path / 'got.json')!r}, 'w').write(json.dumps(dataset))"],
        )
    )
    (tmp_path / "a.ipynb").write_text(json.dumps(cells))
    run_notebook(tmp_path / "a.ipynb", tmp_path / "out.ipynb", dict(dataset=hostile))
    assert json.loads((tmp_path / "got.json").read_text()) == hostile and not (tmp_path / "ran").exists()


# --- bytes altered or cut off at random: one line, or no harm


def altered(b, draw, head=None):
    n, b = min(len(b), head or len(b)), bytearray(b)
    if draw.random() < 0.25:
        return bytes(b[: draw.randrange(n)])
    for _ in range(draw.choice([1, 3, 10])):
        b[draw.randrange(n)] = draw.choice([draw.randrange(256), *b'9"-[', 0])
    return bytes(b)


def whole(d):
    p = Prepared(d / "prepared/scenes")
    return p[:], p.source(0), str(p)


@pytest.mark.parametrize(
    "part, name, head, meet",
    [
        ("prepared", "scenes/manifest.json", None, whole),
        ("prepared", "scenes/images-00000.npy", 128, whole),
        ("prepared", "scenes/labels.npy", None, whole),
        ("prepared", "scenes/items.csv", None, whole),
        ("models", "random-resnet18/card.json", None, lambda d: read_card(d / "models/random-resnet18")),
        ("ckpt", "epoch-1.ckpt", None, lambda d: latest(d / "ckpt", dict(lr=0.1, head=dict(dim=8, depth=2)))),
    ],
    ids=lambda o: o.split("/")[-1] if isinstance(o, str) else "",
)
def test_altered_at_random(part, name, head, meet, tmp_path, capsys):
    draw, refused = random.Random(name), 0
    for i in range(60):
        copy_of_stock(part, d := tmp_path / str(i), name, lambda b: altered(b, draw, head))
        try:
            meet(d)
        except (CmidError, OSError) as e:
            refused += 1
            assert "\n" not in str(e) and str(e)
    assert refused > 10


# --- whole processes, as a user starts them


def installed(d):
    "A study with its stages, prepared data and a backbone, all of it from an earlier run."
    (d / "nbs").mkdir()
    shutil.copytree(ROOT / "nbs/pipeline", d / "nbs/pipeline")
    (d / "params.yaml").write_text(text(smoke_values()))
    for o in ("prepared", "models"):
        shutil.copytree(stock() / o, d / o, copy_function=os.link)
    return d


def swap(file, change):
    new = change(file.read_bytes())
    file.unlink()
    file.write_bytes(new)


STAGES = {  # id: what is wrong, the stage, what its line says
    "a card cut short": (
        lambda d: swap(d / "models/random-resnet18/card.json", lambda b: b[:-20]),
        "probe -p dataset scenes -p init random-resnet18",
        "/models/random-resnet18/card.json: is not JSON",
    ),
    "a shard cut short": (
        lambda d: swap(d / "prepared/pool/images-00000.npy", lambda b: b[:-1]),
        "pretrain -p recipe cmid -p backbone resnet18",
        "/prepared/pool/images-00000.npy: missing or truncated",
    ),
    "a backbone unknown to timm": (
        nothing,
        "pretrain -p recipe cmid -p backbone resnt50",
        "backbone 'resnt50' is unknown to timm (did you mean 'resnet50'",
    ),
    "a GPU where there is none": (
        lambda d: (d / "params.yaml").write_text(text(smoke_values('device="cuda:99"'))),
        "probe -p dataset scenes -p init random-resnet18",
        "params.yaml: device: 'cuda:99' is not on this machine",
    ),
    "images that are not there": (
        nothing,
        "prepare -p dataset scenes",
        "params.yaml: datasets.scenes.folder: data/scenes is not a folder",
    ),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_ends_in_one_line(name, tmp_path):
    make, command, says = STAGES[name]
    make(installed(tmp_path))
    before = contents(tmp_path)
    status, out, err = process(
        "cmid_stage", *command.split(), at=tmp_path, CMID_ROOT=str(tmp_path), PYTHONPATH=str(ROOT)
    )
    assert (
        status == 1
        and err.count("\n") == 1
        and err.startswith("cmid_stage: ")
        and says in err
        and "Traceback" not in err + out
    ), err
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "name, make, args, says",
    [
        ("cmid_prepare", nothing, ["no", "out"], "cmid_prepare: no: no such folder\n"),
        (
            "cmid_convert",
            lambda d: torch.save(Trap(d / "ran"), d / "a.pth"),
            ["a.pth", "b", "--backbone", "resnet18"],
            "cmid_convert: a.pth: holds more than tensors and numbers, so it could run code, and was not opened\n",
        ),
        ("cmid_digest", lambda d: project(d, "def ("), [], "cmid_digest: {d}/cmid/a.py:1: cannot be parsed"),
    ],
)
def test_as_it_is_installed(name, make, args, says, tmp_path):
    make(tmp_path)
    before = contents(tmp_path)
    status, out, err = process(name, *args, at=tmp_path, CMID_ROOT=str(tmp_path), PYTHONPATH=str(ROOT))
    assert (
        status == 1
        and not out
        and err.startswith(says.replace("{d}", str(tmp_path)))
        and err.count("\n") == 1
        and contents(tmp_path) == before
    ), err
