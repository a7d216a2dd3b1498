"""What a raster holds, read by rasterio's own masks and by Pillow, and by nothing of `cmid`: for the differential test.

Written from these rules. GDAL's mask says which values count; in red, green and blue a declared value counts only where
all bands have it; what is not finite has no value. Alpha is a mask if nearly all of it is 0 or the maximum, and else a
band. Every file is turned as its tag says. Brightness is brightness: 0 is black, few bits are 0 to 255, CMYK, YCbCr and
palettes are colours, colours come as red, green, blue, and scale and offset are applied to all but bytes.
"""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import rasterio
from PIL import Image, ImageOps
from rasterio.enums import ColorInterp, MaskFlags

from tests.tools.rasters import tiff_tags

COLOURS = ColorInterp.red, ColorInterp.green, ColorInterp.blue
UPRIGHT = {  # what orientation 1 to 8 asks for: numpy does it on the last two axes
    1: lambda x: x,
    2: lambda x: x[..., ::-1],
    3: lambda x: x[..., ::-1, ::-1],
    4: lambda x: x[..., ::-1, :],
    5: lambda x: x.swapaxes(-1, -2),
    6: lambda x: x.swapaxes(-1, -2)[..., ::-1],
    7: lambda x: x.swapaxes(-1, -2)[..., ::-1, ::-1],
    8: lambda x: x.swapaxes(-1, -2)[..., ::-1, :],
}


@dataclass
class Reference:
    "An image as it should be read."

    pixels: np.ndarray  # (C, h, w), upright
    valid: np.ndarray  # bool (C, h, w)
    dtype: str = "uint8"  # of the numbers in the file; a palette's colours are bytes
    tolerance: int = 0  # in levels of 8 bits: two programs make other colours of CMYK


