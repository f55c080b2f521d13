"""Variants of the contrastive losses: their names, parameters and default values."""

import math
from typing import Literal, TypedDict

Variant = Literal["infonce", "dcl", "dclw", "debiased", "hard"]
# Parameters of each variant and their default values; twoview.losses.info_nce_rows has the formulas.
VARIANTS: dict[str, dict[str, float]] = {
    "infonce": {},
    "dcl": {},
    "dclw": {"sigma": 0.5},
    "debiased": {"tau_plus": 0.1},
    "hard": {"tau_plus": 0.1, "beta": 1.0},
}

_ADVICE = {
    "temperature": "must be above 0, such as 0.1 or 0.5",
    "sigma": "must be above 0, such as 0.5",
    "tau_plus": "must be at least 0 and below 1, such as 0.1",
    "beta": "must be at least 0, such as 1.0",
}


class VariantParameters(TypedDict, total=False):
    """Parameters of the loss variants; None for the default value."""

    sigma: float | None
    tau_plus: float | None
    beta: float | None


def check_loss_arguments(
    temperature: float,
    variant: str = "infonce",
    sigma: float | None = None,
    tau_plus: float | None = None,
    beta: float | None = None,
) -> dict[str, float]:
    """Check the range of the parameters of :func:`twoview.losses.info_nce_rows`.

    Returns:
        All parameters of the variant, those that are None by their default values.

    Raises:
        ValueError: if an argument is out of range or has no effect; the message is "NAME=VALUE: ADVICE".

    Example:
        >>> check_loss_arguments(temperature=0.2, variant="hard", tau_plus=0.05)
        {'tau_plus': 0.05, 'beta': 1.0}
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant}: choose one of {', '.join(VARIANTS)}")
    given = {k: v for k, v in (("sigma", sigma), ("tau_plus", tau_plus), ("beta", beta)) if v is not None}
    for name, value in {"temperature": temperature, **given}.items():
        in_range = not isinstance(value, str) and 0 <= value < (1 if name == "tau_plus" else math.inf)
        if not in_range or (value == 0 and name in ("temperature", "sigma")):
            raise ValueError(f"{name}={value}: {_ADVICE[name]}")
    for name in (name for name in given if name not in VARIANTS[variant]):
        owners = " or ".join(owner for owner, parameters in VARIANTS.items() if name in parameters)
        raise ValueError(
            f"{name}={given[name]}: has no effect with variant={variant}, only with {owners}; leave it out"
        )
    return VARIANTS[variant] | given
