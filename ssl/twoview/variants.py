"""Variants and options of the contrastive losses: their names, default values and ranges."""

import math
from typing import Any, Literal, TypedDict

Variant = Literal["infonce", "dcl", "dclw", "debiased", "hard"]
# Parameters of each variant and their default values; twoview.losses has the formulas.
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
    "mask_above": "must lie between 0 and 1, such as 0.9",
}


class LossOptions(TypedDict, total=False):
    """Options of the losses; None for the default value. The variants are those of :mod:`twoview.losses`.

    Attributes:
        sigma: width of the weights of "dclw", > 0; default 0.5.
        tau_plus: assumed share of false negatives for "debiased" and "hard", in [0, 1); default 0.1.
        beta: concentration on hard negatives for "hard", >= 0; default 1.
        mask_above: cosine similarity in (0, 1) above which a negative is taken for a false one and is left out; default
            no limit. False-negative elimination, Huynh et al. 2022, arXiv:2011.11765, section 3.2.
        products: "bf16" to multiply the embeddings as bf16 numbers; default their own precision. A similarity changes
            by up to 0.012, by about 0.003 for embeddings of width 128, and the gradient accordingly.
    """

    sigma: float | None
    tau_plus: float | None
    beta: float | None
    mask_above: float | None
    products: Literal["bf16"] | None


def check_loss_arguments(
    temperature: Any,
    variant: str = "infonce",
    sigma: float | None = None,
    tau_plus: float | None = None,
    beta: float | None = None,
    mask_above: float | None = None,
    products: str | None = None,
) -> dict[str, Any]:
    """Check the range of the options of the losses.

    Args:
        temperature: softmax temperature; the range of a tensor is not checked, which would wait for its device.
        variant: form of the loss.
        sigma: see :mod:`twoview.losses`, as for all following options.
        tau_plus: share of false negatives.
        beta: concentration on hard negatives.
        mask_above: similarity of false negatives.
        products: precision of products.

    Returns:
        ``mask_above``, ``products``, and all parameters of the variant, those that are None by their default values.

    Raises:
        ValueError: if an argument is out of range or has no effect; the message is "NAME=VALUE: ADVICE".

    Example:
        >>> check_loss_arguments(temperature=0.2, variant="hard", tau_plus=0.05)
        {'tau_plus': 0.05, 'beta': 1.0, 'mask_above': None, 'products': None}
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant}: choose one of {', '.join(VARIANTS)}")
    if products not in (None, "bf16"):
        raise ValueError(f"products={products}: choose bf16, or leave it out")
    given = {k: v for k, v in (("sigma", sigma), ("tau_plus", tau_plus), ("beta", beta)) if v is not None}
    numbers = given if mask_above is None else {**given, "mask_above": mask_above}
    if getattr(temperature, "requires_grad", False) and variant in ("debiased", "hard"):
        raise ValueError(f"variant={variant}: its bound has no gradient by the temperature, which cannot be learned")
    if not hasattr(temperature, "device"):
        numbers = {"temperature": temperature, **numbers}
    for name, value in numbers.items():
        in_range = not isinstance(value, str) and 0 <= value < (1 if name in ("tau_plus", "mask_above") else math.inf)
        if not in_range or (value == 0 and name in ("temperature", "sigma", "mask_above")):
            raise ValueError(f"{name}={value}: {_ADVICE[name]}")
    for name in (name for name in given if name not in VARIANTS[variant]):
        owners = " or ".join(owner for owner, parameters in VARIANTS.items() if name in parameters)
        raise ValueError(
            f"{name}={given[name]}: has no effect with variant={variant}, only with {owners}; leave it out"
        )
    return VARIANTS[variant] | given | {"mask_above": mask_above, "products": products}
