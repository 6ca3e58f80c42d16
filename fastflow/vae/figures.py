"""Figures and their files. Nothing here touches a display or pyplot's global state."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from fastflow.vae.files import write_bytes


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    return figure


def show_image(axes: Axes, picture: Tensor, shape: tuple[int, int]) -> None:
    """Shows a grey image (H W,) in [0, 1], black on white."""
    axes.imshow(picture.reshape(shape).tolist(), cmap="gray_r", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, in one step."""
    content = io.BytesIO()
    # tight: panels of a fixed aspect may leave the cells that the layout gave them
    figure.savefig(content, format="png", bbox_inches="tight")
    write_bytes(path, content.getvalue())
