"""Two processes fine-tune as one: against a single process where nothing is random, and against each other where one
of them is killed, stopped or fails."""

import numpy as np
import pytest
import torch

from cmid.base.errors import CmidError
from cmid.tasks.finetune import check_processes
from cmid.train.checkpoint import latest
from tests.tools.runs import quiet
from tests.tools.shared_trainings import in_two, train_still
from tests.tools.trainings import TASKS, differing, settings_of, train

BACKBONE = "test_resnet"


@pytest.fixture(scope="module")
def init(random_backbone):
    return random_backbone(BACKBONE, 3, 32)


def distance(a, b):
    "The largest difference of two sets of weights."
    assert a.keys() == b.keys()
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a)


def losses(epochs):
    return np.array([[value for key, value in epoch.items() if key not in ("epoch", "step", "lr")] for epoch in epochs])


@pytest.mark.slow
def test_two_processes_are_one(init, tmp_path):
    """Weights and losses after batches of 4 and 3, which two processes cannot share evenly; images have between 0 and
    28 labelled rows. The losses are rounded to float32, so gradients agree to 1e-7 of their size; a mean of the means
    of both processes would move the weights elsewhere by 1e-3 and more."""
    in_two(quiet, "still", init, tmp_path)
    two = torch.load(tmp_path / "still.pt", weights_only=False)
    for task in TASKS:
        weights, epochs = train_still(task, init)
        assert np.allclose(losses(epochs), losses(two[task][1]), rtol=1e-5, atol=1e-6), task
        assert distance(weights, two[task][0]) < 1e-5, task
        assert [epoch["step"] for epoch in epochs] == [epoch["step"] for epoch in two[task][1]] == [2, 4]


def state_in(folder):
    "The state at the end of the only training of a folder."
    return latest(next(folder.glob("*/*")))[1]


@pytest.mark.slow
def test_a_process_is_killed(init, tmp_path):
    "The other one ends too. The next run resumes, and ends with the bits of a run that nothing disturbed."
    lines = []
    in_two(quiet, "train", init, tmp_path / "whole", 0, "")
    with pytest.raises(CmidError):
        in_two(quiet, "train", init, tmp_path / "killed", 3, "kill")
    in_two(lines.append, "train", init, tmp_path / "killed", 0, "")
    assert "resuming after step 2, epoch 1" in lines
    whole, resumed = state_in(tmp_path / "whole"), state_in(tmp_path / "killed")
    assert differing(whole["model"], resumed["model"]) == []
    assert whole["progress"]["epochs"] == resumed["progress"]["epochs"]
    assert resumed["ways"] == [dict(step=0, processes=2)]


@pytest.mark.slow
def test_a_process_is_stopped(init, tmp_path):
    "Both stop at the same step, and one process may go on alone."
    with pytest.raises(CmidError, match="stopped at step 4 of 6; a checkpoint is kept: run the same command"):
        in_two(quiet, "train", init, tmp_path, 4, "stop")
    lines, stopped = [], state_in(tmp_path)["progress"]["epochs"]
    _, epochs = train("change", init, tmp_path, lines.append, batch=4)
    assert any("(processes: 2 then, 1 now)" in line for line in lines)
    assert epochs[:2] == stopped
    assert epochs[2]["step"] == 6
    assert state_in(tmp_path)["ways"] == [dict(step=0, processes=2), dict(step=4, processes=1)]


@pytest.mark.slow
@pytest.mark.long  # 10 s in which the first process may speak
def test_an_error_of_one_process_is_one_line(init, tmp_path):
    with pytest.raises(CmidError, match="^the second process has no room$"):
        in_two(quiet, "train", init, tmp_path, 3, "error")


def test_processes_without_checkpoints_are_refused(init):
    message = "segment.processes: 2 processes pass on their network by a checkpoint, and this training keeps none"
    with pytest.raises(CmidError, match=message):
        train("segment", init, say=quiet, processes=2, batch=8)


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_that_does_not_divide_is_refused(task, init, tmp_path):
    with pytest.raises(CmidError, match=f"^params.yaml: {task}.batch: 7 must be divisible by {task}.processes: 2$"):
        train(task, init, tmp_path, quiet, processes=2, batch=7)
    assert not [*tmp_path.rglob("*.ckpt")]


@pytest.mark.parametrize("count, batch, processes, fits", [(9, 8, 4, True), (9, 8, 8, False), (1, 2, 2, False)])
def test_every_process_has_an_image_in_every_batch(count, batch, processes, fits):
    settings = settings_of("segment", batch=batch, processes=processes)
    if fits:
        check_processes(settings, "segment", count)
        return
    with pytest.raises(CmidError, match=f"segment.processes: .* fewer than the {processes} processes; lower it"):
        check_processes(settings, "segment", count)
