"""Where the modules are in an object that is none, such as a posterior of sbi."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType

from torch import Tensor, nn

LEVELS = 2  # of attributes: a posterior's estimator, or that of its potential
MOST_ITEMS = 16  # of a list or dictionary that are looked at


def modules_inside(thing: object) -> list[str]:
    """The paths of modules in an object's attributes, lists and dictionaries, two levels deep.

    Example:
        >>> from types import SimpleNamespace
        >>> modules_inside(SimpleNamespace(name="a", parts=[3, SimpleNamespace(net=nn.Tanh())]))
        ['.parts[1].net']
    """
    found: dict[int, str] = {}
    for path, module in _walk(thing, "", LEVELS):
        found.setdefault(id(module), path)
    return list(found.values())


def _walk(thing: object, path: str, levels: int) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(thing, nn.Module):
        yield path, thing
    elif isinstance(thing, (list, tuple)):
        for number, item in enumerate(thing[:MOST_ITEMS]):
            yield from _walk(item, f"{path}[{number}]", levels)
    elif isinstance(thing, Mapping):
        for key in list(thing)[:MOST_ITEMS]:
            yield from _walk(thing[key], f"{path}[{key!r}]", levels)
    elif levels and not isinstance(thing, (type, ModuleType, Tensor)):
        own = getattr(thing, "__dict__", {})
        for name in sorted(own, key=lambda name: str(name).startswith("_")):  # public ones first
            yield from _walk(own[name], f"{path}.{name}", levels - 1)
