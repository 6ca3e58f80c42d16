"""The pictures of a run. Nothing here touches a display or pyplot's global state."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn.functional import pad

from fastflow.vae.files import write_bytes
from fastflow.vae.models import VAE
from fastflow.vae.posteriors import FlowPosterior

PRIOR, BASE, POSTERIOR = "0.65", "tab:blue", "tab:orange"
MASSES = (0.9, 0.6, 0.3)  # of the regions that the contours enclose
GRID = 161  # points per side on which densities are evaluated


def draw_loss(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Draws -ELBO and its two terms over the epochs."""
    figure = _figure(12, 4)
    left, middle, right = figure.subplots(1, 3)
    epochs = [record["epoch"] for record in history]
    marker = "o" if len(epochs) < 10 else None
    for key, label, colour in (("train_loss", "train", BASE), ("test_loss", "test", POSTERIOR)):
        values = [record[key] for record in history]
        left.plot(epochs, values, label=label, color=colour, marker=marker)
    left.legend()
    for axes, key in ((middle, "reconstruction"), (right, "kl")):
        axes.plot(epochs, [record[key] for record in history], color=BASE, marker=marker)
    titles = ("−ELBO", "Reconstruction, train", "KL, train")
    terms = ("−ELBO", "−log p(x | z)", "KL(q || p)")
    for axes, title, term in zip((left, middle, right), titles, terms, strict=True):
        axes.set(title=title, xlabel="epoch", ylabel=f"{term}  (nats per image)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.grid(alpha=0.3)
    _save(figure, path)


@torch.no_grad()
def draw_reconstructions(
    path: Path,
    model: VAE,
    images: Tensor,
    shape: tuple[int, int],
    generator: torch.Generator,
    count: int = 10,
) -> None:
    """Draws the first images (N, pixels) above what the decoder makes of draws of q(z | x)."""
    x = images[:count]
    noise = torch.randn(
        len(x), model.posterior.latent, generator=generator, device=generator.device
    )
    rows = {"image": x, "reconstruction": model.generate(model.infer(x, noise).z)}
    figure = _figure(1.1 * len(x) + 1.2, 2.8)
    grid = figure.subplots(len(rows), len(x), squeeze=False)
    for axes_row, (label, pictures) in zip(grid, rows.items(), strict=True):
        for axes, picture in zip(axes_row, pictures, strict=True):
            _show(axes, picture, shape)
        axes_row[0].set_ylabel(label)
    figure.suptitle("Test images and their reconstructions")
    _save(figure, path)


def draw_samples(
    path: Path,
    pictures: Tensor,
    shape: tuple[int, int],
    title: str = "Expected images of draws of the prior",
    labels: tuple[str, str] = ("", ""),
) -> None:
    """Draws n x n expected images (n^2, pixels) as one square mosaic."""
    side = math.isqrt(len(pictures))
    framed = pad(pictures.reshape(side, side, *shape), (1, 1, 1, 1))  # a gap between the images
    mosaic = framed.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    figure = _figure(6, 6.4)
    axes = figure.subplots()
    _show(axes, mosaic, tuple(mosaic.shape))
    axes.set(title=title, xlabel=labels[0], ylabel=labels[1])
    _save(figure, path)


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


@torch.no_grad()
def draw_posterior(
    path: Path,
    model: VAE,
    images: Tensor,
    shape: tuple[int, int],
    generator: torch.Generator,
    count: int = 4,
) -> None:
    """Draws the 2-D prior and posterior of a few test images, with the normal that the posterior's
    flow starts from, if it has one. The images have one pair of axes in common."""
    x = images[:count]
    posterior = model.posterior
    has_flow = isinstance(posterior, FlowPosterior)
    figure = _figure(3.2 * len(x) + 0.4, 5.2)
    thumbnails, panels = figure.subplots(
        2, len(x), sharex="row", sharey="row", squeeze=False, height_ratios=(1, 3)
    )
    h = model.encoder(x)
    noise = torch.randn(1000, len(x), 2, generator=generator, device=generator.device)
    drawn = posterior(h, noise).z
    if has_flow:
        drawn = torch.cat([drawn, posterior.base_draw(h, noise)])
    everything = _square_around(drawn.reshape(-1, 2))
    for column, axes in enumerate(panels):
        _show(thumbnails[column], x[column], shape)
        h_x = h[column : column + 1]
        points = _square_around(drawn[:, column])  # its own: a narrow density needs a fine grid
        _contour_prior(axes, everything)
        _contour(axes, points, posterior.log_prob(points, h_x), POSTERIOR, filled=True)
        if has_flow:
            _contour(axes, points, posterior.base_log_prob(points, h_x), BASE, filled=False)
        axes.set(xlabel="$z_1$", ylabel="$z_2$" if column == 0 else None, aspect="equal")
    low, high = everything.amin((0, 1)).tolist(), everything.amax((0, 1)).tolist()
    panels[0].set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    masses = ", ".join(f"{100 * mass:.0f}" for mass in MASSES)
    legend = [Line2D([], [], color=PRIOR, lw=0.8, label="prior N(0, I), at the |z| written on it")]
    if has_flow:
        legend.append(Line2D([], [], color=BASE, ls="--", label="normal before the flow"))
        name = "posterior after the flow"
    else:
        name = "Gaussian posterior"
    legend.append(Line2D([], [], color=POSTERIOR, lw=2, label=f"{name} ({masses} % of its mass)"))
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)
    figure.suptitle("Posterior over the latents of single test images")
    _save(figure, path)


