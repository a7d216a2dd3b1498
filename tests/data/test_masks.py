"Masks of every kind of file give the classes of the table, and every pixel is counted."

import warnings

import numpy as np
import rasterio
from PIL import Image

from cmid.data import masks
from cmid.data.masks import ClassTable, read_mask

INDEX = np.array([[0, 1], [1, 0]], np.uint8)
LAND = [[255, 0], [0, 255]]  # what INDEX means where 1 is a class and 0 is ignored
INDICES = ClassTable(dict(a=1, b=300), [0])
COLOURS = ClassTable(dict(a="#FF0000", b="#FFFFFF"), ["000000"])


def save_tiff(path, x, palette=None):
    bands, height, width = x.shape
    options = dict(photometric="palette") if palette else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(
            path, "w", driver="GTiff", count=bands, height=height, width=width, dtype=x.dtype, **options
        ) as file:
            file.write(x)
            if palette:
                file.write_colormap(1, palette)
    return path


def classes_in(path, table):
    return read_mask(path, table)[0].tolist()


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
        mask, _, unknown = read_mask(save_tiff(tmp_path / f"{kind}.tif", values.astype(kind)), INDICES)
        assert mask.tolist() == [[255, 0], [1, 1]]
        assert not unknown


def test_mask_of_many_rows_is_counted_whole(tmp_path, monkeypatch):
    x = np.random.default_rng(0).integers(0, 256, (301, 97), np.uint8) % 4
    Image.fromarray(x).save(tmp_path / "m.png")
    table = ClassTable(dict(a=1, b=2), [0])
    at_once = read_mask(tmp_path / "m.png", table)
    monkeypatch.setattr(masks, "PIXELS_AT_ONCE", 1000)
    in_blocks = read_mask(tmp_path / "m.png", table)
    assert (at_once[0] == in_blocks[0]).all()
    assert (at_once[1] == in_blocks[1]).all()
    assert at_once[2] == in_blocks[2] == {"3": (x == 3).sum()}
    assert at_once[1].tolist() == [(x == v).sum() for v in (1, 2, 0)] + [0] * 253
