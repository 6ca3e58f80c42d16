"""Tiny IDX files for the tests of fastflow.vae."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import torch
from torch import Tensor

NAMES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
SHAPE = (5, 4)


def idx_bytes(images: Tensor, magic: int = 0x803, sizes: tuple[int, ...] | None = None) -> bytes:
    """An IDX file of uint8 images (N, H, W), or one whose header lies."""
    sizes = tuple(images.shape) if sizes is None else sizes
    return struct.pack(f">{1 + len(sizes)}I", magic, *sizes) + images.numpy().tobytes()


def random_images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, *SHAPE), generator=generator, dtype=torch.uint8)


def write_images(folder: Path, train: int = 45, test: int = 12, compress: bool = False) -> Path:
    """Both splits as random images; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("test", test)):
        content = idx_bytes(random_images(count))
        if compress:
            (folder / f"{NAMES[split]}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / NAMES[split]).write_bytes(content)
    return folder
