"""Random rasters of many kinds, the same for the same (kind, seed, number): for the differential test.

    write("nodata", 3, 7, folder)

writes raster 7 of corpus 3 of the kind `nodata`. What all rasters of a corpus share (type, bands) is drawn by `shared`,
what is of this one (size, content, layout) by `own`.
"""

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import rasterio
import rasterio.errors
from PIL import Image
from rasterio.enums import ColorInterp, Resampling
from rasterio.transform import from_origin

KINDS = {}  # name -> function(shared, own, path without suffix)
TYPES = "uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"
BANDS = 1, 2, 3, 4, 5, 13
ORIENTATION = 274  # tags of TIFF
PHOTOMETRIC = 262


def kind(function):
    KINDS[function.__name__.replace("_", "-")] = function
    return function


def write(kind, seed, number, folder):
    "Write one raster, and the files beside it that belong to it."
    start = zlib.crc32(kind.encode())
    shared, own = np.random.default_rng([start, seed]), np.random.default_rng([start, seed, number])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        KINDS[kind](shared, own, Path(folder) / f"{number:03}")


# --- content


def pick(rng, *values):
    return values[rng.integers(len(values))]


def size(own):
    "Height and width: 1 pixel, a few, about a tile, several tiles, about 256."
    sides = [own.integers(1, 4), own.integers(4, 32), own.integers(32, 100), own.integers(32, 100)]
    height, width = (int(pick(own, *sides)) for _ in range(2))
    if own.random() < 0.06:
        height = int(own.integers(254, 259))
    return height, width


def values(own, dtype, *shape):
    "Noise on a ramp, in a range that suits the type."
    ranges = dict(uint8=(0, 255), int8=(-100, 120), uint16=(150, 9000), int16=(-2000, 7000), uint32=(10, 10**6))
    low, high = ranges.get(dtype, (-3000, 10**5) if dtype == "int32" else (-31.7, 12.4))
    noise = own.random(shape)
    ramp = np.linspace(0, 1, shape[-1])
    return (low + (high - low) * (0.6 * noise + 0.4 * ramp)).astype(dtype)


def hole(own, height, width):
    "bool (h, w): a border, a corner, scattered pixels, everything or nothing."
    form = own.integers(8)
    invalid = np.zeros((height, width), bool)
    if form < 2:
        invalid[: own.integers(0, height + 1)] = True
    elif form < 4:
        invalid = np.add.outer(np.arange(height), np.arange(width)) < own.integers(0, height + width)
    elif form < 7:
        invalid = own.random((height, width)) < own.random()
    return np.ones_like(invalid) if own.random() < 0.04 else invalid


# --- TIFF


def layout(own, pixels, lossless=True):
    "Random creation options."
    options = dict(
        compress=pick(own, "none", "lzw", "deflate", "packbits", "zstd", "lzma"),
        interleave=pick(own, "pixel", "band"),
        endianness=pick(own, "little", "big"),
        bigtiff=pick(own, "no", "yes"),
    )
    if own.random() < 0.4:
        options |= dict(tiled=True, blockxsize=16 * int(own.integers(1, 9)), blockysize=16 * int(own.integers(1, 9)))
    else:
        options |= dict(blockysize=int(own.integers(1, 40)))
    if options["compress"] in ("lzw", "deflate", "zstd"):
        real = pixels.dtype.kind == "f"
        options["predictor"] = pick(own, 1, 2, 3) if real else pick(own, 1, 2)
    return options


def tiff(path, pixels, mask=None, internal=True, tags=None, colours=None, palette=None, driver="GTiff", **options):
    "Write (C, h, w); `mask` is bool (h, w), True: valid. The path of the file."
    path = path if path.suffix else path.with_suffix(".tif")
    if driver == "GTiff" and len(pixels) == 4 and "photometric" not in options:
        options |= dict(alpha="NO")  # GDAL would make the fourth band alpha
    shape = dict(zip(("count", "height", "width"), pixels.shape))
    environment = rasterio.Env(GDAL_TIFF_INTERNAL_MASK="YES" if internal else "NO", GDAL_PAM_ENABLED="NO")
    with environment, rasterio.open(path, "w", driver=driver, dtype=pixels.dtype, **shape, **options) as file:
        if colours:
            file.colorinterp = colours
        if palette is not None:
            file.write_colormap(1, palette)
        if tags:
            file.update_tags(**tags)
        file.write(pixels)
        if mask is not None:
            file.write_mask(mask)
    return path


def tiff_numbers(path):
    "How the numbers of a TIFF are stored: byte order, is it a BigTIFF, where its first directory is"
    head = Path(path).read_bytes()[:16]
    order = "<" if head[:2] == b"II" else ">"
    big = struct.unpack(order + "H", head[2:4])[0] == 43
    return order, big, struct.unpack(order + ("Q" if big else "I"), head[8:16] if big else head[4:8])[0]


def set_tag(path, tag, value):
    "Give the first page of a TIFF a tag with one short number, or a text of at most three characters."
    order, big, start = tiff_numbers(path)
    content = bytearray(Path(path).read_bytes())
    count, step, number = ("Q", 20, "Q") if big else ("H", 12, "I")
    first = start + struct.calcsize(count)
    entries = struct.unpack_from(order + count, content, start)[0]
    rows = [bytes(content[first + step * i : first + step * (i + 1)]) for i in range(entries)]
    rows = [row for row in rows if struct.unpack_from(order + "H", row)[0] != tag]
    rows.append(tag_entry(order, number, tag, value))
    rows.sort(key=lambda row: struct.unpack_from(order + "H", row)[0])
    following = bytes(content[first + step * entries :][: struct.calcsize(number)])
    content += b"\0" * (-len(content) % 8)
    struct.pack_into(order + number, content, 8 if big else 4, len(content))
    content += struct.pack(order + count, len(rows)) + b"".join(rows) + following
    Path(path).write_bytes(content)


