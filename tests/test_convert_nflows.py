"""Converted layers of nflows: the same numbers as the originals, faster."""

from __future__ import annotations

import copy
import importlib.util
import os

import pytest
import torch
from conversion import check_conversion, check_same, run_tests_of_library
from torch import Tensor, nn
from torch.nn import functional as nnf

import fastflow

pytest.importorskip("nflows")
from nflows import flows, transforms
from nflows.distributions import StandardNormal
from nflows.transforms import MaskedAffineAutoregressiveTransform

CASES = {  # features, hidden_features, and what is not the constructor's default
    "defaults": (5, 32, {}),
    "context": (5, 32, {"context_features": 3}),
    "sbi": (
        *(6, 50),
        {"context_features": 12, "use_residual_blocks": False, "activation": torch.tanh},
    ),
    "feed-forward": (5, 32, {"use_residual_blocks": False}),
    "random masks": (7, 24, {"use_residual_blocks": False, "random_mask": True}),
    "deep": (4, 16, {"num_blocks": 5, "context_features": 2, "activation": nnf.elu}),
    "deep feed-forward": (4, 16, {"num_blocks": 6, "use_residual_blocks": False}),
    "no blocks": (4, 16, {"num_blocks": 0, "context_features": 2}),
    "no blocks, feed-forward": (4, 16, {"num_blocks": 0, "use_residual_blocks": False}),
    "wide": (20, 256, {"activation": nn.SiLU()}),
    "narrow": (9, 3, {"context_features": 1, "activation": nnf.gelu}),
    "one feature": (1, 8, {"context_features": 2}),
}


def build(features: int, hidden: int, options: dict) -> nn.Module:
    torch.manual_seed(0)
    layer = MaskedAffineAutoregressiveTransform(features, hidden, **options)
    for parameter in layer.parameters():  # the constructor's are next to the identity
        nn.init.normal_(parameter, std=0.5 / parameter.shape[-1] ** 0.5)
    return layer


def draw(features: int, options: dict, rows: int = 11) -> list[Tensor]:
    sizes = [features, *[options[key] for key in ("context_features",) if key in options]]
    return [torch.randn(rows, size, dtype=torch.float64) for size in sizes]


