"""Loads the compiled libraries and tells PyTorch what it must know of their ops.

Importing this module opens one CPU library, for the vector unit of this processor, and the CUDA
library where torch has CUDA. It asks no device anything, and no failure leaves it: the reason is
kept for `probe`, which the registry of backends and `python -m fastflow` show.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from fastflow.transforms import forward_mode_active

FOLDER = Path(__file__).resolve().parent
# What a processor of each capability (torch.backends.cpu.get_cpu_capability) runs, best first.
CPU_LIBRARIES = {"AVX512": ("avx512", "avx2", "default"), "AVX2": ("avx2", "default")}

libraries: dict[str, Path] = {}  # backend name -> the library file it runs on
_reasons: dict[str, str] = {}  # backend name -> why it has none


@cache
def build_record() -> dict[str, str | list[str] | None]:
    """What the build noted: the torch it saw, and for cpu and cuda why a library is missing."""
    try:
        return json.loads((FOLDER / "_build.json").read_text())
    except (OSError, ValueError):
        return {}


def probe(name: str) -> str | None:
    """None if the backend "cpp" or "cuda" works here, else the reason in one line.

    For "cuda" this asks the driver for its devices, so it is not called at import.
    """
    if name == "cuda" and name in libraries:
        return _device_reason()
    return _reasons.get(name)


def __getattr__(name: str) -> OpOverload:
    """The ops of the libraries by name: `native.planar_flow_forward(z, w, u, b, False)`."""
    if name in FAKES and "cpp" in libraries:
        return overload(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def overload(op: str) -> OpOverload:
    """The registered op of that name."""
    return getattr(torch.ops.fastflow, op).default


# ---------------------------------------------------------------- loading


def _open(name: str, file: Path) -> str | None:
    """Open a library; None, or the reason why that failed."""
    try:
        torch.ops.load_library(str(file))
    except OSError as problem:
        return f"{file.name} does not load: {problem.__cause__ or problem}".split("\n")[0]
    libraries[name] = file
    return None


def not_built(part: str) -> str:
    noted = build_record().get(part) or "no library in the package; run `pip install -e .`"
    return f"not built: {noted}"


def _load() -> None:
    flavours = CPU_LIBRARIES.get(torch.backends.cpu.get_cpu_capability(), ("default",))
    files = [file for flavour in flavours if (file := FOLDER / f"_cpu_{flavour}.so").exists()]
    reason: str | None = not_built("cpu")
    for file in files:
        reason = _open("cpp", file)
        if reason is None:
            break
    if reason is not None:
        _reasons["cpp"] = reason

    file = FOLDER / "_cuda.so"
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} has no CUDA"
    elif not file.exists():
        reason = not_built("cuda")
    elif "cpp" not in libraries:
        reason = "it needs the CPU library, which declares the ops"
    else:
        reason = _open("cuda", file)
    if reason is not None:
        _reasons["cuda"] = reason


def _device_reason() -> str | None:
    """None if the CUDA library has code for every device that torch sees, else why not."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    code = [str(entry) for entry in build_record().get("cuda_code") or ()]
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if code and not any(_runs_on(entry, capability) for entry in code):
            arch = ".".join(map(str, capability))
            return (
                f"built for {' '.join(code)}, not for {torch.cuda.get_device_name(index)}: set "
                f"TORCH_CUDA_ARCH_LIST={arch} and install again"
            )
    return None


def _runs_on(code: str, capability: tuple[int, int]) -> bool:
    """Whether sm_XY or compute_XY code runs on a device: same major for sm, any later for PTX."""
    ((kind, major, minor, exact),) = re.findall(r"^(sm|compute)_(\d+)(\d)([af]?)$", code)
    arch = (int(major), int(minor))
    if exact == "a":
        return arch == capability
    return arch <= capability and (capability[0] == arch[0] or (kind == "compute" and not exact))


# ---------------------------------------------------------------- what PyTorch must know


def _planar_flow_outputs(
    z: Tensor, w: Tensor, u: Tensor, b: Tensor, centred: bool
) -> tuple[Tensor, ...]:
    rows = z.shape[0]
    return torch.empty_like(z), z.new_empty(rows), z.new_empty(rows, b.shape[-1])


def _planar_flow_gradients(
    d_out: Tensor,
    dladj: Tensor,
    z: Tensor,
    out: Tensor,
    w: Tensor,
    u: Tensor,
    a: Tensor,
    centred: bool,
    param_grads: bool,
) -> tuple[Tensor, ...]:
    shapes = (w.shape, u.shape, w.shape[:-1]) if param_grads else ((0,),) * 3
    return (torch.empty_like(z), *(z.new_empty(shape) for shape in shapes))


