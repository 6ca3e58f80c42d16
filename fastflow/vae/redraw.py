"""Pictures of run folders, drawn from what lies in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fastflow.vae.checkpoint import load_model
from fastflow.vae.config import Config
from fastflow.vae.errors import VaeError
from fastflow.vae.models import VAE
from fastflow.vae.pictures import draw_comparison, draw_run
from fastflow.vae.splits import Splits, splits_of
from fastflow.vae.summary import read_result


def redraw_run(folder: Path, data_root: Path | None, device: torch.device) -> None:
    """Draws the pictures of a run into its folder again.

    Arguments:
        folder: of the run.
        data_root: where the images are, see `fastflow.vae.data.load`.
        device: where the model computes.

    Raises:
        VaeError: the folder holds no run or a damaged one, or its images are not there.
    """
    model, config, data = _load(folder, data_root, device)
    draw_run(folder, model, config, read_result(folder).epochs, data.test, data.shape)


def draw_runs(
    folder: Path,
    groups: Mapping[str, Sequence[Path]],
    data_root: Path | None,
    device: torch.device,
) -> None:
    """Draws what compares runs: all their learning curves, and the first model of every group.

    Arguments:
        folder: where the pictures go.
        groups: run folders, by the label of their curve.
        data_root, device: as of `redraw_run`.

    Raises:
        VaeError: as `redraw_run`, or the runs are of different images.
    """
    loaded = {label: _load(runs[0], data_root, device) for label, runs in groups.items()}
    sources = {(config.data, config.binarise) for _, config, _ in loaded.values()}
    if len(sources) > 1:
        raise VaeError(
            "runs of different images cannot be compared: "
            + ", ".join(f"--data {data} --binarise {how}" for data, how in sorted(sources))
        )
    histories = {label: [read_result(run).epochs for run in runs] for label, runs in groups.items()}
    models = {label: (model, config) for label, (model, config, _) in loaded.items()}
    data = next(iter(loaded.values()))[2]
    draw_comparison(folder, histories, models, data.test, data.shape)


def _load(folder: Path, data_root: Path | None, device: torch.device) -> tuple[VAE, Config, Splits]:
    """The model of a run, its settings and its images."""
    path = folder / "model.safetensors"
    model, config, shape = load_model(path, device)
    return model, config, splits_of(path, config, shape, data_root).to(device)
