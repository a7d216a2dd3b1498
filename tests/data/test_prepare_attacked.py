"What may change or lie in wait while `prepare` runs: nothing old is returned, nothing of others is removed or reached."

import http.server
import os
import struct
import threading

import numpy as np
import pytest
import rasterio
from PIL import Image

from cmid.base.errors import CmidError
from cmid.data import prepare as preparing
from cmid.data.passes import lock_folder
from cmid.data.prepare import prepare
from cmid.data.survey import Unusable


def constant(folder, value):
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((32, 32, 3), value, "uint8")).save(folder / "a.png", compress_level=0)


def value_of(folder, out):
    return int(prepare(folder, out, side=32, workers=1)[0].max())


def test_an_image_that_changes_while_it_is_prepared(images, monkeypatch):
    constant(images.path, 10)
    gather = preparing.gather

    def changed_meanwhile(*arguments):
        constant(images.path, 20)
        return gather(*arguments)

    monkeypatch.setattr(preparing, "gather", changed_meanwhile)
    assert images.prepare()[0].max() == 10
    monkeypatch.undo()
    assert images.prepare()[0].max() == 20


def test_a_folder_above_the_images_is_exchanged(tmp_path):
    constant(tmp_path / "v1/images", 10)
    constant(tmp_path / "v2/images", 20)
    assert value_of(tmp_path / "v1/images", tmp_path / "out") == 10
    (tmp_path / "v1").rename(tmp_path / "v0")
    (tmp_path / "v2").rename(tmp_path / "v1")
    assert value_of(tmp_path / "v1/images", tmp_path / "out") == 20


def test_a_link_above_the_images_leads_elsewhere(tmp_path):
    constant(tmp_path / "v1/images", 10)
    constant(tmp_path / "v2/images", 20)
    for name, value in (("v1", 10), ("v2", 20)):
        (tmp_path / "now").unlink(missing_ok=True)
        (tmp_path / "now").symlink_to(tmp_path / name)
        assert value_of(tmp_path / "now/images", tmp_path / "out") == value


def test_the_folder_is_locked_until_it_is_in_its_place(images, monkeypatch):
    images.pictures(2)
    publish = preparing.publish

    def second_meanwhile(partial_folder, out):
        with pytest.raises(CmidError, match="another prepare is writing"):
            images.prepare(side=64)
        publish(partial_folder, out)

    monkeypatch.setattr(preparing, "publish", second_meanwhile)
    assert images.prepare().side == 32
    lock_folder(images.root / "out").close()
    (images.root / "out/lock").unlink()
    assert not (images.root / "out.partial").exists()


def test_files_of_others_beside_the_result_stay(images):
    images.pictures(2)
    strange = images.root / "out.partial"
    strange.mkdir()
    (strange / "labels.npy").write_bytes(b"mine")
    with pytest.raises(CmidError, match="out.partial: exists and was not written by prepare"):
        images.prepare()
    assert (strange / "labels.npy").read_bytes() == b"mine"


def test_a_result_inside_of_the_images_is_refused(images):
    images.pictures(2)
    with pytest.raises(CmidError, match="lies inside of the images"):
        prepare(images.path, images.path / "out", side=32)


def test_tiles_weigh_the_sample(images):
    "One scene of 64 tiles and eight chips of one tile: the stretch is that of 72 items, not of 9 files."
    images.tiff("scene.tif", np.random.default_rng(0).integers(500, 600, (1, 512, 512)).astype("uint16"))
    for i in range(8):
        images.tiff(f"{i}.tif", np.random.default_rng(i).integers(5000, 6000, (1, 64, 64)).astype("uint16"))
    prepared = images.prepare(side=32, tile=64, stretch=(2, 50))
    assert prepared.manifest["stretch"]["high"][0] == pytest.approx(556, abs=3)  # 36 of 64 items of the scene


def test_a_mask_file_in_capitals_or_of_another_size(images):
    for name in ("a", "b", "c"):
        images.tiff(f"{name}.tif", np.full((1, 32, 32), 9, "uint8"))
    (images.path / "a.tif.MSK").write_text("<VRTDataset/>")
    images.tiff("small.tif", np.zeros((1, 8, 8), "uint8")).rename(images.path / "b.tif.msk")
    prepared = images.prepare()
    skipped = (prepared.folder / "skipped.csv").read_text()
    assert len(prepared) == 1
    assert "a.tif.MSK is not a TIFF" in skipped
    assert "b.tif.msk has 8 x 8 pixels" in skipped


