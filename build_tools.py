"""Finds what a build needs: torch, compilers, the CUDA toolkit, the headers of Python."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PROJECT = Path(__file__).with_name("pyproject.toml")
CUDA_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")


class CannotBuild(Exception):
    """Why a library cannot be built here, in one line."""


class CompilerFailed(CannotBuild):
    """A compiler is there and did not do its work."""


@dataclass(frozen=True)
class Torch:
    """An installed torch, known without importing it."""

    root: Path
    version: str
    commit: str
    cuda: str | None


def floor(package: str) -> tuple[int, ...]:
    """The oldest version that pyproject.toml allows of a package, which is written there alone."""
    (version,) = set(re.findall(rf'"{package}>=([\d.]+)', PROJECT.read_text(encoding="utf-8")))
    return release(version)


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version: (2, 11, 0) for 2.11.0a0+cpu."""
    return tuple(map(int, re.match(r"\d+(\.\d+)*", version)[0].split(".")))


def dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def check_setuptools() -> None:
    """Ends an installation with a line in place of a traceback where setuptools is too old."""
    try:
        from setuptools import __version__ as found
    except ImportError:
        found = ""
    oldest = dotted(floor("setuptools"))
    if not found or release(found) < floor("setuptools"):
        raise SystemExit(
            f"fastflow: this environment has {f'setuptools {found}' if found else 'no setuptools'},"
            f" an installation without build isolation needs {oldest} or later: "
            f"python -m pip install 'setuptools>={oldest},<82' (torch 2.11 takes none from 82 on)"
        )


def find_torch() -> Torch | None:
    """The torch to build against: the build environment's, else the one of the target environment.

    pip isolates a build through PYTHONPATH and PYTHONNOUSERSITE; the same interpreter told to
    ignore them (-E) sees what the environment that is being installed into sees.
    """
    spec = importlib.util.find_spec("torch")
    origin = spec.origin if spec else None
    if not origin:
        look = "import importlib.util as u; s = u.find_spec('torch'); print(s and s.origin or '')"
        command = [sys.executable, "-E", "-c", look]
        run = subprocess.run(command, capture_output=True, text=True, cwd=sys.prefix)
        origin = run.stdout.strip()
    if not origin:
        return None
    root = Path(origin).resolve().parent
    facts = runpy.run_path(str(root / "version.py"))
    commit = facts.get("git_version") or "unknown"
    return Torch(root, str(facts["__version__"]), commit, facts.get("cuda"))


def find_cxx() -> list[str]:
    """The C++ compiler, as the start of a command line."""
    if platform.system() != "Linux":
        raise CannotBuild(f"native code is built on Linux only, this is {platform.system()}")
    command = shlex.split(os.environ.get("CXX", ""))
    candidates = command[:1] or ["c++", "g++", "clang++"]
    for candidate in candidates:
        if path := shutil.which(candidate):
            return [path, *command[1:]]
    raise CannotBuild(f"no C++ compiler ({', '.join(candidates)})")


def find_nvcc(torch: Torch) -> str:
    """nvcc, from the environment's variables, PATH, NVIDIA's pip packages or the usual folder."""
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    if home := os.environ.get("CUDA_HOME"):
        candidates.insert(0, f"{home}/bin/nvcc")
    candidates += sorted(map(str, torch.root.parent.glob("nvidia/cu*/bin/nvcc")))
    candidates.append("/usr/local/cuda/bin/nvcc")
    for candidate in candidates:
        if candidate and (path := shutil.which(candidate)):
            return path
    raise CannotBuild("no nvcc (on PATH, in CUDA_HOME or /usr/local/cuda)")


def toolkit(nvcc: str) -> tuple[int, list[str]]:
    """The major version of nvcc's CUDA and its include folders; nvcc may be a wrapper elsewhere."""
    version = output([nvcc, "--version"])
    release = re.search(r"release (\d+)\.", version)
    includes = re.findall(r'"-I([^"]+)"', output([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]))
    if not release or not includes:
        raise CannotBuild(f"{nvcc} does not work: {first_error(version)}")
    return int(release[1]), includes


def find_cudart(includes: Iterable[str], torch: Torch, major: int) -> str:
    """The shared CUDA runtime to link: the toolkit's own, else that of NVIDIA's pip packages."""
    folders = [Path(i).parent / lib for i in includes for lib in ("lib64", "lib")]
    folders += [
        torch.root.parent / "nvidia" / f"cu{major}" / "lib",
        torch.root.parent / "nvidia" / "cuda_runtime" / "lib",
    ]
    for folder in folders:
        for name in (f"libcudart.so.{major}", "libcudart.so"):
            if (folder / name).exists():
                return str(folder / name)
    raise CannotBuild(f"no libcudart.so.{major} beside nvcc")


def architecture_flags(nvcc: str) -> list[str]:
    """-gencode options: TORCH_CUDA_ARCH_LIST, or what nvcc knows of the defaults and PTX."""
    wanted = re.split(r"[ ;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    flags = []
    if wanted != [""]:
        for entry in wanted:
            match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
            if not match:
                raise CannotBuild(
                    f"TORCH_CUDA_ARCH_LIST has {entry!r}, expected such as 9.0 or 9.0+PTX"
                )
            arch = match[1] + match[2]
            flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
            if match[3]:
                flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
        return flags
    known = output([nvcc, "--list-gpu-code"]).split()
    chosen = [arch for arch in CUDA_ARCHITECTURES if f"sm_{arch}" in known]
    if not chosen:
        raise CannotBuild(f"{nvcc} knows none of sm_{', sm_'.join(CUDA_ARCHITECTURES)}")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in chosen]
    return [*flags, f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}"]


def find_python_headers() -> str:
    """The folder of Python.h, of the Python that runs this."""
    folder = sysconfig.get_path("include")
    if not (Path(folder) / "Python.h").exists():
        raise CannotBuild(f"no Python.h in {folder}")
    return folder


@cache
def version_of(*command: str) -> str:
    """What a compiler says of itself."""
    return output([*command, "--version"])


def output(command: list[str]) -> str:
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return run.stdout


def first_error(text: str) -> str:
    """The line in which a compiler says what is wrong, or the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for words in (r"\b(error|fatal)\b *:|undefined reference", r"(?i)error"):
        for line in lines:
            if re.search(words, line):
                return line
    return lines[-1] if lines else ""
