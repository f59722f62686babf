"""Steps of a chain drawn by the size of their loss (Nichol & Dhariwal 2021, arXiv 2102.09672, section 3.3).

Terms of the variational bound differ by orders of magnitude from step to step. Drawn with p(t) proportional to
sqrt(E[L_t^2]) and weighted by 1 / (T p(t)) the loss has the same mean, and its gradient less noise. E[L_t^2] is that of
the last KEEP losses of each step. Until every step has so many, steps are drawn evenly.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array

KEEP = 10
EVEN = 0.001  # fraction of the probability that is uniform, so that no step is forgotten


def start(timesteps: int) -> dict[str, Array]:
    """The history before the first update."""
    return {'errors': jnp.zeros((timesteps, KEEP)), 'seen': jnp.zeros(timesteps, jnp.int32)}


def probabilities(history: dict[str, Array]) -> Array:
    """p(t), [T]."""
    steps = len(history['seen'])
    p = jnp.sqrt(jnp.square(history['errors']).mean(-1))
    p = (1 - EVEN) * p / jnp.maximum(p.sum(), 1e-30) + EVEN / steps
    return jnp.where((history['seen'] >= KEEP).all(), p, 1 / steps)


def draw(history: dict[str, Array], rng: Array, n: int) -> tuple[Array, Array]:
    """Steps t, int32 [n], and the weights of their losses, [n]."""
    p = probabilities(history)
    t = jax.random.categorical(rng, jnp.log(p), shape=(n,))
    return t, 1 / (len(p) * p[t])


def record(history: dict[str, Array], t: Array, errors: Array) -> dict[str, Array]:
    """The history with losses `errors` [n] of steps t [n], in this order; of each step the last KEEP stay."""
    n, steps = len(t), len(history['seen'])
    same = t[:, None] == t[None, :]
    before = jnp.tril(same, -1).sum(-1)  # examples of the same step earlier in the batch, [n]
    after = jnp.triu(same, 1).sum(-1)
    kept = jnp.where(after < KEEP, t, steps + jnp.arange(n))  # out of range: dropped
    slot = (history['seen'][t] + before) % KEEP
    return {
        'errors': history['errors'].at[kept, slot].set(errors, mode='drop', unique_indices=True),
        'seen': history['seen'] + jax.nn.one_hot(t, steps, dtype=jnp.int32).sum(0),
    }
