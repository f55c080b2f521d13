"""Softmax temperatures that are constant, follow a schedule, or are learned."""

import math

import torch
from torch import Tensor, nn

from twoview.errors import require
from twoview.schedules import cosine_ramp

LARGEST_SCALE = 100.0  # of the logits, as in CLIP


class Temperature(nn.Module):
    """Softmax temperature that changes during the run.

    A learned temperature is ``exp(-log_scale)``. ``log_scale`` is a parameter with its own parameter group without
    weight decay; the temperature stays between 0.01 and 1. CLIP, Radford et al. 2021, arXiv:2103.00020, section 2.5.

    Args:
        start: temperature at the start, > 0.
        end: temperature at the end of the run, > 0, reached along half a cosine; None for a learned temperature.

    Example:
        >>> temperature = Temperature(0.5, end=0.1)
        >>> temperature.move(progress=0.5)
        >>> temperature.value()
        tensor(0.3000)
    """

    def __init__(self, start: float, end: float | None = None) -> None:
        super().__init__()
        self.start, self.end = start, end
        if end is None:
            self.log_scale = nn.Parameter(torch.tensor(-math.log(start)))
        else:
            self.now = nn.Buffer(torch.tensor(float(start)))

    def value(self) -> Tensor:
        """Return the temperature, a scalar."""
        return self.now.clone() if self.end is not None else torch.exp(-self.log_scale)

    @torch.no_grad()
    def move(self, progress: float) -> None:
        """Change the temperature after an optimizer step.

        Args:
            progress: completed share of the run, in [0, 1].
        """
        if self.end is not None:
            self.now.fill_(cosine_ramp(progress, self.start, self.end))
        else:
            self.log_scale.clamp_(0, math.log(LARGEST_SCALE))


def choose_temperature(start: float, end: float | None, learned: bool, fixed: str = "") -> float | Temperature:
    """Return a constant temperature as a number, and any other as a module.

    Args:
        start: knob ``method.temperature``.
        end: knob ``method.temperature_end``; None for no schedule.
        learned: knob ``method.learn_temperature``.
        fixed: what prevents a learned temperature, for the message; empty if nothing does.

    Raises:
        UserError: if a value is out of range, or the knobs exclude each other.
    """
    for knob, value in (("temperature", start), ("temperature_end", end)):
        fits = value is None or (type(value) in (int, float) and 0 < value < math.inf)
        require(fits, f"method.{knob}={value}: must be above 0, such as 0.1 or 0.5")
    both = end is not None and learned
    require(not both, f"method.temperature_end={end}: leave it out, because the temperature is learned")
    fits = not learned or 1 / LARGEST_SCALE <= start <= 1
    require(fits, f"method.temperature={start}: a learned temperature must start between {1 / LARGEST_SCALE} and 1")
    require(not (learned and fixed), f"method.learn_temperature=true: not with {fixed}; use method.temperature_end")
    return Temperature(start, end) if learned or end is not None else start


def current(temperature: float | Temperature) -> float | Tensor:
    """Return the value of a temperature from :func:`choose_temperature`."""
    return temperature.value() if isinstance(temperature, Temperature) else temperature


def logged(temperature: float | Tensor) -> dict[str, Tensor]:
    """Return the entry "temperature" of the logs; empty for a constant temperature."""
    return {"temperature": temperature.detach()} if isinstance(temperature, Tensor) else {}
