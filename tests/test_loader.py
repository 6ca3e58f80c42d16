"""The loader: what it opens, what it says when it cannot, and what PyTorch knows of the raw ops."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from masked_oracle import problem as masked_problem
from oracle import problem
from torch import Tensor
from torch.autograd import forward_ad

import fastflow
from fastflow import diagnostics, native

OPS = sorted(op for op in native.FAKES if op.startswith("planar_flow"))
MASKED_OPS = sorted(op for op in native.FAKES if op.startswith(("made", "autoregressive")))
needs_library = pytest.mark.skipif(
    native.probe("cpp") is not None, reason=f"no CPU library: {native.probe('cpp')}"
)


def arguments(op: str, shared: bool = True, centred: bool = False) -> tuple[Tensor | bool, ...]:
    """Arguments of a raw op with B = 5, D = 3, K = 2."""
    z, w, u, b = (leaf.detach() for leaf in problem(5, 3, 2, shared, torch.float32))
    if not op.endswith("_backward"):
        return z, w, u, b, centred
    return z, torch.randn(5), z, z, w, u, torch.randn(5, 2), centred, True


@needs_library
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, shared: bool) -> None:
    overload = getattr(native, op)
    torch.library.opcheck(overload, arguments(op, shared))
    if op.endswith("_backward"):
        torch.library.opcheck(overload, (*arguments(op, shared)[:-1], False))


@needs_library
@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("op", OPS)
def test_a_raw_op_refuses_to_be_differentiated(op: str, position: int) -> None:
    values = list(arguments(op))
    values[position] = values[position].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"fastflow\.functional\.planar_flow"):
        getattr(native, op)(*values)
    with torch.no_grad():
        assert all(torch.isfinite(out).all() for out in getattr(native, op)(*values))


@needs_library
@pytest.mark.parametrize("op", OPS)
def test_a_raw_op_refuses_tangents(op: str) -> None:
    values = list(arguments(op))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no derivative"):
        values[0] = forward_ad.make_dual(values[0], torch.ones_like(values[0]))
        getattr(native, op)(*values)
    with pytest.raises(RuntimeError, match="no derivative"):
        rest = values[1:]
        torch.func.grad(lambda z: getattr(native, op)(z, *rest)[0].sum())(torch.randn(5, 3))


def masked_arguments(op: str) -> list:
    """Arguments of a raw op on masked networks with B = 64, D = 3, a context and a missing bias.

    64 rows are whole tiles: where a tile is not full, the rest of `saved` holds anything.
    """
    given = masked_problem(64, 3, (6, 7), context=True)
    none = torch.empty(0, dtype=torch.float64)

    def plain(tensors: list[Tensor | None]) -> list[Tensor]:
        return [none if tensor is None else tensor.detach() for tensor in tensors]

    weights, biases, terms = map(plain, (given.weights, given.biases, given.terms))
    biases[1] = none
    affine = () if op.startswith("made") else (0, -6.9, 0.0)
    setting = (given.stairs, 1, False, *affine)
    x = given.x.detach()
    if "context" in op:
        return context_arguments(op, x, weights, biases, setting)
    forward = [x, terms, weights, biases, *setting, True]
    if not op.endswith("_backward"):
        return forward
    run = op.removesuffix("_backward") + ("" if "inverse" in op else "_forward")
    *outputs, saved = getattr(torch.ops.fastflow, run)(*forward)
    point = outputs[0] if "inverse" in op else forward[0]
    return [
        *map(torch.ones_like, outputs),
        point,
        saved,
        weights,
        *setting,
        0b001,
        0b101,
        True,
        True,
    ]


def context_arguments(
    op: str, x: Tensor, weights: list[Tensor], biases: list[Tensor], setting: tuple
) -> list:
    """Arguments of the op with a context's layer inside; its term has an activation and no bias."""
    context, weight = torch.randn(64, 2).to(x), torch.randn(len(weights[0]), 2).to(x)
    forward = [x, context, weight, None, True, weights, biases, *setting, True]
    if not op.endswith("_backward"):
        return forward
    y, ladj, saved = torch.ops.fastflow.autoregressive_context_forward(*forward)
    cotangents = torch.ones_like(y), torch.ones_like(ladj)
    given = [*cotangents, x, context, saved, weight, False, True, weights, *setting]
    return [*given, 0b101, True, True, True]


