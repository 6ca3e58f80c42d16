"""Which of PyTorch's transforms is looking at the call: kernels cannot serve them all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

_BATCHED = torch._C._dispatch_key_parse("Batched")


def functorch_active() -> bool:
    """Whether vmap, grad, jvp or another torch.func transform is running."""
    return torch._C._are_functorch_transforms_active()


def batched(tensor: Tensor) -> bool:
    """Whether a tensor stands for several: a cotangent of autograd.grad(is_grads_batched=True)."""
    return torch._C._dispatch_keys(tensor).has(_BATCHED)


def wrapped(tensor: Tensor) -> bool:
    """Whether a tensor stands for another one inside a torch.func transform."""
    return is_functorch_wrapped_tensor(tensor)


def transforms_active() -> bool:
    """Whether values may be symbolic or batched, so that Python must not branch on them."""
    return functorch_active() or torch.compiler.is_compiling()


def readable(tensor: Tensor) -> bool:
    """Whether Python may look at the values: they are there, and looking would stop nothing."""
    if torch.compiler.is_compiling() or type(tensor) is not Tensor or tensor.is_meta:
        return False
    if is_functorch_wrapped_tensor(tensor):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def forward_mode_active(*tensors: Tensor) -> bool:
    """Whether any tensor carries a forward-mode tangent."""
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def without_autocast(device: str) -> AbstractContextManager:
    """Autocast turned off for a device type; the meta device has none."""
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Makes tensors that outlive the call: no gradients, inference mode or torch.func transform."""
    with torch._C._DisableFuncTorch(), torch.inference_mode(False), torch.no_grad():
        yield
