"""Features in a file that is mapped into memory."""

import resource
import signal
from pathlib import Path

import pytest
import torch
from evaluation.helpers_evaluation import evaluate, quick
from hostile_runs import start

from twoview.errors import UserError
from twoview.evaluation.feature_store import collect_features, memory_limit, pixel_features


def parts(features, size=3):
    return lambda: iter(features.split(size))


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The system's temporary folder of this process, which is empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_features_in_a_file_equal_those_in_memory(temporary):
    features = torch.randn(10, 4)
    for memory in (None, "1GB", 0, "0B"):
        assert torch.equal(collect_features(parts(features), (10, 4), memory), features)


def test_a_temporary_file_has_no_entry_in_its_folder(temporary):
    features = torch.randn(10, 4)
    found = collect_features(parts(features), (10, 4), 0)
    assert not list(temporary.iterdir())
    assert torch.equal(found, features)


def test_nothing_is_left_after_an_error(temporary, tmp_path):
    def fails():
        yield torch.zeros(3, 4)
        raise RuntimeError("a damaged image")

    for name in (None, lambda: "name"):
        with pytest.raises(RuntimeError, match="a damaged image"):
            collect_features(fails, (10, 4), 0, str(tmp_path / "cache"), name)
    assert not list(temporary.iterdir())
    assert not list((tmp_path / "cache").iterdir())


def test_features_with_a_name_are_kept_for_further_calls(tmp_path, caplog):
    caplog.set_level("INFO")
    features = torch.randn(10, 4)
    first = collect_features(parts(features), (10, 4), 0, str(tmp_path), lambda: "name")
    assert [file.name for file in tmp_path.iterdir()] == ["name.features"]

    def never():
        raise AssertionError("computed again")

    again = collect_features(never, (10, 4), 0, str(tmp_path), lambda: "name")
    assert "taken from the cache" in caplog.text
    assert torch.equal(first, features)
    assert torch.equal(again, features)


def test_a_kept_file_of_another_size_is_written_again(tmp_path, caplog):
    features = torch.randn(10, 4)
    (tmp_path / "name.features").write_bytes(bytes(50))
    found = collect_features(parts(features), (10, 4), 0, str(tmp_path), lambda: "name")
    assert "cannot be read (the file has another size); computing it again" in caplog.text
    assert torch.equal(found, features)


def test_a_folder_that_cannot_be_written_is_replaced_by_the_temporary_folder(temporary, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    found = collect_features(parts(torch.ones(10, 4)), (10, 4), 0, str(tmp_path / "file"), lambda: "name")
    assert f"eval.cache={tmp_path / 'file'}: cannot be written" in caplog.text
    assert torch.equal(found, torch.ones(10, 4))


def test_features_larger_than_the_disk_are_refused_before_they_are_computed(tmp_path):
    def never():
        raise AssertionError("computed")

    message = (
        r"^eval.memory=2GB: the features need 4,000,000.0 GB, .*2.0 GB .*no room \(.* GB are free\); free disk space"
    )
    with pytest.raises(UserError, match=message):
        collect_features(never, (10**12, 1000), "2GB", str(tmp_path))


def test_a_disk_that_becomes_full_is_one_sentence(tmp_path):
    folder = tmp_path / "features"

    def main():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        for name in (None, lambda: "name"):
            try:
                collect_features(lambda: torch.zeros(1000, 4).split(100), (1000, 4), 0, str(folder), name)
            except UserError as error:
                print(error)

    process = start(folder, main=main)
    code, (out, err) = process.wait(), process.texts()
    assert code == 0, err
    lines = out.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("eval.memory=0: the features need 0.0 GB")
        assert f"the disk of {folder} has no room (File too large); free disk space" in line
    assert not list(folder.iterdir())


def test_pixels_are_shares_of_white():
    pixels = torch.arange(96, dtype=torch.uint8).view(2, 3, 4, 4)
    for memory in (None, 0):
        assert torch.equal(pixel_features(pixels, memory), pixels.flatten(1) / 255)


def test_the_limit_is_a_size():
    assert memory_limit("1.5GB") == 1.5e9
    assert memory_limit(None) > 0
    with pytest.raises(UserError, match="eval.memory=much: give a number of bytes"):
        quick(memory="much")


def test_an_evaluation_with_features_in_files_has_the_same_results(finished, tmp_path):
    folder = tmp_path / "cache"
    settings = {"held": quick(), "mapped": quick(memory=0), "kept": quick(memory=0, cache=str(folder))}
    found = {name: evaluate(tmp_path / name, finished.folder, settings=s)["results"] for name, s in settings.items()}
    assert found["held"] == found["mapped"] == found["kept"]
    # Features of both splits of the trained network and of the random initialization.
    assert len(list(Path(folder).glob("*.features"))) == 4
