"""Encoders and decoders: shapes, the published sizes, weight normalisation, refusals."""

import pytest
import torch
from torch import nn

from fastflow.vae import Config, VaeError, build
from fastflow.vae.networks import Convolutional, Dense
from fastflow.vae.objectives import negative_elbo

SHAPES = [(28, 28), (8, 8), (9, 14), (15, 8)]
KINDS = {"mlp": Dense, "conv": Convolutional}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind, shape):
    network = KINDS[kind](shape, 20, 3)
    encoder, decoder = network.encoder(), network.decoder()
    pixels = shape[0] * shape[1]
    assert encoder(torch.rand(4, pixels)).shape == (4, network.out_features)
    z = torch.randn(2, 5, 4, 3)
    images = decoder(z)
    assert images.shape == (2, 5, 4, pixels)
    torch.testing.assert_close(decoder(z[1, 2]), images[1, 2])  # samples do not mix
    torch.testing.assert_close(decoder(z[1, 2, 3:]), images[1, 2, 3:])


def sides_of(network, module_type, x):
    """The shapes (C, H, W) of what every module of a type returns."""
    shapes = []
    for module in network.modules():
        if isinstance(module, module_type):
            module.register_forward_hook(lambda _, __, y: shapes.append(tuple(y.shape[1:])))
    network(x)
    return shapes


def test_the_published_architecture():
    network = Convolutional((28, 28), 450, 32)
    encoder, decoder = network.encoder(), network.decoder()
    blocks = type(encoder[1])
    down = sides_of(encoder, blocks, torch.rand(2, 784))
    assert down == [(16, 14, 14)] * 2 + [(32, 7, 7)] * 2 + [(32, 4, 4)] * 2
    assert [m.out_features for m in encoder if isinstance(m, nn.Linear)] == [450]
    assert encoder[-2].in_features == 512
    up = sides_of(decoder, blocks, torch.randn(2, 32))
    assert up == [(32, 4, 4), (32, 7, 7), (32, 7, 7), (16, 14, 14), (16, 14, 14), (16, 28, 28)]
    assert [m.out_features for m in decoder if isinstance(m, nn.Linear)] == [450, 512]
    for part in (encoder, decoder):
        for name, module in part.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                assert nn.utils.parametrize.is_parametrized(module, "weight"), name
        assert not [m for m in part.modules() if isinstance(m, nn.ReLU)]


@torch.no_grad()
def test_weights_are_normalised_for_every_output_channel():
    network = Convolutional((8, 8), 6, 2)
    for part in (network.encoder(), network.decoder()):
        for module in part.modules():
            if not isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                continue
            channel = 1 if isinstance(module, nn.ConvTranspose2d) else 0
            length = module.parametrizations.weight.original0
            assert length.shape[channel] == module.weight.shape[channel] == length.numel()
            length.fill_(3.0)
            rows = module.weight.transpose(0, channel).flatten(1)
            torch.testing.assert_close(rows.norm(dim=1), torch.full((len(rows),), 3.0))


def test_a_pixel_reaches_features_and_every_parameter_learns():
    model = build(Config(network="conv", posterior="iaf", hidden=12, latent=2), (9, 8))
    x = torch.rand(6, 72, requires_grad=True)
    negative_elbo(model, x, torch.randn(6, 2)).loss.sum().backward()
    assert (x.grad != 0).any(0).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("shape", [(7, 28), (28, 7), (1, 1)])
def test_images_too_small_to_halve_are_refused(shape):
    message = f"conv needs images of at least 8 x 8 pixels, these are {shape[0]} x {shape[1]}"
    with pytest.raises(VaeError, match=message):
        build(Config(network="conv"), shape)
