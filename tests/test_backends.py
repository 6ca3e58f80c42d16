"""The registry: what it chooses, what it refuses, and what it says."""

from __future__ import annotations

import threading

import pytest
import torch

import fastflow
from fastflow import backends
from fastflow.backends import Backend


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry to play with; the real one comes back afterwards."""
    monkeypatch.setattr(backends, "_registry", dict(backends._registry))
    monkeypatch.setattr(backends, "_order", {k: list(v) for k, v in backends._order.items()})
    monkeypatch.setattr(backends, "_selected", {})
    monkeypatch.setattr(backends, "_warned", set())


def test_reference_is_always_there() -> None:
    assert "reference" in backends.available("cpu")
    assert {"reference", "cpp", "triton", "cuda"} <= set(backends.names())


def test_use_backend_nests_and_restores() -> None:
    assert backends.current() is None
    with fastflow.use_backend("reference"):
        with fastflow.use_backend(backends.available("cpu")[0]):
            assert backends.current() == backends.available("cpu")[0]
        assert backends.current() == "reference"
        with pytest.raises(ZeroDivisionError), fastflow.use_backend("reference"):
            raise ZeroDivisionError
    assert backends.current() is None


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"name is 'gpu', must be one of .*reference"):
        with fastflow.use_backend("gpu"):
            pass


@pytest.mark.usefixtures("registry")
def test_explicit_choice_raises_where_automatic_falls_back() -> None:
    backends._order["cpu"] = []
    backends.register(Backend("broken", ("cpu",), lambda: "its library is missing", None))
    backends.register(backends._registry["reference"])
    with pytest.raises(RuntimeError, match="broken is not available: its library is missing"):
        with fastflow.use_backend("broken"):
            pass
    flow, x = fastflow.PlanarFlow(2), torch.zeros(3, 2)
    with pytest.warns(
        RuntimeWarning, match=r"broken backend is not available .*library is missing"
    ):
        y, _ = flow(x)
    with fastflow.use_backend("reference"):
        assert torch.equal(y, flow(x)[0])


@pytest.mark.usefixtures("registry")
@pytest.mark.filterwarnings("error")
def test_fallback_warns_once_and_only_when_it_happens() -> None:
    backends._order["cpu"] = ["reference"]
    backends.register(Backend("broken", ("cpu",), lambda: "absent", None))
    fastflow.PlanarFlow(2)(torch.zeros(3, 2))


@pytest.mark.usefixtures("registry")
def test_backend_for_another_device_is_refused() -> None:
    backends.register(Backend("elsewhere", ("meta",), lambda: None, lambda op: None))
    with pytest.raises(RuntimeError, match="elsewhere serves meta tensors, these are on cpu"):
        with fastflow.use_backend("elsewhere"):
            fastflow.PlanarFlow(2)(torch.zeros(3, 2))


@pytest.mark.usefixtures("registry")
def test_backward_uses_the_backend_of_its_forward() -> None:
    """Also on another thread, and after `use_backend` has ended."""
    calls = []
    reference = backends._registry["reference"]

    def locate(op: str) -> object:
        calls.append(op)
        return reference.locate(op)

    backends.register(Backend("spy", ("cpu",), lambda: None, locate), automatic=())
    x = torch.zeros(3, 2, requires_grad=True)
    with fastflow.use_backend("spy"):
        y, ladj = fastflow.PlanarFlow(2)(x)
    thread = threading.Thread(target=(y.sum() + ladj.sum()).backward)
    thread.start()
    thread.join()
    assert calls == ["planar_flow_forward", "planar_flow_backward"]
    assert x.grad is not None
