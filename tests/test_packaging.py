"""Installing: every way of it ends with a package that works or with a clear error."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from environments import ROOT, Environment, clean_environment, copy_tree

if sys.platform != "linux":
    pytest.skip("native code is built on Linux", allow_module_level=True)
if shutil.which("c++") is None and shutil.which("g++") is None:
    pytest.skip("there is no C++ compiler here", allow_module_level=True)

sys.path.insert(0, str(ROOT))
import build_native
import build_tools

HERE = ("--no-build-isolation", "--no-deps")
# Which library, whose kernels, and a number that a kernel computed: log|1 + w.u| at w.z + b = 0.
USE = """
import json, torch, fastflow, fastflow.kernels
from fastflow import native
from fastflow.autograd import node
w, u = torch.ones(1, 2), torch.full((1, 2), 0.5)
z, ladj = fastflow.functional.planar_flow(torch.zeros(3, 2), w, u, torch.zeros(1))
print(json.dumps({"file": fastflow.__file__, "kernels": fastflow.kernels.__file__,
    "reason": native.probe("cpp"), "record": native.build_record(), "ladj": ladj.tolist(),
    "node": node.reason, "torch": torch.__version__}))
"""


def use(environment: Environment, cwd: Path | None = None) -> dict:
    """What the installed package says of itself; it computes correctly, whatever its backends."""
    run = environment.run("-W", "ignore::RuntimeWarning", "-c", USE, cwd=cwd)
    assert run.returncode == 0, run.stdout
    told = json.loads(run.stdout.splitlines()[-1])
    expected = torch.log(torch.nn.functional.softplus(torch.ones(3))).tolist()
    assert told["ladj"] == pytest.approx(expected, rel=1e-6)
    return told


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone: its folder is called fastflow, as git names it."""
    return copy_tree(tmp_path_factory.mktemp("source") / "fastflow")


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