def tag_entry(order, number, tag, value):
    "The bytes of an entry of a directory; `number` is how its counts are packed"
    is_text = isinstance(value, str)
    content = value.encode() + b"\0" if is_text else struct.pack(order + "H", value)
    head = struct.pack(order + "HH" + number, tag, 2 if is_text else 3, len(content) if is_text else 1)
    return head + content.ljust(struct.calcsize(number), b"\0")


def plain_pixels(shared, own, types=TYPES, bands=BANDS):
    return values(own, pick(shared, *types), pick(shared, *bands), *size(own))


@kind
def plain(shared, own, path):
    pixels = plain_pixels(shared, own)
    tiff(path, pixels, **layout(own, pixels))


@kind
def georeferenced(shared, own, path):
    pixels = plain_pixels(shared, own)
    tiff(path, pixels, crs="EPSG:32633", transform=from_origin(*own.random(2) * 1e6, 0.3, 0.3), **layout(own, pixels))


@kind
def about_256(shared, own, path):
    dtype, bands = pick(shared, "uint8", "uint16", "float32"), pick(shared, 1, 3, 4)
    pixels = values(own, dtype, bands, int(own.integers(254, 260)), int(own.integers(254, 260)))
    tiff(path, pixels, **layout(own, pixels))


@kind
def one_pixel(shared, own, path):
    pixels = values(
        own, pick(shared, *TYPES), pick(shared, *BANDS), *pick(own, (1, 1), (1, 9), (9, 1), (2, 2), (1, 60))
    )
    tiff(path, pixels, **layout(own, pixels))


@kind
def constant(shared, own, path):
    pixels = plain_pixels(shared, own)
    pixels[:] = shared.integers(1, 100)
    tiff(path, pixels)


@kind
def narrow_range(shared, own, path):
    "Large numbers that differ little: float32 cannot tell them apart."
    dtype = pick(shared, "uint32", "int32", "float64")
    pixels = (2_000_000_000 + own.integers(0, 900, (1, *size(own)))).astype(dtype)
    tiff(path, pixels, **layout(own, pixels))


@kind
def extreme_range(shared, own, path):
    "Floats whose span is larger than the largest float32."
    pixels = values(own, "float64", pick(shared, 1, 3), *size(own)) * 1e300
    tiff(path, pixels)


@kind
def lossy(shared, own, path):
    "JPEG in TIFF: grey, colours as RGB, many bands."
    pixels = values(own, "uint8", pick(shared, 1, 3, 5), *size(own))
    how = dict(interleave="band") if len(pixels) == 5 else {}
    tiff(path, pixels, compress="jpeg", photometric="RGB" if len(pixels) == 3 else "MINISBLACK", **how)


@kind
def ycbcr(shared, own, path):
    tiff(path, values(own, "uint8", 3, *size(own)), compress="jpeg", photometric="YCBCR", tiled=own.random() < 0.4)


@kind
def lerc(shared, own, path):
    pixels = plain_pixels(shared, own)
    options = dict(compress=pick(own, "lerc", "lerc_zstd", "lerc_deflate"), max_z_error=pick(own, 0, 1))
    tiff(path, pixels, **options)


@kind
def cmyk(shared, own, path):
    tiff(path, values(own, "uint8", 4, *size(own)), photometric="CMYK", compress=pick(own, "none", "lzw"))


@kind
def cmyk_of_16_bits(shared, own, path):
    set_tag(tiff(path, values(own, "uint16", 4, *size(own))), PHOTOMETRIC, 5)


@kind
def ycbcr_without_jpeg(shared, own, path):
    height, width = size(own)
    picture = Image.fromarray(values(own, "uint8", height, width, 3), "YCbCr")
    picture.save(path.with_suffix(".tif"), compression=pick(own, None, "tiff_lzw"))


@kind
def colours_of_16_bits(shared, own, path):
    "CIELab, ICCLab and ITULab of 16 bits: GDAL tells the numbers as they are."
    set_tag(tiff(path, values(own, "uint16", 3, *size(own))), PHOTOMETRIC, pick(own, 8, 9, 10))


@kind
def ycbcr_of_16_bits(shared, own, path):
    set_tag(tiff(path, values(own, "uint16", 3, *size(own))), PHOTOMETRIC, 6)


@kind
def icc_lab(shared, own, path):
    tiff(path, values(own, "uint8", 3, *size(own)), photometric=pick(own, "ICCLAB", "ITULAB"))


@kind
def cielab(shared, own, path):
    tiff(path, values(own, "uint8", 3, *size(own)), photometric="CIELAB")


@kind
def min_is_white(shared, own, path):
    dtype = pick(shared, "uint8", "uint8", "uint16")
    pixels = values(own, dtype, 1, *size(own))
    tiff(path, pixels, photometric="MINISWHITE", **layout(own, pixels))


@kind
def min_is_white_nodata(shared, own, path):
    pixels = values(own, pick(shared, "uint8", "uint8", "uint16"), 1, *size(own))
    fill = int(shared.choice([0, 255]))
    pixels[0][hole(own, *pixels.shape[1:])] = fill
    tiff(path, pixels, photometric="MINISWHITE", nodata=fill)


