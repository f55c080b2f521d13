from dataclasses import FrozenInstanceError

import pytest

from twoview.errors import UserError
from twoview.training import TrainerSettings


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"max_epochs": 0}, "trainer.max_epochs=0"),
        ({"max_epochs": 1.5}, "trainer.max_epochs=1.5"),
        ({"max_epochs": None}, "trainer.max_time=null"),
        ({"max_steps": 0}, "trainer.max_steps=0"),
        ({"max_epochs": None, "max_time": "soon"}, "trainer.max_time=soon"),
        ({"max_epochs": None, "max_time": "-5m"}, "trainer.max_time=-5m"),
        ({"max_epochs": None, "max_time": "infh"}, "trainer.max_time=infh"),
        ({"max_time": ""}, "trainer.max_time="),
        ({"accelerator": "tpu"}, "trainer.accelerator=tpu"),
        ({"devices": 0}, "trainer.devices=0"),
        ({"accumulate": 0}, "trainer.accumulate=0"),
        ({"skip_nonfinite": -1}, "trainer.skip_nonfinite=-1"),
        ({"clip": "abc"}, "trainer.clip=abc"),
        ({"clip": 0}, "trainer.clip=0"),
        ({"compile": "yes"}, "trainer.compile=yes: choose auto, true or false"),
        ({"log_every": 0}, "trainer.log_every=0"),
        ({"check_every": -1}, "trainer.check_every=-1"),
    ],
)
def test_impossible_settings_are_refused(knobs, named):
    with pytest.raises(UserError, match=named):
        TrainerSettings(**knobs)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("15m", 900), ("1.5h", 5400), ("01:30:05", 5405)])
def test_times_are_read(text, seconds):
    assert TrainerSettings(max_epochs=None, max_time=text).seconds == seconds


def test_one_limit_is_enough():
    assert TrainerSettings(max_epochs=None, max_steps=3).max_steps == 3
    assert TrainerSettings().seconds is None
    assert TrainerSettings(check_every=0, clip=0.5).clip == 0.5


def test_settings_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        TrainerSettings().devices = 2