@pytest.fixture(scope="module")
def editable(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Sees the clone by an editable install."""
    environment = Environment(tmp_path_factory.mktemp("editable"))
    environment.install(tree, *HERE, "-e", FASTFLOW_BUILD="cpu")
    return environment


@pytest.mark.parametrize("place", ["elsewhere", "the folder that contains the clone", "the clone"])
def test_editable_install_works_from(place: str, editable: Environment, tree: Path) -> None:
    cwd = {"elsewhere": None, "the clone": tree}.get(place, tree.parent)
    told = use(editable, cwd)
    assert told["reason"] is None and told["node"] is None
    assert Path(told["file"]).resolve().parent == tree / "fastflow"
    assert Path(told["kernels"]).resolve().parent == tree / "kernels"
    assert "cpp        ready" in editable.run("-m", "fastflow", cwd=cwd).stdout


def test_editable_install_works_under_pytest(
    editable: Environment, tree: Path, tmp_path: Path
) -> None:
    test = tmp_path / "test_it.py"
    test.write_text("import fastflow, fastflow.kernels\n\ndef test_it(): fastflow.MAF(2, 2)\n")
    for cwd in (tree, tree.parent):
        run = editable.run("-m", "pytest", "-q", "-c", os.devnull, str(test), cwd=cwd)
        assert run.returncode == 0, run.stdout


def test_editable_install_brings_no_other_module(editable: Environment, tree: Path) -> None:
    """Editors read a plain path file; the modules at the clone's root are nobody else's."""
    (file,) = editable.packages.glob("*fastflow*.pth")
    assert file.read_text().split() == [str(tree / "src")]
    assert not list(editable.packages.glob("*finder*"))
    names = "tests", "benchmarks", "kernels", "csrc", "setup", "build_native", "build_tools"
    look = f"import importlib.util as u; print([n for n in {names} if u.find_spec(n)])"
    assert editable.run("-c", look).stdout == "[]\n"


def test_an_editor_sees_the_package(editable: Environment, tmp_path: Path) -> None:
    """pyright resolves the arguments of a layer in a file of a user."""
    version = subprocess.run([sys.executable, "-m", "pyright", "--version"], capture_output=True)
    if version.returncode:
        pytest.skip("pyright is not installed, or has yet to be fetched and npm is out of reach")
    file = tmp_path / "mine.py"
    file.write_text("import fastflow\nreveal_type(fastflow.MAF)\nfastflow.MAF(features='two')\n")
    options = ("--pythonpath", editable.python, "--outputjson", str(file))
    command = [sys.executable, "-m", "pyright", *options]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    told = {
        d["range"]["start"]["line"]: d["message"]
        for d in json.loads(run.stdout)["generalDiagnostics"]
    }
    assert told.pop(1) == 'Type of "fastflow.MAF" is "type[MAF]"'
    assert '"features"' in told.pop(2) and not told


def test_uninstalling_leaves_nothing(environment: Environment, tree: Path) -> None:
    before = sorted(environment.folder.rglob("venv/**/*"))
    for option in (("-e",), ()):
        environment.install(tree, *HERE, *option, FASTFLOW_BUILD="none")
        run = environment.run("-m", "pip", "uninstall", "-y", "fastflow")
        assert run.returncode == 0, run.stdout
        assert sorted(environment.folder.rglob("venv/**/*")) == before


def test_sdist_holds_real_files_and_installs(
    environment: Environment, tree: Path, tmp_path: Path
) -> None:
    build = "import build_native as b, sys; b.build_sdist(sys.argv[1])"
    run = environment.run("-c", build, str(tmp_path), cwd=tree)
    assert run.returncode == 0, run.stdout
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert all(member.isfile() or member.isdir() for member in members)
    names = [member.name.partition("/")[2] for member in members]
    assert {"src/fastflow/py.typed", "src/fastflow/kernels/math.py", "csrc/ops.cpp"} <= set(names)
    assert sum(name.endswith("/kernels/math.py") for name in names) == 1
    assert sorted(p.name for p in (tree / "src").iterdir()) == ["fastflow"]

    environment.install(sdist, *HERE, FASTFLOW_BUILD="none")
    assert Path(use(environment)["kernels"]).parent == environment.packages / "fastflow" / "kernels"


def test_wheel_holds_the_package_and_nothing_else(
    environment: Environment, tree: Path, tmp_path: Path
) -> None:
    options = ("--no-build-isolation", "--no-deps", "-w", str(tmp_path))
    run = environment.run("-m", "pip", "wheel", *options, str(tree), FASTFLOW_BUILD="cpu")
    assert run.returncode == 0, run.stdout
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith(f"-py3-none-{sysconfig.get_platform().replace('-', '_')}.whl")
    with zipfile.ZipFile(wheel) as archive:
        folders = {name.split("/")[0] for name in archive.namelist()}
        names = set(archive.namelist())
    assert {folder for folder in folders if not folder.endswith(".dist-info")} == {"fastflow"}
    assert {"fastflow/_cpu_default.so", "fastflow/_build.json", "fastflow/py.typed"} <= names
    assert {"fastflow/kernels/math.py", "fastflow/vae/cli.py"} <= names
    (node,) = [name for name in names if "_autograd-" in name]
    assert torch.__version__ in node and sysconfig.get_config_var("SOABI") in node
    assert not any(name.endswith("_cuda.so") for name in names)

    environment.install(wheel, "--no-deps")
    told = use(environment, tree.parent)  # where a folder without __init__.py has its name
    assert told["reason"] is None and told["node"] is None
    assert Path(told["file"]).is_relative_to(environment.packages)


def test_isolated_build_uses_the_installed_torch(environment: Environment, tree: Path) -> None:
    output = environment.install(tree, "-e", FASTFLOW_BUILD="cpu")
    assert not re.search(r"(Collecting|Downloading|Processing)\s.*\btorch[-=>]", output)
    told = use(environment)
    assert told["reason"] is None and told["node"] is None
    assert told["record"]["torch"] == told["torch"] == torch.__version__


def test_nothing_native_on_demand(environment: Environment, tree: Path) -> None:
    environment.install(tree, *HERE, FASTFLOW_BUILD="none")
    told = use(environment)
    assert told["reason"] == "not built: left out by FASTFLOW_BUILD=none"
    assert not list(environment.packages.glob("fastflow/*.so"))
    assert "install fastflow again" in environment.run("-m", "fastflow").stdout


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"CXX": "/no/such/compiler"}, "no C++ compiler (/no/such/compiler)"),
        ({"PATH": "/nowhere"}, "no C++ compiler (c++, g++, clang++)"),
    ],
)
def test_without_a_compiler_the_reason_is_recorded(
    environment: Environment, tree: Path, variables: dict[str, str], reason: str
) -> None:
    output = environment.install(tree, *HERE, **variables)
    told = use(environment)
    assert reason in told["reason"] and "\n" not in told["reason"]
    lines = [line.split("fastflow: ")[1] for line in output.splitlines() if " library: " in line]
    assert [line.split(" library: ")[0] for line in lines] == ["no cpu", "no cuda"]
    assert reason in environment.run("-m", "fastflow").stdout


@pytest.fixture
def failing_compiler(tmp_path: Path) -> str:
    """It says what compilers say, and its version where it is asked for that."""
    script = tmp_path / "failing-c++"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\n'
        "echo 'In file included from csrc/errors.h:1:'\n"
        "echo 'csrc/some.cpp:3:5: error: the first mistake'\n"
        "echo 'csrc/some.cpp:4:5: error: the second mistake'\nexit 1\n"
    )
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize("options", [("-e",), ()], ids=["editable", "plain"])
def test_a_compiler_that_fails_ends_the_installation(
    environment: Environment, tmp_path: Path, failing_compiler: str, options: tuple[str, ...]
) -> None:
    """Quietly, as most people install: pip shows the output of failed builds alone."""
    tree = copy_tree(tmp_path / "tree", objects=False)
    command = ("-m", "pip", "install", "--quiet", *HERE, *options, str(tree))
    run = environment.run(*command, CXX=failing_compiler)
    assert run.returncode != 0
    assert re.search(r"fastflow: failing-c\+\+ failed on \S+: \S+ error: the first", run.stdout)
    assert "fastflow: set FASTFLOW_BUILD=none to install without it" in run.stdout
    assert "Traceback" not in run.stdout
    assert not list(environment.packages.glob("*fastflow*"))
    if options:
        told = environment.run("-m", "fastflow", cwd=tree).stdout
        assert re.search(r"missing  not built: failing-c\+\+ failed on .*: the first mistake", told)


@pytest.mark.parametrize(
    ("part", "without"),
    [("cpu", "FASTFLOW_BUILD=none"), ("cuda", "FASTFLOW_BUILD=cpu"), ("node", "FASTFLOW_NODE=0")],
)
def test_what_fails_to_compile_can_be_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: str, without: str
) -> None:
    def fails(*arguments: object) -> dict[str, Path]:
        raise build_tools.CompilerFailed("c++ failed on some.cpp: error: x")

    for name in ("cpu", "cuda", "node"):
        builder = fails if name == part else lambda *arguments: {}
        monkeypatch.setattr(build_native, f"build_{name}", builder)
    monkeypatch.delenv("FASTFLOW_BUILD", raising=False)
    (tmp_path / "_cpu_default.so").touch()  # of an earlier build
    with pytest.raises(SystemExit, match=rf"some.cpp: error: x\nfastflow: set {without} to"):
        build_native.build(tmp_path)
    assert (tmp_path / "_cpu_default.so").exists()
    assert json.loads((tmp_path / "_build.json").read_text())[part].endswith("error: x")

    monkeypatch.setenv(*without.split("="))
    build_native.build(tmp_path)
    noted = json.loads((tmp_path / "_build.json").read_text())[part]
    assert noted == f"left out by {without}"
    assert not (tmp_path / "_cpu_default.so").exists()


@pytest.mark.parametrize("build", ["cpu", "cuda", "everything"])
def test_what_is_forced_fails_loudly(environment: Environment, tree: Path, build: str) -> None:
    variables = {"FASTFLOW_BUILD": build, "CXX": "/bin/false"}
    run = environment.run("-m", "pip", "install", *HERE, str(tree), **variables)
    assert run.returncode != 0
    assert "FASTFLOW_BUILD" in run.stdout
    assert not list(environment.packages.glob("fastflow*"))


def test_without_torch_it_is_a_build_requirement(tmp_path: Path, tree: Path) -> None:
    environment = Environment(tmp_path, without=("torch",))
    ask = "import build_native as b; print(b.get_requires_for_build_wheel())"
    run = environment.run(
        "-c", f"import os, sys; sys.path[:0] = ['.']; os.chdir({str(tree)!r}); {ask}"
    )
    assert "'torch>=2.11'" in run.stdout.splitlines()[-1], run.stdout

    run = environment.run("-m", "pip", "install", *HERE, str(tree))
    assert run.returncode != 0
    assert "has no torch to build against" in run.stdout


@pytest.mark.parametrize("version", ["65.5.0", None])
def test_too_old_a_setuptools_is_a_line(tmp_path: Path, tree: Path, version: str | None) -> None:
    """What pip shows where it does not isolate builds; a new environment may have none at all."""
    environment = Environment(tmp_path, without=("setuptools",))
    if version:
        old = tmp_path / "seen" / "setuptools"
        old.mkdir()
        (old / "__init__.py").write_text(f"__version__ = {version!r}\n")
        (old / "build_meta.py").touch()
    for option in (("-e",), ()):
        run = environment.run("-m", "pip", "install", *HERE, *option, str(tree))
        assert run.returncode != 0
        assert f"has {f'setuptools {version}' if version else 'no setuptools'}," in run.stdout
        assert "python -m pip install 'setuptools>=77,<82'" in run.stdout
        assert "Traceback" not in run.stdout


def test_too_old_a_torch_is_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch = build_tools.Torch(tmp_path, "2.10.1+cpu", "commit", None)
    monkeypatch.setattr(build_native, "find_torch", lambda: torch)
    monkeypatch.setenv("FASTFLOW_BUILD", "cpu")
    with pytest.raises(SystemExit, match=r"has torch 2\.10\.1\+cpu, 2\.11 or later is needed"):
        build_native.build(tmp_path)


def test_the_floor_of_torch_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pyproject.toml; the ABI that is built against, and the README, follow it."""
    floor = build_tools.floor("torch")
    assert f"| torch {build_tools.dotted(floor)} or later |" in (ROOT / "README.md").read_text()
    (target,) = [flag for flag in build_native.CXX_FLAGS if "TORCH_TARGET_VERSION" in flag]
    assert int(target.split("=")[1], 16) == (floor[0] << 56) + (floor[1] << 48)
    older = build_tools.Torch(ROOT, f"{floor[0]}.{floor[1] - 1}.1", "commit", None)
    for found, needed in [
        (older, [f"torch>={build_tools.dotted(floor)}"]),
        (build_tools.find_torch(), []),
    ]:
        monkeypatch.setattr(build_native, "find_torch", lambda found=found: found)
        assert build_native._torch_requirement() == needed


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (
            "In file included from errors.h:1:\n a.cpp:1:2: error: x\n a.cpp:3:2: error: y",
            "a.cpp:1:2: error: x",
        ),
        (
            "a.cpp:1:10: fatal error: Python.h: No such file",
            "a.cpp:1:10: fatal error: Python.h: No such file",
        ),
        (
            "nvcc fatal   : Unsupported gpu architecture 'compute_200'",
            "nvcc fatal   : Unsupported gpu architecture 'compute_200'",
        ),
        (
            "a.o: undefined reference to `f'\ncollect2: error: ld returned 1",
            "a.o: undefined reference to `f'",
        ),
        ("Killed\n", "Killed"),
        ("", ""),
    ],
)
def test_the_first_error_of_a_compiler(output: str, line: str) -> None:
    assert build_tools.first_error(output) == line


