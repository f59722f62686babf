"""Optimisers from the config: one optax chain per network, and the decay of the weights' moving average.

All families have these fields, `config.optim`.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgen.errors import UserError


class Optim(NamedTuple):
    """The optimisers of a family's networks, and their moving averages."""

    tx: Callable[..., optax.GradientTransformation]  # (network's name, its steps in one update = 1)
    accumulate: int  # parts of a batch whose gradients are averaged
    one_minus_decay: Callable  # step -> 1 - decay of the weights' moving average
    ema_std: tuple[float, ...] = ()  # widths of the power-function averages beside it


def learning_rate(
    steps: int,
    *,
    lr: float,
    schedule: str,
    warmup: int,
    plateau: float = 0.0,
    floor: float = 0.0,
    boundaries: tuple[int, ...] = (),
    decay_rate: float = 1.0,
    decay_every: int = 1,
) -> optax.Schedule:
    """Learning rate by update: linear warm-up over `warmup` updates, times the factor of `schedule`.

    With update n counted from 0, the factor is
      constant     1
      linear       1 until `plateau` of the updates after warm-up are done, then down to `floor` at update `steps`
      cosine       the same, along half a cosine
      half_linear  linear with a plateau of a half
      step         decay_rate to the power of the number of `boundaries` up to n
      exponential  decay_rate^(n / decay_every), at least `floor`
      rsqrt        (n / decay_every)^-1/2, at most 1 and at least `floor`
    `floor` is a fraction of lr. Constants are computed in float64; the factor has float32's relative precision at any
    n below 2^31 (an integer power of a float32 base would not: 0.999995^n is 3 % off at a million).
    """
    after = max(steps - warmup, 1)
    flat = after // 2 if schedule == 'half_linear' else plateau * after
    fall = max(after - flat, 1e-9)
    slope = float(np.log(decay_rate)) / decay_every if schedule == 'exponential' else 0.0

    def progress(n):
        """The fraction of the decay that is done: 0 at the plateau's end, 1 at update `steps`."""
        return jnp.clip((jnp.asarray(n - warmup, jnp.float32) - flat) / fall, 0, 1)

    def step(n):
        return decay_rate ** sum((jnp.asarray(n) >= b).astype(jnp.float32) for b in boundaries)

    def linear(n):
        return floor + (1 - floor) * (1 - progress(n))

    factors = {
        'constant': lambda n: 1.0,
        'linear': linear,
        'half_linear': linear,
        'cosine': lambda n: floor + (1 - floor) * (0.5 + 0.5 * jnp.cos(jnp.pi * progress(n))),
        'step': step if boundaries else lambda n: 1.0,
        'exponential': lambda n: jnp.maximum(jnp.exp(slope * jnp.asarray(n, jnp.float32)), floor),
        'rsqrt': lambda n: jnp.maximum(jax.lax.rsqrt(jnp.maximum(jnp.asarray(n, jnp.float32) / decay_every, 1)), floor),
    }
    factor = factors[schedule]
    if not warmup:
        return lambda n: jnp.asarray(lr * factor(n), jnp.float32)
    # The first update is made with lr / warmup, not 0, so that no update is lost.
    return lambda n: lr * jnp.minimum((jnp.asarray(n, jnp.float32) + 1) / warmup, 1) * factor(n)


def decay_mask(params, excluded: tuple[str, ...]):
    """Tree of bools like `params`: the weights to which weight decay applies.

    Args:
      excluded: patterns (fnmatch) of the others. A weight is one of these where any word of its path matches, or the
        path: 'bias' every bias, 'norm*' all of every module of that name, 'blocks/table' the one.

    Raises:
      UserError: a pattern matches none.
    """
    paths = [[str(getattr(key, 'key', key)) for key in path] for path, _ in jax.tree.leaves_with_path(params)]
    leaves = sorted({words[-1] for words in paths})
    paths = [[*words, '/'.join(words)] for words in paths]
    for pattern in excluded:
        if not any(fnmatch.fnmatchcase(word, pattern) for words in paths for word in words):
            raise UserError(f'config.optim.no_decay: no weight matches {pattern!r}; their names end in {leaves}')
    keep = [not any(fnmatch.fnmatchcase(word, p) for word in words for p in excluded) for words in paths]
    return jax.tree.unflatten(jax.tree.structure(params), keep)


