"A shift between two dates, and another place, are found where there is one, and nowhere else."

import warnings

import numpy as np
import pytest
import rasterio
from rasterio.crs import CRS
from rasterio.transform import Affine

from cmid.base.errors import CmidError
from cmid.data.pairs import MIN_PEAK, phase_offset


def test_peak_of_unrelated_images_is_low():
    def peak(seed):
        first, second = (np.random.default_rng(o).integers(0, 256, (3, 128, 128), np.uint8) for o in (seed, 100 + seed))
        return phase_offset(first, second)[1]

    assert max(peak(seed) for seed in range(20)) < MIN_PEAK / 2


# --- georeferenced files

HERE = Affine(10, 0, 500000, 0, -10, 4600000)
THERE = Affine(10, 0, 500100, 0, -10, 4600000)
ALBERS = CRS.from_epsg(5070)


def write(path, bands, transform, system):
    path.parent.mkdir(parents=True, exist_ok=True)
    options = dict(driver="GTiff", count=bands, height=32, width=32, dtype="uint8", transform=transform, crs=system)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(path, "w", **options) as file:
            file.write(np.random.default_rng(bands).integers(0, 2, (bands, 32, 32), np.uint8) * np.uint8(255))


def put_pairs(study, second=(HERE, ALBERS), label=(HERE, ALBERS)):
    for name in study.names:
        for folder, bands, place in (("A", 3, (HERE, ALBERS)), ("B", 3, second), ("OUT", 1, label)):
            write(study.data / f"{folder}/{name}.tif", bands, *place)


SAME = {
    "no system": (HERE, None),
    "other words": (HERE, CRS.from_wkt(ALBERS.to_wkt(version="WKT1_ESRI"))),
    "no place": (None, None),
    "counts pixels": (Affine(1, 0, 0, 0, -1, 32), None),
    "a plan": (HERE, CRS.from_wkt('LOCAL_CS["plan",UNIT["metre",1]]')),
}
OTHER = {
    "elsewhere": (THERE, ALBERS),
    "other system": (HERE, CRS.from_epsg(32634)),
    "elsewhere, no system": (THERE, None),
}


@pytest.mark.parametrize("place", SAME.values(), ids=SAME)
def test_same_place_in_other_words(study, place):
    "Only what both files say is compared."
    put_pairs(study, second=place, label=place)
    audit = study.read("change").manifest["audit"]
    assert "registration" not in [o["kind"] for o in audit]


@pytest.mark.parametrize("place", OTHER.values(), ids=OTHER)
def test_other_place(study, place):
    put_pairs(study, label=place)
    (found,) = [o for o in study.read("change").manifest["audit"] if o["kind"] == "registration"]
    assert found["count"] == 3
    put_pairs(study, second=place)
    with pytest.raises(CmidError, match="are at different places, according to their georeferencing"):
        study.read("change")


@pytest.mark.parametrize("east, same", [(500005, True), (500105, False)])
def test_world_file(study, east, same):
    "A date whose place stands in a file beside it."
    put_pairs(study, second=(None, None))
    for name in study.names:
        (study.data / f"B/{name}.tfw").write_text(f"10\n0\n0\n-10\n{east}\n4599995\n")
    if same:
        assert len(study.read("change")) == 3
    else:
        with pytest.raises(CmidError, match="are at different places"):
            study.read("change")
