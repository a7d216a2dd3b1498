"Which pixels have a value, whoever says so, and what does that change: stretch, statistics, resizing, refusals."

import struct
import zlib

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp

from cmid.base.errors import CmidError
from cmid.data.survey import Unusable


def ground(seed, *shape, low=2000, high=6000, dtype="uint16"):
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def kinds(prepared, level="warning"):
    return {finding["kind"] for finding in prepared.audit if finding["level"] == level}


def write_mask(path, mask, internal=True):
    "A GDAL mask inside a TIFF, or in a file beside it."
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal), rasterio.open(path, "r+") as file:
        file.write_mask(mask)


@pytest.mark.parametrize("nodata", [None, 0])
def test_a_border_of_zeros_does_not_set_the_stretch(images, nodata):
    for i in range(16):
        pixels = ground(i, 1, 260, 260)
        pixels[:, :, :10] = 0
        images.tiff(f"{i}.tif", pixels, nodata=nodata)
    prepared = images.prepare(side=64)
    low, high = prepared.manifest["stretch"]["low"][0], prepared.manifest["stretch"]["high"][0]
    assert high == pytest.approx(5920, abs=40)
    if nodata is None:
        assert kinds(prepared) == {"undeclared-fill"}
        assert images.prepare("again", side=64, nodata=0).manifest["stretch"]["low"][0] == pytest.approx(2080, abs=40)
        assert not kinds(images.prepare("again", side=64, nodata=0))
    else:
        assert low == pytest.approx(2080, abs=40)
        assert not kinds(prepared)


def test_an_accepted_warning_is_still_listed(images):
    for i in range(3):
        pixels = ground(i, 1, 64, 64, dtype="int16")
        pixels[:, :8] = -9999
        images.tiff(f"{i}.tif", pixels)
    prepared = images.prepare(accept=["undeclared-fill"])
    assert kinds(prepared) == set()
    (found,) = [finding for finding in prepared.audit if finding["level"] == "accepted"]
    assert "the value -9999 in 12.5% of the sampled pixels" in found["text"]
    assert "undeclared-fill" in kinds(images.prepare())  # the folder is not made anew for it
    with pytest.raises(CmidError, match="prepare.accept: no warning is called 'undeclared'"):
        images.prepare(accept=["undeclared"])


@pytest.mark.parametrize("internal", [True, False])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_mask_is_read_wherever_it_is(images, dtype, internal):
    for i in range(3):
        pixels = ground(i, 3, 64, 64, low=40, high=200, dtype=dtype)
        pixels[:, :, 32:] = np.iinfo(dtype).max
        path = images.tiff(f"{i}.tif", pixels, photometric="RGB")
        write_mask(path, np.repeat([[255] * 32 + [0] * 32], 64, 0).astype("uint8"), internal)
    prepared = images.prepare(side=64)
    assert (prepared[:][..., 32:] == 0).all()
    assert prepared[:][..., :32].max() > 190
    assert prepared.manifest["look"]["valid"] == 0.5
    values = prepared[:][..., :32] / 255
    assert np.allclose(prepared.mean, values.mean((0, 2, 3)))
    assert np.allclose(prepared.std, values.std((0, 2, 3)))


def test_nodata_of_few_digits(images):
    pixels = np.random.default_rng(0).normal(300, 50, (1, 64, 64)).astype("float32")
    pixels[:, :, :40] = np.finfo("float32").min
    images.tiff("a.tif", pixels, nodata=-3.40282e38)
    prepared = images.prepare(side=64)
    assert 150 < prepared.manifest["stretch"]["low"][0] < 250
    assert (prepared[0][..., :40] == 0).all()


def test_a_changed_mask_file_makes_the_folder_anew(images):
    path = images.tiff("a.tif", ground(0, 1, 32, 32, low=1, high=99, dtype="uint8"))
    assert images.prepare()[0].min() > 0
    write_mask(path, np.zeros((32, 32), "uint8") + np.uint8(255) * (np.arange(32) < 16), internal=False)
    assert (images.prepare()[0][0, :, 16:] == 0).all()


