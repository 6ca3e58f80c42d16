"""Warnings at the user's line, and once where many layers have the same to say."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch

# torch's too: a call of a module passes through it
_INNER = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__))
_said: ContextVar[set[str] | None] = ContextVar("said", default=None)


def warn(message: str, category: type[Warning] = UserWarning, kind: str = "") -> None:
    """Warns at the first line outside of this package and torch, from whatever depth it is called.

    Arguments:
        kind: what the warning is about; inside `once` each kind is said once.
    """
    said = _said.get()
    if said is not None:
        if kind in said:
            return
        said.add(kind)
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_code.co_filename.startswith(_INNER):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


@contextmanager
def once() -> Iterator[None]:
    """Lets the enclosed layers say what is of one kind once, for all of them."""
    token = _said.set(set() if _said.get() is None else _said.get())
    try:
        yield
    finally:
        _said.reset(token)
