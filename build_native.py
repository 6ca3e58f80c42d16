"""Compiles csrc/ into the shared libraries of fastflow, and is the build backend that pip calls.

The libraries use the stable ABI of torch 2.11 and no Python API: one build serves every later
torch and every Python. FASTFLOW_BUILD chooses what is built:

    auto (default)  what the tools at hand can build; what is missing is said in one line and
                    recorded in fastflow/_build.json, where `python -m fastflow` finds it
    none            nothing
    cpu, cuda       the CPU libraries, or these and the CUDA library, or an error

CXX, CXXFLAGS, CUDACXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS are honoured.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (a build backend: the hooks pip calls)

# Commands run in ROOT with relative paths, so that object files serve wherever the tree is.
ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
WORK = ROOT / "build" / "native"
OLDEST_TORCH = (2, 11)
X86_FLAGS = {
    "default": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": [
        *("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"),
        "-mprefer-vector-width=512",
    ],
}
CXX_FLAGS = [
    *("-O3", "-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-DNDEBUG"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]
NVCC_FLAGS = ["-O3", "-std=c++20", "-DNDEBUG", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")


class CannotBuild(Exception):
    """Why a library cannot be built here, and what that costs, in one line."""


@dataclass(frozen=True)
class Torch:
    """An installed torch, known without importing it."""

    root: Path
    version: str
    cuda: str | None


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
    return Torch(root, str(facts["__version__"]), facts.get("cuda"))


def _torch_requirement() -> list[str]:
    """torch as a build requirement, where the target environment has none (or one too old)."""
    if os.environ.get("FASTFLOW_BUILD") == "none":
        return []
    torch = find_torch()
    if torch and tuple(map(int, torch.version.split(".")[:2])) >= OLDEST_TORCH:
        return []
    return ["torch>={}.{}".format(*OLDEST_TORCH)]


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()


# ---------------------------------------------------------------- tools


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
    version = _output([nvcc, "--version"])
    release = re.search(r"release (\d+)\.", version)
    includes = re.findall(r'"-I([^"]+)"', _output([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]))
    if not release or not includes:
        raise CannotBuild(f"{nvcc} does not work: {_first_error(version)}")
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
    known = _output([nvcc, "--list-gpu-code"]).split()
    chosen = [arch for arch in CUDA_ARCHITECTURES if f"sm_{arch}" in known]
    if not chosen:
        raise CannotBuild(f"{nvcc} knows none of sm_{', sm_'.join(CUDA_ARCHITECTURES)}")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in chosen]
    return [*flags, f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}"]


def _output(command: list[str]) -> str:
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return run.stdout


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")


# ---------------------------------------------------------------- compiling


def _sources_of(file: Path, seen: dict[Path, bytes]) -> dict[Path, bytes]:
    """A source file and the headers of csrc/ that it includes, with their contents."""
    if file not in seen:
        seen[file] = file.read_bytes()
        for name in re.findall(rb'^\s*#\s*include\s+"([^"]+)"', seen[file], re.MULTILINE):
            for folder in (file.parent, CSRC):
                header = (folder / name.decode()).resolve()
                if header.is_file():
                    _sources_of(header, seen)
                    break
    return seen


def _make(command: list[str], inputs: list[bytes], stem: str, suffix: str) -> Path:
    """Run `command -o file` unless a file with this command and these inputs is there already.

    The file's name is a digest of both and it appears by renaming: a build that is killed, or
    runs twice at once, leaves nothing half-written behind.
    """
    digest = hashlib.sha256("\0".join(command).encode())
    for content in inputs:
        digest.update(hashlib.sha256(content).digest())
    made = WORK / f"{stem}-{digest.hexdigest()[:16]}{suffix}"
    if not made.exists():
        WORK.mkdir(parents=True, exist_ok=True)
        partial = made.with_name(f"{made.stem}.{os.getpid()}{suffix}")
        run = subprocess.run(
            [*command, "-o", _relative(partial)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if run.returncode:
            partial.unlink(missing_ok=True)
            print(shlex.join(command), run.stdout, sep="\n", file=sys.stderr)
            tool = Path(command[0]).name
            error = _first_error(run.stdout) or f"exit status {run.returncode}"
            raise CannotBuild(f"{tool} failed on {stem}: {error}")
        partial.rename(made)
    return made


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _compile(jobs: list[tuple[list[str], Path]], flavour: str) -> list[Path]:
    """Object files of (command, source file) pairs, compiled in parallel."""

    def one(job: tuple[list[str], Path]) -> Path:
        command, source = job
        inputs = list(_sources_of(source, {}).values())
        return _make([*command, "-c", _relative(source)], inputs, f"{flavour}-{source.name}", ".o")

    with ThreadPoolExecutor(_jobs()) as pool:
        return list(pool.map(one, jobs))


def _user_flags() -> list[str]:
    return shlex.split(os.environ.get("CXXFLAGS", ""))


def _jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


def _link(cxx: list[str], objects: list[Path], extra: list[str], torch: Torch, name: str) -> Path:
    libraries = ["-L" + str(torch.root / "lib"), "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    command = [*cxx, "-shared", "-fopenmp", *_user_flags(), *map(_relative, objects)]
    command += [*libraries, "-lc10", *extra]
    return _make(command, [], name, ".so")


def build_cpu(torch: Torch) -> dict[str, Path]:
    """The CPU libraries by name: the same sources, once for every vector unit."""
    cxx = find_cxx()
    flavours = X86_FLAGS if platform.machine() == "x86_64" else {"default": []}
    sources = [CSRC / "ops.cpp", *CSRC.glob("*/*_cpu.cpp"), *CSRC.glob("*/*_bind.cpp")]
    common = [*cxx, *CXX_FLAGS, *_user_flags(), "-Icsrc"]
    common += ["-isystem", str(torch.root / "include")]
    libraries = {}
    for flavour, flags in flavours.items():
        objects = _compile([([*common, *flags], source) for source in sorted(sources)], flavour)
        libraries[f"_cpu_{flavour}.so"] = _link(cxx, objects, [], torch, f"cpu_{flavour}")
    return libraries


def build_cuda(torch: Torch, insist: bool, record: dict) -> dict[str, Path]:
    """The CUDA library by name: kernels by nvcc, which sees no torch header, bindings by C++.

    Records the code it holds, sm_90 (machine code) or compute_90 (PTX), as `cuda_code`.
    """
    if not torch.cuda and not insist:
        raise CannotBuild(f"torch {torch.version} has no CUDA")
    cxx, nvcc = find_cxx(), find_nvcc(torch)
    major, includes = toolkit(nvcc)
    if torch.cuda and int(torch.cuda.split(".")[0]) != major:
        raise CannotBuild(f"{nvcc} is of CUDA {major}, torch {torch.version} of CUDA {torch.cuda}")
    common = [*cxx, *CXX_FLAGS, *_user_flags(), "-DFASTFLOW_CUDA", "-DUSE_CUDA", "-Icsrc"]
    common += ["-isystem", str(torch.root / "include")]
    common += [part for folder in includes for part in ("-isystem", folder)]
    host = [f"-ccbin={cxx[0]}", *(f"-Xcompiler={flag}" for flag in cxx[1:])]
    codes = architecture_flags(nvcc)
    kernels = sorted(CSRC.glob("*/*.cu"))
    threads = max(1, _jobs() // max(1, len(kernels)))  # nvcc's own, one per architecture
    device = [nvcc, *NVCC_FLAGS, *host, *codes, f"--threads={threads}", "-Icsrc"]
    jobs = [(device, source) for source in kernels]
    jobs += [(common, source) for source in sorted(CSRC.glob("*/*_bind.cpp"))]
    objects = _compile(jobs, "cuda")
    library = _link(cxx, objects, [find_cudart(includes, torch, major)], torch, "cuda")
    record["cuda_code"] = [code.split(",code=")[1] for code in codes]
    return {"_cuda.so": library}


def build(destination: Path) -> None:
    """Build what FASTFLOW_BUILD asks for into a package folder, and record what is missing."""
    mode = os.environ.get("FASTFLOW_BUILD") or "auto"
    if mode not in ("auto", "none", "cpu", "cuda"):
        raise SystemExit(f"FASTFLOW_BUILD is {mode!r}, must be auto, none, cpu or cuda")
    torch = find_torch()
    if torch is None and mode != "none":
        raise SystemExit(
            "fastflow: this environment has no torch to build against: install torch first, or "
            "drop --no-build-isolation, or set FASTFLOW_BUILD=none to go without compiled code"
        )
    record: dict[str, str | list[str] | None] = {"torch": torch.version if torch else None}
    libraries: dict[str, Path] = {}
    for part, wanted in (("cpu", ("cpu", "cuda")), ("cuda", ("cuda",))):
        record[part] = None
        try:
            if mode != "auto" and mode not in wanted:
                raise CannotBuild(f"left out by FASTFLOW_BUILD={mode}")
            assert torch is not None
            if part == "cpu":
                libraries |= build_cpu(torch)
            else:
                libraries |= build_cuda(torch, mode == "cuda", record)
        except CannotBuild as problem:
            if mode in wanted:
                raise SystemExit(f"fastflow: FASTFLOW_BUILD={mode}: {problem}") from problem
            record[part] = str(problem)
            cost = {"cpu": "CPU tensors take the slower reference", "cuda": "GPUs take Triton"}
            print(f"fastflow: no {part} library: {problem}; {cost[part]}", file=sys.stderr)
    _install(destination, libraries, record)


def _install(destination: Path, libraries: dict[str, Path], record: dict) -> None:
    """Put libraries and record in place by renaming, so that running processes keep theirs."""
    destination.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    note = WORK / f"build.{os.getpid()}.json"
    note.write_text(json.dumps(record, indent=2) + "\n")
    for name, made in {**libraries, "_build.json": note}.items():
        partial = destination / f"{name}.{os.getpid()}"
        shutil.copyfile(made, partial)
        partial.rename(destination / name)
    note.unlink()
    for old in (*destination.glob("_cpu_*.so"), *destination.glob("_cuda.so")):
        if old.name not in libraries:
            old.unlink()
