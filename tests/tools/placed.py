"Scenes with a known place on the Earth, for tests of what is written in map coordinates."

from types import SimpleNamespace

import rasterio
from rasterio.transform import Affine, from_origin

from cmid.tasks.card import Source

UTM, DEGREES = "EPSG:32632", "EPSG:4326"
PLACES = {  # name -> (coordinate system, affine transform from px)
    "utm": (UTM, from_origin(500_000, 5_300_000, 2, 2)),
    "degrees": (DEGREES, from_origin(9.1, 47.9, 2e-5, 2e-5)),
    "south-up": (UTM, Affine(2, 0, 500_000, 0, 2, 5_300_000)),
    "rotated": (UTM, Affine.translation(500_000, 5_300_000) @ Affine.rotation(25) @ Affine.scale(2, -2)),
    "sheared": (UTM, Affine(2, 0.7, 500_000, 0.3, -1.2, 5_300_000)),
    "none": (None, None),
}


def write_scene(path, pixels, place, **options):
    "A GeoTIFF of uint8 (C, h, w) at one of `PLACES`."
    crs, transform = PLACES[place]
    known = {} if transform is None else dict(crs=crs, transform=transform)
    count, height, width = pixels.shape
    size = dict(count=count, height=height, width=width, dtype=pixels.dtype.name)
    with rasterio.open(path, "w", driver="GTiff", **size, **known, **options) as file:
        file.write(pixels)
    return path


def plain_card(bands=3, **entries):
    "What a scene must know of a network: it takes 8-bit bands as they are."
    source = Source(bands=None, types={}, nodata=None)
    facts = dict(source=source, bands=[f"band {i}" for i in range(bands)], in_chans=bands, resolution=None)
    return SimpleNamespace(**facts | dict(valid_range=None) | entries)
