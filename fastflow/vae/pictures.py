"""Which pictures belong to a run folder and to a folder of several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastflow.vae.config import Config
from fastflow.vae.contours import draw_posterior
from fastflow.vae.models import VAE
from fastflow.vae.plots import (
    PRIOR_TITLE,
    draw_learning_curves,
    draw_loss,
    draw_manifold,
    draw_reconstructions,
    draw_samples,
    sample_images,
)
from fastflow.vae.seeding import generator_for

History = Sequence[Mapping[str, float]]

RUN_PICTURES = ("loss.png", "reconstructions.png", "samples.png", "posterior.png", "manifold.png")
COMPARISON_PICTURES = ("learning_curves.png", "reconstructions.png", "samples.png")


def draw_run(
    folder: Path,
    model: VAE,
    config: Config,
    history: History,
    images: Tensor,
    shape: tuple[int, int],
) -> None:
    """Draws the pictures of one run into its folder; the last two for 2-D latents only.

    Arguments:
        folder: where the files `RUN_PICTURES` go.
        model: the trained model.
        config: its settings.
        history: a record per epoch.
        images: test images (N, pixels), on the device of the model.
        shape: height and width of an image.
    """

    def generator(name: str) -> torch.Generator:
        return generator_for(images.device, config.seed, name)

    draw_loss(folder / "loss.png", history)
    draw_reconstructions(
        folder / "reconstructions.png",
        {"reconstruction": model},
        images,
        shape,
        [generator("reconstructions")],
    )
    drawn = sample_images(model, 8, generator("samples"))
    draw_samples(folder / "samples.png", {PRIOR_TITLE: drawn}, shape)
    if config.latent == 2:
        posterior = folder / "posterior.png"
        draw_posterior(posterior, model, images, shape, generator("posterior"))
        draw_manifold(folder / "manifold.png", model, shape)


def draw_comparison(
    folder: Path,
    histories: Mapping[str, Sequence[History]],
    models: Mapping[str, tuple[VAE, Config]],
    images: Tensor,
    shape: tuple[int, int],
) -> None:
    """Draws the pictures that compare runs.

    Arguments:
        folder: where the files `COMPARISON_PICTURES` go.
        histories: of all runs, under the label of their curve.
        models: one trained model with its settings for every row and mosaic, by label.
        images: test images (N, pixels), on the device of the models.
        shape: height and width of an image.
    """
    draw_learning_curves(folder / "learning_curves.png", histories)
    draw_reconstructions(
        folder / "reconstructions.png",
        {label: model for label, (model, _) in models.items()},
        images,
        shape,
        [generator_for(images.device, c.seed, "reconstructions") for _, c in models.values()],
    )
    mosaics = {
        f"{label}: draws of the prior": sample_images(
            model, 8, generator_for(images.device, config.seed, "samples")
        )
        for label, (model, config) in models.items()
    }
    draw_samples(folder / "samples.png", mosaics, shape)
