"""What the report says of every op, and what the README shows of it."""

from __future__ import annotations

from typing import NamedTuple


class Shown(NamedTuple):
    """An op in the report."""

    cases: int  # of the short grid, that the README shows
    directions: tuple[str, ...]  # that the README shows
    legend: str


SHOWN = {
    "planar_flow": Shown(
        4,
        ("forward_backward", "inverse"),
        "planar_flow. PyTorch: the same chain in plain PyTorch, step by step; hoisted: what "
        "does not depend on z computed once for all steps, which is also what torch.compile "
        "gets; for the inverse, which no peer has, Newton's method in plain PyTorch.",
    ),
    "autoregressive": Shown(
        5,
        ("training", "inverse"),
        "autoregressive. B rows, D features, H hidden layers, C context: one layer of a MAF "
        "or an IAF, with the same masks and weights in all libraries, fastflow's with the "
        "scale map of each. PyTorch: masks multiplied in, for the inverse D passes, as in the "
        "libraries; fixed point: passes until nothing changes any more, which depends on the "
        "weights. Dense: a network of the same widths without masks, no rival but a floor. "
        "normflows: with residual blocks, as it has no plain network. Training step: Adam, "
        "and the gradient of the points.",
    ),
    "pcp": Shown(
        4,
        ("forward_backward", "inverse"),
        "pcp. One PCPMap; B rows, D features, H hidden layers, C context. The rivals have the "
        "same network and differentiate its potential by autograd: D vjps, one for each row "
        "of the Hessian; torch.func, its jacfwd of grad under vmap. Their inverse is a fixed "
        "number of undamped Newton steps.",
    ),
    "convert": Shown(
        8,
        ("density", "log_prob", "training", "sample", "rsample"),
        "convert. Flows of T layers of the library that the case names, after "
        "fastflow.convert and before, with the same weights. Density: with all gradients; "
        "log_prob: without; training: a whole step of Adam on it. Samples: from noise, without "
        "gradients unless it says backward.",
    ),
    "vae": Shown(
        3,
        ("training",),
        "vae. A whole step of training, B images of MNIST's size, D latents, K steps of the "
        "flow, 500 hidden units in encoder and decoder; all but the flow's layers is the same "
        "for all. PyTorch: planar steps one by one, masks multiplied in. On a GPU fastflow's "
        "step is one CUDA graph, as in `python -m fastflow.vae train`.",
    ),
}
