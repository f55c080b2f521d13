"""Search for the most similar vectors, against all similarities by numpy."""

import sys

import numpy as np
import pytest
import torch

import twoview
from twoview.data import TensorImages
from twoview.errors import UserError
from twoview.tools import Index, IndexSettings, incoming
from twoview.tools.embedding_file import Embeddings
from twoview.tools.incoming import as_embeddings

DIM = 30
KINDS = ("exact", "hnsw", "ivfpq")
HASH = "0123"


def clusters(count, seed, spread=0.7):
    """Vectors around 40 fixed centers, and the numbers of the centers."""
    centers = torch.randn(40, DIM, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + seed)
    which = torch.randint(0, 40, (count,), generator=generator)
    return centers[which] + spread * torch.randn(count, DIM, generator=generator), which


VECTORS, WHICH = clusters(3000, 0)
QUERIES, _ = clusters(60, 1)


def by_numpy(vectors, queries, k):
    """Positions of the k vectors of the largest cosine, and the cosines, in float64."""
    a, b = (np.asarray(x, np.float64) for x in (vectors, queries))
    cosine = b @ a.T / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)[:, None]
    order = np.argsort(-cosine, axis=1)[:, :k]
    return order, np.take_along_axis(cosine, order, 1)


def recall(found, expected):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), expected.tolist(), strict=True)])


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def index_file(kind, tmp_path_factory):
    """An index of ``VECTORS`` in a file."""
    path = tmp_path_factory.mktemp("index") / f"{kind}.index"
    Index.build(HASH, VECTORS, IndexSettings(kind=kind, recall=0.97)).save(path)
    return path


@pytest.fixture
def index(index_file):
    return Index.load(index_file)


@pytest.fixture(scope="module")
def encoder():
    return twoview.load("random:test_resnet", image_size=32)


def test_the_most_similar_vectors_are_found(index, kind):
    found = index.search(HASH, QUERIES, k=10)
    expected, cosine = by_numpy(VECTORS, QUERIES, 10)
    assert recall(found.ids, expected) >= (1 if kind == "exact" else 0.97)
    of_found = by_numpy(VECTORS, QUERIES, len(VECTORS))
    cosines = np.take_along_axis(of_found[1], np.argsort(of_found[0], 1), 1)  # in the order of the vectors
    np.testing.assert_allclose(found.similarity, np.take_along_axis(cosines, found.ids.numpy(), 1), atol=1e-6)
    assert (found.similarity.diff(dim=1) <= 0).all()
    if kind == "exact":
        np.testing.assert_allclose(found.similarity, cosine, atol=1e-6)


def test_the_stored_recall_is_that_of_new_vectors(kind):
    """In many dimensions, the recall of vectors that are in the graph themselves is much larger."""
    generator = torch.Generator().manual_seed(2)
    vectors, queries = (torch.randn(count, 100, generator=generator) for count in (3000, 1000))
    index = Index.build(HASH, vectors, IndexSettings(kind=kind, recall=0.2, links=8))
    if kind == "exact":
        assert index.recall is None
        return
    of_new = recall(index.search(HASH, queries).ids, by_numpy(vectors, queries, 10)[0])
    of_own = recall(index.search(HASH, vectors[:1000], 11).ids[:, 1:], by_numpy(vectors, vectors[:1000], 11)[0][:, 1:])
    assert index.recall["value"] == pytest.approx(of_new, abs=0.05)
    assert (index.recall["queries"], index.recall["vectors"]) == (150, 3000)
    assert kind != "hnsw" or of_own > of_new + 0.2


def test_the_recall_is_reached_for_new_vectors(index, kind):
    queries, _ = clusters(1000, 4)
    of_new = recall(index.search(HASH, queries).ids, by_numpy(VECTORS, queries, 10)[0])
    assert of_new >= (1 if kind == "exact" else 0.97)


@pytest.mark.parametrize("half", [False, True])
def test_a_loaded_index_gives_the_same_results(kind, half, tmp_path):
    built = Index.build(HASH, VECTORS[:1200], IndexSettings(kind=kind, half=half, recall=0.5))
    built.remove(range(100))
    built.save(tmp_path / "a.index")
    loaded = Index.load(tmp_path / "a.index")
    before, after = (x.search(HASH, QUERIES, k=7) for x in (built, loaded))
    assert torch.equal(before.similarity, after.similarity)
    assert torch.equal(before.ids, after.ids)
    assert loaded.add(HASH, VECTORS[1200:1300]).tolist() == list(range(1200, 1300))
    assert len(loaded) == 1200
    cosine = torch.from_numpy(by_numpy(VECTORS[100:1300], QUERIES, 7)[1])
    worst = (loaded.search(HASH, QUERIES, k=7).similarity - cosine).abs().max()
    assert worst < (0.2 if kind == "ivfpq" else 2e-3)


