"A detector that finds bright spots: what it must find is known."

from types import SimpleNamespace

import numpy as np
import torch
from scipy import ndimage

from cmid.settings.detect import Detect
from tests.tools.placed import plain_card


class SpotDetector(torch.nn.Module):
    """Stands for a fine-tuned detector; counts the windows that it sees, and stops with the window `last`.
    It does not know less than `least` px² of a spot: networks are not trained on objects that lie mostly outside."""

    def __init__(self, tile=64, gap=16, scales=(1.0,), nms=0.1, score=0.05, least=16, last=None):
        super().__init__()
        self.none = torch.nn.Parameter(torch.zeros(1))
        settings = Detect.model_construct(tile=tile, gap=gap, scales=[*scales], nms=nms, score=score)
        self.network, self.card = SimpleNamespace(settings=settings), plain_card(classes=["spot", "other"])
        self.seen, self.least, self.last = 0, least, last

    def forward(self, x):
        return [self.of_window(image[0].numpy() > 0.5) for image in x]

    def of_window(self, bright):
        if self.seen == self.last:
            raise KeyboardInterrupt
        self.seen += 1
        places = ndimage.find_objects(ndimage.label(bright)[0])
        bounds = torch.tensor([[c.start, r.start, c.stop, r.stop] for r, c in places]).reshape(-1, 4).float()
        bounds = bounds[(bounds[:, 2:] - bounds[:, :2]).prod(1) >= self.least]
        size = bounds[:, 2:] - bounds[:, :2]
        boxes = torch.cat([bounds[:, :2] + size / 2, size, torch.zeros(len(size), 1)], 1)
        scores = 1 - 1 / (2 + size.prod(1).log())
        kept = scores > self.network.settings.score
        return dict(boxes=boxes[kept], scores=scores[kept], classes=torch.zeros(int(kept.sum())).long())


def painted(size, spots):
    "uint8 (3, h, w) with bright rectangles (x, y, w, h)."
    pixels = np.full((3, *size), 20, np.uint8)
    for x, y, w, h in spots:
        pixels[:, y : y + h, x : x + w] = 200
    return pixels
