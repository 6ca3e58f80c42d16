"""The registry of backends, and the one place that chooses between them.

A backend is a module whose functions carry the names and signatures of the ops, for instance
`planar_flow_forward`. The automatic choice takes the first one that works for a device, and says
once why it passed over a faster one; `use_backend(name)` takes exactly that one or raises.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastflow import kernels, native
from fastflow.notices import warn


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops.

    Arguments:
        name: what `use_backend` takes.
        devices: device types it serves, in no order; None if it serves any.
        probe: None if it works here, else the reason why not, in one line.
        locate: the function of an op by its name, or None if it has none; heavy imports happen
            here, not before.
    """

    name: str
    devices: tuple[str, ...] | None
    probe: Callable[[], str | None]
    locate: Callable[[str], Callable | None]

    def serves(self, device: str) -> bool:
        """Whether tensors of a device type are among those it takes."""
        return self.devices is None or device in self.devices


_registry: dict[str, Backend] = {}
_order: dict[str, list[str]] = {"cpu": [], "cuda": []}
_chosen: str | None = None  # a plain global, which torch.compile guards on
_selected: dict[tuple[str, str, str | None], Callable] = {}
_known: dict[tuple[str, ...], bool] = {}
_warned: set[tuple[str, str]] = set()


def register(backend: Backend, automatic: tuple[str, ...] | None = None) -> None:
    """Add a backend, after those already there in the automatic order of its devices.

    Arguments:
        backend: the backend.
        automatic: devices for which it may be chosen automatically; all that it names by default.
            The reference needs none: it is the last resort on every device.
    """
    _registry[backend.name] = backend
    for device in backend.devices or () if automatic is None else automatic:
        _order.setdefault(device, []).append(backend.name)
    _selected.clear()
    _known.clear()


def names() -> list[str]:
    """The names of all registered backends."""
    return list(_registry)


def serves(name: str, device: str) -> bool:
    """Whether the backend is made for a device type, working here or not."""
    return _registry[name].serves(device)


def status(name: str) -> str | None:
    """None if the backend works on this machine, else why not."""
    return _registry[name].probe()


def available(device: str = "cpu", op: str | None = None) -> list[str]:
    """The backends that work here for a device type, the automatic choice first.

    Arguments:
        device: the type, "cpu" or "cuda" for instance.
        op: an op's name, for the backends that have it; by default those that have any.
    """
    automatic = [*_order.get(device, []), "reference"]
    others = [b.name for b in _registry.values() if b.serves(device) and b.name not in automatic]
    found = [name for name in [*automatic, *others] if status(name) is None]
    return [name for name in found if op is None or _registry[name].locate(op) is not None]


def use_backend(name: str) -> AbstractContextManager[None]:
    """Run the enclosed calls with one backend, or raise if it cannot be had.

    It has an effect in a `with` statement only. The choice is that of the whole process: while the
    block lasts, calls of other threads follow it too. Blocks nest; those of several threads must
    not overlap. A backward pass runs on the choice that was in force in its forward pass, wherever
    and whenever it runs.

    Arguments:
        name: "reference", "cpp", "triton" or "cuda".

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: it does not work on this machine; the message says why.

    Example:
        >>> import fastflow
        >>> with fastflow.use_backend("reference"):
        ...     y, ladj = fastflow.PlanarFlow(4, steps=2)(torch.zeros(3, 4))
        >>> y.shape, ladj.shape
        (torch.Size([3, 4]), torch.Size([3]))
    """
    if name not in _registry:
        raise ValueError(f"use_backend: name is {name!r}, must be one of {', '.join(_registry)}")
    reason = status(name)
    if reason is not None:
        raise RuntimeError(f"use_backend: {name} is not available: {reason}")
    return _choose(name)


@contextmanager
def _choose(name: str) -> Iterator[None]:
    global _chosen
    outer, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = outer


def current() -> str | None:
    """The name given to the innermost `use_backend`, or None."""
    return _chosen


def current_or_reference(op: str) -> str | None:
    """`current`, but the reference in place of a backend that does not have an op.

    For layers that other backends compute in plain PyTorch.
    """
    if _chosen is None:
        return None
    key = (_chosen, op)
    if key not in _known:
        _known[key] = _registry[_chosen].locate(op) is not None
    return _chosen if _known[key] else "reference"


