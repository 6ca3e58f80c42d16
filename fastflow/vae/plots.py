"""Pictures of runs: learning curves, reconstructions, samples and the latent manifold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib import rcParams
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn.functional import pad

from fastflow.vae.figures import new_figure, save_figure, show_image
from fastflow.vae.models import VAE

TRAIN, TEST = "tab:blue", "tab:orange"
PRIOR_TITLE = "Expected images of draws of the prior"


def draw_loss(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Draws -ELBO and its two terms over the epochs."""
    figure = new_figure(12, 4)
    left, middle, right = figure.subplots(1, 3)
    epochs = [record["epoch"] for record in history]
    marker = "o" if len(epochs) < 10 else None
    for key, label, colour in (("train_loss", "train", TRAIN), ("test_loss", "test", TEST)):
        values = [record[key] for record in history]
        left.plot(epochs, values, label=label, color=colour, marker=marker)
    left.legend()
    for axes, key in ((middle, "reconstruction"), (right, "kl")):
        axes.plot(epochs, [record[key] for record in history], color=TRAIN, marker=marker)
    titles = ("−ELBO", "Reconstruction, train", "KL, train")
    terms = ("−ELBO", "−log p(x | z)", "KL(q || p)")
    for axes, title, term in zip((left, middle, right), titles, terms, strict=True):
        axes.set(title=title, xlabel="epoch", ylabel=f"{term}  (nats per image)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def draw_learning_curves(
    path: Path, curves: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]
) -> None:
    """Draws -ELBO on the test images over the epochs: a colour for every label, a thin line for
    every history of it, and a thick one for their mean as far as all of them go."""
    figure = new_figure(7.5, 5)
    axes = figure.subplots()
    colours = rcParams["axes.prop_cycle"].by_key()["color"]
    everything = []
    for number, (label, histories) in enumerate(curves.items()):
        colour = colours[number % len(colours)]
        several = [[record["test_loss"] for record in history] for history in histories]
        everything += [value for values in several for value in values]
        if len(several) > 1:
            for values in several:
                axes.plot(range(1, len(values) + 1), values, color=colour, lw=0.6, alpha=0.6)
            label = f"{label} (mean of {len(several)} runs)"
        mean = [sum(values) / len(values) for values in zip(*several)]
        marker = "o" if len(mean) < 10 else None
        axes.plot(range(1, len(mean) + 1), mean, color=colour, marker=marker, label=label)
    if everything:  # the first epochs are far above: leave them out where they hide the rest
        ordered = sorted(everything)
        low, high = ordered[0], ordered[math.ceil(0.95 * (len(ordered) - 1))]
        axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
    axes.set(title="−ELBO of the test images", xlabel="epoch", ylabel="−ELBO  (nats per image)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


@torch.no_grad()
def draw_reconstructions(
    path: Path,
    models: Mapping[str, VAE],
    images: Tensor,
    shape: tuple[int, int],
    generators: Sequence[torch.Generator],
    count: int = 10,
) -> None:
    """Draws the first images (N, pixels) above what the decoders make of draws of q(z | x), with a
    row for every model, by label, and a generator of the noise for each."""
    x = images[:count]
    rows = {"image": x}
    for (label, model), generator in zip(models.items(), generators, strict=True):
        noise = torch.randn(
            len(x), model.posterior.latent, generator=generator, device=generator.device
        )
        rows[label] = model.generate(model.infer(x, noise).z)
    figure = new_figure(1.1 * len(x) + 1.2, 1.2 * len(rows) + 0.4)
    grid = figure.subplots(len(rows), len(x), squeeze=False)
    for axes_row, (label, pictures) in zip(grid, rows.items(), strict=True):
        for axes, picture in zip(axes_row, pictures, strict=True):
            show_image(axes, picture, shape)
        axes_row[0].set_ylabel(label)
    figure.suptitle("Test images and their reconstructions")
    save_figure(figure, path)


def draw_samples(
    path: Path,
    mosaics: Mapping[str, Tensor],
    shape: tuple[int, int],
    labels: tuple[str, str] = ("", ""),
) -> None:
    """Draws n x n expected images (n^2, pixels) as square mosaics side by side, by their titles."""
    columns = min(len(mosaics), 3)
    rows = -(-len(mosaics) // columns)
    figure = new_figure(6 * columns, 6.4 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (title, pictures) in zip(panels, mosaics.items()):
        side = math.isqrt(len(pictures))
        framed = pad(pictures.reshape(side, side, *shape), (1, 1, 1, 1))  # a gap between the images
        mosaic = framed.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        show_image(axes, mosaic, (mosaic.shape[0], mosaic.shape[1]))
        axes.set(title=title, xlabel=labels[0], ylabel=labels[1])
    for axes in panels[len(mosaics) :]:
        axes.set_axis_off()
    save_figure(figure, path)


def draw_manifold(path: Path, model: VAE, shape: tuple[int, int], side: int = 20) -> None:
    """Draws the expected images over 2-D latents."""
    device = next(model.parameters()).device
    title = "Expected images over the latents (quantiles of the prior)"
    draw_samples(path, {title: manifold_images(model, side, device)}, shape, ("$z_1$", "$z_2$"))


@torch.no_grad()
def sample_images(model: VAE, side: int, generator: torch.Generator) -> Tensor:
    """The expected images of side x side draws of the prior, shape (side^2, pixels)."""
    shape = (side * side, model.posterior.latent)
    return model.generate(torch.randn(shape, generator=generator, device=generator.device))


@torch.no_grad()
def manifold_images(model: VAE, side: int, device: torch.device) -> Tensor:
    """The expected images of a grid of 2-D latents at equal steps of the prior's distribution
    function, shape (side^2, pixels); z_1 grows to the right, z_2 upwards."""
    quantiles = (torch.arange(side, device=device) + 0.5) / side
    steps = torch.special.ndtri(quantiles)
    vertical, horizontal = torch.meshgrid(steps.flip(0), steps, indexing="ij")
    return model.generate(torch.stack([horizontal, vertical], -1).reshape(-1, 2))
