"""The diffusion transformer DiT (Peebles & Xie 2022, arXiv 2212.09748), which is SiT's network too (Ma et al. 2024)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.networks.attention import attend, keep
from jaxgen.networks.embeddings import cosines_first
from jaxgen.networks.layers import Dense, Embed, LayerNorm, from_patches, to_patches
from jaxgen.options import Count, Positive, Rate, Rule

Array = jax.Array

ZEROS = nn.initializers.zeros
NORMAL = nn.initializers.normal(0.02)


def position_embedding(
    height: int, width: int, features: int, first: tuple[float, float] = (0.0, 0.0), unit: float = 1.0
) -> np.ndarray:
    """Fixed table of the positions on a grid, row by row: float32 [height * width, features].

    The first half of the features are those of the column, the second of the row, each sines, then cosines,
    at frequencies 10000 ** (-i / (features / 4)). `features` is a multiple of 4.

    Args:
      first: position of the first row and column.
      unit: rows or columns that are one unit of position.
    """
    quarter = features // 4
    frequencies = 10_000.0 ** (-np.arange(quarter) / quarter)
    places = np.indices((height, width)).reshape(2, -1, 1) / unit + np.reshape(first, (2, 1, 1))
    row, column = places * frequencies  # [height * width, features / 4]
    table = np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], -1)
    return table.astype(np.float32)


class Block(nn.Module):
    """Attention, then an MLP, with adaLN-Zero (section 3.2): tokens [n, T, C], condition [n, C] to tokens.

    The condition gives each of the two branches a shift, a scale and a gate. They start at zero: a new
    block passes its input on unchanged. The second result is None, since `nn.scan` asks for two.
    """

    heads: int
    dropout: float
    train: bool
    dtype: Any
    mlp_eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Array, condition: Array) -> tuple[Array, None]:
        n, tokens, channels = x.shape
        modulation = Dense(6 * channels, init=ZEROS, dtype=self.dtype, name='modulation')(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation[:, None], 6, -1)  # [n, 1, C] each

        h = LayerNorm(affine=False, dtype=self.dtype, name='norm1')(x) * (1 + scale1) + shift1
        qkv = Dense(3 * channels, dtype=self.dtype, name='qkv')(h)
        # Split before they are reshaped: the gradient is one concatenation then, not a sum of padded arrays.
        q, k, v = (x.reshape(n, tokens, self.heads, channels // self.heads) for x in jnp.split(qkv, 3, -1))
        h = attend(q, k, v)  # [n, T, heads, C / heads]
        h = Dense(channels, dtype=self.dtype, name='out')(h.reshape(n, tokens, channels))
        x = x + gate1 * nn.Dropout(self.dropout, deterministic=not self.train)(h)

        h = LayerNorm(eps=self.mlp_eps, affine=False, dtype=self.dtype, name='norm2')(x) * (1 + scale2) + shift2
        h = nn.gelu(Dense(4 * channels, dtype=self.dtype, name='mlp1')(h), approximate=True)
        h = Dense(channels, dtype=self.dtype, name='mlp2')(h)
        return x + gate2 * nn.Dropout(self.dropout, deterministic=not self.train)(h), None


class DiT(nn.Module):
    """x_t and t to a map of x_t's height and width, float32. The defaults are DiT-S/2's.

    Published (table 1), as channels, blocks, heads: S 384, 12, 6; B 768, 12, 12; L 1024, 24, 16;
    XL 1152, 28, 16; each with patch 2, 4 or 8, on latents of 32x32x4, and with a learned variance.
    SiT's networks are these; of their output SiT uses the first half alone.

    The weights of all blocks lie in one stack, [blocks, ...], which a scan goes through: the depth costs
    no compile time.

    Attributes:
      channels: of a token; a multiple of 4 and of `heads`.
      blocks: of attention and MLP each.
      heads: of the attention.
      patch: height and width in pixels of the square that is one token; those of x are multiples of it.
      dropout: rate of dropout of what each branch adds, in training; published: 0.
      freq_shift: of the embedding of time, see `cosines_first`: 0, or 1 as in diffusers.
      mlp_eps: added to the variance by the norm before the MLP; that of the other norms is 1e-6. In diffusers it is
        norm_eps, 1e-5.
      out_channels: 0: as x; twice an image's with a learned variance, which comes second.
      remat: recompute each block's activations in the backward pass.
    """

    channels: Annotated[int, '[4, inf)', Rule(lambda c: c % 4 == 0, 'a multiple of 4')] = 384
    blocks: Count = 12
    heads: Count = 6
    patch: Count = 2
    dropout: Rate = 0.0
    freq_shift: Annotated[int, '[0, 1]'] = 0
    mlp_eps: Positive = 1e-6
    out_channels: int = 0
    remat: bool = False
    dtype: Any = jnp.float32

    takes: ClassVar = ('vector', 'tokens', 'planes')

    @property
    def vector_features(self) -> int:
        return self.channels

    @property
    def token_features(self) -> int:
        return self.channels

    @nn.nowrap
    def class_embedding(self, classes: int) -> nn.Module:
        """A module of int32 [n] in [0, classes) to [n, channels]. Where labels are dropped for classifier-free guidance
        one class, published: the last, stands for no label."""
        return Embed(classes, self.channels, embedding_init=NORMAL, dtype=self.dtype)

    @nn.compact
    def __call__(
        self, x: Array, t: Array, vector: Array | None = None, tokens: Array | None = None, *, train: bool
    ) -> Array:
        """Args:
        x: float32 [n, H, W, C].
        t: [n], integer or real. DiT: step of a schedule with 1000 of them; SiT: time in [0, 1].
        vector: [n, channels], added to the embedding of time; None: there is no such condition.
        tokens: [n, T, channels], conditions in the context of the patches (section 3.2): they pass all blocks beside
          them and are left out of the output.
        train: with dropout; needs the rng 'dropout'.
        """
        n, height, width, image_channels = x.shape
        patch, channels, out_channels = self.patch, self.channels, self.out_channels or image_channels
        rows, columns = height // patch, width // patch

        waves = cosines_first(t, 256, freq_shift=self.freq_shift)
        condition = Dense(channels, init=NORMAL, dtype=self.dtype, name='time1')(waves)  # [n, channels]
        condition = Dense(channels, init=NORMAL, dtype=self.dtype, name='time2')(nn.silu(condition))
        if vector is not None:
            condition = condition + vector
        condition = nn.silu(condition)  # once here, as every block would begin with it

        h = to_patches(x, patch).reshape(n, rows * columns, patch * patch * image_channels)
        h = Dense(channels, dtype=self.dtype, name='first')(h)  # [n, T, channels]
        h = h + position_embedding(rows, columns, channels).astype(self.dtype)
        h = h if tokens is None else jnp.concatenate([h, tokens.astype(h.dtype)], 1)

        # What a scan keeps for the backward pass it has to copy into stacks. Keeping the products of the
        # dense layers alone, and doing the cheap rest twice, takes less time on CPUs and half the memory. Flash
        # attention on accelerators is not done twice.
        kept = None if self.remat else keep
        stack = nn.scan(
            nn.remat(Block, prevent_cse=False, policy=kept),
            variable_axes={'params': 0},
            split_rngs={'params': True, 'dropout': True},
            in_axes=nn.broadcast,
            length=self.blocks,
        )
        h, _ = stack(self.heads, self.dropout, train, self.dtype, self.mlp_eps, name='blocks')(h, condition)

        h = h[:, : rows * columns]
        modulation = Dense(2 * channels, init=ZEROS, dtype=self.dtype, name='modulation')(condition)
        shift, scale = jnp.split(modulation[:, None], 2, -1)
        h = LayerNorm(affine=False, dtype=self.dtype, name='norm')(h) * (1 + scale) + shift
        h = Dense(patch * patch * out_channels, init=ZEROS, dtype=self.dtype, name='last')(h)
        return from_patches(h.reshape(n, rows, columns, -1), patch).astype(jnp.float32)
