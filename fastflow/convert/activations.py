"""Which activation of fastflow a library's function or module is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as nnf

from fastflow.convert.layer import Unsupported, check_methods
from fastflow.reference.network import LEAK

FUNCTIONS: dict[Callable, str] = {
    torch.relu: "relu",
    nnf.relu: "relu",
    torch.tanh: "tanh",
    nnf.tanh: "tanh",
    nnf.elu: "elu",
    nnf.silu: "silu",
    nnf.gelu: "gelu",
    nnf.softplus: "softplus",
    nnf.leaky_relu: "leaky_relu",
}
MODULES: dict[type[nn.Module], tuple[str, dict[str, Any]]] = {
    nn.ReLU: ("relu", {}),
    nn.Tanh: ("tanh", {}),
    nn.ELU: ("elu", {"alpha": 1.0}),
    nn.SiLU: ("silu", {}),
    nn.GELU: ("gelu", {"approximate": "none"}),
    # above its threshold PyTorch drops log(1 + exp(-x)) < 2.1e-9; fastflow does not
    nn.Softplus: ("softplus", {"beta": 1.0, "threshold": 20.0}),
    nn.LeakyReLU: ("leaky_relu", {"negative_slope": LEAK}),
}
"""The activation of a module class, where its options are these."""


def activation_name(activation: Callable) -> str:
    """The activation's name in `fastflow.functional`.

    Arguments:
        activation: a function of `torch` or `torch.nn.functional`, or a module.

    Raises:
        Unsupported: fastflow has no such activation, or not with these options.
    """
    if not isinstance(activation, nn.Module):
        try:
            return FUNCTIONS[activation]
        except (KeyError, TypeError):  # TypeError: it has no hash
            shown = getattr(activation, "__name__", repr(activation))
            raise Unsupported(f"activation {shown} is not known") from None
    if type(activation) not in MODULES:
        raise Unsupported(f"activation {activation} is not known")
    name, options = MODULES[type(activation)]
    # in place, it may change what the network reads once more
    options = options | {"inplace": False}
    if any(getattr(activation, key, value) != value for key, value in options.items()):
        raise Unsupported(f"activation {activation} has options that are not known")
    check_hooks(activation)
    return name


def one_activation(activations: Iterable[Callable]) -> str:
    """The name of what all hidden layers have; any name where there are none.

    Raises:
        Unsupported: there are several, or one is not known.
    """
    names = {activation_name(activation) for activation in activations} or {"relu"}
    if len(names) > 1:
        raise Unsupported(f"it has several activations: {', '.join(sorted(names))}")
    (name,) = names
    return name


def check_hooks(module: nn.Module) -> None:
    """Raises Unsupported if a module, or one inside it, has hooks or replaced methods.

    Such hooks would not be called, nor would the methods.
    """
    for path, part in module.named_modules():
        hooks = (
            part._forward_pre_hooks,
            part._forward_hooks,
            part._backward_pre_hooks,
            part._backward_hooks,
        )
        if any(hooks):
            raise Unsupported(f"{path or type(part).__name__} has hooks, which would not be called")
        check_methods(path or type(part).__name__, part)
