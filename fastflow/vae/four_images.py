"""Posteriors fitted to a few images under one decoder, beside the true posterior."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastflow.vae.checkpoint import load_model, save_model
from fastflow.vae.compare import concerning
from fastflow.vae.config import Config, flag
from fastflow.vae.contours import draw_true_posterior
from fastflow.vae.data import load
from fastflow.vae.errors import VaeError
from fastflow.vae.files import write_json
from fastflow.vae.models import VAE, build
from fastflow.vae.registry import FLOW_SETTINGS
from fastflow.vae.seeding import generator_for
from fastflow.vae.splits import split, splits_of
from fastflow.vae.true_posterior import GridDensity, fit, kl_to_true, true_posterior

FIT_SETTINGS = (*FLOW_SETTINGS, "lr")  # those that a fit may have of its own
PICTURE, NUMBERS, DECODER = "true_posterior.png", "true_posterior.json", "decoder.safetensors"


@dataclass(frozen=True)
class Experiment:
    """A decoder, a few images, and the true posterior of each.

    Whatever the posteriors are fitted to, it is the same for all of them: one decoder, which stays
    as it is. The encoder sees these images only, so that it costs nothing to share it among them,
    and what separates q from p is the family of q alone.
    """

    model: VAE
    config: Config
    images: Tensor  # (N, pixels)
    shape: tuple[int, int]
    true: list[GridDensity]

    @classmethod
    def of_few(
        cls,
        settings: Mapping[str, Any],
        count: int,
        iterations: int,
        data_root: Path | None,
        device: torch.device,
    ) -> Experiment:
        """Trains an autoencoder with a Gaussian posterior on the first training images alone.

        Arguments:
            settings: fields of `Config`.
            count: how many images.
            iterations: steps of Adam.
            data_root: where the images are, see `fastflow.vae.data.load`.
            device: where the models compute.

        Raises:
            VaeError: a setting is wrong, the images are not there, they would change from step to
                step, or training fails.
        """
        config = Config(**concerning("gaussian", settings))
        if config.binarise == "dynamic":
            raise VaeError(
                f"{flag('binarise', 'dynamic')} draws the pixels anew in every epoch, the images "
                "of a true posterior must stay as they are: none or static"
            )
        data = split(load(config.data, data_root), config).to(device)
        images, model = data.train[:count], build(config, data.shape).to(device)
        generator = generator_for(device, config.seed, "decoder")
        fit(model, list(model.parameters()), images, generator, iterations, config.lr)
        return cls._with_true(model, config, images, data.shape)

    @classmethod
    def of_checkpoint(
        cls, path: Path, count: int, data_root: Path | None, device: torch.device
    ) -> Experiment:
        """Takes a trained model and the first test images of its image set.

        Arguments:
            path: its checkpoint.
            count, data_root, device: as of `of_few`.

        Raises:
            VaeError: the checkpoint is damaged or has other images, or these are not there.
        """
        model, config, shape = load_model(path, device)
        data = splits_of(path, config, shape, data_root).to(device)
        return cls._with_true(model, config, data.test[:count], shape)

    @classmethod
    def _with_true(
        cls, model: VAE, config: Config, images: Tensor, shape: tuple[int, int]
    ) -> Experiment:
        true = [true_posterior(model, x) for x in images.split(1)]
        return cls(model, config, images, shape, true)

    def fit(self, posterior: str, settings: Mapping[str, Any], iterations: int) -> VAE:
        """Fits a posterior, and an encoder for it, to the images; the decoder is the experiment's.

        Arguments:
            posterior: its name.
            settings: fields of `Config` that replace the experiment's, of `FIT_SETTINGS`.
            iterations: steps of Adam.

        Raises:
            VaeError: a setting is wrong, or the fit fails.
        """
        config = Config(**concerning(posterior, asdict(self.config) | dict(settings)))
        model = build(config, self.shape).to(self.images.device)
        model.decoder = copy.deepcopy(self.model.decoder).requires_grad_(False)
        fitted = [*model.encoder.parameters(), *model.posterior.parameters()]
        generator = generator_for(self.images.device, config.seed, "fit")
        fit(model, fitted, self.images, generator, iterations, config.lr)
        return model

    def divergences(self, model: VAE) -> list[tuple[float, float | None]]:
        """KL(q || p) of every image, with its standard error; the same draws for all models."""
        return [
            kl_to_true(
                model,
                x,
                density.log_evidence,
                generator_for(x.device, self.config.seed, "kl", number),
            )
            for number, (x, density) in enumerate(zip(self.images.split(1), self.true, strict=True))
        ]


def perform(
    folder: Path,
    experiment: Experiment,
    posteriors: Sequence[str],
    settings: Mapping[str, Any],
    iterations: int,
    say: Callable[[str], None],
) -> None:
    """Fits posteriors, and writes their divergences, the contours and the decoder into a folder.

    Arguments:
        folder: exists.
        experiment: of which decoder and images.
        posteriors: their names.
        settings: fields of `Config`, of which the fits use `FIT_SETTINGS`.
        iterations: steps of Adam for each.
        say: gets one line per posterior.

    Raises:
        VaeError: a setting is wrong, or a fit fails.
        OSError: the folder cannot be written.
    """
    own = {name: value for name, value in settings.items() if name in FIT_SETTINGS}
    models, divergences = {}, {}
    for posterior in posteriors:
        models[posterior] = experiment.fit(posterior, own, iterations)
        divergences[posterior] = experiment.divergences(models[posterior])
        figures = "  ".join(f"{kl:.4f} ± {error:.4f}" for kl, error in divergences[posterior])
        say(f"{posterior:10s} KL(q || p) of every image: {figures}")
    draw_true_posterior(
        folder / PICTURE, experiment.true, models, divergences, experiment.images, experiment.shape
    )
    save_model(folder / DECODER, experiment.model, experiment.config, experiment.shape)
    content = {
        "config": asdict(experiment.config),
        "settings": own,
        "iterations": iterations,
        "images": [
            {
                "log_evidence": density.log_evidence,
                "border_mass": density.border_mass,
                "quadrature_error": density.quadrature_error,
                "kl": {name: values[number][0] for name, values in divergences.items()},
                "kl_error": {name: values[number][1] for name, values in divergences.items()},
            }
            for number, density in enumerate(experiment.true)
        ],
    }
    write_json(folder / NUMBERS, content)
