"""Every Triton kernel compiles for every supported GPU, without one: see triton_offline.py."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("triton_offline.py")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run(tmp_path: Path, *arguments: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]


def test_a_sample(tmp_path: Path) -> None:
    # 83 is prime to the number of devices and of cases alike, so the sample meets all of them
    run(tmp_path, "--every", "83")


@pytest.mark.slow
def test_usual_sizes_on_every_device(tmp_path: Path) -> None:
    run(tmp_path)


@pytest.mark.slow
def test_all_blocks(tmp_path: Path) -> None:
    run(tmp_path, "--all", "--every", "7")