@kind
def few_bits(shared, own, path):
    bits = pick(own, 1, 2, 4)
    pixels = own.integers(0, 2**bits, (pick(shared, 1, 1, 3), *size(own)), np.uint8)
    grey = pick(shared, "MINISBLACK", "MINISWHITE") if len(pixels) == 1 else "MINISBLACK"
    nodata = pick(own, None, None, 1)
    tiff(path, pixels, nbits=bits, photometric=grey, nodata=nodata, compress=pick(own, "none", "deflate", "packbits"))


@kind
def odd_bits(shared, own, path):
    bits = (3, 5, 6, 7)[(2 * int(shared.integers(2)) + int(path.name)) % 4]
    tiff(path, own.integers(0, 2**bits, (1, *size(own)), np.uint8), nbits=bits)


@kind
def fax(shared, own, path):
    "Bilevel scans: fax compression, 0 is white."
    height, width = size(own)
    picture = Image.fromarray(own.random((height, width)) < 0.5)
    picture.save(path.with_suffix(".tif"), compression=pick(own, "group3", "group4", "packbits"))


@kind
def twelve_bits(shared, own, path):
    tiff(path, own.integers(0, 4096, (pick(shared, 1, 3), *size(own))).astype("uint16"), nbits=12)


@kind
def half_floats(shared, own, path):
    tiff(path, values(own, "float32", pick(shared, 1, 4), *size(own)), nbits=16)


def colour_table(rng, entries, grey=False):
    colours = rng.integers(0, 256, (entries, 3))
    return {i: (*(colours[i, [0] * 3] if grey else colours[i]).tolist(), 255) for i in range(entries)}


@kind
def palette(shared, own, path):
    grey, entries = shared.random() < 0.3, pick(own, 2, 16, 200, 256)
    pixels = own.integers(0, entries, (1, *size(own)), np.uint8)
    tiff(path, pixels, palette=colour_table(own, 256, grey), photometric="PALETTE", compress=pick(own, "none", "lzw"))


@kind
def palette_nodata(shared, own, path):
    pixels = own.integers(0, 30, (1, *size(own)), np.uint8)
    tiff(path, pixels, palette=colour_table(own, 256), photometric="PALETTE", nodata=int(shared.integers(0, 3)))


@kind
def palette_bits(shared, own, path):
    bits = pick(shared, 1, 2, 4)
    pixels = own.integers(0, 2**bits, (1, *size(own)), np.uint8)
    tiff(path, pixels, palette=colour_table(own, 2**bits), photometric="PALETTE", nbits=bits)


@kind
def scaled(shared, own, path):
    "Scale and offset are the same for all files, and change nothing after a stretch."
    pixels = plain_pixels(shared, own, ("uint8", "uint16", "int16", "float32"), (1, 3))
    path = tiff(path, pixels, **layout(own, pixels))
    with rasterio.Env(GDAL_PAM_ENABLED="NO"), rasterio.open(path, "r+") as file:
        bands = range(1, len(pixels) + 1)
        file.scales, file.offsets = [0.0001 / band for band in bands], [-0.1 * band for band in bands]


@kind
def scaled_differently(shared, own, path):
    "The same measurements, stored in numbers of another scale in each file."
    scale, offset = own.choice([1, 10, 100]), own.choice([0, 7])
    pixels = values(own, "float32", pick(shared, 1, 2), *size(own)) + 40
    stored = ((pixels + offset) * scale).astype("uint16")
    stored[:, hole(own, *stored.shape[1:])] = 0
    path = tiff(path, stored, nodata=0)
    with rasterio.Env(GDAL_PAM_ENABLED="NO"), rasterio.open(path, "r+") as file:
        file.scales, file.offsets = (1 / scale,) * len(pixels), (-offset,) * len(pixels)


@kind
def sparse(shared, own, path):
    "Blocks that were never written are nodata, or 0."
    height, width = (int(n) for n in own.integers(40, 130, 2))
    pixels = values(own, pick(shared, "uint8", "uint16", "float32"), 1, height, width)
    fill = pick(shared, None, 0, 7)
    pixels[:, :16] = fill or 0
    tiff(path, pixels, sparse_ok=True, tiled=True, blockxsize=16, blockysize=16, nodata=fill)


@kind
def cloud_optimised(shared, own, path):
    pixels = plain_pixels(shared, own, ("uint8", "uint16", "float32"), (1, 3, 4))
    height, width = pixels.shape[1:]
    mask = ~hole(own, height, width) if own.random() < 0.5 else None
    predictor = pick(own, "NO", "YES")
    tiff(path, pixels, mask, driver="COG", blocksize=128, compress=pick(own, "none", "deflate"), predictor=predictor)


@kind
def overviews(shared, own, path):
    pixels = plain_pixels(shared, own, ("uint8", "uint16", "float32"), (1, 3, 4))
    height, width = pixels.shape[1:]
    path = tiff(path, pixels, ~hole(own, height, width) if own.random() < 0.5 else None, **layout(own, pixels))
    with rasterio.Env(GDAL_PAM_ENABLED="NO", GDAL_TIFF_INTERNAL_MASK="YES"), rasterio.open(path, "r+") as file:
        file.build_overviews([2, 4] if min(height, width) > 4 else [], Resampling.average)


@kind
def other_band_order(shared, own, path):
    red, green, blue, other = ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.undefined
    order = pick(shared, [blue, green, red], [green, red, blue], [blue, green, red, other], [other, red, green, blue])
    pixels = values(own, pick(shared, "uint8", "uint16"), len(order), *size(own))
    tiff(path, pixels, photometric="MINISBLACK", colours=order)


@kind
def mixed_types(shared, own, path):
    "Each type gets a stretch of its own."
    pixels = values(own, pick(own, "uint8", "uint16", "float32"), pick(shared, 1, 3), *size(own))
    tiff(path, pixels)


