"The card of a backbone with random weights."


def random_card(bands=("red", "green", "blue"), mean=0.5, std=0.2):
    return dict(
        mean=[mean] * len(bands),
        std=[std] * len(bands),
        bands=[*bands],
        method="random",
        parameters={},
        data_hash=None,
        data_licence=None,
        provenance={},
        health={},
    )
