"""Where the library's own code is faster than fastflow, and answers for a converted layer.

Without a compiled backend that is the parallel direction, and D passes where each is cheap.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastflow import backends


def no_kernel(op: str, x: Tensor) -> bool:
    """Whether an op on such points would be computed in plain PyTorch, nothing else being there.

    What `use_backend` asks for is always done.
    """
    return backends.uncompiled(op, x.device.type)


def left_alone(op: str, layer: nn.Module) -> str | None:
    """Why a layer, as it is now, is better left to its library; None if it is not."""
    tensor = next(layer.parameters(), None)
    if tensor is None or tensor.is_meta or not backends.uncompiled(op, tensor.device.type):
        return None
    return (
        f"no compiled backend serves {tensor.device.type} tensors here (`python -m fastflow` says "
        "why), so that only its slow direction would gain: convert(model, without_kernels=True)"
    )
