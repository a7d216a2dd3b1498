"""Random images with masks and pairs of dates of many kinds, as `rasters`: for the differential test.

    write("masked-mask", 3, 7, folder)

writes item 7 of corpus 3 into folder/images and folder/masks, or for two dates into A, B and OUT.
"""

import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from tests.tools.rasters import ORIENTATION, exif_bytes, hole, layout, pick, png, set_tag, size, tiff, values

CLASSES = dict(land=1, water=2, city=[3, 7])
IGNORE = [0]
COLOURS = {0: (0, 0, 0), 1: (132, 41, 246), 2: (60, 16, 152), 3: (254, 221, 58), 7: (226, 169, 41)}
COLOUR_CLASSES = dict(land="#8429F6", water="#3C1098", city=["#FEDD3A", "#E2A929"])
MASKS = {}  # kind -> function(shared, own, path of the image, path of the mask), both without suffix
PAIRS = {}  # kind -> function(shared, own, path of the first date, of the second, of the label)


def masks(function):
    MASKS[function.__name__.replace("_", "-")] = function
    return function


def pairs(function):
    PAIRS[function.__name__.replace("_", "-")] = function
    return function


def write(kind, seed, number, folder):
    "Write one item, half of them into training."
    start = zlib.crc32(kind.encode())
    shared, own = np.random.default_rng([start, seed]), np.random.default_rng([start, seed, number])
    parts = ("A", "B", "OUT") if kind in PAIRS else ("images", "masks")
    paths = [Path(folder) / part / f"{'test' if number % 2 else 'train'}{number}" for part in parts]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (PAIRS if kind in PAIRS else MASKS)[kind](shared, own, *paths)


# --- parts of an item


def numbers(own, height, width, dtype="uint8"):
    "A mask of the values of `CLASSES` and `IGNORE`."
    return own.choice([0, 1, 2, 3, 7], (height, width)).astype(dtype)


def plain_image(own, path, height, width):
    return tiff(path, values(own, "uint8", 3, height, width))


def wide_image(own, path, height, width):
    return tiff(path, values(own, "uint16", 2, height, width))


def image_of(shared):
    return pick(shared, plain_image, wide_image)


def changed(own, height, width):
    return own.integers(0, 2, (height, width), np.uint8) * np.uint8(255)


def in_colours(mask):
    table = np.zeros((8, 3), np.uint8)
    for value, colour in COLOURS.items():
        table[value] = colour
    return table[mask]


# --- how a mask says its classes


@masks
def numbers_in_tiff(shared, own, image, mask):
    shape = size(own)
    image_of(shared)(own, image, *shape)
    pixels = numbers(own, *shape, pick(own, "uint8", "int8", "uint16", "int16", "int32", "float32", "float64"))[None]
    tiff(mask, pixels, **layout(own, pixels))


@masks
def numbers_in_png(shared, own, image, mask):
    shape = size(own)
    image_of(shared)(own, image, *shape)
    png(mask, numbers(own, *shape)[..., None], 0, pick(own, 4, 8, 16), own.random() < 0.5)


@masks
def numbers_of_few_bits(shared, own, image, mask):
    shape = size(own)
    plain_image(own, image, *shape)
    tiff(mask, own.integers(0, 4, (1, *shape), np.uint8), nbits=pick(own, 2, 4))


@masks
def numbers_where_0_is_white(shared, own, image, mask):
    shape = size(own)
    plain_image(own, image, *shape)
    tiff(mask, 255 - numbers(own, *shape)[None], photometric="MINISWHITE", compress=pick(own, "none", "lzw"))


@masks
def colours(shared, own, image, mask):
    shape = size(own)
    plain_image(own, image, *shape)
    pixels = in_colours(numbers(own, *shape))
    if own.random() < 0.5:
        png(mask, pixels, 2)
    else:
        tiff(mask, pixels.transpose(2, 0, 1))


@masks
def palette(shared, own, image, mask):
    "Indices or colours are asked for: see `agreement`."
    shape = size(own)
    plain_image(own, image, *shape)
    table = {i: (*COLOURS.get(i, (9, 9, 9)), 255) for i in range(256)}
    pixels = numbers(own, *shape)
    if own.random() < 0.5:
        chunk = np.array([table[i][:3] for i in range(8)], np.uint8).tobytes()
        png(mask, pixels[..., None], 3, pick(own, 4, 8), PLTE=chunk)
    else:
        tiff(mask, pixels[None], palette=table, photometric="PALETTE")


@masks
def palette_by_colour(shared, own, image, mask):
    palette(shared, own, image, mask)


# --- where a mask has no value