def read(path, nodata=None, in_order=True):
    "The bands of an image, and where they have a value; `nodata` has none; `in_order`: red, green, blue."
    path = Path(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        head = path.read_bytes()[:32]
        if head[:4] == b"\x89PNG" and head[24] == 16:
            return _turned(_of_rasterio(path, nodata), _picture_orientation(path))
        if head[:2] in (b"II", b"MM"):
            return _of_tiff(path, nodata, in_order)
        return _of_pillow(path, nodata)


def _turned(reference, orientation):
    turn = UPRIGHT[orientation]
    return replace(reference, pixels=turn(reference.pixels), valid=turn(reference.valid))


# --- Pillow


def _of_pillow(path, nodata):
    with Image.open(path) as file:
        upright = ImageOps.exif_transpose(file)
    grey = upright.mode in ("1", "L", "LA")
    visible = np.asarray(upright.convert("RGBA"))[..., 3] > 0
    pixels = np.atleast_3d(np.asarray(upright.convert("L" if grey else "RGB"))).transpose(2, 0, 1)
    with rasterio.open(path) as source:
        if MaskFlags.alpha not in source.mask_flag_enums[0]:  # in the file or beside it
            visible &= UPRIGHT[_picture_orientation(path)](source.dataset_mask() > 0)
    if nodata is not None:
        visible &= (pixels != nodata).any(0)
    return Reference(pixels, np.broadcast_to(visible, pixels.shape))


def _picture_orientation(path):
    with Image.open(path) as file:
        return file.getexif().get(274, 1)


# --- rasterio


def _of_tiff(path, nodata, in_order):
    tags = tiff_tags(path)
    orientation = tags.get(274, 1)
    if tags.get(262) == 5:
        return _cmyk(path)
    return _turned(_of_rasterio(path, nodata, tags.get(262) == 0, in_order), orientation)


def _cmyk(path):
    with Image.open(path) as file:
        pixels = np.asarray(ImageOps.exif_transpose(file).convert("RGB")).transpose(2, 0, 1)
    return Reference(pixels, np.ones(pixels.shape, bool), tolerance=4)


def _of_rasterio(path, nodata, min_is_white=False, in_order=True):
    with rasterio.open(path) as source:
        dtype, pixels, valid = source.dtypes[0], source.read(), source.read_masks() > 0
        valid = valid | (MaskFlags.alpha in source.mask_flag_enums[0])  # see `_without_alpha`
        kinds, space = list(source.colorinterp), source.tags(ns="IMAGE_STRUCTURE").get("SOURCE_COLOR_SPACE")
        bits = int(source.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", 8))
        colours = source.colormap(1) if kinds[0] == ColorInterp.palette else None
        scales = np.array([source.scales, source.offsets])
    if colours:
        return _of_palette(pixels[0], valid[0], colours, nodata)
    valid = valid if nodata is None else valid & (pixels != nodata)
    always = path.suffix == ".png" or space == "CIELAB"
    pixels, valid, scales, kinds = _without_alpha(pixels, valid, scales, kinds, always)
    if pixels.dtype == np.uint8 and bits < 8:
        pixels = np.rint(pixels * (255 / (2**bits - 1))).astype(np.uint8)
    if min_is_white:
        pixels = np.iinfo(pixels.dtype).max - pixels
    pixels, scales, valid = _colours_in_order(pixels, scales, valid, kinds, in_order)
    if pixels.dtype != np.uint8 and (scales != [[1], [0]]).any():
        pixels = pixels * scales[0][:, None, None] + scales[1][:, None, None]
    return Reference(pixels, valid & np.isfinite(pixels), dtype)


def _of_palette(numbers, valid, colours, nodata):
    table = np.zeros((max(colours) + 1, 3), np.uint8)
    for number, colour in colours.items():
        table[number] = colour[:3]
    if (table == table[:, :1]).all():
        table = table[:, :1]
    pixels = table[numbers].transpose(2, 0, 1)
    valid = valid if nodata is None else valid & (pixels != nodata).any(0)
    return Reference(pixels, np.broadcast_to(valid, pixels.shape))


def _without_alpha(pixels, valid, scales, kinds, always):
    "The same without the band alpha where it is a mask"
    if ColorInterp.alpha not in kinds:
        return pixels, valid, scales, kinds
    band = kinds.index(ColorInterp.alpha)
    top = np.iinfo(pixels.dtype).max
    ends = np.isin(pixels[band], (0, top)).mean()
    if not always and (ends < 0.9 or not (pixels[band] == top).any()):
        return pixels, valid, scales, kinds
    others = [i for i in range(len(pixels)) if i != band]
    valid = valid[others] & (pixels[band] > 0)
    return pixels[others], valid, scales[:, others], [kinds[i] for i in others]


def _colours_in_order(pixels, scales, valid, kinds, in_order):
    "Red, green and blue first where these are the first three; in a picture one mask for all bands"
    if not set(COLOURS) <= set(kinds):
        return pixels, scales, valid
    valid = np.broadcast_to(valid.any(0), valid.shape)
    order = [kinds.index(colour) for colour in COLOURS]
    if not in_order or sorted(order) != [0, 1, 2]:
        return pixels, scales, valid
    order += range(3, len(pixels))
    return pixels[order], scales[:, order], valid


# --- masks of classes


def read_numbers(path, classes=()):
    """A mask's (h, w) indices or (h, w, 3) colours as in the file, and bool (h, w), where it has a value; upright.

    A number of `classes` that the file declares as nodata is a class.
    """
    path = Path(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if path.suffix == ".png":
            pixels, valid = _png_numbers(path)
            turn = UPRIGHT[_picture_orientation(path)]
        else:
            pixels, valid = _tiff_numbers(path, classes)
            if tiff_tags(path).get(262) == 0:
                pixels = np.iinfo(pixels.dtype).max - pixels
            turn = UPRIGHT[tiff_tags(path).get(274, 1)]
    pixels, valid = turn(pixels), turn(valid)
    return (pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)), valid


def _tiff_numbers(path, classes):
    with rasterio.open(path) as source:
        pixels, valid = source.read(), source.read_masks() > 0
        is_class = source.nodata in classes and MaskFlags.nodata in source.mask_flag_enums[0]
    valid |= is_class
    valid = valid & np.isfinite(pixels)
    return pixels, valid.any(0)


def _png_numbers(path):
    "rasterio tells indices and few bits as they are"
    with rasterio.open(path) as source:
        pixels, valid = source.read(), source.read_masks() > 0
    colours = len(pixels) - (len(pixels) in (2, 4))
    return pixels[:colours], valid[:colours].any(0)


def palette_colours(path):
    "The (n, 3) colours of the palette of a PNG or TIFF."
    with rasterio.open(path) as source:
        colours = source.colormap(1)
    return np.array([colours[i][:3] for i in range(max(colours) + 1)])
