"""The CUDA kernels of made and autoregressive, executed on the CPU (see test_cuda_kernels.py)."""

from __future__ import annotations

import ctypes

import cuda_on_host
import masked_on_host
import pytest
import torch
from masked_oracle import SCALES, Problem, affine_inverse, problem
from oracle import assert_as_good
from torch import Tensor

from fastflow.reference import autoregressive as affine
from fastflow.reference import made, network
from fastflow.scales import Gate, Scale, SoftClip, Softplus

if cuda_on_host.compiler() is None:
    pytest.skip("no g++ to compile the kernels for the host", allow_module_level=True)

Kernels = masked_on_host.MaskedKernels
NUMBERS = {name: number for number, name in enumerate(network.ACTIVATIONS)}
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(scope="session")
def kernels(host_library: ctypes.CDLL) -> Kernels:
    return Kernels(host_library)


def in_type(dtype: torch.dtype, values: object) -> object:
    """Every floating tensor of nested lists in another type."""
    if isinstance(values, Tensor):
        return values.detach().to(dtype) if values.is_floating_point() else values
    return [in_type(dtype, value) for value in values] if isinstance(values, list) else values


def network_of(given: Problem) -> list:
    """terms, weights, biases, stairs, activation, residual."""
    none = given.x.new_empty(0)

    def filled(tensors: list[Tensor | None]) -> list[Tensor]:
        return [none if tensor is None else tensor for tensor in tensors]

    return [
        filled(given.terms) if given.terms else [],
        *(given.weights, filled(given.biases), given.stairs),
        *(NUMBERS[given.activation], given.residual),
    ]


def bits(tensors: list[Tensor]) -> int:
    return sum(1 << layer for layer, tensor in enumerate(tensors) if tensor.shape != (0,))


def flat(result: tuple) -> list[Tensor]:
    return [x for part in result for x in (part if isinstance(part, list) else [part])]


def compare(got: tuple, plain: tuple, exact: tuple, what: str) -> None:
    """As good as the reference is in float32 or, in float64, would be."""
    for i, (one, rough, true) in enumerate(zip(flat(got), flat(plain), flat(exact), strict=True)):
        assert one.shape == true.shape, f"{what}, result {i}"
        if one.numel():
            assert_as_good(one, rough, true, f"{what}, result {i}")


def check(
    kernels: Kernels, op: str, given: Problem, dtype: torch.dtype, scale: Scale | None = None
) -> tuple:
    """An op and its backward against the reference; what the kernels found."""
    reference = made if scale is None else affine
    names = f"{op}_backward" if op.endswith("inverse") else op.replace("forward", "backward")
    terms, weights, biases, stairs, activation, residual = in_type(dtype, network_of(given))
    x = in_type(dtype, given.x)
    scales = [] if scale is None else [scale.number, *scale.constants]
    forward = [x, terms, weights, biases, stairs, activation, residual, *scales, True]

    got = getattr(kernels, op)(*forward)
    answers = [getattr(reference, op)(*in_type(kind, forward)) for kind in DTYPES]
    compare(got[:-1], *(answer[:-1] for answer in answers), op)

    at = got[0] if op.endswith("inverse") else x
    d_out = [torch.randn(len(x), got[0].shape[1], dtype=dtype)]
    if scale is not None:
        d_out.append(torch.randn(len(x), dtype=dtype))
    flags = [bits(terms), bits(biases), True, True]
    rest = [weights, stairs, activation, residual, *scales, *flags]
    grads = getattr(kernels, names)(*d_out, at, got[-1], *rest)
    plain, exact = (
        getattr(reference, names)(
            *in_type(kind, [*d_out, at]),
            _saved(kind, op, [at, *forward[1:]], reference),
            *in_type(kind, rest),
        )
        for kind in DTYPES
    )
    compare(grads, plain, exact, names)
    for gradient, mask in zip(grads[2], given.masks(), strict=True):
        assert (gradient[~mask] == 0).all()
    return *got[:-1], *flat(grads)


