"""What tests of converted layers share: a model and its converted copy give the same numbers."""

from __future__ import annotations

import copy
import unittest
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastflow
from fastflow.convert import Unsupported

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Of the largest entry of what is compared, or of 1: both sides round, in different orders."""

Call = Callable[..., tuple[Tensor, ...]]


def check_conversion(
    model: nn.Module,
    calls: Sequence[Call],
    inputs: Sequence[Tensor],
    layers: int,
    dtype: torch.dtype = torch.float64,
) -> nn.Module:
    """Converts a copy of a model, which must agree with it before and after training.

    Arguments:
        model: in any dtype.
        calls: each takes a model and the inputs, and gives the tensors that are compared; so are
            the gradients of all parameters and inputs.
        inputs: what the calls are given after the model.
        layers: how many must be replaced.

    Returns:
        The converted copy.
    """
    model = model.to(dtype)
    inputs = [tensor.to(dtype) for tensor in inputs]
    converted = copy.deepcopy(model)
    parameters = dict(converted.named_parameters())
    optimizer = torch.optim.Adam(converted.parameters(), lr=1e-2)  # older than the conversion
    report = fastflow.convert(converted)
    assert len(report.replaced) == layers and not report.skipped, str(report)
    now = dict(converted.named_parameters())
    assert all(now[name] is parameter for name, parameter in parameters.items())

    for call in calls:
        check_same(call, model, converted, inputs)
    for _ in range(10):
        optimizer.zero_grad()
        sum(out.square().mean() for call in calls for out in call(converted, *inputs)).backward()
        optimizer.step()
    assert not all(map(torch.equal, model.parameters(), converted.parameters()))
    model.load_state_dict(converted.state_dict())
    for call in calls:
        check_same(call, model, converted, inputs)
    return converted


def check_same(
    call: Call, model: nn.Module, converted: nn.Module, inputs: Sequence[Tensor]
) -> None:
    """Asserts that outputs and all gradients of two models agree."""
    wants, finds = (results(call, one, inputs) for one in (model, converted))
    assert wants.keys() == finds.keys()
    for name, want in wants.items():
        found = finds[name]
        assert found.shape == want.shape and found.dtype == want.dtype, name
        if not want.numel():
            continue
        error = (found - want).abs().max() / want.abs().max().clamp(min=1)
        assert error <= TOLERANCES[want.dtype], f"{name} is off by {error:.1e}"


def check_left_alone(layer: nn.Module, reason: str) -> None:
    """A layer is not converted, the report says why, and `strict` raises."""
    model, kind = nn.ModuleList([layer]), type(layer)
    (row,) = fastflow.convert(model).skipped
    assert row.path == "0" and row.layer == kind.__name__ and reason in row.reason
    assert type(model[0]) is kind
    with pytest.raises(Unsupported, match="cannot convert 0"):
        fastflow.convert(model, strict=True)


def results(call: Call, model: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """The outputs of a call, and the gradients of a fixed sum of them, by name."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    model.zero_grad()
    outputs = call(model, *leaves)
    generator = torch.Generator().manual_seed(1)
    total = sum(
        (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum()
        for out in outputs
    )
    total.backward()
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    grads = {f"input {i}": leaf.grad for i, leaf in enumerate(leaves)}
    grads |= {name: parameter.grad for name, parameter in model.named_parameters()}
    # None is what a parameter gets that was not used
    return found | {name: grad.clone() for name, grad in grads.items() if grad is not None}


def run_tests_of_library(
    module: str, layer: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs a unittest module of a library, with every layer of a class converted once made."""
    original, made = layer.__init__, []

    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        made.extend(fastflow.convert(self).replaced)

    monkeypatch.setattr(layer, "__init__", init)
    outcome = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromName(module).run(outcome)
    problems = [text for _, text in outcome.failures + outcome.errors]
    assert outcome.testsRun and made and not problems, "\n".join(problems)
