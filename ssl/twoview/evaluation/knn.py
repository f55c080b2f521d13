"""Classification by k nearest neighbors."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from twoview.data import fixed_sample
from twoview.errors import require_at_least, require_choice, require_positive
from twoview.evaluation.measure import ByName, Inputs, Measure, Workload
from twoview.evaluation.neighbors import neighbors
from twoview.evaluation.probe import Prediction, choose_best
from twoview.metrics import knn_vote

NEIGHBORS = 6  # neighbors of each test image that are kept for other measures and for the report


@dataclass(frozen=True)
class KNN(Measure):
    """Weighted vote of the k most similar training images; k and temperature are chosen on held-out labels.

    Source: Wu et al. 2018, arXiv:1805.01978, section 3.4.

    Args:
        k: numbers of neighbors to choose from, > 0.
        temperature: temperatures to choose from, > 0; the weight of a vote is exp(cosine similarity / temperature).
        class_weights: weights in the accuracy by which k and temperature are chosen, "balanced" for equal weights of
            all classes, "none" for equal weights of all images.
        k_images: largest number of held-out images on which k and temperature are chosen, at least 1. Of more images,
            the same ones are drawn for every run.

    Raises:
        UserError: if a value is out of range.
    """

    name = "knn"
    probe_title = "kNN"

    k: Sequence[int] = (1, 5, 10, 20, 50, 200)
    temperature: Sequence[float] = (0.02, 0.07, 0.2)
    class_weights: Literal["none", "balanced"] = "none"
    k_images: int = 5000

    def __post_init__(self) -> None:
        require_positive("eval", k=self.k, temperature=self.temperature)
        require_at_least("eval", 1, k_images=self.k_images)
        require_choice("eval", ("none", "balanced"), class_weights=self.class_weights)

    def choose(self, inputs: Inputs, earlier: ByName) -> Prediction:
        """Choose k and temperature on held-out labels, then classify the test images by all training images."""
        train = inputs.train
        fit, held = inputs.split()
        fitted, held_out = train.at(fit), train.at(held[fixed_sample(len(held), self.k_images)])
        numbers = [k for k in self.k if k <= len(fitted.labels)] or [len(fitted.labels)]
        similarity, position = neighbors(fitted.features, held_out.features, max(numbers), inputs.device)
        grid, votes = list(itertools.product(numbers, self.temperature)), fitted.labels[position]
        predicted = [knn_vote(similarity, votes, k, temperature, inputs.classes) for k, temperature in grid]
        best, val_top1 = choose_best(predicted, held_out.labels, self.class_weights)
        k, temperature = grid[best]
        similarity, position = neighbors(train.features, inputs.test, max(k, NEIGHBORS), inputs.device)
        classes = knn_vote(similarity, train.labels[position], k, temperature, inputs.classes)
        kept = position[:, :NEIGHBORS].clone()
        return Prediction(classes, {"val_top1": val_top1, "k": k, "temperature": temperature}, neighbors=kept)

    def expected_seconds(self, work: Workload) -> float:
        """See :class:`Measure`."""
        held_out = int(0.2 * work.train)
        return work.search(work.train - held_out, min(held_out, self.k_images)) + work.search(work.train, work.test)
