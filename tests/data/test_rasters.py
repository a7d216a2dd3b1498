"Every kind of raster becomes uint8: types, bands, palettes, rotation, nodata, tiles."

import csv

import numpy as np
import pytest
from PIL import Image

from cmid.data import rasters
from cmid.data.formats import read_failure


def noise(*shape, seed=0, high=256, dtype="uint8"):
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def skipped(prepared):
    "File -> reason."
    text = (prepared.folder / "skipped.csv").read_text()
    return dict(csv.reader(text.splitlines()[1:]))


def pillow_bicubic(picture, side=32):
    return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("bands", [1, 3, 4, 13])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(33, 70), (1, 9)])
def test_rasters(images, bands, dtype, shape):
    for i in range(3):
        images.tiff(f"{i}.tif", (np.random.default_rng(i).random((bands, *shape)) * 120).astype(dtype))
    prepared = images.prepare()
    assert prepared[:].shape == (3, bands, 32, 32)
    assert prepared[:].dtype == np.uint8
    assert (prepared.bands, prepared.side) == (bands, 32)
    assert (prepared.manifest["stretch"] is None) == (dtype == "uint8")
    values = prepared[:] / 255
    assert np.allclose(prepared.mean, values.mean((0, 2, 3)))
    assert np.allclose(prepared.std, values.std((0, 2, 3)))


def test_same_size_is_untouched(images):
    pixels = noise(4, 32, 32)
    images.tiff("a.tif", pixels)
    assert (images.prepare()[0] == pixels).all()


def test_resize_is_pillows_bicubic(images):
    path = images.picture("a.png", size=(90, 61))
    expected = pillow_bicubic(Image.open(path)).transpose(2, 0, 1)
    assert (images.prepare()[0] == expected).all()


def test_stretch_is_of_the_data_set(images):
    "Two images hold 0..1023 and 1000..2023: the limits are percentiles 10 and 90 of both."
    values = [np.arange(1000 * i, 1000 * i + 1024) for i in range(2)]
    for i in range(2):
        images.tiff(f"{i}.tif", values[i].astype("uint16").reshape(1, 32, 32))
    prepared = images.prepare(stretch=(10, 90))
    low, high = np.percentile(values, (10, 90))
    stretch = prepared.manifest["stretch"]
    assert np.allclose([stretch["low"], stretch["high"]], [[low], [high]])
    expected = np.clip((np.concatenate(values) - low) / (high - low), 0, 1) * 255
    assert np.abs(prepared[:].reshape(-1) - expected).max() <= 0.51


def test_bands_are_chosen_from_zero(images):
    pixels = noise(5, 32, 32)
    images.tiff("a.tif", pixels)
    images.tiff("b.tif", pixels[:2])
    prepared = images.prepare(bands=[4, 0])
    assert len(prepared) == 1
    assert (prepared[0] == pixels[[4, 0]]).all()
    assert skipped(prepared) == {"b.tif": "band count 2, bands [4, 0] were asked for"}


def test_16_bit_png(images):
    pixels = noise(3, 32, 32, high=60000, dtype="uint16")
    images.tiff("a.png", pixels, driver="PNG")
    prepared = images.prepare(stretch=(0, 100))
    low, high = (np.reshape(prepared.manifest["stretch"][end], (3, 1, 1)) for end in ("low", "high"))
    assert prepared.bands == 3
    assert np.abs(prepared[0] - (pixels - low) / (high - low) * 255).max() < 0.52


def test_pictures_of_every_mode(images):
    images.picture("rgb.png")
    for mode in ("P", "RGBA", "L", "1", "LA"):
        images.picture(f"{mode}.png", mode=mode)
    images.picture("cmyk.jpg", mode="CMYK")
    images.picture("grey.jpg", mode="L")
    images.picture("two words é.PNG")
    Image.open(images.path / "P.png").save(images.path / "palette.tif")
    Image.open(images.path / "cmyk.jpg").save(images.path / "cmyk.tif")
    prepared = images.prepare()
    of = {prepared.source(i): prepared[i] for i in range(len(prepared))}
    assert len(of) == 11
    assert prepared.bands == 3
    assert not skipped(prepared)
    assert (of["RGBA.png"] == of["rgb.png"]).all()
    assert (of["two words é.PNG"] == of["rgb.png"]).all()
    assert (of["palette.tif"] == of["P.png"]).all()
    assert np.ptp(of["L.png"], axis=0).max() == 0
    assert np.abs(of["cmyk.tif"].astype(int) - of["cmyk.jpg"]).max() <= 2
    notes = {finding["kind"]: finding["count"] for finding in prepared.audit}
    assert notes["grey"] == 4
    assert notes["transparency"] == 2
    assert notes["palette"] == 2
    assert notes["converted-colours"] == 2


def test_bilevel_is_black_and_white(images):
    pixels = np.zeros((32, 32), bool)
    pixels[:16] = True
    for name in ("a.png", "b.tif"):
        Image.fromarray(pixels).save(images.path / name)
    assert (images.prepare()[:] == pixels * 255).all()