def test_adding_and_removing_equals_a_rebuild(kind):
    settings = IndexSettings(kind=kind, recall=0.97)
    changed = Index.build(HASH, VECTORS[:2000], settings)
    for step in range(4):
        changed.add(HASH, VECTORS[2000 + 250 * step : 2250 + 250 * step])
        changed.remove(range(step, 1800, 17))
    kept = changed.ids
    rebuilt = Index.build(HASH, VECTORS[kept], settings, ids=kept)
    a, b = (x.search(HASH, QUERIES, k=10) for x in (changed, rebuilt))
    if kind == "exact":
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.similarity, b.similarity)
    expected = kept[torch.from_numpy(by_numpy(VECTORS[kept], QUERIES, 10)[0])]
    for found in (a, b):
        assert recall(found.ids, expected) >= (1 if kind == "exact" else 0.95)
    every = changed.search(HASH, QUERIES, k=len(kept)).ids.sort().values
    assert torch.equal(every, kept.sort().values.expand(len(QUERIES), -1))


def test_when_the_neighbors_are_removed_the_next_ones_are_found(index, kind):
    query = VECTORS[:1]
    near, _ = by_numpy(VECTORS, query, 500)
    index.remove(near[0].tolist())
    assert len(index) == 2500
    found = index.search(HASH, query, k=10).ids[0]
    rest = torch.ones(3000, dtype=torch.bool)
    rest[near[0]] = False
    expected, _ = by_numpy(VECTORS[rest], query, 10)
    assert rest[found].all()
    assert len(found.unique()) == 10
    if kind == "exact":
        assert found.tolist() == rest.nonzero().flatten()[expected[0]].tolist()


def test_a_graph_is_built_anew_when_a_fifth_is_removed(index, kind):
    index.remove(range(600))
    assert (index._alive is None) is (kind == "exact")
    index.remove([600])
    assert index._alive is None
    assert len(index._entries.vectors) == len(index) == 2399


def test_all_entries_can_be_removed_and_others_added(index, kind, tmp_path):
    index.remove(index.ids)
    assert index.search(HASH, QUERIES).ids.shape == (60, 0)
    index.save(tmp_path / "empty.index")
    again = Index.load(tmp_path / "empty.index")
    assert again.add(HASH, VECTORS[:1500])[0] == 3000
    assert again.kind == kind
    assert recall(again.search(HASH, QUERIES).ids - 3000, by_numpy(VECTORS[:1500], QUERIES, 10)[0]) > 0.9


def test_zero_vectors_are_similar_to_nothing():
    index = Index.build(HASH, torch.cat([VECTORS[:3], torch.zeros(1, DIM)]))
    found = index.search(HASH, torch.cat([VECTORS[:1], torch.zeros(1, DIM)]), k=4)
    assert found.similarity[0].count_nonzero() == 3
    assert found.similarity[1].tolist() == [0] * 4


def test_auto_is_exact_for_few_vectors_and_a_graph_for_many(monkeypatch):
    monkeypatch.setattr("twoview.tools.index_settings.EXACT_UP_TO", 1000)
    index = Index.build(HASH, VECTORS[:1000])
    assert index.kind == "exact"
    index.add(HASH, VECTORS[1000:1100])
    assert index.kind == "hnsw"
    assert recall(index.search(HASH, QUERIES).ids, by_numpy(VECTORS[:1100], QUERIES, 10)[0]) > 0.9


def test_without_faiss_auto_is_exact_and_others_say_what_to_install(monkeypatch, index_file, kind):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr("twoview.tools.index_settings.EXACT_UP_TO", 100)
    assert Index.build(HASH, VECTORS).kind == "exact"
    if kind == "exact":
        assert Index.load(index_file).kind == "exact"
        return
    for attempt in (lambda: Index.build(HASH, VECTORS, IndexSettings(kind=kind)), lambda: Index.load(index_file)):
        with pytest.raises(UserError, match=r"pip install .twoview\[faiss\]"):
            attempt()


