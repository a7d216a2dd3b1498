"""What `prepare` makes of a corpus of `rasters`, compared raster by raster with `reference`.

For the differential test. Rasters are cut into tiles of the side of an item, so that most items are windows of a raster
and must be equal to it, value by value. Where a raster is smaller, an item is Pillow's bicubic of it, up to rounding;
near pixels without a value it depends on how these are filled, and must only be in the range of the valid ones, or 0.
"""

import csv
import re
import warnings
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from cmid.base.errors import CmidError
from cmid.data.formats import quiet_decoders
from cmid.data.prepare import prepare
from cmid.data.rasters import open_image
from tests.tools import rasters, reference

SIDE = 32
OPTIONS = {  # of `prepare`, by kind
    "chosen-bands": dict(bands=[2, 0]),
    "chosen-bands-of-other-order": dict(bands=[2, 0]),
    "declared-nodata": dict(nodata=7),
    "declared-nodata-of-pictures": dict(nodata=7),
    "declared-nodata-of-palettes": dict(nodata=7),
    "large-as-a-whole": dict(tile=0),
    "large-as-a-whole-nodata": dict(tile=0),
}
REFUSED = {  # kind -> words of the message, for kinds that are always refused
    "pages": "pages: save them as the bands of one image",
    "thumbnail-first": "its first page is marked as a small copy of another",
    "cmyk-of-16-bits": "CMYK colours of uint16, which GDAL does not convert: save it as RGB",
    "colours-of-16-bits": "Lab colours of uint16, which GDAL does not convert: save it as RGB",
    "icc-lab": "Lab colours of uint8, which GDAL does not convert: save it as RGB",
    "ycbcr-of-16-bits": "Cannot open TIFF file with YCbCr",  # GDAL says it
    "complex-numbers": "complex numbers are not read",
    "png-animated": "animated PNG",
    "turned-cmyk": "orientation tag in a file whose colours are converted",
}
NO_VALUE = "pixel has a value", "has no valid pixel"  # how `prepare` says that all pixels of a file are invalid
WINDOW = re.compile(r"\[(\d+):(\d+), (\d+):(\d+)\]$")


@dataclass
class Outcome:
    "What became of one raster."

    kind: str
    seed: int
    number: int
    verdict: str  # right; refused, in words of `REFUSED`; unlisted: refused in other words; wrong
    text: str = ""  # why it was refused, or what is wrong

    def __str__(self):
        raster = f"tests.tools.rasters.write({self.kind!r}, {self.seed}, {self.number}, folder)"
        return f"{raster}: {self.verdict}: {self.text}"


# --- what is expected


def stretched(pixels, valid, low, high):
    "float64 (C, h, w) in [0, 255]: limits as lists, or None: as it is; 0 where there is no value."
    known = np.where(valid, pixels, 0).astype(float)
    if low is not None:
        low, high = (np.asarray(limits, float)[:, None, None] for limits in (low, high))
        known = np.clip((known - low) / (high - low), 0, 1) * 255
    return np.where(valid, known, 0)


def touched(length, side):
    "(side, length): 1 where a pixel of a row has a part in the resampled pixel."
    if length == side:
        return np.eye(side)
    square = Image.fromarray(np.eye(length, dtype="float32"))
    shares = np.asarray(square.resize((length, side), Image.Resampling.BICUBIC))
    return (np.abs(shares) > 1e-6).astype(float)


def resampled(pixels, side):
    return np.stack([np.asarray(Image.fromarray(o).resize((side, side), Image.Resampling.BICUBIC)) for o in pixels])


