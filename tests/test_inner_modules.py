"""Hooks, replaced methods and other modules inside a layer act as they do in any other module."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize, prune

import fastflow
from fastflow.inner import plain_tensors
from fastflow.reference import scales
from fastflow.reference.network import ACTIVATIONS

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.nn.utils:FutureWarning", "ignore::DeprecationWarning"
)
D, C = 3, 2
CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # both sides round in float64


class Lora(nn.Module):
    """W x + b + B A x, in the place of a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(0.3 * torch.ones(1, base.in_features, dtype=base.weight.dtype))
        self.b = nn.Parameter(0.2 * torch.ones(base.out_features, 1, dtype=base.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ (self.b @ self.a).mT


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


TOOLS: dict[str, Callable[[nn.Linear], object]] = {
    "spectral_norm": nn.utils.spectral_norm,
    "weight_norm": nn.utils.weight_norm,
    "prune": lambda linear: prune.l1_unstructured(linear, "weight", 0.3),
    "prune twice": lambda linear: [prune.random_unstructured(linear, "weight", 0.2) for _ in "12"],
    "prune bias": lambda linear: prune.l1_unstructured(linear, "bias", 0.3),
    "weight_norm, parametrization": parametrizations.weight_norm,
    "spectral_norm, parametrization": parametrizations.spectral_norm,
    "orthogonal, parametrization": parametrizations.orthogonal,
    "half, parametrization": lambda linear: parametrize.register_parametrization(
        linear, "weight", Half()
    ),
    "spectral_norm and hook": lambda linear: nn.utils.spectral_norm(linear).register_forward_hook(
        lambda *_: None
    ),
}
"""What changes the weight of a layer and no more."""


def put(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module into the place of another."""
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is old and parent is not new:
                parent._modules[name] = new


def patched(linear: nn.Module) -> None:
    """A `forward` of the instance, as accelerate and others leave it."""
    inner = linear.forward
    linear.forward = lambda h: inner(h) + 1


# ---------------------------------------------------------------- masked layers of fastflow

NETWORKS = {
    "plain": {},
    "context": {"context_features": C},
    "reverse": {"order": "reverse", "activation": "tanh", "scale": "softplus"},
    "residual": {"residual": True, "context_features": C, "scale": "sigmoid"},
    "adjacency": {"adjacency": torch.tensor([[0, 1, 0], [0, 0, 0], [1, 1, 0]]).bool()},
    "linear": {"hidden_features": (), "context_features": C, "scale": "gate"},
}


@pytest.fixture(params=NETWORKS)
def layer(request: pytest.FixtureRequest) -> fastflow.MaskedAffineAutoregressive:
    torch.manual_seed(0)
    options = {"hidden_features": (8, 8)} | NETWORKS[request.param]
    made = fastflow.MaskedAffineAutoregressive(D, **options).double()
    with torch.no_grad():  # starting values may be so small that hooks would hardly show
        for parameter in made.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return made


@pytest.fixture(params=[False, True], ids=["forward", "inverse"])
def inverse(request: pytest.FixtureRequest) -> bool:
    return request.param


def points(layer: nn.Module, rows: int = 6) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    sizes = [D, C] if layer.context_features else [D]
    return tuple(torch.randn(rows, n, generator=generator, dtype=torch.float64) for n in sizes)


def wanted(
    layer: fastflow.MaskedAffineAutoregressive,
    x: Tensor,
    context: Tensor | None = None,
    before: Callable[[int, Tensor], Tensor] = lambda _, h: h,
    after: Callable[[int, Tensor], Tensor] = lambda _, p: p,
) -> tuple[Tensor, Tensor]:
    """The layer by plain products with masked weights, and what hooks would do between them."""
    net, act, found = layer.network, ACTIVATIONS[layer.network.activation].value, []
    h, last = x, len(net.layers) - 1
    for number, (linear, mask) in enumerate(zip(net.layers, net.masks())):
        p = after(number, before(number, h) @ (linear.weight * mask).mT + linear.bias)
        if number == 0 and context is not None:
            p = p + net.context_layer(context)
        if net.residual and number in range(2, last, 2):
            p = p + found[-2]
        found.append(p)
        h = p if net.residual and number == last - 1 else act(p)
    m, a = found[-1].unflatten(-1, (D, 2)).unbind(-1)
    y, logs = scales.step(x, m, a, layer.scale.number, *map(float, layer.scale.constants))
    return y, logs.sum(-1)


def agree(layer: nn.Module, inverse: bool, **changes: Callable) -> None:
    """The layer computes what is wanted, with all gradients, or inverts it."""
    inputs = [tensor.requires_grad_() for tensor in points(layer)]
    grads = []
    if inverse:
        y, ladj = wanted(layer, *inputs, **changes)
        x, back = layer.inverse(y, *inputs[1:])
        torch.testing.assert_close(x, inputs[0], **CLOSE)
        torch.testing.assert_close(back, -ladj, **CLOSE)
        return
    for run in (lambda *given: wanted(layer, *given, **changes), layer):
        y, ladj = run(*inputs)
        leaves = [*inputs, *layer.parameters()]
        grads.append((y, ladj, *torch.autograd.grad((y.sin() + ladj[:, None]).sum(), leaves)))
    for want, found in zip(*grads):
        torch.testing.assert_close(found, want, **CLOSE)


@pytest.mark.parametrize("tool", TOOLS)
def test_weights_behind_tools_train(
    tool: str, layer: fastflow.MaskedAffineAutoregressive, inverse: bool
) -> None:
    for linear in layer.network.layers:
        TOOLS[tool](linear)
    weights = [p for name, p in layer.named_parameters() if not name.endswith("weight_g")]
    optimizer = torch.optim.SGD(layer.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        y, ladj = (layer.inverse if inverse else layer)(*points(layer))
        (y.square().mean() - ladj.mean()).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in weights)
        old = [p.detach().clone() for p in weights]
        optimizer.step()
        assert not any(map(torch.equal, old, weights))
        layer.eval()  # so that nobody's iteration goes on
        with torch.no_grad():
            x, *context = points(layer)
            found = layer(x, *context)
            for one, other in zip(found, wanted(layer, x, *context)):
                torch.testing.assert_close(one, other, **CLOSE)
            torch.testing.assert_close(layer.inverse(found[0], *context)[0], x, **CLOSE)
        layer.train()


@pytest.mark.parametrize("position", [0, -1])
def test_forward_hooks_replace_the_pre_activation(
    position: int, layer: fastflow.MaskedAffineAutoregressive, inverse: bool
) -> None:
    linears = layer.network.layers
    chosen = range(len(linears))[position]
    seen = []

    def hook(module: nn.Module, _: tuple, p: Tensor) -> Tensor:
        seen.append(module)
        return 1.5 * p + 0.25

    handle = linears[position].register_forward_hook(hook)
    agree(layer, inverse, after=lambda number, p: 1.5 * p + 0.25 if number == chosen else p)
    assert seen and all(module is linears[position] for module in seen)
    handle.remove()
    agree(layer, inverse)
    assert plain_tensors(list(linears)) is not None
    assert "forward" not in linears[position].__dict__


def test_forward_pre_hooks_change_the_input(
    layer: fastflow.MaskedAffineAutoregressive, inverse: bool
) -> None:
    layer.network.layers[-1].register_forward_pre_hook(lambda _, args: (0.5 * args[0],))
    layer.network.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: ((2 * args[0],), kwargs), with_kwargs=True
    )
    last, factors = len(layer.network.layers) - 1, {0: 2.0}
    factors[last] = 0.5 * factors.get(last, 1.0)
    agree(layer, inverse, before=lambda number, h: factors.get(number, 1.0) * h)


def test_backward_hooks_are_called(
    layer: fastflow.MaskedAffineAutoregressive, inverse: bool
) -> None:
    shapes = []
    for linear in layer.network.layers:
        linear.register_full_backward_pre_hook(lambda _, grads: shapes.append(grads[0].shape))
        linear.register_full_backward_hook(lambda _, __, grads: shapes.append(grads[0].shape))
    agree(layer, inverse)
    if not inverse:  # gradients of the layer, which agreed
        assert len(shapes) == 2 * len(layer.network.layers)


def test_global_hooks_see_all_modules(
    layer: fastflow.MaskedAffineAutoregressive, inverse: bool
) -> None:
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        agree(layer, inverse)
    finally:
        handle.remove()
    assert {id(layer.network), *map(id, layer.network.layers)} <= set(map(id, seen))


def test_hooks_on_the_network(layer: fastflow.MaskedAffineAutoregressive, inverse: bool) -> None:
    layer.network.register_forward_hook(lambda _, __, outputs: outputs + 0.5)
    last = len(layer.network.layers) - 1
    agree(layer, inverse, after=lambda number, p: p + 0.5 if number == last else p)
    x, *context = points(layer)
    outputs = layer.network(x, *context)
    assert outputs.shape == (6, D, 2)


def test_adapters_of_the_context_are_added(inverse: bool) -> None:
    torch.manual_seed(0)
    layer = fastflow.MaskedAffineAutoregressive(D, (8, 8), C).double()
    merged = copy.deepcopy(layer)
    layer.network.context_layer = lora = Lora(layer.network.context_layer)
    with torch.no_grad():
        merged.network.context_layer.weight += lora.b @ lora.a
    for one, other in zip(*((m.inverse if inverse else m)(*points(m)) for m in (layer, merged))):
        torch.testing.assert_close(one, other, **CLOSE)


def test_batches_broadcast_and_types_stay(inverse: bool) -> None:
    layer = fastflow.MaskedAffineAutoregressive(D, (8,), C)
    x, context = torch.randn(5, D), torch.randn(4, 1, C)
    plain = (layer.inverse if inverse else layer)(x, context)
    layer.network.layers[0].register_forward_hook(lambda *_: None)
    for one, other in zip((layer.inverse if inverse else layer)(x, context), plain):
        assert one.shape == other.shape and one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    half = layer.bfloat16()
    y, ladj = (half.inverse if inverse else half)(x.bfloat16(), context.bfloat16())
    assert y.dtype == torch.bfloat16 and ladj.dtype == torch.float32


@pytest.mark.parametrize("types", [(32, 64), (64, 32), (64, 64), (16, 32)], ids=str)
@pytest.mark.parametrize("tool", ["hook", "prune", "spectral_norm", "half, parametrization"])
@pytest.mark.parametrize("kind", ["masked", "planar", "pcp"])
def test_types_are_promoted_by_the_one_rule(
    kind: str, tool: str, types: tuple[int, int], inverse: bool
) -> None:
    torch.manual_seed(0)
    layer = {
        "masked": lambda: fastflow.MaskedAffineAutoregressive(D, (8,), C),
        "planar": lambda: fastflow.ConditionalPlanarFlow(D, C, steps=2, hidden_features=(8,)),
        "pcp": lambda: fastflow.PCPMap(D, C, hidden_features=(8,)),
    }[kind]()
    inside = linears(layer)[0]
    TOOLS[tool](inside) if tool in TOOLS else inside.register_forward_hook(lambda *_: None)
    names = {16: torch.bfloat16, 32: torch.float32, 64: torch.float64}
    x, context = torch.randn(5, D).to(names[types[0]]), torch.randn(5, C).to(names[types[1]])
    y, ladj = (layer.inverse if inverse else layer)(x, context)
    assert y.dtype == ladj.dtype == names[max(32, *types)]


def quantized(layer: nn.Module) -> nn.Module:
    if not hasattr(torch.ao.quantization, "quantize_dynamic"):
        pytest.skip("this torch has no quantize_dynamic")
    return torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)


REFUSED: dict[str, tuple[Callable[[nn.Module], nn.Module | None], str]] = {
    "adapter": (
        lambda m: put(m, m.network.layers[1], Lora(m.network.layers[1])),
        r"layers.1 is a .*Lora, must be a torch.nn.Linear.*parametriz",
    ),
    "checkpoint": (
        lambda m: put(m, m.network.layers[0], checkpoint_wrapper(m.network.layers[0])),
        "layers.0 is a .*CheckpointWrapper, must be",
    ),
    "subclass": (
        lambda m: put(m, m.network.layers[0], Own(D, 8)),
        "layers.0 is computed by .*Own.forward, must be by",
    ),
    "another forward": (
        lambda m: patched(m.network.layers[2]),
        "layers.2 has a forward of its own, .*patched",
    ),
    "quantized": (quantized, "layers.0 is a torch.*quantized.dynamic.*Linear, must be.*quantize"),
}


@pytest.mark.parametrize("way", REFUSED)
def test_what_knows_no_mask_is_refused(way: str, inverse: bool) -> None:
    layer = fastflow.MaskedAffineAutoregressive(D, (8, 8))
    change, message = REFUSED[way]
    layer = change(layer) or layer
    x = torch.randn(5, D)
    with pytest.raises(TypeError, match=f"^MaskedAffineAutoregressive: network.{message}"):
        (layer.inverse if inverse else layer)(x)
    with pytest.raises(TypeError, match=f"^MADE: {message}"):
        layer.network(x)
    copy.deepcopy(layer).state_dict()


def test_a_network_that_is_wrapped_is_refused(inverse: bool) -> None:
    layer = fastflow.MaskedAffineAutoregressive(D, (8, 8))
    layer.network = checkpoint_wrapper(layer.network)
    with pytest.raises(TypeError, match=r"network is a .*CheckpointWrapper, must be"):
        (layer.inverse if inverse else layer)(torch.randn(5, D))


def test_the_forward_of_all_linear_layers_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, forward = fastflow.MAF(D), nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: forward(self, x) + 1)
    with pytest.raises(TypeError, match=r"layers.0 is computed by .*lambda"):
        flow.log_prob(torch.randn(5, D))


def test_a_forward_that_was_put_back_is_none() -> None:
    layer = fastflow.MaskedAffineAutoregressive(D, (8, 8))
    x = torch.randn(5, D)
    want = layer(x)
    for linear in layer.network.layers:
        linear.forward = linear.forward
    for model in (layer, copy.deepcopy(layer)):
        assert all(map(torch.equal, model(x), want))


def test_threads_share_a_layer_with_hooks() -> None:
    layer = fastflow.MaskedAffineAutoregressive(D, (8, 8)).double()
    layer.network.layers[1].register_forward_hook(lambda _, __, p: p + 1)
    inputs = torch.randn(8, 20, D, dtype=torch.float64)
    want, wrong = [layer(x) for x in inputs], []

    def work(number: int) -> None:
        for _ in range(30):
            if not all(map(torch.equal, layer(inputs[number]), want[number])):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not any("forward" in m.__dict__ for m in layer.network.layers)


@pytest.mark.parametrize("tool", ["hook", "prune", "weight_norm, parametrization"])
def test_in_one_graph(tool: str, inverse: bool) -> None:
    if tool == "hook" and torch.__version__ < (2, 13):
        pytest.skip("this torch does not trace a forward that is put into a module and taken out")
    layer = fastflow.MaskedAffineAutoregressive(D, (8, 8), C)
    linear = layer.network.layers[1]
    if tool == "hook":
        linear.register_forward_hook(lambda _, __, p: p + 1)
    else:
        TOOLS[tool](linear)
    x, context = torch.randn(5, D), torch.randn(5, C)
    want = (layer.inverse if inverse else layer)(x, context)
    torch.compiler.reset()
    run = torch.compile(layer.inverse if inverse else layer, fullgraph=True, backend="eager")
    for one, other in zip(run(x, context), want):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert "forward" not in linear.__dict__


# ---------------------------------------------------------------- layers that call their networks


@pytest.fixture(params=["planar", "pcp"])
def called(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    if request.param == "planar":
        return fastflow.ConditionalPlanarFlow(D, C, steps=2, hidden_features=(8,)).double()
    return fastflow.PCPMap(D, C, hidden_features=(8, 8)).double()


def linears(layer: nn.Module) -> list[nn.Linear]:
    return [module for module in layer.modules() if isinstance(module, nn.Linear)]


def test_adapters_are_added_everywhere(called: nn.Module, inverse: bool) -> None:
    merged = copy.deepcopy(called)
    for linear, other in zip(linears(called), linears(merged)):
        lora = Lora(linear)
        put(called, linear, checkpoint_wrapper(lora))
        with torch.no_grad():
            other.weight += lora.b @ lora.a
    for one, other in zip(*((m.inverse if inverse else m)(*points(m)) for m in (called, merged))):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)  # two searches of the inverse


def test_hooks_on_networks_act(called: nn.Module, inverse: bool) -> None:
    moved = copy.deepcopy(called)
    linears(called)[-1].register_forward_hook(lambda _, __, p: p + 0.25)
    with torch.no_grad():
        linears(moved)[-1].bias += 0.25
    for one, other in zip(*((m.inverse if inverse else m)(*points(m)) for m in (called, moved))):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("tool", TOOLS)
def test_networks_behind_tools_train(tool: str, called: nn.Module) -> None:
    for linear in linears(called):
        TOOLS[tool](linear)
    optimizer = torch.optim.SGD(called.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        y, ladj = called(*points(called))
        (y.square().mean() - ladj.mean()).backward()
        assert all(p.grad is not None for p in called.parameters())
        optimizer.step()


@pytest.mark.parametrize("kind", ["planar", "pcp"])
def test_networks_are_quantized(kind: str, inverse: bool) -> None:
    torch.manual_seed(0)
    layer = (
        fastflow.ConditionalPlanarFlow(D, C, steps=2, hidden_features=(8,))
        if kind == "planar"
        else fastflow.PCPMap(D, C, hidden_features=(8, 8))
    )
    small = quantized(layer)
    assert any("quantized" in type(module).__module__ for module in small.modules())
    x, context = torch.randn(6, D), torch.randn(6, C)
    for one, other in zip(*((m.inverse if inverse else m)(x, context) for m in (small, layer))):
        assert 0 < (one - other).abs().max() < 0.2  # 8 bits


def test_what_a_parametrization_adds_is_masked() -> None:
    class Shifted(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + 1

    flow = fastflow.MaskedAffineAutoregressive(D, (8, 8), activation="tanh").double()
    for linear in flow.network.layers:
        parametrize.register_parametrization(linear, "weight", Shifted())
    x = torch.randn(D, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow(x)[0], x)
    assert torch.equal(jacobian, jacobian.tril()) and jacobian[[1, 2, 2], [0, 0, 1]].all()