def test_images_are_found_by_their_paths_and_labels(encoder):
    pixels = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    names = [f"Ordner/Bild {i} ü.png" for i in range(12)]
    images = TensorImages(pixels, torch.tensor([-1, *[1] * 11]), names=names)
    index = Index.build(encoder, images)
    found = index.search(encoder, pixels[[0, 5]], k=1)
    assert found.paths == [[names[0]], [names[5]]]
    assert found.labels == [[""], ["1"]]
    assert found.similarity.flatten().tolist() == pytest.approx([1, 1])
    index.remove([names[5], names[0]])
    assert index.search(encoder, pixels[5], k=1).paths != [[names[5]]]
    # The preprocessing of the index is used, not that of the encoder.
    other = encoder.with_card(mean=(0.1,) * 3, std=(0.9,) * 3)
    assert torch.equal(index.search(other, pixels).similarity, index.search(encoder, pixels).similarity)


def test_another_network_is_refused(encoder):
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    index, other = Index.build(encoder, pixels), twoview.load("random:test_resnet", image_size=32, seed=1)
    theirs = Embeddings(["a"], torch.tensor([0]), [None], torch.ones(1, index.dim), {"checkpoint": "ffff"})
    for attempt in (
        lambda: index.search(other, pixels),
        lambda: index.add(other, pixels),
        lambda: index.search("ffff", torch.ones(1, index.dim)),
        lambda: index.add(None, theirs),
        lambda: index.add(encoder, theirs),
    ):
        with pytest.raises(UserError, match=index.checkpoint):
            attempt()
    assert len(index) == 2


def test_weights_are_hashed_once_for_a_search_and_again_for_the_next(encoder, monkeypatch):
    pixels, calls = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), []
    index = Index.build(encoder, pixels)
    hashed = incoming.hash_tensors
    monkeypatch.setattr(incoming, "hash_tensors", lambda tensors: calls.append(1) or hashed(tensors))
    same = twoview.load("random:test_resnet", image_size=32)
    index.search(same, pixels)
    index.add(same, pixels)
    assert len(calls) == 2
    next(same.network.parameters()).data[0] += 1
    with pytest.raises(UserError, match="its weights have the hash"):
        index.search(same, pixels)


def test_embeddings_of_another_preprocessing_are_refused(encoder):
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    index, found = Index.build(encoder, pixels), as_embeddings(encoder, pixels)
    assert index.add(None, found).tolist() == [2, 3]
    known = found.metadata["preprocessing"]
    for name, value in (("image_size", 64), ("resize_size", 40), ("store_size", 64), ("mean", [0.4, 0.5, 0.5])):
        changed = {"preprocessing": known | {"resize_size": 64 if name == "image_size" else 32, name: value}}
        with pytest.raises(UserError, match=f"their .*{name} is"):
            index.add(None, found._replace(metadata=found.metadata | changed))
    assert len(index) == 4


def nan_at(row):
    vectors = VECTORS[:5].clone()
    vectors[row, 3] = torch.nan
    return vectors


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda i: i.search(HASH, QUERIES, k=0), "k=0"),
        (lambda i: i.search(HASH, QUERIES[:, :7]), "7 dimensions"),
        (lambda i: i.search(None, QUERIES), "encoder=None"),
        (lambda i: i.search(HASH, torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), "images need the encoder"),
        (lambda i: i.add(HASH, nan_at(2)), "1 of 5 are not finite, such as row 2"),
        (lambda i: i.add(HASH, VECTORS[:2], ids=[4000, 4000]), "given twice"),
        (lambda i: i.add(HASH, VECTORS[:2], ids=[7, 4000]), "in the index already"),
        (lambda i: i.add(HASH, VECTORS[:2], ids=[4000]), "one for each"),
        (lambda i: i.add(HASH, VECTORS[:1], ids=[-1]), "from 0"),
        (lambda i: i.remove([1, 9999]), "9999"),
        (lambda i: i.remove(["no.jpg"]), "no.jpg"),
        (lambda i: i.remove([1.5]), "give ids, or paths"),
        (lambda _: Index.build(HASH, VECTORS[:999], IndexSettings(kind="ivfpq")), "at least 1,000"),
        (lambda _: IndexSettings(kind="tree"), "kind=tree"),
        (lambda _: IndexSettings(recall=0), "recall=0"),
        (lambda _: IndexSettings(links=3), "links=3"),
        (lambda _: IndexSettings(construction=8), "construction=8"),
        (lambda _: IndexSettings(half="yes"), "half=yes"),
    ],
)
def test_mistakes_are_one_sentence_and_change_nothing(attempt, message):
    index = Index.build(HASH, VECTORS[:50])
    with pytest.raises(UserError, match=message):
        attempt(index)
    assert index.ids.tolist() == list(range(50))
    assert index.add(HASH, VECTORS[:1]).tolist() == [50]
