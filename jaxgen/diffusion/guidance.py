"""Guidance: samples that show their condition more than the data do."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.contract import apart, together
from jaxgen.diffusion import conditioning as conditions
from jaxgen.diffusion.conditioning import Conditioning, Values
from jaxgen.diffusion.processes import Process, coefficients, ends_at_noise, expanded, time_of
from jaxgen.diffusion.schedules import Schedule, posterior
from jaxgen.errors import UserError
from jaxgen.losses.likelihoods import cross_entropy
from jaxgen.options import TRACED, Fraction, NonNegative

Array = jax.Array

UNLIMITED = 1e9  # an upper end of guidance's interval that is none
# Largest sigma / alpha at which a classifier is evaluated where alpha falls to 0. What it knows of the class falls as
# fast as sigma / alpha rises, and the estimate of x_0 moves by as much from here on.
FARTHEST = 100.0


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How far samples are guided.

    Attributes:
      scale: s of classifier-free guidance, output without conditions + s (output - output without conditions) (Ho &
        Salimans 2022, arXiv 2207.12598; their w is s - 1); 1: none. The output without conditions lacks all that
        training drops.
      conditions, scales: guidance by each of these conditions with a scale of its own, in place of `scale`: output
        without conditions + sum of s_i (output with condition i alone - output without conditions) (Liu et al. 2022,
        arXiv 2206.01714, eq. 11); (): `scale` for all together.
      low, high: sigma / alpha between which there is guidance (Kynkaanniemi et al. 2024, arXiv 2404.07724); 1e9 or
        more: no upper end, also where alpha is 0.
      rescale: fraction by which the output's standard deviation is put back to that without guidance (Lin et al. 2023,
        arXiv 2305.08891, eq. 15 and 16).
      channels: number of channels that are guided, the first ones (DiT's released sampler: three of four); 0: all.
      classifier_scale: of the gradient of log p(label | x_t) by the noisy classifier of `config.stages.classifier`
        (Dhariwal & Nichol 2021); 0: none.
      distilled: scale that a network reads which was distilled from a guided one, of FLUX.1-dev (3.5 by default there);
        others have none.
    """

    scale: Annotated[float, TRACED] = 1.0
    conditions: tuple[str, ...] = ()
    scales: Annotated[tuple[float, ...], TRACED] = ()
    low: Annotated[float, TRACED] = 0.0
    high: Annotated[float, TRACED] = UNLIMITED
    rescale: Annotated[Fraction, TRACED] = 0.0
    channels: Annotated[int, '[0, inf)'] = 0
    classifier_scale: Annotated[NonNegative, TRACED] = 0.0
    distilled: Annotated[NonNegative, TRACED] = 1.0

    @property
    def off(self) -> bool:
        """Whether the network's own output is taken as it is."""
        return not (self.conditions or differs(self.scale, 1))

    @property
    def limited(self) -> bool:
        """Whether there may be an interval outside which the network's own output is taken; see `differs`."""
        return differs(self.low, 0) or not (isinstance(self.high, (int, float)) and self.high >= UNLIMITED)


OFF = Guidance()


def differs(number: float | Array, off: float) -> bool:
    """Whether a number, which may be traced, is on; a traced one is: see `settings_of`."""
    return isinstance(number, jax.Array) or number != off


def settings_of(guidance: Guidance) -> dict[str, Any]:
    """The numbers of guidance that are on, by their fields, to be put in with `dataclasses.replace`; the program of
    what is off has no place for them."""
    on = {} if guidance.off else {'low': guidance.low, 'high': guidance.high}
    if not guidance.off:
        on |= {'scales': guidance.scales} if guidance.conditions else {'scale': guidance.scale}
        on |= {'rescale': guidance.rescale} if guidance.rescale else {}
    return on | ({'classifier_scale': guidance.classifier_scale} if guidance.classifier_scale else {})


