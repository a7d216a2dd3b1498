"Search: the exact neighbours, whatever the blocks, and a table is asked only by the network that made it."

import csv

import numpy as np
import pytest
from PIL import Image

from cmid.apply.embed import cmid_embed
from cmid.apply.items import Batch, ItemRow
from cmid.apply.similar import nearest, split_item
from cmid.apply.table import EmbeddingTable, embedding_rows, embedding_schema, write_npz, write_parquet
from tests.tools.embeddings import backbone, folder_of_images, refused, run, smooth
from tests.tools.rasters import tiff


def stored(path, vectors, size):
    "A table of vectors in pieces of some size"
    schema = embedding_schema(vectors.shape[1], vectors.dtype == np.float16, dict(card_hash="0" * 64, side=32, tile=0))
    rows = [ItemRow(f"{i}.png", None) for i in range(len(vectors))]
    parts = [
        embedding_rows(Batch(rows[i : i + size]), vectors[i : i + size], schema) for i in range(0, len(vectors), size)
    ]
    (write_npz if path.suffix == ".npz" else write_parquet)(path, schema, lambda: iter(parts))
    return EmbeddingTable(path)


def by_hand(vectors, queries, count, own):
    "Neighbours by sorting all cosines"
    vectors, queries = (
        o.astype(float) / np.linalg.norm(o.astype(float), axis=1, keepdims=True) for o in (vectors, queries)
    )
    cosine = queries @ vectors.T
    for query, row in own:
        cosine[query, row] = -np.inf
    order = np.argsort(-cosine, 1, kind="stable")[:, :count]
    return order, 1 - np.take_along_axis(cosine, order, 1)


@pytest.mark.parametrize("kind", ["a.parquet", "a.npz"])
@pytest.mark.parametrize("size", [1, 3, 50, 1000])
def test_neighbours_are_exact_in_blocks_of_any_size(tmp_path, kind, size):
    rng = np.random.default_rng(size)
    vectors = rng.normal(size=(200, 6)).astype("f4") * rng.uniform(0.1, 9, (200, 1)).astype("f4")
    queries = np.concatenate([vectors[[3, 199]], rng.normal(size=(5, 6)).astype("f4")])
    own = [(0, 3), (1, 199)]
    numbers, distances = nearest(stored(tmp_path / kind, vectors, size), queries, 7, own)
    wanted, away = by_hand(vectors, queries, 7, own)
    assert np.array_equal(numbers, wanted)
    assert np.abs(distances - away).max() < 1e-6


def test_equal_rows_come_in_the_order_of_the_table(tmp_path):
    vectors = np.tile(np.array([[1, 2, 3], [3, 2, 1]], "f4"), (20, 1))
    numbers, distances = nearest(stored(tmp_path / "a.parquet", vectors, 7), vectors[:1], 4)
    assert numbers.tolist() == [[0, 2, 4, 6]]
    assert np.abs(distances).max() < 1e-6


def test_a_row_without_length_is_far_from_everything(tmp_path):
    vectors = np.array([[0, 0], [1, 0]], "f2")
    numbers, distances = nearest(stored(tmp_path / "a.npz", vectors, 2), np.array([[2.0, 0]]), 3)
    assert numbers.tolist() == [[1, 0, -1]]
    assert distances[0, 1] == 1


@pytest.mark.parametrize("text", ["a.tif[0:5]", "a[1].tif", "[3].png"])
def test_brackets_in_names_are_no_windows(text):
    assert split_item(text) == (text, None)


# The command


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    "Backbone, images and table"
    folder = tmp_path_factory.mktemp("similar")
    images = folder_of_images(folder / "images", 6)
    tiff(images / "twin.tif", smooth(2))
    model = backbone(folder / "random-resnet18")
    run(model, images, folder / "t.parquet")
    return model, images, folder / "t.parquet"


