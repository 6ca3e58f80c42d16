"""What the numbers of a benchmark depend on: the device, its settings, and versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

import fastflow

LIBRARIES = ("triton", "normflows", "pyro-ppl", "zuko", "nflows")

LOAD = os.getloadavg()[0]
"""Of the last minute, when this module is imported: before the benchmarks make their own."""


def describe(device: torch.device) -> dict[str, str | float | None]:
    """Device, threads and versions; None for a library that is not installed."""
    facts: dict[str, str | float | None] = {
        "device": device.type,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": LOAD,
        "python": platform.python_version(),
        "fastflow": fastflow.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    facts.update({library: _version(library) for library in LIBRARIES})
    return facts


def device_name(device: torch.device) -> str:
    """The name its maker gave it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