def check(guidance: Guidance, conditioning: Conditioning, channels: int) -> None:
    """Raises UserError where the network was not trained for this guidance.

    Args:
      channels: of x.
    """
    where, droppable = 'config.model.guidance', conditions.droppable(conditioning)
    if not guidance.off and not droppable:
        raise UserError(
            f'{where} needs a network that knows a condition and does without: a section of config.model.conditioning '
            'with a dropout of more than 0'
        )
    for name in guidance.conditions:
        if name not in droppable:
            raise UserError(f'{where}.conditions must be of {droppable}, which training drops; {name!r} is not')
    if len({*guidance.conditions}) < len(guidance.conditions):
        raise UserError(f'{where}.conditions must differ; they are {guidance.conditions}')
    if guidance.low > guidance.high:
        raise UserError(f'{where}.low {guidance.low} must be at most as much as high {guidance.high}')
    if len(guidance.conditions) != len(guidance.scales):
        raise UserError(
            f'{where}: scales must be one for each of the conditions; they are {guidance.scales} for '
            f'{guidance.conditions}'
        )
    if guidance.channels > channels:
        raise UserError(f'{where}.channels must be from 0 to {channels}; it is {guidance.channels}')


def in_interval(alpha: Array, sigma: Array, low: float, high: float) -> Array:
    """bool, where low <= sigma / alpha <= high, the interval that guidance is limited to (Kynkaanniemi et al. 2024,
    arXiv 2404.07724). At alpha 0 the ratio is infinite: in no interval but those without an upper end,
    UNLIMITED or more."""
    return (sigma >= low * alpha) & ((high >= UNLIMITED) | (sigma <= high * alpha))


def guided(
    apply: Callable,
    x: Array,
    t: Array,
    conditioning: Conditioning,
    values: Values,
    guidance: Guidance,
    active: Array | None,
) -> tuple[Array, Array | None]:
    """Classifier-free guidance, in one pass of a batch so many times as large as there are sets of conditions.

    For every prediction it is the same as guiding the score, since both are linear in each other at a given x and t.
    Where all examples have one t, as in a sampler's step, the batch is passed alone outside the interval: the network
    is twice in such a program, and each step runs one of them.

    Args:
      apply: (x, t, values) -> (output, anything else, which is taken of the examples with all conditions).
      x, t: [n, ...], [n].
      values: {condition: [n, ...]}.
      active: bool [n], where t is in the interval that guidance is for; bool [], for all of them; None: everywhere.
    """
    if guidance.off:
        return apply(x, t, values)
    if active is not None and active.ndim == 0:
        everywhere = functools.partial(guided, apply, x, t, conditioning, values, guidance, None)
        return jax.lax.cond(active, everywhere, lambda: apply(x, t, values))
    droppable = conditions.droppable(conditioning)
    sets = [values]  # with all conditions, with single ones, with none of those that may be absent
    for name in guidance.conditions:
        sets.append(conditions.without(conditioning, values, *(other for other in droppable if other != name)))
    sets.append(conditions.without(conditioning, values, *droppable))
    stacked = jax.tree.map(together, *sets)
    output, rest = apply(together(*[x] * len(sets)), jax.tree.map(together, *[t] * len(sets)), stacked)
    c, *singles, u = apart(output, len(sets))
    if singles:
        result = u + sum(s * (one - u) for s, one in zip(guidance.scales, singles, strict=True))
    else:
        result = u + guidance.scale * (c - u)
    if differs(guidance.rescale, 0):
        result = rescaled(result, c, guidance.rescale)
    if guidance.channels:
        result = jnp.concatenate([result[..., : guidance.channels], c[..., guidance.channels :]], -1)
    result = result if active is None else jnp.where(expanded(active, c), result, c)
    return result, None if rest is None else apart(rest, len(sets))[0]


def rescaled(guided: Array, conditional: Array, rescale: float) -> Array:
    """A guided output with its standard deviation put back by a fraction to that of the conditional one (Lin et al.
    2023, eq. 15 and 16), [n, ...]."""
    axes = tuple(range(1, guided.ndim))
    std = guided.std(axes, keepdims=True)
    # 0 where the output is constant, as that of a new network.
    ratio = jnp.where(std > 0, conditional.std(axes, keepdims=True) / jnp.where(std > 0, std, 1), 1)
    return guided * (rescale * ratio + 1 - rescale)