def answer(folder, name):
    "Rows of the one answer of this name, which ends with a hash"
    (path,) = folder.glob(f"{name}-??????.csv")
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_an_image_of_the_table_does_not_find_itself(searched):
    model, images, table = searched
    for to in (images / "2.tif", "2.tif"):
        run(model, images, table, "--similar", to, "--neighbours", 3)
        found = answer(table.parent, "t-like-2")
        assert [row["rank"] for row in found] == ["1", "2", "3"]
        assert found[0]["path"] == "twin.tif"
        assert float(found[0]["distance"]) < 1e-5
        assert "2.tif" not in [row["path"] for row in found]
    (sheet,) = table.parent.glob("t-like-2-*.png")
    with Image.open(sheet) as sheet:
        assert sheet.format == "PNG"


def test_a_folder_is_as_many_queries_as_it_has_images(searched, tmp_path):
    model, images, table = searched
    others = folder_of_images(tmp_path / "others", 4)
    run(model, images, table, "--similar", others, "--neighbours", 1)
    found = answer(table.parent, "t-like-others")
    assert [row["query"] for row in found] == ["0.tif", "1.tif", "2.tif", "3.tif"]
    assert [row["path"] for row in found] == ["0.tif", "1.tif", "2.tif", "3.tif"]  # equal pixels in another place


def test_tiles_are_searched_by_tiles(searched, tmp_path):
    model, images, _ = searched
    table = tmp_path / "tiles.npz"
    run(model, images, table, "--tile", 48, "--similar", "2.tif[0:48, 22:70]", "--neighbours", 2)
    found = answer(tmp_path, "tiles-like-2-0-22")
    assert (found[0]["path"], found[0]["window"]) == ("twin.tif", "0:48, 22:70")
    run(model, images, table, "--tile", 48, "--similar", images / "twin.tif", "--neighbours", 1)
    found = answer(tmp_path, "tiles-like-twin")
    assert [row["path"] for row in found] == ["2.tif"] * 4


def test_no_answer_replaces_that_of_another_query(searched, tmp_path):
    "Equal names in two folders or of two formats, other windows of an image, and tables of one name."
    model, images, _ = searched
    folders = [folder_of_images(tmp_path / name, 1) for name in "ab"]
    Image.open(images / "0.tif").convert("RGB").save(folders[0] / "0.png")
    queries = [folder / "0.tif" for folder in folders] + [
        folders[0] / "0.png",
        "0.tif[0:48, 0:48]",
        "0.tif[0:48, 22:70]",
    ]
    for suffix in (".npz", ".parquet"):
        for to in [*queries, *queries]:
            run(model, images, tmp_path / f"t{suffix}", "--tile", 48, "--similar", to, "--neighbours", 1)
    assert len([*tmp_path.glob("t-like-0-*.csv")]) == len([*tmp_path.glob("t-like-0-*.png")]) == 2 * len(queries)


def test_a_table_of_another_network_or_form_is_refused(searched, tmp_path, capsys):
    model, images, table = searched
    before = table.read_bytes()
    other = backbone(tmp_path / "other", method="byol")
    assert "was made by another network (random-resnet18)" in refused(
        capsys, other, images, table, "--similar", "2.tif"
    )
    assert "was made with tile 0, not 32" in refused(capsys, model, images, table, "--similar", "2.tif", "--tile", 32)
    assert "was made with side 64, not 96" in refused(capsys, model, images, table, "--similar", "2.tif", "--side", 96)
    said = refused(capsys, model, images, table, "--similar", "sub/2.tif")
    assert "is neither an image, a folder nor a row of t.parquet (did you mean 2.tif?)" in said
    assert table.read_bytes() == before


def test_a_damaged_table_is_refused(searched, tmp_path, capsys):
    model, images, table = searched
    for name in ("a.parquet", "a.npz"):
        (tmp_path / name).write_bytes(table.read_bytes()[:-100])
        said = refused(capsys, model, images, tmp_path / name, "--similar", "2.tif")
        assert f"{name}: is not a table of embeddings, or damaged" in said


def test_the_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        cmid_embed(["--help"])
    assert stopped.value.code == 0
    assert "examples:\n  cmid_embed models/" in capsys.readouterr().out
