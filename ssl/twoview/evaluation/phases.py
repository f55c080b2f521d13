"""The two phases of an evaluation: all choices without test labels, then all scores."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from twoview.devices import memory_error
from twoview.evaluation import progress
from twoview.evaluation.measure import Inputs, Measure
from twoview.evaluation.probe import Prediction, score

log = logging.getLogger(__name__)

OUT_OF_MEMORY = "out of memory; evaluate fewer images, or leave this part out of eval.parts"
INTERRUPTED = "interrupted"


class Taken(NamedTuple):
    """Result of :func:`take`.

    Attributes:
        found: metrics by name of the measure.
        chosen: results of ``choose`` by name of the measure.
        missing: reasons why measures have no metrics, by name of the measure: too little memory, or an interrupt.
        stopped: whether Ctrl-C was pressed.
    """

    found: dict[str, Any]
    chosen: dict[str, Any]
    missing: dict[str, str]
    stopped: bool


def take(measures: Sequence[Measure], inputs: Inputs, labels: Tensor) -> Taken:
    """Take measures in two phases: all choices, then all scores.

    At the first Ctrl-C, no further choice is made. What was chosen is scored, except for measures without choices,
    which do all their work in the score.

    Args:
        measures: measures to take; a measure that does not apply to ``inputs`` is left out.
        inputs: features and images, without test labels.
        labels: int64 ``[T]``, labels of the test images.

    Returns:
        The metrics, the choices, and what is missing. A measure that ran out of memory is missing.

    Raises:
        KeyboardInterrupt: at a second Ctrl-C.
    """
    chosen: dict[str, Any] = {}
    missing: dict[str, str] = {}
    applied, stopped = [measure for measure in measures if measure.applies(inputs)], False
    try:
        for measure in applied:
            with _part(measure, inputs, missing):
                chosen[measure.name] = measure.choose(inputs, chosen)
    except KeyboardInterrupt:
        stopped = True
    # From here on, test labels are read and nothing is chosen.
    found: dict[str, Any] = {}
    for measure in (measure for measure in applied if measure.name in chosen):
        if stopped and chosen[measure.name] is None:
            continue
        try:
            with _part(measure, inputs, missing):
                found[measure.name] = _score(measure, chosen[measure.name], inputs, labels)
        except KeyboardInterrupt:
            if stopped:
                raise
            stopped = True
    names = [measure.name for measure in applied]
    missing |= {name: INTERRUPTED for name in names if stopped and name not in found and name not in missing}
    return Taken(found, chosen, missing, stopped)


def _score(measure: Measure, chosen: Any, inputs: Inputs, labels: Tensor) -> dict[str, Any]:
    if isinstance(chosen, Prediction):
        return score(chosen, labels, inputs.classes, inputs.bootstrap, inputs.seed)
    return measure.score(chosen, inputs, labels)


@contextlib.contextmanager
def _part(measure: Measure, inputs: Inputs, missing: dict[str, str]) -> Iterator[None]:
    """Show the progress of a measure. If it runs out of memory, log and note that, and go on."""
    try:
        with progress.part(f"{inputs.name}: {measure.name}"):
            yield
    except Exception as error:
        explained = memory_error(error, OUT_OF_MEMORY)
        if explained is None:
            raise
        missing[measure.name] = str(explained)
        log.warning("evaluation: %s: %s: %s", inputs.name, measure.name, explained)
