"""nvcc compiles every .cu file, for every architecture that it and we know, without spilling."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SOURCES = sorted(CSRC.glob("*/*.cu"))
NVCC = shutil.which("nvcc")
FEW = ["80", "90"]
ALL = ["80", "86", "89", "90", "100", "120"]
REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads",
    re.DOTALL,
)

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")


@pytest.mark.parametrize(
    "architectures", [FEW, pytest.param(ALL, marks=pytest.mark.slow)], ids=["few", "all"]
)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_compiles_without_spills(source: Path, architectures: list[str], tmp_path: Path) -> None:
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True)
    chosen = [arch for arch in architectures if f"sm_{arch}" in known.stdout.split()]
    if not chosen:
        pytest.skip(f"nvcc compiles for none of sm_{', sm_'.join(architectures)}")
    command = [
        *(NVCC, "-O3", "-std=c++20", "--threads=2", "-Xptxas=-v", "-Werror=all-warnings"),
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in chosen),
        *("-c", source, "-o", tmp_path / "kernels.o"),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    reports = list(REPORT.finditer(run.stderr))
    assert len(reports) == run.stderr.count("Compiling entry function")
    if "__global__" in source.read_text():
        assert {report["arch"] for report in reports} == {f"sm_{arch}" for arch in chosen}
    for report in reports:
        memory = [int(report[name]) for name in ("stack", "stores", "loads")]
        assert memory == [0, 0, 0], report[0]
    for static_bytes in re.findall(r"(\d+) bytes smem", run.stderr):
        assert int(static_bytes) <= 48 * 1024


def test_no_fast_math() -> None:
    """No kernel asks for approximate functions: float32 results keep every digit."""
    for source in [*SOURCES, *CSRC.glob("*/*.cuh")]:
        assert not re.search(r"\b__(expf|logf|fdividef|tanhf|powf|frcp_\w+)\b", source.read_text())
