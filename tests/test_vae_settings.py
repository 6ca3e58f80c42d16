"""Settings: their checks, what they do to the images, and what they schedule."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from vae_files import SHAPE, random_images

from fastflow.vae import Config, ImageData, VaeError
from fastflow.vae.config import refuse_without_effect
from fastflow.vae.schedules import kl_weight, learning_rate
from fastflow.vae.splits import split


def make_data(train=40, test=12):
    images = (random_images(count).flatten(1).float() / 255 for count in (train, test))
    return ImageData(*images, SHAPE)


def rows(images):
    return sorted(images.tolist())


@pytest.mark.parametrize("binarise", ["none", "static", "dynamic"])
def test_validation_images_are_held_out(binarise):
    data = make_data()
    splits = split(data, Config(validation=7, binarise=binarise))
    assert len(splits.train) == 33 and len(splits.validation) == 7 and splits.shape == SHAPE
    if binarise == "none":
        assert rows(torch.cat([splits.train, splits.validation])) == rows(data.train)
        assert torch.equal(splits.test, data.test)
    again, other = (split(data, Config(validation=7, binarise=binarise, seed=s)) for s in (0, 1))
    for images, same, different in zip(splits[:3], again[:3], other[:3], strict=True):
        assert torch.equal(images, same)
        if binarise != "none":
            assert not torch.equal(images, different)
    assert not torch.equal(splits.validation, other.validation)


def test_without_validation_all_images_are_trained_on_in_their_order():
    data = make_data()
    splits = split(data, Config())
    assert torch.equal(splits.train, data.train) and splits.validation.shape == (0, 20)


@pytest.mark.parametrize("binarise", ["static", "dynamic"])
def test_binary_pixels_have_their_grey_value_as_probability(binarise):
    grey = torch.linspace(0, 1, 20).repeat(4000, 1)
    splits = split(ImageData(grey, grey, SHAPE), Config(binarise=binarise, validation=1000))
    drawn = [splits.validation, splits.test] + [splits.train] * (binarise == "static")
    for images in drawn:
        assert set(images.unique().tolist()) == {0.0, 1.0}
        error = (grey[0] * (1 - grey[0]) / len(images)).sqrt()
        assert ((images.mean(0) - grey[0]).abs() <= 5 * error).all()  # five standard errors
    if binarise == "dynamic":
        assert torch.equal(splits.train, grey[:3000])


@pytest.mark.parametrize("validation", [40, 41])
def test_validation_leaves_images_to_train_on(validation):
    with pytest.raises(VaeError, match=f"validation: {validation} must be less than the 40"):
        split(make_data(), Config(validation=validation))


def test_the_learning_rate_falls_along_half_a_cosine():
    constant = Config(lr=0.5, epochs=10)
    assert [learning_rate(constant, epoch) for epoch in (1, 5, 10)] == [0.5] * 3
    falling = Config(lr=0.5, epochs=10, schedule="cosine")
    rates = [learning_rate(falling, epoch) for epoch in range(1, 11)]
    assert rates[0] == 0.5 and rates[5] == pytest.approx(0.25)
    assert rates == sorted(rates, reverse=True) and rates[-1] > 0


def test_the_kl_weight_rises_to_one():
    assert [kl_weight(Config(), epoch) for epoch in (1, 2)] == [1, 1]
    rising = Config(kl_warmup=2)
    assert [kl_weight(rising, epoch) for epoch in (1, 2, 3, 100)] == [0.5, 1, 1, 1]


BAD = {
    "network": ("resnet", "must be one of mlp, conv"),
    "posterior": ("flow", "must be one of gaussian, planar, iaf, maf, pcp"),
    "binarise": ("yes", "must be one of none, static, dynamic"),
    "schedule": ("step", "must be one of constant, cosine"),
    "width": (0, "must be within 1 and"),
    "free_bits": (-1.0, "must be within 0"),
    "kl_warmup": (-1, "must be within 0 and"),
    "validation": (True, "must be of type int"),
    "lr": (float("nan"), "must be positive and finite"),
    "patience": (3, "needs images for validation, but validation is 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_refused(name):
    value, message = BAD[name]
    with pytest.raises(VaeError, match=f"^{name}: {value!r} {message}".replace("'", ".")):
        Config(**{name: value})
    with pytest.raises(VaeError, match=f"^{name}: "):
        Config.from_dict(asdict(Config()) | {name: value})


def test_counts_of_numpy_are_counts():
    config = Config(latent=np.int64(3), seed=np.uint8(5), batch_size=np.int32(7))
    assert config == Config(latent=3, seed=5, batch_size=7)
    assert json.loads(json.dumps(asdict(config)))["latent"] == 3
    for wrong in (True, np.bool_(True), 2.0, np.float64(2), "2"):
        with pytest.raises(VaeError, match=r"latent: .* must be of type int"):
            Config(latent=wrong)


@pytest.mark.parametrize(
    ("posterior", "setting", "needed"),
    [
        ("gaussian", {"steps": 4}, "--posterior planar or iaf or maf"),
        ("planar", {"width": 3}, "--posterior iaf or maf or pcp"),
        ("pcp", {"steps": 4}, "--posterior planar or iaf or maf"),
        ("maf", {"amortised": False}, "--posterior planar"),
        ("iaf", {"constraint": "centred"}, "--posterior planar"),
        ("iaf", {"variance": 0.2}, "--likelihood gaussian"),
    ],
)
def test_settings_without_effect_are_refused(posterior, setting, needed):
    message = f"has no effect with .*, it needs {needed}$"
    with pytest.raises(VaeError, match=message):
        Config(posterior=posterior, **setting)
    with pytest.raises(VaeError, match=message):
        Config.from_dict(asdict(Config()) | {"posterior": posterior} | setting)
    other, *values = needed.removeprefix("--").replace(" or", "").split()
    for value in values:
        config = Config(**{other: value} | setting)
        assert replace(config) == Config.from_dict(asdict(config)) == config
    [name] = setting
    default = {name: getattr(Config, name)}  # nobody asked for it, unless the caller says so
    with pytest.raises(VaeError, match=message):
        refuse_without_effect({"posterior": posterior}, default)
    assert Config(posterior=posterior, **default) == Config(posterior=posterior)