def _square_around(draws: Tensor) -> Tensor:
    """A square grid (GRID^2, 1, 2) that holds the draws (N, 2) with a margin."""
    low, high = draws.amin(0), draws.amax(0)
    centre, half = (low + high) / 2, 0.6 * (high - low).max()
    steps = torch.linspace(-1, 1, GRID, device=draws.device) * half
    vertical, horizontal = torch.meshgrid(centre[1] + steps, centre[0] + steps, indexing="ij")
    return torch.stack([horizontal, vertical], -1).reshape(-1, 1, 2)


def _contour(axes: Axes, points: Tensor, log_prob: Tensor, colour: str, filled: bool) -> None:
    """Draws the smallest regions that hold the given parts of the mass on the grid."""
    z_1, z_2 = _on_grid(points[..., 0]), _on_grid(points[..., 1])
    density = torch.exp(log_prob - log_prob.max())
    ordered = density.flatten().sort(descending=True).values.double()
    enclosed = ordered.cumsum(0) / ordered.sum()
    levels = [ordered[int((enclosed < mass).sum())].item() for mass in MASSES]
    if filled:
        for level, alpha in zip(levels, (0.15, 0.2, 0.3), strict=True):
            axes.contourf(z_1, z_2, _on_grid(density), [level, 2], colors=[colour], alpha=alpha)
    style = "solid" if filled else "dashed"
    axes.contour(z_1, z_2, _on_grid(density), levels, colors=[colour], linestyles=style)


def _contour_prior(axes: Axes, points: Tensor) -> None:
    """Draws circles of the prior, labelled by their radius."""
    radius = points.norm(dim=-1)
    levels = MaxNLocator(6).tick_values(radius.min().item(), radius.max().item())
    z_1, z_2 = _on_grid(points[..., 0]), _on_grid(points[..., 1])
    circles = axes.contour(
        z_1, z_2, _on_grid(radius), [r for r in levels if r > 0], colors=[PRIOR], linewidths=0.8
    )
    axes.clabel(circles, fmt="%g", fontsize=7, inline_spacing=2)


def _on_grid(values: Tensor) -> list[list[float]]:
    return values.reshape(GRID, GRID).tolist()


def _show(axes: Axes, picture: Tensor, shape: tuple[int, int]) -> None:
    axes.imshow(picture.reshape(shape).tolist(), cmap="gray_r", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_bytes(path, content.getvalue())
