"""Guidance: samples that show their condition more than the data do."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array

UNLIMITED = 1e9  # an upper end of guidance's interval that is none
# Largest sigma / alpha that a classifier is shown where alpha falls to 0. What it knows of the class falls as fast as
# sigma / alpha rises, and the estimate of x_0 moves by as much from here on.
FARTHEST = 100.0


def in_interval(alpha: Array, sigma: Array, low: float, high: float) -> Array:
    """bool, where low <= sigma / alpha <= high, the interval that guidance is limited to (Kynkaanniemi et al. 2024,
    arXiv 2404.07724). At alpha 0 the ratio is infinite: in no interval but those without an upper end,
    UNLIMITED or more."""
    above = sigma >= low * alpha
    return above if high >= UNLIMITED else above & (sigma <= high * alpha)


def classifier_guided(denoise: Callable, log_probability: Callable, reach: Callable, scale: float) -> Callable:
    """Classifier guidance (Dhariwal & Nichol 2021, arXiv 2105.05233, section 4): the gradient of scale log p(y | x_t)
    moves the estimate of x_0 by `reach` times itself.

    Algorithm 2 is the score of p(x_t) p(y | x_t)^scale: with the score s, x_0 = (x_t + sigma^2 s) / alpha, and reach is
    sigma^2 / alpha. Algorithm 1 moves the mean of a chain's step from t to s by its variance times the gradient, and
    reach is sigma_s^2 / alpha_s, of the level below: the same as steps grow small, much less where alpha is nearly 0.

    Args:
      denoise: (x, t) -> x_0 or (x_0, fraction).
      log_probability: (x, t) -> log p(y | x_t), [n].
      reach: t [n] -> number, broadcasting against x.
    """

    def guided(x: Array, t: Array):
        t = jnp.broadcast_to(t, (len(x),))
        gradient = jax.grad(lambda x: log_probability(x, t).sum())(x)
        found = denoise(x, t)
        x_0, *fraction = found if isinstance(found, tuple) else (found,)
        x_0 = x_0 + scale * reach(t) * gradient
        return (x_0, *fraction) if fraction else x_0

    return guided


def guided(
    apply: Callable,
    x: Array,
    t: Array,
    label: Array | None,
    null: int,
    scale: float,
    here: Array,
    rescale: float,
    channels: int = 0,
) -> tuple[Array, Array | None]:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598), in one pass of a batch twice as large.

    output = u + scale (c - u), of the outputs c with the label and u without. For every prediction it is the
    same as guiding the score, since both are linear in each other at a given x and t. (The paper's w is
    scale - 1.)

    Args:
      apply: (x, t, label) -> (output, anything that is taken from the labelled half).
      x, t, label: [n, ...], [n], [n].
      null: the label that says there is none.
      scale: 1 is no guidance.
      here: bool [n], where t is in the interval that guidance is for (Kynkaanniemi et al. 2024, arXiv 2404.07724).
      rescale: share, 0 to 1, by which an output is put back to the standard deviation of c (Lin et al. 2023,
        arXiv 2305.08891, eq. 15 and 16).
      channels: guide the first ones only, 0: all.
    """
    if scale == 1:
        return apply(x, t, label)
    both = jnp.concatenate([label, jnp.full_like(label, null)])
    output, rest = apply(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
    c, u = jnp.split(output, 2)
    guided = u + scale * (c - u)
    if rescale:
        axes = tuple(range(1, c.ndim))
        std = guided.std(axes, keepdims=True)
        ratio = jnp.where(std > 0, c.std(axes, keepdims=True) / jnp.where(std > 0, std, 1), 1)  # constant: new networks
        guided = guided * (rescale * ratio + 1 - rescale)
    if channels:
        guided = jnp.concatenate([guided[..., :channels], c[..., channels:]], -1)
    here = here.reshape(-1, *[1] * (c.ndim - 1))
    return jnp.where(here, guided, c), None if rest is None else jnp.split(rest, 2)[0]
