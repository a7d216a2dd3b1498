"""A compiled step: equal to a plain one, in few graphs that nothing compiles again, within a time limit; plain where it
cannot be compiled.

Small networks stand for their families, and most tests leave out Inductor, which writes and compiles programs for
minutes: `aot_eager` traces and splits the same graphs."""

import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from cmid.base.errors import CmidError
from cmid.base.params import Params
from cmid.base.runtime import KEEP
from cmid.train import pretrain
from cmid.train.compiled import compile_step, graphs_compiled
from cmid.train.journal import LOSSES
from cmid.train.processes import launch, process_group, rank
from tests.tools.runs import changed, quiet

logging.getLogger("torch.__trace").propagate = False  # thousands of lines, which pytest would keep
RESNET, VIT, SWIN = "test_resnet", "test_vit", "swin_tiny_patch4_window7_224"
GRAPHS = 9  # crops, four parts of jitter, the rest of view B, two encoders, the losses
SETTINGS = changed(
    Params(profile="smoke").pretrain,
    epochs=2,
    batch=4,
    lr=2e-4,
    warmup_epochs=1,
    queue=64,
    teacher_temperature_epochs=2,  # another temperature, learning rate and momentum in each epoch
    compile_limit=None,
)


class Corpus:
    "Eight images of noise."

    bands, side, mean, std = 3, 64, [0.5] * 3, [0.2] * 3
    pixels = np.random.default_rng(0).integers(0, 256, (8, 3, 64, 64), dtype=np.uint8)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.pixels[i]


def train(backbone=RESNET, until=None, folder=None, say=quiet, **settings):
    "A run of four steps in two epochs."
    torch.manual_seed(0)
    how = changed(SETTINGS, **settings)
    cpu = torch.device("cpu")
    learn = pretrain.pretrain_learner(Corpus(), np.arange(8), how, backbone, on=cpu, folder=folder, say=say, code="x")
    return pretrain.run_pretraining(learn, until)


def curve(learn):
    "Losses and norm of the gradient of each step: (4, 5)."
    return torch.tensor([[point[name] for name in (*LOSSES, "gradient_norm")] for point in learn.journal.curve])


def weights_equal(a, b):
    one, other = a.model.state_dict(), b.model.state_dict()
    return [key for key, value in one.items() if not torch.equal(value, other[key])] == []


@pytest.fixture
def traced(monkeypatch):
    "Steps are traced and split as ever, and no program is written."
    monkeypatch.setattr(pretrain, "compile_step", partial(compile_step, backend="aot_eager"))


def compare(backbone, precision, compile=True, **settings):
    "A compiled run beside a plain one, and the number of graphs."
    plain = train(backbone, precision=precision, **settings)
    before = graphs_compiled()
    compiled = train(backbone, precision=precision, compile=compile, **settings)
    assert (plain.compiled, compiled.compiled) == (False, True)
    return curve(plain), curve(compiled), graphs_compiled() - before


TOLERANCES = dict(float32=1e-3, bfloat16=0.05)  # relative, of losses


def close(plain, compiled, precision="float32"):
    "Losses and norms of the gradient: of four steps; in bfloat16 of the first, whose rounding the others magnify."
    steps = 4 if precision == "float32" else 1
    limits = TOLERANCES[precision] * torch.tensor([1.0, 1.0, 1.0, 1.0, 10.0])
    return bool(((plain - compiled).abs() <= limits * plain.abs())[:steps].all())


@pytest.mark.parametrize(
    "backbone, precision",
    [
        (RESNET, "float32"),
        (RESNET, "bfloat16"),
        (VIT, "bfloat16"),
        pytest.param(SWIN, "float32", marks=pytest.mark.slow),
    ],
)
def test_compiled_is_plain(backbone, precision, traced):
    "Losses and gradients of four steps, which depend on the weights of those before; rates change, graphs do not."
    plain, compiled, graphs = compare(backbone, precision)
    assert close(plain, compiled, precision)
    assert graphs == GRAPHS


@pytest.mark.parametrize(
    "settings, graphs",
    [
        pytest.param(dict(variant="byol", accumulate=2), GRAPHS, id="byol in micro-batches"),
        pytest.param(dict(gradient_checkpointing=True), GRAPHS - 1, id="the student's encoder is plain"),
    ],
)
def test_ways_to_compute(settings, graphs, traced):
    lines = []
    plain, compiled, found = compare(RESNET, "float32", compile="graph", say=lines.append, **settings)
    assert close(plain, compiled)
    assert found == graphs
    assert "compile: graph is the same as true on a cpu" in lines
    (line,) = [line for line in lines if line.startswith(f"compiled {graphs} graphs in ")]
    assert ("without the student's encoder" in line) == ("gradient_checkpointing" in settings)


