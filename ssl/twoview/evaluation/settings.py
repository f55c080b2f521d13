"""Measures of an evaluation, and the settings that all measures share."""

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Self

from twoview.errors import require, require_at_least, require_choice
from twoview.evaluation.clustering import Clustering
from twoview.evaluation.feature_store import memory_limit
from twoview.evaluation.few_labels import FewLabels
from twoview.evaluation.geometry import Geometry
from twoview.evaluation.integrity import Integrity
from twoview.evaluation.invariance import Invariance
from twoview.evaluation.knn import KNN
from twoview.evaluation.linear import Linear
from twoview.evaluation.linear_sgd import LinearSGD
from twoview.evaluation.measure import Measure
from twoview.evaluation.retrieval import Retrieval

# All measures in the order in which they are taken and reported. Add a new measure here; no other code changes.
MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Linear(),
        Linear(batch_norm=False),
        KNN(),
        LinearSGD(),
        FewLabels(),
        Retrieval(),
        Clustering(),
        Geometry(),
        Invariance(),
        Integrity(),
    )
}


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation.

    Args:
        measures: measures to take, each with its own knobs.
        holdout: share of the training labels on which every choice is made, in (0, 1).
        bootstrap: number of bootstrap resamples of the test images for 95 % intervals, at least 100.
        map: projection of the features to two dimensions in the report, "pca" or "umap" (needs the extra "umap").
        baselines: evaluate random initialization and raw pixels beside the trained network.
        cache: folder in which features are stored for the next evaluation; None to store nothing.
        memory: largest size of the features of one split to hold in memory, in bytes or as "500MB" or "2GB"; larger
            features are mapped into memory from a file. None for a quarter of the free memory.

    Raises:
        UserError: if a value is out of range.

    Example:
        >>> EvaluationSettings(measures=(KNN(k=(1, 5)),)).knobs()["k"]
        (1, 5)
    """

    measures: Sequence[Measure] = (Linear(), KNN(), Geometry())
    holdout: float = 0.2
    bootstrap: int = 2000
    map: Literal["pca", "umap"] = "pca"
    baselines: bool = True
    cache: str | None = None
    memory: float | str | None = None

    def __post_init__(self) -> None:
        require(self.measures, f"eval.parts=[]: choose one or more of {', '.join(MEASURES)}")
        require(0 < self.holdout < 1, f"eval.holdout={self.holdout}: give a share of the labels between 0 and 1")
        require_at_least("eval", 100, bootstrap=self.bootstrap)
        require_choice("eval", ("pca", "umap"), map=self.map)
        memory_limit(self.memory)
        installed = self.map == "pca" or importlib.util.find_spec("umap")
        require(installed, 'eval.map=umap: is not installed; pip install "twoview[umap]"')

    @classmethod
    def from_knobs(cls, parts: Sequence[str] = ("linear", "knn", "geometry"), **knobs: Any) -> Self:
        """Create settings from one flat set of knobs, as on the command line.

        Args:
            parts: names of the measures, which are the keys of :data:`MEASURES`.
            knobs: fields of this class and of the measures. A field that several measures have is set in all of these.

        Raises:
            UserError: if a measure or a knob is unknown, or a value is out of range.

        Example:
            >>> EvaluationSettings.from_knobs(parts=["knn"], k=[5], holdout=0.1).measures[0].k
            [5]
        """
        for part in parts:
            require_choice("eval", list(MEASURES), parts=part)
        known = {field.name for owner in (cls, *MEASURES.values()) for field in fields(owner)}  # type: ignore[arg-type]
        require(knobs.keys() <= known, f"eval.{', '.join(sorted(knobs.keys() - known))}: unknown; see --cfg job")

        def of(owner: Any) -> dict[str, Any]:
            return {field.name: knobs[field.name] for field in fields(owner) if field.name in knobs}

        measures: list[Any] = [measure for name, measure in MEASURES.items() if name in parts]
        return cls(measures=tuple(replace(measure, **of(measure)) for measure in measures), **of(cls))

    def only(self, *names: str) -> Self:
        """Return a copy that keeps only the measures in ``names``.

        Args:
            names: names of measures. If these settings have no measure in ``names``, the copy has the first measure in
                ``names`` with default knobs.
        """
        kept = tuple(measure for measure in self.measures if measure.name in names)
        return replace(self, measures=kept or (MEASURES[names[0]],))

    def knobs(self) -> dict[str, Any]:
        """Return all settings as one flat mapping of plain values, with the names that :meth:`from_knobs` takes."""
        flat = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "measures"}
        for measure in self.measures:
            flat |= asdict(measure)  # type: ignore[call-overload]
        flat.pop("batch_norm", None)
        return {"parts": [measure.name for measure in self.measures], **flat}
