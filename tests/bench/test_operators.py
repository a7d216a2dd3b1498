"Launches of a pretraining step are few, and nothing in a step makes the host wait for a value."

import json

import numpy as np
import pytest
import torch
from torchvision.ops import nms

from cmid.base.errors import CmidError
from cmid.bench.bench import cmid_bench
from cmid.bench.floor import PARTS, GeneratedImages
from cmid.bench.measure import bench_settings
from cmid.bench.operators import COUNTED, NoHostReads, count_operators, read_operators, without_optimiser
from cmid.train.pretrain import pretrain_learner, run_pretraining

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def counted():
    "Operators of each part of a step of ResNet-18 at 128 px, with the paper's heads."
    how = {key: value for key, value in COUNTED.items() if key != "side"}
    found = count_operators("resnet18", bench_settings(**how), COUNTED["side"])
    return {part: names.total() for part, names in found.items()}


def test_a_step_launches_few_operators(counted):
    assert counted["views"] < 150
    assert without_optimiser(counted) < 1000


def test_no_part_launches_more_than_is_committed(counted):
    after = read_operators()["after"]
    if torch.__version__.split("+")[0] != after["versions"]["torch"]:
        pytest.skip(f"the numbers are of torch {after['versions']['torch']}")
    (row,) = (row for row in after["rows"] if row["backbone"] == "resnet18")
    more = {part: (row["parts"][part], n) for part, n in counted.items() if n > row["parts"][part]}
    assert not more, "fewer, or cmid_bench --operators --grid and say why"


def test_the_command_counts(capsys):
    cmid_bench(backbone="test_resnet", batch=4, side=64, device="cpu", operators=True, json=True)
    found = json.loads(capsys.readouterr().out)
    assert tuple(found) == PARTS and all(found.values())
    with pytest.raises(SystemExit):
        cmid_bench(backbone="test_resnet", device="cpu", operators=True, compile="step")
    assert "--compile" in capsys.readouterr().err


def learner(backbone, **changed):
    "A pretraining of three steps, each of which raises where a value is read; after the first, for constants, too."
    settings = bench_settings(4, "float32", profile="smoke").model_copy(update=dict(epochs=1) | changed)
    images = GeneratedImages(3, 64, 12)
    learn = pretrain_learner(images, np.arange(12), settings, backbone, on=CPU, say=lambda _: None)
    step = learn.one_batch

    def checked(*args):
        with NoHostReads(constants=learn.cmid.done > 0):
            step(*args)

    learn.one_batch = checked
    return learn


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])  # with batch norm, and without
@pytest.mark.parametrize("variant", ["cmid", "byol"])
@pytest.mark.parametrize(
    "changed",
    [
        dict(accumulate=1, fidelity="corrected"),
        dict(accumulate=2, fidelity="published", precision="bfloat16"),
    ],
    ids=lambda changed: changed["fidelity"],
)
def test_a_step_reads_no_value(backbone, variant, changed):
    learn = run_pretraining(learner(backbone, variant=variant, **changed))
    assert learn.cmid.done == 3
    assert torch.stack(learn.cmid.losses).isfinite().all()


def read_loss(learn):
    learn.model.register_forward_hook(lambda *given: given[-1].total.item())


def branch_on_gradient(learn):
    weight = next(p for p in learn.model.parameters() if p.requires_grad)
    weight.register_hook(lambda gradient: gradient if gradient.isfinite().all() else None)


def print_at_the_end(learn):
    learn.opt.opt.register_step_post_hook(lambda *_: str(learn.loss))


@pytest.mark.parametrize("plant", [read_loss, branch_on_gradient, print_at_the_end], ids=lambda plant: plant.__name__)
def test_a_read_anywhere_in_a_step_is_seen(plant):
    learn = learner("test_resnet")
    plant(learn)
    with pytest.raises(CmidError, match="reads a tensor's value on the host"):
        run_pretraining(learn)
    assert learn.cmid.done == 0


X = torch.arange(6.0).view(2, 3)
MASK = X > 2
ONE = torch.tensor(1)
READS = dict(
    item=X.sum().item,
    float=lambda: float(ONE),
    int=lambda: int(ONE),
    branch=lambda: 0 if ONE > 0 else 1,
    index=lambda: [0, 1][ONE],
    slice=lambda: X[ONE:],
    select=lambda: X[ONE],
    format=lambda: f"{ONE}",
    print=lambda: str(X),
    contains=lambda: 2 in X,
    maximum=lambda: max(X[0, 0], X[0, 1]),
    size=lambda: torch.full((2,), ONE),
    scale=lambda: torch.add(X, X, alpha=ONE),
    tolist=X.tolist,
    numpy=X.numpy,
    asarray=lambda: np.asarray(X),
    dlpack=lambda: np.from_dlpack(X),
    cpu=X.cpu,
    of_tensors=lambda: torch.tensor([[ONE, ONE]]),
    nonzero=MASK.nonzero,
    where=lambda: torch.where(MASK),
    argwhere=lambda: torch.argwhere(MASK),
    masked_select=lambda: X.masked_select(MASK),
    take=lambda: X[MASK],
    put=lambda: X.clone().index_put_((MASK,), X[0]),
    unique=X.unique,
    unique_rows=lambda: X.unique(dim=0),
    consecutive=X.unique_consecutive,
    repeat=lambda: X.repeat_interleave(torch.stack([ONE, ONE]), 0),
    bincount=lambda: torch.bincount(ONE[None]),
    equal=lambda: torch.equal(X, X),
    allclose=lambda: torch.allclose(X, X),
    is_nonzero=ONE.is_nonzero,
    inverse=lambda: torch.linalg.inv(torch.eye(2)),
    nms=lambda: nms(torch.ones(1, 4), torch.ones(1), 0.5),
)


@pytest.mark.parametrize("kind", READS)
def test_every_kind_of_read_raises(kind):
    READS[kind]()
    with NoHostReads(), pytest.raises(CmidError, match="reads a tensor's value"):
        READS[kind]()
    READS[kind]()  # over


PURE = dict(
    where=lambda: torch.where(MASK, X, 0.0),
    fill=lambda: X.clone().masked_fill_(MASK, 0.0),
    assign=lambda: X.clone().__setitem__(MASK, 0.0),
    rows=lambda: X[ONE[None]],
    list=lambda: X[:, [0, 2]],
    repeat=lambda: X.repeat_interleave(2, 0),
    repeat_known=lambda: X.repeat_interleave(torch.stack([ONE, ONE]), 0, output_size=2),
    shape=lambda: len(X) + X.numel() + X.dim(),
    rows_of=lambda: list(X),
    power=lambda: X**ONE,
    cast=lambda: X.to(CPU, torch.float64),
    numbers=lambda: torch.tensor([1.0, 2.0]),
)


@pytest.mark.parametrize("kind", PURE)
def test_what_reads_nothing_passes(kind):
    with NoHostReads():
        PURE[kind]()


def test_a_tensor_of_numbers_is_a_copy():
    for make in (PURE["numbers"], lambda: torch.from_numpy(np.ones(2))):
        with NoHostReads(constants=True), pytest.raises(CmidError, match="numbers of the host"):
            make()


def test_a_copy_from_another_device_waits():
    elsewhere = torch.empty(2, device="meta")
    for copy in (lambda: elsewhere.to("cpu"), lambda: torch.empty(2).copy_(elsewhere)):
        with NoHostReads(), pytest.raises(CmidError, match="reads a tensor's value"):
            copy()
