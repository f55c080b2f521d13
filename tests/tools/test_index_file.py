"""Files of an index that are damaged, or were made to do harm."""

import hashlib
import json
import os
import pickle

import numpy as np
import pytest
import torch

from twoview.errors import UserError
from twoview.tools import Index, IndexSettings
from twoview.torch_files import hash_tensors, map_safetensors, write_safetensors

VECTORS = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of indexes of each kind."""
    folder = tmp_path_factory.mktemp("indexes")
    for kind in ("exact", "hnsw", "ivfpq"):
        index = Index.build("0123", VECTORS, IndexSettings(kind=kind, links=4, recall=0.5))
        index.remove([5])
        index.save(folder / kind)
    return folder


def rewritten(file, change, target):
    """Write the file again after a change of its tensors and plain values, with the checksum of the changed content."""
    tensors, metadata = map_safetensors(file)
    tensors = {name: value.clone() for name, value in tensors.items()}
    plain = json.loads(metadata["twoview.index"])
    change(tensors, plain)
    text = json.dumps(plain)
    checksum = hashlib.blake2b((text + hash_tensors(tensors)).encode(), digest_size=16).hexdigest()
    write_safetensors(target, tensors, {"twoview.index": text, "checksum": checksum})
    return target


def put(name, row, value):
    def change(tensors, _):
        tensors[name].view(-1)[row] = value

    return change


def cut(name, count=-1):
    return lambda tensors, _: tensors.update({name: tensors[name][:count].clone()})


def converted(name, dtype):
    return lambda tensors, _: tensors.update({name: tensors[name].to(dtype)})


def plain(**values):
    return lambda _, found: found.update(values)


def without(name):
    return lambda tensors, found: (tensors.pop(name, None), found.pop(name, None))


def raised(tensors, _):
    """A link of the second level that leads to a vector of the lowest level only."""
    levels, links = tensors["search_levels"], tensors["search_links"]
    node = int((levels > 1).nonzero()[0])
    per_vector = 8 + 4 * (levels.long() - 1)  # twice as many links on the lowest level
    start = int(per_vector[:node].sum()) + 8
    links[start] = int((levels == 1).nonzero()[0])


HOSTILE = [
    ("exact", put("ids", 1, 0), "ids"),
    ("exact", put("ids", 1, -1), "ids"),
    ("exact", put("ids", 1, 10**6), "ids"),
    ("exact", converted("ids", torch.int32), "ids"),
    ("exact", put("vectors", 9, torch.nan), "length"),
    ("exact", put("vectors", 9, torch.inf), "length"),
    ("exact", put("vectors", 9, 3.0), "length"),
    ("exact", cut("vectors"), "vectors"),
    ("exact", converted("vectors", torch.float16), "vectors"),
    ("exact", put("paths_ends", 3, 10**9), "paths"),
    ("exact", put("paths_ends", 3, -(2**63)), "paths"),
    ("exact", put("labels_ends", 0, 1), "labels"),
    ("exact", cut("paths_ends"), "paths"),
    ("exact", without("paths"), "paths"),
    ("exact", without("kind"), "kind"),
    ("exact", plain(kind="tree"), "kind"),
    ("exact", plain(version=3), "version 3"),
    ("exact", plain(settings={"kind": "exact", "unknown": 1}), "unknown"),
    ("exact", plain(settings={"links": 10**9}), "links"),
    ("exact", plain(card=[]), "card"),
    ("exact", plain(checkpoint=None), "checkpoint"),
    ("exact", plain(next_id=2**80), "next_id"),
    ("hnsw", plain(recall={"value": "good", "vectors": 1}), "recall"),
    ("hnsw", plain(effort=-1), "effort"),
    ("hnsw", cut("alive"), "alive"),
    ("hnsw", put("search_links", 0, 1000), "no vector"),
    ("hnsw", put("search_links", 0, -2), "no vector"),
    ("hnsw", cut("search_links"), "links instead of"),
    ("hnsw", put("search_levels", 0, 0), "levels"),
    ("hnsw", put("search_levels", 0, 100), "levels"),
    ("hnsw", converted("search_levels", torch.int64), "levels"),
    ("hnsw", put("search_entry", 0, 1000), "starts at no vector"),
    ("hnsw", put("search_entry", 0, -1), "starts at no vector"),
    ("hnsw", raised, "leads to a vector below"),
    ("hnsw", without("search_links"), "links"),
    ("ivfpq", put("search_lists", 0, 1000), "in no list"),
    ("ivfpq", put("search_lists", 0, -1), "in no list"),
    ("ivfpq", put("search_means", 0, torch.nan), "finite"),
    ("ivfpq", cut("search_means", 0), "no lists"),
    ("ivfpq", lambda tensors, _: tensors.update(search_means=torch.empty(10**12, 0)), "no lists"),
    ("exact", lambda tensors, _: tensors.update(vectors=torch.empty(len(tensors["ids"]), 0)), "dimensions"),
    ("ivfpq", cut("search_books"), "books"),
    ("ivfpq", cut("search_codes"), "codes"),
]


@pytest.mark.parametrize(("kind", "change", "message"), HOSTILE)
def test_content_that_does_not_fit_is_refused_in_spite_of_its_checksum(kind, change, message, files, tmp_path):
    file = rewritten(files / kind, change, tmp_path / "hostile.index")
    with pytest.raises(UserError, match=message):
        Index.load(file)


def test_mapped_vectors_are_aligned_as_those_in_memory(tmp_path):
    vectors = torch.randn(999, 7, generator=torch.Generator().manual_seed(0))
    built = Index.build("0123", vectors)
    built.save(tmp_path / "a.index")
    mapped = Index.load(tmp_path / "a.index")
    assert mapped._entries.vectors.data_ptr() % 64 == 0
    for query in vectors[:20].split(1):
        assert torch.equal(mapped.search("0123", query).similarity, built.search("0123", query).similarity)


@pytest.mark.parametrize("kind", ["exact", "hnsw", "ivfpq"])
def test_a_rewritten_file_without_change_is_read(kind, files, tmp_path):
    file = rewritten(files / kind, lambda *_: None, tmp_path / "same.index")
    assert len(Index.load(file)) == 999


@pytest.mark.parametrize("kind", ["exact", "hnsw", "ivfpq"])
def test_the_recall_of_version_1_is_measured_again(kind, files, tmp_path):
    """It was that of vectors that were not left out of the search."""
    file = rewritten(files / kind, plain(version=1), tmp_path / "old.index")
    old = Index.load(file)
    assert old.recall is None
    assert torch.equal(old.search("0123", VECTORS[:9]).ids, Index.load(files / kind).search("0123", VECTORS[:9]).ids)
    old.save(file)
    assert Index.load(file).recall == Index.load(files / kind).recall


@pytest.mark.parametrize("kind", ["exact", "hnsw", "ivfpq"])
def test_damaged_bytes_are_noticed(kind, files, tmp_path):
    content, rng, file = (files / kind).read_bytes(), np.random.default_rng(0), tmp_path / "damaged.index"
    for position in rng.integers(0, len(content), 40):
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.integers(8)
        file.write_bytes(bytes(damaged))
        with pytest.raises(UserError, match=r"damaged\.index"):
            Index.load(file)
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"damaged\.index"):
        Index.load(file)


def test_other_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "pickle").write_bytes(pickle.dumps(os.getcwd))
    write_safetensors(tmp_path / "weights", {"weight": torch.zeros(2)}, {})
    for name in ("fifo", "pickle", "weights", "missing", "."):
        with pytest.raises(UserError, match="cannot be read as an index"):
            Index.load(tmp_path / name)


def test_an_open_index_answers_while_its_file_is_replaced(files, tmp_path):
    path = tmp_path / "photos.index"
    path.write_bytes((files / "exact").read_bytes())
    old = Index.load(path)
    before = old.search("0123", VECTORS[:9])
    Index.build("4567", VECTORS[:300, :4], IndexSettings(kind="hnsw", recall=0.5)).save(path)
    assert torch.equal(old.search("0123", VECTORS[:9]).ids, before.ids)
    assert Index.load(path).checkpoint == "4567"
    assert [file.name for file in tmp_path.iterdir()] == ["photos.index"]