@kind
def chosen_bands(shared, own, path):
    "See `agreement.OPTIONS`: bands 2 and 0 are asked for."
    pixels = plain_pixels(shared, own, bands=(3, 4, 13))
    fill = int(shared.integers(0, 100))
    pixels[:, hole(own, *pixels.shape[1:])] = fill
    tiff(path, pixels, nodata=fill, photometric="MINISBLACK", **layout(own, pixels))


@kind
def chosen_bands_of_other_order(shared, own, path):
    "Bands 2 and 0 of the file are asked for, and these are red and blue."
    order = [ColorInterp.blue, ColorInterp.green, ColorInterp.red]
    pixels = values(own, pick(shared, "uint8", "uint16"), 3, *size(own))
    gap = hole(own, *pixels.shape[1:])
    pixels[:, gap] = 5
    pixels[1, gap] = pick(own, 5, 6)  # where green has a value, the colour has one
    tiff(path, pixels, photometric="MINISBLACK", colours=order, nodata=5)


@kind
def large_as_a_whole(shared, own, path):
    "See `agreement.OPTIONS`: whole images are resized."
    pixels = values(own, pick(shared, "uint8", "uint16", "float32"), pick(shared, 1, 3, 4), *own.integers(20, 200, 2))
    tiff(path, pixels)


@kind
def large_as_a_whole_nodata(shared, own, path):
    pixels = values(own, pick(shared, "uint8", "uint16", "float32"), pick(shared, 1, 3, 4), *own.integers(20, 200, 2))
    fill = int(shared.integers(0, 100))
    pixels[:, hole(own, *pixels.shape[1:])] = fill
    tiff(path, pixels, nodata=fill)


@kind
def holes_in_constant(shared, own, path):
    "Resizing must not mix holes into what is around them."
    height, width = (int(pick(own, *own.integers(3, 70, 2))) for _ in range(2))
    pixels = np.full((pick(shared, 1, 2, 3), height, width), 200, pick(shared, "uint8", "uint16", "float32"))
    pixels[:, 0] = 100 * (pixels.dtype != "uint8") or 200  # a stretch needs two values
    pixels[:, hole(own, height, width)] = 7
    tiff(path, pixels, nodata=7)


# --- which pixels have a value


def with_nodata(shared, own, path, types, fills, bands=BANDS, **options):
    pixels = plain_pixels(shared, own, types, bands)
    fill = pick(shared, *fills)
    pixels[:, hole(own, *pixels.shape[1:])] = fill
    for band in pixels:
        band[own.random(band.shape) < own.choice([0, 0.2])] = fill  # in some bands only
    tiff(path, pixels, nodata=fill, **options, **layout(own, pixels))


@kind
def nodata_0(shared, own, path):
    with_nodata(shared, own, path, TYPES, [0])


@kind
def nodata_255(shared, own, path):
    with_nodata(shared, own, path, ("uint8", "uint16", "int16", "float32"), [255])


@kind
def nodata_9999(shared, own, path):
    with_nodata(shared, own, path, ("int16", "int32", "float32", "float64"), [-9999])


@kind
def nodata_65535(shared, own, path):
    with_nodata(shared, own, path, ("uint16", "uint32", "int32", "float32"), [65535])


@kind
def nodata_nan(shared, own, path):
    with_nodata(shared, own, path, ("float32", "float64"), [np.nan])


@kind
def nodata_largest(shared, own, path):
    "The largest negative float32."
    with_nodata(shared, own, path, ("float32", "float64"), [float(np.finfo("float32").min)])


@kind
def nodata_of_few_digits(shared, own, path):
    "The value in the file was printed with few digits: it is near the pixels' value, and not equal."
    exact, text = pick(shared, (-3.40282346638528898e38, "-3.4028235e+38"), (1 / 3, "0.3333333"), (-9999.1, "-9999.10"))
    pixels = plain_pixels(shared, own, ("float32",))
    pixels[:, hole(own, *pixels.shape[1:])] = exact
    tiff(path, pixels, nodata=float(text), **layout(own, pixels))


@kind
def nodata_of_large_types(shared, own, path):
    cases = ("int32", -(2**31)), ("uint32", 2**32 - 1), ("float64", 1e20), ("float32", np.inf), ("int64", -9999)
    dtype, fill = pick(shared, *cases)
    with_nodata(shared, own, path, (dtype,), [fill])


@kind
def nodata_impossible(shared, own, path):
    "A text that is no value of this type."
    pixels = values(own, pick(shared, "uint8", "int16", "float32"), pick(shared, 1, 3), *size(own))
    set_tag(tiff(path, pixels, **layout(own, pixels)), 42113, pick(own, "256", "-1", "nan", "1.5", "no", ""))


@kind
def nodata_absent(shared, own, path):
    "A value is declared that no pixel has, or none can have."
    pixels = plain_pixels(shared, own, ("uint8", "uint16", "int16", "float32"))
    path = tiff(path, pixels)
    with rasterio.Env(GDAL_PAM_ENABLED="NO"), rasterio.open(path, "r+") as file:
        file.nodata = pick(shared, 77_777 if pixels.dtype == "float32" else 0)
    pixels[pixels == 0] = 1
    tiff(path, pixels, nodata=77_777 if pixels.dtype == "float32" else 0)


@kind
def nodata_in_colours(shared, own, path):
    "Red, green and blue: a colour with one 0 is a colour, black is none."
    with_nodata(shared, own, path, ("uint8", "uint16"), [0, 255], (3,), photometric="RGB")


@kind
def nodata_in_colours_and_infrared(shared, own, path):
    with_nodata(shared, own, path, ("uint8", "uint16"), [0], (4,), photometric="RGB", alpha="NO")