def _saved(kind: torch.dtype, op: str, forward: list, reference: object) -> Tensor:
    """What the reference's backward needs at this x, which the parallel direction computes."""
    parallel = getattr(reference, op.replace("inverse", "forward"))
    return parallel(*in_type(kind, forward))[-1]


AFFINE = ["autoregressive_forward", "autoregressive_inverse"]


def moderate(given: Problem) -> Problem:
    """Weights of half the size: the inverse of a steep flow magnifies what it gets."""
    with torch.no_grad():
        for weight in given.weights:
            weight *= 0.5
    return given


# One feature, no hidden layer, fewer units than features, widths around those of tiles, a stage of
# more units than a panel takes, and stages of as many units and of one more.
SIZES = [
    (1, 1, ()),
    (3, 1, (3,)),
    (9, 3, ()),
    (8, 5, (3,)),
    (7, 9, (4, 33)),
    (17, 19, (33, 70)),
    (3, 33, (50, 50, 50)),
    (5, 4, (300, 65)),
    (2, 40, (129,)),
    (3, 1, (253,)),
    (3, 1, (254,)),
]
by_size = pytest.mark.parametrize("rows, features, hidden", SIZES)


@pytest.mark.parametrize("op", ["made_forward", *AFFINE])
@by_size
def test_sizes(
    kernels: Kernels, rows: int, features: int, hidden: tuple[int, ...], op: str
) -> None:
    for turn, dtype in enumerate(DTYPES):
        given = problem(rows, features, hidden, context=turn == 0, sorted_units=turn == 0)
        if given.terms:  # a term for every layer, not only where contexts enter
            given.terms = [torch.randn(rows, len(w), dtype=w.dtype) for w in given.weights]
        check(kernels, op, moderate(given), dtype, None if op == "made_forward" else SoftClip())


@pytest.mark.parametrize("op", AFFINE)
@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_scales(kernels: Kernels, scale: Scale, op: str) -> None:
    for dtype in DTYPES:
        check(kernels, op, moderate(problem(5, 6, (11,), context=True)), dtype, scale)


@pytest.mark.parametrize("op", ["made_forward", *AFFINE])
@pytest.mark.parametrize("activation", NUMBERS)
def test_activations(kernels: Kernels, activation: str, op: str) -> None:
    scale = None if op == "made_forward" else Gate()
    for dtype in DTYPES:
        given = moderate(problem(3, 5, (14, 9), activation=activation, biases=op != "made_forward"))
        check(kernels, op, given, dtype, scale)


@pytest.mark.parametrize("op", ["made_forward", *AFFINE])
@pytest.mark.parametrize("sorted_units", [True, False])
@pytest.mark.parametrize(
    "features, hidden", [(5, (12,) * 3), (3, (7,)), (20, (8,) * 5), (2, (300,) * 3)]
)
def test_residual(
    kernels: Kernels, features: int, hidden: tuple[int, ...], sorted_units: bool, op: str
) -> None:
    given = problem(
        9,
        features,
        hidden,
        residual=True,
        context=True,
        sorted_units=sorted_units,
        activation="elu",
    )
    scale = None if op == "made_forward" else Softplus()
    check(kernels, op, moderate(given), torch.float64, scale)


@pytest.mark.parametrize("hidden", [(12,) * 3, (300,) * 3], ids=["panels", "wide stages"])
def test_degrees_that_a_residual_block_lacks(kernels: Kernels, hidden: tuple[int, ...]) -> None:
    """A unit waits for the one it is added to, also where all else that it sees is there before."""
    given = moderate(problem(4, 6, hidden, residual=True, context=True, activation="tanh"))
    given.degrees[2] = given.degrees[2].clamp(max=2)
    exact = affine_inverse(given, SoftClip(), given.x)
    cotangents = [torch.randn_like(result) for result in exact]
    leaves = [given.x, given.terms[0], *given.weights, *given.biases]
    wanted = torch.autograd.grad(exact, leaves, cotangents)

    y, *arguments = in_type(torch.float64, [given.x, *network_of(given)])
    scale = [SoftClip.number, *SoftClip().constants]
    x, ladj, saved = kernels.autoregressive_inverse(y, *arguments, *scale, True)
    torch.testing.assert_close((x, ladj), exact)
    _, weights, _, *rest = arguments
    dy, dterms, dweights, dbiases = kernels.autoregressive_inverse_backward(
        *cotangents, x, saved, weights, *rest, *scale, 1, 15, True, True
    )
    torch.testing.assert_close((dy, dterms[0], *dweights, *dbiases), wanted)


