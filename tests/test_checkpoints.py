import pytest
import torch

from twoview.checkpoints import AtomicCheckpointIO, read_checkpoint, rebuild
from twoview.errors import UserError


class Harmful:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path):
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, path)

    class FullDisk:
        def __reduce__(self):
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="could not be written .*No space left.*what was saved before is as it was"):
        io.save_checkpoint({"large": torch.zeros(10), "then": FullDisk()}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_is_no_checkpoint_is_refused_and_never_executed(tmp_path, capsys):
    torch.save({"twoview": Harmful()}, tmp_path / "harmful.ckpt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "foreign.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "empty").mkdir()
    for name in ("harmful.ckpt", "foreign.ckpt", "text.ckpt", "missing.ckpt", "empty"):
        with pytest.raises(UserError, match=f"checkpoint=.*{name}"):
            read_checkpoint(tmp_path / name)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(finished, tmp_path, share):
    whole = (finished.folder / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"cut.ckpt: cannot be read"):
        read_checkpoint(tmp_path / "cut.ckpt")


def test_weights_of_another_architecture_are_refused(finished):
    content = read_checkpoint(finished.folder)
    content["twoview"]["backbone"]["name"] = "test_vit"
    content["twoview"]["backbone"]["stem"] = "auto"
    with pytest.raises(UserError, match="do not fit test_vit"):
        rebuild(content)