def call(op: str, *args: Any, name: str | None) -> tuple[Any, ...]:
    """Compute an op, from inside the autograd Function that knows its derivative.

    Arguments:
        op: the op's name, e.g. "planar_flow_forward".
        args: its arguments; the device of the first, a tensor, decides.
        name: a backend, or None for the automatic choice; forward passes say `current()`.
    """
    if torch.compiler.is_compiling():
        return native.overload(op)(*args)
    function = _find(op, args[0].device.type, name)
    # raw ops refuse to be differentiated; here that is taken care of
    with torch._C._AutoDispatchBelowAutograd():
        return function(*args)


def uncompiled(op: str, device: str) -> bool:
    """Whether the reference is the automatic choice: nothing faster serves such a device here.

    Not so inside `use_backend`, which is obeyed.
    """
    return _chosen is None and _is_reference(op, device)


def _is_reference(op: str, device: str) -> bool:
    key = ("reference", op, device)
    if key not in _known:
        _find(op, device, None)  # which warns
        _known[key] = not any(
            status(name) is None and _registry[name].locate(op) is not None
            for name in _order.get(device, [])
        )
    return _known[key]


_is_reference._dynamo_marked_constant = True  # torch.compile takes the answer as it is


def traceable(op: str, tensor: Tensor) -> bool:
    """Whether torch.compile can put the backend for such tensors into a graph, as an op."""
    return _is_registered_op(op, tensor.device.type, _chosen)


def _is_registered_op(op: str, device: str, name: str | None) -> bool:
    return isinstance(_find(op, device, name), torch._ops.OpOverload)


_is_registered_op._dynamo_marked_constant = True  # torch.compile takes the answer as it is


def _find(op: str, device: str, name: str | None) -> Callable:
    key = (op, device, name)
    function = _selected.get(key)
    if function is None:
        backend, function = _automatic(op, device) if name is None else _given(op, name)
        if not backend.serves(device):
            served = " and ".join(backend.devices or ())
            raise RuntimeError(
                f"{op}: backend {backend.name} serves {served} tensors, these are on {device}"
            )
        _selected[key] = function
    return function


def _given(op: str, name: str) -> tuple[Backend, Callable]:
    backend = _registry[name]
    function = backend.locate(op)
    if function is None:
        raise RuntimeError(f"{op}: backend {name} does not have this op")
    return backend, function


def _automatic(op: str, device: str) -> tuple[Backend, Callable]:
    for candidate in _order.get(device, []):
        reason = status(candidate)
        if reason is None:
            function = _registry[candidate].locate(op)
            if function is not None:
                return _registry[candidate], function
        elif (candidate, device) not in _warned:
            _warned.add((candidate, device))
            warn(
                f"{op}: the {candidate} backend is not available for {device} tensors ({reason}); "
                "a slower one takes its place. `python -m fastflow` says what to do.",
                RuntimeWarning,
            )
    return _given(op, "reference")


def _from_library(key: str) -> Callable[[str], Callable | None]:
    def locate(op: str) -> Callable | None:
        known = hasattr(torch.ops.fastflow, op)
        if known and torch._C._dispatch_has_kernel_for_dispatch_key(f"fastflow::{op}", key):
            return native.overload(op)
        return None

    return locate


def _from_module(module: str) -> Callable[[str], Callable | None]:
    def locate(op: str) -> Callable | None:
        family = op.removesuffix("_forward").removesuffix("_backward").removesuffix("_inverse")
        if importlib.util.find_spec(f"{module}.{family}") is None:
            return None
        return getattr(importlib.import_module(f"{module}.{family}"), op, None)

    return locate


register(
    Backend("cpp", ("cpu",), partial(native.probe, "cpp"), _from_library("CPU")),
)
register(
    Backend("cuda", ("cuda",), partial(native.probe, "cuda"), _from_library("CUDA")),
)
register(
    Backend(
        "triton",
        ("cuda", "cpu") if kernels.interpreting() else ("cuda",),
        kernels.probe,
        _from_module("fastflow.kernels"),
    ),
    automatic=("cuda",),
)
register(
    Backend("reference", None, lambda: None, _from_module("fastflow.reference")),
)
