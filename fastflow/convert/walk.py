"""Finds the layers that can be converted, swaps their classes, and says what it did."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from fastflow.convert.choice import left_alone
from fastflow.convert.inside import modules_inside
from fastflow.convert.layer import Converted, Unsupported

LIBRARIES = ("nflows", "normflows", "pyro", "zuko")


class Row(NamedTuple):
    """A layer of a model, in a `Report`."""

    path: str
    layer: str
    reason: str = ""


class Report:
    """What `convert` did; as a string, a table.

    Attributes:
        model: the model, now with converted layers.
        replaced: a `Row` (path, layer, reason) for every layer converted by this call.
        skipped: the same for every layer left alone although fastflow has one of its kind, and why.
        before: the same for every layer that an earlier call had converted.
    """

    def __init__(
        self,
        model: nn.Module,
        replaced: Sequence[Row],
        skipped: Sequence[Row],
        before: Sequence[Row],
    ) -> None:
        self.model = model
        self.before = list(before)
        self.replaced = list(replaced)
        self.skipped = list(skipped)

    def __repr__(self) -> str:
        return f"Report(replaced={len(self.replaced)}, skipped={len(self.skipped)})"

    def __str__(self) -> str:
        if not (self.replaced or self.skipped or self.before):
            return "no layer that fastflow knows"
        rows: list[tuple[str, ...]] = [("path", "class", "replaced")]
        rows += [(row.path or "(model)", row.layer, "yes") for row in self.replaced]
        rows += [(row.path or "(model)", row.layer, "before") for row in self.before]
        rows += [(row.path or "(model)", row.layer, f"no: {row.reason}") for row in self.skipped]
        widths = [max(map(len, column)) for column in zip(*rows)]
        rows.insert(1, tuple("-" * width for width in widths))
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join(lines)


def convert(model: nn.Module, strict: bool = False, without_kernels: bool = False) -> Report:
    """Makes the layers of zuko, nflows, normflows and Pyro in a model fast, in place.

    Every layer whose class and settings fastflow knows computes the same numbers with fastflow's
    kernels from now on, in both directions. It keeps its parameters, buffers, submodules, hooks,
    signatures and the keys of its state_dict, and stays an instance of its class: a subclass of it
    takes its place. A layer that occurs twice in a model is converted once. Converting once more
    changes nothing; `revert` undoes it. If an error is raised, nothing has changed.

    Arguments:
        model: any module. A library is imported only if the model contains modules of it.
        strict: whether to raise where a layer of a known kind is not converted.
        without_kernels: whether to convert layers on devices that no compiled backend serves, too.
            By default they are left alone. Converted, their parallel direction is the library's own
            code, and the other one, D passes there, is a sweep in plain PyTorch.

    Returns:
        A `Report`; `print(report)` shows a table.

    Raises:
        TypeError: the model is not a module; the message says where modules are in it, such as
            `convert(posterior.posterior_estimator)` for a posterior of sbi.
        Unsupported: a layer cannot be converted, and strict is set. The message names them all.

    Example:
        >>> print(convert(nn.Linear(2, 2)))
        no layer that fastflow knows
    """
    _check_model("convert", model)
    twins, replaced, skipped, before = [], [], [], []
    for path, module in model.named_modules():
        if isinstance(module, Converted):
            before.append(Row(path, type(module).__name__))
            continue
        try:
            converted = _converted_class(type(module))
            if converted is None:
                continue
            twin = converted.twin(module)
            reason = None if without_kernels else left_alone(twin.op, module)
            if reason is not None:
                raise Unsupported(reason)
            twins.append((twin, module))
        except Unsupported as problem:
            skipped.append(Row(path, type(module).__name__, str(problem)))
        else:
            replaced.append(Row(path, type(module).__name__))
    if strict and skipped:
        shown = "; ".join(
            f"{row.path or 'the model'} ({row.layer}): {row.reason}" for row in skipped
        )
        raise Unsupported(f"convert: cannot convert {shown}")
    for twin, module in twins:
        twin.adopt(module)
    return Report(model, replaced, skipped, before)


def revert(model: nn.Module) -> nn.Module:
    """Gives all layers that `convert` replaced their own classes back, in place.

    Returns:
        The model.

    Raises:
        TypeError: the model is not a module.
    """
    _check_model("revert", model)
    for module in model.modules():
        if isinstance(module, Converted):
            module.restore()
    return model


def _check_model(owner: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        inside = [f"{owner}(model{path})" for path in modules_inside(model)[:3]]
        hint = f"; there are some in it: {', '.join(inside)}" if inside else ""
        raise TypeError(
            f"{owner}: model is a {type(model).__name__}, must be a torch.nn.Module{hint}"
        )


def _converted_class(kind: type[nn.Module]) -> type[Converted] | None:
    """The class that replaces a class; None if it is of no kind that fastflow has.

    Raises:
        Unsupported: it is of such a kind, but not one of the classes known exactly.
    """
    names = {base.__module__.partition(".")[0] for base in kind.__mro__}
    for name in LIBRARIES:
        if name not in names:
            continue
        library = importlib.import_module(f"fastflow.convert.{name}")
        if kind in library.LAYERS:
            return library.LAYERS[kind]
        for known in library.LAYERS:
            if issubclass(kind, known):
                raise Unsupported(f"a subclass of {known.__name__}, which may compute otherwise")
        for other, reason in library.OTHERS.items():
            if issubclass(kind, other):
                raise Unsupported(reason)
    return None
