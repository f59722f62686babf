"""Diffusion: every model that turns noise into images by removing it (start with `jaxgen/diffusion/__init__.py`).

A process turns an image x_0 into noise, x_t = alpha_t x_0 + sigma_t eps, and a network learns to tell, from
x_t and t, some combination of x_0 and eps. With t drawn by `times`,

    L = E weight(t) |network(x_t, t) - (a_t x_0 + b_t eps)|^2

and what is combined, how t is drawn and how it is weighted tells one paper from another:

    system                               process         prediction  times          sampler
    DDPM (Ho et al. 2020)                linear          eps         uniform        ancestral
    DDIM (Song et al. 2021a)             linear          eps         uniform        ddim
    Improved DDPM (Nichol & Dhariwal 21) cosine          eps         uniform        ancestral, learned variance
    score SDEs (Song et al. 2021b)       vp, sub_vp, ve  eps, score  uniform        predictor_corrector
    progressive distillation's v         any             v           uniform        ddim
    EDM (Karras et al. 2022)             ve              edm         lognormal      heun
    flow matching (Lipman et al. 2022)   flow            flow        uniform        euler, heun
    SD3's recipe (Esser et al. 2024)     flow            flow        logit_normal   euler

Any sampler goes with any of them. Measured is the variational bound of a chain (Ho et al. 2020, eq. 5) or the
likelihood by the probability-flow ODE of a process in continuous time (Song et al. 2021b, section 4.3), both in
bits per dimension.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.contract import Context, Family, advance, example_keys, gradient_step, new_state, normal
from jaxgen.diffusion import parameterisations, processes, samplers
from jaxgen.diffusion.guidance import guided
from jaxgen.diffusion.likelihood import bound_term, ode_likelihood, variational_bound
from jaxgen.errors import UserError
from jaxgen.networks.adm import ADMUNet
from jaxgen.networks.dit import DiT
from jaxgen.networks.ncsnpp import EMBEDDINGS, PYRAMIDS, RESAMPLINGS, NCSNpp
from jaxgen.networks.unet import UNet

Array = jax.Array

NETWORKS = {'unet': UNet, 'adm': ADMUNet, 'ncsnpp': NCSNpp, 'dit': DiT}
# Attributes of the networks that others decide: the data, the prediction, the shared machinery.
GIVEN = ('classes', 'out_channels', 'augment', 'remat', 'dtype', 'parent', 'name')
# {network: {field that a config sets: default}}
FIELDS = {
    name: {f.name: f.default for f in dataclasses.fields(network) if f.name not in GIVEN}
    for name, network in NETWORKS.items()
}
SPACINGS = ('uniform', 'trailing', 'respaced', 'quadratic', 'karras')
SAMPLERS = {
    'ancestral': samplers.ancestral,
    'ddim': samplers.ddim,
    'euler': samplers.euler,
    'euler_ancestral': samplers.euler_ancestral,
    'heun': samplers.heun,
    'dpm_solver_pp': samplers.dpm_solver_pp,
    'dpm_solver_pp_sde': functools.partial(samplers.dpm_solver_pp, sde=True),
    'unipc': samplers.unipc,
    'predictor_corrector': samplers.predictor_corrector,
}


def check_network(network: str, section: dict, image: tuple[int, int, int]) -> int:
    """What the image's height and width must be multiples of.

    Raises:
      UserError: a field of the network that cannot work with the image.
    """
    where, channels, blocks = f'config.model.{network}', section['channels'], section['blocks']
    if channels < 4 or channels % 2 or blocks < 1:
        raise UserError(f'{where}: channels {channels} must be even and at least 4, blocks {blocks} at least 1')
    if not 0 <= section['dropout'] < 1:
        raise UserError(f'{where}.dropout must be in [0, 1); it is {section["dropout"]}')
    if network == 'dit':
        divisor, heads = section['patch'], section['heads']
        if divisor < 1 or heads < 1 or channels % heads or channels % 4:
            raise UserError(
                f'{where}: patch {divisor} and heads {heads} must be at least 1, and channels {channels} a multiple of '
                'heads and of 4'
            )
    else:
        multipliers = section['multipliers']
        if not multipliers or min(multipliers) <= 0:
            raise UserError(f'{where}.multipliers must be one or more numbers above 0; they are {multipliers}')
        divisor = 2 ** (len(multipliers) - 1)
    for size in image[:2]:
        if size % divisor:
            raise UserError(
                f'images of {size} pixels do not fit {where}: config.data.size must be a multiple of {divisor}'
            )
    sizes = [image[0] >> level for level in range(len(section.get('multipliers', ())))]
    for size in section.get('attention', ()):
        if size not in sizes:
            raise UserError(f'{where}.attention: no level of the network has {size} pixels, only {sizes}')
    if network == 'ncsnpp':
        for name, allowed in {'embedding': EMBEDDINGS, 'resampling': RESAMPLINGS, 'pyramid': PYRAMIDS}.items():
            if section[name] not in allowed:
                raise UserError(f'{where}.{name} must be one of {allowed}; it is {section[name]!r}')
    if network == 'adm':
        part = section['head_channels'] or section['heads']
        for size, multiplier in zip(sizes, section['multipliers'], strict=True):
            if (size in section['attention'] or size == sizes[-1]) and int(channels * multiplier) % part:
                raise UserError(
                    f'{where}: {int(channels * multiplier)} channels at {size} pixels, where there is attention, must '
                    f'be a multiple of head_channels, or else of heads: {part}'
                )
    return divisor


def build(
    context: Context,
    *,
    network: str = 'unet',
    unet: dict = FIELDS['unet'],
    adm: dict = FIELDS['adm'],
    ncsnpp: dict = FIELDS['ncsnpp'],
    dit: dict = FIELDS['dit'],
    conditional: bool = False,
    label_dropout: float = 0.0,
    process: str = 'linear',
    timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    zero_terminal: bool = False,
    sigma_min: float = 0.01,
    sigma_max: float = 50.0,
    prediction: str = 'eps',
    data_std: float = 0.5,
    times: str = 'uniform',
    time_mean: float = -1.2,
    time_std: float = 1.2,
    weighting: str = 'none',
    gamma: float = 5.0,
    variance: str = 'fixed_large',
    bound_weight: float = 0.001,
    sampler: str = 'ancestral',
    sample_steps: int = 0,
    spacing: str = 'uniform',
    shift: float = 1.0,
    clip: bool = True,
    eta: float = 0.0,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = 1e9,
    s_noise: float = 1.0,
    snr: float = 0.16,
    guidance: float = 1.0,
    guidance_from: float = 0.0,
    guidance_to: float = 1e9,
    guidance_rescale: float = 0.0,
    bound_steps: int = 0,
    ode_steps: int = 50,
) -> Family:
    """Args:
      network: 'unet' | 'adm' | 'ncsnpp' | 'dit'; the section of that name says how it looks, see `networks`.
      conditional: tell the network the class, `batch['label']`.
      label_dropout: share of the labels that are left out in training, so that `guidance` can be used.
      process, timesteps, beta_start, beta_end, zero_terminal, sigma_min, sigma_max: see `processes.make`.
      prediction, data_std: what the network puts out, see `parameterisations.coefficients`.
      times: how t is drawn in training: 'uniform'; 'lognormal', log(sigma / alpha) with mean `time_mean` and
        standard deviation `time_std` (EDM); 'logit_normal', log(t / (1 - t)) with them (SD3).
      weighting, gamma: of the error, see `parameterisations.weight`.
      variance: of a chain's reverse steps, 'fixed_large' (beta) | 'fixed_small' (the posterior's) | 'learned',
        between the two, learned by `bound_weight` times the variational bound in bits per dimension, added to the
        loss (Nichol & Dhariwal 2021, eq. 16).
      sampler: one of SAMPLERS; `samplers` says what each is.
      sample_steps: levels that it visits, 0: all T of a chain, 100 in continuous time.
      spacing: which levels. Of a chain 'uniform' | 'trailing' (from the last one down) | 'respaced' (both ends) |
        'quadratic'; in continuous time 'uniform'; of both 'karras', by sigma / alpha to the power 1/7 (EDM, eq. 5).
      shift: of 'flow' in sampling: t becomes shift t / (1 + (shift - 1) t) (Esser et al. 2024, eq. 23).
      clip: estimates of x_0 to [-1, 1] at every step.
      eta: randomness of 'ddim' and 'euler_ancestral', from 0, none, to 1.
      s_churn, s_min, s_max, s_noise: of 'heun'; snr: of 'predictor_corrector'.
      guidance: 1: none; s: label-free output + s (output - label-free output) (Ho & Salimans 2022), where
        guidance_from <= sigma / alpha <= guidance_to (Kynkaanniemi et al. 2024); guidance_rescale: share by which
        its standard deviation is put back to that without guidance (Lin et al. 2023, eq. 16).
      bound_steps: terms of a chain's variational bound that `evaluate` computes, of the T - 1 between the
        first and the last; drawn evenly, the mean is right. 0: all.
      ode_steps: of the likelihood in continuous time.

    Raises:
      UserError: a value out of range, an image that cannot be halved often enough, no labels.
    """
    choices = {
        'network': (network, tuple(NETWORKS)),
        'process': (process, processes.PROCESSES),
        'prediction': (prediction, parameterisations.PREDICTIONS),
        'times': (times, ('uniform', 'lognormal', 'logit_normal')),
        'weighting': (weighting, parameterisations.WEIGHTINGS),
        'variance': (variance, ('fixed_large', 'fixed_small', 'learned')),
        'sampler': (sampler, tuple(SAMPLERS)),
        'spacing': (spacing, SPACINGS),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise UserError(f'config.model.{name} must be one of {allowed}; it is {value!r}')
    if timesteps < 2 or not 0 < beta_start <= beta_end < 1 or not 0 < sigma_min < sigma_max:
        raise UserError(
            f'config.model: timesteps {timesteps} must be at least 2, 0 < beta_start {beta_start} <= '
            f'beta_end {beta_end} < 1, 0 < sigma_min {sigma_min} < sigma_max {sigma_max}'
        )
    if conditional and not context.classes:
        raise UserError(
            "config.model.conditional needs labels: take a data set with classes, with 'label' in config.data.features"
        )
    if not 0 <= eta <= 1 or not 0 <= label_dropout < 1 or not 0 <= guidance_rescale <= 1:
        raise UserError(
            f'config.model: eta {eta} and guidance_rescale {guidance_rescale} must be in [0, 1], '
            f'label_dropout {label_dropout} in [0, 1)'
        )
    if (label_dropout or guidance != 1) and not (conditional and label_dropout):
        raise UserError(
            'config.model: guidance needs a network that knows the labels and does without: conditional, '
            f'and label_dropout more than 0; they are {conditional} and {label_dropout}'
        )

    way = processes.make(
        process, timesteps=timesteps, beta_start=beta_start, beta_end=beta_end, sigma_min=sigma_min,
        sigma_max=sigma_max, zero_terminal=zero_terminal,
    )  # fmt: skip
    learned = variance == 'learned'
    if not way.steps and (learned or (sampler == 'ancestral' and variance != 'fixed_small')):
        raise UserError(
            f"config.model.variance = {variance!r} is that of a chain, and process {process!r} is none: 'fixed_small'"
        )
    if (not way.steps and spacing not in ('uniform', 'karras')) or (way.steps and times != 'uniform'):
        raise UserError(f'config.model: spacing {spacing!r} and times {times!r} do not go with process {process!r}')
    if spacing == 'karras' and (process == 'flow' or zero_terminal):
        raise UserError("config.model.spacing = 'karras' is by sigma / alpha, and the last level here has alpha = 0")
    if process == 'flow' and sampler == 'predictor_corrector':
        raise UserError("config.model.sampler = 'predictor_corrector' divides by alpha, which is 0 where a flow ends")
    if zero_terminal and (prediction not in ('v', 'x0') or sampler not in ('ancestral', 'ddim')):
        raise UserError(
            "config.model.zero_terminal needs prediction 'v' or 'x0', and sampler 'ancestral' or 'ddim': "
            'at the last level there is no image to divide by'
        )
    if not 0 <= sample_steps <= (way.steps or sample_steps):
        raise UserError(f'config.model.sample_steps must be from 0 to timesteps {timesteps}; it is {sample_steps}')
    if not 0 <= bound_steps < timesteps:
        raise UserError(f'config.model.bound_steps must be from 0 to {timesteps - 1}; it is {bound_steps}')

    section = {**FIELDS[network], **{'unet': unet, 'adm': adm, 'ncsnpp': ncsnpp, 'dit': dit}[network]}
    channels = context.image[2]
    divisor = check_network(network, section, context.image)
    # One class more where labels are left out: it stands for no label.
    classes = context.classes + bool(label_dropout) if conditional else 0
    net = NETWORKS[network](
        **section,
        classes=classes,
        out_channels=2 * channels if learned else channels,
        remat=context.remat,
        dtype=context.dtype,
    )
    grid = processes.levels(way, sample_steps, spacing, shift)
    table = way.at(np.arange(way.steps)) if way.steps else None
    draw_options = {
        'ancestral': {'variance': variance},
        'ddim': {'eta': eta},
        'euler_ancestral': {'eta': eta},
        'heun': dict(
            straight=process == 'flow',
            s_churn=s_churn,
            s_min=s_min,
            s_max=s_max,
            s_noise=s_noise,
            level=lambda ratio: way.at(way.time(ratio)),
        ),
        'predictor_corrector': {'snr': snr},
    }
    draw = functools.partial(SAMPLERS[sampler], **draw_options.get(sampler, {}))

    def level(t: Array):
        """alpha and sigma at times t [n], [n, 1, 1, 1] each."""
        at = way.at(t)
        return at.alpha[:, None, None, None], at.sigma[:, None, None, None]

    def apply(params, x, t, label, train, rngs=None):
        """The network's output, and with a learned variance where it lies between its bounds, [0, 1]."""
        scale = parameterisations.input_scale(prediction, *level(t), data_std)
        told = 0.25 * jnp.log(way.at(t).sigma / way.at(t).alpha) if prediction == 'edm' else way.told(t)
        output = net.apply({'params': params['denoiser']}, scale * x, told, label, train=train, rngs=rngs)
        return (output[..., :channels], (output[..., channels:] + 1) / 2) if learned else (output, None)

    def denoiser(params, batch, scale: float):
        """(x, t) -> estimate of x_0, and with a learned variance (estimate, fraction). scale: of guidance."""

        def denoise(x, t):
            t = jnp.broadcast_to(t, (len(x),))
            at = way.at(t)
            here = (guidance_from * at.alpha <= at.sigma) & (at.sigma <= guidance_to * at.alpha)
            one = functools.partial(apply, params, train=False)
            output, fraction = guided(one, x, t, batch.get('label'), context.classes, scale, here, guidance_rescale)
            x_0 = parameterisations.to_x_0(prediction, output, x, *level(t), data_std)
            x_0 = jnp.clip(x_0, -1, 1) if clip else x_0
            return (x_0, fraction) if learned else x_0

        return denoise

    def draw_times(rng, n: int) -> Array:
        if way.steps:
            return jax.random.randint(rng, (n,), 0, way.steps)
        if times == 'uniform':
            return jax.random.uniform(rng, (n,), minval=way.start, maxval=way.end)
        number = time_mean + time_std * jax.random.normal(rng, (n,))
        return way.time(jnp.exp(number)) if times == 'lognormal' else jax.nn.sigmoid(number)

    def loss(params, frozen, batch, rng):
        rng_t, rng_noise, rng_dropout, rng_label = jax.random.split(rng, 4)
        x_0, label = batch['image'], batch.get('label')
        t = draw_times(rng_t, len(x_0))
        eps = jax.random.normal(rng_noise, x_0.shape)
        alpha, sigma = level(t)
        x_t = alpha * x_0 + sigma * eps
        if label_dropout:
            label = jnp.where(jax.random.bernoulli(rng_label, label_dropout, t.shape), context.classes, label)
        output, fraction = apply(params, x_t, t, label, True, {'dropout': rng_dropout})
        wanted = parameterisations.target(prediction, x_0, eps, alpha, sigma, data_std)
        weight = parameterisations.weight(weighting, prediction, alpha, sigma, data_std, gamma)
        value = (weight * jnp.square(output - wanted)).mean()
        if not learned:
            return value, {'loss': value}
        # The bound teaches the variance only: the mean is held still.
        estimate = parameterisations.to_x_0(prediction, jax.lax.stop_gradient(output), x_t, alpha, sigma, data_std)
        bound = bound_term(table, x_0, estimate, t, fraction).mean() * way.steps
        total = value + bound_weight * bound
        return total, {'loss': total, 'simple': value, 'bound': bound}

    step = gradient_step(loss, context.optim, 'denoiser')

    def init(rng, batch, frozen):
        label = jnp.zeros(1, jnp.int32) if classes else None
        variables = net.init(rng, jnp.zeros((1, *context.image)), jnp.zeros(1), label, train=False)
        return new_state({'denoiser': variables['params']}, context.optim)

    def update(state, frozen, batch, rng):
        state, logs = step(state, frozen, batch, rng)
        return advance(state, context.optim), logs

    def sample(state, frozen, batch, rng):
        rng_start, rng_steps = jax.random.split(rng)
        x = grid.sigma[-1] * normal(example_keys(rng_start, batch), context.image)
        x = draw(denoiser(state.ema, batch, guidance), x, grid, example_keys(rng_steps, batch))
        return jnp.clip(x, -1, 1)

    def evaluate(state, frozen, batch, rng):
        keys = example_keys(rng, batch)
        denoise = denoiser(state.ema, batch, 1.0)
        if way.steps:
            return variational_bound(denoise, batch['image'], table, variance, keys, bound_steps)
        return ode_likelihood(denoise, batch['image'], way, keys, ode_steps)

    return Family(
        init,
        update,
        sample,
        evaluate,
        conditions=('label',) if conditional else (),
        divisor=divisor,
        free=(
            *('sampler', 'sample_steps', 'spacing', 'shift', 'clip', 'eta', 's_churn', 's_min', 's_max', 's_noise'),
            *('snr', 'guidance', 'guidance_from', 'guidance_to', 'guidance_rescale', 'bound_steps', 'ode_steps'),
            *(() if learned else ('variance',)),
        ),
    )
