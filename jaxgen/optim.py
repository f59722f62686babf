"""Optimisers from the config: one optax chain per network, and the moving average's decay.

Every family has these fields (`config.optim`), whatever it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax


class Optim(NamedTuple):
    """What a family needs to know about optimisation."""

    tx: Callable[..., optax.GradientTransformation]  # (network's name, its steps in one update = 1)
    accumulate: int  # parts that a batch is cut into for one gradient
    decay: Callable  # step -> decay of the weights' moving average


def learning_rate(steps: int, *, lr: float, schedule: str, warmup: int) -> optax.Schedule:
    """Learning rate by update: linear rise over `warmup` updates, then `schedule`.

    schedule: 'constant', or 'linear' / 'cosine' decay to 0 at update `steps`.
    """
    after = max(steps - warmup, 1)
    shapes = {
        'constant': lambda: optax.constant_schedule(lr),
        'linear': lambda: optax.linear_schedule(lr, 0.0, after),
        'cosine': lambda: optax.cosine_decay_schedule(lr, after),
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
        'rmsprop': lambda: optax.rmsprop(rate, decay=b2, eps=eps),
        'sgd': lambda: optax.sgd(rate, momentum=b1 or None),
    }
    chain = [optax.clip_by_global_norm(clip)] if clip else []
    return optax.chain(*chain, optimisers[name]())


def make_optim(steps: int, *, accumulate: int, ema: float, ema_warmup: bool, networks: dict, **common) -> Optim:
    """Optim from the fields of `config.optim`.

    Args:
      steps: updates of the whole run, for decaying schedules.
      ema: decay of the moving average of the weights, 0 for none.
      ema_warmup: decay min(ema, (1 + n) / (10 + n)) at update n, so that short runs average too.
      networks: {network: fields that differ from `common`}.
    """

    def tx(network: str, times: int = 1) -> optax.GradientTransformation:
        return transformation(steps, **{**common, **networks.get(network, {})}, times=times)

    def decay(step):
        n = jnp.asarray(step, jnp.float32)
        return jnp.minimum(ema, (1 + n) / (10 + n)) if ema_warmup else jnp.asarray(ema, jnp.float32)

    return Optim(tx, accumulate, decay)
