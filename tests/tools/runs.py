"What tests of a training or fine-tuning give it."


def changed(settings, **values):
    "A copy of settings with other values."
    return settings.model_copy(update=values)


def quiet(line):
    "For the lines that a run prints: drops them."
