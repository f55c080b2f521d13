import pytest
import torch

from twoview.errors import UserError
from twoview.training.checkpoints import AtomicCheckpointIO, newest


def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path):
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, path)

    class FullDisk:
        def __reduce__(self):
            raise OSError(28, "No space left on device")

    with pytest.raises(
        UserError, match="could not be written .*No space left.*earlier checkpoints are unchanged.*continue with"
    ):
        io.save_checkpoint({"large": torch.zeros(10), "then": FullDisk()}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_the_checkpoint_before_the_last_is_kept(tmp_path):
    folder, io = tmp_path / "checkpoints", AtomicCheckpointIO()
    assert newest(tmp_path) is None
    for step in range(3):
        io.save_checkpoint({"twoview": {"step": step}, "state_dict": {}}, folder / "last.ckpt")
        io.save_checkpoint({"twoview": {"step": step}, "state_dict": {}}, folder / "best.ckpt")
    assert sorted(p.name for p in folder.iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    assert newest(tmp_path)["twoview"] == {"step": 2}
    (folder / "last.ckpt").unlink()
    assert newest(tmp_path)["twoview"] == {"step": 1}
    assert newest(tmp_path)["path"] == str(folder / "previous.ckpt")


def test_a_run_leaves_its_last_and_its_best_checkpoint(finished):
    assert {"last.ckpt", "best.ckpt", "previous.ckpt"} == {p.name for p in (finished.folder / "checkpoints").iterdir()}
