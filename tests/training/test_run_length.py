"""Epochs, steps and time; accumulation."""

import math
import re
from dataclasses import replace
from functools import partial

import pytest
from short_runs import CPU, learning_rates, pretrain

from twoview.errors import UserError
from twoview.loading import read_checkpoint
from twoview.methods import MoCo, SimCLR
from twoview.schedules import warmup_cosine


def test_time_becomes_a_number_of_steps(tmp_path, caplog):
    caplog.set_level("INFO")
    trainer = replace(CPU, max_epochs=None, max_time="5s", check_every=0, log_every=1)
    pretrain(tmp_path, trainer=trainer, settings=None)
    content = read_checkpoint(tmp_path)
    assert content["twoview"]["total_steps"] == content["global_step"] < math.inf
    assert "the run has" in caplog.text
    rates = learning_rates(tmp_path)
    assert rates[-1] < 0.1 * max(rates)


def test_epochs_may_end_a_run_before_its_time(tmp_path):
    pretrain(tmp_path, trainer=replace(CPU, max_time="1h"), settings=None)
    assert read_checkpoint(tmp_path)["twoview"]["total_steps"] == 20
    rates = learning_rates(tmp_path)
    assert rates[-1] < 0.2 * max(rates)


def test_a_run_may_have_a_number_of_steps(tmp_path):
    report = pretrain(tmp_path, trainer=replace(CPU, max_epochs=None, max_steps=7, log_every=1), settings=None)
    assert report["training"]["steps"] == 7
    assert learning_rates(tmp_path)[-1] < 0.2 * max(learning_rates(tmp_path))


@pytest.mark.parametrize(
    ("length", "warmup", "message"),
    [
        ({"max_epochs": 4}, 4.5, "scheduler.warmup_epochs=4.5: longer than the run of trainer.max_epochs=4;"),
        ({"max_epochs": None, "max_steps": 15}, 2, r"longer than the run of trainer.max_steps=15 \(1.5 epochs\)"),
        ({"max_epochs": 4, "max_steps": 15}, 2, "longer than the run of trainer.max_steps=15"),
        ({"max_epochs": 4, "max_time": "1h"}, 5, "longer than the run of trainer.max_epochs=4"),
    ],
)
def test_a_warmup_longer_than_the_run_is_refused(length, warmup, message, tmp_path):
    schedule = partial(warmup_cosine, warmup_epochs=warmup)
    with pytest.raises(UserError, match=message):
        pretrain(tmp_path, trainer=replace(CPU, **length), settings=None, schedule=schedule)


def test_a_warmup_longer_than_the_time_is_warned_about_once(tmp_path, caplog):
    trainer = replace(CPU, max_epochs=None, max_time="2s", check_every=0, log_every=1)
    pretrain(tmp_path, trainer=trainer, settings=None, schedule=partial(warmup_cosine, warmup_epochs=1e4))
    (warning,) = (record.getMessage() for record in caplog.records if "warmup" in record.getMessage())
    assert re.match(
        r"scheduler.warmup_epochs=10000: longer than the run of [\d.]+ epochs that trainer.max_time", warning
    )
    assert max(learning_rates(tmp_path)) > 1e-3  # a fifth of the run, not 10,000 epochs


def test_the_learning_rate_follows_the_schedule(finished):
    rates = learning_rates(finished.folder)
    assert max(rates) <= 3e-3
    assert rates[-1] < 0.2 * max(rates)
    assert rates[0] < max(rates)


def test_accumulation_updates_once_for_several_batches(tmp_path):
    class Counting(SimCLR):
        updates = batches = 0

        def after_update(self, progress):
            Counting.updates += 1
            Counting.progress = progress

        def after_batch(self, step):
            Counting.batches += 1

    report = pretrain(tmp_path, method=Counting, trainer=replace(CPU, accumulate=2), settings=None)
    assert (Counting.updates, Counting.batches) == (report["training"]["steps"], 20) == (10, 20)
    assert Counting.progress == 1


def moco(backbone, head):
    return MoCo(backbone, head, temperature=0.2, queue_size=300)


def test_the_key_encoder_is_updated_once_per_optimizer_step(tmp_path, monkeypatch):
    updates = []
    monkeypatch.setattr(MoCo, "after_update", lambda self, progress: updates.append(progress))
    report = pretrain(tmp_path, method=moco, trainer=replace(CPU, accumulate=2), settings=None)
    # A step is skipped if one of its batches found no negatives.
    assert report["training"]["batches_without_step"] == 1
    assert len(updates) == report["training"]["steps"] == 9
    assert updates[-1] == 1.0
