"""A training step of a VAE: fastflow against the same model with other flow layers.

As for the ops: contenders take turns, and each answer, -ELBO with the gradients of all parameters,
is checked against float64 first. The step is that of `fastflow.vae.training`: loss, gradients and
Adam; on a GPU fastflow's is one CUDA graph. All have the same encoder, decoder and optimizer, so a
speed-up is one of whole steps, not of the flow alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import peers
import pytest
import torch
import vae_peers
from comparison import LIBRARY, Comparison, Group, Settings, compare, results
from peers import Chain
from pytest_benchmark.fixture import BenchmarkFixture
from suite import MARKS, SETTINGS, Outcomes, parametrize
from torch import Tensor

import fastflow
from fastflow import backends
from fastflow.vae import Config, build

OP = "vae"
DIRECTION = "training"
BACKENDS = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}

pytestmark = MARKS


class Case(NamedTuple):
    """Sizes of one comparison: B images of side x side pixels, D latents, K steps of the flow."""

    posterior: str
    B: int
    D: int
    K: int
    hidden: int = 500
    width: int = 64
    side: int = 28

    def __str__(self) -> str:
        width = f"-H{self.width}x{self.width}" if self.posterior == "iaf" else ""
        return f"{self.posterior}-B{self.B}-D{self.D}-K{self.K}{width}"

    @property
    def config(self) -> Config:
        networks = {"width": self.width, "context": vae_peers.CONTEXT}
        return Config(
            posterior=self.posterior,
            latent=self.D,
            steps=self.K,
            hidden=self.hidden,
            **networks if self.posterior == "iaf" else {},
        )

    def model(self, dtype: torch.dtype, device: torch.device) -> fastflow.vae.VAE:
        return build(self.config, (self.side, self.side)).to(device, dtype)

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Binary images and noise."""
        generator = torch.Generator(device).manual_seed(self.B + self.D + self.K)
        pixels = torch.rand(self.B, self.side**2, generator=generator, device=device)
        noise = torch.randn(self.B, self.D, generator=generator, device=device)
        return (pixels > 0.5).float(), noise

    def flops(self) -> int:
        """Of the dense layers, one pass forward and two on the way back; flows are not counted."""
        products = self.hidden * (2 * self.side**2 + 3 * self.D)
        return 6 * self.B * products


SMOKE = [Case("planar", 20, 2, 2, 16, side=6), Case("iaf", 20, 3, 2, 16, 16, side=6)]
SHORT = [Case("planar", 100, 2, 3), Case("planar", 100, 40, 16), Case("iaf", 100, 32, 4, width=320)]
FULL = [Case("planar", 1000, 2, 3), Case("iaf", 100, 2, 3), Case("iaf", 1000, 32, 8, width=320)]


def cases(grid: str) -> list[Case]:
    """The cases of a grid, the most telling ones first."""
    return {"smoke": SMOKE, "short": SHORT, "full": SHORT + FULL}[grid]


def contenders(case: Case, device: str) -> list[str]:
    """Those that know this case, whether or not they are installed."""
    names = [LIBRARY + name for name in BACKENDS[device]] + ["eager"]
    return [*names, "zuko"] if case.posterior == "iaf" else names


def absence(contender: str) -> str | None:
    """None if a contender can run on this machine, else why not."""
    if contender.startswith(LIBRARY):
        reason = backends.status(contender.removeprefix(LIBRARY))
        return reason and f"{contender}: {reason}"
    return peers.missing("zuko") if contender == "zuko" else None


def builder(
    contender: str, case: Case, dtype: torch.dtype, device: torch.device
) -> Callable[[], Chain]:
    """How to make a contender of a case."""

    def make() -> Chain:
        model = case.model(dtype, device)
        names = [name for name, _ in model.named_parameters()]
        x, noise = (tensor.to(dtype) for tensor in case.inputs(device))
        if contender.startswith(LIBRARY):
            in_force = partial(fastflow.use_backend, contender.removeprefix(LIBRARY))
            return vae_peers.of_model(model, x, noise, names, in_force, fast=True)
        kinds = vae_peers.ZUKO if contender == "zuko" else vae_peers.EAGER
        return vae_peers.of_model(vae_peers.replaced(model, kinds).to(x), x, noise, names)

    return make


def run_comparison(case: Case, direction: str, settings: Settings, timed: bool) -> Comparison:
    """The contenders of one case, checked and timed."""
    device = settings.device
    names = contenders(case, device.type)
    cotangents = (torch.full((case.B,), 1 / case.B, device=device),) * 2
    exact_chain = builder("eager", case, torch.float64, device)()
    given = tuple(cotangent.double() for cotangent in cotangents)
    exact = results(exact_chain, direction, vae_peers.NAMES, given)
    reasons = {name: absence(name) for name in names}
    builders = {
        name: builder(name, case, torch.float32, device) for name in names if reasons[name] is None
    }
    return compare(
        [Group(builders, None, exact)],
        {name: reason for name, reason in reasons.items() if reason is not None},
        direction,
        vae_peers.NAMES,
        cotangents,
        case.K,
        settings,
        timed=timed,
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    settings: Settings = metafunc.config.stash[SETTINGS]
    triples = [
        (case, DIRECTION, contender)
        for case in cases(settings.grid)
        for contender in contenders(case, settings.device.type)
    ]
    parametrize(metafunc, triples)


def test_vae(
    benchmark: BenchmarkFixture, outcomes: Outcomes, case: Case, direction: str, contender: str
) -> None:
    facts = {"flops": case.flops()}
    outcomes.show(benchmark, run_comparison, OP, case, direction, contender, **facts)
    if benchmark.enabled:
        benchmark.extra_info["steps_per_second"] = 1 / benchmark.extra_info["median_seconds"]
