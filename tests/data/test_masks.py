"Masks of every kind of file give the classes of the table, and every pixel is counted."

import warnings

import numpy as np
import pytest
import rasterio
from PIL import Image

from cmid.data import masks
from cmid.data.masks import VOID, ClassTable, read_mask

INDEX = np.array([[0, 1], [1, 0]], np.uint8)
LAND = [[255, 0], [0, 255]]  # what INDEX means where 1 is a class and 0 is ignored
INDICES = ClassTable(dict(a=1, b=300), [0])
COLOURS = ClassTable(dict(a="#FF0000", b="#FFFFFF"), ["000000"])


def save_tiff(path, x, palette=None, valid=None, beside=False, **options):
    "Write (C, H, W); `valid` is its mask, in the file or beside it."
    bands, height, width = x.shape
    options |= dict(photometric="palette") if palette else {}
    with warnings.catch_warnings(), rasterio.Env(GDAL_TIFF_INTERNAL_MASK=not beside):
        warnings.simplefilter("ignore")
        with rasterio.open(
            path, "w", driver="GTiff", count=bands, height=height, width=width, dtype=x.dtype, **options
        ) as file:
            file.write(x)
            if palette:
                file.write_colormap(1, palette)
            if valid is not None:
                file.write_mask(valid)
    return path


def classes_in(path, table):
    return read_mask(path, table).mask.tolist()


def test_palette_png_is_read_by_index_or_colour(tmp_path):
    picture = Image.fromarray(INDEX)
    picture.putpalette([0, 0, 0, 255, 0, 0])
    picture.save(tmp_path / "p.png")
    assert classes_in(tmp_path / "p.png", INDICES) == LAND
    assert classes_in(tmp_path / "p.png", COLOURS) == LAND
    other_colour = ClassTable(dict(a=["#00FF00", 1]), [0])  # the palette's colours are unknown, so indices are read
    assert classes_in(tmp_path / "p.png", other_colour) == LAND


def test_palette_tiff_is_read_by_index_or_colour(tmp_path):
    path = save_tiff(tmp_path / "p.tif", INDEX[None], {0: (0, 0, 0, 255), 1: (255, 0, 0, 255)})
    assert classes_in(path, INDICES) == LAND
    assert classes_in(path, COLOURS) == LAND


def test_one_bit_png(tmp_path):
    Image.fromarray(INDEX > 0).save(tmp_path / "1.png")
    assert classes_in(tmp_path / "1.png", INDICES) == LAND


def test_transparency_is_ignored(tmp_path):
    rgba = np.stack([INDEX * 255, INDEX * 0, INDEX * 0, INDEX * 7])
    assert classes_in(save_tiff(tmp_path / "rgba.tif", rgba), COLOURS) == LAND


def test_16_bit_and_float_masks(tmp_path):
    values = np.array([[[0, 1], [300, 300]]])
    for kind in ("uint16", "float32"):
        found = read_mask(save_tiff(tmp_path / f"{kind}.tif", values.astype(kind)), INDICES)
        assert found.mask.tolist() == [[255, 0], [1, 1]]
        assert not found.unknown


def test_mask_of_many_rows_is_counted_whole(tmp_path, monkeypatch):
    x = np.random.default_rng(0).integers(0, 256, (301, 97), np.uint8) % 4
    Image.fromarray(x).save(tmp_path / "m.png")
    table = ClassTable(dict(a=1, b=2), [0])
    at_once = read_mask(tmp_path / "m.png", table)
    monkeypatch.setattr(masks, "PIXELS_AT_ONCE", 1000)
    in_blocks = read_mask(tmp_path / "m.png", table)
    assert (at_once.mask == in_blocks.mask).all()
    assert (at_once.counts == in_blocks.counts).all()
    assert at_once.unknown == in_blocks.unknown == {"3": (x == 3).sum()}
    assert at_once.counts.tolist() == [(x == v).sum() for v in (1, 2, 0)] + [0] * 253


# --- numbers as they are meant


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_numbers_of_few_bits_are_kept(tmp_path, bits, suffix):
    x = np.arange(2**bits, dtype=np.uint8)[None, None]
    path, driver = tmp_path / f"m.{suffix}", dict(png="PNG", tif="GTiff")[suffix]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(
            path, "w", driver=driver, count=1, height=1, width=x.size, dtype="uint8", nbits=bits
        ) as file:
            file.write(x)
    table = ClassTable({f"c{i}": i for i in range(2**bits)}, [])
    assert classes_in(path, table) == [[*range(2**bits)]]


def test_white_is_zero(tmp_path):
    "Numbers are those that are shown: the largest less the stored one."
    grey = save_tiff(tmp_path / "8.tif", np.array([[[255, 254, 253]]], np.uint8), photometric="MINISWHITE")
    assert classes_in(grey, ClassTable(dict(a=1, b=2), [0])) == [[255, 0, 1]]
    bilevel = save_tiff(tmp_path / "1.tif", np.array([[[0, 1, 1]]], np.uint8), photometric="MINISWHITE", nbits=1)
    assert classes_in(bilevel, ClassTable(dict(a=0, b=1), [])) == [[1, 0, 0]]
    assert classes_in(bilevel, ClassTable(dict(a="#000000", b="#FFFFFF"), [])) == [[1, 0, 0]]