def test_a_killed_build_starts_again(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree", objects=False)
    environment = clean_environment() | {
        "FASTFLOW_BUILD": "cpu",
        "CXXFLAGS": "-O0",
        "PYTHONPATH": str(tree),
    }
    build = "import build_native as b, pathlib; b.build(pathlib.Path('fastflow').resolve())"
    command = [sys.executable, "-c", build]
    first = subprocess.Popen(command, cwd=tree, env=environment, start_new_session=True)
    while first.poll() is None and not list(tree.glob("build/native/*.o")):
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert not list(tree.glob("fastflow/_cpu_*.so"))

    subprocess.run(command, cwd=tree, env=environment, check=True)
    assert (tree / "fastflow" / "_cpu_default.so").exists()
    assert not list(tree.glob("fastflow/*.so.*"))


def test_eight_processes_import_from_cold(tmp_path: Path) -> None:
    program = "import torch, fastflow; print(fastflow.PlanarFlow(3)(torch.zeros(2, 3))[1].shape)"

    def start(index: int) -> str:
        environment = os.environ | {"PYTHONPYCACHEPREFIX": str(tmp_path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", program]
        run = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        return run.stdout + run.stderr

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(start, range(8))) == ["torch.Size([2])\n"] * 8


def test_import_asks_no_device_and_compiles_nothing(tmp_path: Path) -> None:
    program = """
import subprocess, sys, time, torch
def refuse(*a, **k): raise AssertionError("called at import")
subprocess.Popen = refuse
torch._C._cuda_getDeviceCount = torch.cuda._lazy_init = torch.cuda.is_available = refuse
start = time.perf_counter()
import fastflow
assert "triton" not in sys.modules and "fastflow.vae" not in sys.modules
print(time.perf_counter() - start)
"""
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 1.0


def test_without_the_headers_of_python_only_the_node_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> str:
        raise build_tools.CannotBuild("no Python.h in /nowhere")

    monkeypatch.setattr(build_native, "find_python_headers", missing)
    monkeypatch.setattr(build_native, "build_cpu", lambda torch: {})
    monkeypatch.setenv("FASTFLOW_BUILD", "cpu")
    build_native.build(tmp_path)
    assert (
        "fastflow: no node library: no Python.h in /nowhere; small calls" in capsys.readouterr().err
    )
    assert json.loads((tmp_path / "_build.json").read_text())["node"] == "no Python.h in /nowhere"


@pytest.mark.parametrize("changed", ["compiler", "torch", "source", "command", None])
def test_what_is_built_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: str | None
) -> None:
    """A file is compiled again if the source, the command, the compiler or torch is another."""
    monkeypatch.setattr(build_native, "ROOT", tmp_path)
    monkeypatch.setattr(build_native, "CSRC", tmp_path)
    monkeypatch.setattr(build_native, "WORK", tmp_path / "build")
    compiler, source = tmp_path / "c++", tmp_path / "code.cpp"
    built = []
    for run in range(2):
        now = lambda part: f"{part} {run if part == changed else 0}"  # noqa: B023, E731
        compiler.write_text(
            f"#!/bin/sh\necho {now('compiler')}\nfor out; do :; done\n"
            '[ "$out" = --version ] || : > "$out"\n'
        )
        compiler.chmod(0o755)
        source.write_text(now("source"))
        build_tools.version_of.cache_clear()
        torch = build_tools.Torch(tmp_path, now("torch"), "commit", None)
        command, tools = (
            [str(compiler), now("command")],
            build_native._tools([str(compiler)], torch),
        )
        built += build_native._compile([(command, source)], "some", tools)
    assert all(file.exists() for file in built)
    assert (built[0] != built[1]) is (changed is not None)


# ---------------------------------------------------------------- the choice of GPU code


@pytest.fixture
def nvcc(tmp_path: Path) -> str:
    """A compiler that knows three architectures."""
    script = tmp_path / "nvcc"
    script.write_text("#!/bin/sh\nprintf 'sm_75\\nsm_80\\nsm_90\\n'\n")
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize(
    ("wanted", "codes"),
    [
        ("", ["sm_80", "sm_90", "compute_90"]),
        ("8.6", ["sm_86"]),
        ("8.0;9.0a+PTX", ["sm_80", "sm_90a", "compute_90a"]),
        ("10.0 12.0+PTX", ["sm_100", "sm_120", "compute_120"]),
    ],
)
def test_architectures(
    monkeypatch: pytest.MonkeyPatch, nvcc: str, wanted: str, codes: list[str]
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    flags = build_tools.architecture_flags(nvcc)
    assert [flag.split(",code=")[1] for flag in flags] == codes


def test_an_unknown_architecture_is_named(monkeypatch: pytest.MonkeyPatch, nvcc: str) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 Hopper")
    with pytest.raises(build_tools.CannotBuild, match="Hopper"):
        build_tools.architecture_flags(nvcc)