CALLS = (lambda layer, *inputs: layer(*inputs), lambda layer, *inputs: layer.inverse(*inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_layers_agree_in_both_directions(case: tuple, dtype: torch.dtype) -> None:
    features, _, options = case
    converted = check_conversion(build(*case), CALLS, draw(features, options), 1, dtype)
    assert isinstance(converted, MaskedAffineAutoregressiveTransform)


@pytest.mark.parametrize(
    "activation",
    [
        *(torch.relu, nnf.relu, torch.tanh, nnf.tanh, nnf.elu, nnf.silu, nnf.gelu, nnf.softplus),
        *(nnf.leaky_relu, nn.ReLU(), nn.Tanh(), nn.ELU(), nn.SiLU(), nn.GELU(), nn.Softplus()),
        nn.LeakyReLU(),
    ],
    ids=lambda activation: getattr(activation, "__name__", repr(activation)),
)
def test_every_activation_that_is_known(activation) -> None:
    layer = build(4, 12, {"activation": activation})
    check_conversion(layer, CALLS, draw(4, {}), 1)


def maf(features: int, context: int) -> flows.Flow:
    """The flow of sbi's build_maf, for data of these sizes."""
    steps = [transforms.PointwiseAffineTransform(shift=torch.tensor(0.3), scale=torch.tensor(1.7))]
    for _ in range(5):
        steps += [
            MaskedAffineAutoregressiveTransform(
                features,
                hidden_features=50,
                context_features=context,
                num_blocks=2,
                use_residual_blocks=False,
                activation=torch.tanh,
            ),
            transforms.RandomPermutation(features),
        ]
    embedding = nn.Sequential(nn.Linear(context, context), nn.ReLU())
    return flows.Flow(transforms.CompositeTransform(steps), StandardNormal([features]), embedding)


def log_prob(flow: flows.Flow, x: Tensor, context: Tensor) -> tuple[Tensor]:
    return (flow.log_prob(x, context),)


def from_noise(flow: flows.Flow, noise: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    return flow._transform.inverse(noise, flow._embedding_net(context))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_the_conditional_flow_of_sbi(dtype: torch.dtype) -> None:
    inputs = [torch.randn(9, 6), torch.randn(9, 4)]
    torch.manual_seed(0)
    check_conversion(maf(6, 4), [log_prob, from_noise], inputs, 5, dtype)


def test_the_context_may_be_left_out_as_in_the_original() -> None:
    layer = build(*CASES["context"])
    check_conversion(layer, CALLS, draw(5, {}), 1)


def test_rows_are_all_that_the_original_takes() -> None:
    layer = build(5, 16, {}).double()
    converted = copy.deepcopy(layer)
    fastflow.convert(converted)
    point = torch.randn(5, dtype=torch.float64)  # comes back as a row
    check_same(CALLS[0], layer, converted, [point])
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 3, 5, dtype=torch.float64))
    with pytest.raises(RuntimeError):
        converted(torch.randn(2, 3, 5, dtype=torch.float64))


REFUSED = {
    "batch norm": ({"use_batch_norm": True}, "batch norm"),
    "batch norm, feed-forward": (
        {"use_batch_norm": True, "use_residual_blocks": False},
        "batch norm",
    ),
    "dropout": ({"dropout_probability": 0.1}, "dropout"),
    "activation": ({"activation": torch.sigmoid}, "sigmoid is not known"),
    "module": ({"activation": nn.Hardtanh()}, "Hardtanh.* is not known"),
    "lambda": ({"activation": lambda x: x.relu()}, "lambda"),
    "slope": ({"activation": nn.LeakyReLU(0.2)}, "options"),
    "approximation": ({"activation": nn.GELU(approximate="tanh")}, "options"),
    # writes to what the block adds to afterwards
    "in place": ({"activation": nn.ReLU(inplace=True)}, "options"),
}


@pytest.mark.parametrize(("options", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_named_and_left_alone(options: dict, reason: str) -> None:
    layer = build(4, 12, options)
    report = fastflow.convert(layer)
    assert not report.replaced and type(layer) is MaskedAffineAutoregressiveTransform
    ((path, name, why),) = report.skipped
    assert (path, name) == ("", "MaskedAffineAutoregressiveTransform")
    with pytest.raises(ValueError, match=reason):
        fastflow.convert(layer, strict=True)
    assert why in str(report)


def test_dropout_of_nothing_and_one_activation_of_two_kinds() -> None:
    layer = build(4, 12, {"dropout_probability": 0.0, "activation": torch.tanh})
    layer.autoregressive_net.blocks[1].activation = nn.Tanh()  # the same function
    check_conversion(layer, CALLS, draw(4, {}), 1)
    layer.autoregressive_net.blocks[0].activation = nnf.relu
    assert "relu, tanh" in fastflow.convert(layer).skipped[0].reason


def test_changed_layers_are_not_taken_for_the_originals() -> None:
    class Own(MaskedAffineAutoregressiveTransform):
        pass

    assert "subclass" in fastflow.convert(Own(3, 8)).skipped[0].reason
    layer = build(3, 8, {})
    layer.autoregressive_net.final_layer = nn.Linear(8, 6)
    assert "final_layer is a Linear" in fastflow.convert(layer).skipped[0].reason
    layer = build(3, 8, {})
    layer._epsilon = 1e-2
    assert "_epsilon is 0.01" in fastflow.convert(layer).skipped[0].reason
    layer = build(3, 8, {})
    nn.utils.parametrizations.weight_norm(layer.autoregressive_net.initial_layer)
    assert "initial_layer is a Parametrized" in fastflow.convert(layer).skipped[0].reason
    layer = build(3, 8, {})
    layer.autoregressive_net.blocks[0].register_forward_hook(print)
    assert "blocks.0 has hooks" in fastflow.convert(layer).skipped[0].reason
    spline = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(3, 8)
    assert "splines" in fastflow.convert(spline).skipped[0].reason


SDIST = os.environ.get("NFLOWS_SDIST", "")


@pytest.mark.skipif(
    not (SDIST and importlib.util.find_spec("torchtestcase")),
    reason="NFLOWS_SDIST must name the unpacked sdist of nflows, and torchtestcase be installed",
)
@pytest.mark.parametrize("module", ["transforms.autoregressive_test", "flows.autoregressive_test"])
def test_the_tests_of_nflows(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SDIST)
    run_tests_of_library(f"tests.{module}", MaskedAffineAutoregressiveTransform, monkeypatch)


def test_first_call_of_a_copy_in_inference_mode_or_a_transform_leaves_nothing_behind() -> None:
    layer = MaskedAffineAutoregressiveTransform(4, 8, num_blocks=1)
    fastflow.convert(layer)
    x = torch.randn(3, 4)
    served, loaded = copy.deepcopy(layer), copy.deepcopy(layer)
    with torch.inference_mode():
        served(x)
        loaded.load_state_dict(layer.state_dict())
    for one in (served, loaded):
        one(x)[0].sum().backward()  # raised on inference tensors
    served = copy.deepcopy(layer)
    torch.func.jacrev(lambda x: served(x)[0])(x)
    torch.testing.assert_close(copy.deepcopy(served)(x), layer(x))
