"""Features of known distribution, and evaluations of a few seconds."""

from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import torch
from short_runs import SIZE, short_data

from twoview import runs
from twoview.augment import TwoViews
from twoview.data import ImageData
from twoview.evaluation.evaluate import take
from twoview.evaluation.settings import MEASURES, EvaluationSettings

ALL_BUT_SGD = tuple(name for name in MEASURES if name != "linear_sgd")
AUGMENT = partial(TwoViews, crop_scale=(0.4, 1.0), flip_p=0.0, blur_p=0.0)
# Text that must be escaped in HTML, Markdown and CSV.
UNSAFE = "<script>alert('x')</script>|`a`&\n_b_"


def blobs(n=200, classes=4, d=8, seed=0, spread=1.5):
    """Features of Gaussian classes around fixed centers, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    centers = 2 * torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % classes
    return centers[labels] + spread * torch.randn(n, d, generator=generator), labels


def figures_of(measure, inputs, labels):
    """Figures of one measure."""
    return take((measure,), inputs, labels)[0][measure.name]


def digits_data(image_size=SIZE, channels=1):
    """Digits, as a function of what an evaluation asks for."""
    return short_data(image_size=image_size, channels=channels)


def quick(*parts, **knobs):
    """Settings with small grids; all measures but ``linear_sgd`` unless ``parts`` are given."""
    few = {"l2": (1.0, 0.1), "k": (1, 5), "bootstrap": 200, "shift_images": 60, "draws": 2}
    return EvaluationSettings.from_knobs(parts=parts or ALL_BUT_SGD, **(few | knobs))


def evaluate(folder, source, data=digits_data, settings=None, **changes):
    """``runs.evaluate`` with quick settings."""
    return runs.evaluate(source, data, settings or quick(), AUGMENT, run_dir=folder, **changes)


@cache
def full_evaluation(run):
    """An evaluation by all measures but ``linear_sgd``, once a session: its folder, report and settings.

    Args:
        run: folder of a finished run; the evaluation and its cache are written beside it.
    """
    folder = run.parent / "evaluated"
    settings = quick(cache=str(folder / "cache"))
    return SimpleNamespace(
        folder=folder / "run", report=evaluate(folder / "run", run, settings=settings), settings=settings
    )


def with_cache(settings, folder):
    """The same settings with another cache."""
    return replace(settings, cache=str(folder))


def shuffled(labels):
    """The labels in a fixed random order."""
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


def relabelled(labels, **changes):
    """Digits whose test labels are replaced by a function of them; ``changes`` are arguments of ImageData."""
    data = short_data()
    test = data.test.with_labels(labels(data.test.labels))
    return ImageData(data.train, data.train, test, data.classes, 128, **({"name": "digits"} | changes))
