"""The settings that define a run, and the checks that a settings file must pass."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fastflow.functional.checks import as_int
from fastflow.functional.planar_flow import CONSTRAINTS
from fastflow.vae.data import NAMES
from fastflow.vae.errors import VaeError
from fastflow.vae.networks import NETWORKS
from fastflow.vae.registry import FLOW_SETTINGS, RECIPES

CHOICES = {
    "data": NAMES,
    "network": tuple(NETWORKS),
    "constraint": CONSTRAINTS,
    "likelihood": ("bernoulli", "gaussian"),
    "binarise": ("none", "static", "dynamic"),
    "schedule": ("constant", "cosine"),
}
RANGES = {  # the ends of sizes bound what the header of a checkpoint can make us do
    "latent": (1, 1 << 12),
    "hidden": (1, 1 << 16),
    "steps": (1, 1 << 8),
    "width": (1, 1 << 13),
    "layers": (1, 1 << 4),
    "context": (1, 1 << 16),
    "batch_size": (1, 1 << 24),
    "kl_warmup": (0, 1 << 24),
    "free_bits": (0.0, 1e6),
    "validation": (0, 1 << 32),
    "patience": (0, 1 << 24),
    "seed": (0, (1 << 63) - 1),
    "epochs": (1, 1 << 24),
    "importance_samples": (1, 1 << 20),
}
POSITIVE = ("lr", "variance")


@dataclass(frozen=True)
class Config:
    """Everything that decides the numbers of a run, except the machine.

    The defaults are a small model: 500 hidden units, 2 latents, and 3 steps if it has a flow. What
    a setting means is said by `python -m fastflow.vae train --help`.

    Raises:
        VaeError: a value has the wrong type or lies outside its range, two contradict, or one that
            is not the default has no effect.
    """

    posterior: str = "gaussian"
    data: str = "digits"
    network: str = "mlp"
    latent: int = 2
    hidden: int = 500
    steps: int = 3
    width: int = 64
    layers: int = 2
    context: int = 64
    amortised: bool = True
    constraint: str = "paper"
    likelihood: str = "bernoulli"
    variance: float = 0.1
    binarise: str = "none"
    batch_size: int = 100
    lr: float = 1e-3
    schedule: str = "constant"
    kl_warmup: int = 0
    free_bits: float = 0.0
    validation: int = 0
    patience: int = 0
    seed: int = 0
    epochs: int = 100
    importance_samples: int = 128

    def __post_init__(self) -> None:
        for field in fields(self):
            value, expected = getattr(self, field.name), type(field.default)
            if expected is int and (count := as_int(value)) is not None:  # NumPy's, say
                object.__setattr__(self, field.name, count)
            elif type(value) is not expected:  # exact: True is no number of epochs
                raise VaeError(f"{field.name}: {value!r} must be of type {expected.__name__}")
        for name in ("posterior", *CHOICES):
            if (value := getattr(self, name)) not in choices(name):
                own = ", or registered by fastflow.vae.register" * (name == "posterior")
                raise VaeError(f"{name}: {value!r} must be one of {', '.join(choices(name))}{own}")
        for name, (low, high) in RANGES.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise VaeError(f"{name}: {value} must be within {low} and {high}")
        for name in POSITIVE:
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise VaeError(f"{name}: {value} must be positive and finite")
        if self.patience and not self.validation:
            raise VaeError(
                f"patience: {self.patience} needs images for validation, but validation is 0"
            )
        settings = vars(self)
        changed = {f.name: settings[f.name] for f in fields(self) if settings[f.name] != f.default}
        refuse_without_effect(settings, changed)

    @classmethod
    def from_dict(cls, content: Any) -> Config:
        """Makes the settings of a dictionary, such as `dataclasses.asdict` gives, of any origin.

        Raises:
            VaeError: it is no dictionary of all fields, or a value does not pass the checks.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(content, dict) or set(content) != names:
            raise VaeError("the settings have unknown or missing entries")
        return cls(**content)


def choices(name: str) -> tuple[str, ...]:
    """The values that a setting may have, () where they are not listed."""
    return tuple(RECIPES) if name == "posterior" else CHOICES.get(name, ())


def flag(name: str, value: object) -> str:
    """How the command line says that a setting has a value."""
    if name == "amortised":
        return "--amortised" if value else "--shared"
    return f"--{name.replace('_', '-')} {value}"


def refuse_without_effect(settings: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuses settings that somebody asked for and that would change nothing.

    Arguments:
        settings: those of a run; one that is left out has its default.
        given: those of them that were asked for.

    Raises:
        VaeError: one of them needs another value of another setting.
    """
    for name, value in given.items():
        other, needed = _need(name)
        if needed and (held := settings.get(other, getattr(Config, other))) not in needed:
            raise VaeError(
                f"{flag(name, value)} has no effect with {flag(other, held)}, "
                f"it needs {flag(other, ' or '.join(needed))}"
            )


def _need(name: str) -> tuple[str, tuple[str, ...]]:
    """The other setting without certain values of which a setting means nothing."""
    if name == "variance":
        return "likelihood", ("gaussian",)
    if name in FLOW_SETTINGS:
        users = (key for key, recipe in RECIPES.items() if name in recipe.settings)
        return "posterior", tuple(users)
    return "", ()


def parse_json(text: str) -> Any:
    """Parses JSON that may come from anywhere.

    Raises:
        VaeError: it is malformed, nested too deeply, or has NaN or infinite numbers.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise VaeError(f"malformed JSON ({error})") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
