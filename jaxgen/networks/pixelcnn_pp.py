"""PixelCNN++ (Salimans et al. 2017, arXiv 1701.05517): two streams through a U-Net, without masks.

One stream depends on all rows above a pixel, the other on these and on the pixels to the left. Shifted convolutions,
whose kernels end at the pixel, stand in for masked ones. Both streams are downsampled twice and upsampled again, with
short-cut connections between layers of one resolution. Layers are weight-normalised, and the first batch sets their
scale and bias.
"""

from __future__ import annotations

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.networks.layers import Embed
from jaxgen.networks.masked import CausalConv, CausalConvTranspose, Position, RowCache, computes_pixels, computes_rows
from jaxgen.networks.pixelcnn import Condition, concat_elu

Array = jax.Array


class GatedResNet(nn.Module):
    """Gated residual block, x [n, H, W, filters] and a second input to the shape of x (section 2.4 and the authors'
    code).

    Attributes:
      kernel: (2, 3), centred: of the stream of rows; (2, 2): of pixels.
      classes: 0: not conditioned on the label.
    """

    filters: int
    kernel: tuple[int, int]
    dropout: float
    classes: int
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, aux: Array | None, label: Array | None, position: Position | None = None) -> Array:
        """aux: of the other stream or a short-cut, or None; a pixel depends on its own pixel of it alone."""
        normed = dict(weight_norm=True, dtype=self.dtype)
        h = CausalConv(self.filters, self.kernel, left=1, name='conv1', **normed)(concat_elu(x), position)
        if aux is not None:
            h = h + CausalConv(self.filters, name='beside', **normed)(concat_elu(aux), position)
        h = nn.Dropout(self.dropout, deterministic=not self.train)(concat_elu(h))
        h = CausalConv(2 * self.filters, self.kernel, left=1, init_std=0.1, name='conv2', **normed)(h, position)
        if self.classes:
            init = nn.initializers.normal(0.05)
            table = Embed(self.classes, 2 * self.filters, embedding_init=init, dtype=self.dtype, name='label')
            h = h + table(label)[:, None, None]
        a, b = jnp.split(h, 2, -1)
        return x + a * jax.nn.sigmoid(b)


class PixelCNNpp(nn.Module):
    """x [n, H, W, C + 1], pixels in [-1, 1] and ones, -> parameters of distributions, float32 [n, H, W, outputs].

    The channel of ones tells the image from the zeros around it.

    Attributes:
      outputs: parameters of one pixel's distribution.
      filters: features of each stream.
      blocks: gated residual blocks of each stream at each resolution on the way down, one more on the way up.
      scales: resolutions, each half the one before; H and W are multiples of 2 ** (scales - 1).
      dropout: within the blocks, in training.
      classes: 0: not conditioned on the label.
    """

    outputs: int
    filters: int = 160
    blocks: int = 5
    scales: int = 3
    dropout: float = 0.5
    classes: int = 0
    dtype: Any = jnp.float32
    remat: bool = False

    rows = True  # there is a stream of whole rows
    margin = 2  # pixels around the input that the sampler keeps, see `masked.sample_cached`

    @nn.compact
    def __call__(
        self, x: Array, condition: Condition = Condition(), train: bool = False, position: Position | None = None
    ) -> Array | None:
        chex.assert_rank(x, 4)
        if self.classes:
            chex.assert_rank(condition.label, 1)
        block = nn.remat(GatedResNet) if self.remat and position is None else GatedResNet
        rows, pixels = computes_rows(position), computes_pixels(position)
        normed = dict(weight_norm=True, dtype=self.dtype)

        def both(name, u, ul, skip_u, skip_ul, position):
            """One block of each stream, u of rows and ul of pixels; ul depends on u too, each on its short-cut."""
            own = dict(dropout=self.dropout, classes=self.classes, train=train, dtype=self.dtype)
            if rows:
                u = block(self.filters, (2, 3), name=f'{name}_rows', **own)(u, skip_u, condition.label, position)
            above = RowCache(self.filters, self.dtype, name=f'{name}_above')(u if rows else None, position)
            if pixels:
                aux = above if skip_ul is None else jnp.concatenate([above, skip_ul], -1)
                ul = block(self.filters, (2, 2), name=f'{name}_pixels', **own)(ul, aux, condition.label, position)
            return u, ul

        def scale(s, u, ul, position):
            """One resolution and all lower ones: (u, ul) -> (u, ul)."""
            saved = [(u, ul)]
            for b in range(self.blocks):
                u, ul = both(f'down{s}_{b}', u, ul, None, None, position)
                saved.append((u, ul))
            if s == self.scales - 1:
                saved.pop()
            else:
                # The next resolution may have a pixel (or row) here; where it has none, its last one is used.
                due = position is None or position.depth > 0
                coarse = position if position is None or not due else position.coarser()
                half = dict(stride=2, left=1, **normed)
                if rows:
                    u = CausalConv(self.filters, (2, 3), name=f'half{s}_rows', **half)(u, position, active=due)
                if pixels:
                    ul = CausalConv(self.filters, (2, 2), name=f'half{s}_pixels', **half)(ul, position, active=due)
                u, ul = scale(s + 1, u, ul, coarse) if due else (None, None)
                up = dict(channels=self.filters)
                if rows:
                    u = CausalConvTranspose(self.filters, 3, self.dtype, name=f'twice{s}_rows')(u, position, **up)
                if pixels:
                    ul = CausalConvTranspose(self.filters, 2, self.dtype, name=f'twice{s}_pixels')(ul, position, **up)
            for b in range(len(saved)):
                u, ul = both(f'up{s}_{b}', u, ul, *saved.pop(), position)
            return u, ul

        u = ul = None
        if rows:
            u = CausalConv(self.filters, (2, 3), shift=(1, 0), name='first_rows', **normed)(
                x, position, network_input=True
            )
        if pixels:
            above = CausalConv(self.filters, (1, 3), shift=(1, 0), name='first_above', **normed)
            left = CausalConv(self.filters, (2, 1), shift=(0, 1), name='first_left', **normed)
            ul = above(x, position, network_input=True) + left(x, position, network_input=True)
        u, ul = scale(0, u, ul, position)
        if not pixels:
            return None
        return CausalConv(self.outputs, name='out', **normed)(nn.elu(ul), position).astype(jnp.float32)
