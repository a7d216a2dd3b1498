"What all fine-tuned tasks share: the order of images, and scores by class."

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from cmid.base.scores import class_table
from cmid.tasks.finetune import ShuffledBatches


@pytest.mark.parametrize(
    "n, batch, sizes",
    [(10, 4, [4, 3, 3]), (9, 4, [3, 3, 3]), (5, 1, [1] * 5), (3, 16, [3]), (33, 16, [11] * 3), (1680, 16, [16] * 105)],
)
def test_every_image_once_an_epoch(n, batch, sizes):
    order = ShuffledBatches(np.arange(100, 100 + n), batch, seed=1)
    epochs = []
    for epoch in range(2):
        order.epoch = epoch
        steps, batches = zip(*order)
        assert steps == tuple(range(epoch * len(order), (epoch + 1) * len(order)))
        assert [len(rows) for rows in batches] == sizes
        epochs.append(np.concatenate(batches).tolist())
        assert sorted(epochs[-1]) == list(range(100, 100 + n))
    assert epochs[0] != epochs[1]


def test_the_table_of_classes_is_scikit_learns():
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 6, (2, 300))
    correct = rng.random(300) < 0.6
    guess[correct] = truth[correct]
    confusion = np.zeros((6, 6), int)
    np.add.at(confusion, (truth, guess), 1)
    table = class_table(confusion, "abcdef")
    expected = np.transpose(precision_recall_fscore_support(truth, guess, labels=range(6)))
    found = [[scores[key] for key in ("precision", "recall", "f1", "images")] for scores in table.values()]
    assert np.allclose(found, expected)
    assert list(table) == list("abcdef")
