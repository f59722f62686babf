"""The loss of a diffusion model, and the denoiser that its network is.

With t drawn by `times`, x_t = alpha_t x_0 + sigma_t eps and the prediction's target a_t x_0 + b_t eps,

    L = E weight(t) |network(c_in x_t, c_noise(t)) - (a_t x_0 + b_t eps)|^2

Arrays are [n, ...] of any rank: vectors, images, clips, point clouds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.diffusion import parameterisations, processes
from jaxgen.diffusion.conditioning import Conditioning, Embeddings, Values, embed
from jaxgen.diffusion.guidance import Guidance, guided, in_interval
from jaxgen.diffusion.likelihood import bound_term
from jaxgen.diffusion.parameterisations import PREDICTIONS, WEIGHTINGS
from jaxgen.diffusion.processes import Process, coefficients, ends_at_noise
from jaxgen.diffusion.schedules import Schedule
from jaxgen.errors import UserError
from jaxgen.networks.denoisers import Network
from jaxgen.options import Component, Fraction, NonNegative, Positive, Section, own_fields

Array = jax.Array

# --- how t is drawn in training


def uniform(process: Process) -> Callable:
    """All times equally likely."""
    return lambda rng, n: processes.uniform_times(process, rng, n)


def lognormal(process: Process, *, mean: float = -1.2, std: Positive = 1.2) -> Callable:
    """log(sigma / alpha) from a normal distribution (Karras et al. 2022, table 1).

    Args:
      mean, std: of log(sigma / alpha).
    """
    return lambda rng, n: process.time(jnp.exp(mean + std * jax.random.normal(rng, (n,))))


def logit_normal(process: Process, *, mean: float = 0.0, std: Positive = 1.0) -> Callable:
    """log(t / (1 - t)) from a normal distribution (Esser et al. 2024, arXiv 2403.03206, section 3.1).

    Args:
      mean, std: of log(t / (1 - t)).
    """
    return lambda rng, n: jax.nn.sigmoid(mean + std * jax.random.normal(rng, (n,)))


TIMES = {'uniform': uniform, 'importance': None, 'lognormal': lognormal, 'logit_normal': logit_normal}
CHAIN_TIMES = ('uniform', 'importance')
CONTINUOUS_TIMES = ('uniform', 'lognormal', 'logit_normal')

# --- variances of the reverse steps


def learned(*, bound_weight: NonNegative = 0.001) -> float:
    """Between the largest and the smallest, by a second half of the network's outputs (Nichol & Dhariwal 2021, eq. 15).

    Args:
      bound_weight: of the variational bound in bits per dimension, added to the loss (eq. 16).
    """
    return bound_weight


VARIANCES = {'fixed': None, 'learned': learned}
# Predictions that leave x_0 known where alpha is 0.
AT_ALPHA_0 = ('v', 'x0', 'flow', 'edm')


class Formulation(NamedTuple):
    """A paper's loss: process, prediction, draw of t, weighting, variance."""

    process: Process
    c_noise: Callable  # t [n] to the input of the network's time embedding
    prediction: str
    data_std: float  # of 'edm'
    draw_times: Callable | None  # (rng, n) -> t [n]; None: by importance, see `importance`
    weighting: str
    gamma: float  # of 'min_snr'
    bound_weight: float | None  # None: the variance is not learned
    table: Schedule | None  # all levels of a chain
    augmentation: float

    @property
    def learned(self) -> bool:
        """Whether the network puts out a variance too."""
        return self.bound_weight is not None


def scaled(c_noise: Callable, scale: float, shift: float) -> Callable:
    """t -> scale c_noise(t) + shift."""
    return c_noise if (scale, shift) == (1.0, 0.0) else lambda t: scale * c_noise(t) + shift


