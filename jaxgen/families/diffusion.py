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
    JiT (Li & He 2025)                   flow            x0          logit_normal   heun, weighting flow
    SiT (Ma et al. 2024)                 flow            flow        uniform        euler_maruyama
    NCSN (Song & Ermon 2019)             geometric       score       uniform        annealed_langevin

Any sampler goes with any of them. Measured is the variational bound of a chain (Ho et al. 2020, eq. 5) or the
likelihood by the probability-flow ODE of a process in continuous time (Song et al. 2021b, section 4.3), both in
bits per dimension.

With `upsampling` the network sees a small image too, `batch['low_resolution']`, enlarged by linear interpolation: ADM's
upsamplers (Dhariwal & Nichol 2021, section 5.3), the second stage of a cascade.

With `config.stages.first`, an autoencoder, all of it happens to that stage's latents (latent diffusion, Rombach et al.
2021, arXiv 2112.10752): x_0 = latent_scale encode(image), and what is sampled is decoded. Latents have no bits;
measured is then 'eps_error', the mean square error of the noise, at ten levels evenly over time.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.augmentation import edm
from jaxgen.checks import check_labels, check_stage_image
from jaxgen.contract import Aux, Context, Family, advance, gradient_step, new_state
from jaxgen.diffusion import importance, parameterisations, processes, samplers
from jaxgen.diffusion.guidance import FARTHEST, classifier_guided, guided, in_interval
from jaxgen.diffusion.likelihood import bound_term, ode_likelihood, variational_bound
from jaxgen.errors import UserError
from jaxgen.losses.likelihoods import cross_entropy
from jaxgen.networks.denoisers import FIELDS, NETWORKS, check_network
from jaxgen.randomness import example_keys, normal, stream

Array = jax.Array

SPACINGS = ('uniform', 'trailing', 'respaced', 'quadratic', 'karras')
# Mean and standard deviation of the papers whose `times` they are: EDM, and SD3 (Esser et al. 2024, arXiv 2403.03206).
TIMES = {'lognormal': (-1.2, 1.2), 'logit_normal': (0.0, 1.0)}
# What leaves x_0 known where alpha is 0.
AT_ALPHA_0 = ('v', 'x0', 'flow', 'edm')
SAMPLERS = {
    'ancestral': samplers.ancestral,
    'ddim': samplers.ddim,
    'euler': samplers.euler,
    'euler_ancestral': samplers.euler_ancestral,
    'heun': samplers.heun,
    'dpm_solver_pp': samplers.dpm_solver_pp,
    'dpm_solver_pp_sde': functools.partial(samplers.dpm_solver_pp, sde=True),
    'unipc': samplers.unipc,
    'euler_maruyama': samplers.euler_maruyama,
    'predictor_corrector': samplers.predictor_corrector,
    'annealed_langevin': samplers.annealed_langevin,
    'consistency': samplers.consistency,
}