@kind
def nodata_by_band(shared, own, path):
    "NODATA_VALUES: a pixel has no value where every band has its own."
    pixels = plain_pixels(shared, own, ("uint8", "uint16", "int16"), (3,))
    fills = [3, 100, 7]
    gap = hole(own, *pixels.shape[1:])
    for band, fill in zip(pixels, fills):
        band[gap] = fill
        band[own.random(gap.shape) < 0.2] = fill
    tiff(path, pixels, tags=dict(NODATA_VALUES=" ".join(map(str, fills))))


@kind
def nodata_beside(shared, own, path):
    "The value is declared in the file that GDAL writes beside an image, perhaps for one band alone."
    pixels = plain_pixels(shared, own, ("uint8", "uint16", "float32"), (1, 2, 3))
    pixels[:, hole(own, *pixels.shape[1:])] = 9
    colours = "RGB" if len(pixels) == 3 and shared.random() < 0.5 else "MINISBLACK"
    path = tiff(path, pixels, photometric=colours)
    row = '<PAMRasterBand band="{}"><NoDataValue>9</NoDataValue></PAMRasterBand>'
    bands = range(1, len(pixels) + 1)
    rows = "".join(row.format(band) for band in pick(shared, bands, bands, bands[-1:]))
    Path(f"{path}.aux.xml").write_text(f"<PAMDataset>{rows}</PAMDataset>")


@kind
def nodata_beside_picture(shared, own, path):
    picture = samples(own, pick(shared, 1, 3))
    picture[hole(own, *picture.shape[:2])] = 9
    png(path, picture, 0 if picture.shape[2] == 1 else 2)
    row = '<PAMRasterBand band="{}"><NoDataValue>9</NoDataValue></PAMRasterBand>'
    rows = "".join(row.format(band + 1) for band in range(picture.shape[2]))
    Path(f"{path}.png.aux.xml").write_text(f"<PAMDataset>{rows}</PAMDataset>")


@kind
def not_finite(shared, own, path):
    pixels = plain_pixels(shared, own, ("float32", "float64"))
    for value in (np.nan, np.inf, -np.inf):
        pixels[own.random(pixels.shape) < own.choice([0, 0.1])] = value
    pixels[:, hole(own, *pixels.shape[1:])] = pick(own, np.nan, np.inf)
    tiff(path, pixels, nodata=pick(shared, None, -9999), **layout(own, pixels))


@kind
def no_value_at_all(shared, own, path):
    pixels = plain_pixels(shared, own)
    gone = own.random() < 0.7
    if gone:
        pixels[:] = 5
    tiff(path, pixels, nodata=5)


def with_mask(shared, own, path, internal, **options):
    pixels = plain_pixels(shared, own)
    options |= layout(own, pixels)
    return tiff(path, pixels, ~hole(own, *pixels.shape[1:]), internal, **options)


@kind
def internal_mask(shared, own, path):
    with_mask(shared, own, path, True)


@kind
def mask_file(shared, own, path):
    with_mask(shared, own, path, False)


@kind
def mask_file_of_picture(shared, own, path):
    "PNG or JPEG with GDAL's mask beside it."
    pixels = values(own, "uint8", pick(shared, 1, 3), *size(own))
    path, exif = path.with_suffix(pick(shared, ".png", ".jpg")), Image.Exif()
    exif[ORIENTATION] = int(own.integers(1, 9))
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(path, exif=exif)
    mask = ~hole(own, *pixels.shape[1:])
    flags = {f"INTERNAL_MASK_FLAGS_{band + 1}": "2" for band in range(len(pixels))}
    tiff(path.with_suffix(".mask.tif"), mask[None] * np.uint8(255), tags=flags)
    path.with_suffix(".mask.tif").rename(f"{path}.msk")


@kind
def mask_file_by_band(shared, own, path):
    "A mask file with a mask for each band."
    pixels = plain_pixels(shared, own, ("uint8", "uint16"), (2, 3))
    path = tiff(path, pixels)
    masks = own.random(pixels.shape) < 0.7
    masks[:, hole(own, *pixels.shape[1:])] = False
    flags = {f"INTERNAL_MASK_FLAGS_{band + 1}": "0" for band in range(len(pixels))}
    beside = tiff(path.with_suffix(".mask.tif"), masks * np.uint8(255), tags=flags)
    beside.rename(f"{path}.msk")


@kind
def mask_of_palette(shared, own, path):
    pixels = own.integers(0, 256, (1, *size(own)), np.uint8)
    mask = ~hole(own, *pixels.shape[1:])
    table = colour_table(own, 256)
    tiff(path, pixels, mask, bool(shared.integers(2)), palette=table, photometric="PALETTE")


@kind
def mask_and_nodata(shared, own, path):
    "GDAL follows the mask, and so the declared value counts only where the mask says so."
    pixels = plain_pixels(shared, own)
    gap = hole(own, *pixels.shape[1:])
    pixels[:, gap] = 7
    tiff(path, pixels, ~gap, nodata=7, **layout(own, pixels))


@kind
def mask_of_jpeg(shared, own, path):
    pixels = values(own, "uint8", 3, *size(own))
    mask = ~hole(own, *pixels.shape[1:])
    pixels[:, ~mask] = 0
    tiff(path, pixels, mask, compress="jpeg", photometric="YCBCR", tiled=own.random() < 0.5)


