"""PixelCNNs: the distribution of each pixel (or code) over its values, given the pixels before it.

    pixelcnn   masked convolutions in residual blocks (van den Oord et al. 2016a, arXiv 1601.06759). The masks leave a
               blind spot: earlier pixels to the upper right that no pixel depends on, however many layers there are
    gated      a vertical stack over all rows above and a horizontal one over the row to the left, with gates (van den
               Oord et al. 2016b, arXiv 1606.05328): no blind spot
    snail      gated residual blocks and causal self-attention, after PixelSNAIL (Chen et al. 2018, arXiv 1712.09763)
               and the priors of VQ-VAE-2 (Razavi et al. 2019, arXiv 1906.00446)

With several colours, a pixel's colours come one after another: features belong to colours in turn, and at its own
pixel a feature depends on the features of its own and of earlier colours alone.

All of them take `condition`, what a pixel's distribution depends on beside earlier pixels: labels [n], and a map
[n, H, W, .], known before sampling; either may be None. See `masked` for `position`.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import chex
import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.imports import OwnToo
from jaxgen.networks.layers import Conv, Dense, Embed, variance_scaling
from jaxgen.networks.masked import (
    CausalAttention,
    CausalConv,
    Position,
    RowCache,
    computes_pixels,
    computes_rows,
    coordinates,
    part_at,
    previous_pixel,
)
from jaxgen.options import Count, Rate, Rule

Array = jax.Array

Odd = Rule(lambda kernel: kernel % 2 == 1, 'odd')
BIAS = 'told'  # of every ConditionBias among the parameters: runs saved before have this name


class Condition(NamedTuple):
    """What all pixels are conditioned on."""

    label: Array | None = None  # int32 [n]
    map: Array | None = None  # [n, H, W, .]


class ConditionBias(nn.Module):
    """The condition as a bias of features (van den Oord et al. 2016b, eq. 4 and 5): a vector of the label, a linear map
    of the condition's map.

    Attributes:
      classes: 0: not conditioned on the label.
    """

    features: int
    classes: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, condition: Condition, position: Position | None) -> Array | float:
        bias = 0.0
        if self.classes:
            chex.assert_rank(condition.label, 1)
            init = nn.initializers.normal(0.05)
            table = Embed(self.classes, self.features, embedding_init=init, dtype=self.dtype, name='label')
            bias = table(condition.label)[:, None, None]  # [n, 1, 1, features]
        if condition.map is not None:
            bias = bias + Dense(self.features, dtype=self.dtype, name='map')(part_at(condition.map, position))
        return bias


def gate(x: Array) -> Array:
    """tanh of one half of the features times the sigmoid of the other (van den Oord et al. 2016b, eq. 2)."""
    a, b = jnp.split(x, 2, -1)
    return jnp.tanh(a) * jax.nn.sigmoid(b)


def concat_elu(x: Array) -> Array:
    """ELU of x and of -x: [..., C] -> [..., 2C]."""
    return nn.elu(jnp.concatenate([x, -x], -1))


def to_logits(x: Array, colours: int) -> Array:
    """[..., levels * colours], the colours in turn, -> float32 [..., colours, levels]."""
    return einops.rearrange(x.astype(jnp.float32), '... (levels colours) -> ... colours levels', colours=colours)


class ResidualBlock(nn.Module):
    """Residual block of the PixelCNN: 2h features to h, a masked convolution (3x3 in the paper), and back to 2h (2016a,
    figure 5)."""

    channels: int
    kernel: int
    colours: int
    dropout: float
    classes: int
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, condition: Condition, position: Position | None = None) -> Array:
        masked = dict(mask='B', colours=self.colours, dtype=self.dtype)
        kernel = (self.kernel, self.kernel)
        h = CausalConv(self.channels, name='down', **masked)(nn.relu(x), position)
        h = CausalConv(self.channels, kernel, name='conv', **masked)(nn.relu(h), position)
        h = h + ConditionBias(self.channels, self.classes, self.dtype, name=BIAS)(condition, position)
        h = nn.Dropout(self.dropout, deterministic=not self.train)(nn.relu(h))
        return x + CausalConv(2 * self.channels, name='up', **masked)(h, position)


class PixelCNN(nn.Module):
    """x [n, H, W, C] -> logits float32 [n, H, W, colours, levels] (2016a, table 1).

    Attributes:
      channels: h, half of the features between the blocks.
      blocks: residual blocks after the first layer.
      kernel, hidden_kernel: side of the masked convolutions, of the first layer and of the blocks.
      head: features of the two layers before the logits.
      dropout: within the blocks, in training.
      colours: 1 where x has one value per pixel or is an embedding of it.
      levels: quantisation levels, the values that a pixel's colour may have.
    """

    channels: Count = 128
    blocks: Count = 15
    kernel: Annotated[int, '[3, inf)', Odd] = 7
    hidden_kernel: Annotated[int, '[1, inf)', Odd] = 3
    head: Count = 1024
    dropout: Rate = 0.0
    colours: int = 1
    levels: int = 256
    classes: int = 0
    dtype: Any = jnp.float32
    remat: bool = False

    rows = False  # there are no streams of whole rows

    @property
    def margin(self) -> int:
        """Pixels around the input that the sampler keeps, see `masked.sample_cached`."""
        return self.kernel

    @nn.compact
    def __call__(
        self, x: Array, condition: Condition = Condition(), train: bool = False, position: Position | None = None
    ) -> Array:
        chex.assert_rank(x, 4)
        block = nn.remat(ResidualBlock) if self.remat and position is None else ResidualBlock
        shared, kernel = dict(colours=self.colours, dtype=self.dtype), (self.kernel, self.kernel)
        h = CausalConv(2 * self.channels, kernel, mask='A', name='first', **shared)(x, position, network_input=True)
        for b in range(self.blocks):
            h = block(
                self.channels, self.hidden_kernel, self.colours, self.dropout, self.classes, train, self.dtype,
                name=f'block{b}',
            )(h, condition, position)  # fmt: skip
        h = CausalConv(self.head, mask='B', name='head1', **shared)(nn.relu(h), position)
        h = CausalConv(self.head, mask='B', name='head2', **shared)(nn.relu(h), position)
        h = CausalConv(self.levels * self.colours, mask='B', name='out', **shared)(nn.relu(h), position)
        return to_logits(h, self.colours)


class GatedBlock(nn.Module):
    """One layer of both stacks, vertical and horizontal (2016b, figure 2): v, h, skip -> v, h, skip.

    The vertical stack has a 1x1 convolution beside its own, and a residual. Where the position is a row, h and skip are
    None; where it is a pixel, v is.

    Attributes:
      first: the network's first layer, which reads the image but for its own pixel and row, and has no residuals.
      last: the network's last layer, whose v and h nothing reads.
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
        self,
        v: Array | None,
        h: Array | None,
        skip: Array | None,
        condition: Condition,
        position: Position | None = None,
    ):
        p, first, dtype = self.channels, self.first, self.dtype
        drop = nn.Dropout(self.dropout, deterministic=not self.train)
        bias = 0.0 if first else ConditionBias(2 * p, self.classes, dtype, name=BIAS)(condition, position)
        above = None
        if computes_rows(position):  # the vertical stack
            down = (1, 0) if first else (0, 0)
            kernel = (self.kernel // 2 + 1, self.kernel)
            above = CausalConv(2 * p, kernel, shift=down, dtype=dtype, name='vertical')(v, position, first)
            above = above + CausalConv(2 * p, shift=down, dtype=dtype, name='vertical_1x1')(v, position, first) + bias
            out = drop(gate(above))
            v = out if first else v + out
            above = Dense(2 * p, dtype=dtype, name='vertical_to_horizontal')(above)
        above = RowCache(2 * p, dtype, name='above')(above, position)
        if computes_pixels(position):  # the horizontal stack
            masked = dict(mask='B', colours=self.colours, dtype=dtype)
            across = masked | dict(mask='A' if first else 'B', halves=2)
            x = CausalConv(2 * p, (1, self.kernel), name='horizontal', **across)(h, position, first)
            x = drop(gate(x + above + bias))
            if not first:
                skip = skip + CausalConv(p, name='skip', **masked)(x, position)
            if not self.last:
                x = CausalConv(p, name='residual', **masked)(x, position)
                h = x if first else h + x
        return v, h, skip


class GatedPixelCNN(nn.Module):
    """x [n, H, W, C] -> logits float32 [n, H, W, colours, levels].

    Attributes:
      channels: p, features of each stack.
      blocks: layers after the first one.
      kernel, hidden_kernel: side of the convolutions, of the first and of the other layers.
      head: features of the layer before the logits.
      dropout: of what each gate puts out, in training.
      colours: 1 where x has one value per pixel or is an embedding of it.
      levels: quantisation levels, the values that a pixel's colour may have.
    """

    channels: Count = 64
    blocks: Count = 6
    kernel: Annotated[int, '[3, inf)', Odd] = 7
    hidden_kernel: Annotated[int, '[1, inf)', Odd] = 7
    head: Count = 128
    dropout: Rate = 0.0
    colours: int = 1
    levels: int = 256
    classes: int = 0
    dtype: Any = jnp.float32
    remat: bool = False

    rows = True  # the vertical stack is a stream of whole rows

    @property
    def margin(self) -> int:
        """Pixels around the input that the sampler keeps, see `masked.sample_cached`."""
        return self.kernel

    @nn.compact
    def __call__(
        self, x: Array, condition: Condition = Condition(), train: bool = False, position: Position | None = None
    ) -> Array | None:
        chex.assert_rank(x, 4)
        block = nn.remat(GatedBlock) if self.remat and position is None else GatedBlock
        v, h, skip = x, x, 0.0
        for b in range(self.blocks + 1):
            v, h, skip = block(
                self.channels, self.hidden_kernel if b else self.kernel, self.colours, self.dropout, self.classes,
                b == 0, b == self.blocks, train, self.dtype, name=f'block{b}',
            )(v, h, skip, condition, position)  # fmt: skip
        if not computes_pixels(position):
            return None
        skip = skip + ConditionBias(self.channels, self.classes, self.dtype, name=BIAS)(condition, position)
        masked = dict(mask='B', colours=self.colours, dtype=self.dtype)
        h = CausalConv(self.head, name='head', **masked)(nn.relu(skip), position)
        h = CausalConv(self.levels * self.colours, name='out', **masked)(nn.relu(h), position)
        return to_logits(h, self.colours)


class SnailBlock(nn.Module):
    """Gated residual block: concat_elu, a causal convolution, concat_elu, another, a * sigmoid(b), added to x.

    Attributes:
      kernel: side of the convolutions, masked to the pixel and those before it; 1: the pixel alone.
    """

    channels: int
    kernel: int
    dropout: float
    classes: int
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, aux: Array | None, condition: Condition, position: Position | None = None) -> Array:
        """aux: a second input, of which each pixel depends on its own pixel alone, or None."""

        def conv(features, x, name):
            kernel = (self.kernel, self.kernel)
            return CausalConv(features, kernel, mask='B', dtype=self.dtype, name=name)(x, position)

        h = conv(self.channels, concat_elu(x), 'conv1')
        if aux is not None:
            h = h + Dense(self.channels, dtype=self.dtype, name='beside')(concat_elu(aux))
        h = h + ConditionBias(self.channels, self.classes, self.dtype, name=BIAS)(condition, position)
        h = nn.Dropout(self.dropout, deterministic=not self.train)(concat_elu(h))
        a, b = jnp.split(conv(2 * self.channels, h, 'conv2'), 2, -1)
        return x + a * jax.nn.sigmoid(b)


