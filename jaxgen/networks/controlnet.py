"""ControlNet (Zhang et al. 2023, arXiv 2302.05543): a trained copy of a latent U-Net's way down, which reads an image
beside x_t and adds to the maps of the U-Net, that stays as it is.

The image is brought to the latents' size by convolutions and added behind the first layer. Of every map that the way
down hands to the way up, and of the middle's, a 1x1 convolution is the output. Convolutions that start at zero stand at
both ends, so that a new ControlNet adds nothing.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import flax.linen as nn
import jax

from jaxgen.networks.adm import INIT
from jaxgen.networks.latent_unet import LatentUNet
from jaxgen.networks.layers import Conv, Dense
from jaxgen.options import Count, OneOf

Array = jax.Array

ZEROS = nn.initializers.zeros


class ControlNet(LatentUNet):
    """x_t, t, the conditions of the U-Net and an image to the maps that are added to the U-Net's.

    Published with the fields of their U-Nets; smaller ones of SDXL with other depths.

    Attributes (more: see `LatentUNet`):
      hint: channels of the convolutions of the image; each but the first halves its height and width.
      image_channels: of the image that they read; one of one channel is repeated.
      order: of the image's channels, 'rgb' or, where the network was trained on them the other way round, 'bgr'.
      global_pool: each map is its mean over all pixels (the ControlNet of shuffled images).
    """

    hint: Annotated[tuple[int, ...], '[1, inf)'] = (16, 32, 96, 256)
    image_channels: Count = 3
    order: Annotated[str, OneOf('rgb', 'bgr')] = 'rgb'
    global_pool: bool = False

    takes: ClassVar = ('vector', 'pooled', 'tokens')

    @nn.compact
    def __call__(
        self,
        x: Array,
        t: Array,
        image: Array,
        vector: Array | None = None,
        tokens: Array | None = None,
        pooled: Array | None = None,
        *,
        train: bool,
    ) -> list[Array]:
        """The maps of `LatentUNet`'s argument `control`.

        Args (others: see `LatentUNet`):
          image: [n, h, w, image_channels] in [0, 1]; after the halvings its size is that of x.
        """
        embedding, tokens = self.conditions(x, t, vector, tokens, pooled)
        h, skips = self.descend_with(x, embedding, tokens, train, self.hints(image))
        zeros = [Dense(s.shape[-1], init=ZEROS, dtype=self.dtype, name=f'zero{i}')(s) for i, s in enumerate(skips)]
        zeros.append(Dense(h.shape[-1], init=ZEROS, dtype=self.dtype, name='zero_middle')(h))
        return [z.mean((1, 2), keepdims=True) for z in zeros] if self.global_pool else zeros

    @nn.nowrap
    def hints(self, image: Array) -> Array:
        """The map that is added behind the first layer."""
        h = image[..., ::-1] if self.order == 'bgr' else image

        def conv(h: Array, features: int, name: str, stride: int = 1) -> Array:
            same = ((1, 1), (1, 1))
            made = Conv(features, stride=stride, padding=same, init=INIT, dtype=self.dtype, name=name)
            return nn.silu(made(h))

        h = conv(h.astype(self.dtype), self.hint[0], 'hint_first')
        for i, (narrow, wide) in enumerate(zip(self.hint, self.hint[1:], strict=False)):
            h = conv(h, narrow, f'hint{2 * i}')
            h = conv(h, wide, f'hint{2 * i + 1}', stride=2)
        return Conv(self.width(0), init=ZEROS, dtype=self.dtype, name='hint_last')(h)


def hint_size(size: tuple[int, ...], halvings: int) -> tuple[int, ...]:
    """Height and width of an image of this size behind so many convolutions with stride 2."""
    for _ in range(halvings):
        size = tuple(-(-n // 2) for n in size)
    return size
