"""The pages in docs: their examples run."""

from __future__ import annotations

import doctest
import importlib.util
from pathlib import Path
from unittest import mock

import pytest
import torch
from environments import ROOT

from fastflow.convert.walk import LIBRARIES
from fastflow.vae import registry

PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples(page: Path) -> None:
    if page.stem in LIBRARIES and importlib.util.find_spec(page.stem) is None:
        pytest.skip(f"{page.stem} is not installed")
    torch.manual_seed(0)
    with mock.patch.dict(registry.RECIPES):  # a page registers a posterior of its own
        results = doctest.testfile(
            str(page), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE
        )
    assert results.attempted and not results.failed


def test_every_library_has_a_page() -> None:
    assert {page.stem for page in PAGES} >= set(LIBRARIES)
