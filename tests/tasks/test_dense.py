"Dense prediction: the loss of labelled pixels, and whole images from tiles."

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cmid.data.labelled import IGNORE
from cmid.tasks.dense import blended, decided, pixel_loss


def test_the_loss_is_torchs_where_pixels_are_labelled():
    logits = torch.randn(2, 4, 5, 6)
    masks = torch.randint(0, 4, (2, 5, 6), dtype=torch.uint8)
    masks[0, :3] = IGNORE
    assert torch.allclose(pixel_loss(logits, masks), F.cross_entropy(logits, masks.long(), ignore_index=IGNORE))
    assert pixel_loss(logits.half(), masks).dtype == torch.float32


def test_a_batch_without_labels_has_no_gradient():
    logits = torch.randn(1, 4, 5, 6, requires_grad=True)
    loss = pixel_loss(logits, torch.full((1, 5, 6), IGNORE, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def operations(node, seen=None):
    "Names of the operations that a gradient passes."
    seen = set() if seen is None else seen
    if node is not None and node not in seen:
        seen.add(node)
        for parent, _ in node.next_functions:
            operations(parent, seen)
    return {passed.name() for passed in seen}


def test_the_gradient_of_the_loss_is_deterministic_on_a_gpu():
    "That of a loss over maps (NllLoss2D) is not."
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    names = operations(pixel_loss(logits, torch.zeros(1, 4, 4, dtype=torch.uint8)).grad_fn)
    assert any("NllLoss" in name for name in names)
    assert not any("NllLoss2D" in name for name in names)


class LargeTensors(TorchDispatchMode):
    "Collects the tensors of 8 MB or more that are made inside the `with`."

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.nbytes >= 2**23:
            self.found[out.untyped_storage().data_ptr()] = out
        return out


def test_a_large_image_needs_little_memory_beside_its_logits():
    "With 12 classes: no second copy of the logits."
    image = np.full((1, 1024, 1024), 9, "uint8")

    def logits(x):
        return x[:, :1].float() * torch.arange(12.0).view(-1, 1, 1)

    with LargeTensors() as large:
        mask = decided(blended(logits, image, 128, 0.0))
    assert (mask == 11).all()
    assert mask.dtype == np.uint8
    assert [tuple(tensor.shape) for tensor in large.found.values()] == [(12, 1024, 1024)]