def with_alpha(shared, own, path, alpha, types=("uint8", "uint8", "uint16"), **options):
    bands = pick(shared, 1, 3, 3, 12)
    pixels = values(own, pick(shared, *types), bands + 1, *size(own))
    top = np.iinfo(pixels.dtype).max
    pixels[-1] = alpha(pixels.shape[1:]) * top
    meaning = [ColorInterp.undefined] * bands
    if bands == 3:
        meaning = [ColorInterp.red, ColorInterp.green, ColorInterp.blue]
    meaning.append(ColorInterp.alpha)
    photometric = "RGB" if bands == 3 else "MINISBLACK"
    return tiff(path, pixels, photometric=photometric, colours=meaning, **options, **layout(own, pixels))


@kind
def alpha_as_mask(shared, own, path):
    def alpha(shape):
        visible = ~hole(own, *shape)
        visible[0, 0] = True
        return visible

    with_alpha(shared, own, path, alpha)


@kind
def alpha_with_soft_edge(shared, own, path):
    "Of many pixels a few are half transparent."

    def alpha(shape):
        visible = (~hole(own, *shape)).astype(float)
        visible[own.random(shape) < 0.002 * (visible.size > 2000)] = 0.5
        visible[0, 0] = 1
        return visible

    with_alpha(shared, own, path, alpha)


@kind
def alpha_as_data(shared, own, path):
    "Near infrared that is marked as transparency."
    pixels = values(own, "uint8", 4, *own.integers(20, 100, 2))
    tiff(path, pixels, alpha="YES", photometric="RGB", **layout(own, pixels))


@kind
def alpha_with_nodata(shared, own, path):
    def alpha(shape):
        visible = ~hole(own, *shape)
        visible[0, 0] = True
        return visible

    path = with_alpha(shared, own, path, alpha)
    with rasterio.Env(GDAL_PAM_ENABLED="NO"), rasterio.open(path, "r+") as file:
        pixels = file.read()
        pixels[:, pixels[-1] == 0] = 0
        file.write(pixels)
        file.nodata = 0


@kind
def alpha_first(shared, own, path):
    pixels = values(own, "uint8", 4, *size(own))
    pixels[0] = np.where(hole(own, *pixels.shape[1:]), 0, 255)
    pixels[0, 0, 0] = 255
    order = [ColorInterp.alpha, ColorInterp.red, ColorInterp.green, ColorInterp.blue]
    tiff(path, pixels, photometric="MINISBLACK", colours=order)


@kind
def alpha_behind_infrared(shared, own, path):
    pixels = values(own, "uint8", 5, *size(own))
    pixels[4] = np.where(hole(own, *pixels.shape[1:]), 0, 255)
    pixels[4, 0, 0] = 255
    order = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.undefined, ColorInterp.alpha]
    tiff(path, pixels, photometric="RGB", colours=order)


@kind
def declared_nodata(shared, own, path):
    "See `agreement.OPTIONS`: 7 is declared by who prepares the images."
    pixels = plain_pixels(shared, own)
    pixels[:, hole(own, *pixels.shape[1:])] = 7
    pixels[0, own.random(pixels.shape[1:]) < 0.1] = 7
    tiff(path, pixels, nodata=pick(own, None, 7), **layout(own, pixels))


@kind
def declared_nodata_of_pictures(shared, own, path):
    picture = samples(own, pick(shared, 1, 3))
    picture[hole(own, *picture.shape[:2])] = 7
    picture[own.random(picture.shape) < 0.1] = 7
    png(path, picture, 0 if picture.shape[2] == 1 else 2)


@kind
def declared_nodata_of_palettes(shared, own, path):
    "It is a colour: 7, 7, 7."
    numbers = own.integers(0, 16, (*size(own), 1), np.uint8)
    table = colour_table(own, 16) | {3: (7, 7, 7, 255), 7: (90, 7, 7, 255), 9: (7, 7, 7, 255)}
    if own.random() < 0.5:
        colours = np.array([table[i][:3] for i in range(16)], np.uint8)
        png(path, numbers, 3, pick(own, 4, 8), PLTE=colours.tobytes())
    else:
        tiff(path, numbers.transpose(2, 0, 1), palette=table, photometric="PALETTE")


# --- turned


@kind
def turned(shared, own, path):
    pixels = plain_pixels(shared, own)
    set_tag(tiff(path, pixels, **layout(own, pixels)), ORIENTATION, own.integers(1, 9))


@kind
def turned_mask(shared, own, path):
    set_tag(with_mask(shared, own, path, True), ORIENTATION, own.integers(1, 9))


@kind
def turned_nodata(shared, own, path):
    pixels = plain_pixels(shared, own, ("uint8", "uint16", "float32"), (1, 3))
    pixels[:, hole(own, *pixels.shape[1:])] = 5
    set_tag(tiff(path, pixels, nodata=5), ORIENTATION, own.integers(1, 9))


@kind
def turned_alpha(shared, own, path):
    set_tag(with_alpha(shared, own, path, lambda shape: own.random(shape) < 0.7), ORIENTATION, own.integers(1, 9))


@kind
def turned_palette(shared, own, path):
    pixels = own.integers(0, 256, (1, *size(own)), np.uint8)
    path = tiff(path, pixels, palette=colour_table(own, 256), photometric="PALETTE")
    set_tag(path, ORIENTATION, own.integers(1, 9))


@kind
def turned_cmyk(shared, own, path):
    "GDAL reads these by a part of libtiff that turns strips by itself."
    pixels = values(own, "uint8", 4, *size(own))
    set_tag(tiff(path, pixels, photometric="CMYK"), ORIENTATION, own.integers(2, 9))


@kind
def turned_min_is_white(shared, own, path):
    pixels = values(own, "uint8", 1, *size(own))
    set_tag(tiff(path, pixels, photometric="MINISWHITE"), ORIENTATION, own.integers(1, 9))