class Snail(nn.Module):
    """x [n, H, W, C] of one value per pixel -> logits float32 [n, H, W, 1, levels].

    Queries are computed from a pixel's features and coordinates; keys and values from features, coordinates and, at
    each pixel, the value of the pixel before it. (In the paper they hold the values of all earlier pixels, and a pixel
    is masked out itself: that is the same information, and here the first pixel has something to attend to, too.)

    Attributes:
      channels: features of every layer, a multiple of heads.
      blocks: of `layers` gated residual blocks, then attention.
      layers: gated residual blocks in a block.
      kernel: side of the causal convolutions.
      heads: of the attention; 0: none, for grids too long for it.
      dropout: within the gated residual blocks, in training.
      levels: quantisation levels, the values that a pixel may have.
    """

    channels: Count = 64
    blocks: Count = 2
    layers: Count = 3
    kernel: Annotated[int, '[3, inf)', Odd] = 3
    heads: Annotated[int, '[0, inf)'] = 4
    dropout: Rate = 0.0
    colours: int = 1
    levels: int = 256
    classes: int = 0
    dtype: Any = jnp.float32
    remat: bool = False

    rows = False  # there are no streams of whole rows

    @property
    def margin(self) -> int:
        """Pixels around the input that the sampler keeps, see `masked.sample_cached`."""
        return self.kernel

    @nn.compact
    def __call__(
        self, x: Array, condition: Condition = Condition(), train: bool = False, position: Position | None = None
    ) -> Array:
        chex.assert_rank(x, 4)
        block = nn.remat(SnailBlock) if self.remat and position is None else SnailBlock
        half, dtype = self.kernel // 2, self.dtype
        own = dict(dropout=self.dropout, classes=self.classes, train=train, dtype=dtype)
        down = CausalConv(self.channels, (half, self.kernel), shift=(1, 0), dtype=dtype, name='above')
        right = CausalConv(self.channels, (half + 1, half), left=half - 1, shift=(0, 1), dtype=dtype, name='beside')
        h = down(x, position, network_input=True) + right(x, position, network_input=True)
        where = coordinates(*(x.shape[1:3] if position is None else (position.height, position.width)))
        where = jnp.broadcast_to(part_at(where, position), (*h.shape[:3], 2)).astype(dtype)
        value = previous_pixel(x, position).astype(dtype)
        for b in range(self.blocks):
            before = h
            for i in range(self.layers):
                h = block(self.channels, self.kernel, name=f'block{b}_{i}', **own)(h, None, condition, position)
            if self.heads:
                attention = CausalAttention(self.channels, self.heads, dtype, name=f'attention{b}')
                memory = jnp.concatenate([value, before, h, where], -1)
                attended = attention(jnp.concatenate([h, where], -1), memory, position)
                h = block(self.channels, 1, name=f'merge{b}', **own)(h, attended, condition, position)
        h = Dense(self.levels, dtype=dtype, init=variance_scaling(), name='out')(nn.elu(h))
        return to_logits(h, 1)


