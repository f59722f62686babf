"""PixelCNN++ (Salimans et al. 2017, arXiv 1701.05517): two streams through a U-shape, without masks.

One stream sees all rows above a pixel, the other those and the pixels to the left. Shifted convolutions, whose
kernels end at the pixel, take the place of masked ones. Each stream is halved twice and brought back, with short cuts
between layers of one size. Layers are weight-normed, and scale and bias are set by the first batch.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.networks.layers import Embed
from jaxgen.networks.masked import CausalConv, CausalUp, Handover, Place, of_pixels, of_rows
from jaxgen.networks.pixelcnn import Condition, concat_elu

Array = jax.Array


class GatedResNet(nn.Module):
    """x [n, H, W, filters] and what it sees beside (or None) to the same shape (section 2.4 and the authors' code).

    Attributes:
      kernel: (2, 3), centred: rows; (2, 2): pixels.
      classes: 0: no label is told.
    """

    filters: int
    kernel: tuple[int, int]
    dropout: float
    classes: int
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, beside: Array | None, label: Array | None, place: Place | None = None) -> Array:
        normed = dict(weight_norm=True, dtype=self.dtype)
        h = CausalConv(self.filters, self.kernel, left=1, name='conv1', **normed)(concat_elu(x), place)
        if beside is not None:
            h = h + CausalConv(self.filters, name='beside', **normed)(concat_elu(beside), place)
        h = nn.Dropout(self.dropout, deterministic=not self.train)(concat_elu(h))
        h = CausalConv(2 * self.filters, self.kernel, left=1, start=0.1, name='conv2', **normed)(h, place)
        if self.classes:
            init = nn.initializers.normal(0.05)
            table = Embed(self.classes, 2 * self.filters, embedding_init=init, dtype=self.dtype, name='label')
            h = h + table(label)[:, None, None]
        a, b = jnp.split(h, 2, -1)
        return x + a * jax.nn.sigmoid(b)


class PixelCNNpp(nn.Module):
    """x [n, H, W, C + 1], pixels in [-1, 1] and ones, -> parameters of distributions, float32 [n, H, W, outputs].

    The ones tell the image from the zeros around it.

    Attributes:
      blocks: at each of `scales` sizes on the way down; H and W are multiples of 2 ** (scales - 1).
    """

    outputs: int
    filters: int = 160
    blocks: int = 5
    scales: int = 3
    dropout: float = 0.5
    classes: int = 0
    dtype: Any = jnp.float32
    remat: bool = False

    rows = True
    margin = 2

    @nn.compact
    def __call__(
        self, x: Array, condition: Condition = Condition(), train: bool = False, place: Place | None = None
    ) -> Array | None:
        block = nn.remat(GatedResNet) if self.remat and place is None else GatedResNet
        rows, pixels = of_rows(place), of_pixels(place)
        normed = dict(weight_norm=True, dtype=self.dtype)

        def both(name, u, ul, skip_u, skip_ul, place):
            """One block of each stream; the second sees the first at its pixel, and its own short cut."""
            own = dict(dropout=self.dropout, classes=self.classes, train=train, dtype=self.dtype)
            if rows:
                u = block(self.filters, (2, 3), name=f'{name}_rows', **own)(u, skip_u, condition.label, place)
            beside = Handover(self.filters, self.dtype, name=f'{name}_above')(u if rows else None, place)
            if pixels:
                beside = beside if skip_ul is None else jnp.concatenate([beside, skip_ul], -1)
                ul = block(self.filters, (2, 2), name=f'{name}_pixels', **own)(ul, beside, condition.label, place)
            return u, ul

        def scale(s, u, ul, place):
            """One size and all smaller ones: (u, ul) -> (u, ul)."""
            saved = [(u, ul)]
            for b in range(self.blocks):
                u, ul = both(f'down{s}_{b}', u, ul, None, None, place)
                saved.append((u, ul))
            if s == self.scales - 1:
                saved.pop()
            else:
                # The next size has a pixel (or row) here or it has not; if not, the last one is what is seen.
                due = place is None or place.depth > 0
                coarse = place if place is None or not due else place.coarser()
                half = dict(stride=2, left=1, **normed)
                if rows:
                    u = CausalConv(self.filters, (2, 3), name=f'half{s}_rows', **half)(u, place, active=due)
                if pixels:
                    ul = CausalConv(self.filters, (2, 2), name=f'half{s}_pixels', **half)(ul, place, active=due)
                u, ul = scale(s + 1, u, ul, coarse) if due else (None, None)
                up = dict(channels=self.filters)
                if rows:
                    u = CausalUp(self.filters, 3, self.dtype, name=f'twice{s}_rows')(u, place, **up)
                if pixels:
                    ul = CausalUp(self.filters, 2, self.dtype, name=f'twice{s}_pixels')(ul, place, **up)
            for b in range(len(saved)):
                u, ul = both(f'up{s}_{b}', u, ul, *saved.pop(), place)
            return u, ul

        u = ul = None
        if rows:
            u = CausalConv(self.filters, (2, 3), shift=(1, 0), name='first_rows', **normed)(x, place, given=True)
        if pixels:
            above = CausalConv(self.filters, (1, 3), shift=(1, 0), name='first_above', **normed)
            left = CausalConv(self.filters, (2, 1), shift=(0, 1), name='first_left', **normed)
            ul = above(x, place, given=True) + left(x, place, given=True)
        u, ul = scale(0, u, ul, place)
        if not pixels:
            return None
        return CausalConv(self.outputs, name='out', **normed)(nn.elu(ul), place).astype(jnp.float32)