@masks
def mask_with_nodata(shared, own, image, mask):
    shape = size(own)
    image_of(shared)(own, image, *shape)
    dtype, fill = pick(shared, ("uint8", 255), ("uint8", 99), ("int16", -1), ("int16", -9999), ("float32", np.nan))
    pixels = numbers(own, *shape, dtype)[None]
    pixels[0][hole(own, *shape)] = fill
    tiff(mask, pixels, nodata=fill)


@masks
def mask_with_ignored_nodata(shared, own, image, mask):
    "Declared as nodata and ignored by `params.yaml`, too."
    shape = size(own)
    plain_image(own, image, *shape)
    tiff(mask, numbers(own, *shape)[None], nodata=0)


@masks
def mask_with_class_as_nodata(shared, own, image, mask):
    "Declared as nodata, but a class in `params.yaml`, which is what counts."
    shape = size(own)
    plain_image(own, image, *shape)
    tiff(mask, numbers(own, *shape)[None], nodata=3)


@masks
def masked_mask_with_class_as_nodata(shared, own, image, mask):
    "GDAL follows the mask, and the declared value is a class."
    shape = size(own)
    plain_image(own, image, *shape)
    tiff(mask, numbers(own, *shape)[None], ~hole(own, *shape), nodata=3)


@masks
def masked_mask(shared, own, image, mask):
    shape = size(own)
    plain_image(own, image, *shape)
    tiff(mask, numbers(own, *shape)[None], ~hole(own, *shape), internal=bool(shared.integers(2)))


@masks
def transparent_mask(shared, own, image, mask):
    shape = size(own)
    plain_image(own, image, *shape)
    alpha = np.where(hole(own, *shape), 0, 255)[..., None]
    png(mask, np.concatenate([in_colours(numbers(own, *shape)), alpha], 2), 6)


@masks
def transparent_palette(shared, own, image, mask):
    "A value that no class has is transparent."
    shape = size(own)
    plain_image(own, image, *shape)
    pixels = numbers(own, *shape)
    pixels[hole(own, *shape)] = 5
    table = own.integers(0, 256, (8, 3), np.uint8).tobytes()
    png(mask, pixels[..., None], 3, pick(own, 4, 8), PLTE=table, tRNS=bytes([255, 255, 255, 255, 255, 0, 255, 255]))


# --- where an image has no value


@masks
def image_with_nodata(shared, own, image, mask):
    shape = size(own)
    dtype, bands, fill = pick(shared, "uint8", "uint16", "float32"), pick(shared, 1, 2, 3, 5), shared.integers(0, 256)
    pixels = values(own, dtype, bands, *shape)
    pixels[:, hole(own, *shape)] = fill
    pixels[0, own.random(shape) < 0.2] = fill  # in one band only
    tiff(image, pixels, nodata=int(fill), **layout(own, pixels))
    png(mask, numbers(own, *shape)[..., None], 0)


@masks
def image_with_mask(shared, own, image, mask):
    shape = size(own)
    pixels = values(own, pick(shared, "uint8", "uint16"), pick(shared, 1, 3), *shape)
    tiff(image, pixels, ~hole(own, *shape), internal=bool(shared.integers(2)), **layout(own, pixels))
    png(mask, numbers(own, *shape)[..., None], 0)


@masks
def image_with_alpha(shared, own, image, mask):
    shape = size(own)
    pixels = values(own, "uint8", 4, *shape)
    pixels[3] = np.where(hole(own, *shape), 0, 255)
    pixels[3, 0, 0] = 255
    if shared.random() < 0.5:
        png(image, pixels.transpose(1, 2, 0), 6)
    else:
        tiff(image, pixels, alpha="YES", photometric="RGB")
    png(mask, numbers(own, *shape)[..., None], 0)


@masks
def image_not_finite(shared, own, image, mask):
    shape = size(own)
    pixels = values(own, "float32", 2, *shape)
    pixels[:, hole(own, *shape)] = pick(own, np.nan, np.inf)
    pixels[1, own.random(shape) < 0.1] = np.nan
    tiff(image, pixels)
    png(mask, numbers(own, *shape)[..., None], 0)


@masks
def all_have_holes(shared, own, image, mask):
    shape = size(own)
    pixels = values(own, "uint16", 1, *shape)
    pixels[:, hole(own, *shape)] = 300
    tiff(image, pixels, nodata=300)
    tiff(mask, numbers(own, *shape)[None], ~hole(own, *shape))


@masks
def declared_nodata(shared, own, image, mask):
    "See `label_agreement.OPTIONS`: 7 is declared by who prepares the labels."
    shape = size(own)
    pixels = values(own, pick(shared, "uint8", "uint16", "float32"), pick(shared, 1, 2, 3), *shape)
    pixels[:, hole(own, *shape)] = 7
    tiff(image, pixels)
    png(mask, numbers(own, *shape)[..., None], 0)


# --- turned


