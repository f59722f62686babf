"""Causal layers: convolutions and attention over earlier pixels alone, for whole images or for one pixel.

The pixels of an image are ordered row by row (raster scan). A network is causal if its output at a pixel depends on
the pixels before it only, so that one pass over a whole image computes the conditional distributions of all its
pixels. Sampling takes a pass for each pixel, and passes over the whole image would compute all others in vain. So every
layer here takes a `position` too: with it, the layer computes one pixel (or one row) and keeps of its input what later
pixels depend on, the newest rows of a convolution, the keys and values of attention, in the collection 'cache'. What is
between these layers works on any number of pixels, so a network is written once for both:

    network(x)                          x [n, H, W, C], all pixels at once
    network(x, position=Position(...))  x padded by a margin, the pixels sampled so far; out comes the position's part,
                                        [n, 1, W, ...] of a row or [n, 1, 1, ...] of a pixel

Networks with a stream that depends on the rows above, across the whole width (the vertical stack of the gated
PixelCNN), compute it row by row, before the first pixel of each row; `RowCache` keeps it for the row's pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgen.networks.attention import attend, attend_cached
from jaxgen.networks.convolution import convolve
from jaxgen.networks.layers import Dense, variance_scaling

Array = jax.Array


class Position(NamedTuple):
    """One pixel of a grid, or one whole row of it."""

    height: int  # of the grid
    width: int
    i: Any  # row, an integer or a traced one
    j: Any = None  # column; None: the whole row
    depth: int = 0  # how many of the coarser grids, each of half the size, have a pixel (row) that starts here
    margin: int = 0  # zeros above, left and right of the pixels sampled so far

    @property
    def columns(self) -> int:
        return self.width if self.j is None else 1

    def coarser(self) -> Position:
        """The position in the grid of half the size."""
        return Position(
            self.height // 2, self.width // 2, self.i // 2, None if self.j is None else self.j // 2, self.depth - 1
        )


def computes_rows(position: Position | None) -> bool:
    """Whether the streams of whole rows are computed at this position."""
    return position is None or position.j is None


def computes_pixels(position: Position | None) -> bool:
    """Whether the streams of single pixels are computed at this position."""
    return position is None or position.j is not None


def part_at(x: Array, position: Position | None) -> Array:
    """The part of a map [n, H, W, C] (without margin) at a position: [n, 1, W, C] or [n, 1, 1, C]."""
    if position is None:
        return x
    j = 0 if position.j is None else position.j
    return lax.dynamic_slice(x, (0, position.i, j, 0), (len(x), 1, position.columns, x.shape[-1]))


def shift(x: Array, rows: int, columns: int) -> Array:
    """[n, H, W, C] shifted down and to the right, zeros moving in."""
    _, height, width, _ = x.shape
    return jnp.pad(x, ((0, 0), (rows, 0), (columns, 0), (0, 0)))[:, :height, :width]


def feature_colours(features: int, colours: int, halves: int = 1) -> tuple[int, ...]:
    """The colour that each feature belongs to: 0, 1, 2, 0, 1, 2, ..., the same anew in each of `halves` parts."""
    return tuple(i % colours for i in range(features // halves)) * halves


def kernel_mask(kind: str, kernel: tuple[int, int], inputs: tuple[int, ...], outputs: tuple[int, ...]) -> np.ndarray:
    """Mask of ones and zeros [h, w, in, out] for a causal kernel (van den Oord et al. 2016, section 3.4).

    It is 1 at all pixels before the centre. At the centre a feature of colour o depends on those of colours less than o
    (mask 'A'), or on o too (mask 'B').

    Args:
      kernel: odd numbers.
      inputs, outputs: colour of each feature.
    """
    height, width = kernel[0] // 2, kernel[1] // 2
    allowed = np.zeros((*kernel, len(inputs), len(outputs)), np.float32)
    allowed[:height] = 1
    allowed[height, :width] = 1
    i, o = np.array(inputs)[:, None], np.array(outputs)[None]
    allowed[height, width] = i < o if kind == 'A' else i <= o
    return allowed


def standardise(y: Array, std: float = 1.0) -> tuple[Array, Array]:
    """Scale and bias, float32 [C], that bring y [n, H, W, C] of any dtype to mean 0 and this standard deviation.

    The data-dependent initialisation of Salimans & Kingma 2016 (eq. 6), arXiv 1602.07868.
    """
    y = y.astype(jnp.float32)
    scale = std * lax.rsqrt(y.var((0, 1, 2)) + 1e-10)
    return scale, -y.mean((0, 1, 2)) * scale


class CausalConv(nn.Module):
    """Convolution whose kernel ends in the row of its pixel: output (i, j) depends on the rows i - h + 1 to i and the
    columns j - left to j - left + w - 1 of its input, zeros outside. With stride 2 that is at (2i, 2j).

    Attributes:
      kernel: (h, w). With `mask`: odd numbers, centred at the pixel; weights after the pixel are stored, but have no
        effect.
      left: columns before the pixel; None: centred, w // 2.
      shift: (rows, columns) by which the result is shifted down and right, (0, 0), (1, 0) or (0, 1), zeros moving in:
        then it does not depend on the pixel itself, or on its row.
      mask: '' | 'A' | 'B', see `kernel_mask`, with features of so many `colours`, see `feature_colours`; `halves` is of
        the result.
      weight_norm: kernel = scale v / |v|, one scale per output (Salimans & Kingma 2016); in `init` scale and bias are
        set by the data, so that the outputs have mean 0 and standard deviation `init_std`.
    """

    features: int
    kernel: tuple[int, int] = (1, 1)
    left: int | None = None
    stride: int = 1
    shift: tuple[int, int] = (0, 0)
    mask: str = ''
    colours: int = 1
    halves: int = 1
    weight_norm: bool = False
    init_std: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, position: Position | None = None, network_input: bool = False, active: bool = True
    ) -> Array | None:
        """Features [n, H, W, features], or their part at the position; None where not active.

        Args:
          x: [n, H, W, C], or its part at the position.
          network_input: x is the whole input of the network, with its margin: nothing needs to be cached.
          active: False: x is cached and nothing computed, where stride 2 has no output at this position.
        """
        shape = (*self.kernel, x.shape[-1], self.features)
        if self.weight_norm:
            v = self.param('v', nn.initializers.normal(0.05), shape)
            kernel = v * lax.rsqrt(jnp.maximum(jnp.square(v).sum((0, 1, 2)), 1e-30))
            scale, bias = jnp.ones(self.features), jnp.zeros(self.features)
            if self.is_initializing():
                y = self.convolve(x.astype(jnp.float32), kernel)
                scale, bias = standardise(y, self.init_std)
            kernel = kernel * self.param('scale', lambda _: scale)
            bias = self.param('bias', lambda _: bias)
        else:
            kernel = self.param('kernel', variance_scaling(), shape)
            bias = self.param('bias', nn.initializers.zeros, (self.features,))
        if self.mask:
            inputs = feature_colours(x.shape[-1], self.colours)
            outputs = feature_colours(self.features, self.colours, self.halves)
            kernel = kernel * kernel_mask(self.mask, self.kernel, inputs, outputs)
            kernel = kernel[: self.kernel[0] // 2 + 1]
            if self.kernel[0] == 1:
                kernel = kernel[:, : self.kernel[1] // 2 + 1]  # all others are zeros
        kernel, bias, x = kernel.astype(self.dtype), bias.astype(self.dtype), x.astype(self.dtype)
        if position is None:
            return shift(self.convolve(x, kernel) + bias, *self.shift)
        return self.at_position(x, kernel, bias, position, network_input, active)

    @property
    def before(self) -> int:
        """Columns of the kernel before the pixel."""
        return self.kernel[1] // 2 if self.left is None else self.left

    def convolve(self, x: Array, kernel: Array) -> Array:
        """The convolution of whole images."""
        height, width = kernel.shape[:2]
        padding = ((height - 1, 0), (self.before, max(width - 1 - self.before, 0)))
        return convolve(x, kernel, (self.stride, self.stride), padding)

    def at_position(
        self, x: Array, kernel: Array, bias: Array, position: Position, network_input: bool, active: bool
    ) -> Array | None:
        """The convolution at one position, from the newest rows of the input in the cache."""
        height, width, channels, _ = kernel.shape
        n, before = len(x), self.before
        j = 0 if position.j is None else position.j
        columns = position.columns + width - 1  # of the input that the position depends on
        if network_input:
            down, right = self.shift
            corner = (0, position.margin + position.i - down - height + 1, position.margin + j - right - before, 0)
            window = lax.dynamic_slice(x, corner, (n, height, columns, channels))
        elif (height, width) == (1, 1):
            window = x
        else:
            # A ring buffer of the newest rows, row r in slot r modulo their number. What a slot still holds of an older
            # row lies after the pixel, where no weight reads it.
            size = (n, height, before + position.width + max(width - 1 - before, 0), channels)
            newest = self.variable('cache', 'rows', jnp.zeros, size, self.dtype)
            newest.value = lax.dynamic_update_slice(newest.value, x, (0, position.i % height, before + j, 0))
            if not active:
                return None
            window = lax.dynamic_slice(newest.value, (0, 0, j, 0), (n, height, columns, channels))
            window = jnp.take(window, (position.i + 1 + jnp.arange(height)) % height, axis=1)
        if position.j is None:
            y = convolve(window, kernel, (1, self.stride), 'VALID')
        else:
            y = (window.reshape(n, -1) @ kernel.reshape(-1, self.features))[:, None, None]
        y = y + bias
        if self.shift[0]:
            y = jnp.where(position.i < self.shift[0], 0, y)
        if self.shift[1]:
            y = jnp.where(position.j < self.shift[1], 0, y)
        return y


class CausalConvTranspose(nn.Module):
    """Transposed convolution of stride 2, of the upward half of a U-Net: [n, H, W, C] -> [n, 2H, 2W, features].

    Pixel (i, j) depends on (i // 2, j // 2), and with three columns, for streams of whole rows, on the neighbour to the
    right of that if j is odd. Weight-normalised, as CausalConv.

    Attributes:
      columns: of the kernel, 2 or 3; it has 2 rows.
    """

    features: int
    columns: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array | None, position: Position | None = None, channels: int = 0) -> Array:
        """Features [n, 2H, 2W, features], or their part at the position.

        Args:
          x: [n, H, W, C]; at a position the coarser grid's pixel (row) that starts there, or None if none does.
          position: in the finer grid.
          channels: C.
        """
        channels = channels or x.shape[-1]
        v = self.param('v', nn.initializers.normal(0.05), (2, self.columns, channels, self.features))
        kernel = v * lax.rsqrt(jnp.maximum(jnp.square(v).sum((0, 1, 2)), 1e-30))
        scale, bias = jnp.ones(self.features), jnp.zeros(self.features)
        if self.is_initializing():
            y = self.convolve(x.astype(jnp.float32), kernel)
            scale, bias = standardise(y)
        kernel = (kernel * self.param('scale', lambda _: scale)).astype(self.dtype)
        bias = self.param('bias', lambda _: bias).astype(self.dtype)
        if position is None:
            return self.convolve(x.astype(self.dtype), kernel) + bias
        return self.at_position(x, kernel, channels, position) + bias

    def subpixels(self, x: Array, kernel: Array) -> Array:
        """The pixels that each pixel becomes, [n, H, W, C] -> [n, H, rows of the kernel, W, 2, features]."""
        y = jnp.einsum('nhwc,abco->nhawbo', x, kernel)
        if self.columns == 2:
            return y
        # Column 2J is the middle tap of J; column 2J + 1 the last tap of J and the first of J + 1.
        first = jnp.pad(y[:, :, :, 1:, 0], ((0, 0), (0, 0), (0, 0), (0, 1), (0, 0)))
        return jnp.stack([y[..., 1, :], y[..., 2, :] + first], -2)

    def convolve(self, x: Array, kernel: Array) -> Array:
        """The transposed convolution of whole images."""
        return einops.rearrange(self.subpixels(x, kernel), 'n h a w b c -> n (h a) (w b) c')

    def at_position(self, x: Array | None, kernel: Array, channels: int, position: Position) -> Array:
        """The transposed convolution at one position of the finer grid."""
        coarse = position.coarser()
        kernel = lax.dynamic_slice_in_dim(kernel, position.i % 2, 1, 0)
        row = self.variable('cache', 'row', lambda: jnp.zeros((len(x), 1, coarse.width, channels), self.dtype))
        if x is not None:
            start = (0, 0, 0 if position.j is None else coarse.j, 0)
            row.value = lax.dynamic_update_slice(row.value, x.astype(self.dtype), start)
        if position.j is None:
            return einops.rearrange(self.subpixels(row.value, kernel), 'n h a w b c -> n (h a) (w b) c')
        pixel = lax.dynamic_slice_in_dim(row.value, coarse.j, 1, 2)
        tap = lax.dynamic_slice_in_dim(kernel, position.j % 2, 1, 1)[0, 0]
        return pixel @ tap


class RowCache(nn.Module):
    """The part of a stream of whole rows at a position: x [n, ., ., features] itself, or at a pixel, where x is None,
    that of the row which was computed before its first pixel."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array | None, position: Position | None) -> Array:
        if position is None:
            return x
        row = self.variable('cache', 'row', lambda: jnp.zeros((len(x), 1, position.width, self.features), self.dtype))
        if position.j is None:
            row.value = x.astype(self.dtype)
            return row.value
        return lax.dynamic_slice_in_dim(row.value, position.j, 1, 2)


def coordinates(height: int, width: int) -> Array:
    """Row and column of every pixel, from -0.5 to 0.5: float32 [1, H, W, 2]."""
    rows, columns = (np.arange(size) / max(size - 1, 1) - 0.5 for size in (height, width))
    return jnp.asarray(np.stack(np.meshgrid(rows, columns, indexing='ij'), -1)[None], jnp.float32)


def previous_pixel(x: Array, position: Position | None) -> Array:
    """x, the network's input, at the pixel before each pixel: the last one of the row above for the first of a row, and
    0 for the very first."""
    if position is None:
        n, channels = len(x), x.shape[-1]
        return jnp.pad(x.reshape(n, -1, channels), ((0, 0), (1, 0), (0, 0)))[:, :-1].reshape(x.shape)
    pixel = position.i * position.width + position.j - 1  # -1: the last of row -1, which is in the margin
    corner = (0, position.margin + pixel // position.width, position.margin + pixel % position.width, 0)
    return lax.dynamic_slice(x, corner, (len(x), 1, 1, x.shape[-1]))


class CausalAttention(nn.Module):
    """Attention of every pixel to itself and all before it, [n, H, W, features].

    Its inputs are causal already (a pixel's features do not depend on its own value), so a pixel may attend to itself.

    Attributes:
      features: a multiple of heads.
    """

    features: int
    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, memory: Array, position: Position | None = None) -> Array:
        """
        Args:
          x: [n, H, W, .], from which the queries are computed.
          memory: [n, H, W, .], from which keys and values are.
        """
        _, height, width, _ = x.shape
        q, k, v = (
            einops.rearrange(
                Dense(self.features, dtype=self.dtype, name=name)(inputs), 'n h w (k c) -> n (h w) k c', k=self.heads
            )
            for name, inputs in (('q', x), ('k', memory), ('v', memory))
        )  # [n, HW, heads, C / heads]
        if position is None:
            out = attend(q, k, v, causal=True)
        else:
            count = position.height * position.width
            pixel = position.i * position.width + position.j
            shape = (len(x), self.heads, count, self.features // self.heads)
            keys = self.variable('cache', 'keys', jnp.zeros, shape, self.dtype)
            values = self.variable('cache', 'values', jnp.zeros, shape, self.dtype)
            keys.value = lax.dynamic_update_slice_in_dim(keys.value, jnp.swapaxes(k, 1, 2), pixel, 2)
            values.value = lax.dynamic_update_slice_in_dim(values.value, jnp.swapaxes(v, 1, 2), pixel, 2)
            out = attend_cached(q, keys.value, values.value, pixel + 1)
        return einops.rearrange(out, 'n (h w) k c -> n h w (k c)', h=height, w=width)


# Sampling. A network is here a callable (x, position, cache) -> (output, cache), x [n, H, W, E] the embedded pixels
# sampled so far; `with_cache` makes one of a module.


def with_cache(apply: Callable, variables: dict) -> Callable:
    """A network as the samplers below call it, (x, position, cache) -> (output, cache).

    Args:
      apply: (variables, x, position, **) -> output, a module's `apply` with all else bound.
    """

    def network(x, position, cache):
        if position is None:
            return apply(variables, x, None), cache
        output, changed = apply({**variables, 'cache': cache}, x, position, mutable=['cache'])
        return output, changed['cache']

    return network


def sample_plain(
    network: Callable, draw: Callable, shape: tuple[int, ...], channels: int, passes: int = 1, **_cached_only
) -> Array:
    """Samples by a pass over the whole image for every pixel (and colour): slow, and the oracle of `sample_cached`,
    whose arguments it takes.

    Args:
      network: (x, None, None) -> (output [n, H, W, ...], anything).
      draw: (output at a pixel [n, ...], index of the pixel, index of the pass, what the pixel was [n, channels])
        -> (values int32 [n, channels], their embedding [n, E]).
      shape: (n, H, W, E).
      passes: through the network for each pixel, one for each colour that is sampled on its own.

    Returns:
      int32 [n, H, W, channels].
    """
    n, height, width, _ = shape

    def pixel(carry, p):
        values, x = carry
        i, j = p // width, p % width
        for c in range(passes):
            output = network(x, None, None)[0]
            new, embedded = draw(output[:, i, j], p, c, values[:, i, j])
            values, x = values.at[:, i, j].set(new), x.at[:, i, j].set(embedded)
        return (values, x), None

    start = jnp.zeros((n, height, width, channels), jnp.int32), jnp.zeros(shape)
    return lax.scan(pixel, start, jnp.arange(height * width))[0][0]


def sample_cached(
    network: Callable,
    draw: Callable,
    shape: tuple[int, ...],
    channels: int,
    passes: int = 1,
    *,
    margin: int,
    rows: bool,
    scales: int = 1,
) -> Array:
    """The samples of `sample_plain`, at the cost of one pixel for each pixel.

    Args:
      margin: the largest distance, in pixels, at which a layer reads the network's input.
      rows: the network has streams of whole rows.
      scales: resolutions of the network, each half the one before.
    """
    n, height, width, embedding = shape
    padded = (n, height + margin, width + 2 * margin, embedding)

    def position(i, j, depth):
        return Position(height, width, i, j, depth, margin)

    def depth_at(*index):
        """How many coarser grids have a pixel, or a row, that starts here."""
        steps = [2**s for s in range(1, scales)]
        return sum((jnp.stack([i % step for i in index]) == 0).all().astype(jnp.int32) for step in steps)

    def switch(index, run):
        """run(depth) with the depth at this index."""
        if scales == 1:
            return run(0)
        return lax.switch(depth_at(*index), [functools.partial(run, depth) for depth in range(scales)])

    def empty():
        x, cache = jnp.zeros(padded), {}
        if rows:
            cache = network(x, position(0, None, scales - 1), cache)[1]
        return network(x, position(0, 0, scales - 1), cache)[1]

    def one_row(carry, i):
        values, x, cache = carry
        if rows:
            cache = switch((i,), lambda depth: network(x, position(i, None, depth), cache)[1])

        def pixel(carry, j):
            values, x, cache = carry
            p = i * width + j
            for c in range(passes):
                output, cache = switch((i, j), lambda depth: network(x, position(i, j, depth), cache))  # noqa: B023
                old = lax.dynamic_slice(values, (0, i, j, 0), (n, 1, 1, channels))[:, 0, 0]
                new, embedded = draw(output[:, 0, 0], p, c, old)
                values = lax.dynamic_update_slice(values, new[:, None, None], (0, i, j, 0))
                embedded = embedded[:, None, None].astype(x.dtype)
                x = lax.dynamic_update_slice(x, embedded, (0, margin + i, margin + j, 0))
            return (values, x, cache), None

        return lax.scan(pixel, (values, x, cache), jnp.arange(width))[0], None

    cache = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(empty))
    start = jnp.zeros((n, height, width, channels), jnp.int32), jnp.zeros(padded), cache
    return lax.scan(one_row, start, jnp.arange(height))[0][0]


SAMPLERS = {'cached': sample_cached, 'plain': sample_plain}
