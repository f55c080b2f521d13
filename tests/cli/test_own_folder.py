"""``--config-dir``: a method of the user's own, in a folder outside of the package, is used by its name."""

import json
import sys

import pytest
from hostile_runs import run

METHOD = """
from twoview.methods import SimCLR


class Mine(SimCLR):
    def __init__(self, backbone, head, scale=1.0):
        super().__init__(backbone, head, temperature=0.2)
        self.scale = scale

    def loss(self, encoded, ids=None, labels=None):
        step = super().loss(encoded, ids, labels)
        step.loss = self.scale * step.loss
        return step
"""
SHORT = ["backbone.name=test_resnet", "data.image_size=10", "trainer.max_steps=2", "eval.baselines=false"]


@pytest.fixture
def own(tmp_path):
    """Runs a command line where ``mine.py`` can be imported; the folder ``own, 1`` holds ``method/mine.yaml``."""
    folder = tmp_path / "work" / "own, 1"
    (folder / "method").mkdir(parents=True)
    (folder / "mine_for_tests.py").write_text(METHOD)
    knobs = "_target_: mine_for_tests.Mine\n_partial_: true\nscale: 1.0\n"
    (folder / "method" / "mine.yaml").write_text(knobs)
    return lambda *words: run(folder.parent, *words, limit=120, prepare=lambda: sys.path.insert(0, str(folder)))


def test_it_is_trained_and_resumed_by_its_name(own, tmp_path):
    outcome = own(
        "--config-dir=own, 1",
        *SHORT,
        "method=mine",
        "method.scale=0.5",
        "hydra.run.dir=runs/a",
        "eval.parts=[geometry]",
    )
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "work/runs/a/report.json").read_text())["method"] == "Mine"
    outcome = own("resume=runs/a", "--config-dir", "own, 1", "trainer.max_steps=3", "resume.exact=false")
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "work/runs/a/report.json").read_text())["training"]["steps"] == 3


def test_it_is_part_of_a_sweep(own, tmp_path):
    outcome = own("-m", "--config-dir", "own, 1", "method=mine,simclr", *SHORT, "eval.parts=[linear]", "eval.l2=[0.1]")
    assert outcome.code == 0, outcome.err
    reports = [json.loads(file.read_text()) for file in tmp_path.glob("work/sweeps/*/report.json")]
    assert sorted(report["method"] for report in reports) == ["Mine", "SimCLR"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config-dir=own, 1", "method=mine", "method.scal=2"], "did you mean 'method.scale'?"),
        (["--config-dir=own, 1", "method=mien"], "did you mean 'mine'?"),
        (["--config-dir=nowhere", "method=mine"], "--config-dir=nowhere: there is no such folder"),
        (["method=mine"], "there is no method 'mine'"),
    ],
)
def test_mistakes_are_one_sentence(words, message, own):
    assert own(*words).refused(message)
