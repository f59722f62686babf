"""PixelCNNs: from the pixels (or codes) before it, the distribution of each pixel over its values.

    pixelcnn   masked convolutions in residual blocks (van den Oord et al. 2016a, arXiv 1601.06759). The masks leave a
               blind spot: earlier pixels to the upper right that no pixel sees, however many layers there are.
    gated      a stack that sees all rows above and one that sees the row to the left, with gates (van den Oord et al.
               2016b, arXiv 1606.05328): no blind spot
    snail      gated residual blocks and causal self-attention, after PixelSNAIL (Chen et al. 2018, arXiv 1712.09763)
               and the priors of VQ-VAE-2 (Razavi et al. 2019, arXiv 1906.00446)

With several colours, a pixel's colours come one after another: features belong to colours in turn, and at its own
pixel a feature sees the features of its own and of earlier colours alone.

All of them take `condition`, what a pixel's distribution depends on beside earlier pixels: labels [n], and a map
[n, H, W, .] of which all is known beforehand; either may be None. See `masked` for `place`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.networks.layers import Conv, Dense, Embed, variance_scaling
from jaxgen.networks.masked import (
    CausalAttention,
    CausalConv,
    Handover,
    Place,
    cut,
    groups,
    of_pixels,
    of_rows,
    positions,
    previous,
)

Array = jax.Array


class Condition(NamedTuple):
    """What the pixels depend on beside each other."""

    label: Array | None = None  # int32 [n]
    map: Array | None = None  # [n, H, W, .]


class ConditionBias(nn.Module):
    """The condition as features to be added: a vector for the label, a linear map of the condition's map.

    Attributes:
      classes: 0: the label is not told.
    """

    features: int
    classes: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, condition: Condition, place: Place | None) -> Array | float:
        told = 0.0
        if self.classes:
            init = nn.initializers.normal(0.05)
            table = Embed(self.classes, self.features, embedding_init=init, dtype=self.dtype, name='label')
            told = table(condition.label)[:, None, None]
        if condition.map is not None:
            told = told + Dense(self.features, dtype=self.dtype, name='map')(cut(condition.map, place))
        return told


def gate(x: Array) -> Array:
    """tanh of one half of the features times sigmoid of the other (van den Oord et al. 2016b, eq. 2)."""
    a, b = jnp.split(x, 2, -1)
    return jnp.tanh(a) * jax.nn.sigmoid(b)


def concat_elu(x: Array) -> Array:
    """ELU of x and of -x: [..., C] -> [..., 2C]."""
    return nn.elu(jnp.concatenate([x, -x], -1))


def to_logits(x: Array, colours: int) -> Array:
    """[..., levels * colours], the colours in turn, -> float32 [..., colours, levels]."""
    return x.astype(jnp.float32).reshape(*x.shape[:-1], -1, colours).swapaxes(-1, -2)


class ResidualBlock(nn.Module):
    """Of the PixelCNN: 2h features to h, a masked 3x3 (by `kernel`), and back (2016a, figure 5)."""

    channels: int
    kernel: int
    colours: int
    dropout: float
    classes: int
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, condition: Condition, place: Place | None = None) -> Array:
        wide, narrow = groups(2 * self.channels, self.colours), groups(self.channels, self.colours)
        masked = dict(masked='B', dtype=self.dtype)
        h = CausalConv(self.channels, inputs=wide, outputs=narrow, name='down', **masked)(nn.relu(x), place)
        kernel = (self.kernel, self.kernel)
        h = CausalConv(self.channels, kernel, inputs=narrow, outputs=narrow, name='conv', **masked)(nn.relu(h), place)
        h = h + ConditionBias(self.channels, self.classes, self.dtype, name='told')(condition, place)
        h = nn.Dropout(self.dropout, deterministic=not self.train)(nn.relu(h))
        return x + CausalConv(2 * self.channels, inputs=narrow, outputs=wide, name='up', **masked)(h, place)


class PixelCNN(nn.Module):
    """x [n, H, W, C] -> logits float32 [n, H, W, colours, levels].

    Attributes:
      channels: h, half of the features between the blocks.
      kernel: of the first layer; hidden_kernel: of the blocks. Odd.
      head: features of the two layers at the end.
      colours: 1 where x has one value per pixel or is an embedding of it.
    """

    channels: int = 128
    blocks: int = 15
    kernel: int = 7
    hidden_kernel: int = 3
    head: int = 1024
    dropout: float = 0.0
    colours: int = 1
    levels: int = 256
    classes: int = 0
    dtype: Any = jnp.float32
    remat: bool = False

    rows = False

    @property
    def margin(self) -> int:
        return self.kernel

    @nn.compact
    def __call__(
        self, x: Array, condition: Condition = Condition(), train: bool = False, place: Place | None = None
    ) -> Array:
        seen, wide = groups(x.shape[-1], self.colours), groups(2 * self.channels, self.colours)
        last = groups(self.head, self.colours)
        block = nn.remat(ResidualBlock) if self.remat and place is None else ResidualBlock
        h = CausalConv(
            2 * self.channels, (self.kernel, self.kernel), masked='A', inputs=seen, outputs=wide, dtype=self.dtype,
            name='first',
        )(x, place, given=True)  # fmt: skip
        for b in range(self.blocks):
            h = block(
                self.channels, self.hidden_kernel, self.colours, self.dropout, self.classes, train, self.dtype,
                name=f'block{b}',
            )(h, condition, place)  # fmt: skip
        masked = dict(masked='B', dtype=self.dtype)
        h = CausalConv(self.head, inputs=wide, outputs=last, name='head1', **masked)(nn.relu(h), place)
        h = CausalConv(self.head, inputs=last, outputs=last, name='head2', **masked)(nn.relu(h), place)
        out = self.levels * self.colours
        h = CausalConv(out, inputs=last, outputs=groups(out, self.colours), name='out', **masked)(nn.relu(h), place)
        return to_logits(h, self.colours)


class GatedBlock(nn.Module):
    """One layer of both stacks (2016b, figure 2): v, h, skip -> v, h, skip.

    The vertical stack has a 1x1 convolution beside its own, and a residual. Where the place is a row, h and skip are
    None; where it is a pixel, v is.

    Attributes:
      first: of the network: it reads the image, its own pixel and row unseen, and has no residuals.
      last: of the network: nothing reads v and h any more.
    """

    channels: int
    kernel: int
    colours: int
    dropout: float
    classes: int
    first: bool
    last: bool
    train: bool
    dtype: Any

    @nn.compact
    def __call__(
        self, v: Array | None, h: Array | None, skip: Array | None, condition: Condition, place: Place | None = None
    ):
        p, first, dtype = self.channels, self.first, self.dtype
        halves, whole = groups(2 * p, self.colours, 2), groups(p, self.colours)
        drop = nn.Dropout(self.dropout, deterministic=not self.train)
        told = 0.0 if first else ConditionBias(2 * p, self.classes, dtype, name='told')(condition, place)
        above = None
        if of_rows(place):
            down = (1, 0) if first else (0, 0)
            kernel = (self.kernel // 2 + 1, self.kernel)
            above = CausalConv(2 * p, kernel, shift=down, dtype=dtype, name='vertical')(v, place, first)
            above = above + CausalConv(2 * p, shift=down, dtype=dtype, name='vertical_1x1')(v, place, first) + told
            out = drop(gate(above))
            v = out if first else v + out
            above = Dense(2 * p, dtype=dtype, name='vertical_to_horizontal')(above)
        above = Handover(2 * p, dtype, name='above')(above, place)
        if of_pixels(place):
            seen = groups(h.shape[-1], self.colours) if first else whole
            x = CausalConv(
                2 * p, (1, self.kernel), masked='A' if first else 'B', inputs=seen, outputs=halves, dtype=dtype,
                name='horizontal',
            )(h, place, first)  # fmt: skip
            masked = dict(masked='B', inputs=whole, outputs=whole, dtype=dtype)
            x = drop(gate(x + above + told))
            if not first:
                skip = skip + CausalConv(p, name='skip', **masked)(x, place)
            if not self.last:
                x = CausalConv(p, name='residual', **masked)(x, place)
                h = x if first else h + x
        return v, h, skip


class GatedPixelCNN(nn.Module):
    """x [n, H, W, C] -> logits float32 [n, H, W, colours, levels].

    Attributes:
      channels: p, features of each stack.
      blocks: layers after the first one.
      kernel, hidden_kernel: of the first and of the other layers. Odd.
      head: features of the layer at the end.
    """

    channels: int = 64
    blocks: int = 6
    kernel: int = 7
    hidden_kernel: int = 7
    head: int = 128
    dropout: float = 0.0
    colours: int = 1
    levels: int = 256
    classes: int = 0
    dtype: Any = jnp.float32
    remat: bool = False

    rows = True

    @property
    def margin(self) -> int:
        return self.kernel

    @nn.compact
    def __call__(
        self, x: Array, condition: Condition = Condition(), train: bool = False, place: Place | None = None
    ) -> Array | None:
        block = nn.remat(GatedBlock) if self.remat and place is None else GatedBlock
        v, h, skip = x, x, 0.0
        for b in range(self.blocks + 1):
            v, h, skip = block(
                self.channels, self.hidden_kernel if b else self.kernel, self.colours, self.dropout, self.classes,
                b == 0, b == self.blocks, train, self.dtype, name=f'block{b}',
            )(v, h, skip, condition, place)  # fmt: skip
        if not of_pixels(place):
            return None
        skip = skip + ConditionBias(self.channels, self.classes, self.dtype, name='told')(condition, place)
        whole, last = groups(self.channels, self.colours), groups(self.head, self.colours)
        masked = dict(masked='B', dtype=self.dtype)
        h = CausalConv(self.head, inputs=whole, outputs=last, name='head', **masked)(nn.relu(skip), place)
        out = self.levels * self.colours
        h = CausalConv(out, inputs=last, outputs=groups(out, self.colours), name='out', **masked)(nn.relu(h), place)
        return to_logits(h, self.colours)


class SnailBlock(nn.Module):
    """Gated residual block: concat_elu, a causal convolution, concat_elu, another, a * sigmoid(b), added to x.

    Attributes:
      kernel: of the convolutions, masked to what is before the pixel and itself; 1: the pixel alone.
    """

    channels: int
    kernel: int
    dropout: float
    classes: int
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, beside: Array | None, condition: Condition, place: Place | None = None) -> Array:
        """beside: what the block sees at its pixel beside x, or None."""

        def conv(features, x, name):
            own = dict(masked='B', inputs=groups(x.shape[-1], 1), outputs=groups(features, 1), dtype=self.dtype)
            return CausalConv(features, (self.kernel, self.kernel), name=name, **own)(x, place)

        h = conv(self.channels, concat_elu(x), 'conv1')
        if beside is not None:
            h = h + Dense(self.channels, dtype=self.dtype, name='beside')(concat_elu(beside))
        h = h + ConditionBias(self.channels, self.classes, self.dtype, name='told')(condition, place)
        h = nn.Dropout(self.dropout, deterministic=not self.train)(concat_elu(h))
        a, b = jnp.split(conv(2 * self.channels, h, 'conv2'), 2, -1)
        return x + a * jax.nn.sigmoid(b)


class Snail(nn.Module):
    """x [n, H, W, C] of one value per pixel -> logits float32 [n, H, W, 1, levels].

    Attention asks with a pixel's features and its position, and is answered by the features, the positions and the
    values before them: at each pixel by the value of the pixel before it. (The paper shows a pixel the values of all
    earlier ones and masks itself out; that is the same knowledge, and the first pixel has something to see too.)

    Attributes:
      blocks: of `layers` gated residual blocks, then attention.
      kernel: odd.
      heads: of the attention; 0: none, for grids too long for it. channels is a multiple of it.
    """

    channels: int = 64
    blocks: int = 2
    layers: int = 3
    kernel: int = 3
    heads: int = 4
    dropout: float = 0.0
    colours: int = 1
    levels: int = 256
    classes: int = 0
    dtype: Any = jnp.float32
    remat: bool = False

    rows = False

    @property
    def margin(self) -> int:
        return self.kernel

    @nn.compact
    def __call__(
        self, x: Array, condition: Condition = Condition(), train: bool = False, place: Place | None = None
    ) -> Array:
        block = nn.remat(SnailBlock) if self.remat and place is None else SnailBlock
        half, dtype = self.kernel // 2, self.dtype
        own = dict(dropout=self.dropout, classes=self.classes, train=train, dtype=dtype)
        down = CausalConv(self.channels, (half, self.kernel), shift=(1, 0), dtype=dtype, name='above')
        right = CausalConv(self.channels, (half + 1, half), left=half - 1, shift=(0, 1), dtype=dtype, name='beside')
        h = down(x, place, given=True) + right(x, place, given=True)
        at = positions(*(x.shape[1:3] if place is None else (place.height, place.width)))
        at = jnp.broadcast_to(cut(at, place), (*h.shape[:3], 2)).astype(dtype)
        value = previous(x, place).astype(dtype)
        for b in range(self.blocks):
            before = h
            for i in range(self.layers):
                h = block(self.channels, self.kernel, name=f'block{b}_{i}', **own)(h, None, condition, place)
            if self.heads:
                attention = CausalAttention(self.channels, self.heads, dtype, name=f'attention{b}')
                asked = jnp.concatenate([value, before, h, at], -1)
                found = attention(jnp.concatenate([h, at], -1), asked, place)
                h = block(self.channels, 1, name=f'merge{b}', **own)(h, found, condition, place)
        h = Dense(self.levels, dtype=dtype, init=variance_scaling(), name='out')(nn.elu(h))
        return to_logits(h, 1)


NETWORKS = {'pixelcnn': PixelCNN, 'gated': GatedPixelCNN, 'snail': Snail}


class Coarser(nn.Module):
    """What the coarser grids of codes tell a finer one: tuple of int [n, h_i, w_i] -> float32 [n, H, W, channels].

    Codes are embedded, brought to the grid by repetition and go through residual blocks of 3x3 convolutions.
    """

    grid: tuple[int, int]
    vocabulary: int
    channels: int
    blocks: int = 2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, codes: tuple[Array, ...]) -> Array:
        parts = []
        for i, code in enumerate(codes):
            x = Embed(self.vocabulary, self.channels, dtype=self.dtype, name=f'embed{i}')(code)
            times = [size // own for size, own in zip(self.grid, code.shape[1:], strict=True)]
            parts.append(jnp.repeat(jnp.repeat(x, times[0], 1), times[1], 2))
        x = Conv(self.channels, dtype=self.dtype, name='first')(jnp.concatenate(parts, -1))
        for b in range(self.blocks):
            h = Conv(self.channels, dtype=self.dtype, name=f'block{b}_1')(nn.elu(x))
            x = x + Conv(self.channels, dtype=self.dtype, name=f'block{b}_2')(nn.elu(h))
        return x


class Level(nn.Module):
    """A grid of integers [n, H, W, C], as a network over what it sees of them.

    Grey levels (`vocabulary` 0) are seen as numbers in [-1, 1]; codes are seen as learned vectors.

    Attributes:
      network: one of NETWORKS' modules; its `levels` is the number of values.
      embedding: length of a code's vector.
      coarser: the module that reads the coarser grids, or None.
    """

    network: nn.Module
    vocabulary: int = 0
    embedding: int = 0
    coarser: nn.Module | None = None

    def setup(self):
        if self.vocabulary:
            init = nn.initializers.normal(1.0)
            self.embed = Embed(self.vocabulary, self.embedding, embedding_init=init)

    def look(self, values: Array) -> Array:
        """int [..., C] -> float32 [..., C], or [..., embedding] of codes, whose C is 1."""
        if self.vocabulary:
            return self.embed(values[..., 0])
        return 2 * values.astype(jnp.float32) / (self.network.levels - 1) - 1

    def told(self, label: Array | None, codes: tuple[Array, ...]) -> Condition:
        return Condition(label, self.coarser(codes) if self.coarser else None)

    def at(self, x: Array, condition: Condition, place: Place | None):
        """Logits at a place from what is drawn so far; see `masked`."""
        return self.network(x, condition, False, place)

    def __call__(self, values: Array, label: Array | None, codes: tuple[Array, ...], train: bool = False) -> Array:
        """int [n, H, W, C] -> logits float32 [n, H, W, C, levels] of each value, given those before it."""
        return self.network(self.look(values), self.told(label, codes), train)