def check_inductor(backbone, precision, folder):
    "As `test_compiled_is_plain`, with programs; a run that was resumed has the same bits."
    plain, compiled, graphs = compare(backbone, precision)
    print(f"{backbone} {precision}: largest relative differences", ((plain - compiled) / plain).abs().amax(0).tolist())
    assert close(plain, compiled, precision)
    assert graphs == GRAPHS
    train(backbone, precision=precision, compile=True, folder=folder, until=1)
    resumed = train(backbone, precision=precision, compile=True, folder=folder)
    assert torch.equal(curve(resumed), compiled)  # also: the trial step before the first step leaves nothing behind
    assert resumed.checkpoints.ways == [
        dict(step=0, processes=1, accumulate=1, compile=True, gradient_checkpointing=False)
    ]


@pytest.mark.slow
def test_inductor(tmp_path):
    check_inductor(RESNET, "float32", tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("backbone", ["resnet18", VIT, "vit_tiny_patch16_224", SWIN])
def test_inductor_families(backbone, precision, tmp_path):
    check_inductor(backbone, precision, tmp_path)


def broken(graph, inputs):
    "A compiler that fails."
    raise RuntimeError("no room\nfor a program")


def test_failure_is_one_line(monkeypatch):
    "The run goes on without, as a plain one does."
    monkeypatch.setattr(pretrain, "compile_step", partial(compile_step, backend=broken))
    lines = []
    learn = train(compile=True, say=lines.append)
    (line,) = [line for line in lines if "goes on without" in line]
    assert line.startswith("compile: ")
    assert line.endswith("no room for a program; the run goes on without")
    assert learn.compiled is False
    assert weights_equal(learn, train())


def test_limit(tmp_path):
    "Compiling ends when its time is over; a resumed run says that it is computed in another way."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "compile_step", partial(compile_step, backend="aot_eager"))
        train(compile=True, folder=tmp_path, until=1)
    lines = []
    learn = train(compile=True, compile_limit=0.5, folder=tmp_path, say=lines.append)
    assert "compile: it took longer than compile_limit: 0.5 s; the run goes on without" in lines
    (note,) = [line for line in lines if "compile: True then, False now" in line]
    assert "rounded in another way" in note
    assert [way["compile"] for way in learn.checkpoints.ways] == [True, False]
    assert learn.cmid.done == 4


def test_gradients_are_compiled_before_they_are_computed(monkeypatch):
    "On a GPU another thread computes them, in which the time limit could not end the compiler."
    order, backward = [], torch.Tensor.backward

    def write_gradients(graph, _):
        order.append("written")
        return graph.forward

    backend = aot_autograd(fw_compiler=lambda graph, _: graph.forward, bw_compiler=write_gradients)
    monkeypatch.setattr(pretrain, "compile_step", partial(compile_step, backend=backend))
    monkeypatch.setattr(torch.Tensor, "backward", lambda *o: order.append("computed") or backward(*o))
    train(compile=True, until=1)
    assert order.count("written") == 2  # of the student's encoder, of the losses
    assert "written" not in order[order.index("computed") :]


def test_recorded_parts(monkeypatch):
    "What a GPU would do, with nothing compiled: encoders and losses are recorded, and each step says that it begins."
    modes, begun = [], []

    def compiled(method, mode=None, **_):
        modes.append((method.__name__, mode))
        return method

    monkeypatch.setattr("cmid.train.compiled._is_recorded", lambda _: True)
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    learn = train(compile="graph")
    assert learn.compiled == "graph"
    assert [name for name, mode in modes if mode == "reduce-overhead"] == ["stages", "stages", "losses_of"]
    assert [name for name, mode in modes if mode is None] == ["crop", "jitter_part", "strong"]
    assert len(begun) == 3 + 4  # trials: to warm up, to record, to replay; then the steps
    assert weights_equal(learn, train())


SCRIPT = "from tests.train.test_compiled import train; train(compile=True, say=print)"


@pytest.mark.slow
def test_without_a_compiler(tmp_path):
    "Inductor finds no C++ compiler, and no program that an earlier run has compiled."
    root = Path(__file__).parents[2]
    env = KEEP | os.environ | dict(CXX="/nonexistent", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, env=env, capture_output=True, text=True)
    (line,) = [line for line in run.stdout.splitlines() if "goes on without" in line]
    assert "install g++" in line
    assert "epoch 2/2" in run.stdout
    assert run.returncode == 0, run.stderr


def worker():
    "What each of two processes does: the losses of a compiled run are those of a plain one."
    torch.set_num_threads(1)
    pretrain.compile_step = partial(compile_step, backend="aot_eager")
    with process_group(torch.device("cpu")):
        plain, compiled, graphs = compare(RESNET, "float32")
        refused = train(compile=True, sync_batch_norm=True)
    if not close(plain, compiled) or graphs != GRAPHS + 1 or refused.compiled:
        raise CmidError(f"process {rank()}: {plain} {compiled} {graphs} {refused.compiled}")


@pytest.mark.slow
def test_two_processes():
    "Encoders and two of the three losses are compiled; with synchronised batch norm nothing is."
    launch(2, ["-c", "from tests.train.test_compiled import worker; worker()"], "worker", quiet)
