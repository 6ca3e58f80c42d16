"""What the converted layers of all libraries share: what they know beside their parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fastflow.autograd.masked import passes_are_cheap
from fastflow.convert.choice import no_kernel
from fastflow.inner import Watched, global_hooks, inside, own_method, plain
from fastflow.memo import tensors
from fastflow.notices import warn
from fastflow.transforms import unrecorded, wrapped

Layer = nn.Module if TYPE_CHECKING else object  # by its library's class, each is a module


class Unsupported(ValueError):
    """A layer, or a setting of one, that cannot be converted; the message says why."""


class Converted(Layer):
    """The face of a layer whose class was swapped: a subclass of this and of the library's class.

    The layer keeps its parameters, buffers, submodules, hooks and name; it computes in another way.
    A converted class has the name of the original, which is the last of its bases.
    """

    derived: tuple[str, ...] = ()
    """Attributes that the layer has because it is converted."""
    _modules: dict[str, Any]
    op: ClassVar[str]
    """The op of its parallel direction."""

    def prepare(self) -> None:
        """Computes what the layer needs beside its parameters.

        Raises:
            Unsupported: the layer has a setting that fastflow does not know.
        """
        raise NotImplementedError(f"{type(self).__name__} has no prepare")

    @classmethod
    def twin(cls, layer: nn.Module) -> Converted:
        """A converted layer that shares everything with the given one, which stays as it is."""
        check_methods("the layer", layer)
        found = object.__new__(cls)
        found.__dict__.update(layer.__dict__)
        found.prepare()
        return found

    def adopt(self, layer: nn.Module) -> None:
        """Makes the layer whose twin this is a converted one."""
        layer.__dict__.update({name: self.__dict__[name] for name in self.derived})
        layer.__class__ = type(self)  # pyright: ignore[reportAttributeAccessIssue]

    def restore(self) -> None:
        """Makes this layer what it was."""
        for name in self.derived:
            del self.__dict__[name]
        kind = type(self)
        *others, original = kind.__bases__
        if issubclass(original, Converted):  # a tool's class of it, as parametrizations make one
            body = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
            original = type(kind)(kind.__name__, (*others, original.__bases__[-1]), body)
        self.__class__ = original  # pyright: ignore[reportAttributeAccessIssue]


class MaskedLayer(Converted):
    """A converted layer on a masked network, with the staircase of its masks.

    Masks are always those of the layer's own buffers. Eager calls compare the buffers, by identity
    and version, to those that the staircase was made of; under torch.compile, where that cannot be
    seen, the staircase is the one made when the layer was converted, loaded, moved or last called.
    Only writes through `.data`, which PyTorch itself cannot see, and writes into single masks that
    nothing but compiled calls follow, need a call of `prepare`.
    """

    derived = ("_stairs", "_sources", "_kinds", "_places", "_watched")
    methods: ClassVar[tuple[str, ...]] = ()
    """Methods of the library's class that its own code calls, and that converted calls skip."""
    _kinds: list[type]
    """The classes of the modules of the network."""
    _places: list[int]
    """Which of these are the masked layers, from the inputs up."""
    _watched: tuple[Watched, list[nn.Module]] | None
    """The network as it was last found plain, and the masked layers; no copy has it."""
    op = "autoregressive_forward"
    _stairs: Tensor | list[Tensor] | None
    _sources: list[tuple[Tensor, float]]

    def root(self) -> nn.Module | None:
        """The network, of which the library's own code calls all modules."""
        raise NotImplementedError(f"{type(self).__name__} has no root")

    def find_layers(self) -> list[nn.Module]:
        """The masked layers of a network that `check` has found known, from the inputs up."""
        raise NotImplementedError(f"{type(self).__name__} has no find_layers")

    def layers(self, called: bool = True) -> list[nn.Module] | None:
        """The masked layers; None where the library's own code must answer.

        That is so where a module of the network is not what it was when the layer was converted, or
        has hooks or another `forward`, so that it must be called.

        Arguments:
            called: whether this is for a call, to which hooks and other methods matter.
        """
        for name in self.methods:
            if called and name in self.__dict__:
                return None
        root, compiling = self.root(), torch.compiler.is_compiling()
        if not compiling and self._watched is not None and self._watched[0].holds(root):
            return self._watched[1]
        modules = inside(root)
        if [*map(type, modules)] != self._kinds:
            return None
        layers: list[Any] = [modules[place] for place in self._places]
        if called and (global_hooks() or not all([m is None or plain(m) for m in modules])):
            return None
        if called and not compiling:
            self._watched = Watched(modules), layers
        return layers

    def derive(self, sources: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """The masks of the layers' buffers as `fastflow.functional.autoregressive` takes them.

        Raises:
            Unsupported: it takes no such masks.
        """
        raise NotImplementedError(f"{type(self).__name__} has no derive")

    def check(self) -> None:
        """Raises Unsupported unless all settings of the layer are known."""
        raise NotImplementedError(f"{type(self).__name__} has no check")

    def prepare(self) -> None:
        self.check()
        modules, layers = inside(self.root()), self.find_layers()
        self._watched = None
        self._kinds = [*map(type, modules)]
        self._places = [modules.index(layer) for layer in layers]
        self._derive(tensors(layers, "mask"))

    def adopt(self, layer: nn.Module) -> None:
        super().adopt(layer)
        layer.register_load_state_dict_post_hook(_loaded)

    def restore(self) -> None:
        hooks = self._load_state_dict_post_hooks
        for number in [number for number, hook in hooks.items() if hook is _loaded]:
            del hooks[number]
        super().restore()

    def stairs(self, sources: Sequence[Tensor]) -> Tensor | list[Tensor] | None:
        """The masks as ops take them; None where the library's own class must answer.

        Arguments:
            sources: the masks of all layers, as they are now.
        """
        if torch.compiler.is_compiling() or self._seen(sources):
            return self._stairs
        if any(map(wrapped, sources)):
            return None  # several networks at once, by vmap
        try:
            self._derive(sources)
        except Unsupported as problem:
            warn(f"{type(self).__name__}: {problem}: the library's own code answers, at its speed")
        return self._stairs

    def answered(self, x: Tensor, network: dict[str, Any] | None, inverse: bool = False) -> bool:
        """Whether the library's own code is to answer a call, being faster or the only one.

        Arguments:
            x: points, (*batch, D).
            network: as ops take it; None where they cannot.
            inverse: of the direction that is not parallel.
        """
        if network is None:
            return True
        return inverse and no_kernel(self.op, x) and passes_are_cheap(x, network["weights"])

    def refresh(self) -> None:
        """Makes the staircase anew if the masks are others, for compiled calls."""
        layers = self.layers(called=False)
        if layers is None:
            self._sources = []  # the next call of a network that is known again will tell
            return
        sources = tensors(layers, "mask")
        if not self._seen(sources):
            try:
                self._derive(sources)
            except Unsupported:
                self._sources = []  # the next eager call will tell; memory may not be filled yet

    def _seen(self, sources: Sequence[Tensor]) -> bool:
        """Whether the staircase is that of these buffers as they are now."""
        if len(sources) != len(self._sources):
            return False
        try:
            for source, (seen, version) in zip(sources, self._sources):
                if source is not seen or source._version != version:
                    return False
        except RuntimeError:  # made in inference mode
            return False
        return True

    def _derive(self, sources: Sequence[Tensor]) -> None:
        # what is refused once is not tried again at every call
        self._stairs, self._sources = None, [(source, _version(source)) for source in sources]
        if any(source.is_meta for source in sources):
            return
        device = sources[0].device
        with unrecorded():
            stairs = self.derive(sources)
            if isinstance(stairs, Tensor):
                self._stairs = stairs.to(device)
            else:
                self._stairs = [mask.to(device) for mask in stairs]

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        super()._apply(*args, **kwargs)
        self.refresh()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # a copy's versions start anew, so that it must not trust those of the original
        self.refresh()
        inherited = getattr(super(), "__getstate__", None)
        state = dict(inherited() if inherited else self.__dict__)
        return state | {"_sources": [], "_watched": None}


def check_methods(name: str, module: nn.Module) -> None:
    """Raises Unsupported if methods of a module were replaced on the instance."""
    kind = type(module)
    for key, value in vars(module).items():
        if not callable(getattr(kind, key, None)) or own_method(module, key):
            continue
        if getattr(value, "__self__", None) is module and hasattr(kind, value.__name__):
            continue  # another of its own, as Pyro's constructor chooses one
        raise Unsupported(f"{name} has a {key} of its own, which would not be called")


def as_bool(given: Sequence[Tensor]) -> list[Tensor]:
    """Masks (n_l, n_{l-1}) of any type as bool.

    Raises:
        Unsupported: one holds other numbers than 0 and 1.
    """
    if any(((mask != 0) & (mask != 1)).any() for mask in given):
        raise Unsupported("its masks hold other numbers than 0 and 1, which would scale weights")
    return [mask != 0 for mask in given]


def _version(source: Tensor) -> float:
    """How often a tensor was written to; for tensors that do not count it, nothing equals it."""
    try:
        return source._version
    except RuntimeError:  # made in inference mode
        return math.nan


def _loaded(layer: MaskedLayer, _: Any) -> None:
    layer.refresh()
