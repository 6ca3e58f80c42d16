"""Loads the autograd node in C++, which spares small calls the Python between op and engine.

Its library is no part of PyTorch's stable ABI: it serves the torch and the Python that it was
compiled for, which its file name tells, and is not opened by others. Without it, and for whatever
it declines, the ops take their `torch.autograd.Function`; results are the same. FASTFLOW_NODE=0
turns it off.
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastflow import backends, native

DEVICES = ("cpu", "cuda")
STEM = "_autograd"  # of the file, and the name of the module in it

library: Path | None = None  # the file in use
reason: str | None = None  # why there is none
enabled = False  # whether `run` may use it
_define: Callable[..., Callable] | None = None
_ops: dict[str, Callable[..., tuple[Any, ...] | None]] = {}


def define(
    forward: str, backward: str, shapes: str, python_backward: Callable
) -> Callable[..., tuple[Tensor, ...] | None] | None:
    """Let the node run an op, where there is a node.

    Arguments:
        forward, backward: the ops; the names in their schemas say how they belong together.
        shapes: of forward's arguments, a letter for every size, a word for every argument, * for
            what is no tensor or takes any shape, | between alternatives: "BD KD * | BD BKD *".
            Tensors with letters are contiguous, all float32 or all float64. "Bn [nn'] [n]?" are
            points and lists of weights and biases, see csrc/autograd/module.cpp.
        python_backward: gives the gradients where the backward op cannot: called with forward's
            arguments, those of its outputs that backward uses (the others None), cotangents, and
            a bool for every tensor, it returns a gradient or None for every tensor.

    Returns:
        What `run` calls after its checks; None where there is no node.
    """
    if _define is not None:
        _ops[forward] = _define(
            f"fastflow::{forward}", f"fastflow::{backward}", shapes, python_backward
        )
    return _ops.get(forward)


def run(op: str, *args: object) -> tuple[Any, ...] | None:
    """The outputs of an op, with their history; None if this call is for the Python path.

    That is so under torch.compile, modes and transforms, with subclasses and forward-mode tangents,
    on backends that are no registered ops, and for arguments that need a check or a change, or that
    the op refuses. None in a list of tensors says that one is missing; an argument called save is
    set as gradients are recorded or not.
    """
    first = args[0]
    if (
        not enabled
        or is_compiling()
        or not (isinstance(first, Tensor) and first.device.type in DEVICES)
    ):
        return None
    return _ops[op](*args) if backends.traceable(op, first) else None


def file_name() -> str:
    """The file that serves this torch and this Python."""
    commit = (torch.version.git_version or "unknown")[:8]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return f"{STEM}-{torch.__version__}-{commit}{suffix}"


def _load() -> None:
    global library, reason, enabled, _define
    file = native.FOLDER / file_name()
    if os.environ.get("FASTFLOW_NODE") == "0":
        reason = "turned off by FASTFLOW_NODE=0"
    elif "cpp" not in native.libraries:
        reason = "it needs the CPU library, which declares the ops"
    elif not file.exists():
        others = [other.name for other in native.FOLDER.glob(f"{STEM}-*.so")]
        reason = f"built for another torch or Python: {' '.join(others)}"
        reason = reason if others else native.not_built("node")
    else:
        loader = ExtensionFileLoader(f"fastflow.{STEM}", str(file))
        spec = importlib.util.spec_from_loader(loader.name, loader)
        try:
            module = importlib.util.module_from_spec(spec)  # pyright: ignore[reportArgumentType]
            loader.exec_module(module)
        except ImportError as problem:
            reason = f"{file.name} does not load: {problem}".split("\n")[0]
        else:
            library, _define, enabled = file, module.define, True


_load()