def _saved(x: Tensor, units: int) -> Tensor:
    rows = 64  # kMostTileRows of csrc/autoregressive/autoregressive.h
    return x.new_empty((x.shape[0] + rows - 1) // rows * rows * units)


def _made_outputs(
    x: Tensor,
    terms: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    stairs: Tensor,
    activation: int,
    residual: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape[0], weights[-1].shape[0])
    return y, _saved(x, sum(w.shape[0] for w in weights[:-1])) if save else x.new_empty(0)


def _autoregressive_outputs(
    x: Tensor, terms: Sequence[Tensor], weights: Sequence[Tensor], *setting: float | bool | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    save = setting[-1]
    saved = _saved(x, sum(w.shape[0] for w in weights)) if save else x.new_empty(0)
    return torch.empty_like(x), x.new_empty(x.shape[0]), saved


def _context_outputs(
    x: Tensor,
    context: Tensor,
    context_weight: Tensor,
    context_bias: Tensor | None,
    context_activated: bool,
    weights: Sequence[Tensor],
    *setting: float | bool | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    units = sum(w.shape[0] for w in weights)
    if context_activated:  # torch 2.11 does not multiply a symbolic size by a bool
        units = units + context_weight.shape[0]
    saved = _saved(x, units) if setting[-1] else x.new_empty(0)
    return torch.empty_like(x), x.new_empty(x.shape[0]), saved


def _masked_gradients(
    x: Tensor, weights: Sequence[Tensor], wanted: Sequence[Any]
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    terms_grad, biases_given, x_grad, param_grads = wanted
    none, layers = x.new_empty(0), list(enumerate(weights))
    rows = x.shape[0]
    return (
        torch.empty_like(x) if x_grad else none.clone(),
        [x.new_empty(rows, w.shape[0]) if terms_grad >> i & 1 else none.clone() for i, w in layers],
        [torch.empty_like(w) if param_grads else none.clone() for w in weights],
        [
            x.new_empty(w.shape[0]) if param_grads and biases_given >> i & 1 else none.clone()
            for i, w in layers
        ],
    )


def _made_gradients(
    dy: Tensor, x: Tensor, saved: Tensor, weights: Sequence[Tensor], *setting: float | Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    return _masked_gradients(x, weights, setting[-4:])


def _autoregressive_gradients(
    d_out: Tensor,
    dladj: Tensor,
    x: Tensor,
    saved: Tensor,
    weights: Sequence[Tensor],
    *setting: float | Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    return _masked_gradients(x, weights, setting[-4:])


def _context_gradients(
    dy: Tensor,
    dladj: Tensor,
    x: Tensor,
    context: Tensor,
    saved: Tensor,
    context_weight: Tensor,
    context_bias_given: bool,
    context_activated: bool,
    weights: Sequence[Tensor],
    *setting: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    biases_given, x_grad, context_grad, param_grads = setting[-4:]
    dx, _, dweights, dbiases = _masked_gradients(x, weights, (0, biases_given, x_grad, param_grads))
    return (
        dx,
        torch.empty_like(context) if context_grad else x.new_empty(0),
        torch.empty_like(context_weight) if param_grads else x.new_empty(0),
        x.new_empty(context_weight.shape[0] if context_bias_given and param_grads else 0),
        dweights,
        dbiases,
    )


def _pcp_outputs(
    point: Tensor, net: Sequence[Tensor], layers: int, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return torch.empty_like(point), point.new_empty(point.shape[0]), []


def _pcp_gradients(
    d_out: Tensor,
    dladj: Tensor,
    x: Tensor,
    saved: Sequence[Tensor],
    net: Sequence[Tensor],
    layers: int,
    param_grads: bool,
) -> tuple[Tensor, list[Tensor]]:
    return torch.empty_like(x), [x.new_empty(one.shape if param_grads else 0) for one in net]


FAKES: dict[str, Callable[..., tuple]] = {
    "planar_flow_forward": _planar_flow_outputs,
    "planar_flow_backward": _planar_flow_gradients,
    "planar_flow_inverse": _planar_flow_outputs,
    "planar_flow_inverse_backward": _planar_flow_gradients,
    "made_forward": _made_outputs,
    "made_backward": _made_gradients,
    "autoregressive_forward": _autoregressive_outputs,
    "autoregressive_backward": _autoregressive_gradients,
    "autoregressive_context_forward": _context_outputs,
    "autoregressive_context_backward": _context_gradients,
    "autoregressive_inverse": _autoregressive_outputs,
    "autoregressive_inverse_backward": _autoregressive_gradients,
    "autoregressive_context_inverse": _context_outputs,
    "autoregressive_context_inverse_backward": _context_gradients,
    "pcp_forward": _pcp_outputs,
    "pcp_backward": _pcp_gradients,
    "pcp_inverse": _pcp_outputs,
    "pcp_inverse_backward": _pcp_gradients,
}


LAYERS = {"pcp": "PCPMap", "pcp_inverse": "PCPMap.inverse"}  # of ops that are no functions


def _refuse_derivatives(
    op: str, keyset: torch._C.DispatchKeySet, *args: Tensor | list[Tensor] | float
) -> tuple:
    """What a raw op does where autograd would look at it: no derivative rather than a wrong one."""
    tensors = [
        tensor
        for arg in args
        for tensor in (arg if isinstance(arg, (list, tuple)) else (arg,))
        if isinstance(tensor, Tensor)
    ]
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if wanted or forward_mode_active(*tensors):
        function = op.removesuffix("_forward").removesuffix("_backward").replace("_context", "")
        raise RuntimeError(
            f"torch.ops.fastflow.{op} has no derivative of its own: call "
            f"fastflow.{LAYERS.get(function, f'functional.{function}')} instead, or detach the "
            "arguments"
        )
    with torch._C._AutoDispatchBelowAutograd():
        return overload(op).redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _declare() -> torch.library.Library:
    library = torch.library.Library("fastflow", "IMPL")
    for op, fake in FAKES.items():
        torch.library.register_fake(f"fastflow::{op}", fake)
        library.impl(op, partial(_refuse_derivatives, op), "Autograd", with_keyset=True)
    return library


_load()
if "cpp" in libraries:
    _library = _declare()  # its registrations live as long as it does