NETWORKS = OwnToo({'pixelcnn': PixelCNN, 'gated': GatedPixelCNN, 'snail': Snail})


class ConditioningStack(nn.Module):
    """Features of the coarser grids of codes, at the pixels of a finer one: tuple of int [n, h_i, w_i] -> float32
    [n, H, W, channels].

    Codes are embedded, brought to the finer grid by repetition and go through residual blocks of 3x3 convolutions
    (VQ-VAE-2, Razavi et al. 2019, section 3.2).
    """

    grid: tuple[int, int]
    vocabulary: int
    channels: int
    blocks: int = 2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, codes: tuple[Array, ...]) -> Array:
        (height, width), parts = self.grid, []
        for i, code in enumerate(codes):
            x = Embed(self.vocabulary, self.channels, dtype=self.dtype, name=f'embed{i}')(code)
            _, h, w = code.shape
            parts.append(einops.repeat(x, 'n h w c -> n (h a) (w b) c', a=height // h, b=width // w))
        x = Conv(self.channels, dtype=self.dtype, name='first')(jnp.concatenate(parts, -1))
        for b in range(self.blocks):
            h = Conv(self.channels, dtype=self.dtype, name=f'block{b}_1')(nn.elu(x))
            x = x + Conv(self.channels, dtype=self.dtype, name=f'block{b}_2')(nn.elu(h))
        return x


class GridModel(nn.Module):
    """The distribution of a grid of integers [n, H, W, C]: a network of NETWORKS over their embeddings.

    Grey levels (`vocabulary` 0) are embedded as numbers in [-1, 1], codes as learned vectors.

    Attributes:
      network: its `levels` is the number of values that an integer may have.
      vocabulary: number of codes; 0: the integers are grey levels.
      embedding: length of a code's vector.
      coarser: the ConditioningStack of the coarser grids, or None.
    """

    network: nn.Module
    vocabulary: int = 0
    embedding: int = 0
    coarser: nn.Module | None = None

    def setup(self):
        if self.vocabulary:
            init = nn.initializers.normal(1.0)
            self.embed = Embed(self.vocabulary, self.embedding, embedding_init=init)

    def embedded(self, values: Array) -> Array:
        """int [..., C] -> float32 [..., C], or [..., embedding] of codes, whose C is 1."""
        if self.vocabulary:
            return self.embed(values[..., 0])
        return 2 * values.astype(jnp.float32) / (self.network.levels - 1) - 1

    def condition(self, label: Array | None, codes: tuple[Array, ...]) -> Condition:
        """What the grid is conditioned on: the label int32 [n], or None, and the coarser grids of codes."""
        return Condition(label, self.coarser(codes) if self.coarser else None)

    def logits(self, x: Array, condition: Condition, position: Position | None) -> Array | None:
        """Logits at a position, of the embedded values sampled so far; see `masked`."""
        return self.network(x, condition, False, position)

    def __call__(self, values: Array, label: Array | None, codes: tuple[Array, ...], train: bool = False) -> Array:
        """int [n, H, W, C] -> logits float32 [n, H, W, C, levels] of each value, given those before it."""
        chex.assert_rank(values, 4)
        return self.network(self.embedded(values), self.condition(label, codes), train)
