"""Examples in the documentation."""

import doctest

import pytest
from commands import ROOT


@pytest.mark.parametrize("page", ["losses.md"])
def test_the_examples_of_a_page_are_right(page):
    failed, attempted = doctest.testfile(str(ROOT / "docs" / page), module_relative=False)
    assert attempted > 0
    assert not failed
