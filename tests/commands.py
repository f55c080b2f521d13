"""The command line as a subprocess, as a user starts it; ``hostile_runs`` starts it in a second, by forking."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHORT = [
    "backbone.name=test_resnet",
    "backbone.stem=small_stride2",
    "data.image_size=10",
    "trainer.max_epochs=3",
    "trainer.check_every=1",
]
QUICK = ["eval.baselines=false", "eval.l2=[0.01]", "eval.k=[5]", "eval.temperature=[0.07]"]


def environment():
    """This environment without a network: nothing can be downloaded."""
    proxies = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    return {**os.environ, **proxies, "COLUMNS": "200", "WANDB_MODE": "disabled"}


def train(*arguments, cwd=ROOT, timeout=120):
    """``python train.py`` with these arguments, to its end."""
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False, env=environment()
    )


def short(*arguments):
    """These arguments, and those of a pretraining that takes seconds for the knobs that are not given."""
    given = {argument.partition("=")[0] for argument in arguments}
    return [*(knob for knob in [*SHORT, *QUICK] if knob.partition("=")[0] not in given), *arguments]
