"""The harness itself: it sees a traceback, a hang, and a file written outside."""

import time
from pathlib import Path

from hostile_runs import run


def test_a_good_command_ends_with_0(tmp_path):
    found = run(
        tmp_path / "work",
        "data=fake",
        "data.images=64",
        "data.batch_size=32",
        "trainer.max_steps=1",
        "backbone.name=test_resnet",
        "data.image_size=16",
        "eval.baselines=false",
        "eval.parts=[knn]",
    )
    assert (found.code, found.outside) == (0, []), found
    assert "report: " in found.out


def test_a_refusal_a_hang_and_a_write_outside_are_seen(tmp_path):
    assert run(tmp_path / "a", "seed=-1").refused("seed=-1")
    assert not run(tmp_path / "b", "seed=-1").refused("another sentence")
    assert run(tmp_path / "c", limit=0.5, prepare=lambda: time.sleep(9)).code == "time limit"
    planted = run(tmp_path / "d", "seed=-1", prepare=lambda: Path("planted").write_text("x"))
    assert [Path(name).name for name in planted.outside] == ["planted"]
    assert not planted.refused()

    def broken():
        raise RuntimeError("planted")

    assert "Traceback" in run(tmp_path / "e", prepare=broken).err
