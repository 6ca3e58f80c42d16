"""Compiles csrc/ into the shared libraries of fastflow, and is the build backend that pip calls.

The libraries of kernels use the stable ABI of the oldest torch that pyproject.toml allows and no
Python API: one build serves every later torch and every Python. The autograd node (csrc/autograd)
serves only the torch and the Python that it is built with, named in its file name; the package
works without, and FASTFLOW_NODE=0 leaves it out. FASTFLOW_BUILD chooses:

    auto (default)  what the tools at hand can build; what is missing is said in one line and
                    recorded in fastflow/_build.json, where `python -m fastflow` finds it
    none            nothing
    cpu, cuda       the CPU libraries, or these and the CUDA library, or an error; and the node

A compiler that is there and fails ends the installation, in every mode: pip shows the output of
failed builds alone, so that a line about it would never be read.

CXX, CXXFLAGS, CUDACXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS are honoured.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from build_tools import (
    CannotBuild,
    CompilerFailed,
    Torch,
    architecture_flags,
    check_setuptools,
    dotted,
    find_cudart,
    find_cxx,
    find_nvcc,
    find_python_headers,
    find_torch,
    first_error,
    floor,
    release,
    toolkit,
    version_of,
)

check_setuptools()

# isort: split
from setuptools import build_meta  # noqa: E402
from setuptools.build_meta import *  # noqa: E402, F403  (a build backend: the hooks pip calls)

# Commands run in ROOT with relative paths, so that object files serve wherever the tree is.
ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
WORK = ROOT / "build" / "native"
OLDEST_TORCH = floor("torch")
# The parts of a build: for which FASTFLOW_BUILD they must succeed, what their absence costs, and
# what leaves them out where a compiler fails.
PARTS = {
    "cpu": (("cpu", "cuda"), "CPU tensors take the slower reference", "FASTFLOW_BUILD=none"),
    "cuda": (("cuda",), "GPUs take Triton", "FASTFLOW_BUILD=cpu"),
    "node": (("cpu", "cuda"), "small calls take longer", "FASTFLOW_NODE=0"),
}
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
    "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH),
]
NODE_FLAGS = [
    *("-O2", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-DNDEBUG"),
    "-D_GLIBCXX_USE_CXX11_ABI=1",  # as torch itself is compiled since 2.7
]
NVCC_FLAGS = ["-O3", "-std=c++20", "-DNDEBUG", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def _torch_requirement() -> list[str]:
    """torch as a build requirement, where the target environment has none (or one too old)."""
    if os.environ.get("FASTFLOW_BUILD") == "none":
        return []
    torch = find_torch()
    if torch and release(torch.version) >= OLDEST_TORCH:
        return []
    return [f"torch>={dotted(OLDEST_TORCH)}"]


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()


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

    The inputs are all that the file depends on: sources, versions of tools. The file's name is a
    digest of both and it appears by renaming: a build that is killed, or runs twice at once, leaves
    nothing half-written behind.
    """
    digest = hashlib.sha256("\0".join(command).encode())
    for content in inputs:
        digest.update(hashlib.sha256(content).digest())
    made = WORK / f"{stem}-{digest.hexdigest()[:16]}{suffix}"
    if not made.exists():
        WORK.mkdir(parents=True, exist_ok=True)
        partial = made.with_name(f"{made.stem}.{os.getpid()}{suffix}")
        with _slots:
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
            error = first_error(run.stdout) or f"exit status {run.returncode}"
            raise CompilerFailed(f"{tool} failed on {stem}: {error}")
        partial.rename(made)
    return made


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


_slots = threading.BoundedSemaphore(_jobs())  # for all parts, which are built at the same time


def _compile(jobs: list[tuple[list[str], Path]], flavour: str, tools: str) -> list[Path]:
    """Object files of (command, source file) pairs, compiled in parallel.

    Arguments:
        jobs: the pairs.
        flavour: tells the files of one library from those of others.
        tools: versions of compilers, and of torch where its headers are included.
    """

    def one(job: tuple[list[str], Path]) -> Path:
        command, source = job
        inputs = [tools.encode(), *_sources_of(source, {}).values()]
        return _make([*command, "-c", _relative(source)], inputs, f"{flavour}-{source.name}", ".o")

    with ThreadPoolExecutor(_jobs()) as pool:
        return list(pool.map(one, jobs))


def _user_flags() -> list[str]:
    return shlex.split(os.environ.get("CXXFLAGS", ""))


def _tools(cxx: list[str], torch: Torch) -> str:
    return f"{version_of(*cxx)} torch {torch.version} {torch.commit}"


