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


def use(environment: Environment) -> dict:
    """What the installed package says of itself; it computes correctly, whatever its backends."""
    run = environment.run("-W", "ignore::RuntimeWarning", "-c", USE)
    assert run.returncode == 0, run.stdout
    told = json.loads(run.stdout.splitlines()[-1])
    expected = torch.log(torch.nn.functional.softplus(torch.ones(3))).tolist()
    assert told["ladj"] == pytest.approx(expected, rel=1e-6)
    return told


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_tree(tmp_path_factory.mktemp("source"))


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


def test_editable_install_works_from_elsewhere(environment: Environment, tree: Path) -> None:
    environment.install(tree, *HERE, "-e", FASTFLOW_BUILD="cpu")
    told = use(environment)
    assert told["reason"] is None and told["node"] is None
    assert Path(told["file"]).parent == tree / "fastflow"
    assert Path(told["kernels"]).parent == tree / "kernels"


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
    assert {"fastflow/_cpu_default.so", "fastflow/_build.json"} <= names
    (node,) = [name for name in names if "_autograd-" in name]
    assert torch.__version__ in node and sysconfig.get_config_var("SOABI") in node
    assert not any(name.endswith("_cuda.so") for name in names)

    environment.install(wheel, "--no-deps")
    told = use(environment)
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
        ({"CXX": "/bin/false"}, "false failed on"),
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