def expected_item(known, valid, side, in_bytes):
    """(C, S, S) least and greatest value that an item may have, and where it may be 0 as well.

    Near a hole, the mean of the valid pixels alone leaves their range by 1.1 times this range at most: the absolute
    bicubic weights sum up to 1.56, and where valid pixels have less than a half of the weight, the pixel is invalid.
    """
    if known.shape[1:] == (side, side):
        return known - 0.51, known + 0.51, np.zeros(known.shape, bool)
    kinds = ["float32"] * (not in_bytes or not valid.all()) + ["uint8"] * in_bytes  # bytes with holes: either of them
    values = np.clip([resampled(known.astype(kind), side) for kind in kinds], 0, 255).astype(float)
    down, across = touched(known.shape[1], side), touched(known.shape[2], side)
    holes = down @ (~valid).astype(float) @ across.T > 0.5
    some = down @ valid.astype(float) @ across.T > 0.5
    least, most = values.min(0) - 0.51, values.max(0) + 0.51
    for band in np.flatnonzero(valid.any((1, 2))):
        inside = known[band][valid[band]]
        slack = 1.1 * np.ptp(inside) + 0.51
        least[band][holes[band]], most[band][holes[band]] = inside.min() - slack, inside.max() + slack
    least[~some], most[~some] = 0, 0
    return np.minimum(least, 254.49), np.maximum(most, 0.51), holes


def windows(height, width, tile):
    "(top, bottom, left, right) of all items of a raster."
    if not tile:
        return [(0, height, 0, width)]
    spans = []
    for length in (height, width):
        starts = [max(0, min(start, length - tile)) for start in range(0, length, tile)]
        spans.append([(start, min(length, start + tile)) for start in starts])
    return [(*rows, *columns) for rows in spans[0] for columns in spans[1]]


# --- what is different


def item_difference(item, truth, window, limits):
    "What is wrong with an item: a line, or None."
    top, bottom, left, right = window
    known = stretched(truth.pixels, truth.valid, *limits)[:, top:bottom, left:right]
    valid = truth.valid[:, top:bottom, left:right]
    if len(known) == 1 < len(item):
        known, valid = (np.repeat(array, len(item), 0) for array in (known, valid))
    if len(known) != len(item):
        return f"{len(item)} bands, and not {len(known)}"
    least, most, or_0 = expected_item(known, valid, item.shape[-1], limits[0] is None)
    slack = truth.tolerance + 1e-3
    wrong = ((item < least - slack) | (item > most + slack)) & ~(or_0 & (item == 0))
    if not wrong.any():
        return None
    place = tuple(int(i) for i in np.argwhere(wrong)[0])
    due = f"{least[place]:.1f} to {most[place]:.1f}"
    return f"{wrong.sum():,} of {wrong.size:,} values; at {place} {item[place]}, and not {due}"


def mask_difference(path, truth, options):
    "What is wrong with the valid pixels as `open_image` tells them: a line, or None."
    declared = [options["nodata"]] if "nodata" in options else []
    with quiet_decoders(), closing(open_image(path, *declared)) as image:
        pixels, invalid = image.read(None, options.get("bands"))
    valid = np.ones(pixels.shape, bool) if invalid is None else ~invalid
    if valid.shape != truth.valid.shape:
        return f"its shape is {valid.shape}, and not {truth.valid.shape}"
    wrong = valid != truth.valid
    if not wrong.any():
        return None
    place = tuple(int(i) for i in np.argwhere(wrong)[0])
    return f"{wrong.sum():,} of {wrong.size:,} pixels are valid or not; first {place}, value {truth.pixels[place]}"


def raster_difference(path, truth, items, limits, options):
    "What is wrong with a raster: a line, or None. `items` are its items by window."
    found = mask_difference(path, truth, options)
    if found:
        return found
    due = set()
    for window in windows(*truth.pixels.shape[1:], options["tile"]):
        top, bottom, left, right = window
        if truth.valid[:, top:bottom, left:right].any():
            due.add(window)
    if due != set(items):
        return f"items of {sorted(set(items) - due)[:3]} are too many, those of {sorted(due - set(items))[:3]} missing"
    differences = ((window, item_difference(item, truth, window, limits)) for window, item in sorted(items.items()))
    return next((f"{window}: {text}" for window, text in differences if text), None)


