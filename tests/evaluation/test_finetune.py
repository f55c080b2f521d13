import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from short_runs import short_data

from twoview import runs
from twoview.augment import TwoViews
from twoview.errors import UserError
from twoview.evaluation import FineTuning
from twoview.evaluation.invariance import IDENTITY
from twoview.optim import OptimizerSettings
from twoview.schedules import warmup_cosine


def tuned(finished, run_dir, warmup_epochs=None, **changes):
    short = {"epochs": 3, "least_steps": 0, "batch_size": 32, "learning_rates": (1e-5, 3e-3), "label_share": 0.2}
    optimizer = OptimizerSettings(torch.optim.AdamW, lr=1.0)
    settings = FineTuning(**(short | changes))
    augment, schedule = partial(TwoViews, **IDENTITY), partial(warmup_cosine, warmup_epochs=warmup_epochs)
    return runs.finetune(finished.folder, short_data, augment, optimizer, schedule, settings, run_dir=run_dir)


def test_fine_tuning_uses_a_share_of_the_labels_and_chooses_on_held_out_ones(finished, tmp_path):
    before = (finished.folder / "checkpoints" / "last.ckpt").read_bytes()
    report = tuned(finished, tmp_path / "a")
    assert (finished.folder / "checkpoints" / "last.ckpt").read_bytes() == before
    assert report == json.loads((tmp_path / "a" / "report.json").read_text())
    assert set(report["results"]) == {"fine-tuned", "supervised"}
    assert report["protocol"]["labels"] == pytest.approx(0.2 * 1347, abs=10)
    own = report["results"]["fine-tuned"]["finetune"]
    assert own["lr"] == 3e-3  # the other one learns nothing in three epochs
    assert own["test_top1"] > 0.5
    assert report["figures"] == {"val/finetune_top1": own["val_top1"]}
    predictions = load_file(tmp_path / "a" / "predictions.safetensors")
    assert float((predictions["finetune"] == predictions["labels"]).double().mean()) == pytest.approx(own["test_top1"])
    again = tuned(finished, tmp_path / "b", supervised=False)
    assert again["results"] == {"fine-tuned": report["results"]["fine-tuned"]}


def test_a_warmup_longer_than_fine_tuning_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match="warmup_epochs=4: longer than the run of 3 epochs of fine-tuning"):
        tuned(finished, tmp_path, warmup_epochs=4)


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"label_share": 0.0}, "label_share=0.0"),
        ({"label_share": 1.5}, "label_share=1.5"),
        ({"holdout": 1.0}, "holdout=1.0"),
        ({"epochs": 0}, "epochs=0"),
        ({"least_steps": -1}, "least_steps=-1"),
        ({"batch_size": 1}, "batch_size=1"),
        ({"learning_rates": ()}, r"learning_rates=\[\]"),
        ({"learning_rates": (-1.0,)}, r"learning_rates=\[-1.0\]"),
    ],
)
def test_impossible_fine_tuning_is_refused(knobs, named):
    with pytest.raises(UserError, match=f"finetune.{named}"):
        FineTuning(**knobs)