def classifier_guided(denoise: Callable, log_probability: Callable, scale_at: Callable, scale: float) -> Callable:
    """Classifier guidance (Dhariwal & Nichol 2021, arXiv 2105.05233, section 4): the gradient of scale log p(y | x_t)
    moves the estimate of x_0 by `scale_at` times itself.

    Algorithm 2 is the score of p(x_t) p(y | x_t)^scale: with the score s, x_0 = (x_t + sigma^2 s) / alpha, and scale_at
    is sigma^2 / alpha. Algorithm 1 moves the mean of a chain's step from t to s by its variance times the gradient; of
    the posterior's variance scale_at is sigma_s^2 / alpha_s, of the level below: the same as steps grow small, much
    less where alpha is nearly 0.

    Args:
      denoise: (x, t) -> x_0 or (x_0, fraction).
      log_probability: (x, t) -> log p(y | x_t), [n].
      scale_at: (t [n], fraction or None) -> number, broadcasting against x.
    """

    def guided(x: Array, t: Array):
        output = denoise(x, t)
        t = jax.tree.map(lambda value: jnp.broadcast_to(value, (len(x),)), t)
        gradient = jax.grad(lambda x: log_probability(x, t).sum())(x)
        x_0, *fraction = output if isinstance(output, tuple) else (output,)
        x_0 = x_0 + scale * scale_at(t, *fraction) * gradient
        return (x_0, *fraction) if fraction else x_0

    return guided


class Classifier(NamedTuple):
    """A noisy classifier bound to a process."""

    log_probability: Callable  # (x, t) -> log p(label | x_t), [n]
    scale_at: Callable  # (t [n], fraction or None) -> number or array like x, see `classifier_guided`


def bind_classifier(
    classify: Callable, label: Array, process: Process, shape: tuple[int, ...], moves: dict[str, Array] | None
) -> Classifier:
    """The classifier of a process and of labels.

    Args:
      classify: {'image': image + sigma eps, 'sigma': [n]} -> logits [n, classes].
      label: int32 [n].
      shape: of one x.
      moves: of an ancestral sampler, whose steps have means to move (algorithm 1), see `moves_of`; None: the score is
        moved (algorithm 2).
    """
    # Where alpha falls to 0 the estimate moves as it does at FARTHEST.
    least = 1 / FARTHEST if ends_at_noise(process) else 0.0

    def level(t: Array) -> tuple[Array, Array]:
        alpha, sigma = coefficients(process, t, jax.ShapeDtypeStruct((1, *shape), jnp.float32))
        return jnp.maximum(alpha, least * sigma), sigma

    def log_probability(x: Array, t: Array) -> Array:
        alpha, sigma = level(t)
        return -cross_entropy(classify({'image': x / alpha, 'sigma': (sigma / alpha).reshape(-1)}), label)

    def scale_at(t: Array, fraction: Array | None = None) -> Array:
        alpha, sigma = level(t)
        if moves is None:
            return sigma**2 / alpha
        i = jnp.searchsorted(jnp.asarray(moves['t']), time_of(t))
        least = jnp.asarray(moves['scale'])[i].reshape(alpha.shape)
        if 'growth' not in moves:
            return least
        return least * jnp.exp(jnp.asarray(moves['growth'])[i].reshape(alpha.shape) * fraction)

    return Classifier(log_probability, scale_at)


def moves_of(schedule: Schedule, variance: str) -> dict[str, np.ndarray]:
    """'t' and 'scale' of the levels of an ancestral sampler: the mean of its step from t to the level below moves by
    the step's variance times the gradient, and the estimate of x_0 by scale times it; with the variance 'learned' by
    e^(growth fraction) times as much.

    The variance of the last step, to the data, is that of `model_log_variance`, and 0 with 'fixed_small', as in
    Dhariwal & Nichol's code.
    """
    moves = posterior(schedule)
    small = np.append(moves.variance[1:2], moves.variance[1:]) if len(schedule.t) > 1 else moves.variance
    variances = {'fixed_small': moves.variance, 'fixed_large': np.append(small[:1], moves.forward[1:])}
    kind = np.int32 if schedule.t.dtype.kind == 'i' else np.float32
    columns = {'scale': variances.get(variance, small) / moves.x_0_weight}
    if variance == 'learned':
        columns['growth'] = np.log(moves.forward / np.where(small > 0, small, moves.forward))
    return {'t': schedule.t.astype(kind), **{name: x.astype(np.float32) for name, x in columns.items()}}
