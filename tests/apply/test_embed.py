"Tables of embeddings: the numbers of the probe, places, resumed work, and what is refused."

import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rasterio.transform import from_origin

import cmid.apply.embed as embed
from cmid.apply.embed import EmbedOptions, ImageFiles, write_embeddings
from cmid.apply.encoder import fitted, network_hash, open_encoder
from cmid.apply.table import EmbeddingTable, vectors_of
from cmid.base.errors import CmidError
from cmid.data.prepare import prepare
from cmid.tasks.load import load_task
from cmid.tasks.scene_classes import pooled_features
from cmid.train.checkpoint import export_backbone, load_backbone
from tests.tools.cards import random_card
from tests.tools.embeddings import backbone, folder_of_images, refused, run, smooth
from tests.tools.networks import made_network
from tests.tools.rasters import tiff


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return backbone(tmp_path_factory.mktemp("embed") / "random-resnet18")


def all_of(path, *names):
    return [np.concatenate(parts) for parts in zip(*(found for _, *found in EmbeddingTable(path).blocks(*names)))]


# The numbers


def wanted_of(images, model, tmp_path, tile=0):
    "Features of the stage `probe` for the same images, and their names"
    prepared = prepare(images, tmp_path / "prepared", side=64, tile=tile, workers=1)
    encoder, card = load_backbone(model)
    n = len(prepared)
    return pooled_features(encoder, prepared, range(n), card.mean, card.std).numpy(), [
        prepared.source(i) for i in range(n)
    ]


@pytest.mark.parametrize("tile", [0, 32])
def test_rows_are_the_features_of_the_probe(tmp_path, model, tile):
    images = folder_of_images(tmp_path / "images")
    mask = np.ones((70, 70), bool)
    mask[:30] = False
    tiff(images / "masked.tif", smooth(9), mask=mask)  # invalid pixels become 0, as in pretraining
    (images / "sub").mkdir()
    Image.fromarray(smooth(7)[0, :50]).save(images / "sub/grey.png")
    run(model, images, tmp_path / "t.parquet", "--tile", tile)
    wanted, names = wanted_of(images, model, tmp_path, tile)
    table = pq.read_table(tmp_path / "t.parquet")
    assert np.abs(vectors_of(table) - wanted).max() < 1e-5
    cuts = (
        []
        if not tile
        else [
            f"[{r}:{r + h}, {c}:{c + w}]"
            for r, c, h, w in zip(*(table[o].to_pylist() for o in ("row", "column", "height", "width")))
        ]
    )
    assert [a + b for a, b in zip(table["path"].to_pylist(), cuts or [""] * len(names))] == names
    assert set(table["card_hash"].to_pylist()) == {network_hash(model)}