@kind
def anything(shared, own, path):
    "All of this at once: alpha, a mask inside or beside, nodata, scales, an orientation, white as zero."
    dtype, bands, alpha = pick(shared, *TYPES), pick(shared, *BANDS), shared.random() < 0.4
    alpha = alpha and dtype in ("uint8", "uint16")
    pixels = values(own, dtype, bands + alpha, *size(own))
    gap = hole(own, *pixels.shape[1:])
    pixels[:, gap] = 5
    meaning = [ColorInterp.undefined] * bands
    if bands >= 3 and shared.random() < 0.5:
        meaning[:3] = [ColorInterp.red, ColorInterp.green, ColorInterp.blue]
    if alpha:
        meaning.append(ColorInterp.alpha)
        pixels[-1] = np.iinfo(dtype).max * ~hole(own, *pixels.shape[1:])
        pixels[-1, 0, 0] = np.iinfo(dtype).max
    white = bands == 1 and dtype in ("uint8", "uint16") and not alpha and shared.random() < 0.5
    options = dict(photometric="MINISWHITE") if white else dict(photometric="MINISBLACK", colours=meaning)
    mask = ~hole(own, *pixels.shape[1:]) if own.random() < 0.3 else None
    path = tiff(path, pixels, mask, own.random() < 0.5, nodata=pick(own, None, 5), **options, **layout(own, pixels))
    if own.random() < 0.3:
        with rasterio.Env(GDAL_PAM_ENABLED="NO"), rasterio.open(path, "r+") as file:
            file.scales, file.offsets = [0.5] * file.count, [2] * file.count
    if own.random() < 0.6:
        set_tag(path, ORIENTATION, own.integers(1, 9))


# --- refused


@kind
def pages(shared, own, path):
    pictures = [Image.fromarray(values(own, "uint8", 40, 40)) for _ in range(own.integers(2, 5))]
    pictures[0].save(path.with_suffix(".tif"), save_all=True, append_images=pictures[1:])


@kind
def thumbnail_first(shared, own, path):
    "The first page is a small copy of the second."
    pictures = [Image.fromarray(values(own, "uint8", side, side)) for side in (20, 40)]
    path = path.with_suffix(".tif")
    pictures[0].save(path, save_all=True, append_images=pictures[1:])
    set_tag(path, 254, 1)


@kind
def complex_numbers(shared, own, path):
    pixels = values(own, "float32", 1, *size(own)).astype(pick(own, "complex64", "complex128"))
    tiff(path, pixels)


@kind
def long_integers(shared, own, path):
    dtype = pick(shared, "int64", "uint64")
    tiff(path, own.integers(0, 10**6, (pick(shared, 1, 3), *size(own))).astype(dtype))


# --- PNG


def chunk(name, content=b""):
    body = name + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def packed_rows(samples, depth):
    "The bytes of (h, w, c) numbers of 1, 2, 4, 8 or 16 bits, each row after its filter byte"
    if not samples.size:
        return b""
    height = len(samples)
    flat = samples.reshape(height, -1)
    if depth == 16:
        flat = flat.astype(">u2").view(np.uint8)
    elif depth < 8:
        bits = np.unpackbits(flat.astype(np.uint8)[..., None], axis=2)[..., 8 - depth :]
        flat = np.packbits(bits.reshape(height, -1), axis=1)
    return np.concatenate([np.zeros((height, 1), np.uint8), flat.astype(np.uint8)], 1).tobytes()


ADAM7 = (0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)