def test_exif_rotation(images):
    pixels = np.zeros((32, 64, 3), "uint8")
    pixels[:, :32] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    Image.fromarray(pixels).save(images.path / "a.png", exif=exif)
    prepared = images.prepare()
    with open(prepared.folder / "items.csv") as file:
        row = next(csv.DictReader(file))
    assert (row["width"], row["height"]) == ("32", "64")
    assert prepared[0][:, :12].min() > 250
    assert prepared[0][:, 20:].max() < 5


def test_nan_and_nodata_become_zero(images):
    pixels = np.full((2, 32, 32), 5, "float32")
    pixels[:, ::2] = 9
    pixels[0, 0, 0] = np.nan
    pixels[1, 3, 3] = -1
    images.tiff("a.tif", pixels, nodata=-1)
    images.tiff("b.tif", np.full((2, 32, 32), np.nan, "float32"))
    prepared = images.prepare(stretch=(0, 100))
    assert prepared[0][0, 0, 0] == 0
    assert prepared[0][1, 3, 3] == 0
    assert prepared[0][0, 0, 1] == 255
    assert prepared[0][0, 1, 1] == 0
    assert prepared.manifest["stretch"]["low"] == [5, 5]
    assert skipped(prepared) == {"b.tif": "not one pixel has a value"}
    assert {"no-value", "invalid-pixels"} <= {finding["kind"] for finding in prepared.audit}


def test_nodata_of_8_bits(images):
    pixels = np.full((3, 32, 32), 200, "uint8")
    pixels[:, 5] = 255
    images.tiff("a.tif", pixels, nodata=255)
    assert (images.prepare()[0] == np.where(pixels == 255, 0, 200)).all()


def test_tiles_cover_the_raster(images):
    pixels = noise(4, 150, 100)
    images.tiff("a.tif", pixels, tiled=True, blockxsize=64, blockysize=64)
    images.tiff("small.tif", pixels[:, :20, :64])
    prepared = images.prepare(side=64, tile=64, workers=1)
    covered = np.zeros((150, 100), int)
    for i in range(6):
        name, _, window = prepared.source(i).partition("[")
        (top, bottom), (left, right) = (map(int, span.split(":")) for span in window.strip("]").split(", "))
        assert name == "a.tif"
        assert (prepared[i] == pixels[:, top:bottom, left:right]).all()
        covered[top:bottom, left:right] += 1
    assert len(prepared) == 7
    assert covered.min() == 1
    assert prepared.source(6) == "small.tif[0:20, 0:64]"


def test_tiles_of_a_picture_and_without_value(images):
    path = images.picture("a.png", size=(64, 96))
    pixels = np.asarray(Image.open(path)).transpose(2, 0, 1)
    one_tile = np.zeros((3, 64, 64), "uint8")
    one_tile[:, :32, :32] = 9
    images.tiff("b.tif", one_tile, nodata=0)
    prepared = images.prepare(tile=32, workers=2)
    assert len(prepared) == 7
    assert (prepared[4] == pixels[:, 32:64, 32:64]).all()
    assert prepared.source(6) == "b.tif[0:32, 0:32]"
    assert [finding["count"] for finding in prepared.audit if finding["kind"] == "no-value"] == [3]
    assert prepared.manifest["counts"]["skipped"] == 0


def test_a_large_raster_is_reduced_while_it_is_read(images, monkeypatch):
    monkeypatch.setattr(rasters, "MAX_READ_BYTES", 2**16)
    ramp = np.broadcast_to(np.arange(512)[None, None] // 2, (1, 512, 512)).astype("uint8")
    images.tiff("a.tif", ramp, blockysize=16, blockxsize=16, tiled=True)
    heights, read = [], rasters.RasterioImage.read

    def watched(self, window=None, bands=None):
        heights.append(window and window[2])
        return read(self, window, bands)

    monkeypatch.setattr(rasters.RasterioImage, "read", watched)
    prepared = images.prepare(workers=1)
    assert sum(heights[-64:]) == 512  # strips of 8 rows, after the windows of the sample
    assert heights[-1] == 8
    assert np.abs(prepared[0][0].astype(int) - pillow_bicubic(Image.fromarray(ramp[0]))).max() <= 3


def test_mixed_band_counts_keep_the_most(images):
    for i, bands in enumerate((4, 4, 13, 1)):
        images.tiff(f"{i}.tif", noise(bands, 32, 32, seed=i))
    prepared = images.prepare()
    assert prepared.bands == 4
    assert skipped(prepared) == {
        "2.tif": "band count 13, most files have 4",
        "3.tif": "band count 1, most files have 4",
    }
    assert "mixed-bands" in {finding["kind"] for finding in prepared.audit}


def test_a_broken_picture_says_so_and_two_pictures_in_one_file_are_read(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nxx")
    with pytest.raises(OSError) as broken:
        rasters.open_image(tmp_path / "broken.png")
    assert read_failure(broken.value, tmp_path / "broken.png") == "cannot identify image file 'broken.png'"
    red, blue = (Image.new("RGB", (8, 9), colour) for colour in ("red", "blue"))
    red.save(tmp_path / "two.jpg", format="MPO", save_all=True, append_images=[blue])
    image = rasters.open_image(tmp_path / "two.jpg")
    assert (image.height, image.width, image.bands) == (9, 8, 3)
    image.close()
