"""The README: its examples run and its commands are those that do all the set-up."""

from __future__ import annotations

import doctest
import re

import torch
from environments import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_examples() -> None:
    options = doctest.NORMALIZE_WHITESPACE
    results = doctest.testfile(str(ROOT / "README.md"), module_relative=False, optionflags=options)
    assert results.attempted > 10 and not results.failed


def test_the_first_example_trains() -> None:
    torch.manual_seed(0)
    (program,) = re.findall(r"```python\n(import torch\n.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(program, names)
    assert names["samples"].shape == (1000, 2)
    assert names["loss"] < -names["flow"].base.log_prob(names["x"]).mean()


def test_the_two_commands_stand_on_the_first_screen() -> None:
    first_screen = "\n".join(README.splitlines()[:40])
    assert 'pip install -e ".[bench]" && pytest benchmarks/ --benchmark-only\n' in first_screen
    assert 'pip install -e ".[test]"  && pytest tests/\n' in first_screen