@pytest.mark.parametrize("op", ["made_forward", *AFFINE])
@pytest.mark.parametrize("features, hidden", [(9, (12, 40)), (3, (300, 300, 300))])
def test_workspace(kernels: Kernels, features: int, hidden: tuple[int, ...], op: str) -> None:
    """Tiles in device memory, where shared memory is too small for them: the same bits."""
    given = moderate(problem(19, features, hidden, residual=len(hidden) == 3, context=True))
    scale = None if op == "made_forward" else Gate()
    seed = torch.random.get_rng_state()
    small = Kernels(kernels.library, shared_limit=1)
    for dtype in DTYPES:
        torch.random.set_rng_state(seed)
        on_chip = check(kernels, op, given, dtype, scale)
        torch.random.set_rng_state(seed)
        for one, other in zip(on_chip, check(small, op, given, dtype, scale), strict=True):
            assert torch.equal(one, other)


# of tiles in shared memory, and of layers that are a kernel each
by_kind = pytest.mark.parametrize("hidden", [(40, 33), (260, 9)], ids=["tiles", "layers"])


@pytest.mark.parametrize("op", AFFINE)
@by_kind
def test_rows_are_independent(kernels: Kernels, hidden: tuple[int, ...], op: str) -> None:
    """Neither the rest of the batch nor the size of tiles changes a row's bits."""
    terms, weights, biases, stairs, *rest = in_type(
        torch.float32, network_of(moderate(problem(40, 7, hidden, context=True)))
    )
    x = torch.randn(40, 7)
    run = [weights, biases, stairs, *rest, 0, *SoftClip().constants, True]
    few = Kernels(kernels.library, processors=1)  # tiles of 32 rows
    many = Kernels(kernels.library, processors=100)  # tiles of 8 rows
    whole = getattr(few, op)(x, terms, *run)
    for one, other in zip(whole, getattr(many, op)(x, terms, *run), strict=True):
        assert torch.equal(one, other)
    some = slice(33, 40)
    part = [term[some] if term.shape != (0,) else term for term in terms]
    for one, other in zip(whole[:2], getattr(many, op)(x[some], part, *run)[:2], strict=True):
        assert torch.equal(one[some], other)
    x[34] = torch.nan
    keep = torch.arange(40) != 34
    for poisoned, clean in zip(getattr(few, op)(x, terms, *run)[:2], whole[:2], strict=True):
        assert poisoned[34].isnan().any()
        assert torch.equal(poisoned[keep], clean[keep])