@pytest.mark.parametrize("bands", [None, [2]])
def test_black_is_invalid_in_a_picture_and_pure_red_is_not(images, bands):
    pixels = ground(0, 3, 32, 32, low=1, high=255, dtype="uint8")
    pixels[:, 0, 0] = 0
    pixels[:, 0, 1] = 255, 0, 0
    images.tiff("a.tif", pixels, photometric="RGB", nodata=0)
    item = images.prepare(bands=bands)[0]
    assert (item == (pixels if bands is None else pixels[bands])).all()
    assert images.prepare(bands=bands).manifest["look"]["valid"] == pytest.approx(1023 / 1024)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_invalid(images, mode):
    pixels = ground(0, 32, 32, 3, low=1, high=255, dtype="uint8")
    picture = Image.fromarray(pixels).convert(mode)
    options = {}
    if mode == "P":
        options["transparency"] = int(np.asarray(picture)[0, 0])
        hole = np.asarray(picture) == options["transparency"]
    else:
        hole = np.broadcast_to(np.arange(32) < 8, (32, 32))
        picture.putalpha(Image.fromarray(np.where(hole, 0, 255).astype("uint8")))
    picture.save(images.path / "a.png", **options)
    item = images.prepare()[0]
    assert (item[:, hole] == 0).all()
    assert (item[:, ~hole].max(0) > 0).mean() > 0.99


def test_alpha_is_a_mask_or_a_band(images):
    colours = ground(0, 3, 64, 64, low=1, high=255, dtype="uint8")
    mask = np.where(np.arange(64) < 16, 0, 255) * np.ones((1, 64, 1))
    infrared = ground(1, 1, 64, 64, low=0, high=255, dtype="uint8")
    for name, alpha in (("mask", mask.astype("uint8")), ("naip", infrared)):
        images.tiff(f"{name}.tif", np.concatenate([colours, alpha]), photometric="RGB", alpha="yes")
    assert images.prepare("naip", bands=[0, 1, 2]).manifest["counts"]["images"] == 2
    (images.path / "naip.tif").rename(images.root / "naip.tif")
    prepared = images.prepare("mask", side=64)
    assert prepared.bands == 3
    assert prepared.manifest["look"]["valid"] == 0.75
    (images.path / "mask.tif").unlink()
    (images.root / "naip.tif").rename(images.path / "naip.tif")
    prepared = images.prepare("band", side=64)
    assert (prepared[0] == np.concatenate([colours, infrared])).all()
    assert prepared.manifest["look"]["valid"] == 1


