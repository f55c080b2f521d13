"""Values of knobs of the data that mean nothing: one sentence each, before any work."""

import io

import numpy as np
import pytest
from hostile_runs import SHORT, run
from PIL import Image

from twoview.data import parquet

REFUSED = {
    "data.memory=-1": "data.memory=-1: give a number of bytes",
    "data.memory=much": "data.memory=much",
    "data.cache=true": "data.cache=True: give auto, false or a folder",
    "data.cache=''": "data.cache=: give auto, false or a folder",
    "data.cache=null": "data.cache=null",
    "data.num_workers=-1": "data.num_workers=-1: give a whole number, at least 0",
    "data.num_workers=1.5": "data.num_workers=1.5",
    "data.store_size=big": "data.store_size=big",
    "data.store_size=100000": "data.store_size=100000: must be at most",
    "data.store_size=-4": "data.store_size=-4",
    "data.image_size=4": "data.image_size=4",
    "data.channels=0": "channels=0",
    "data.root=[]": "data.root=[]: give a path",
    "data.root=''": "data.root=''",
    "data.max_broken=2": "data.max_broken=2: give a share between 0 and 1",
    "data.max_broken=-1": "data.max_broken=-1",
    "data.min_crop_area=9": "data.min_crop_area=9",
    "data.batch_size=0": "data.batch_size=0",
    "data.batch_size=1000": "data.batch_size=1000: folder has 12 images to learn from",
    "data.eval_root=images": "data.eval_root=images: the same as data.root",
    "data.eval_root=./images/../images/": "the same as data.root",
    "data.eval_root=[images]": "the same as data.root",
    "data.root=nowhere": "there is no such folder",
    "data.root=images/00.png": "is neither a folder nor a .txt or .csv list of files; give its folder",
    "data.root=[images,Blüten]": 'quote each path of a list, as in data.root=["A","B"]',
    "data.root=latin1.txt": "save it as UTF-8",
    "data.root=latin1.csv": "save it as UTF-8",
    "data.root=long.csv": "field larger than field limit",
    "data.root=empty.csv": "the first line must name the columns",
    "data.root=empty.txt": "the list is empty",
    "data.root=gone.txt": "cannot be read",
}


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    (folder / "images").mkdir(parents=True)
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i:02}.png")
    (folder / "latin1.txt").write_bytes("été.png\n".encode("latin-1"))
    (folder / "latin1.csv").write_bytes("path,label\nété.png,1\n".encode("latin-1"))
    (folder / "long.csv").write_text(f"path,label\n{'x' * 200_000},1\n")
    (folder / "empty.csv").write_text("")
    (folder / "empty.txt").write_text("\n\n")
    (folder / "gone.txt").write_text("gone.png\n")
    return folder


@pytest.mark.parametrize("knob", REFUSED)
def test_nonsense_is_refused_in_one_sentence(work, knob):
    found = run(
        work, *SHORT, "data=folder", *([] if "root=" in knob and "eval" not in knob else ["data.root=images"]), knob
    )
    assert found.refused(REFUSED[knob]), found


@pytest.mark.parametrize("knob", ["data.images=0", "data.images=1", "data.classes=1", "data.batch_size=9999"])
def test_nonsense_of_generated_data_is_refused(tmp_path, knob):
    assert run(tmp_path / "work", *SHORT, "data=fake", knob).refused(knob)


@pytest.mark.parametrize("memory", ["1GB", "500MB", "2.5gb", "1GiB", "1e9", "0"])
def test_sizes_with_units_are_accepted(work, memory):
    found = run(work, *SHORT, "data=folder", "data.root=images", f"data.memory={memory}", limit=60)
    assert found.code == 0, found


def test_the_batch_is_all_images_if_there_are_few(work):
    found = run(work, *SHORT, "data=folder", "data.root=images", limit=60)
    assert found.code == 0, found
    assert found.out.count("data.batch_size is 12, the number of images") == 1


def test_a_warmup_that_an_experiment_sets_is_compared_with_the_run(work):
    found = run(work, "experiment=cifar10_cpu", "data.root=images", "data.batch_size=4", "trainer.max_steps=2")
    assert found.refused("scheduler.warmup_epochs=1: longer than the run of trainer.max_steps=2 (0.667 epochs)"), found


def test_one_picture_is_too_few(work):
    for i in range(1, 12):
        (work / "images" / f"{i:02}.png").unlink()
    assert run(work, *SHORT, "data=folder", "data.root=images").refused("contrastive learning needs at least 2")


def test_a_method_that_needs_labels_says_so(work):
    found = run(work, *SHORT, "data=folder", "data.root=images", "method=supcon")
    assert found.refused("SupCon uses labels"), found


METADATA = [
    b"",
    b"[1]",
    b"{",
    b'{"info": 1}',
    b'{"info": {"features": {"label": {"names": 3}}}}',
    b"[" * 99_999,
    b"\xff",
]


@pytest.mark.parametrize("metadata", METADATA, ids=range(len(METADATA)))
def test_odd_metadata_of_a_table_are_no_class_names(tmp_path, metadata):
    pyarrow = pytest.importorskip("pyarrow")
    parquet_files = pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    Image.new("RGB", (20, 20)).save(file, "PNG")
    rows = {"image": [{"bytes": file.getvalue(), "path": "a"}] * 12, "label": [0, 1] * 6}
    table = pyarrow.table(rows).replace_schema_metadata({"huggingface": metadata})
    parquet_files.write_table(table, tmp_path / "t.parquet")
    assert parquet(str(tmp_path / "t.parquet"), image_size=16, num_workers=0).classes == ["0", "1"]