def weight_decay_by_update(steps: int, start: float, end: float):
    """Weight decay by update: half a cosine from `start` to `end` at the last one (VAR's released code)."""

    def value(n):
        progress = jnp.clip(jnp.asarray(n, jnp.float32) / max(steps - 1, 1), 0, 1)
        return end + (start - end) * (0.5 + 0.5 * jnp.cos(jnp.pi * progress))

    return value


def transformation(
    steps: int,
    *,
    name: str,
    lr: float,
    schedule: str,
    warmup: int,
    plateau: float,
    floor: float,
    boundaries: tuple[int, ...],
    decay_rate: float,
    decay_every: int,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    weight_decay_schedule: str,
    weight_decay_end: float,
    no_decay: tuple[str, ...],
    l2: float,
    clip: float,
    normalise: bool,
    times: int = 1,
) -> optax.GradientTransformation:
    """The optax chain of one network: clip by global norm (0: off), l2 (0: off), each array's gradient divided by its
    norm (`normalise`), then the optimiser.

    times: steps of this optimiser within one update. Schedules run by updates all the same:
    a critic of five steps per update would else reach the schedule's end at a fifth of the run.
    """
    rate_by_update = learning_rate(
        steps,
        lr=lr,
        schedule=schedule,
        warmup=warmup,
        plateau=plateau,
        floor=floor,
        boundaries=boundaries,
        decay_rate=decay_rate,
        decay_every=decay_every,
    )
    decay_by_update = weight_decay_by_update(steps, weight_decay, weight_decay_end)

    def rate(count):
        return rate_by_update(count // times)

    scheduled = weight_decay_schedule != 'constant'
    decay = (lambda count: decay_by_update(count // times)) if scheduled else weight_decay
    mask = functools.partial(decay_mask, excluded=no_decay) if no_decay else None

    optimisers = {
        'adam': lambda: optax.adam(rate, b1, b2, eps),
        'adamax': lambda: optax.adamax(rate, b1, b2, eps),
        'adamw': lambda: optax.adamw(rate, b1, b2, eps, weight_decay=decay, mask=mask),
        'radam': lambda: optax.radam(rate, b1, b2, eps),
        'rmsprop': lambda: optax.rmsprop(rate, decay=b2, eps=eps, eps_in_sqrt=False),
        'sgd': lambda: optax.sgd(rate, momentum=b1 or None),
    }
    chain = [optax.clip_by_global_norm(clip)] if clip else []
    chain += [optax.add_decayed_weights(l2, mask)] if l2 else []
    chain += [optax.stateless(lambda g, _: jax.tree.map(unit_norm, g))] if normalise else []
    return optax.chain(*chain, optimisers[name]())


def unit_norm(g):
    """An array divided by its norm, 0 where it is 0: the gradients of Adam in the code of Tomczak & Welling."""
    return g / (jnp.linalg.norm(g.reshape(-1)) + 1e-7)


def exponent(std: float) -> float:
    """gamma of the power-function average whose profile over the run, t^gamma, has this standard deviation as a
    fraction of the run: std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (Karras et al. 2024, arXiv 2312.02696, eq.
    126).

    Args:
      std: above 0, at most 12^-0.5 = 0.288, the uniform average.
    """
    return float(np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real.max())


def power_decay(step, std: float):
    """Decay of a power-function average at update `step`, counted from 0 (Karras et al. 2024, eq. 127): independent of
    the initial weights, and of the same width relative to the run whatever its length."""
    return jnp.exp((exponent(std) + 1) * jnp.log1p(-1 / (jnp.asarray(step, jnp.float32) + 1)))


def power_one_minus_decay(step, std: float):
    """1 - power_decay, with float32's relative precision at any step: late in a run the decay itself is 1 to float32's
    rounding, and the average would be constant."""
    return -jnp.expm1((exponent(std) + 1) * jnp.log1p(-1 / (jnp.asarray(step, jnp.float32) + 1)))


def post_hoc(steps: np.ndarray, stds: np.ndarray, step: int, std: float) -> np.ndarray:
    """Coefficients [k] of the linear combination of k saved averages that is nearest to the average of width `std` at
    `step` (Karras et al. 2024, section 3.2 and appendix C): least squares between profiles over time.

    Args:
      steps: [k], updates done when each was saved.
      stds: [k], the width of each.
    """

    def product(t, a, u, b):
        """Integral of two profiles (a + 1) x^a / t^(a + 1) up to t, and the same with b and u."""
        shorter, longer = np.minimum(t, u), np.maximum(t, u)
        inner = np.where(t < u, b, a)  # the exponent of the longer one
        return (a + 1) * (b + 1) / (a + b + 1) * (shorter / longer) ** inner / longer

    t, gamma = np.asarray(steps, np.float64), np.array([exponent(value) for value in stds])
    between = product(t[:, None], gamma[:, None], t[None], gamma[None])
    target = product(t, gamma, np.float64(step), exponent(std))
    coefficients = np.linalg.lstsq(between, target, rcond=1e-12)[0]
    return coefficients / coefficients.sum()  # a constant's average is that constant


def halflife_decay(step, batch: int, halflife: float, rampup: float):
    """Decay of a moving average at update `step`, counted from 0, whose half-life is that many images, or `rampup`
    times the images of all updates before where these are fewer (0: no ramp-up): EDM and StyleGAN2 (Karras et al.).

    With a ramp-up it is 0 at the first update, so that the average does not depend on the initial weights.
    """
    images = jnp.asarray(step, jnp.float32) * batch * rampup if rampup else halflife
    return 0.5 ** (batch / jnp.maximum(jnp.minimum(images, halflife), 1e-8))


def halflife_one_minus_decay(step, batch: int, halflife: float, rampup: float):
    """1 - halflife_decay, with float32's relative precision however long the half-life."""
    images = jnp.asarray(step, jnp.float32) * batch * rampup if rampup else halflife
    return -jnp.expm1(-np.log(2) * batch / jnp.maximum(jnp.minimum(images, halflife), 1e-8))


def initial_fraction(
    steps: int, *, ema: float, ema_warmup: bool, ema_halflife: float, ema_rampup: float, batch: int, **_
) -> float:
    """Fraction of the initial weights in their moving average after so many updates: the product of the decays, in
    float64. The arguments are those of `make_optim`."""
    if ema_halflife:
        return float(steps == 0) if ema_rampup else 0.5 ** (steps * batch / ema_halflife)
    if not ema:
        return float(steps == 0)
    rising = 0
    if ema_warmup:  # (2 + n) / (11 + n) is below ema until n is (11 ema - 2) / (1 - ema)
        rising = steps if ema >= 1 else min(steps, max(0, int(np.ceil((11 * ema - 2) / (1 - ema)))))
    # The product over n < k of (2 + n) / (11 + n) telescopes to 10! / (k + 2) ... (k + 10).
    return float(np.prod(np.arange(2, 11) / (rising + np.arange(2, 11))) * np.float64(ema) ** (steps - rising))


def steps_within_update(optim: Optim, times: int) -> Optim:
    """`optim` for a network with `times` optimiser steps in each update: its learning rates follow the count of
    updates, not that of steps (a discriminator of five steps would else end its schedule at a fifth of the run)."""
    return optim._replace(tx=lambda name, steps=1: optim.tx(name, times * steps))


def make_optim(
    steps: int,
    *,
    accumulate: int,
    ema: float,
    ema_warmup: bool,
    networks: dict,
    ema_std: tuple = (),
    ema_halflife: float = 0.0,
    ema_rampup: float = 0.0,
    batch: int = 1,
    **common,
) -> Optim:
    """Optim from the fields of `config.optim`.

    Args:
      steps: updates of the whole run, for decaying schedules.
      ema: decay of the moving average of the weights, 0 for none.
      ema_warmup: decay min(ema, (1 + n) / (10 + n)) at update n, so that short runs average too. n counts from 1, as in
        the release of score SDEs and in latent diffusion's.
      ema_std: widths of power-function averages beside it, of which one of any width is computed afterwards.
      ema_halflife: in images, in place of `ema`; 0: none. `ema_rampup`: see `halflife_decay`.
      batch: images of one update, for the half-life.
      networks: {network: fields that differ from `common`}.
    """

    def tx(network: str, times: int = 1) -> optax.GradientTransformation:
        return transformation(steps, **{**common, **networks.get(network, {})}, times=times)

    def one_minus_decay(step):
        if ema_halflife:
            return halflife_one_minus_decay(step, batch, ema_halflife, ema_rampup)
        n = jnp.asarray(step, jnp.float32) + 1
        return jnp.maximum(1 - ema, 9 / (10 + n)) if ema_warmup else jnp.asarray(1 - ema, jnp.float32)

    return Optim(tx, accumulate, one_minus_decay, tuple(ema_std))