def formulate(
    process: Process,
    logarithmic: bool = False,
    *,
    prediction: Annotated[Section, Component(PREDICTIONS)] = 'eps',
    times: Annotated[Section, Component(TIMES)] = 'uniform',
    weighting: Annotated[Section, Component(WEIGHTINGS)] = 'none',
    variance: Annotated[Section, Component(VARIANCES)] = 'fixed',
    augmentation: Fraction = 0.0,
    time_scale: float = 1.0,
    time_shift: float = 0.0,
) -> Formulation:
    """The formulation of complete sections.

    Args:
      logarithmic: the network's embedding of time is for logarithms.
      prediction: what the network puts out, see `parameterisations.coefficients`.
      times: how t is drawn in training: 'uniform'; 'importance', steps of a chain by the size of their loss, see
        `importance`; 'lognormal' (EDM); 'logit_normal' (SD3).
      weighting: of the squared error, see `parameterisations.weight`.
      variance: of a chain's reverse steps, 'fixed' | 'learned'.
      augmentation: probability of each change of the training images that the network is conditioned on, see
        jaxgen/augmentation/edm.py; 0: none.
      time_scale, time_shift: the network's time embedding reads time_scale c_noise(t) + time_shift: for published
        weights that count time otherwise (SiT's run from noise at 0 to the image at 1: -0.001 and 1).

    Raises:
      UserError: parts that do not go together.
    """
    is_learned, chain = variance['name'] == 'learned', process.steps > 0
    if weighting['name'] == 'bound' and not is_learned:
        raise UserError(
            "config.model.training.weighting = 'bound' is the variational bound with training.variance = 'learned'"
        )
    if is_learned and not chain:
        raise UserError("config.model.training.variance = 'learned' is that of a chain, and the process is none")
    allowed = CHAIN_TIMES if chain else CONTINUOUS_TIMES
    if times['name'] not in allowed:
        raise UserError(f'config.model.training.times must be one of {allowed} here; it is {times["name"]!r}')
    if ends_at_noise(process) and prediction['name'] not in AT_ALPHA_0:
        raise UserError(
            f'config.model.training.prediction = {prediction["name"]!r} divides by alpha, which is 0 at the last level '
            f'of the process: take one of {AT_ALPHA_0}'
        )
    name = prediction['name']
    draw = TIMES[times['name']]
    return Formulation(
        process=process,
        c_noise=scaled(lambda t: processes.network_time(process, t, name, logarithmic), time_scale, time_shift),
        prediction=name,
        data_std=prediction.get('data_std', 0.5),
        draw_times=draw and draw(process, **own_fields(times)),
        weighting=weighting['name'],
        gamma=weighting.get('gamma', 0.0),
        bound_weight=variance.get('bound_weight'),
        table=process.at(np.arange(process.steps)) if chain else None,
        augmentation=augmentation,
    )


def predict(
    formulation: Formulation, network: Network, params: Any, x_t: Array, t: Array, embeddings: Embeddings, **options
) -> tuple[Array, Array | None]:
    """The network's output at times or levels t [n], and where a learned variance lies between its bounds, [0, 1]."""
    f = formulation
    alpha, sigma = coefficients(f.process, t, x_t)
    scaled = parameterisations.input_scale(f.prediction, alpha, sigma, f.data_std) * x_t
    output = network.apply(params, scaled, f.c_noise(processes.time_of(t)), embeddings, **options)
    if not f.learned:
        return output, None
    output, fraction = jnp.split(output, 2, -1)
    return output, (fraction + 1) / 2


def errors(
    formulation: Formulation,
    network: Network,
    params: Any,
    x_0: Array,
    t: Array,
    eps: Array,
    embeddings: Embeddings,
    rngs: Any = None,
) -> tuple[Array, dict[str, Array]]:
    """The loss of each example, [n], and its parts for the logs, in training.

    Args:
      x_0, eps: [n, ...], data and noise.
      t: [n], or a level.
    """
    f = formulation
    alpha, sigma = coefficients(f.process, t, x_0)
    x_t = alpha * x_0 + sigma * eps
    output, fraction = predict(f, network, params, x_t, t, embeddings, train=True, rngs=rngs)
    target = parameterisations.target(f.prediction, x_0, eps, alpha, sigma, f.data_std)
    weight = parameterisations.weight(f.weighting, f.prediction, alpha, sigma, f.data_std, f.gamma)
    simple = (weight * jnp.square(output - target)).mean(tuple(range(1, x_0.ndim)))  # [n]
    if not f.learned:
        return simple, {}
    # The hybrid loss teaches the variance by the bound, and the bound's mean is held still.
    mean = output if f.weighting == 'bound' else jax.lax.stop_gradient(output)
    estimate = parameterisations.to_x_0(f.prediction, mean, x_t, alpha, sigma, f.data_std)
    terms = f.process.steps * bound_term(f.table, x_0, estimate, processes.time_of(t), fraction)  # [n]
    total = terms if f.weighting == 'bound' else simple + f.bound_weight * terms
    return total, {'simple': simple.mean(), 'bound': terms.mean()}


def denoiser(
    formulation: Formulation,
    network: Network,
    params: Any,
    conditioning: Conditioning,
    values: Values,
    guidance: Guidance,
    clip: bool,
) -> Callable:
    """The denoiser (x, t) -> estimate of x_0, and with a learned variance (estimate, fraction); t is [n], or one for
    all; a time, or a level in a Schedule.

    Args:
      values: {condition: [n, ...]}.
      clip: the estimate to [-1, 1].
    """
    f = formulation

    def apply(x: Array, t: Array, values: Values) -> tuple[Array, Array | None]:
        return predict(f, network, params, x, t, embed(conditioning, params, values, x))

    def denoise(x: Array, t: Array):
        active = None
        if guidance.limited:
            at = processes.level_at(f.process, t)
            active = in_interval(at.alpha, at.sigma, guidance.low, guidance.high)
        t = jax.tree.map(lambda value: jnp.broadcast_to(value, (len(x),)), t)
        output, fraction = guided(apply, x, t, conditioning, values, guidance, active)
        x_0 = parameterisations.to_x_0(f.prediction, output, x, *coefficients(f.process, t, x), f.data_std)
        x_0 = jnp.clip(x_0, -1, 1) if clip else x_0
        return (x_0, fraction) if f.learned else x_0

    return denoise
