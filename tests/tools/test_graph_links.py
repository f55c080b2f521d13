"""Vectors that are left out of a graph while its recall is measured, against a loop over its links."""

import contextlib

import pytest
import torch

from twoview.tools import Index, IndexSettings

VECTORS = torch.randn(1200, 12, generator=torch.Generator().manual_seed(0))
LINKS = 4


def lists(tensors):
    """Links of each vector on each of its levels, without those that lead to no vector."""
    links, levels, start, found = tensors["links"].tolist(), tensors["levels"].tolist(), 0, []
    for count in levels:
        for level in range(count):
            size = 2 * LINKS if level == 0 else LINKS
            row, start = links[start : start + size], start + size
            used = [link for link in row if link >= 0]
            assert row == used + [-1] * (size - len(used))
            found.append(used)
    assert start == len(links)
    return found


@pytest.fixture
def engine():
    settings = IndexSettings(kind="hnsw", links=LINKS, construction=LINKS, recall=0.1)
    return Index.build("0123", VECTORS, settings)._engine


@pytest.mark.parametrize("share", [0, 0.05, 0.5, 1])
def test_no_link_leads_to_hidden_vectors_and_all_others_stay(engine, share):
    hidden = torch.rand(len(VECTORS), generator=torch.Generator().manual_seed(1)) < share
    before = {name: value.clone() for name, value in engine.tensors().items()}
    inside = None
    with contextlib.suppress(KeyboardInterrupt), engine.without(hidden):
        inside = lists(engine.tensors())
        raise KeyboardInterrupt
    assert inside == [[link for link in row if not hidden[link]] for row in lists(before)]
    for name, value in engine.tensors().items():
        assert torch.equal(value, before[name])


def test_a_search_finds_no_hidden_vector_and_passes_none(engine):
    hidden = torch.zeros(len(VECTORS), dtype=torch.bool)
    hidden[::7] = True
    engine.effort = 1024
    queries = VECTORS[hidden]
    with engine.without(hidden):
        found = engine.candidates(queries, 10, None)
    start = engine.tensors()["entry"]
    assert not hidden[found[(found != start) & (found >= 0)]].any()
    assert hidden[engine.candidates(queries, 10, None)[:, 0]].double().mean() > 0.5