@needs_library
@pytest.mark.parametrize("op", MASKED_OPS)
def test_opcheck_of_masked_ops(op: str) -> None:
    values = masked_arguments(op)
    torch.library.opcheck(getattr(native, op), values)
    flags = (False,)
    if op.endswith("_backward"):
        flags = (0b101, False, False, False) if "context" in op else (0, 0b101, False, False)
    torch.library.opcheck(getattr(native, op), (*values[: -len(flags)], *flags))


@needs_library
@pytest.mark.parametrize("op", MASKED_OPS)
def test_a_raw_masked_op_refuses_to_be_differentiated(op: str) -> None:
    """Whether the tensor stands alone or in a list."""
    values = masked_arguments(op)
    name = op.removesuffix("_forward").removesuffix("_backward").replace("_context", "")
    for position in (0, next(i for i, value in enumerate(values) if isinstance(value, list))):
        changed = list(values)
        value = values[position]
        lone = isinstance(value, Tensor)
        leaf = (value if lone else value[0]).clone().requires_grad_()
        changed[position] = leaf if lone else [leaf, *value[1:]]
        with pytest.raises(RuntimeError, match=rf"fastflow\.functional\.{name} instead"):
            getattr(native, op)(*changed)


@needs_library
def test_the_library_is_the_best_one_for_this_processor() -> None:
    flavour = {"AVX512": "avx512", "AVX2": "avx2"}.get(
        torch.backends.cpu.get_cpu_capability(), "default"
    )
    assert native.libraries["cpp"].name == f"_cpu_{flavour}.so"


@needs_library
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_a_lesser_processor_gets_a_lesser_library(capability: str, tmp_path: Path) -> None:
    program = "from fastflow import native; print(native.libraries['cpp'].stem)"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={"ATEN_CPU_CAPABILITY": capability, "PATH": "/usr/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == f"_cpu_{capability}", run.stderr


def test_a_file_that_does_not_load_is_a_reason(tmp_path: Path) -> None:
    broken = tmp_path / "_cpu_broken.so"
    broken.write_bytes(b"\x7fELF and nothing more")
    reason = native._open("broken", broken)
    assert reason.startswith("_cpu_broken.so does not load: ") and "\n" not in reason
    assert "broken" not in native.libraries


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no_such_op"):
        _ = native.no_such_op


@pytest.mark.parametrize(
    ("code", "capability", "runs"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 9), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("compute_80", (9, 0), True),
        ("compute_120", (9, 0), False),
        ("sm_90a", (9, 0), True),
        ("compute_90a", (10, 0), False),
        ("sm_120", (12, 1), True),
    ],
)
def test_which_device_runs_which_code(code: str, capability: tuple[int, int], runs: bool) -> None:
    assert native._runs_on(code, capability) is runs


# ---------------------------------------------------------------- what it says of itself


def test_info_names_versions_and_backends() -> None:
    facts = fastflow.info()
    assert facts["fastflow"] == fastflow.__version__
    assert facts["torch"] == torch.__version__
    assert set(facts["backends"]) >= {"cpp", "cuda", "triton", "reference"}
    assert facts["backends"]["reference"]["reason"] is None
    for backend in facts["backends"].values():
        assert (backend["reason"] is None) == bool(backend["devices"])
    assert facts["backends"]["cpp"]["needed"] and facts["backends"]["reference"]["needed"]


@pytest.mark.parametrize("gpu", [False, True])
def test_what_serves_gpus_alone_is_not_needed_without_one(
    monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(native, "libraries", {})
    monkeypatch.setattr(native, "_reasons", {"cuda": "torch 2.11.0+cpu has no CUDA"})
    told = diagnostics.report()
    assert diagnostics.info()["backends"]["cuda"]["needed"] == gpu
    if gpu:
        assert "missing  torch 2.11.0+cpu has no CUDA" in told
        assert "-> install a CUDA build of torch" in told
    else:
        assert "no GPU   not needed here: torch 2.11.0+cpu has no CUDA" in told
        assert "-> for a GPU: install a CUDA build of torch" in told


def test_every_reason_comes_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(native._reasons, "cpp", "not built: no C++ compiler (c++)")
    told = diagnostics.report()
    assert "missing  not built: no C++ compiler (c++)" in told
    assert "-> install g++" in told


def test_the_module_runs(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "fastflow"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0 and not run.stderr
    lines = run.stdout.splitlines()
    assert lines[0] == f"fastflow {fastflow.__version__}"
    assert any(line.split()[:2] == ["reference", "ready"] for line in lines)


@pytest.mark.skipif(sys.platform != "linux", reason="pipes break in another way elsewhere")
def test_a_reader_that_stops_early_sees_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastflow"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()  # before it can have written anything: importing torch takes longer
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == -signal.SIGPIPE