def _link(cxx: list[str], objects: list[Path], extra: list[str], torch: Torch, name: str) -> Path:
    libraries = ["-L" + str(torch.root / "lib"), "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    command = [*cxx, "-shared", "-fopenmp", *_user_flags(), *map(_relative, objects)]
    command += [*libraries, "-lc10", *extra]
    return _make(command, [_tools(cxx, torch).encode()], name, ".so")


def build_cpu(torch: Torch) -> dict[str, Path]:
    """The CPU libraries by name: the same sources, once for every vector unit."""
    cxx = find_cxx()
    flavours = X86_FLAGS if platform.machine() == "x86_64" else {"default": []}
    sources = [CSRC / "ops.cpp", *CSRC.glob("*/*_cpu.cpp"), *CSRC.glob("*/*_bind.cpp")]
    common = [*cxx, *CXX_FLAGS, *_user_flags(), "-Icsrc"]
    common += ["-isystem", str(torch.root / "include")]
    libraries = {}
    for flavour, flags in flavours.items():
        jobs = [([*common, *flags], source) for source in sorted(sources)]
        objects = _compile(jobs, flavour, _tools(cxx, torch))
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
    objects = _compile(jobs, "cuda", version_of(nvcc) + _tools(cxx, torch))
    library = _link(cxx, objects, [find_cudart(includes, torch, major)], torch, "cuda")
    record["cuda_code"] = [code.split(",code=")[1] for code in codes]
    return {"_cuda.so": library}


def build_node(torch: Torch) -> dict[str, Path]:
    """The autograd node by name, which is that of fastflow/autograd/node.py."""
    cxx, python = find_cxx(), find_python_headers()
    command = [*cxx, *NODE_FLAGS, *_user_flags(), "-Icsrc"]
    command += ["-isystem", str(torch.root / "include"), "-isystem", python]
    source = CSRC / "autograd" / "module.cpp"
    objects = _compile([(command, source)], "node", sys.version + _tools(cxx, torch))
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    name = f"_autograd-{torch.version}-{torch.commit[:8]}{suffix}"
    return {name: _link(cxx, objects, ["-ltorch_python"], torch, "node")}


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
    if torch and mode != "none" and release(torch.version) < OLDEST_TORCH:
        raise SystemExit(
            f"fastflow: this environment has torch {torch.version}, {dotted(OLDEST_TORCH)} or "
            "later is needed"
        )
    record: dict[str, str | list[str] | None] = {"torch": torch.version if torch else None}
    libraries: dict[str, Path] = {}
    builders = {
        "cpu": lambda: build_cpu(torch),
        "cuda": lambda: build_cuda(torch, mode == "cuda", record),
        "node": lambda: build_node(torch),
    }
    left_out = {
        part: f"left out by FASTFLOW_BUILD={mode}"
        for part, (modes, *_) in PARTS.items()
        if mode not in ("auto", *modes)
    }
    if os.environ.get("FASTFLOW_NODE") == "0":
        left_out.setdefault("node", "left out by FASTFLOW_NODE=0")
    with ThreadPoolExecutor(len(PARTS)) as pool:
        started = {part: pool.submit(builders[part]) for part in PARTS if part not in left_out}
    wrong = []
    for part, (modes, cost, without) in PARTS.items():
        record[part] = left_out.get(part)
        try:
            if part in started:
                libraries |= started[part].result()
        except CompilerFailed as problem:
            record[part] = str(problem)
            wrong.append(f"{problem}\nfastflow: set {without} to install without it: {cost}")
        except CannotBuild as problem:
            record[part] = str(problem)
            if part != "node" and mode in modes:
                wrong.append(f"FASTFLOW_BUILD={mode}: {problem}")
        # without kernels the node has nothing to call
        if record[part] and not wrong and (part != "node" or record["cpu"] is None):
            print(f"fastflow: no {part} library: {record[part]}; {cost}", file=sys.stderr)
    if wrong:  # in a clone the libraries of an earlier build stay, beside a record of this one
        _install(destination, {}, record, keep=True)
        raise SystemExit(f"fastflow: {wrong[0]}")
    _install(destination, libraries, record)


def _install(
    destination: Path, libraries: dict[str, Path], record: dict, keep: bool = False
) -> None:
    """Put libraries and record in place by renaming, so that running processes keep theirs.

    Libraries of earlier builds are removed, unless they are to be kept.
    """
    destination.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    note = WORK / f"build.{os.getpid()}.json"
    note.write_text(json.dumps(record, indent=2) + "\n")
    for name, made in {**libraries, "_build.json": note}.items():
        partial = destination / f"{name}.{os.getpid()}"
        shutil.copyfile(made, partial)
        partial.rename(destination / name)
    note.unlink()
    for pattern in ("_cpu_*.so", "_cuda.so", "_autograd-*.so"):
        for old in destination.glob(pattern):
            if not keep and old.name not in libraries:
                old.unlink()