def test_deep_images_get_the_stretch_of_pretraining(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        tiff(images / f"{i}.tif", smooth(i).astype("uint16") * 12 + 50)
    prepared = prepare(images, tmp_path / "prepared", side=64, workers=1)
    limits = {key: prepared.manifest["stretch"][key] for key in ("low", "high")}
    model = backbone(tmp_path / "model", stretch=limits)
    run(model, images, tmp_path / "t.npz")
    wanted, _ = wanted_of(images, model, tmp_path)
    assert np.abs(all_of(tmp_path / "t.npz", "embedding")[0] - wanted).max() < 1e-5


@pytest.mark.parametrize("task", ["classify", "segment", "change", "detect"])
def test_a_fine_tuned_network_gives_its_own_backbone(tmp_path, task):
    folder = made_network(tmp_path / f"{task}-land-random", task)
    encoder, network = open_encoder(folder), load_task(folder).network
    inner = network.encoder if task == "classify" else network.pyramid.encoder
    for mine, theirs in zip(encoder.encoder.parameters(), inner.parameters()):
        assert torch.equal(mine, theirs)
    assert encoder.side == 64
    assert encoder.hash == network_hash(folder)


def test_half_precision_and_numpy_hold_the_same_rows(tmp_path, model):
    images = folder_of_images(tmp_path / "images", crs="EPSG:32632", transform=from_origin(500000, 5400000, 0.5, 0.5))
    for name, more in (("a.parquet", []), ("a.npz", []), ("half.parquet", ["--half"]), ("half.npz", ["--half"])):
        run(model, images, tmp_path / name, "--tile", 64, *more)
    vectors, windows, places = all_of(tmp_path / "a.parquet", "embedding", "window", "lonlat")
    for name, dtype in (("a.npz", "f4"), ("half.parquet", "f2"), ("half.npz", "f2")):
        found = all_of(tmp_path / name, "embedding", "window", "lonlat")
        assert np.array_equal(found[0], vectors.astype(dtype))
        assert np.array_equal(found[1], windows)
        assert np.array_equal(found[2], places)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        kinds = {name: arrays[name].dtype.kind for name in arrays.files}
        assert kinds == dict(embedding="f", path="U", window="i", xy="f", lonlat="f", crs="U", facts="U")
        assert arrays["crs"][0] == "EPSG:32632"
        # the centre of the first tile: 32 px of .5 m east and south of the corner
        assert arrays["xy"][0].tolist() == [500016, 5399984]
        assert np.allclose(arrays["lonlat"][0], [9.0002, 48.7530], atol=2e-4)


# A run that is stopped


def test_a_stopped_run_resumes_and_a_changed_one_begins_again(tmp_path, model, monkeypatch):
    images = folder_of_images(tmp_path / "images", 10)
    files, path = ImageFiles(images), tmp_path / "t.parquet"
    encoder = fitted(open_encoder(model), files.paths())
    plain, seen = embed.embedder, []

    def counted(*arguments, stop=None):
        compute = plain(*arguments)

        def compute_some(pixels):
            if stop is not None and len(seen) >= stop:
                raise KeyboardInterrupt
            seen.extend(pixels)
            return compute(pixels)

        return compute_some

    monkeypatch.setattr(embed, "embedder", lambda *a: counted(*a, stop=8))
    with pytest.raises(KeyboardInterrupt):
        write_embeddings(encoder, files, path, EmbedOptions(batch=4), 4)
    assert not path.exists()
    assert len(seen) == 8
    seen.clear()
    monkeypatch.setattr(embed, "embedder", counted)
    assert write_embeddings(encoder, files, path, EmbedOptions(batch=4), 4) == 10
    assert len(seen) == 2  # of the last piece
    assert sorted(o.name for o in tmp_path.iterdir()) == ["images", "t.parquet"]
    whole = tmp_path / "whole.parquet"
    write_embeddings(encoder, files, whole, EmbedOptions(batch=4), 4)
    assert whole.read_bytes() == path.read_bytes()


def test_one_process_at_a_time_makes_a_table(tmp_path, model, monkeypatch, capsys):
    images, path, plain, seen = folder_of_images(tmp_path / "images", 2), tmp_path / "t.parquet", embed.make_pieces, []

    def meanwhile(*arguments):
        monkeypatch.setattr(embed, "make_pieces", plain)
        seen.append(refused(capsys, model, images, path, "--half"))
        run(model, images, tmp_path / "other.parquet")
        return plain(*arguments)

    monkeypatch.setattr(embed, "make_pieces", meanwhile)
    run(model, images, path)
    assert len(seen) == 1 and f"{path}: another cmid_embed writes here" in seen[0]
    assert path.read_bytes() == (tmp_path / "other.parquet").read_bytes()
    assert sorted(o.name for o in tmp_path.iterdir()) == ["images", "other.parquet", "t.parquet"]


def test_pieces_of_other_images_are_not_used(tmp_path, model, monkeypatch):
    images = folder_of_images(tmp_path / "images", 3)
    files = ImageFiles(images)
    encoder = fitted(open_encoder(model), files.paths())
    monkeypatch.setattr(embed, "write_parquet", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_embeddings(encoder, files, tmp_path / "t.parquet", EmbedOptions())
    monkeypatch.undo()
    tiff(images / "0.tif", smooth(50))
    write_embeddings(encoder, files, tmp_path / "t.parquet", EmbedOptions())
    write_embeddings(encoder, files, tmp_path / "new.parquet", EmbedOptions())
    assert np.array_equal(*(all_of(tmp_path / name, "embedding")[0] for name in ("t.parquet", "new.parquet")))


def test_what_cannot_be_used_is_listed(tmp_path, model, capsys):
    images = folder_of_images(tmp_path / "images", 2)
    (images / "broken.tif").write_bytes((images / "0.tif").read_bytes()[:300])
    tiff(images / "empty.tif", smooth(1), mask=np.zeros((70, 70), bool))
    (images / "link.tif").symlink_to(tmp_path / "nowhere.tif")
    run(model, images, tmp_path / "t.parquet")
    assert "note: 3 have no embedding, see t.skipped.csv (first: broken.tif: " in capsys.readouterr().err
    lines = (tmp_path / "t.skipped.csv").read_text().splitlines()
    assert lines[0] == "file,reason"
    assert lines[2] == "empty.tif,not one pixel has a value"
    assert all_of(tmp_path / "t.parquet", "path")[0].tolist() == ["0.tif", "1.tif"]


def test_a_table_is_not_replaced_by_none(tmp_path, model, capsys):
    images = folder_of_images(tmp_path / "images", 1)
    run(model, images, tmp_path / "t.parquet")
    before = (tmp_path / "t.parquet").read_bytes()
    (images / "0.tif").write_bytes(b"II*\0 and no more")
    said = refused(capsys, model, images, tmp_path / "t.parquet", "--overwrite")
    assert "not one image can be used (first: 0.tif: " in said
    assert (tmp_path / "t.parquet").read_bytes() == before
    assert sorted(o.name for o in tmp_path.iterdir()) == ["images", "t.parquet"]


# Refusals


def test_arguments_that_mean_nothing_are_refused(tmp_path, model, capsys):
    images = folder_of_images(tmp_path / "images", 2)
    (tmp_path / "none").mkdir()
    good = model, images, tmp_path / "t.parquet"
    assert "holds no network" in refused(capsys, images, *good[1:])
    assert "no such file or folder" in refused(capsys, model, tmp_path / "nowhere", good[2])
    assert "holds no PNG, JPEG or TIFF" in refused(capsys, model, tmp_path / "none", good[2])
    assert "must end in .parquet or .npz" in refused(capsys, model, images, tmp_path / "t.csv")
    assert "is inside of the images" in refused(capsys, model, images, images / "t.parquet")
    assert "--side: 50 must be a multiple of 32 px" in refused(capsys, *good, "--side", 50)
    assert "--tile: must be 0 or more, got -1" in refused(capsys, *good, "--tile", -1)
    assert "--bands: must be different numbers from 0, separated" in refused(capsys, *good, "--bands", "a,b")
    assert "--bands: must be different numbers from 0" in refused(capsys, *good, "--bands", "0,1,1")
    assert "--nodata: must be a number, got nan" in refused(capsys, *good, "--nodata", "nan")
    assert "takes 3 bands, but 2 are named" in refused(capsys, *good, "--bands", "0,1")
    assert "reads bands [0, 1, 5]" in refused(capsys, *good, "--bands", "0,1,5")
    assert not (tmp_path / "t.parquet").exists()
    run(*good)
    before = good[2].read_bytes()
    assert "exists; give --overwrite" in refused(capsys, *good)
    assert good[2].read_bytes() == before


def test_images_that_do_not_fit_are_refused(tmp_path, model, capsys):
    few, deep, shares = (tmp_path / name for name in ("few", "deep", "shares"))
    for folder, pixels in (
        (few, smooth(0, 2)),
        (deep, smooth(0).astype("uint16") * 10),
        (shares, smooth(0).astype("float32") / 255),
    ):
        folder.mkdir()
        tiff(folder / "a.tif", pixels)
    out = tmp_path / "t.parquet"
    assert "has 2 bands, but random-resnet18 was trained on 3" in refused(capsys, model, few, out)
    assert "has pixels of uint16, but random-resnet18 was trained on uint8 only" in refused(capsys, model, deep, out)
    stretched = backbone(tmp_path / "stretched", stretch=dict(low=[100.0] * 3, high=[2000.0] * 3))
    run(stretched, deep, out)
    said = refused(capsys, stretched, shares, tmp_path / "u.parquet")
    assert "100% of the values of such files are outside of 100 to 2000" in said
    capsys.readouterr()
    run(stretched, folder_of_images(tmp_path / "bytes", 2), tmp_path / "v.parquet")
    assert "note: stretched was trained on images that were stretched, and these have 8 bits" in capsys.readouterr().err


def test_a_network_without_backbone_is_refused(tmp_path):
    folder = made_network(tmp_path / "segment-land-random", "segment")
    card = json.loads((folder / "card.json").read_text())
    card["network"], card["backbone"] = "unet", None
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(CmidError) as raised:
        open_encoder(folder)
    assert "\n" not in str(raised.value)


def test_numbers_that_are_not_finite_are_refused(tmp_path, model, capsys):
    images = folder_of_images(tmp_path / "images", 2)
    encoder, card = load_backbone(model)
    with torch.no_grad():
        encoder.model.conv1.weight.fill_(torch.inf)
    broken = export_backbone(encoder, tmp_path / "broken", random_card(["a", "b", "c"]))
    assert "2 of 2 embeddings are not finite" in refused(capsys, broken, images, tmp_path / "t.parquet")
    assert not (tmp_path / "t.parquet").exists()


def test_the_images_are_not_written_to(tmp_path, model):
    images = folder_of_images(tmp_path / "images", 2)
    before = {o.name: o.stat().st_mtime_ns for o in os.scandir(images)}
    run(model, images / "0.tif", tmp_path / "t.parquet", "--similar", images / "1.tif")
    assert {o.name: o.stat().st_mtime_ns for o in os.scandir(images)} == before
