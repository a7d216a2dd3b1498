"""Contrastive Mask Image Distillation for remote sensing.

The names that a user types can be imported from here; each is loaded when it is first asked for, so that
`import cmid` takes no time. This file is written by hand; all other modules are exported from the notebooks.
"""

__version__ = "0.1.0"

_MODULES = {
    "Params": "base.params",
    "CmidError": "base.errors",
    "prepare": "data.prepare",
    "Prepared": "data.dataset",
    "Labelled": "data.labelled",
    "block_masks": "method.masking",
    "fill_mean": "method.masking",
    "TwoViews": "method.views",
    "cell_centres": "method.views",
    "create": "method.backbones",
    "Projector": "method.heads",
    "PrototypeHead": "method.heads",
    "PixelDecoder": "method.heads",
    "reconstruction_loss": "method.reconstruction",
    "focal_l1": "method.reconstruction",
    "focal_frequency": "method.reconstruction",
    "info_nce": "method.contrast",
    "KeyQueue": "method.contrast",
    "match_cells": "method.distillation",
    "PrototypeLoss": "method.distillation",
    "momentum_at": "method.teacher",
    "CMID": "method.model",
    "export_backbone": "train.checkpoint",
    "load_backbone": "train.checkpoint",
    "read_card": "train.checkpoint",
    "rotated_iou": "tasks.boxes",
    "rotated_nms": "tasks.boxes",
    "rotated_roi_align": "tasks.boxes",
    "load_task": "tasks.load",
}
__all__ = list(_MODULES)


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module 'cmid' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"cmid.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
