"""The images of a run: what it trains on, validates with and is tested on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastflow.vae.config import Config
from fastflow.vae.data import ImageData, checked, load
from fastflow.vae.errors import VaeError
from fastflow.vae.seeding import generator_for

CPU = torch.device("cpu")  # every device gets the same images


class Splits(NamedTuple):
    """Flattened images with D = H W pixels; the validation split may be empty."""

    train: Tensor  # (N, D)
    validation: Tensor  # (V, D)
    test: Tensor  # (M, D)
    shape: tuple[int, int]  # (H, W)

    def to(self, device: torch.device) -> Splits:
        """The same images on a device."""
        train, validation, test = (images.to(device) for images in self[:3])
        return Splits(train, validation, test, self.shape)


def split(data: ImageData, config: Config) -> Splits:
    """Makes the splits that the settings describe; all that is random follows from their seed.

    Validation images are drawn from the training images, which lose them. Binary pixels are drawn
    once, from the grey values as probabilities: those of the training images stay grey under
    "dynamic" binarisation, which draws them anew in every epoch.

    Raises:
        VaeError: the images cannot be trained on, or none would be left to train on.
    """
    train, test = checked(data).train, data.test
    if config.validation >= len(train):
        raise VaeError(
            f"validation: {config.validation} must be less than the {len(train)} training images"
        )
    order = torch.randperm(len(train), generator=_generator(config, "validation split"))
    held = order[: config.validation].sort().values
    kept = order[config.validation :].sort().values
    if config.binarise == "none":
        return Splits(train[kept], train[held], test, data.shape)
    binary = torch.bernoulli(train, generator=_generator(config, "train pixels"))
    test = torch.bernoulli(test, generator=_generator(config, "test pixels"))
    source = binary if config.binarise == "static" else train
    return Splits(source[kept], binary[held], test, data.shape)


def splits_of(
    model_file: Path, config: Config, shape: tuple[int, int], data_root: Path | None
) -> Splits:
    """Loads the image set that the settings of a trained model name, and makes its splits.

    Arguments:
        model_file: the checkpoint of the model, for the message.
        config: its settings.
        shape: (H, W) of its images.
        data_root: where the images are, see `fastflow.vae.data.load`.

    Raises:
        VaeError: the images are not there, or have another shape.
    """
    data = load(config.data, data_root)
    if data.shape != shape:
        raise VaeError(f"images of {config.data} are {data.shape}, {model_file} has {shape}")
    return split(data, config)


def _generator(config: Config, name: str) -> torch.Generator:
    return generator_for(CPU, config.seed, name)