def test_neighbours_of_invalid_pixels_are_not_darkened(images):
    "A constant image with a border that has no value stays constant up to the border, at any scale."
    for side in (100, 64, 33, 20):
        pixels = np.full((1, side, side), 200, "uint8")
        pixels[:, :, : side // 3] = 7
        images.tiff(f"{side}.tif", pixels, nodata=7)
    for item in images.prepare()[:]:
        assert set(np.unique(item)) == {0, 200}


def test_white_is_zero_is_inverted(images):
    pixels = ground(0, 1, 32, 32, low=0, high=256, dtype="uint8")
    images.tiff("a.tif", pixels, photometric="MINISWHITE")
    prepared = images.prepare()
    assert (prepared[0] == 255 - pixels).all()
    assert "inverted" in kinds(prepared, "note")


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_fill_the_grey_scale(images, bits):
    pixels = ground(0, 1, 32, 32, low=0, high=2**bits, dtype="uint8")
    images.tiff("a.tif", pixels, nbits=bits)
    assert (images.prepare()[0] == pixels * (255 // (2**bits - 1))).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_as_its_tag_says(images, orientation):
    pixels = ground(0, 64, 96, low=0, high=256, dtype="uint8")
    for name in ("a.tif", "b.png"):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(images.path / name, exif=exif)
    prepared = images.prepare(tile=32)
    assert len(prepared) == 12
    assert (prepared[:6] == prepared[6:]).all()
    assert (prepared[0][0, 0, 0] == pixels[0, 0]) == (orientation in (1, 5))


def test_bands_are_put_in_the_order_red_green_blue(images):
    pixels = ground(0, 4, 32, 32, low=0, high=256, dtype="uint8")
    path = images.tiff("a.tif", pixels[[2, 1, 0, 3]], photometric="MINISBLACK")
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [ColorInterp.blue, ColorInterp.green, ColorInterp.red, ColorInterp.undefined]
    images.tiff("b.tif", pixels)
    assert (images.prepare()[:] == pixels).all()
    asked = images.prepare("asked", bands=[0, 1, 2])
    assert (asked[0] == pixels[[2, 1, 0]]).all()
    assert kinds(asked) == {"mixed-band-order"}


def test_types_are_stretched_each_by_its_own_percentiles(images):
    for i in range(8):
        reflectance = np.random.default_rng(i).uniform(0.02, 0.4, (3, 48, 48))
        values = (reflectance * 10000).astype("uint16") if i < 5 else reflectance.astype("float32")
        images.tiff(f"{i}.tif", values)
    prepared = images.prepare()
    assert kinds(prepared) == {"mixed-types"}
    assert {*prepared.manifest["stretch"]["types"]} == {"uint16", "float32"}
    assert np.ptp(prepared[:].mean((1, 2, 3))) < 5  # all equally bright


def test_files_of_another_scale_are_named(images):
    for i in range(6):
        values = np.random.default_rng(i).uniform(0.02, 0.4, (1, 32, 32)) * (10000 if i < 5 else 1)
        images.tiff(f"{i}.tif", values.astype("float32"))
    prepared = images.prepare()
    assert kinds(prepared) == {"mixed-ranges"}
    (found,) = [finding for finding in prepared.audit if finding["kind"] == "mixed-ranges"]
    assert found["examples"][0].startswith("5.tif")


def test_scale_and_offset_make_files_comparable(images):
    values = ground(0, 1, 32, 32, low=0, high=1000, dtype="int16")
    images.tiff("a.tif", values)
    path = images.tiff("b.tif", ((values - 100) * 10).astype("int16"))
    with rasterio.open(path, "r+") as file:
        file.scales, file.offsets = [0.1], [100.0]
    assert (images.prepare()[0] == images.prepare()[1]).all()


def test_pages_are_refused(images):
    pages = [Image.fromarray(ground(i, 32, 32)) for i in range(13)]
    pages[0].save(images.path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(Unusable, match="a.tif: 13 pages: save them as the bands of one image"):
        images.prepare()


def test_overviews_are_no_pages(images):
    path = images.tiff("a.tif", ground(0, 1, 600, 600), tiled=True, blockxsize=256, blockysize=256)
    with rasterio.open(path, "r+") as file:
        file.build_overviews([2, 4])
    assert len(images.prepare()) == 1


def test_an_animated_png_is_refused(images):
    frames = [Image.fromarray(ground(i, 32, 32, 3, low=0, high=255, dtype="uint8")) for i in range(2)]
    frames[0].save(images.path / "a.png", save_all=True, append_images=frames[1:])
    with pytest.raises(Unusable, match=r"2 pictures \(an animated PNG\)"):
        images.prepare()


def test_a_band_without_a_valid_pixel_is_refused(images):
    pixels = ground(0, 2, 32, 32)
    pixels[1] = 0
    images.tiff("a.tif", pixels, nodata=0)
    with pytest.raises(Unusable, match="band 1 has no valid pixel in 1 files of uint16"):
        images.prepare()
    assert images.prepare(bands=[0]).bands == 1


def test_images_of_one_file_per_band_are_refused(images):
    for i in range(3):
        for band in ("B02", "B03", "B8A"):
            images.tiff(f"patch_{i}/{band}.tif", ground(i, 1, 32, 32))
    with pytest.raises(Unusable, match="3 images are stored as one file per band .*rio stack"):
        images.prepare()


def test_a_mask_file_that_is_no_tiff_is_not_opened(images):
    images.tiff("a.tif", ground(0, 1, 32, 32))
    images.tiff("b.tif", ground(1, 1, 32, 32))
    (images.path / "a.tif.msk").write_text("<VRTDataset/>")
    prepared = images.prepare()
    assert [prepared.source(i) for i in range(len(prepared))] == ["b.tif"]
    assert "mask file a.tif.msk is not a TIFF" in (prepared.folder / "skipped.csv").read_text()


def test_a_sparse_scene_gives_its_own_stretch(images):
    "A scene of 4,000 x 4,000 pixels of which two small places have a value: both are found, and nothing else."
    pixels = np.zeros((1, 4000, 4000), "uint16")
    pixels[:, 900:1100, 3300:3500] = ground(0, 1, 200, 200)
    images.tiff("a.tif", pixels, nodata=0, compress="deflate", tiled=True, blockxsize=256, blockysize=256)
    low, high = (images.prepare(workers=1).manifest["stretch"][end][0] for end in ("low", "high"))
    assert (low, high) == (pytest.approx(2080, abs=80), pytest.approx(5920, abs=80))


def test_no_period_of_the_image_meets_the_sample(images):
    "Stripes of every period from 2 to 9: the sample holds as much of each as the image."
    for period in range(2, 10):
        pixels = np.where(np.arange(512) % period == 0, 1000, 2000) + np.arange(512)[:, None] % 7
        images.tiff(f"{period}/a.tif", pixels[None].astype("uint16"))
    for period in range(2, 10):
        images.path = images.path.parent / images.path.name / str(period)
        prepared = images.prepare(f"out{period}", stretch=(0, 100 * 0.9 / period), workers=1)
        images.path = images.path.parent
        assert prepared.manifest["stretch"]["high"][0] < 1010


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_declared_nodata_of_a_palette_is_a_colour(images, name):
    indices = Image.fromarray(np.arange(32, dtype="uint8")[None].repeat(32, 0) % 2).convert("P")
    indices.putpalette([90, 60, 30, 0, 0, 0])
    indices.save(images.path / name)
    prepared = images.prepare(nodata=0)
    assert prepared.manifest["look"]["valid"] == 0.5
    assert prepared[0][:, 0, 0].tolist() == [90, 60, 30]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_transparent_grey_of_few_bits(images, bits):
    "Pillow writes no such file, so it is put together here: 32 x 32 pixels that count up; 1 is transparent."
    values = np.arange(32) % 2**bits
    row = b"\0" + int("".join(format(value, f"0{bits}b") for value in values), 2).to_bytes(4 * bits, "big")
    header = struct.pack(">IIBBBBB", 32, 32, bits, 0, 0, 0, 0)
    parts = {b"IHDR": header, b"tRNS": struct.pack(">H", 1), b"IDAT": zlib.compress(row * 32), b"IEND": b""}
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in parts.items():
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    (images.path / "a.png").write_bytes(content)
    prepared = images.prepare()
    assert (prepared[0][0] == np.where(values == 1, 0, values * 255 // (2**bits - 1))).all()
    assert prepared.manifest["look"]["valid"] == (values != 1).mean()


def found(prepared, kind):
    return [finding for finding in prepared.audit if finding["kind"] == kind]


@pytest.mark.parametrize(
    "dtype, value", [("uint32", 2**32 - 1), ("int32", -(2**31)), ("uint16", 65535), ("float32", -3.4028235e38)]
)
def test_the_advice_of_a_fill_value_is_the_value(images, dtype, value):
    "What the warning says to declare is what must be declared, digit by digit."
    for i in range(3):
        pixels = ground(i, 1, 64, 64, dtype=dtype)
        pixels[:, :8] = value
        images.tiff(f"{i}.tif", pixels)
    (warning,) = found(images.prepare(), "undeclared-fill")
    advised = float(warning["text"].rpartition("nodata: ")[2])
    prepared = images.prepare("again", nodata=advised)
    assert not found(prepared, "undeclared-fill") + found(prepared, "unused-nodata")
    assert prepared.manifest["look"]["valid"] == pytest.approx(0.875)


def test_two_fill_values_are_two_findings(images):
    for i in range(3):
        pixels = ground(i, 3, 64, 64)
        pixels[0, :, :8] = 65535
        pixels[2, :, 50:] = 0
        images.tiff(f"{i}.tif", pixels)
    texts = [finding["text"] for finding in found(images.prepare(), "undeclared-fill")]
    assert len(texts) == 2
    assert "value 65535 in 12.5% of the sampled pixels of band 0" in texts[0]
    assert "value 0 in 21.9% of the sampled pixels of band 2" in texts[1]


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_black_corners_of_a_picture_are_named(images, suffix):
    corner = np.add.outer(np.arange(64), np.arange(64)) < 24
    for i in range(3):
        pixels = np.clip(np.random.default_rng(i).normal(120, 20, (64, 64, 3)), 0, 255).astype("uint8")
        pixels[corner] = 0
        Image.fromarray(pixels).save(images.path / f"{i}.{suffix}")
    (warning,) = found(images.prepare(), "undeclared-fill")
    assert "the value 0" in warning["text"]
    assert ("save them with a mask" in warning["text"]) == (suffix == "jpg")


def test_dark_scenes_have_no_fill_value(images):
    for i in range(3):
        night = np.random.default_rng(i).exponential(4, (64, 64, 3)).clip(0, 255).astype("uint8")
        Image.fromarray(night).save(images.path / f"{i}.png")
    assert not kinds(images.prepare())


def test_alpha_of_16_bits_may_be_255(images):
    pixels = ground(0, 4, 64, 64)
    pixels[3] = np.where(np.arange(64) < 16, 0, 255)
    images.tiff("a.tif", pixels, photometric="RGB", alpha="yes")
    prepared = images.prepare()
    assert prepared.bands == 3
    assert prepared.manifest["look"]["valid"] == 0.75


def test_a_scale_of_0_is_no_scale(images):
    values = ground(0, 1, 32, 32, dtype="int16")
    path = images.tiff("a.tif", values)
    expected = images.prepare()[0]
    with rasterio.open(path, "r+") as file:
        file.scales = [0.0]
    assert (images.prepare()[0] == expected).all()


def test_a_declared_nodata_that_is_nowhere_is_noted(images):
    images.tiff("a.tif", ground(0, 1, 32, 32))
    (note,) = found(images.prepare(nodata=-9998), "unused-nodata")
    assert note["level"] == "note"
    with pytest.raises(CmidError, match="nodata must be a number"):
        images.prepare(nodata=float("nan"))


def test_copies_in_another_format_are_leaks(images):
    for i in range(6):
        images.picture(f"{i}.png", i)
    Image.open(images.path / "0.png").save(images.path / "copy.tif")
    lists = images.lists(learn="0.png\n1.png\n2.png\n", check="copy.tif\n3.png\n")
    (leak,) = found(images.prepare(lists=lists), "leak")
    assert leak["examples"] == ["0.png = copy.tif"]


def test_tiles_that_are_alike_do_not_make_files_copies(images):
    for i in range(2):
        pixels = np.zeros((1, 64, 64), "uint8")
        pixels[:, 32 * i :, 32:] = ground(i, 1, 64 - 32 * i, 32, low=0, high=255, dtype="uint8")
        images.tiff(f"{i}.tif", pixels)
    assert not found(images.prepare(tile=32), "duplicate")