@pytest.mark.parametrize("op", ["made_forward", *AFFINE])
@by_kind
def test_masked_weights_are_not_read(kernels: Kernels, hidden: tuple[int, ...], op: str) -> None:
    """Infinity and NaN in masked weights change nothing."""
    given = moderate(problem(5, 6, hidden, context=True))
    scale = None if op == "made_forward" else SoftClip()
    seed = torch.random.get_rng_state()
    clean = check(kernels, op, given, torch.float64, scale)
    with torch.no_grad():
        for weight, mask in zip(given.weights, given.masks(), strict=True):
            weight[~mask] = torch.inf
            weight[~mask & (torch.rand(mask.shape) < 0.5)] = torch.nan
    torch.random.set_rng_state(seed)
    for one, other in zip(clean, check(kernels, op, given, torch.float64, scale), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("op", AFFINE)
@by_kind
def test_infinity_stays_above_the_stair(kernels: Kernels, hidden: tuple[int, ...], op: str) -> None:
    """An infinite feature reaches later features only, although tiles hold both."""
    given = moderate(problem(3, 8, hidden, order=None))
    terms, weights, biases, stairs, *rest = in_type(torch.float32, network_of(given))
    x = torch.randn(3, 8)
    run = [terms, weights, biases, stairs, *rest, 0, *SoftClip().constants, True]
    clean = getattr(kernels, op)(x, *run)[0]
    x[1, 4] = torch.inf
    y = getattr(kernels, op)(x, *run)[0]
    assert torch.equal(y[:, :4], clean[:, :4])
    assert torch.equal(y[::2], clean[::2])


def test_parts_of_the_gradients(kernels: Kernels) -> None:
    """What is not wanted is of shape (0,); the rest does not change."""
    given = moderate(problem(11, 5, (12,), context=True))
    terms, weights, biases, stairs, *rest = in_type(torch.float64, network_of(given))
    scale = [0, *SoftClip().constants]
    x, ladj, saved = kernels.autoregressive_inverse(
        given.x.detach(), terms, weights, biases, stairs, *rest, *scale, True
    )
    common = [torch.randn_like(x), torch.randn_like(ladj), x, saved, weights, stairs, *rest, *scale]
    for op in ("autoregressive_inverse_backward", "autoregressive_backward"):
        whole = getattr(kernels, op)(*common, 1, 3, True, True)
        for flags in [(0, 3, True, False), (1, 0, False, False), (0, 1, False, True)]:
            part = getattr(kernels, op)(*common, *flags)
            for one, other in zip(flat(part), flat(whole), strict=True):
                assert one.shape == (0,) or torch.equal(one, other)
            assert (part[0].shape != (0,)) == flags[2]
            assert [bits(tensors) for tensors in part[1:]] == [
                flags[0],
                *((3, flags[1]) if flags[3] else (0, 0)),
            ]


@pytest.mark.parametrize("op", ["made_forward", *AFFINE])
@pytest.mark.parametrize("width", [20, 260])
def test_without_saving(kernels: Kernels, width: int, op: str) -> None:
    given = moderate(problem(3, 4, (width,) * 3, residual=True, context=True))
    arguments = in_type(torch.float32, [given.x, *network_of(given)])
    if op != "made_forward":
        arguments += [SoftClip.number, *SoftClip().constants]
    *whole, _ = getattr(kernels, op)(*arguments, True)
    *part, saved = getattr(kernels, op)(*arguments, False)
    assert saved.shape == (0,)
    for one, other in zip(part, whole, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("hidden", [(7,), (20,) * 5, (260,)])
def test_both_directions_save_the_same(kernels: Kernels, hidden: tuple[int, ...]) -> None:
    """So that the parallel pass at x can make again what the inverse did not keep."""
    given = moderate(problem(8, 5, hidden, residual=True, context=True))
    y, *rest = in_type(torch.float64, [given.x, *network_of(given)])
    rest += [SoftClip.number, *SoftClip().constants, True]
    x, _, saved = kernels.autoregressive_inverse(y, *rest)
    back, _, again = kernels.autoregressive_forward(x, *rest)
    torch.testing.assert_close(back, y)
    torch.testing.assert_close(again, saved)


@pytest.mark.parametrize("processors", [1, 50])
def test_pieces_of_the_batch(kernels: Kernels, processors: int) -> None:
    """Sums over a batch of several pieces, whose last one is shorter, and over one of one."""
    given = moderate(problem(300, 3, (9,), context=True))
    some = Kernels(kernels.library, processors=processors)
    for op in AFFINE:
        check(some, op, given, torch.float32, SoftClip())


def test_too_many_layers(kernels: Kernels) -> None:
    with pytest.raises(cuda_on_host.KernelError, match="more than 24 layers"):
        check(kernels, "made_forward", problem(2, 2, (3,) * 24), torch.float32)
