"""Captions: from bytes to words to features. All of it runs inside a jitted function.

A caption is UTF-8 bytes, uint8 [n, L], zeros behind the text. Words are runs of letters, digits and underscores; ASCII
capitals count as small letters, and every byte of another alphabet as a letter. A word's number is a hash of its
letters (Weinberger et al. 2009, arXiv 0902.2206): there is no vocabulary to be made, kept and lost, and any caption can
be read. Two words with the same number are one word to a model; with r numbers and k words about k^2 / 2r pairs
collide. A word that no training caption has means nothing: `jaxgen/data/captions.py` refuses it.
"""

from __future__ import annotations

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.networks.layers import Dense, look_up

Array = jax.Array

PRIME = 16_777_619  # of FNV-1, for a polynomial modulo 2^32


def is_letter(b: Array) -> Array:
    """Whether bytes [...] belong to words."""

    def between(first: str, last: str) -> Array:
        return (b >= ord(first)) & (b <= ord(last))

    return between('a', 'z') | between('A', 'Z') | between('0', '9') | (b == ord('_')) | (b >= 128)


def word_numbers(caption: Array, length: int, numbers: int) -> Array:
    """Numbers of the first words of captions uint8 [n, L]: int32 [n, length], 1 to numbers - 1, and 0 where the
    caption has no more words."""
    chex.assert_rank(caption, 2)
    b = caption.astype(jnp.uint32)
    letter = is_letter(b)
    starts = letter & ~jnp.pad(letter, ((0, 0), (1, 0)))[:, :-1]
    position = jnp.arange(b.shape[1])
    within = position - jax.lax.cummax(jnp.where(starts, position, 0), axis=1)  # of each letter, in its word
    word = jnp.where(letter, jnp.cumsum(starts, 1) - 1, length)  # which word it belongs to, [n, L]
    powers = np.cumprod(np.full(b.shape[1], PRIME, np.uint32), dtype=np.uint32)
    small = jnp.where((b >= ord('A')) & (b <= ord('Z')), b + 32, b)
    parts = small * jnp.asarray(powers)[within]
    hashes = jnp.where(word[..., None] == jnp.arange(length), parts[..., None], 0).sum(1, dtype=jnp.uint32)
    hashes = (hashes ^ (hashes >> 16)) * jnp.uint32(0x85EBCA6B)  # the low bits from all bits
    hashes = hashes ^ (hashes >> 13)
    mask = jnp.arange(length) < starts.sum(1)[:, None]
    return jnp.where(mask, 1 + hashes % (numbers - 1), 0).astype(jnp.int32)


class LSTM(nn.Module):
    """Long short-term memory (Hochreiter & Schmidhuber 1997, with forget gates), float32.

    x [n, T, C] and mask bool [n, T] -> states [n, T, units], 0 where there is no word, and the last state [n, units].
    Gates in torch's order: input, forget, cell, output. Torch has two biases that add up; here is one.

    Attributes:
      reverse: read from the end.
    """

    units: int
    reverse: bool = False

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> tuple[Array, Array]:
        chex.assert_shape(mask, x.shape[:2])
        bound = self.units**-0.5

        def init(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        of_input = Dense(4 * self.units, bias=False, init=init, name='input')(x)
        kernel = self.param('state', init, (self.units, 4 * self.units))
        bias = self.param('bias', init, (4 * self.units,))

        def one(carry, step):
            h, c = carry
            gates, mask = step
            i, f, g, o = jnp.split(gates + h @ kernel + bias, 4, -1)
            new = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
            mask = mask[:, None]
            h = jnp.where(mask, nn.sigmoid(o) * jnp.tanh(new), h)
            return (h, jnp.where(mask, new, c)), jnp.where(mask, h, 0)

        zero = jnp.zeros((len(x), self.units))
        steps = of_input.swapaxes(0, 1), mask.T  # [T, n, ...]
        (h, _), states = jax.lax.scan(one, (zero, zero), steps, reverse=self.reverse)
        return states.swapaxes(0, 1), h


class TextEncoder(nn.Module):
    """Word numbers int32 [n, T], 0 where there is none -> features of words [n, T, features] and of the sentence
    [n, features]: an LSTM in each direction over embeddings, its states and its last ones.

    Attributes:
      numbers: of words.
      embedding: numbers of one word's embedding.
      features: an even number.
      dropout: of the embeddings, in training; needs the rng 'dropout'.
    """

    numbers: int
    embedding: int = 300
    features: int = 256
    dropout: float = 0.5

    @nn.compact
    def __call__(self, words: Array, train: bool = False) -> tuple[Array, Array]:
        def init(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -0.1, 0.1)

        x = look_up(self.param('embedding', init, (self.numbers, self.embedding)), words)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        directions = [
            LSTM(self.features // 2, reverse, name=name)(x, words > 0)
            for name, reverse in (('forward', False), ('backward', True))
        ]
        states, last = zip(*directions, strict=True)
        return jnp.concatenate(states, -1), jnp.concatenate(last, -1)
