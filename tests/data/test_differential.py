"""What `prepare` and `label_dataset` read is what rasterio's masks and Pillow read, on random rasters of every kind.

A failure says how to write the raster anew. The generators are tests/tools/rasters.py and labelled_rasters.py, the
independent reader is tests/tools/reference.py, and tests/tools/agreement.py says what must be equal.
"""

from collections import Counter
from dataclasses import replace

import pytest

from tests.tools import agreement, label_agreement, labelled_rasters, rasters, reference

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

CORPORA, RASTERS = 4, 2  # of each kind: so many corpora of so many rasters
LONG = range(100, 116), 5  # seeds of the corpora, and rasters of each
LABELLED = [*labelled_rasters.MASKS, *labelled_rasters.PAIRS]
TYPES = {*rasters.TYPES, "int64", "uint64", "complex64"}
TRAITS = {
    *TYPES,
    *(f"{bands} bands" for bands in rasters.BANDS),
    *(f"{bits} bits" for bits in (1, 2, 3, 4, 5, 6, 7, 12, 16)),
    *(f"orientation {number}" for number in range(1, 9)),
    *(f"{name} compression" for name in ("no", "lzw", "deflate", "packbits", "zstd", "lzma", "jpeg", "lerc")),
    *(f"photometric {number}" for number in (0, 1, 2, 3, 5, 6, 8)),  # MINISWHITE to CIELab
    *(f"predictor {number}" for number in (1, 2, 3)),
    *(".tif", ".png", ".jpg", "TIFF", "BigTIFF", "little-endian", "big-endian", "tiles", "strips"),
    *("pixel interleaving", "band interleaving", "a side of 1", "a side of 256"),
    *("all_valid", "per_dataset", "nodata"),
}


def unlike(outcomes):
    return [str(outcome) for outcome in outcomes if outcome.verdict not in ("right", "refused")]


@pytest.mark.parametrize("kind", rasters.KINDS)
def test_prepare_reads_what_others_read(kind, tmp_path):
    for seed in range(CORPORA):
        assert not unlike(agreement.check(kind, seed, RASTERS, tmp_path / str(seed)))


@pytest.mark.parametrize("kind", LABELLED)
def test_labels_reads_what_others_read(kind, new_study):
    for seed in range(CORPORA):
        assert not unlike(label_agreement.check(kind, seed, RASTERS, new_study(str(seed))))


def wrong_value(truth):
    pixels = truth.pixels.copy()
    pixels[-1, -1, -1] = pixels.max() - pixels[-1, -1, -1]
    return replace(truth, pixels=pixels)


def wrong_pixel(truth):
    valid = truth.valid.copy()
    valid[-1, -1, -1] ^= True
    return replace(truth, valid=valid)


@pytest.mark.parametrize("change", [wrong_value, wrong_pixel])
def test_one_wrong_pixel_is_a_difference(change, tmp_path, monkeypatch):
    "And it is told how to write this raster again."
    read = reference.read
    monkeypatch.setattr(reference, "read", lambda *values, **options: change(read(*values, **options)))
    found = unlike(agreement.check("png-rgb", 0, 2, tmp_path))
    assert len(found) == 2
    assert "rasters.write('png-rgb', 0, 1, folder): wrong: " in found[1]


def test_every_trait_occurs(tmp_path):
    "At least 500 rasters, and each type, layout and tag among them."
    found, files = Counter(), 0
    for kind in rasters.KINDS:
        for seed in range(CORPORA):
            folder = tmp_path / f"{kind}-{seed}"
            folder.mkdir()
            for number in range(RASTERS):
                rasters.write(kind, seed, number, folder)
            paths = [path for path in folder.iterdir() if path.suffix in (".tif", ".png", ".jpg")]
            files += len(paths)
            found.update(trait for path in paths for trait in set(rasters.traits(path)))
    assert files >= 500
    missing = sorted(TRAITS - set(found))
    assert not missing


def test_a_raster_is_drawn_anew_from_its_kind_seed_and_number(tmp_path):
    for kind in rasters.KINDS:
        folders = tmp_path / f"{kind}-0", tmp_path / f"{kind}-1"
        for folder in folders:
            folder.mkdir()
            rasters.write(kind, 5, 3, folder)
        contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
        assert contents[0] == contents[1], kind


@pytest.mark.long
@pytest.mark.parametrize("kind", rasters.KINDS)
def test_prepare_reads_what_others_read_in_thousands(kind, tmp_path):
    seeds, count = LONG
    wrong = []
    for seed in seeds:
        wrong += unlike(agreement.check(kind, seed, count, tmp_path / str(seed)))
    assert not wrong


@pytest.mark.long
@pytest.mark.parametrize("kind", LABELLED)
def test_labels_reads_what_others_read_in_thousands(kind, new_study):
    seeds, count = LONG
    wrong = []
    for seed in seeds:
        wrong += unlike(label_agreement.check(kind, seed, count, new_study(str(seed))))
    assert not wrong
