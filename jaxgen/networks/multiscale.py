"""The multi-scale residual quantiser of VAR (Tian et al. 2024, arXiv 2404.02905, algorithms 1 and 2).

A map z [n, h, w, D] becomes K grids of codes out of one codebook, coarse first. With r_1 = z, grid k has

    q_k = nearest(shrunk(r_k)),   e_k = phi_k(enlarged(codebook[q_k])),   r_{k+1} = r_k - e_k

and e_1 + ... + e_K is the decoder's input: every scale is the residual of those before it. Shrinking takes means over
areas, enlarging is bicubic, and phi(x) = (1 - ratio) x + ratio conv(x) restores the enlarged map.

Both resizings are products with matrices, which are worked out beforehand and equal torch's `interpolate`: modes 'area'
and 'bicubic' (a = -0.75, edges repeated), which `jax.image.resize` has otherwise or not at all.
"""

from __future__ import annotations

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.errors import UserError
from jaxgen.networks import quantise
from jaxgen.networks.first_stage import INIT
from jaxgen.networks.layers import Conv

Array = jax.Array
Grid = tuple[int, int]

CUBIC = -0.75  # slope of the cubic kernel at 1


def area_weights(size: int, to: int) -> np.ndarray:
    """float32 [to, size]: each of `to` positions is the mean of those of `size` positions that it overlaps."""
    weights = np.zeros((to, size), np.float32)
    for i in range(to):
        begin, end = i * size // to, -(-(i + 1) * size // to)
        weights[i, begin:end] = 1 / (end - begin)
    return weights


def bicubic_weights(size: int, to: int) -> np.ndarray:
    """float32 [to, size]: cubic convolution (Keys 1981) of the four positions about each, half a pixel at the edges."""

    def kernel(x):
        near = (CUBIC + 2) * x**3 - (CUBIC + 3) * x**2 + 1
        far = CUBIC * (x**3 - 5 * x**2 + 8 * x - 4)
        return np.where(x <= 1, near, far)

    weights = np.zeros((to, size))
    position = (np.arange(to) + 0.5) * size / to - 0.5
    for shift in range(-1, 3):
        tap = np.floor(position) + shift
        np.add.at(weights, (np.arange(to), np.clip(tap, 0, size - 1).astype(int)), kernel(np.abs(position - tap)))
    return weights.astype(np.float32)


def resized(x: Array, grid: Grid, weights) -> Array:
    """[n, h, w, D] to [n, *grid, D] by `weights`(size, to) of each axis."""
    if x.shape[1:3] == grid:
        return x
    rows, columns = (weights(size, to) for size, to in zip(x.shape[1:3], grid, strict=True))
    # At full precision, as in `quantise.nearest`: codes must not depend on the device.
    return jnp.einsum('ph,nhwd,qw->npqd', rows, x, columns, precision=jax.lax.Precision.HIGHEST)


def shrunk(x: Array, grid: Grid) -> Array:
    """Means over areas: [n, h, w, D] to [n, *grid, D]."""
    return resized(x, grid, area_weights)


def enlarged(x: Array, grid: Grid) -> Array:
    """Bicubic: [n, h, w, D] to [n, *grid, D]."""
    return resized(x, grid, bicubic_weights)


def grids_of(scales: tuple[int, ...], grid: Grid) -> tuple[Grid, ...]:
    """(rows, columns) of each scale, a number of rows, in the aspect ratio of `grid`."""
    return tuple((rows, max(1, round(rows * grid[1] / grid[0]))) for rows in scales)


def phi_of(scale: int, scales: int, phis: int) -> int:
    """Index of the convolution, of `phis`, of a scale of `scales`: from coarse to fine, in equal parts but for the
    first and last of four (the released code's rule)."""
    margin = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    ticks = np.linspace(margin, 1 - margin, phis)
    return int(np.abs(ticks - scale / max(scales - 1, 1)).argmin())


class MultiScale(nn.Module):
    """Quantises z [n, h, w, features] on several grids, or on one.

    The codebook [K, features] is no weight of this network but an argument. All is float32, whatever computes z.

    Attributes:
      grids: coarse ones first; the last one is that of z.
      features: dimensions of a code's vector.
      phis: convolutions, each of several scales; 0: none, and phi is the identity. Published: 4 for 10 scales.
      ratio: the convolution's weight in phi.
    """

    grids: tuple[Grid, ...]
    features: int
    phis: int = 4
    ratio: float = 0.5

    def setup(self):
        self.phi = [Conv(self.features, init=INIT) for _ in range(self.phis)]

    def added(self, codes: Array, codebook: Array, scale: int) -> Array:
        """e_k, float32 [n, h, w, features], the summand of codes int [n, *grids[scale]] in the map that is decoded.

        With one grid alone there may be more codes than in training; the map is larger then.
        """
        x = quantise.embed(codes, codebook)
        if len(self.grids) > 1:
            x = enlarged(x, self.grids[-1])
        if not self.phis:
            return x
        return (1 - self.ratio) * x + self.ratio * self.phi[phi_of(scale, len(self.grids), self.phis)](x)

    def __call__(self, z: Array, codebook: Array) -> tuple[list[Array], list[Array], list[Array]]:
        """For each scale the vectors that were quantised, [n, *grid, features], the sum of e_1 to e_k, [n, h, w,
        features], and the codes, int32 [n, *grid]. Gradients go from the sums to the codebook and to phi, none to z.

        Raises:
          UserError: z is no map of the size that the grids are for.
        """
        chex.assert_shape(z, (None, None, None, self.features))
        if z.shape[1:3] != self.grids[-1]:
            raise UserError(
                f'config.data.size: latents are {z.shape[1:3]} here, and the codes are for {self.grids[-1]}'
            )
        rest, total = jax.lax.stop_gradient(z.astype(jnp.float32)), jnp.zeros(())
        quantised, sums, codes = [], [], []
        for scale, grid in enumerate(self.grids):
            quantised.append(shrunk(rest, grid))
            codes.append(quantise.nearest(quantised[-1], codebook))
            part = self.added(codes[-1], codebook, scale)
            rest, total = rest - jax.lax.stop_gradient(part), total + part
            sums.append(total)
        return quantised, sums, codes
