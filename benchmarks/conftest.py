"""What a benchmark run measures, and on what.

    pytest benchmarks/ --benchmark-only                      a few minutes on two cores
    pytest benchmarks/ --benchmark-only --bench-grid full    everything
    FASTFLOW_BENCH=smoke pytest benchmarks/ --benchmark-only seconds: does it run?

Every option has an environment variable: FASTFLOW_BENCH (grid), FASTFLOW_BENCH_DEVICE and
FASTFLOW_BENCH_SECONDS. `--benchmark-disable` only checks the answers. `--benchmark-json FILE` keeps
the numbers for report.py.
"""

from __future__ import annotations

import os
import time

import environment
import pytest
import torch
from comparison import EFFORTS, Settings
from suite import SETTINGS, Outcomes

DEFAULTS = {
    "bench_grid": os.environ.get("FASTFLOW_BENCH", "short"),
    "bench_device": os.environ.get("FASTFLOW_BENCH_DEVICE", "auto"),
    "bench_seconds": os.environ.get("FASTFLOW_BENCH_SECONDS"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastflow")
    group.addoption(
        "--bench-grid",
        choices=tuple(EFFORTS),
        default=DEFAULTS["bench_grid"],
        help="which cases, how thoroughly (FASTFLOW_BENCH); default: %(default)s",
    )
    group.addoption(
        "--bench-device",
        choices=("auto", "cpu", "cuda"),
        default=DEFAULTS["bench_device"],
        help="auto takes a GPU if there is one (FASTFLOW_BENCH_DEVICE); default: %(default)s",
    )
    group.addoption(
        "--bench-seconds",
        type=float,
        default=DEFAULTS["bench_seconds"],
        help="begin no comparison after this many seconds (FASTFLOW_BENCH_SECONDS)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # pytest knows the options only when this folder is named on its command line
    grid, device, seconds = (config.getoption(name, value) for name, value in DEFAULTS.items())
    if grid not in EFFORTS:
        raise pytest.UsageError(f"FASTFLOW_BENCH is {grid!r}, must be one of {', '.join(EFFORTS)}")
    if device not in ("auto", "cpu", "cuda"):
        raise pytest.UsageError(f"FASTFLOW_BENCH_DEVICE is {device!r}, must be auto, cpu or cuda")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    deadline = None if seconds is None else time.monotonic() + float(seconds)
    config.stash[SETTINGS] = Settings(torch.device(device), grid, deadline)


def pytest_report_header(config: pytest.Config) -> str:
    settings = config.stash[SETTINGS]
    facts = environment.describe(settings.device)
    return (
        f"fastflow benchmarks: {settings.grid} grid on {facts['device_name']}, "
        f"{facts['threads']} threads, torch {facts['torch']}"
    )


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Keeps what the numbers depend on, and nothing else about the machine or its owner."""
    settings = config.stash[SETTINGS]
    machine_info.clear()
    machine_info["fastflow"] = {**environment.describe(settings.device), "grid": settings.grid}


@pytest.fixture(scope="module")
def outcomes(pytestconfig: pytest.Config) -> Outcomes:
    """The comparisons of the file made so far."""
    return Outcomes(pytestconfig.stash[SETTINGS])
