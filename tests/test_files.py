"""Files are replaced whole or not at all."""

import os
import subprocess
import sys

import pytest

from twoview.files import remove_unfinished, write_atomically


@pytest.mark.parametrize(
    ("content", "written"),
    [
        (b"\x00\xff\r\n", b"\x00\xff\r\n"),
        ("gr\u00fc\u00df\n", "gr\u00fc\u00df\n".encode()),
        ("\udcff", b"\\udcff"),  # part of a file name that is not UTF-8
        (lambda file: file.write(b"by a function"), b"by a function"),
    ],
)
def test_bytes_text_and_functions_are_written(content, written, tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    write_atomically(path, content)
    assert path.read_bytes() == written
    write_atomically(path, b"replaced")
    assert path.read_bytes() == b"replaced"
    assert os.listdir(path.parent) == ["file"]


def test_a_failing_writer_leaves_the_old_file(tmp_path):
    def fails(file):
        file.write(b"half of")
        raise RuntimeError("disk full")

    path = tmp_path / "file"
    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, fails)
    assert os.listdir(tmp_path) == []
    path.write_text("old")
    (tmp_path / "previous").write_text("older")
    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, fails, previous=tmp_path / "previous")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"file": "old", "previous": "older"}


def test_the_previous_file_is_renamed(tmp_path):
    path, previous = tmp_path / "last", tmp_path / "previous"
    write_atomically(path, "first", previous)
    assert not previous.exists()
    write_atomically(path, "second", previous)
    write_atomically(path, "third", previous)
    assert (path.read_text(), previous.read_text()) == ("third", "second")
    assert sorted(os.listdir(tmp_path)) == ["last", "previous"]


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        write_atomically(tmp_path / "file" / "below", "text")
    assert (tmp_path / "file").read_text() == ""


def test_only_what_dead_processes_left_for_the_same_path_is_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    running = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    dead = [f"a [1].{ended.pid}.tmp", f"a [1].{running.pid}.tmp"]
    others = [f"b.{ended.pid}.tmp", f"a 1.{ended.pid}.tmp", "a [1].tmp", "a [1].x.tmp", f"a [1].{10**30}.tmp"]
    others += [f"a [1].{ended.pid}.tmp.old", f"x a [1].{ended.pid}.tmp"]
    for name in (*dead, *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("text")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"a [1].{ended.pid + 10**7}.tmp").symlink_to(tmp_path / "elsewhere")  # above the largest id
    remove_unfinished(tmp_path / "a [1]")
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left == {"elsewhere", f"a [1].{ended.pid + 10**7}.tmp", dead[1], *others}
    running.communicate(b"\n")
    (tmp_path / f"c.{ended.pid}.tmp").write_text("part of a file")
    remove_unfinished(tmp_path / "a [1]")
    remove_unfinished(tmp_path / "c")
    remove_unfinished(tmp_path / "no folder" / "c")
    assert {entry.name for entry in tmp_path.iterdir()} == left - {dead[1]}