def build(
    context: Context,
    *,
    network: str = 'unet',
    unet: dict = FIELDS['unet'],
    adm: dict = FIELDS['adm'],
    ncsnpp: dict = FIELDS['ncsnpp'],
    dit: dict = FIELDS['dit'],
    refinenet: dict = FIELDS['refinenet'],
    conditional: bool = False,
    label_dropout: float = 0.0,
    upsampling: bool = False,
    augmentation: float = 0.0,
    process: str = 'linear',
    timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    zero_terminal: bool = False,
    rescale_timesteps: bool = False,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    prediction: str = 'eps',
    data_std: float = 0.5,
    times: str = 'uniform',
    time_mean: float | None = None,
    time_std: float | None = None,
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
    predictor: str = 'reverse_diffusion',
    corrector_steps: int = 1,
    strength: float = 1.0,
    last_step: float = 0.0,
    langevin_steps: int = 100,
    langevin_size: float = 8e-5,
    final_denoising: bool = True,
    guidance: float = 1.0,
    guidance_from: float = 0.0,
    guidance_to: float = 1e9,
    guidance_rescale: float = 0.0,
    guidance_channels: int = 0,
    latent_scale: float = 1.0,
    classifier_scale: float = 0.0,
    bound_steps: int = 0,
    ode_steps: int = 50,
) -> Family:
    """Args:
      network: 'unet' | 'adm' | 'ncsnpp' | 'dit' | 'refinenet'; the section of that name says how it looks.
      conditional: tell the network the class, `batch['label']`.
      label_dropout: share of the labels that are left out in training, so that `guidance` can be used.
      upsampling: show the network `batch['low_resolution']`, an image of any smaller size.
      augmentation: p, of each change of the training images that the network is conditioned on, see
        jaxgen/augmentation/edm.py; 0: none.
      process, timesteps, beta_start, beta_end, zero_terminal, sigma_min, sigma_max: see `processes.make`; of the
        prediction 'edm' sigma_min and sigma_max are EDM's where they are None.
      rescale_timesteps: the network embeds t 1000 / timesteps, as most released models of Nichol & Dhariwal 2021 do.
      prediction, data_std: what the network puts out, see `parameterisations.coefficients`.
      times: how t is drawn in training: 'uniform'; 'importance', steps of a chain by the size of their loss, see
        `importance`; 'lognormal', log(sigma / alpha) with mean `time_mean` and
        standard deviation `time_std`, where they are None -1.2 and 1.2 (EDM); 'logit_normal', log(t / (1 - t)), where
        they are None with 0 and 1 (SD3).
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
      s_churn, s_min, s_max, s_noise: of 'heun'; strength: of 'euler_maruyama';
      snr, predictor, corrector_steps: of 'predictor_corrector', see `samplers.predictor_corrector`;
        langevin_steps, langevin_size: steps at each level, and their size, of 'annealed_langevin'; final_denoising:
        it ends with the estimate of x_0 (Song & Ermon 2020), and not with x at the first level (2019).
      last_step: of 'euler_maruyama' in continuous time, t of its last level, from where a step without noise leads to
        the data (SiT's released sampler: 0.04); 0: levels evenly from the end to the data, the last step the estimate.
      guidance: 1: none; s: label-free output + s (output - label-free output) (Ho & Salimans 2022), where
        guidance_from <= sigma / alpha <= guidance_to (Kynkaanniemi et al. 2024), 1e9 or more: no upper end, also
        where alpha is 0; guidance_rescale: share by which
        its standard deviation is put back to that without guidance (Lin et al. 2023, eq. 16); guidance_channels: of
        the first channels only (DiT's released sampler guides three of four), 0: all.
      latent_scale: of the latents of `config.stages.first`, so that their standard deviation is about 1.
      classifier_scale: of the gradient of log p(label | x_t) by the noisy classifier of `config.stages.classifier`
        (Dhariwal & Nichol 2021); 0: none.
      bound_steps: terms of a chain's variational bound that `evaluate` computes, of the T - 1 between the
        first and the last; drawn evenly, the mean is right. 0: all.
      ode_steps: Runge-Kutta steps of the likelihood in continuous time. Where each pixel has one of three values and a
        noise of one grey level, 50 are wrong by 0.001 (vp, ve) to 0.008 bits/dim (flow), 200 by less than 0.0002
        (tests/diffusion/processes_test.py).

    Raises:
      UserError: a value out of range, an image that cannot be halved often enough, no labels.
    """
    choices = {
        'network': (network, tuple(NETWORKS)),
        'process': (process, processes.PROCESSES),
        'prediction': (prediction, parameterisations.PREDICTIONS),
        'times': (times, ('uniform', 'importance', 'lognormal', 'logit_normal')),
        'weighting': (weighting, parameterisations.WEIGHTINGS),
        'variance': (variance, ('fixed_large', 'fixed_small', 'learned')),
        'sampler': (sampler, tuple(SAMPLERS)),
        'spacing': (spacing, SPACINGS),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise UserError(f'config.model.{name} must be one of {allowed}; it is {value!r}')
    check_labels(context, conditional)
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

    first, classifier = (context.stages.get(name) for name in ('first', 'classifier'))
    if first is not None and not (first.latents.shape and first.encode and first.decode):
        raise UserError('config.stages.first must be the run of an autoencoder with continuous latents')
    if first is not None and len(first.latents.shape) != 3:
        raise UserError(
            f'config.stages.first: its latents {first.latents.shape} are no maps [h, w, c], and the networks want maps'
        )
    if first is not None and (clip or latent_scale <= 0 or classifier_scale):
        raise UserError(
            'config.model: latents are in no range and no classifier sees them: clip False, classifier_scale 0, and '
            f'latent_scale above 0; they are {clip}, {classifier_scale} and {latent_scale}'
        )
    if first is not None and (upsampling or augmentation):
        raise UserError('config.model: upsampling and augmentation are of images; config.stages.first gives latents')
    if augmentation and (network != 'ncsnpp' or not 0 <= augmentation <= 1):
        raise UserError(
            "config.model.augmentation must be from 0 to 1, and only the network 'ncsnpp' can be told of it; they are "
            f'{augmentation} and {network!r}'
        )
    shape = first.latents.shape if first is not None else context.image  # of what is diffused
    if classifier_scale and (classifier is None or classifier.classify is None):
        raise UserError('config.model.classifier_scale needs config.stages.classifier, the run of a noisy_classifier')
    if classifier_scale:
        check_stage_image(context, 'classifier')

    sigma_min, sigma_max = processes.sigma_range(process, prediction, sigma_min, sigma_max)
    mean, std = TIMES.get(times, TIMES['lognormal'])
    time_mean, time_std = mean if time_mean is None else time_mean, std if time_std is None else time_std
    way = processes.make(
        process, timesteps=timesteps, beta_start=beta_start, beta_end=beta_end, sigma_min=sigma_min,
        sigma_max=sigma_max, zero_terminal=zero_terminal,
    )  # fmt: skip
    if rescale_timesteps:
        if not way.steps or network == 'refinenet':
            raise UserError(
                'config.model.rescale_timesteps is of chains whose network embeds the step; they are process '
                f'{process!r} and network {network!r}'
            )
        way = way._replace(told=lambda t: t * (1000 / timesteps))
    ends_at_noise = way.at(np.array([way.end])).alpha[0] == 0
    learned = variance == 'learned'
    if weighting == 'bound' and not learned:
        raise UserError("config.model.weighting = 'bound' is the variational bound with variance = 'learned'")
    if not way.steps and (learned or (sampler == 'ancestral' and variance != 'fixed_small')):
        raise UserError(
            f"config.model.variance = {variance!r} is that of a chain, and process {process!r} is none: 'fixed_small'"
        )
    drawn = ('uniform', 'importance') if way.steps else ('uniform', 'lognormal', 'logit_normal')
    if (not way.steps and spacing not in ('uniform', 'karras')) or times not in drawn:
        raise UserError(f'config.model: spacing {spacing!r} and times {times!r} do not go with process {process!r}')
    if spacing == 'karras' and ends_at_noise:
        raise UserError("config.model.spacing = 'karras' is by sigma / alpha, and the last level here has alpha = 0")
    if ends_at_noise and sampler in ('predictor_corrector', 'annealed_langevin'):
        raise UserError(f'config.model.sampler = {sampler!r} divides by alpha, which is 0 at the last level here')
    if ends_at_noise and prediction not in AT_ALPHA_0:
        where = f'process {process!r}' + ' with zero_terminal' * zero_terminal
        raise UserError(
            f'config.model.prediction = {prediction!r} divides by alpha, which is 0 at the last level of {where}: take '
            f'one of {AT_ALPHA_0}'
        )
    if last_step and (sampler != 'euler_maruyama' or way.steps or not 0 < last_step < way.end):
        raise UserError(
            "config.model.last_step is of sampler 'euler_maruyama' in continuous time, from 0 to below 1; it is "
            f'{last_step}, of {sampler!r} and process {process!r}'
        )
    if shift != 1 and process != 'flow':
        raise UserError(f"config.model.shift is of process 'flow'; here it is {process!r}, and shift {shift}")
    if predictor not in samplers.PREDICTORS:
        raise UserError(f'config.model.predictor must be one of {samplers.PREDICTORS}; it is {predictor!r}')
    for name, value in dict(shift=shift, data_std=data_std, time_std=time_std, snr=snr).items():
        if not value > 0:
            raise UserError(f'config.model.{name} must be above 0; it is {value}')
    for name, value in dict(ode_steps=ode_steps, langevin_steps=langevin_steps).items():
        if value < 1:
            raise UserError(f'config.model.{name} must be 1 or more; it is {value}')
    if min(strength, langevin_size, s_churn, s_noise, gamma, bound_weight, corrector_steps, classifier_scale) < 0:
        raise UserError(
            'config.model: strength, langevin_size, s_churn, s_noise, gamma, bound_weight, corrector_steps and '
            'classifier_scale must be 0 or more'
        )
    if not 0 <= sample_steps <= (way.steps or sample_steps):
        raise UserError(f'config.model.sample_steps must be from 0 to timesteps {timesteps}; it is {sample_steps}')
    if not 0 <= bound_steps < timesteps:
        raise UserError(f'config.model.bound_steps must be from 0 to {timesteps - 1}; it is {bound_steps}')

    sections = {'unet': unet, 'adm': adm, 'ncsnpp': ncsnpp, 'dit': dit, 'refinenet': refinenet}
    section = {**FIELDS[network], **sections[network]}
    channels = shape[2]
    if not 0 <= guidance_channels <= channels:
        raise UserError(f'config.model.guidance_channels must be from 0 to {channels}; it is {guidance_channels}')
    divisor = check_network(network, section, shape)
    divisor = divisor if first is None else first.divisor
    if network == 'refinenet':
        if (process, prediction, timesteps) != ('geometric', 'score', section['levels']):
            raise UserError(
                "config.model.network = 'refinenet' needs process 'geometric', prediction 'score' and timesteps = "
                f'refinenet.levels = {section["levels"]}; they are {process!r}, {prediction!r} and {timesteps}'
            )
        section = {**section, 'sigmas': (sigma_min, sigma_max)}
    if augmentation:
        section = {**section, 'augment': edm.LABELS}
    # One class more where labels are left out: it stands for no label.
    classes = context.classes + bool(label_dropout) if conditional else 0
    net = NETWORKS[network](
        **section,
        classes=classes,
        out_channels=2 * channels if learned else channels,
        remat=context.remat,
        dtype=context.dtype,
    )
    grid = processes.levels(way, sample_steps, spacing, shift, last_step)
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
        'predictor_corrector': dict(snr=snr, predictor=predictor, corrector_steps=corrector_steps),
        'euler_maruyama': {'strength': strength, 'mean_step': last_step > 0},
        'annealed_langevin': dict(steps_each=langevin_steps, step_size=langevin_size, remove_noise=final_denoising),
    }
    draw = functools.partial(SAMPLERS[sampler], **draw_options.get(sampler, {}))

    def level(t: Array):
        """alpha and sigma at times t [n], [n, 1, 1, 1] each."""
        at = way.at(t)
        return at.alpha[:, None, None, None], at.sigma[:, None, None, None]

    def enlarged(batch) -> Array | None:
        """The small image at the size of the large one, where the network is shown it."""
        if not upsampling:
            return None
        small = batch['low_resolution']
        return jax.image.resize(small, (len(small), *shape), 'linear')

    def apply(params, x, t, label, low, train, rngs=None, **changes):
        """The network's output, and with a learned variance where it lies between its bounds, [0, 1]."""
        x = parameterisations.input_scale(prediction, *level(t), data_std) * x
        x = x if low is None else jnp.concatenate([x, low], -1)
        told = processes.network_time(way, t, prediction, section.get('embedding') == 'fourier')
        output = net.apply({'params': params['denoiser']}, x, told, label, train=train, rngs=rngs, **changes)
        return (output[..., :channels], (output[..., channels:] + 1) / 2) if learned else (output, None)

    def denoiser(params, label, low, scale: float, clip: bool = clip):
        """(x, t) -> estimate of x_0, and with a learned variance (estimate, fraction). scale: of guidance."""

        def denoise(x, t):
            t = jnp.broadcast_to(t, (len(x),))
            at = way.at(t)
            here = in_interval(at.alpha, at.sigma, guidance_from, guidance_to)

            def one(x, t, label):  # of twice as many where there is guidance
                beside = None if low is None else jnp.concatenate([low] * (len(x) // len(low)))
                return apply(params, x, t, label, beside, train=False)

            output, fraction = guided(
                one, x, t, label, context.classes, scale, here, guidance_rescale, guidance_channels
            )
            x_0 = parameterisations.to_x_0(prediction, output, x, *level(t), data_std)
            x_0 = jnp.clip(x_0, -1, 1) if clip else x_0
            return (x_0, fraction) if learned else x_0

        return denoise

    def draw_times(rng, n: int) -> Array:
        if times == 'uniform':
            return processes.uniform_times(way, rng, n)
        number = time_mean + time_std * jax.random.normal(rng, (n,))
        return way.time(jnp.exp(number)) if times == 'lognormal' else jax.nn.sigmoid(number)

    def to_latent(frozen, batch, rng) -> Array:
        """What is diffused: the images, or the first stage's latents of them."""
        return batch['image'] if first is None else latent_scale * first.encode(*frozen['first'], batch, rng)

    def to_training_latent(frozen, batch, rng) -> Array:
        """The same, drawn from the first stage's posterior where it has one (Rombach et al. 2021, and DiT and SiT)."""
        if first is None or first.encode_sampled is None:
            return to_latent(frozen, batch, rng)
        return latent_scale * first.encode_sampled(*frozen['first'], batch, rng)

    def to_image(frozen, x_0, rng) -> Array:
        images = x_0 if first is None else first.decode(*frozen['first'], {}, x_0 / latent_scale, rng)
        return jnp.clip(images, -1, 1)

    def loss(params, state, frozen, batch, rng):
        rng_t, rng_noise, rng_dropout, rng_label = jax.random.split(rng, 4)
        x_0, label = to_training_latent(frozen, batch, stream(rng, 'encoder')), batch.get('label')
        changes = {}
        if augmentation:
            x_0, changes['augment'] = edm.augment(stream(rng, 'augmentation'), x_0, augmentation)
        t = batch['t'] if times == 'importance' else draw_times(rng_t, len(x_0))
        eps = jax.random.normal(rng_noise, x_0.shape)
        alpha, sigma = level(t)
        x_t = alpha * x_0 + sigma * eps
        if label_dropout:
            label = jnp.where(jax.random.bernoulli(rng_label, label_dropout, t.shape), context.classes, label)
        output, fraction = apply(params, x_t, t, label, enlarged(batch), True, {'dropout': rng_dropout}, **changes)
        wanted = parameterisations.target(prediction, x_0, eps, alpha, sigma, data_std)
        weight = parameterisations.weight(weighting, prediction, alpha, sigma, data_std, gamma)
        errors = (weight * jnp.square(output - wanted)).mean((1, 2, 3))  # [n]
        simple, bound = errors.mean(), 0.0
        if learned:
            # The hybrid loss teaches the variance by the bound, and the bound's mean is held still.
            mean = output if weighting == 'bound' else jax.lax.stop_gradient(output)
            estimate = parameterisations.to_x_0(prediction, mean, x_t, alpha, sigma, data_std)
            terms = way.steps * bound_term(table, x_0, estimate, t, fraction)  # [n]
            errors = terms if weighting == 'bound' else errors + bound_weight * terms
            bound = terms.mean()
        logs, kept = {'simple': simple, 'bound': bound} if learned else {}, None
        if times == 'importance':
            # One place for each example of the whole batch, of which this may be a part.
            parts = context.optim.accumulate
            kept = jnp.zeros(parts * len(t)).at[batch['place']].set(parts * errors, unique_indices=True)
            errors = errors * batch['importance']
        return errors.mean(), Aux({'loss': errors.mean(), **logs}, kept)

    step = gradient_step(loss, context.optim, 'denoiser')

    def init(rng, batch, frozen):
        if first is not None and (found := jax.eval_shape(to_latent, frozen, batch, rng).shape[1:]) != shape:
            raise UserError(f'config.stages.first was trained on other images: latents {found}, not {shape}')
        if classifier_scale:
            seen = {'image': jnp.zeros((1, *shape)), 'sigma': jnp.ones(1)}
            found = jax.eval_shape(classifier.classify, *frozen['classifier'], seen, rng).shape
            if found[-1] != context.classes:
                raise UserError(f'config.stages.classifier knows {found[-1]} classes, and the data {context.classes}')
        if upsampling and 'low_resolution' not in batch:
            raise UserError(
                "config.model.upsampling needs 'low_resolution' in config.data.features, and its side in pixels as "
                'config.data.low_resolution'
            )
        label = jnp.zeros(1, jnp.int32) if classes else None
        x = jnp.zeros((1, *shape[:2], channels * (1 + upsampling)))
        variables = net.init(rng, x, jnp.zeros(1), label, train=False)
        history = importance.start(timesteps) if times == 'importance' else None
        return new_state({'denoiser': variables['params']}, context.optim, history)

    def update(state, frozen, batch, rng):
        if times != 'importance':
            state, aux = step(state, frozen, batch, rng)
            return advance(state, context.optim), aux.logs
        rng_t, rng_step = jax.random.split(rng)
        place = jnp.arange(len(batch['image']))
        t, weight = importance.draw(state.extra, rng_t, len(place))
        state, aux = step(state, frozen, {**batch, 't': t, 'importance': weight, 'place': place}, rng_step)
        state = state.replace(extra=importance.record(state.extra, t, aux.kept))
        return advance(state, context.optim), aux.logs

    def guide(denoise, frozen, label):
        """denoise with classifier guidance, if there is any."""
        if not classifier_scale:
            return denoise
        shown, its_frozen = frozen['classifier']

        # Where alpha falls to 0 the estimate moves as it does at FARTHEST.
        least = 1 / FARTHEST if ends_at_noise else 0.0

        def guided_level(t):
            alpha, sigma = level(t)
            return jnp.maximum(alpha, least * sigma), sigma

        def log_probability(x, t):
            alpha, sigma = guided_level(t)
            seen = {'image': x / alpha, 'sigma': (sigma / alpha)[:, 0, 0, 0]}
            logits = classifier.classify(shown, its_frozen, seen, jax.random.key(0))
            return -cross_entropy(logits, label)

        def reach(t):
            alpha, sigma = guided_level(t)
            if sampler != 'ancestral':
                return sigma**2 / alpha
            # The mean of a step from t to the level below moves by the posterior's variance times the gradient.
            _, _, alpha_s, sigma_s = samplers.levels(grid)
            place = jnp.searchsorted(jnp.asarray(grid.t), t)
            return jnp.asarray(sigma_s**2 / alpha_s, jnp.float32)[place][:, None, None, None]

        return classifier_guided(denoise, log_probability, reach, classifier_scale)

    def walk(state, frozen, batch, rng, **options):
        rng_start, rng_steps = jax.random.split(rng)
        x = grid.sigma[-1] * normal(example_keys(rng_start, batch), shape)
        label = batch.get('label')
        denoise = guide(denoiser(state.ema, label, enlarged(batch), guidance), frozen, label)
        return draw(denoise, x, grid, example_keys(rng_steps, batch), **options)

    def sample(state, frozen, batch, rng):
        return to_image(frozen, walk(state, frozen, batch, rng), stream(rng, 'decoder'))

    def trajectory(state, frozen, batch, rng):
        seen, decoder_rng = walk(state, frozen, batch, rng, trajectory=True)[1], stream(rng, 'decoder')
        if first is None:
            return seen
        return {k: jax.lax.map(lambda x: to_image(frozen, x, decoder_rng), v) for k, v in seen.items()}

    def eps_error(denoise, x_0, keys) -> Array:
        """Mean square error of the noise [n], over ten levels evenly in time."""

        def one(t, keys):
            t = jnp.full(len(x_0), t)
            alpha, sigma = level(t)
            x_t = alpha * x_0 + sigma * normal(keys, shape)
            found = denoise(x_t, t)
            # The noise differs as the estimates of x_0 do.
            error = alpha / sigma * (x_0 - (found[0] if learned else found))
            return jnp.square(error).mean((1, 2, 3))

        t = (jnp.arange(10) + 0.5) / 10
        t = (way.steps * t).astype(jnp.int32) if way.steps else way.start + (way.end - way.start) * t
        keys = jax.vmap(jax.random.split, (0, None), 1)(keys, 10)
        return jax.lax.map(lambda a: one(*a), (t, keys)).mean(0)

    def evaluate(state, frozen, batch, rng):
        keys = example_keys(rng, batch)
        # A clipped chain has a bound (Ho et al. 2020 clip); the density of the ODE needs the derivative.
        denoise = denoiser(state.ema, batch.get('label'), enlarged(batch), 1.0, clip and way.steps > 0)
        if first is not None:
            return {'eps_error': eps_error(denoise, to_latent(frozen, batch, stream(rng, 'encoder')), keys)}
        if way.steps:
            return variational_bound(denoise, batch['image'], table, variance, keys, bound_steps)
        return ode_likelihood(denoise, batch['image'], way, keys, ode_steps)

    def denoise(state, frozen, batch, x, sigma):
        """Estimate of the image of x = image + sigma eps, float32 [n, H, W, C]; sigma [n]."""
        t = way.time(jnp.maximum(sigma, 1e-6))  # its logarithm is finite
        found = denoiser(state.ema, batch.get('label'), enlarged(batch), guidance)(level(t)[0] * x, t)
        return found[0] if learned else found

    def without_label(state, n: int):
        return denoiser(state.ema, jnp.full(n, context.classes) if conditional else None, None, 1.0)

    def encode(state, frozen, batch, rng):
        """The noise [n, H, W, C], of variance 1, that `decode` turns into the images, by DDIM inversion."""
        x = batch['image']
        return samplers.ddim_inversion(without_label(state, len(x)), x, grid) / grid.sigma[-1]

    def decode(state, frozen, batch, latents, rng):
        x = samplers.ddim(without_label(state, len(latents)), grid.sigma[-1] * latents, grid, None)
        return jnp.clip(x, -1, 1)

    # A network that always wants a label, or a small image, cannot encode an image without one.
    invertible = first is None and not upsampling and (not conditional or bool(label_dropout))
    conditions = {'label': conditional or bool(classifier_scale), 'low_resolution': upsampling}
    return Family(
        init,
        update,
        sample,
        evaluate,
        encode=encode if invertible else None,
        decode=decode if invertible else None,
        denoise=denoise if first is None else None,
        trajectory=trajectory,
        conditions=tuple(name for name, wanted in conditions.items() if wanted),
        divisor=divisor,
        free=(
            *('sampler', 'sample_steps', 'spacing', 'shift', 'clip', 'eta', 's_churn', 's_min', 's_max', 's_noise'),
            *('predictor', 'corrector_steps', 'last_step', 'final_denoising'),
            *('snr', 'strength', 'langevin_steps', 'langevin_size', 'classifier_scale', 'bound_steps', 'ode_steps'),
            *('guidance', 'guidance_from', 'guidance_to', 'guidance_rescale', 'guidance_channels'),
            *(() if learned else ('variance',)),
        ),
    )
