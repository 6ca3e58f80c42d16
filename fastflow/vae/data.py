"""The image sets of the experiments: digits, MNIST and Fashion-MNIST."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastflow.vae.errors import VaeError
from fastflow.vae.idx import read_images

FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}  # torchvision's class and folder
NAMES = ("digits", *FOLDERS)
SPLITS = {"train": "train-images", "test": "t10k-images"}


class ImageData(NamedTuple):
    """Grey images in [0, 1], flattened, with D = H W pixels."""

    train: Tensor  # (N, D)
    test: Tensor  # (M, D)
    shape: tuple[int, int]  # (H, W)


def load(name: str, data_root: Path | None = None) -> ImageData:
    """Loads an image set by name, scaled to [0, 1].

    `digits` ships with scikit-learn (1797 images of 8 x 8; every fifth one is kept for testing).
    `mnist` and `fashion-mnist` are read from IDX files, plain or `.gz`, that lie in `data_root` or
    in torchvision's `MNIST/raw` (`FashionMNIST/raw`) below it; where there are none, torchvision
    downloads them there.

    Arguments:
        name: one of `NAMES`.
        data_root: the folder of the files; by default the user's cache folder.

    Raises:
        VaeError: unknown name, damaged files, or neither files nor a way to download them.
    """
    if name == "digits":
        return _load_digits()
    if name not in FOLDERS:
        raise VaeError(f"data: {name!r} is unknown, it must be one of {', '.join(NAMES)}")
    root = default_root() if data_root is None else data_root
    files = find_files(name, root)
    if files is None:
        _download(name, root)
        files = find_files(name, root)
        if files is None:
            raise VaeError(f"{name}: torchvision left no IDX files under {root}")
    train, test = (read_images(files[split]) for split in SPLITS)
    if train.shape[1:] != test.shape[1:]:
        raise VaeError(
            f"{files['test']}: images of {tuple(test.shape[1:])} pixels, "
            f"{files['train'].name} has {tuple(train.shape[1:])}"
        )
    height, width = train.shape[1:]
    scaled = [images.flatten(1).float().div_(255) for images in (train, test)]
    return checked(ImageData(scaled[0], scaled[1], (height, width)))


def checked(data: ImageData) -> ImageData:
    """Returns `data` if it can be trained on, else say what is wrong with it.

    Raises:
        VaeError: a split is empty, has another shape than (N, H W), or has a value outside [0, 1].
    """
    pixels = data.shape[0] * data.shape[1]
    for split, images in (("train", data.train), ("test", data.test)):
        if images.dim() != 2 or images.shape[0] == 0 or images.shape[1] != pixels:
            raise VaeError(
                f"{split} images have shape {tuple(images.shape)}, it must be (N, {pixels}), N >= 1"
            )
        low, high = (bound.item() for bound in images.aminmax())
        if not (low >= 0 and high <= 1):  # written so that NaN fails it
            raise VaeError(f"{split} images range from {low:g} to {high:g}, must be within [0, 1]")
    return data


def default_root() -> Path:
    """The folder for downloads: `fastflow` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastflow"


def find_files(name: str, root: Path) -> dict[str, Path] | None:
    """Finds the IDX files of both splits below `root`, or None where one is missing."""
    for folder in (root / FOLDERS[name] / "raw", root):
        found = {
            split: path
            for split, stem in SPLITS.items()
            for ending in (".gz", "")
            for joint in ("-", ".")
            if (path := folder / f"{stem}{joint}idx3-ubyte{ending}").is_file()
        }
        if len(found) == len(SPLITS):
            return found
    return None


def _load_digits() -> ImageData:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise VaeError(
            f"digits: needs scikit-learn, pip install 'fastflow[vae]' ({error})"
        ) from error
    images = torch.from_numpy(load_digits(return_X_y=True)[0]).float().div_(16)
    is_test = torch.arange(len(images)) % 5 == 4
    return checked(ImageData(images[~is_test], images[is_test], (8, 8)))


def _download(name: str, root: Path) -> None:
    ways_out = (
        f"put {' and '.join(f'{stem}-idx3-ubyte.gz' for stem in SPLITS.values())} into a folder "
        "and name it with --data-root, or install torchvision on a machine with network access"
    )
    try:
        # A torchvision that was built for another torch fails in several ways while importing.
        from torchvision import datasets  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError, OSError) as error:
        raise VaeError(
            f"{name}: not all files are in {root} and no torchvision ({_one_line(error)}); "
            f"{ways_out}"
        ) from error
    try:
        for train in (True, False):
            getattr(datasets, FOLDERS[name])(str(root), train=train, download=True)
    except (RuntimeError, OSError) as error:
        raise VaeError(
            f"{name}: not all files are in {root} and the download failed ({_one_line(error)}); "
            f"{ways_out}"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