@masks
def turned_alike(shared, own, image, mask):
    shape, orientation = size(own), own.integers(1, 9)
    set_tag(image_of(shared)(own, image, *shape), ORIENTATION, orientation)
    if own.random() < 0.5:
        png(mask, numbers(own, *shape)[..., None], 0, eXIf=exif_bytes(orientation))
    else:
        set_tag(tiff(mask, numbers(own, *shape)[None]), ORIENTATION, orientation)


@masks
def turned_alike_with_holes(shared, own, image, mask):
    shape, orientation = size(own), own.integers(1, 9)
    pixels = values(own, "uint8", 3, *shape)
    set_tag(tiff(image, pixels, ~hole(own, *shape)), ORIENTATION, orientation)
    set_tag(tiff(mask, numbers(own, *shape)[None], ~hole(own, *shape)), ORIENTATION, orientation)


@masks
def turned_apart(shared, own, image, mask):
    "One of the two is turned."
    side, orientation, alone = int(own.integers(2, 60)), own.integers(2, 9), shared.random() < 0.5
    path = plain_image(own, image, side, side)
    other = tiff(mask, numbers(own, side, side)[None])
    set_tag(path if alone else other, ORIENTATION, orientation)


@masks
def anything(shared, own, image, mask):
    "Holes of all kinds in image and mask, both turned alike."
    shape, orientation = size(own), pick(own, 1, own.integers(2, 9))
    pixels = values(own, pick(shared, "uint8", "uint16", "float32"), pick(shared, 1, 2, 3, 5), *shape)
    pixels[:, hole(own, *shape)] = 5
    inside = ~hole(own, *shape) if own.random() < 0.4 else None
    path = tiff(image, pixels, inside, own.random() < 0.5, nodata=pick(own, None, 5), **layout(own, pixels))
    set_tag(path, ORIENTATION, orientation)
    labels = numbers(own, *shape, pick(own, "uint8", "uint16", "int16"))[None]
    nodata = pick(own, None, 0, 3, 99)
    if nodata == 99:
        labels[0][hole(own, *shape)] = 99
    inside = ~hole(own, *shape) if own.random() < 0.4 and nodata != 99 else None
    options = layout(own, labels) | dict(endianness="little")  # GDAL 3.10 writes big-endian strips of nodata wrongly
    path = tiff(mask, labels, inside, own.random() < 0.5, nodata=nodata, **options)
    set_tag(path, ORIENTATION, orientation)


# --- two dates


@pairs
def plain_pair(shared, own, first, second, label):
    shape = size(own)
    for path in (first, second):
        image_of(np.random.default_rng(shared.bit_generator.seed_seq))(own, path, *shape)
    png(label, changed(own, *shape)[..., None], 0)


@pairs
def pair_with_nodata(shared, own, first, second, label):
    shape, fill = size(own), int(shared.integers(0, 256))
    dtype, bands = pick(shared, "uint8", "uint16", "float32"), pick(shared, 1, 2, 3)
    for path in (first, second):
        pixels = values(own, dtype, bands, *shape)
        pixels[:, hole(own, *shape)] = fill
        tiff(path, pixels, nodata=fill)
    png(label, changed(own, *shape)[..., None], 0)


@pairs
def pair_with_masks(shared, own, first, second, label):
    shape = size(own)
    for path in (first, second):
        tiff(path, values(own, "uint8", 3, *shape), ~hole(own, *shape) if own.random() < 0.7 else None)
    tiff(label, changed(own, *shape)[None], ~hole(own, *shape))


@pairs
def pair_turned_alike(shared, own, first, second, label):
    shape, orientation = size(own), own.integers(1, 9)
    for path in (first, second):
        set_tag(plain_image(own, path, *shape), ORIENTATION, orientation)
    png(label, changed(own, *shape)[..., None], 0, eXIf=exif_bytes(orientation))


@pairs
def pair_in_jpeg(shared, own, first, second, label):
    shape = size(own)
    for path in (first, second):
        Image.fromarray(values(own, "uint8", *shape, 3)).save(path.with_suffix(".jpg"))
    png(label, changed(own, *shape)[..., None], 0)


@pairs
def pair_turned_apart(shared, own, first, second, label):
    side = int(own.integers(2, 60))
    plain_image(own, first, side, side)
    set_tag(plain_image(own, second, side, side), ORIENTATION, own.integers(2, 9))
    png(label, changed(own, side, side)[..., None], 0)


@pairs
def pair_of_two_types(shared, own, first, second, label):
    shape = size(own)
    tiff(first, values(own, "uint8", 1, *shape))
    tiff(second, values(own, "uint16", 1, *shape))
    png(label, changed(own, *shape)[..., None], 0)


@pairs
def pair_of_two_sizes(shared, own, first, second, label):
    height, width = size(own)
    plain_image(own, first, height, width)
    plain_image(own, second, height + 1, width)
    png(label, changed(own, height, width)[..., None], 0)