ASYMMETRIC = np.array([[1, 2, 0], [0, 0, 0]], np.uint8)
THREE = ClassTable(dict(a=0, b=1, c=2), [])
UPRIGHT = {2: [[0, 2, 1], [0, 0, 0]], 3: [[0, 0, 0], [0, 2, 1]], 6: [[0, 1], [0, 2], [0, 0]]}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation_tags_of_masks(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(ASYMMETRIC).save(tmp_path / "m.png", exif=exif)
    Image.fromarray(ASYMMETRIC).save(tmp_path / "m.tif", tiffinfo={0x0112: orientation})
    for name in ("m.png", "m.tif"):
        assert classes_in(tmp_path / name, THREE) == UPRIGHT[orientation]


def test_pages_are_refused(tmp_path):
    pages = [Image.fromarray(INDEX), Image.fromarray(INDEX)]
    pages[0].save(tmp_path / "m.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match="2 pages"):
        read_mask(tmp_path / "m.tif", INDICES)


# --- pixels of a mask that have no value


ONE_TWO = ClassTable(dict(a=1, b=2), [])
HOLE = np.array([[1, 2, 7]], np.uint8)  # the last pixel has no value
HOLED = [[0, 1, 255]]


def check_hole(path, table=ONE_TWO):
    found = read_mask(path, table)
    assert found.mask.tolist() == HOLED
    assert (found.counts[VOID], sum(found.counts)) == (1, 3)
    assert not found.unknown
    assert found.nodata_classes == []


@pytest.mark.parametrize("beside", [False, True])
def test_masked_pixels_of_a_mask_are_ignored(tmp_path, beside):
    valid = np.array([[255, 255, 0]], np.uint8)
    check_hole(save_tiff(tmp_path / "m.tif", HOLE[None], valid=valid, beside=beside))
    named = ClassTable(dict(a=1, b=2, c=7), [])
    assert classes_in(tmp_path / "m.tif", named) == HOLED  # a mask says that there is no value, whatever is stored


@pytest.mark.parametrize("fill, dtype", [(7, "uint8"), (300, "uint16"), (-1, "int16"), (np.nan, "float32")])
def test_nodata_of_a_mask_is_ignored(tmp_path, fill, dtype):
    x = HOLE.astype(dtype)
    x[0, 2] = fill
    check_hole(save_tiff(tmp_path / "m.tif", x[None], nodata=fill))


def test_transparent_pixels_of_a_mask_are_ignored(tmp_path):
    rgb = np.array([[[0, 0, 1], [0, 0, 2], [0, 0, 1]]], np.uint8)
    table = ClassTable(dict(a="#000001", b="#000002"), [])
    Image.fromarray(np.dstack([rgb, [[255, 9, 0]]]).astype(np.uint8)).save(tmp_path / "rgba.png")
    check_hole(tmp_path / "rgba.png", table)
    palette = Image.fromarray(HOLE)
    palette.putpalette(list(range(30)))
    palette.save(tmp_path / "palette.png", transparency=bytes([255] * 7 + [0]))
    check_hole(tmp_path / "palette.png")
    Image.fromarray(HOLE).save(tmp_path / "grey.png", transparency=7)
    check_hole(tmp_path / "grey.png")


BESIDE = (
    '<PAMDataset><PAMRasterBand band="1"><NoDataValue>0</NoDataValue></PAMRasterBand></PAMDataset>'  # as GDAL writes it
)


def nodata_zero(folder, kind):
    "A mask of the values 1, 2 and 0, of which 0 is declared as nodata."
    x = np.array([[1, 2, 0]], np.uint8)
    if kind == "tiff":
        return save_tiff(folder / "m.tif", x[None], nodata=0)
    if kind == "white":
        return save_tiff(folder / "m.tif", 255 - x[None], nodata=255, photometric="MINISWHITE")
    if kind == "colours":
        return save_tiff(folder / "m.tif", np.stack([x] * 3), nodata=0)
    picture = Image.fromarray(x)
    if kind == "beside":
        picture.save(folder / "m.png")
        (folder / "m.png.aux.xml").write_text(BESIDE)
        return folder / "m.png"
    if kind == "palette":
        picture.putpalette(list(range(30)))
    picture.save(folder / "m.png", transparency=0)
    return folder / "m.png"


@pytest.mark.parametrize("kind", ["tiff", "white", "colours", "grey", "palette", "beside"])
def test_nodata_value_that_is_a_class(tmp_path, kind):
    "Many programs declare 0 in every file: where a class has this value, its pixels are this class."
    path = nodata_zero(tmp_path, kind)
    found = read_mask(path, ClassTable(dict(other=0, a=1, b=2), []))
    assert found.mask.tolist() == [[1, 2, 0]]
    assert (found.counts[VOID], found.nodata_classes) == (0, ["other"])
    ignored = read_mask(path, ClassTable(dict(a=1, b=2), [0]))
    assert ignored.mask.tolist() == HOLED
    assert (ignored.counts[VOID], ignored.counts[2], ignored.nodata_classes) == (0, 1, [])
    check_hole(path)
