"""The posteriors by name: those of this package, and those that a user adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import fastflow
from fastflow.vae.errors import VaeError
from fastflow.vae.posteriors import FlowPosterior, GaussianPosterior, Posterior

if TYPE_CHECKING:  # the settings know the names of the posteriors, so they import this file
    from fastflow.vae.config import Config

FLOW_SETTINGS = ("steps", "width", "layers", "context", "amortised", "constraint")
Make = Callable[["Config", int], Posterior]


@dataclass(frozen=True)
class Recipe:
    """How a posterior is made, and which of `FLOW_SETTINGS` decide about it."""

    make: Make
    settings: tuple[str, ...]


RECIPES: dict[str, Recipe] = {}


def register(name: str, settings: Sequence[str] = ()) -> Callable[[Make], Make]:
    """Adds a posterior under a name, which settings and the command line then accept.

    Arguments:
        name: a new one.
        settings: those of `FLOW_SETTINGS` that the posterior makes use of; settings that are asked
            for and have no effect are refused.

    Returns:
        A decorator of a function that makes the posterior, of the settings (`Config`) and of H,
        the number of features of the encoder. Parameters drawn in it follow the run's seed.

    Raises:
        ValueError: the name is taken, or a setting is unknown.

    Example:
        >>> @register("shared-iaf", settings=("steps",))
        ... def shared_iaf(config, in_features):
        ...     flow = fastflow.IAF(config.latent, config.steps)
        ...     return FlowPosterior(in_features, flow.bijection)
        >>> "shared-iaf" in RECIPES
        True
        >>> del RECIPES["shared-iaf"]
    """
    if name in RECIPES:
        raise ValueError(f"register: name {name!r} is taken, must be a new one")
    for setting in settings:
        if setting not in FLOW_SETTINGS:
            raise ValueError(
                f"register: setting {setting!r} must be one of {', '.join(FLOW_SETTINGS)}"
            )

    def add(make: Make) -> Make:
        RECIPES[name] = Recipe(make, tuple(settings))
        return make

    return add


def make_posterior(config: Config, in_features: int) -> Posterior:
    """Makes the posterior that the settings name, for H = `in_features` features of the encoder.

    Raises:
        VaeError: what its recipe made is no posterior over the latents of the settings.
    """
    posterior = RECIPES[config.posterior].make(config, in_features)
    if not isinstance(posterior, Posterior):
        raise VaeError(
            f"posterior {config.posterior}: its recipe made a {type(posterior).__name__}, "
            "must make a fastflow.vae.Posterior"
        )
    if posterior.latent != config.latent:
        raise VaeError(
            f"posterior {config.posterior}: its recipe made one of {posterior.latent} latents, "
            f"must make one of {config.latent}"
        )
    return posterior


@register("gaussian")
def _gaussian(config: Config, in_features: int) -> Posterior:
    return GaussianPosterior(in_features, config.latent)


@register("planar", settings=("steps", "amortised", "constraint"))
def _planar(config: Config, in_features: int) -> Posterior:
    if config.amortised:  # its parameters are linear in the encoder's features
        flow = fastflow.ConditionalPlanarFlow(
            config.latent, in_features, config.steps, constraint=config.constraint
        )
    else:
        flow = fastflow.PlanarFlow(config.latent, config.steps, config.constraint)
    return FlowPosterior(in_features, flow)


@register("iaf", settings=("steps", "width", "layers", "context"))
def _iaf(config: Config, in_features: int) -> Posterior:
    return _autoregressive(fastflow.IAF, config, in_features)


@register("maf", settings=("steps", "width", "layers", "context"))
def _maf(config: Config, in_features: int) -> Posterior:
    return _autoregressive(fastflow.MAF, config, in_features)


@register("pcp", settings=("width", "layers", "context"))
def _pcp(config: Config, in_features: int) -> Posterior:
    widths = (config.width,) * config.layers
    return FlowPosterior(in_features, fastflow.PCPMap(config.latent, config.context, widths))


def _autoregressive(
    make: type[fastflow.IAF | fastflow.MAF], config: Config, in_features: int
) -> Posterior:
    """A posterior by autoregressive layers of alternating order, with the source's activation."""
    if config.width < config.latent:
        raise VaeError(
            f"width: {config.width} must be at least the number of latents, {config.latent}: "
            "narrower networks hide some latents from others"
        )
    widths = (config.width,) * config.layers
    flow = make(config.latent, config.steps, widths, config.context, activation="elu").bijection
    return FlowPosterior(in_features, flow)
