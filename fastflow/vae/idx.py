"""A strict reader of IDX files, the format of MNIST, plain or gzipped.

An IDX file is: two zero bytes, a type code, the number of dimensions, one big-endian 32-bit size
per dimension, then the values, last dimension fastest. Images are unsigned bytes (type 0x08) in
three dimensions, so their magic number is 0x00000803.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from fastflow.vae.errors import VaeError

IMAGES_MAGIC = 0x00000803
HEADER = struct.Struct(">IIII")  # magic, images, rows, columns
CHUNK = 1 << 20


def read_images(path: Path) -> Tensor:
    """Reads the images of an IDX file, gzipped when its name ends in `.gz`.

    Arguments:
        path: the file.

    Returns:
        The images as uint8, shape (N, H, W).

    Raises:
        VaeError: the file is damaged, is no IDX file of images, or is not exactly as long as its
            header says.
    """
    if not path.is_file():
        raise VaeError(f"{path}: not a file")
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            sizes = _read_header(path, file)
            # Read in pieces: a header that promises terabytes must not reserve them.
            values = _read_values(path, file, sizes[0] * sizes[1] * sizes[2])
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise VaeError(f"{path}: damaged gzip file ({error})") from error
    return torch.frombuffer(values, dtype=torch.uint8).reshape(sizes)


def _read_header(path: Path, file: BinaryIO | gzip.GzipFile) -> tuple[int, int, int]:
    header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise VaeError(f"{path}: {len(header)} bytes are too short for an IDX header")
    magic, *sizes = HEADER.unpack(header)
    if magic != IMAGES_MAGIC:
        raise VaeError(
            f"{path}: magic number is 0x{magic:08x}, images of unsigned bytes have "
            f"0x{IMAGES_MAGIC:08x}"
        )
    if 0 in sizes:
        raise VaeError(f"{path}: empty, its sizes are {sizes}")
    return sizes[0], sizes[1], sizes[2]


def _read_values(path: Path, file: BinaryIO | gzip.GzipFile, expected: int) -> bytearray:
    values = bytearray()
    while len(values) <= expected:  # one byte more is asked for, so that a longer file shows
        piece = file.read(min(CHUNK, expected + 1 - len(values)))
        if not piece:
            break
        values += piece
    if len(values) != expected:
        found = "more" if len(values) > expected else f"only {len(values)}"
        raise VaeError(f"{path}: its header promises {expected} bytes of pixels, it holds {found}")
    return values
