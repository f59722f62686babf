"""Optimisers from the config: one optax chain per network, and the moving average's decay.

Every family has these fields (`config.optim`), whatever it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax


class Optim(NamedTuple):
    """What a family needs to know about optimisation."""

    tx: Callable[..., optax.GradientTransformation]  # (network's name, its steps in one update = 1)
    accumulate: int  # parts that a batch is cut into for one gradient
    decay: Callable  # step -> decay of the weights' moving average
    ema_std: tuple[float, ...] = ()  # widths of the power-function averages beside it


def learning_rate(steps: int, *, lr: float, schedule: str, warmup: int) -> optax.Schedule:
    """Learning rate by update: linear rise over `warmup` updates, then `schedule`.

    schedule: 'constant', or 'linear' / 'cosine' decay to 0 at update `steps`; 'half_linear' decays in the second half
      of the updates only.
    """
    after = max(steps - warmup, 1)
    shapes = {
        'constant': lambda: optax.constant_schedule(lr),
        'linear': lambda: optax.linear_schedule(lr, 0.0, after),
        'cosine': lambda: optax.cosine_decay_schedule(lr, after),
        'half_linear': lambda: optax.linear_schedule(lr, 0.0, after - after // 2, after // 2),
    }
    if not warmup:
        return shapes[schedule]()
    # The first update is made with lr / warmup, not 0, so that no update is lost.
    rise = optax.linear_schedule(lr / warmup, lr, max(warmup - 1, 1))
    return optax.join_schedules([rise, shapes[schedule]()], [warmup])


def transformation(
    steps: int,
    *,
    name: str,
    lr: float,
    schedule: str,
    warmup: int,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip: float,
    times: int = 1,
) -> optax.GradientTransformation:
    """The optax chain of one network: clip by global norm (0: off), then the optimiser.

    times: steps of this optimiser within one update. The schedule runs by updates all the same:
    a critic of five steps per update would else reach the schedule's end at a fifth of the run.
    """
    schedule_by_update = learning_rate(steps, lr=lr, schedule=schedule, warmup=warmup)

    def rate(count):
        return schedule_by_update(count // times)

    optimisers = {
        'adam': lambda: optax.adam(rate, b1, b2, eps),
        'adamw': lambda: optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay),
        'radam': lambda: optax.radam(rate, b1, b2, eps),
        'rmsprop': lambda: optax.rmsprop(rate, decay=b2, eps=eps, eps_in_sqrt=False),
        'sgd': lambda: optax.sgd(rate, momentum=b1 or None),
    }
    chain = [optax.clip_by_global_norm(clip)] if clip else []
    return optax.chain(*chain, optimisers[name]())


def exponent(std: float) -> float:
    """gamma of the average whose weights' profile over the run, t^gamma, has this standard deviation as a share of the
    run (Karras et al. 2024, arXiv 2312.02696, eq. 126): std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    Args:
      std: above 0, at most 12^-0.5 = 0.288, an even average of all.
    """
    return float(np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real.max())


def power_decay(step, std: float):
    """Decay of a power-function average at update `step`, counted from 0 (Karras et al. 2024, eq. 127): no memory of
    the weights at the start, and the same share of the run whatever its length."""
    return (1 - 1 / (jnp.asarray(step, jnp.float32) + 1)) ** (exponent(std) + 1)


def post_hoc(steps: np.ndarray, stds: np.ndarray, step: int, std: float) -> np.ndarray:
    """Weights [k] of k averages whose sum comes nearest to the average of width `std` at `step` (Karras et al. 2024,
    section 3.2 and appendix C): least squares between profiles over time.

    Args:
      steps: [k], updates done when each was saved.
      stds: [k], the width of each.
    """

    def product(t, a, u, b):
        """Integral of two profiles (a + 1) x^a / t^(a + 1) up to t, and the same with b and u."""
        least, most = np.minimum(t, u), np.maximum(t, u)
        inner = np.where(t < u, b, a)  # the exponent of the longer one
        return (a + 1) * (b + 1) / (a + b + 1) * (least / most) ** inner / most

    t, gamma = np.asarray(steps, np.float64), np.array([exponent(value) for value in stds])
    between = product(t[:, None], gamma[:, None], t[None], gamma[None])
    wanted = product(t, gamma, np.float64(step), exponent(std))
    shares = np.linalg.lstsq(between, wanted, rcond=1e-12)[0]
    return shares / shares.sum()  # a constant's average is that constant


def make_optim(
    steps: int, *, accumulate: int, ema: float, ema_warmup: bool, networks: dict, ema_std: tuple = (), **common
) -> Optim:
    """Optim from the fields of `config.optim`.

    Args:
      steps: updates of the whole run, for decaying schedules.
      ema: decay of the moving average of the weights, 0 for none.
      ema_warmup: decay min(ema, (1 + n) / (10 + n)) at update n, so that short runs average too.
      ema_std: widths of power-function averages kept beside it, from which one of any width is made afterwards.
      networks: {network: fields that differ from `common`}.
    """

    def tx(network: str, times: int = 1) -> optax.GradientTransformation:
        return transformation(steps, **{**common, **networks.get(network, {})}, times=times)

    def decay(step):
        n = jnp.asarray(step, jnp.float32)
        return jnp.minimum(ema, (1 + n) / (10 + n)) if ema_warmup else jnp.asarray(ema, jnp.float32)

    return Optim(tx, accumulate, decay, tuple(ema_std))
