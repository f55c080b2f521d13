"""Invariance of features to single operations of the augmentation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from twoview.augment import TwoViews
from twoview.data import Images, fixed_sample, in_order
from twoview.errors import require_at_least
from twoview.evaluation.measure import ByName, Figures, Inputs, Measure, Workload
from twoview.evaluation.progress import add_steps
from twoview.evaluation.tables import Table, number, percent
from twoview.losses import l2_normalize

# A recipe without any operation.
IDENTITY: Mapping[str, Any] = {
    "crop_scale": (1, 1),
    "crop_ratio": (1, 1),
    "jitter": (0, 0, 0, 0),
    **dict.fromkeys(("flip_p", "jitter_p", "gray_p", "blur_p", "solarize_p"), 0.0),
}
# Strengths from weak to strong, and the recipe for a strength. Operations without a degree have one strength.
SHIFTS: Mapping[str, tuple[Sequence[float], Callable[[float], dict[str, Any]]]] = {
    "crop to area": ((0.75, 0.5, 0.25), lambda x: {"crop_scale": (x, x)}),
    "mirror": ((1.0,), lambda x: {"flip_p": x}),
    "brightness": ((0.2, 0.4, 0.8), lambda x: {"jitter": (x, 0, 0, 0), "jitter_p": 1.0}),
    "contrast": ((0.2, 0.4, 0.8), lambda x: {"jitter": (0, x, 0, 0), "jitter_p": 1.0}),
    "saturation": ((0.2, 0.4, 0.8), lambda x: {"jitter": (0, 0, x, 0), "jitter_p": 1.0}),
    "hue": ((0.05, 0.1, 0.2), lambda x: {"jitter": (0, 0, 0, x), "jitter_p": 1.0}),
    "grayscale": ((1.0,), lambda x: {"gray_p": x}),
    "blur of sigma": ((0.5, 1.0, 2.0), lambda x: {"blur_p": 1.0, "blur_sigma": (x, x)}),
    "solarize": ((1.0,), lambda x: {"solarize_p": x}),
}
NEED_COLOR = ("saturation", "hue", "grayscale")


@dataclass(frozen=True)
class Invariance(Measure):
    """Change of features and predicted classes by each operation of the augmentation, at up to three strengths.

    Args:
        shift_images: number of test images that are augmented, at least 2.

    Raises:
        UserError: if a value is out of range.
    """

    name = "invariance"

    shift_images: int = 1000

    def __post_init__(self) -> None:
        require_at_least("eval", 2, shift_images=self.shift_images)

    def applies(self, inputs: Inputs) -> bool:
        """Return True for networks, False for raw pixels."""
        return inputs.encoder is not None

    def choose(self, inputs: Inputs, earlier: ByName) -> list[Figures]:
        """Return the effect of no operation, then of each operation: mean cosine to the original, predicted classes."""
        images = inputs.test_images.subset(self._positions(inputs))
        classify = next((c for p in earlier.values() if (c := getattr(p, "classify", None)) is not None), None)

        def features_after(recipe: Mapping[str, Any]) -> Tensor:
            changes = {**IDENTITY, **recipe, "allow_flip": True, "min_crop_area": 0.0}
            return augmented_features(inputs, images, inputs.views.with_recipe(**changes), count=1)[0]

        def effect(operation: str, strength: float, features: Tensor) -> Figures:
            cosine = float(F.cosine_similarity(clean, features).mean())
            invariance = (cosine - different) / (1 - different) if different < 1 - 1e-6 else None
            found = {"operation": operation, "strength": strength, "cosine": cosine, "invariance": invariance}
            return {**found, "classes": None if classify is None else classify(features)}

        clean = features_after({})
        different = mean_similarity(clean)
        effects = [effect("none", 0.0, clean) | {"different_images": different}]
        for operation, (strengths, recipe) in SHIFTS.items():
            if operation not in NEED_COLOR or inputs.views.channels == 3:
                effects += [effect(operation, x, features_after(recipe(x))) for x in strengths]
        return effects

    def score(self, chosen: list[Figures], inputs: Inputs, labels: Tensor) -> Figures:
        """Compute the accuracy of the first linear probe after each operation.

        Returns:
            * ``different_images``: mean cosine similarity of different images;
            * ``accuracy``: accuracy without any operation; None without a linear probe;
            * ``shifts``: for each operation and strength, ``operation``, ``strength``, ``cosine`` (mean cosine
              similarity of an image before and after the operation), ``accuracy`` and ``invariance``. Invariance is
              (cosine - different_images) / (1 - different_images): 1 if the features do not change, 0 if the features
              before and after the operation are as different as the features of different images.
        """
        labels = labels[self._positions(inputs)]
        none, *shifts = [dict(effect) for effect in chosen]
        for effect in (none, *shifts):
            classes = effect.pop("classes")
            effect["accuracy"] = None if classes is None else float((classes == labels).double().mean())
        return {"different_images": none["different_images"], "accuracy": none["accuracy"], "shifts": shifts}

    def expected_seconds(self, work: Workload) -> float:
        """See :class:`Measure`."""
        strengths = 1 + sum(len(strengths) for strengths, _ in SHIFTS.values())
        return strengths * min(self.shift_images, work.test) * work.image_seconds

    def table(self, columns: ByName, report: ByName) -> Table:
        """Return a table of invariance and accuracy for each operation."""
        header = ["operation", *(f"{name}: {what}" for name in columns for what in ("invariance", "accuracy"))]
        rows = [["none", *(cell for found in columns.values() for cell in ("1", percent(found["accuracy"])))]]
        for place, shift in enumerate(next(iter(columns.values()))["shifts"]):
            shifts = [found["shifts"][place] for found in columns.values()]
            name = f"{shift['operation']} {shift['strength']:g}"
            rows.append([name, *(cell for x in shifts for cell in (number(x["invariance"]), percent(x["accuracy"])))])
        note = "Invariance is 1 for unchanged features and 0 for those of another image. Accuracy of the linear probe."
        return Table("Invariance", header, rows, note)

    def _positions(self, inputs: Inputs) -> Tensor:
        return fixed_sample(len(inputs.test_images), self.shift_images)


def augmented_features(inputs: Inputs, images: Images, views: TwoViews, count: int = 2) -> list[Tensor]:
    """Compute the features of augmented views of each image.

    Args:
        inputs: network, device, batch size and seed.
        images: N images.
        views: the augmentation.
        count: number of views per image, 1 or 2.

    Returns:
        fp32 ``[N, F]`` for each view.
    """
    assert inputs.encoder is not None
    views.to(inputs.device)
    parts = []
    add_steps(total=len(images))
    for index, batch in enumerate(in_order(images, inputs.batch_size)):
        # The same pixels as for the probes.
        crops = inputs.encoder.preprocess.crops(batch.pixels, batch.sizes).to(inputs.device)
        pair = views(crops, key=(inputs.seed, index))[:count]
        parts.append([inputs.encoder.apply_network(view).cpu() for view in pair])
        add_steps(done=len(batch.ids))
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def mean_similarity(features: Tensor) -> float:
    """Return the mean cosine similarity, in [-1, 1], of all pairs of different rows of ``[N, F]``, N >= 2."""
    total = l2_normalize(features).double().sum(0)
    return float((total @ total - len(features)) / (len(features) * (len(features) - 1)))
