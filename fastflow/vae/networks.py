"""The encoders and decoders: of dense layers, or residual and convolutional."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from fastflow.vae.errors import VaeError

CHANNELS = (16, 32, 32)  # of the three resolutions of the published architecture
SMALLEST_SIDE = 1 << len(CHANNELS)  # every resolution halves the one before


@dataclass(frozen=True)
class Dense:
    """One hidden layer of relu units in the encoder, one in the decoder.

    Arguments:
        shape: (H, W) of an image.
        hidden: the number of hidden units.
        latent: D, the number of latent variables.

    Source: Kingma and Welling, Auto-Encoding Variational Bayes, 2014.
    """

    shape: tuple[int, int]
    hidden: int
    latent: int

    @property
    def out_features(self) -> int:
        """The number of features that the encoder makes of an image."""
        return self.hidden

    def encoder(self) -> nn.Module:
        """Maps images (B, H W) to features (B, hidden)."""
        return nn.Sequential(nn.Linear(math.prod(self.shape), self.hidden), nn.ReLU())

    def decoder(self) -> nn.Module:
        r"""Maps latents (\*samples, B, D) to pixels (\*samples, B, H W)."""
        return nn.Sequential(
            nn.Linear(self.latent, self.hidden),
            nn.ReLU(),
            nn.Linear(self.hidden, math.prod(self.shape)),
        )


@dataclass(frozen=True)
class Convolutional:
    """Residual blocks of 3 x 3 convolutions, ELU and weight normalisation throughout.

    Encoder: three times a block of stride 2 and one of stride 1, of 16, 32 and 32 channels, then a
    dense layer. An image of 28 x 28 pixels becomes 14 x 14, 7 x 7, 4 x 4, and 512 features for the
    dense layer. The decoder is its mirror image, with transposed convolutions.

    Arguments:
        shape: (H, W) of an image, each at least 8.
        hidden: the units of the dense layers, 450 in the source.
        latent: D, the number of latent variables.

    Raises:
        VaeError: the images are too small for three halvings.

    Source: Kingma et al., Improving Variational Inference with Inverse Autoregressive Flow, 2016.
    """

    shape: tuple[int, int]
    hidden: int
    latent: int

    def __post_init__(self) -> None:
        if min(self.shape) < SMALLEST_SIDE:
            raise VaeError(
                f"network: conv needs images of at least {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels, "
                f"these are {self.shape[0]} x {self.shape[1]}"
            )

    @property
    def out_features(self) -> int:
        """The number of features that the encoder makes of an image."""
        return self.hidden

    def encoder(self) -> nn.Module:
        """Maps images (B, H W) to features (B, hidden)."""
        blocks: list[nn.Module] = []
        before = 1
        for channels in CHANNELS:
            blocks += [_Residual(_down(before, channels), channels), _Residual(None, channels)]
            before = channels
        return nn.Sequential(
            nn.Unflatten(-1, (1, *self.shape)),
            *blocks,
            nn.Flatten(),
            weight_norm(nn.Linear(before * math.prod(self._shapes()[-1]), self.hidden)),
            nn.ELU(),
        )

    def decoder(self) -> nn.Module:
        r"""Maps latents (\*samples, B, D) to pixels (\*samples, B, H W)."""
        *larger, smallest = self._shapes()
        first = CHANNELS[-1]
        blocks: list[nn.Module] = []
        after = (CHANNELS[0], *CHANNELS[:-1])
        for before, channels, shape in zip(CHANNELS[::-1], after[::-1], larger[::-1], strict=True):
            blocks += [_Residual(None, before), _Residual(_up(before, channels, shape), channels)]
        return _OverSamples(
            weight_norm(nn.Linear(self.latent, self.hidden)),
            nn.ELU(),
            weight_norm(nn.Linear(self.hidden, first * math.prod(smallest))),
            nn.ELU(),
            nn.Unflatten(-1, (first, *smallest)),
            *blocks,
            weight_norm(nn.Conv2d(CHANNELS[0], 1, 3, padding=1)),
            nn.Flatten(),
        )

    def _shapes(self) -> list[tuple[int, int]]:
        """The image's shape, and those after every halving."""
        shapes = [self.shape]
        for _ in CHANNELS:
            height, width = shapes[-1]
            shapes.append((-(-height // 2), -(-width // 2)))  # rounded up
        return shapes


NETWORKS = {"mlp": Dense, "conv": Convolutional}


class _Residual(nn.Module):
    """elu(skip(x) + conv(elu(inner(x)))), of equal channels and shape unless a change is given."""

    def __init__(self, change: tuple[nn.Module, nn.Module] | None, channels: int) -> None:
        super().__init__()
        inner, skip = change or (_same(channels), nn.Identity())
        self.inner = nn.Sequential(inner, nn.ELU(), _same(channels))
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.elu(self.skip(x) + self.inner(x))


class _OverSamples(nn.Sequential):
    r"""Layers that know one batch dimension only, for inputs (\*samples, B, D)."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z.flatten(0, -2)).unflatten(0, z.shape[:-1])


def _same(channels: int) -> nn.Module:
    return weight_norm(nn.Conv2d(channels, channels, 3, padding=1))


def _down(before: int, channels: int) -> tuple[nn.Module, nn.Module]:
    """Two convolutions, for the block and around it, that halve the sides, rounding up."""

    def halve() -> nn.Module:
        return weight_norm(nn.Conv2d(before, channels, 3, stride=2, padding=1))

    return halve(), halve()


def _up(before: int, channels: int, shape: tuple[int, int]) -> tuple[nn.Module, nn.Module]:
    """Two convolutions, for the block and around it, that undo a halving of an image of shape."""
    height, width = shape
    odd = 1 - height % 2, 1 - width % 2  # 2 n or 2 n - 1 pixels have become n

    def double() -> nn.Module:
        return weight_norm(
            nn.ConvTranspose2d(before, channels, 3, stride=2, padding=1, output_padding=odd),
            dim=1,  # that of the output channels
        )

    return double(), double()
