"""The registry: what it chooses, what it refuses, and what it says."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from oracle import problem

import fastflow
from fastflow import backends
from fastflow.backends import Backend
from fastflow.functional import planar_flow, planar_flow_inverse


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry to play with; the real one comes back afterwards."""
    monkeypatch.setattr(backends, "_registry", dict(backends._registry))
    monkeypatch.setattr(backends, "_order", {k: list(v) for k, v in backends._order.items()})
    monkeypatch.setattr(backends, "_selected", {})
    monkeypatch.setattr(backends, "_known", {})
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
        fastflow.use_backend("gpu")  # at once, not only when the block begins


@pytest.mark.usefixtures("registry")
def test_explicit_choice_raises_where_automatic_falls_back() -> None:
    backends._order["cpu"] = []
    backends.register(Backend("broken", ("cpu",), lambda: "its library is missing", None))
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
def test_fallback_warns_once_and_only_when_it_happens() -> None:
    def warnings_of_two_flows() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                backends._selected.clear()  # as for another op: each looks for a backend again
                fastflow.PlanarFlow(2)(torch.zeros(3, 2))
        assert all(warning.filename == __file__ for warning in caught)  # the user's line
        return [str(warning.message) for warning in caught]

    backends._order["cpu"] = []
    backends.register(backends._registry["reference"], automatic=("cpu",))
    backends.register(Backend("broken", ("cpu",), lambda: "absent", None))
    assert warnings_of_two_flows() == []  # the first in order works
    backends._order["cpu"].reverse()
    (message,) = warnings_of_two_flows()
    assert "the broken backend is not available for cpu tensors (absent)" in message


@pytest.mark.usefixtures("registry")
def test_backend_for_another_device_is_refused() -> None:
    backends.register(Backend("elsewhere", ("meta",), lambda: None, lambda op: print))
    with pytest.raises(RuntimeError, match="elsewhere serves meta tensors, these are on cpu"):
        with fastflow.use_backend("elsewhere"):
            fastflow.PlanarFlow(2)(torch.zeros(3, 2))
    backends._order["cpu"] = ["elsewhere"]
    with pytest.raises(RuntimeError, match="backend elsewhere serves meta tensors"):
        fastflow.PlanarFlow(2)(torch.zeros(3, 2))


@pytest.mark.parametrize("direction", [planar_flow, planar_flow_inverse])
def test_the_reference_serves_any_device(direction: object) -> None:
    """Shown on one that no kernel serves."""
    assert backends.available("meta") == ["reference"]
    leaves = [leaf.detach().requires_grad_() for leaf in problem(5, 3, 2, True, device="meta")]
    out, ladj = direction(*leaves)
    assert out.device.type == "meta" and out.shape == (5, 3) and ladj.shape == (5,)
    grads = torch.autograd.grad(out.sum() + ladj.sum(), leaves)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]


def spied(calls: list[str], name: str) -> Backend:
    """The reference under another name, which notes what it computes."""

    def locate(op: str) -> object:
        def compute(*args: object) -> object:
            calls.append(f"{name} {op}")
            return backends._registry["reference"].locate(op)(*args)

        return compute

    return Backend(name, ("cpu",), lambda: None, locate)


@pytest.mark.usefixtures("registry")
def test_backward_uses_the_backend_of_its_forward() -> None:
    """Also on another thread, and after `use_backend` has ended."""
    calls: list[str] = []
    backends.register(spied(calls, "spy"), automatic=())
    x = torch.zeros(3, 2, requires_grad=True)
    with fastflow.use_backend("spy"):
        y, ladj = fastflow.PlanarFlow(2)(x)
    thread = threading.Thread(target=(y.sum() + ladj.sum()).backward)
    thread.start()
    thread.join()
    assert calls == ["spy planar_flow_forward", "spy planar_flow_backward"]
    assert x.grad is not None


@pytest.mark.usefixtures("registry")
def test_backward_of_an_automatic_forward_is_automatic_too() -> None:
    """Whatever `use_backend` is in force by then."""
    calls: list[str] = []
    backends._order["cpu"] = []
    backends.register(spied(calls, "first"))
    backends.register(spied(calls, "other"), automatic=())
    y, ladj = fastflow.PlanarFlow(2)(torch.zeros(3, 2, requires_grad=True))
    with fastflow.use_backend("other"):
        (y.sum() + ladj.sum()).backward()
    assert calls == ["first planar_flow_forward", "first planar_flow_backward"]


@pytest.mark.usefixtures("registry")
def test_pcp_takes_the_chosen_backend_and_the_reference_where_it_has_no_kernel() -> None:
    calls: list[str] = []
    backends.register(spied(calls, "spy"), automatic=())
    backends.register(Backend("partial", ("cpu",), lambda: None, lambda op: None), automatic=())
    layer, x = fastflow.PCPMap(2, 0, (3,)), torch.randn(4, 2, requires_grad=True)
    results = []
    for name in ("reference", "partial", "spy"):
        with fastflow.use_backend(name):
            y, ladj = layer(x)
            back, _ = layer.inverse(y.detach())
        results.append([y, ladj, back, *torch.autograd.grad(y.sum() + ladj.sum(), x)])
    assert calls == ["spy pcp_forward", "spy pcp_inverse", "spy pcp_backward"]
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other))


@pytest.mark.usefixtures("registry")
def test_a_backend_without_the_op_is_passed_over_or_refused() -> None:
    backends._order["cpu"] = []
    backends.register(Backend("partial", ("cpu",), lambda: None, lambda op: None))
    assert "partial" in backends.available("cpu")
    assert "partial" not in backends.available("cpu", "planar_flow_forward")
    fastflow.PlanarFlow(2)(torch.zeros(3, 2))  # no warning: nothing is wrong with the machine
    with pytest.raises(RuntimeError, match="planar_flow_forward: backend partial does not have"):
        with fastflow.use_backend("partial"):
            fastflow.PlanarFlow(2)(torch.zeros(3, 2))