def png(path, samples, colour, depth=8, interlaced=False, **chunks):
    "Write (h, w, c) numbers as PNG; `colour` is 0 (grey), 2 (RGB), 3 (palette), 4 (grey, alpha) or 6 (RGBA)."
    height, width = samples.shape[:2]
    passes = [samples[top::down, left::right] for top, left, down, right in ADAM7] if interlaced else [samples]
    data = zlib.compress(b"".join(packed_rows(part, depth) for part in passes))
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    extra = b"".join(chunk(name.encode(), content) for name, content in chunks.items())
    content = chunk(b"IHDR", head) + extra + chunk(b"IDAT", data) + chunk(b"IEND")
    path.with_suffix(".png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def samples(own, channels, depth=8):
    return own.integers(0, 2**depth, (*size(own), channels))


@kind
def png_grey(shared, own, path):
    depth = pick(shared, 1, 2, 4, 8)
    png(path, samples(own, 1, depth), 0, depth, own.random() < 0.5)


@kind
def png_rgb(shared, own, path):
    png(path, samples(own, 3), 2, 8, own.random() < 0.5)


@kind
def png_grey_alpha(shared, own, path):
    picture = samples(own, 2)
    picture[hole(own, *picture.shape[:2]), 1] = 0
    png(path, picture, 4, 8, own.random() < 0.5)


@kind
def png_rgba(shared, own, path):
    picture = samples(own, 4)
    picture[..., 3] = pick(own, picture[..., 3], 255)
    picture[hole(own, *picture.shape[:2]), 3] = 0
    png(path, picture, 6, 8, own.random() < 0.5)


@kind
def png_palette(shared, own, path):
    depth = pick(shared, 1, 2, 4, 8)
    colours = own.integers(0, 256, 3 * 2**depth, np.uint8).tobytes()
    png(path, samples(own, 1, depth), 3, depth, own.random() < 0.5, PLTE=colours)


@kind
def png_palette_transparent(shared, own, path):
    depth = pick(shared, 2, 4, 8)
    colours = own.integers(0, 256, 3 * 2**depth, np.uint8).tobytes()
    alpha = own.choice([0, 128, 255], own.integers(1, 2**depth)).astype(np.uint8).tobytes()
    png(path, samples(own, 1, depth), 3, depth, own.random() < 0.5, PLTE=colours, tRNS=alpha)


@kind
def png_transparent_colour(shared, own, path):
    "One grey value or colour is transparent."
    channels = pick(shared, 1, 1, 3)
    depth = pick(own, 1, 2, 4, 8) if channels == 1 else 8
    picture = samples(own, channels, depth)
    colour = own.integers(0, 2**depth, channels)
    picture[hole(own, *picture.shape[:2])] = colour
    png(path, picture, 0 if channels == 1 else 2, depth, own.random() < 0.5, tRNS=colour.astype(">u2").tobytes())


@kind
def png_16(shared, own, path):
    colour, channels = pick(shared, (0, 1), (2, 3), (4, 2), (6, 4))
    picture = samples(own, channels, 16)
    if channels in (2, 4):
        picture[..., -1] = pick(own, picture[..., -1], 65535)
        picture[hole(own, *picture.shape[:2]), -1] = 0
    png(path, picture, colour, 16, own.random() < 0.5)


@kind
def png_16_transparent_colour(shared, own, path):
    channels = pick(shared, 1, 3)
    picture = samples(own, channels, 16)
    colour = own.integers(0, 2**16, channels)
    picture[hole(own, *picture.shape[:2])] = colour
    png(path, picture, 0 if channels == 1 else 2, 16, tRNS=colour.astype(">u2").tobytes())


def exif_bytes(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = int(orientation)
    return exif.tobytes().removeprefix(b"Exif\0\0")


@kind
def png_turned(shared, own, path):
    colour, channels = pick(shared, (0, 1), (2, 3), (6, 4))
    picture = samples(own, channels)
    png(path, picture, colour, eXIf=exif_bytes(own.integers(1, 9)))


@kind
def png_16_turned(shared, own, path):
    colour, channels = pick(shared, (0, 1), (2, 3), (4, 2), (6, 4))
    png(path, samples(own, channels, 16), colour, 16, own.random() < 0.5, eXIf=exif_bytes(own.integers(1, 9)))


@kind
def png_animated(shared, own, path):
    pictures = [Image.fromarray(values(own, "uint8", 20, 40)) for _ in range(3)]
    pictures[0].save(path.with_suffix(".png"), save_all=True, append_images=pictures[1:])


# --- JPEG


def jpeg(own, path, mode, **options):
    height, width = size(own)
    channels = len(mode)
    pixels = values(own, "uint8", height, width, channels)
    picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels, mode)
    picture.save(path.with_suffix(".jpg"), quality=int(own.integers(30, 96)), **options)


@kind
def jpeg_grey(shared, own, path):
    jpeg(own, path, "L", progressive=own.random() < 0.5)


@kind
def jpeg_rgb(shared, own, path):
    jpeg(own, path, "RGB", progressive=own.random() < 0.5, subsampling=pick(own, 0, 1, 2))


@kind
def jpeg_cmyk(shared, own, path):
    jpeg(own, path, "CMYK")


@kind
def jpeg_turned(shared, own, path):
    jpeg(own, path, pick(shared, "L", "RGB"), exif=exif_bytes(own.integers(1, 9)))


@kind
def jpeg_with_mask(shared, own, path):
    "GDAL puts a mask behind the end of a JPEG."
    pixels = values(own, "uint8", pick(shared, 1, 3), *size(own))
    tiff(path.with_suffix(".jpg"), pixels, ~hole(own, *pixels.shape[1:]), driver="JPEG")


@kind
def grey_and_colour(shared, own, path):
    "Grey pictures among those in colour become RGB."
    mode = "L" if path.name.endswith(("1", "5")) else "RGB"
    jpeg(own, path, mode)


# --- what was drawn


def traits(path):
    "Words for what is special about a raster, to count."
    yield path.suffix
    try:
        source = rasterio.open(path)
    except rasterio.errors.RasterioIOError:
        return
    with source:
        yield from {f"{source.count} bands", source.dtypes[0]}
        yield "a side of 1" if 1 in source.shape else "larger"
        yield "a side of 256" if 256 in source.shape else "another size"
        yield from (flag.name for flag in source.mask_flag_enums[0])
        half = source.dtypes[0] == "float16"  # since GDAL 3.11; before, a float32 of 16 bits
        yield f"{'16' if half else source.tags(1, ns='IMAGE_STRUCTURE').get('NBITS', '8 or more')} bits"
        if path.suffix == ".tif":
            yield from tiff_traits(path, source)


def tiff_traits(path, source):
    order, big, _ = tiff_numbers(path)
    yield "BigTIFF" if big else "TIFF"
    yield "little-endian" if order == "<" else "big-endian"
    yield "tiles" if source.profile["tiled"] else "strips"
    yield f"{source.profile.get('compress', 'no')} compression"
    yield f"{source.profile.get('interleave', 'no')} interleaving"
    tags = tiff_tags(path)
    yield f"orientation {tags.get(ORIENTATION, 1)}"
    yield f"photometric {tags[PHOTOMETRIC]}"
    yield f"predictor {tags.get(317, 1)}"


def tiff_tags(path):
    "The tags of the first page that hold one short number."
    order, big, start = tiff_numbers(path)
    content = Path(path).read_bytes()
    count, step, value_at = ("Q", 20, 12) if big else ("H", 12, 8)
    first = start + struct.calcsize(count)
    entries = [first + step * i for i in range(struct.unpack_from(order + count, content, start)[0])]
    shorts = [at for at in entries if struct.unpack_from(order + "H", content, at + 2)[0] == 3]
    number = struct.Struct(order + "H")
    return {number.unpack_from(content, at)[0]: number.unpack_from(content, at + value_at)[0] for at in shorts}
