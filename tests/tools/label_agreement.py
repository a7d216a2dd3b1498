"What the stage labels makes of a corpus of `labelled_rasters`, compared item by item with `reference`."

from itertools import chain

import numpy as np

from cmid.base.errors import CmidError
from cmid.data.labelled import IGNORE
from tests.tools import labelled_rasters, reference
from tests.tools.agreement import Outcome, stretched

REFUSED = {  # kind -> words of the message, for kinds that are always refused
    "turned-apart": "turned",
    "pair-turned-apart": "turned",
    "pair-of-two-types": "but most images have",
    "pair-of-two-sizes": "a pair must show the same place at the same size",
}
OPTIONS = {"declared-nodata": dict(nodata=7)}  # of the section labels, by kind
IMAGES = ".tif", ".png", ".jpg"
BY_COLOUR = "colours", "palette-by-colour", "transparent-mask"


def check(kind, seed, count, study):
    "Write a corpus of `count` items, run the stage labels, and compare: an `Outcome` for each."
    for number in range(count):
        labelled_rasters.write(kind, seed, number, study.data)
    try:
        labelled = study.read(**entry(kind), labels=OPTIONS.get(kind))
    except CmidError as error:
        right = "has no valid pixel" in str(error) and a_band_has_no_value(kind, study)
        verdicts = [("right", "") if right else ("refused", str(error))] * count
    else:
        verdicts = compare(kind, study, labelled)
    return [Outcome(kind, seed, number, *verdict_of(kind, *verdict)) for number, verdict in enumerate(verdicts)]


def entry(kind):
    "Arguments of `LabelStudy.read`."
    if kind in labelled_rasters.PAIRS:
        return dict(task="change")
    by_colour = kind in BY_COLOUR
    classes = labelled_rasters.COLOUR_CLASSES if by_colour else labelled_rasters.CLASSES
    return dict(task="segment", classes=classes, ignore=["#000000"] if by_colour else labelled_rasters.IGNORE)


def verdict_of(kind, verdict, text):
    "As of `agreement`."
    if verdict == "refused":
        return ("refused" if REFUSED.get(kind, text + ".") in text else "unlisted"), text
    return ("wrong", "must be refused") if kind in REFUSED else (verdict, text)


# --- what is expected


def class_of(pixels):
    "Class of each index or colour of a mask; -1: none."
    if pixels.ndim == 3:
        values = {value: colour for value, colour in labelled_rasters.COLOURS.items()}
        is_value = {value: (pixels == colour).all(-1) for value, colour in values.items()}
    else:
        is_value = {value: pixels == value for value in labelled_rasters.COLOURS}
    mask = np.full(pixels.shape[:2], -1)
    for value, number in {0: IGNORE, 1: 0, 2: 1, 3: 2, 7: 2}.items():
        mask[is_value[value]] = number
    return mask


def expected_mask(kind, path, dates):
    "(H, W) classes: ignored where the mask or one of the images has no value."
    pixels, valid = reference.read_numbers(path, classes=(1, 2, 3, 7))
    if kind in labelled_rasters.PAIRS:
        mask = (pixels == 255).astype(int)
    elif kind in ("palette-by-colour",):
        mask = class_of(reference.palette_colours(path)[pixels])
    else:
        mask = class_of(pixels)
    for date in dates:
        valid = valid & date.valid.any(0)
    return np.where(valid, mask, IGNORE)


def a_band_has_no_value(kind, study):
    "Is a band invalid in all training images, so that it cannot be stretched?"
    parts = ("A", "B") if kind in labelled_rasters.PAIRS else ("images",)
    files = chain.from_iterable((study.data / part).glob("train*") for part in parts)
    paths = [path for path in files if path.suffix in IMAGES]
    return not np.any([reference.read(path).valid.any((1, 2)) for path in paths], axis=0).all()


def limits_of(labelled):
    stretch = labelled.manifest["stretch"]
    return (stretch["low"], stretch["high"]) if stretch else (None, None)


# --- what is different


def compare(kind, study, labelled):
    "(verdict, text) of each item, in the order in which they were written"
    order = sorted(range(len(labelled)), key=lambda i: int("".join(filter(str.isdigit, labelled.names[i]))))
    for i in order:
        text = item_difference(kind, study, labelled, i)
        yield ("wrong", text) if text else ("right", "")


def other_file(study, name, folder):
    stem = name.rpartition("/")[2].partition(".")[0]
    return next(path for path in (study.data / folder).glob(f"{stem}.*") if path.suffix in IMAGES)


def item_difference(kind, study, labelled, i):
    "What is wrong with an item: a line, or None."
    name = labelled.names[i]
    paths, stored = [study.data / name], [labelled.image(i)]
    if kind in labelled_rasters.PAIRS:
        paths.append(other_file(study, name, "B"))
        stored.append(labelled.second(i))
    dates = [reference.read(path, OPTIONS.get(kind, {}).get("nodata")) for path in paths]
    for date, pixels in zip(dates, stored):
        text = image_difference(date, pixels, limits_of(labelled))
        if text:
            return text
    label = other_file(study, name, "OUT" if kind in labelled_rasters.PAIRS else "masks")
    return mask_difference(expected_mask(kind, label, dates), labelled.mask(i))


def image_difference(date, pixels, limits):
    if pixels.shape != date.pixels.shape:
        return f"the image is {pixels.shape}, and not {date.pixels.shape}"
    wrong = np.abs(pixels - stretched(date.pixels, date.valid, *limits)) > 0.51
    return f"{wrong.sum():,} of {wrong.size:,} values of the image" if wrong.any() else None


def mask_difference(due, mask):
    if mask.shape != due.shape:
        return f"the mask is {mask.shape}, and not {due.shape}"
    wrong = mask != due
    if not wrong.any():
        return None
    place = tuple(int(n) for n in np.argwhere(wrong)[0])
    return f"{wrong.sum():,} of {wrong.size:,} labels; at {place} {mask[place]}, and not {due[place]}"
