"""The tasks index and search, on image files."""

import csv
import json
import sys
from dataclasses import asdict
from types import SimpleNamespace

import hydra
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkpoints import save_checkpoint
from commands import ROOT
from hostile_runs import run
from PIL import Image

import twoview
from twoview.cli.overrides import quoted
from twoview.errors import UserError
from twoview.tools import Index
from twoview.tools.searching import build_index, search
from twoview.torch_files import hash_tensors


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images with unusual names, one of them broken; a checkpoint, embeddings of the others, and an index of these."""
    folder = tmp_path_factory.mktemp("my photos")
    (folder / "Bilder").mkdir()
    rng, files = np.random.default_rng(0), []
    for i in range(12):
        files.append(folder / "Bilder" / f"=Foto {i} (ü), 'a'.png")
        small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        small.resize((60, 50), Image.Resampling.BICUBIC).save(files[-1])
    (folder / "Bilder" / "broken.png").write_bytes(files[0].read_bytes()[:60])
    checkpoint = save_checkpoint(folder / "net.ckpt", 0)
    encoder = twoview.load(checkpoint)
    vectors = encoder.feature_matrix([Image.open(file) for file in files])
    known = {
        "twoview.checkpoint": hash_tensors(encoder.network.state_dict()),
        "twoview.card": json.dumps(asdict(encoder.card)),
        "twoview.source": str(checkpoint),
    }
    columns = {
        "path": [str(file) for file in files],
        "index": pa.array(range(12), pa.int64()),
        "label": ["\x1b[31mred", *["[b]"] * 11],
        "vector": pa.FixedSizeListArray.from_arrays(vectors.flatten().numpy(), vectors.shape[1]),
    }
    embeddings = folder / "photos.parquet"
    pq.write_table(pa.table(columns).replace_schema_metadata(known), embeddings)
    index = build_index(embeddings, folder / "photos.index")
    return SimpleNamespace(folder=folder, files=files, checkpoint=checkpoint, embeddings=embeddings, index=index)


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_each_image_of_a_folder_finds_itself(photos, tmp_path, capsys, caplog):
    rows = rows_of(search(photos.index, photos.folder / "Bilder", k=3, run_dir=tmp_path))
    assert len(rows) == 12 * 3
    first = [row for row in rows if row["rank"] == "1"]
    assert sorted(row["path"] for row in first) == sorted(str(file) for file in photos.files)
    assert all(row["query"] == row["path"] and float(row["similarity"]) > 0.9999 for row in first)
    assert "broken.png cannot be read" in caplog.text
    shown = capsys.readouterr().out
    assert "Foto 3" in shown
    assert "\x1b[31mred" not in shown
    assert "[b]" in shown


def test_embeddings_are_searched_as_an_index_is(photos, tmp_path):
    found = [
        rows_of(search(source, photos.files[4], k=5, run_dir=tmp_path / name))
        for name, source in (("a", photos.index), ("b", photos.embeddings))
    ]
    assert found[0] == found[1]
    assert found[0][0]["id"] == "4"
    assert len(found[0]) == 5


def test_another_checkpoint_is_refused(photos, tmp_path):
    other = save_checkpoint(tmp_path / "other.ckpt", 1)
    with pytest.raises(UserError, match=r"checkpoint=.*other\.ckpt: its weights have the hash"):
        search(photos.index, photos.files[0], checkpoint=other, run_dir=tmp_path)
    assert not (tmp_path / "search.csv").exists()


def test_nothing_is_downloaded_for_the_network_that_an_index_names(photos, tmp_path):
    index = Index.load(photos.index)
    index.source = "timm:resnet18"
    index.save(tmp_path / "foreign.index")
    with pytest.raises(UserError, match="names the checkpoint timm:resnet18, which is no file here; give checkpoint="):
        search(tmp_path / "foreign.index", photos.files[0], run_dir=tmp_path)
    assert search(tmp_path / "foreign.index", photos.files[0], checkpoint=photos.checkpoint, run_dir=tmp_path).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"query": "nothing.jpg"}, "query=nothing.jpg: there is no such image"),
        ({"query": "Bilder/broken.png"}, "cannot be read as an image"),
        ({"query": "empty"}, "no images in this folder"),
        ({"index": "nothing.index"}, "there is no such file"),
        ({"index": "net.ckpt"}, "cannot be read as an index"),
        ({"checkpoint": "nothing"}, "there is no checkpoint"),
        ({"checkpoint": "random:test_resnet"}, "checkpoint=random:test_resnet: give the network of the index"),
        ({"index": "Bilder"}, "index=Bilder: there is no such file; give one that task=index or task=embed"),
    ],
)
def test_mistakes_are_one_sentence(changes, message, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos.folder)
    (photos.folder / "empty").mkdir(exist_ok=True)
    with pytest.raises(UserError, match=message):
        search(**({"index": photos.index, "query": photos.files[0], "run_dir": tmp_path} | changes))


def test_an_index_replaces_an_index_and_nothing_else(photos, tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    places = [(tmp_path, "is not an index"), (tmp_path / "thesis.txt", "is not an index")]
    places += [(tmp_path / "file" / "a.index", "cannot be created")]
    for place, message in places:
        with pytest.raises(UserError, match=message):
            build_index(photos.embeddings, place)
    with pytest.raises(UserError, match="there is no such file"):
        build_index(tmp_path / "none.parquet", tmp_path / "a.index")
    with pytest.raises(UserError, match=r"embeddings=.*photos\.index: cannot be read as Parquet"):
        build_index(photos.index, tmp_path / "a.index")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pyarrow.parquet", None)
        with pytest.raises(UserError, match=r"embeddings=.*photos\.parquet: needs pyarrow; pip install"):
            build_index(photos.embeddings, tmp_path / "a.index")
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    for kind in ("exact", "hnsw"):
        build_index(photos.embeddings, tmp_path / "new folder" / "a.index", kind=kind)
        assert Index.load(tmp_path / "new folder" / "a.index").kind == kind


def test_the_commands_of_the_guide(photos, tmp_path):
    to = photos.folder / "of the guide.index"
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = ["task=index", *map(quoted, (f"embeddings={photos.embeddings}", f"to={to}")), "kind=hnsw"]
        hydra.utils.instantiate(hydra.compose("config", overrides).task)
    assert Index.load(to).kind == "hnsw"
    found = run(tmp_path, "task=search", f"index={to}", f"query={photos.files[2]}", "k=4", limit=60)
    assert found.code == 0, found.err
    assert "similarity" in found.out
    (table,) = tmp_path.glob("runs/*/*/search.csv")
    assert rows_of(table)[0]["path"] == str(photos.files[2])
