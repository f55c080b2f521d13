import math

import pytest

from twoview.schedules import constant, cosine_ramp, scaled_lr, warmup_cosine


def test_warmup_is_linear_and_followed_by_a_cosine():
    assert warmup_cosine(0, 100) == 0
    assert warmup_cosine(2.5, 100) == pytest.approx(0.25)
    assert warmup_cosine(10, 100) == 1
    assert warmup_cosine(10 - 1e-9, 100) == pytest.approx(1)
    for epoch in (20, 55, 99.5):
        assert warmup_cosine(epoch, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi * (epoch - 10) / 90)))
    assert warmup_cosine(100, 100, end=0.1) == pytest.approx(0.1)
    assert warmup_cosine(101, 100) == 0


def test_warmup_takes_at_most_a_fifth_of_a_run():
    assert warmup_cosine(1, 5) == 1
    assert warmup_cosine(0.5, 5) == 0.5


def test_the_factor_stays_at_1_while_the_length_is_unknown():
    assert warmup_cosine(5, math.inf) == 0.5
    assert warmup_cosine(500, math.inf) == 1
    assert constant(3, math.inf) == 1


def test_no_warmup():
    assert warmup_cosine(0, 100, warmup_epochs=0) == 1


def test_cosine_ramp_ends():
    assert cosine_ramp(0, 0.99, 1.0) == 0.99
    assert cosine_ramp(1, 0.99, 1.0) == 1.0
    assert cosine_ramp(0.5, 0, 1) == pytest.approx(0.5)


def test_learning_rate_scaling():
    assert scaled_lr(0.3, 4096, "linear") == pytest.approx(4.8)
    # SimCLR uses 0.075 sqrt(batch), which is 4.8 at 4096 as well.
    assert scaled_lr(0.075 * 16, 4096, "sqrt") == pytest.approx(4.8)
    assert scaled_lr(0.3, 4096, "none") == 0.3
