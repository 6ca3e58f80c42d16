"""What is installed, which backends work and what to do about those that do not."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from fastflow import backends, native
from fastflow.autograd import node

# What to do about a reason, by words that occur in it.
REMEDIES = (
    ("left out by FASTFLOW_NODE", "install fastflow again without FASTFLOW_NODE"),
    ("FASTFLOW_NODE", "unset it to have the node"),
    ("another torch or Python", "install fastflow again in this environment"),
    (" failed on ", "`pip install -v` shows all that it says; g++ 11 or later is needed"),
    ("no Python.h", "install Python's headers (python3-dev), then install fastflow again"),
    ("FASTFLOW_BUILD", "install fastflow again without FASTFLOW_BUILD"),
    ("no C++ compiler", "install g++ 11 or later, then install fastflow again"),
    ("no nvcc", "install the CUDA toolkit of torch's CUDA version, then install fastflow again"),
    ("has no CUDA", "install a CUDA build of torch, then install fastflow again"),
    ("sees no CUDA device", "on a machine with an NVIDIA GPU, check its driver with nvidia-smi"),
    ("triton", "pip install -U triton"),
    ("not built", "`pip install -v` shows the compiler's output"),
    ("does not load", "install fastflow again in this environment"),
)


def info() -> dict[str, Any]:
    """Versions, devices and backends of this installation. Asks the CUDA driver for its devices.

    Returns:
        A dict with the keys `fastflow`, `python`, `torch`, `triton`, `cuda` (versions, None where
        there is none), `gpus` (names), `cpu` (the vector unit), `threads`, and `backends`: by name,
        `needed` (whether it is made for a device that torch sees here), `devices` that it serves
        here, `reason` (None if it works), `remedy` and `library` (the file it runs on, None if it
        is not compiled); and `node`, the autograd node in C++ that makes small calls of cpp and
        cuda faster: `reason`, `remedy` and `library`.

    Example:
        >>> import fastflow
        >>> fastflow.info()["backends"]["reference"]["devices"][0]
        'cpu'
    """
    from fastflow import __version__  # the package imports this module before it is complete

    gpu = torch.cuda.is_available()
    return {
        "fastflow": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "backends": {name: _backend(name, gpu) for name in backends.names()},
        "node": {
            "reason": node.reason,
            "remedy": _remedy(node.reason),
            "library": str(node.library) if node.library else None,
        },
    }


def report() -> str:
    """`info` as a table to read."""
    facts = info()
    lines = [
        f"fastflow {facts['fastflow']}",
        f"  python   {facts['python']}",
        f"  torch    {facts['torch']}",
        f"  triton   {facts['triton'] or 'none'}",
        f"  CUDA     {facts['cuda'] or 'none: this torch has no CUDA'}",
        f"  GPU      {', '.join(facts['gpus']) or 'none'}",
        f"  CPU      {facts['cpu']}, {facts['threads']} threads",
        "backends",
    ]
    for name, backend in facts["backends"].items():
        lines += _lines(name, backend, f"{' and '.join(backend['devices'])} tensors")
        lines += _earlier("cpu" if name == "cpp" else name, backend)
    lines.append("autograd")
    lines += _lines("node", facts["node"], "in C++")
    lines += _earlier("node", facts["node"])
    return "\n".join(lines)


def _lines(name: str, part: dict[str, Any], what: str) -> list[str]:
    library = f"; {part['library']}" if part["library"] else ""
    if part["reason"] is None:
        return [f"  {name:<10} ready    {what}{library}"]
    needed = part.get("needed", True)
    found = "missing  " if needed else "no GPU   not needed here: "
    lines = [f"  {name:<10} {found}{part['reason']}{library}"]
    arrow = "->" if needed else "-> for a GPU:"
    return lines + [f"  {'':<10}          {arrow} {part['remedy']}"] * bool(part["remedy"])


def _earlier(part: str, found: dict[str, Any]) -> list[str]:
    """A line where the last build failed and left the library of an earlier one."""
    noted = native.build_record().get(part)
    if not (found["library"] and noted):
        return []
    return [f"  {'':<10}          of an earlier build; the last one failed: {noted}"]


def _remedy(reason: str | None) -> str | None:
    return next((what for words, what in REMEDIES if reason and words in reason), None)


def _backend(name: str, gpu: bool) -> dict[str, Any]:
    seen = ("cpu", "cuda") if gpu else ("cpu",)
    devices = [device for device in seen if name in backends.available(device)]
    reason = backends.status(name)
    if reason is None and not devices:
        reason = "torch sees no CUDA device"
    library = native.libraries.get(name)
    return {
        "needed": any(backends.serves(name, device) for device in seen),
        "devices": devices,
        "reason": reason,
        "remedy": _remedy(reason),
        "library": str(library) if library else None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
