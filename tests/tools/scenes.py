"Scenes of three classes, each of another colour."

import numpy as np
from PIL import Image

from cmid.data.prepare import prepare

COLOURS = dict(blue=(40, 60, 180), green=(50, 170, 60), red=(190, 50, 40))


def paint_scenes(folder, images, train, noise):
    """Write `images` images a class, and give the lines of two splits: `train` images of each class, and the others.

    `noise` holds the deviations of an image's colour and of its pixels."""
    rng = np.random.default_rng(0)
    lines = dict(train=[], test=[])
    for name, colour in COLOURS.items():
        (folder / "in" / name).mkdir(parents=True)
        for i in range(images):
            image = np.array(colour) + rng.normal(0, noise[0], 3) + rng.normal(0, noise[1], (32, 32, 3))
            Image.fromarray(image.clip(0, 255).astype("uint8")).save(folder / "in" / name / f"{i:02}.png")
            lines["train" if i < train else "test"].append(f"{name}/{i:02}.png {name}")
    return lines


def prepare_scenes(folder, lines):
    "The prepared dataset of painted scenes, with a split for each entry of `lines`."
    lists = {split: folder / f"{split}.txt" for split in lines}
    for split, path in lists.items():
        path.write_text("\n".join(lines[split]))
    return prepare(folder / "in", folder / "out", side=32, lists=lists, workers=1)
