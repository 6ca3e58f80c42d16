"""The image sets and the strict reader of IDX files."""

import gzip
import struct
import sys
import types

import pytest
import torch
from vae_files import NAMES, SHAPE, idx_bytes, random_images, write_images

from fastflow.vae import ImageData, VaeError, load
from fastflow.vae.data import checked, default_root
from fastflow.vae.idx import read_images

IMAGES = random_images(6)
GOOD = idx_bytes(IMAGES)


@pytest.mark.parametrize("name", ["images", "images.gz"])
def test_idx_round_trip(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(GOOD) if name.endswith(".gz") else GOOD)
    images = read_images(path)
    assert images.dtype == torch.uint8 and torch.equal(images, IMAGES)


BAD = {
    "empty file": (b"", "too short"),
    "half a header": (GOOD[:9], "too short"),
    "truncated": (GOOD[:-1], "promises 120 bytes of pixels, it holds only 119"),
    "one byte more": (GOOD + b"\0", "it holds more"),
    "labels": (struct.pack(">II", 0x801, 6) + bytes(20), "0x00000801"),
    "floats": (idx_bytes(IMAGES, magic=0xD03), "0x00000d03"),
    "little endian": (idx_bytes(IMAGES, magic=0x03080000), "0x03080000"),
    "text": (b"<html>no such page</html>", "magic number"),
    "too many promised": (idx_bytes(IMAGES, sizes=(7, *SHAPE)), "promises 140"),
    "too few promised": (idx_bytes(IMAGES, sizes=(5, *SHAPE)), "holds more"),
    "terabytes promised": (idx_bytes(IMAGES, sizes=(1 << 31, 1 << 10, 1 << 10)), "holds only 120"),
    "no images": (idx_bytes(IMAGES[:0]), "empty"),
    "no pixels": (idx_bytes(IMAGES[:, :0], sizes=(6, 0, 4)), "empty"),
}


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("fault", BAD)
def test_bad_idx_is_refused(tmp_path, fault, compress):
    content, message = BAD[fault]
    path = tmp_path / ("images.gz" if compress else "images")
    path.write_bytes(gzip.compress(content) if compress else content)
    with pytest.raises(VaeError, match=message) as refusal:
        read_images(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("chunk", [1, 40, 119, 120, 121])
def test_files_longer_than_one_read(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("fastflow.vae.idx.CHUNK", chunk)
    path = tmp_path / "images"
    path.write_bytes(GOOD)
    assert torch.equal(read_images(path), IMAGES)
    for content in (GOOD[:-1], GOOD + b"\0"):
        path.write_bytes(content)
        with pytest.raises(VaeError, match="promises 120 bytes"):
            read_images(path)


@pytest.mark.parametrize("cut", [1, 8, 20, 60])
def test_truncated_gzip_is_refused(tmp_path, cut):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(GOOD)[:-cut])
    with pytest.raises(VaeError, match="damaged gzip"):
        read_images(path)


def test_gzip_with_a_flipped_bit_is_refused(tmp_path):
    content = bytearray(gzip.compress(GOOD))
    content[-6] ^= 1  # in the checksum
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(VaeError, match="damaged gzip"):
        read_images(path)


def test_plain_file_called_gz_and_missing_file_are_refused(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(GOOD)
    with pytest.raises(VaeError, match="damaged gzip"):
        read_images(path)
    with pytest.raises(VaeError, match="not a file"):
        read_images(tmp_path / "nowhere")


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    ("name", "below"),
    [("mnist", "."), ("mnist", "MNIST/raw"), ("fashion-mnist", "FashionMNIST/raw")],
)
def test_images_are_found_and_scaled(tmp_path, name, below, compress):
    write_images(tmp_path / below, compress=compress)
    data = load(name, tmp_path)
    assert data.shape == SHAPE
    assert torch.equal(data.train, random_images(45).flatten(1).float() / 255)
    assert torch.equal(data.test, random_images(12).flatten(1).float() / 255)


def test_splits_of_different_size_are_refused(tmp_path):
    write_images(tmp_path)
    (tmp_path / NAMES["test"]).write_bytes(idx_bytes(random_images(12)[:, :3]))
    with pytest.raises(VaeError, match=r"images of \(3, 4\) pixels"):
        load("mnist", tmp_path)


def test_digits():
    pytest.importorskip("sklearn")
    data = load("digits")
    assert data.shape == (8, 8) and len(data.train) == 1438 and len(data.test) == 359
    assert data.train.min() == 0 and data.train.max() == 1
    assert data.train.dtype == torch.float32


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(VaeError, match="needs scikit-learn"):
        load("digits")


def test_neither_files_nor_torchvision_names_both_ways_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(VaeError, match=r"put train-images.*--data-root.*install torchvision"):
        load("mnist", tmp_path)


def fake_torchvision(monkeypatch, download):
    datasets = types.SimpleNamespace(MNIST=download, FashionMNIST=download)
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(datasets=datasets))


def test_neither_files_nor_network_names_both_ways_out(tmp_path, monkeypatch):
    def download(root, train, download):
        raise RuntimeError("Error downloading\ntrain-images: no route")

    fake_torchvision(monkeypatch, download)
    with pytest.raises(VaeError, match=r"download failed .*--data-root") as refusal:
        load("fashion-mnist", tmp_path)
    assert "\n" not in str(refusal.value)


def test_download_by_torchvision(tmp_path, monkeypatch):
    calls = []

    def download(root, train, download):
        calls.append((root, train, download))
        write_images(tmp_path / "MNIST" / "raw")

    fake_torchvision(monkeypatch, download)
    assert load("mnist", tmp_path).shape == SHAPE
    assert calls == [(str(tmp_path), True, True), (str(tmp_path), False, True)]
    load("mnist", tmp_path)
    assert len(calls) == 2  # the files are there now


def test_default_root_is_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_root() == tmp_path / "fastflow"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_root() == tmp_path / ".cache" / "fastflow"


def test_unknown_name():
    with pytest.raises(VaeError, match="'cifar' is unknown"):
        load("cifar")


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "nan"), (float("inf"), "inf"), (-0.1, r"-0\.1"), (1.5, r"1\.5")],
)
def test_pixels_outside_the_unit_interval_are_refused(value, message):
    images = torch.full((3, 4), 0.5)
    images[1, 2] = value
    with pytest.raises(VaeError, match=f"train images range .*{message}"):
        checked(ImageData(images, torch.zeros(2, 4), (2, 2)))
    with pytest.raises(VaeError, match="test images range"):
        checked(ImageData(torch.zeros(2, 4), images, (2, 2)))


@pytest.mark.parametrize("images", [torch.zeros(0, 4), torch.zeros(3, 5), torch.zeros(3, 2, 2)])
def test_images_of_the_wrong_shape_are_refused(images):
    with pytest.raises(VaeError, match="train images have shape"):
        checked(ImageData(images, torch.zeros(2, 4), (2, 2)))
