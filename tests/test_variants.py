import pytest
import torch

from twoview.losses import nt_xent


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"sigma": 0.3}, "sigma=0.3: has no effect with variant=infonce, only with dclw"),
        (
            {"variant": "dcl", "tau_plus": 0.1},
            "tau_plus=0.1: has no effect with variant=dcl, only with debiased or hard",
        ),
        ({"variant": "debiased", "beta": 1.0}, "beta=1.0: has no effect with variant=debiased, only with hard"),
        ({"variant": "hard", "beta": "much"}, "beta=much: must be at least 0"),
    ],
)
def test_a_parameter_of_another_variant_is_refused(knobs, named):
    with pytest.raises(ValueError, match=named):
        nt_xent(torch.eye(2), torch.eye(2), 0.2, **knobs)