def test_no_file_makes_the_reader_reach_an_address(images):
    asked = []

    class Listening(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Listening)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    path = images.tiff("a.tif", np.full((1, 32, 32), 9, "uint8"))
    host, port = server.server_address
    address = f"/vsicurl/http://{host}:{port}/evil.tif"
    item = f'<Item name="OVERVIEW_FILE">{address}</Item>'
    domain = f'<PAMDataset><Metadata domain="OVERVIEWS">{item}</Metadata></PAMDataset>'
    (images.path / "a.tif.aux.xml").write_text(domain)
    images.prepare()
    with rasterio.open(path) as file:  # without the settings of the reader GDAL asks
        file.overviews(1)
    server.shutdown()
    assert len(asked) <= 2, asked
    count = len(asked)
    assert (images.prepare("again")[0] == 9).all()
    assert len(asked) == count


@pytest.mark.parametrize("name, value", [("GTIFF_IGNORE_READ_ERRORS", "YES"), ("GDAL_PAM_ENABLED", "NO")])
def test_the_users_settings_of_gdal_change_no_number(images, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    pixels = np.random.default_rng(0).integers(1000, 3000, (1, 64, 64)).astype("uint16")
    images.tiff("whole.tif", pixels)
    images.tiff("half.tif", pixels)
    images.truncate("half.tif", 4000)
    pixels[:, :8] = 1000
    images.tiff("whole.tif", pixels)
    beside = '<PAMDataset><PAMRasterBand band="1"><NoDataValue>1000</NoDataValue></PAMRasterBand></PAMDataset>'
    (images.path / "whole.tif.aux.xml").write_text(beside)
    prepared = images.prepare(side=64)
    assert len(prepared) == 1
    assert prepared.manifest["look"]["valid"] == pytest.approx((pixels != 1000).mean())


def test_a_raster_that_claims_to_be_huge(images):
    "134 bytes that say 16,000,000 x 16,000,000 pixels are refused, not listed window by window."
    side, tile = 16_000_000, 16_384
    tags = [(256, 4, side), (257, 4, side), (258, 3, 8), (259, 3, 5), (262, 3, 1), (277, 3, 1)]
    tags += [(322, 4, tile), (323, 4, tile), (324, 4, 0), (325, 4, 0)]
    entries = b"".join(struct.pack("<HHLL", tag, kind, 1, value) for tag, kind, value in tags)
    (images.path / "a.tif").write_bytes(b"II*\0" + struct.pack("<LH", 8, len(tags)) + entries + bytes(4))
    with pytest.raises(Unusable, match="a.tif"):
        images.prepare()


def test_another_reader_is_another_result(images, monkeypatch):
    images.pictures(2)
    first = images.prepare().manifest["fingerprint"]
    monkeypatch.setattr(preparing, "READER_VERSION", preparing.READER_VERSION + 1)
    assert images.prepare().manifest["fingerprint"] != first


def test_the_reader_gives_the_pixels_of_its_version(images):
    "Whoever changes what the same files become raises READER_VERSION, and this hash."
    rng = np.random.Generator(np.random.PCG64(0))
    for i in range(3):
        pixels = rng.integers(0, 4000, (3, 32, 32)).astype("uint16")
        pixels[:, : 4 * i] = 0
        images.tiff(f"{i}.tif", pixels, nodata=0 if i else None)
        images.tiff(f"byte{i}.tif", (pixels // 16).astype("uint8"))
    assert (preparing.READER_VERSION, images.prepare().hash[:16]) == (2, "b66a2ab870105cd7")


def test_times_of_files_are_no_part_of_the_result(images):
    "The same images on another machine, copied at another time, give the same folder byte by byte."
    images.pictures(3)
    first = {path.name: path.read_bytes() for path in images.prepare("one").folder.iterdir()}
    for path in images.path.iterdir():
        os.utime(path, (1, 1))
    assert {path.name: path.read_bytes() for path in images.prepare("two").folder.iterdir()} == first
