"""Converted layers of normflows: the same numbers as the originals, faster."""

from __future__ import annotations

import copy

import pytest
import torch
from conversion import TOLERANCES, check_conversion, check_same, run_tests_of_library
from torch import Tensor, nn
from torch.nn import functional as nnf

import fastflow

pytest.importorskip("normflows")
import normflows
from normflows.flows import MaskedAffineAutoregressive, Planar

CASES = {  # features, hidden_features, and what is not the constructor's default
    "defaults": (5, 32, {}),
    "tanh": (6, 50, {"activation": torch.tanh}),
    "feed-forward": (5, 32, {"use_residual_blocks": False}),
    "random masks": (7, 24, {"use_residual_blocks": False, "random_mask": True}),
    "deep": (4, 16, {"num_blocks": 5, "activation": nnf.elu}),
    "deep feed-forward": (4, 16, {"num_blocks": 6, "use_residual_blocks": False}),
    "no blocks": (4, 16, {"num_blocks": 0, "context_features": 2}),
    "no blocks, feed-forward": (4, 16, {"num_blocks": 0, "use_residual_blocks": False}),
    "wide": (20, 256, {"activation": nn.SiLU()}),
    "narrow": (9, 3, {"activation": nnf.gelu}),
    "one feature": (1, 8, {}),
}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
CALLS = (lambda layer, *inputs: layer(*inputs), lambda layer, *inputs: layer.inverse(*inputs))


def build(features: int, hidden: int, options: dict) -> nn.Module:
    torch.manual_seed(0)
    layer = MaskedAffineAutoregressive(features, hidden, **options)
    for parameter in layer.parameters():  # the constructor's are next to the identity
        nn.init.normal_(parameter, std=0.5 / parameter.shape[-1] ** 0.5)
    return layer


def draw(features: int, options: dict) -> list[Tensor]:
    sizes = [features, *[options[key] for key in ("context_features",) if key in options]]
    return [torch.randn(11, size, dtype=torch.float64) for size in sizes]


@DTYPES
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_layers_agree_in_both_directions(case: tuple, dtype: torch.dtype) -> None:
    features, _, options = case
    converted = check_conversion(build(*case), CALLS, draw(features, options), 1, dtype)
    assert isinstance(converted, MaskedAffineAutoregressive)


def test_masked_weights_get_no_gradient_where_two_layers_are_one() -> None:
    layer = build(5, 12, {"use_residual_blocks": False})
    fastflow.convert(layer)
    layer(torch.randn(4, 5))[0].sum().backward()
    masked = [part for part in layer.modules() if hasattr(part, "mask")]
    assert len(masked) == 4 and not any(part.weight.grad[part.mask == 0].any() for part in masked)


def test_few_rows_are_not_worth_the_product_of_weights() -> None:
    layer = build(5, 12, {"use_residual_blocks": False})
    converted = copy.deepcopy(layer)
    fastflow.convert(converted)
    x = torch.randn(4, 5)
    assert all(map(torch.equal, converted(x), layer(x)))  # to the bit: the same code
    check_same(CALLS[1], layer, converted, [x])


REFUSED = {
    "gate": ({"context_features": 2}, "gated by a context"),
    "batch norm": ({"use_batch_norm": True}, "batch norm"),
    "dropout": ({"dropout_probability": 0.1}, "dropout"),
    "activation": ({"activation": torch.sigmoid}, "sigmoid is not known"),
}


@pytest.mark.parametrize(("options", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_named_and_left_alone(options: dict, reason: str) -> None:
    layer = build(4, 12, options)
    (row,) = fastflow.convert(layer).skipped
    assert type(layer) is MaskedAffineAutoregressive and reason in row.reason
    with pytest.raises(ValueError, match=reason):
        fastflow.convert(layer, strict=True)


def test_a_preprocessing_and_splines_are_named() -> None:
    layer = build(4, 12, {})
    layer.autoregressive_net.preprocessing = nn.Tanh()
    assert "preprocessing" in fastflow.convert(layer).skipped[0].reason
    spline = normflows.flows.AutoregressiveRationalQuadraticSpline(4, 1, 8)
    (row,) = fastflow.convert(spline).skipped
    assert row.path == "mprqat" and "splines" in row.reason


def test_feed_forward_blocks_refuse_a_context_as_before() -> None:
    layer = build(4, 12, {"use_residual_blocks": False})
    fastflow.convert(layer)
    with pytest.raises(AttributeError, match="context_layer"):
        layer(torch.randn(3, 4), torch.randn(3, 2))


@DTYPES
@pytest.mark.parametrize("shape", [(2,), (2, 3)], ids=str)
def test_planar_steps_agree(shape: tuple, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(9, *shape, dtype=torch.float64)]
    check_conversion(Planar(shape), CALLS[:1], inputs, 1, dtype)


def test_planar_steps_with_tanh_have_an_inverse_now() -> None:
    step = Planar((2, 3)).double()
    fastflow.convert(step)
    z = torch.randn(9, 2, 3, dtype=torch.float64)
    y, ladj = step(z)
    back, inverse_ladj = step.inverse(y)
    torch.testing.assert_close(back, z, rtol=0, atol=1e-12)
    torch.testing.assert_close(inverse_ladj, -ladj, rtol=0, atol=1e-12)
    fastflow.revert(step)
    with pytest.raises(NotImplementedError):
        step.inverse(y)


def test_planar_steps_that_are_left_alone() -> None:
    assert "leaky_relu" in fastflow.convert(Planar((2,), act="leaky_relu")).skipped[0].reason
    several = Planar((2,), u=torch.randn(3, 2), w=torch.randn(3, 2))
    assert "(3, 2)" in fastflow.convert(several).skipped[0].reason


def test_planar_steps_take_what_broadcasts_as_before() -> None:
    step = Planar((3,)).double()
    converted = copy.deepcopy(step)
    fastflow.convert(converted)
    check_same(CALLS[0], step, converted, [torch.randn(4, 1, dtype=torch.float64)])


@DTYPES
def test_a_whole_flow_agrees_in_both_directions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    flows = []
    for _ in range(3):
        flows += [build(4, 16, {}), normflows.flows.Permute(4)]
    model = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(4), flows)
    inputs = [torch.randn(9, 4, dtype=torch.float64)]
    calls = [
        lambda model, x: (model.log_prob(x),),
        lambda model, z: model.forward_and_log_det(z),
    ]
    check_conversion(model, calls, inputs, 3, dtype)


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("normflows.flows.affine.autoregressive_test", MaskedAffineAutoregressive),
        ("normflows.flows.planar_test", Planar),
    ],
)
def test_the_tests_of_normflows(
    module: str, layer: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_tests_of_library(module, layer, monkeypatch)


def test_torch_compile() -> None:
    torch.compiler.reset()
    model = nn.ModuleList([build(4, 12, {"use_residual_blocks": False}), Planar((4,))]).double()
    converted = copy.deepcopy(model)
    fastflow.convert(converted)
    compiled = [torch.compile(one, fullgraph=True, backend="aot_eager") for one in converted]

    def call(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        first, second = compiled if model is converted else model
        return *first(x), *second(x)

    check_same(call, model, converted, [torch.randn(7, 4, dtype=torch.float64)])