def limits_difference(dtype, truths, limits):
    "What is wrong with percentiles 2 and 98 of the valid pixels of all files of a type: a line, or None."
    low, high = limits
    truths = [truth for truth in truths if truth.dtype == dtype]
    if low is None or any(len(truth.pixels) != len(low) for truth in truths):
        return None  # each raster tells its bands
    for band in range(len(low)):
        values = np.concatenate([truth.pixels[band][truth.valid[band]].astype(float) for truth in truths])
        if not len(values):
            continue
        least, lower, upper, most = np.percentile(values, [0.5, 5, 95, 99.5])
        if not least <= low[band] <= lower:
            return f"band {band} is black at {low[band]}, outside percentiles 0.5 to 5: {least} to {lower}"
        if lower < upper and not upper <= high[band] <= most:
            return f"band {band} is white at {high[band]}, outside percentiles 95 to 99.5: {upper} to {most}"
    return None


# --- a corpus


def items_by_file(prepared):
    "file -> window -> item"
    found = defaultdict(dict)
    for i in range(len(prepared)):
        name = prepared.source(i)
        match = WINDOW.search(name)
        window = tuple(map(int, match.groups())) if match else None
        found[name[: match.start()] if match else name][window] = prepared[i]
    return found


def reasons_by_file(prepared):
    "file -> why it was left out"
    with open(prepared.folder / "skipped.csv", encoding="utf-8") as file:
        return {row["file"].partition("[")[0]: row["reason"] for row in csv.DictReader(file)}


def check(kind, seed, count, folder):
    "Write a corpus of `count` rasters, prepare it, and compare: an `Outcome` for each."
    images = Path(folder) / "in"
    images.mkdir(parents=True)
    for number in range(count):
        rasters.write(kind, seed, number, images)
    paths = sorted(path for path in images.iterdir() if path.suffix in (".tif", ".png", ".jpg"))
    options = dict(side=SIDE, tile=SIDE, workers=1) | OPTIONS.get(kind, {})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # of numpy: a mean of nothing, an overflow
            prepared = prepare(images, Path(folder) / "out", **options)
        verdicts = compare(prepared, paths, options)
    except CmidError as error:
        verdicts = [verdict_of_skipped(path, str(error), options) for path in paths]
    return [Outcome(kind, seed, number, *verdict_of(kind, *verdict)) for number, verdict in enumerate(verdicts)]


def verdict_of(kind, verdict, text):
    "A kind of `REFUSED` must be refused, in these words; a refusal of any other is not in the list"
    if verdict == "refused":
        listed = kind in REFUSED and REFUSED[kind] in text
        return ("refused" if listed else "unlisted"), text
    if kind in REFUSED:
        return "wrong", "must be refused"
    return verdict, text


def compare(prepared, paths, options):
    "(verdict, text) of each file"
    items, reasons = items_by_file(prepared), reasons_by_file(prepared)
    truths = {path: truth_of(path, options) for path in paths if path.name not in reasons or items[path.name]}
    types = sorted({truth.dtype for truth in truths.values()})
    limits = {dtype: limits_of(prepared, dtype) for dtype in types}
    wrong = {dtype: limits_difference(dtype, truths.values(), limits[dtype]) for dtype in types}
    for path in paths:
        if path not in truths:
            yield verdict_of_skipped(path, reasons[path.name], options)
            continue
        truth, found = truths[path], items[path.name]
        if not options["tile"] and found:
            (item,) = found.values()
            found = {(0, truth.pixels.shape[1], 0, truth.pixels.shape[2]): item}
        text = wrong[truth.dtype] or raster_difference(path, truth, found, limits[truth.dtype], options)
        yield ("wrong", text) if text else ("right", "")


def limits_of(prepared, dtype):
    "What becomes 0 and 255 in files of a type, by band; (None, None): bytes are as they are"
    if dtype == "uint8":
        return None, None
    limits = prepared.manifest["stretch"]["types"][dtype]
    return limits["low"], limits["high"]


def verdict_of_skipped(path, reason, options):
    "A file without one valid pixel is right to be left out; everything else is a refusal"
    if not any(words in reason for words in NO_VALUE):
        return "refused", reason
    empty = not truth_of(path, options).valid.any()
    return ("right", "") if empty else ("wrong", "left out, but has pixels with a value")


def truth_of(path, options):
    bands = options.get("bands")
    truth = reference.read(path, options.get("nodata"), in_order=bands is None)
    return truth if bands is None else replace(truth, pixels=truth.pixels[bands], valid=truth.valid[bands])
