"""Diffusion: every model that turns noise into images by removing it (start with `jaxgen/diffusion/__init__.py`).

A process turns an image x_0 into noise, x_t = alpha_t x_0 + sigma_t eps, and a network learns to predict, from
x_t and t, some combination of x_0 and eps. With t drawn by `times`,

    L = E weight(t) |network(x_t, t) - (a_t x_0 + b_t eps)|^2

and what is combined, how t is drawn and how it is weighted distinguishes one paper from another:

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

Each part is a section of `config.model`, the keyword arguments of the function that reads it: `process`
(diffusion/processes.py), `network` (networks/denoisers.py), `training` (objective.formulate), `conditioning`,
`sampler`, `guidance`, `likelihood`. Conditions are arrays of the batch, see diffusion/conditioning.py; with a
'low_resolution' image it is ADM's upsampler (Dhariwal & Nichol 2021, section 5.3), the second stage of a cascade.

With `config.stages.first`, an autoencoder, all of it happens to that stage's latents (latent diffusion, Rombach et al.
2021, arXiv 2112.10752): x_0 = latent_scale encode(image), and samples are decoded. Latents have no bits;
measured is then 'eps_error', the mean square error of the noise, at ten levels evenly over time.

Samples that begin with a person's image, or fill the hole of one: see diffusion/editing.py.

With `config.stages.refiner` another network goes on from some noise level, see diffusion/refining.py.

With `config.stages.teacher` it is trained to do in one evaluation what that run does in several, see
diffusion/distillation.py.

With `config.stages.base` and an `adapter` a part of that run's network is trained, see diffusion/adapters.py. With a
`controlnet` that network stays as it is, and a ControlNet beside it is trained, see diffusion/control.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import options
from jaxgen.augmentation import edm
from jaxgen.checks import check_stage_image
from jaxgen.contract import (
    ENCODED,
    Aux,
    Captions,
    Context,
    Family,
    Prepare,
    State,
    advance,
    by_settings,
    gradient_step,
    new_state,
)
from jaxgen.diffusion import adapters as adapting
from jaxgen.diffusion import conditioning as conditions
from jaxgen.diffusion import control as controls
from jaxgen.diffusion import distillation as distilling
from jaxgen.diffusion import editing as edits
from jaxgen.diffusion import former as formats
from jaxgen.diffusion import guidance as guides
from jaxgen.diffusion import (
    importance,
    inversion,
    latents,
    levels,
    likelihood,
    objective,
    processes,
    refining,
    samplers,
)
from jaxgen.diffusion.conditioning import DISTILLED, Condition, Conditioning, Values
from jaxgen.diffusion.distillation import TEACHER, Distillation
from jaxgen.diffusion.editing import Editing, Edits
from jaxgen.diffusion.guidance import OFF, Guidance
from jaxgen.diffusion.latents import Space
from jaxgen.diffusion.objective import Formulation
from jaxgen.diffusion.processes import CHAINS, coefficients
from jaxgen.diffusion.refining import REFINER, Refining
from jaxgen.errors import UserError
from jaxgen.networks import denoisers
from jaxgen.networks.denoisers import Network
from jaxgen.networks.layers import Dense
from jaxgen.options import Component, Fields, Follows, Positive, Section
from jaxgen.randomness import example_keys, normal, stream

Array = jax.Array


def reads_alone(name: str, config: Any) -> bool:
    """Whether nothing of the stages of a stage is read, by its name and saved config, see `assembly.assemble`: of a
    base, an adapter, a ControlNet, or a refiner or teacher, which read this run's."""
    return name in (REFINER, TEACHER) or adapting.reads_alone(name, config) or controls.is_controlnet(config)


former = formats.diffusion  # fields of runs that were saved before there were sections
MOVED = formats.MOVED['diffusion']
EMPTY: dict[str, Any] = {}
TUNING = {  # see tuning.py
    'lora': adapting.lora_of,
    'inversion': inversion.inversion_of,
    'full': adapting.full_of,
    'controlnet': controls.controlnet_of,
    'distilled': distilling.distilled_of,
    'few': distilling.few_of,
}
TUNED_ON_ITS_OWN = distilling.ON_ITS_OWN


class Model(NamedTuple):
    """A diffusion model, its parts bound to their options."""

    space: Space
    formulation: Formulation
    network: Network
    conditioning: Conditioning
    sampler: levels.Sampler
    guidance: Guidance
    classifier: Callable | None  # (frozen, label, moves) -> guidance.Classifier
    evaluation: dict  # options of the likelihood
    adapters: adapting.Adapters
    adapter: dict  # its complete section
    prior_weight: float  # of the loss of other images
    edits: Edits
    words: inversion.Words  # that the text encoders are given
    nets: tuple[controls.Net, ...] = ()  # ControlNets beside the network
    refiner: Any = None  # the Model of `config.stages.refiner`
    tables: tuple[samplers.Table, samplers.Table] | None = None  # of this network and of the refiner's
    distillation: Distillation | None = None  # from `config.stages.teacher`

    @property
    def controlled(self) -> bool:
        """Whether the network is that of a stage, and a ControlNet of it is trained."""
        return any(net.own for net in self.nets)

    def weights(self, networks: dict[str, Any], frozen, factors: dict[str, Any] | None = None) -> Any:
        """The weights of the network, by params or averages of this run's; factors: of LoRAs, None: the model's own."""
        if self.controlled:
            networks = {**networks, 'denoiser': frozen[controls.BASE][0].ema['denoiser']}
        weights = self.adapters.weights(networks, frozen, factors)
        return weights | controls.weights_of(self.nets, networks, frozen) if self.nets else weights


@options.checked
def build(
    context: Context,
    *,
    process: Annotated[Section, Component(processes.PROCESSES)] = 'linear',
    network: Annotated[Section, denoisers.COMPONENT] = 'unet',
    training: Annotated[Section, Fields(objective.formulate)] = EMPTY,
    conditioning: Annotated[Section, conditions.NAMED] = EMPTY,
    sampler: Annotated[Section, levels.COMPONENT] = 'ancestral',
    guidance: Annotated[Section, Fields(Guidance)] = EMPTY,
    likelihood: Annotated[
        Section,
        Follows(likelihood.LIKELIHOODS, lambda model: 'bound' if model['process']['name'] in CHAINS else 'ode'),
    ] = EMPTY,
    latent_scale: Positive = 1.0,
    latent_shift: float = 0.0,
    adapter: Annotated[Section, adapting.COMPONENT] = 'none',
    adapters: Annotated[Section, adapting.SECTION] = EMPTY,
    prior_weight: options.NonNegative = 1.0,
    editing: Annotated[Section, Fields(Editing)] = EMPTY,
    controlnet: Annotated[Section, controls.COMPONENT] = 'none',
    control: Annotated[Section, controls.SECTION] = EMPTY,
    refiner: Annotated[Section, Fields(Refining)] = EMPTY,
    distillation: Annotated[Section, distilling.COMPONENT] = 'none',
) -> Family:
    """Diffusion model; the defaults are DDPM's.

    Args:
      process: from data to noise, a function of diffusion/processes.py.
      network: see networks/denoisers.py.
      training: prediction, draw of t, weighting, variance, augmentation, see `objective.formulate`.
      conditioning: {name of an array of the batch: kind and dropout}, see diffusion/conditioning.py.
      sampler: a function of diffusion/samplers.py, and the noise levels that it visits.
      guidance: see `guidance.Guidance`.
      likelihood: of held-out images, by the bound of a chain or the ODE of a process in continuous time.
      latent_scale: of the latents of `config.stages.first`, so that their standard deviation is about 1.
      latent_shift: subtracted from them before that (SD 3, FLUX).
      adapter: what of the network of `config.stages.base` is trained in place of a network.
      adapters: {stage: scale} of the LoRAs that are stages, and of this run's own under the name 'own'.
      prior_weight: of the loss of `config.data.other`, images of the class of an object, in fine-tuning on it
        (DreamBooth).
      editing: of images that a person gives in sampling, see `editing.Editing`.
      controlnet: of the network of `config.stages.base`, trained in place of a network, see diffusion/control.py.
      control: {stage: scale, start, end, guess} of the ControlNets that are stages, and of this run's own under the
        name 'own'.
      refiner: where the network of `config.stages.refiner` goes on, see diffusion/refining.py.
      distillation: of what `config.stages.teacher` does in several evaluations, see diffusion/distillation.py.

    Raises:
      UserError: values that do not go together, an image that cannot be halved often enough, no labels.
    """
    given = dict(process=process, network=network, training=training, conditioning=conditioning)
    given |= dict(latent_scale=latent_scale, latent_shift=latent_shift, sampler=sampler, guidance=guidance)
    given |= dict(likelihood=likelihood, adapter=adapter, adapters=adapters, prior_weight=prior_weight)
    bound = bind(context, given | dict(editing=editing, controlnet=controlnet, control=control))
    if REFINER in context.stages:
        bound = with_refiner(bound, context, given, Refining(**refiner))
    elif Refining(**refiner) != Refining():
        raise UserError(f'config.model.refiner needs config.stages.{REFINER}, the run whose network goes on')
    if distillation['name'] != 'none':
        bound = bound._replace(distillation=distillation_of(bound, context, given | {'distillation': distillation}))
    if bound.guidance.classifier_scale:
        bound = bound._replace(classifier=functools.partial(classifier_of, bound, context))
    return family_of(bound, context, denoisers.divisor_of(network))


def bind(context: Context, model: dict[str, Any]) -> Model:
    """A Model by the complete sections of config.model.

    Raises:
      UserError: values that do not go together.
    """
    process, network, training = model['process'], model['network'], model['training']
    space = latents.bind(context, model['latent_scale'], model['latent_shift'])
    moves = processes.make(process, training['prediction']['name'])
    formulation = objective.formulate(moves, network.get('embedding') == 'fourier', **training)
    outputs = space.shape[-1] * (2 if formulation.learned else 1)
    module = denoisers.make_module(network, space.shape, outputs, context, **of_process(network, process, formulation))
    conditioning = edits.with_space(conditions.make(model['conditioning'], context, module), space)
    conditioning += augmented(formulation, module, context) + distilled(module, model['conditioning'])
    nets = controls.bind(context, module, model, model['controlnet'], model['control'])
    bare = denoisers.bind(module, conditioning)
    conditioning += controls.conditioning_of(nets, space.shape)
    make_sampler = sampler_maker(model, formulation, space)
    bound = Model(
        space,
        formulation,
        controls.attach(bare, nets),
        conditioning,
        make_sampler(0),
        Guidance(**model['guidance']),
        None,
        model['likelihood'] | variance_of(model['likelihood'], moves, formulation),
        adapting.bind(context, model, model['adapter'], model['adapters']),
        model['adapter'],
        model['prior_weight'],
        edits.bind(
            Editing(**model['editing']),
            context,
            conditioning,
            make_sampler,
            not moves.straight,
            {net.condition for net in nets},
        ),
        inversion.bind(context, model, model['adapter']),
        nets,
    )
    check(bound, context, process)
    return bound


def sampler_maker(model: dict[str, Any], formulation: Formulation, space: Space) -> Callable:
    """(skip) -> the sampler of the complete sections of config.model, without that many levels, see `levels.make`."""
    tokens = denoisers.tokens_of(model['network'], space.shape)

    def make(skip: int) -> levels.Sampler:
        return levels.make(model['sampler'], formulation.process, formulation.learned, tokens=tokens, skip=skip)

    return make


def with_refiner(model: Model, context: Context, given: dict[str, Any], options_of: Refining) -> Model:
    """The Model with that of `config.stages.refiner`, which reads this run's stages, and the tables of both.

    Args:
      given: the complete sections of config.model.

    Raises:
      UserError: it is of other latents or another process, or one of both networks has no noise level.
    """
    sections = refining.sections_of(context.stages[REFINER], given)
    made = bind_stage(context, sections, REFINER)
    sampler, process = model.edits.sampler, model.formulation.process
    make_sampler = sampler_maker(given, model.formulation, model.space)
    tables = refining.tables(options_of, process, sampler, make_sampler, given['sampler']['name'] == 'pndm')
    return model._replace(refiner=made, tables=tables)


def bind_stage(context: Context, sections: dict[str, Any], stage: str) -> Model:
    """The Model of the sections of config.model of a stage that reads this run's stages, all but what is added to this
    run's network: LoRAs, ControlNets."""
    others = {name: one for name, one in context.stages.items() if adapting.built_of(one).get('family') != 'diffusion'}
    return bind(context._replace(stages=others), options.complete(build, sections, f'stages.{stage}'))


def distillation_of(model: Model, context: Context, given: dict[str, Any]) -> Distillation:
    """The Distillation of a Model.

    Args:
      given: the complete sections of config.model.

    Raises:
      UserError: there is no teacher, or one that this model cannot learn from.
    """
    where = f'config.model.distillation.name = {given["distillation"]["name"]!r}'
    if TEACHER not in context.stages:
        raise UserError(
            f'{where} needs config.stages.{TEACHER}, the diffusion run that it learns from: --config=RUN:distilled or '
            'RUN:few names it and takes its model'
        )
    if model.controlled or model.words.learned:
        raise UserError(f'{where} is of a network or a LoRA of it, not of a ControlNet or a word')
    teacher = bind_stage(context, distilling.sections_of(context.stages[TEACHER], given), TEACHER)
    by_importance = model.formulation.draw_times is None
    reads_scale = distilling.reads_scale(model.conditioning)
    return distilling.bind(given['distillation'], teacher, model.formulation.process, reads_scale, by_importance)


def family_of(bound: Model, context: Context, divisor: int) -> Family:
    """The Family of a Model.

    Args:
      divisor: of the sizes of x.
    """
    space, conditioning, nets = bound.space, bound.conditioning, bound.nets
    settings = functools.partial(settings_of, bound)
    label = ('label',) if bound.classifier and 'label' not in conditions.names(conditioning) else ()
    invertible = all(condition.absent for condition in conditioning)
    encoded = conditions.reads_text(conditioning)
    trained = bound.adapter['name'] if bound.adapters.base else controls.CONTROL if bound.controlled else 'denoiser'
    texts = None if bound.words.every else conditions.prepare(conditioning)  # which change as the words are learned
    step = gradient_step(functools.partial(loss, bound, context.optim.accumulate), context.optim, trained)
    return Family(
        functools.partial(init, bound, context),
        functools.partial(update, bound, context, step),
        by_settings(functools.partial(sample, bound), settings),
        functools.partial(evaluate, bound),
        prepare=both(space.prepare, texts) if bound.edits.keeps else None,
        encode=functools.partial(encode, bound) if invertible else None,
        decode=functools.partial(decode, bound) if invertible else None,
        denoise=None if space.latent else functools.partial(denoise, bound),
        trajectory=by_settings(functools.partial(trajectory, bound), settings),
        conditions=tuple(c.name for c in conditioning if not c.optional) + label + controls.read_from_data(nets),
        inputs=controls.with_inputs(bound.edits.inputs, nets, context.image),
        divisor=space.divisor if space.latent else divisor,
        free=('sampler', 'guidance', 'likelihood', 'adapters', 'editing', 'control', 'refiner'),
        sampling=('sampler', 'guidance', 'adapters', 'editing', 'control', 'refiner'),
        settings=settings,
        merged=None if nets or bound.words.every else merged_of(bound),
        captions=Captions(
            encoded=encoded,
            weighted=bound.edits.options.weighted_prompts,
            chunks=bound.edits.options.prompt_chunks,
            negative=not bound.guidance.off,
            added=bound.words.added,
            learned=bound.words.learned,
        ),
    )


def merged_of(model: Model) -> tuple[Callable, Callable] | None:
    """`Family.merged` of a model with adapters, or of a student, which samples without its teacher."""
    if not (model.adapters.factors or model.distillation):
        return None

    def sections(config: dict[str, Any]) -> dict[str, Any]:
        config = model.adapters.without(config) if model.adapters.factors else config
        return distilling.without(config) if model.distillation else config

    return model.adapters.merged, sections


def both(*prepare: Prepare | None) -> Prepare | None:
    """What frozen stages make of images and of conditions; None where images are read as they are: then a batch must
    hold them."""
    images, others = prepare
    if images is None or others is None:
        return images

    def prepared(frozen, batch, rng):
        return images(frozen, batch, rng) | others(frozen, batch)

    return prepared


def distilled(module: Any, section: dict[str, dict]) -> Conditioning:
    """The scale of guidance that a distilled network reads (Meng et al. 2022, arXiv 2210.03142): `guidance.distilled`
    in sampling, 1 in training."""
    if not getattr(module, 'distilled', False):
        return ()
    if DISTILLED in section:
        raise UserError(f'config.model.conditioning.{DISTILLED}: the network reads it itself (network.distilled)')
    return (
        Condition(DISTILLED, 'guidance', None, conditions.same, conditions.same_value, 0.0, jnp.ones, optional=True),
    )


def variance_of(likelihood: dict, process: processes.Process, formulation: Formulation) -> dict[str, str]:
    """The variance of the bound, where there is one."""
    if 'variance' not in likelihood:
        return {}
    return {'variance': levels.model_variance(likelihood['variance'], process, formulation.learned)}


def of_process(network: dict, process: dict, formulation: Formulation) -> dict[str, Any]:
    """Attributes of a network that follow from the process: the noise levels of RefineNet's norms.

    Raises:
      UserError: RefineNet with another process or prediction than NCSN's.
    """
    if network['name'] != 'refinenet':
        return {}
    if process['name'] != 'geometric' or formulation.prediction != 'score':
        raise UserError(
            "config.model.network.name = 'refinenet' needs process 'geometric', of whose levels it has tables, and "
            f"training.prediction 'score'; they are {process['name']!r} and {formulation.prediction!r}"
        )
    sigmas = processes.sigma_range('geometric', process['sigma_min'], process['sigma_max'])
    return {'levels': process['timesteps'], 'sigmas': sigmas}


def augmented(formulation: Formulation, module: Any, context: Context) -> Conditioning:
    """The condition on how a training image was augmented (EDM, section 5): zeros, for not at all, in sampling."""
    if not formulation.augmentation:
        return ()
    if 'vector' not in module.takes or not module.vector_features:
        raise UserError(
            f'config.model.training.augmentation: the network {type(module).__name__} reads no vector of it'
        )
    dense = Dense(module.vector_features, bias=False, dtype=context.dtype)

    def absent(n: int) -> Array:
        return jnp.zeros((n, edm.LABELS))

    return (Condition('augment', 'vector', dense, conditions.same, jnp.zeros_like, 0.0, absent, optional=True),)


def check(model: Model, context: Context, process: dict) -> None:
    """Raises UserError where parts of a model do not go together."""
    guides.check(model.guidance, model.conditioning, model.space.shape[-1])
    if model.guidance.distilled != 1 and not distilling.reads_scale(model.conditioning):
        raise UserError('config.model.guidance.distilled is for networks that were distilled: this one reads none')
    classifier_scale = model.guidance.classifier_scale
    if model.space.latent and (model.sampler.clip or classifier_scale):
        raise UserError(
            'config.model: latents are in no range and no classifier reads them: sampler.clip False and '
            f'guidance.classifier_scale 0; they are {model.sampler.clip} and {classifier_scale}'
        )
    if model.space.latent and model.formulation.augmentation:
        raise UserError('config.model.training.augmentation is of images; config.stages.first gives latents')
    if model.space.latent and any(c.part == 'planes' and c.kind != 'inpainting' for c in model.conditioning):
        raise UserError(
            'config.model.conditioning: images are concatenated to images; config.stages.first gives latents'
        )
    timesteps = model.formulation.process.steps
    if timesteps and not model.evaluation['steps'] < timesteps:
        raise UserError(
            f'config.model.likelihood.steps must be from 0 to {timesteps - 1}; it is {model.evaluation["steps"]}'
        )
    if not classifier_scale:
        return
    classifier = context.stages.get('classifier')
    if classifier is None or classifier.classify is None:
        raise UserError(
            'config.model.guidance.classifier_scale needs config.stages.classifier, the run of a noisy_classifier'
        )
    check_stage_image(context, 'classifier')


def loss(model: Model, parts: int, params, state: State, frozen, batch, rng) -> tuple[Array, Aux]:
    """The loss of a batch; where it holds other images, theirs too (DreamBooth's prior preservation: Ruiz et al. 2022,
    arXiv 2208.12242, section 3.2)."""
    batch, others = with_others(batch)
    value, aux = loss_of(model, parts, params, state, frozen, batch, rng)
    if not others:
        return value, aux
    prior = loss_of(model, parts, params, state, frozen, others, stream(rng, 'others'))[0]
    return value + model.prior_weight * prior, Aux({**aux.logs, 'loss_others': prior}, aux.kept)


def with_others(batch: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """(batch, the same with the other images and their tokens in place of its own; {} where it has none)."""
    own = {name: x for name, x in batch.items() if name != 'other' and not name.startswith('other/')}
    if 'other' not in batch:
        return own, {}
    theirs = {name.removeprefix('other/'): x for name, x in batch.items() if name.startswith('other/')}
    # What frozen stages made of the batch's own images and captions beforehand is not of these.
    read = {name: x for name, x in own.items() if '/' not in name or name.endswith(ENCODED)}
    return own, {**read, 'image': batch['other'], **theirs}


def loss_of(model: Model, parts: int, params, state: State, frozen, batch, rng) -> tuple[Array, Aux]:
    """The loss of the images of a batch; with importance sampling of t its errors by example, in `kept`.

    Args:
      parts: into which a batch is cut for its gradient.
    """
    rng_t, rng_noise, rng_dropout, rng_condition = jax.random.split(rng, 4)
    x_0 = model.space.encode_drawn(frozen, batch, stream(rng, 'encoder'))
    if model.formulation.augmentation:
        augmentation_rng = stream(rng, 'augmentation')
        x_0, labels = edm.augment(augmentation_rng, x_0, model.formulation.augmentation)
        batch = {**batch, 'augment': labels}
    draw_times = model.formulation.draw_times
    t = draw_times(rng_t, len(x_0)) if draw_times else batch['t']
    if model.distillation is not None:
        scale = distilling.scale_of(model.distillation, stream(rng, 'guidance'), len(x_0))
        batch = {**batch, DISTILLED: scale}
    eps = jax.random.normal(rng_noise, x_0.shape)
    batch = conditions.drawn(model.conditioning, lambda: jax.random.split(stream(rng, 'masks'), len(x_0)), batch)
    values = conditions.values_of(model.conditioning, batch, model.words.known(params, frozen), train=True)
    values = conditions.drop(model.conditioning, rng_condition, values)
    if model.distillation is not None:
        t, x_0, eps = taught(model, frozen, values, scale, stream(rng, 'levels'), t, x_0, eps)
    weights = model.weights(params, frozen, model.adapters.in_training)
    embeddings = conditions.embed(model.conditioning, weights, values, x_0)
    errors, logs = objective.errors(
        model.formulation, model.network, weights, x_0, t, eps, embeddings, {'dropout': rng_dropout}
    )
    kept = None
    if not draw_times:
        # One entry for each example of the whole batch, of which this may be a part.
        kept = jnp.zeros(parts * len(t)).at[batch['position']].set(parts * errors, unique_indices=True)
        errors = errors * batch['importance']
    return errors.mean(), Aux({'loss': errors.mean(), **logs}, kept)


def taught(
    model: Model, frozen, values: Values, scale: Array, rng: Array, t: Array, x_0: Array, eps: Array
) -> tuple[Any, Array, Array]:
    """(t, x_0, eps) that the student is trained on: the x_t of data and noise, and the target of the teacher in place
    of the data, with the eps that makes x_t of it.

    Args:
      values: of the student's conditions.
      scale: of guidance, [n].
      rng: of the noise level, where it is drawn from those of the student.
      t: the noise level, where it is not.
    """
    d = model.distillation
    assert d is not None
    levels = distilling.to_data(model.formulation.process, t, x_0)
    if d.levels is not None:
        levels = distilling.drawn(d.levels, rng, len(x_0))
        t = distilling.at(levels, 0)
    alpha, sigma = coefficients(model.formulation.process, t, x_0)
    x = alpha * x_0 + sigma * eps
    guidance, clip = distilling.guidance_of(d, scale, x), d.teacher.sampler.clip and d.levels is not None
    theirs = distilling.values_of(d.teacher, values, scale)
    denoise = denoiser_of(d.teacher, frozen[TEACHER][0], frozen, theirs, guidance, clip)
    target = jax.lax.stop_gradient(distilling.target(denoise, x, levels))
    return t, target, distilling.noise_of(x, target, alpha, sigma)


def init(model: Model, context: Context, rng, batch, frozen) -> State:
    """The state before the first update."""
    if model.space.latent:
        shape = jax.eval_shape(model.space.encode, frozen, batch, rng).shape[1:]
        if shape != model.space.shape:
            raise UserError(
                f'config.stages.first was trained on other images: latents {shape}, not {model.space.shape}'
            )
    if model.classifier is not None:
        noisy = {'image': jnp.zeros((1, *model.space.shape)), 'sigma': jnp.ones(1)}
        classify = context.stages['classifier'].classify
        classes = jax.eval_shape(classify, *frozen['classifier'], noisy, rng).shape[-1]
        if classes != context.classes:
            raise UserError(f'config.stages.classifier knows {classes} classes, and the data {context.classes}')
    one = conditions.values_of(model.conditioning, jax.tree.map(lambda v: v[:1], batch), frozen)
    x = jnp.zeros((1, *model.space.shape))
    make = functools.partial(model.network.init, rng, x, one)
    if model.refiner is not None:
        values = conditions.values_of(model.refiner.conditioning, jax.tree.map(lambda v: v[:1], batch), frozen)
        shapes = jax.eval_shape(functools.partial(model.refiner.network.init, rng, x, values))
        adapting.check_weights(shapes, frozen[REFINER][0].ema['denoiser'], REFINER)
    by_importance = model.formulation.draw_times is None
    history = importance.start(model.formulation.process.steps) if by_importance else None
    if model.controlled:
        params = controls.init(model.nets[0], rng, model.conditioning, jax.eval_shape(make), one, x, frozen)
        return new_state({controls.CONTROL: params}, context.optim, history)
    if not model.adapters.base:
        params = make()
        if model.distillation is not None and model.distillation.initialise:
            params = distilling.start(params, frozen[TEACHER][0].ema['denoiser'])
        return new_state({'denoiser': params}, context.optim, history)
    shapes = jax.eval_shape(make)
    if model.adapter['name'] == adapting.INVERSION:
        adapting.check_weights(shapes, frozen[adapting.BASE][0].ema['denoiser'], adapting.BASE)
        return new_state({adapting.INVERSION: model.words.init(frozen)}, context.optim, history)
    params = adapting.init(rng, shapes, frozen, model.adapter)
    return new_state({adapting.LORA: params}, context.optim, history)


def update(model: Model, context: Context, step: Callable, state: State, frozen, batch, rng):
    """One update."""
    if model.formulation.draw_times is not None:
        state, aux = step(state, frozen, batch, rng)
        return advance(state, context.optim), aux.logs
    rng_t, rng_step = jax.random.split(rng)
    position = jnp.arange(len(next(iter(batch.values()))))
    t, weight = importance.draw(state.extra, rng_t, len(position))
    state, aux = step(state, frozen, {**batch, 't': t, 'importance': weight, 'position': position}, rng_step)
    state = state.replace(extra=importance.record(state.extra, t, aux.kept))
    return advance(state, context.optim), aux.logs


def denoiser_of(
    model: Model, state: State, frozen, values: Values, guidance: Guidance, clip: bool, factors: dict | None = None
) -> Callable:
    """The denoiser (x, t) -> x_0, or (x_0, fraction), by the averaged weights.

    factors: of LoRAs; None: the model's own.
    """
    f, network = model.formulation, model.network
    weights = model.weights(state.ema, frozen, factors)
    return objective.denoiser(f, network, weights, model.conditioning, values, guidance, clip)


def settings_of(model: Model) -> dict[str, Any]:
    """What sampling reads beside the weights: the standard deviation of the noise that it starts from, the sampler's
    table, the numbers of guidance, and those of an ancestral sampler that a classifier guides."""
    sampler, guidance = model.edits.sampler, guides.settings_of(model.guidance)
    if distilling.reads_scale(model.conditioning):
        guidance['distilled'] = model.guidance.distilled
    settings = {**edits.settings_of(model.edits), 'table': sampler.table, 'guidance': guidance}
    if model.tables:
        settings['table'], settings['refiner_table'] = model.tables
    settings |= {'adapters': model.adapters.factors} if model.adapters.factors else {}
    settings |= {'control': controls.settings_of(model.nets, network_times(model))} if model.nets else {}
    moved = model.classifier is not None and bool(sampler.variance)
    return settings | ({'moves': guides.moves_of(sampler.schedule, sampler.variance)} if moved else {})


def network_times(model: Model) -> np.ndarray:
    """The times of the sampler's evaluations as the network embeds them, [M] in their order."""
    with jax.ensure_compile_time_eval():
        return np.asarray(model.formulation.c_noise(jnp.asarray(model.edits.sampler.table['t'])), np.float32)


def classifier_of(model: Model, context: Context, frozen, label: Array, moves: dict | None) -> guides.Classifier:
    """The noisy classifier of `config.stages.classifier`, of these labels."""
    params, its_frozen = frozen['classifier']

    def classify(batch):
        return context.stages['classifier'].classify(params, its_frozen, batch, jax.random.key(0))

    return guides.bind_classifier(classify, label, model.formulation.process, model.space.shape, moves)


def run_sampler(model: Model, state: State, frozen, batch, rng, settings: dict, **options):
    """x_0 [n, ...] of the samples of a batch; with `trajectory` (x_0, what was passed through)."""
    rng_start, rng_steps = jax.random.split(rng)
    eps = normal(example_keys(rng_start, batch), model.space.shape)
    x_0 = edited(model, frozen, batch, rng)
    x = edits.start(settings, eps, x_0, model.edits.options.strength < 1)
    if x_0 is not None and edits.fills(model.edits, batch) and model.edits.keeps:
        hole = edits.at_size(edits.missing(batch[edits.MASK]), model.space.shape)
        options['keep'] = edits.keeping(model.formulation.process, x_0, eps, hole)
    guidance = dataclasses.replace(model.guidance, **settings['guidance'])
    scale = jnp.full(len(x), guidance.distilled, jnp.float32)
    said = {DISTILLED: scale} | controls.batch_of(model.nets, settings.get('control', {}), len(x))
    known = model.words.known(state.ema, frozen)
    values = conditions.values_of(model.conditioning, said | batch, known)
    clip = model.sampler.clip and not model.sampler.clip_here
    denoise = denoiser_of(model, state, frozen, values, guidance, clip, settings.get('adapters'))
    if model.classifier is not None:
        classifier = model.classifier(frozen, batch['label'], settings.get('moves'))
        scale = guidance.classifier_scale
        denoise = guides.classifier_guided(denoise, classifier.log_probability, classifier.scale_at, scale)
    keys = example_keys(rng_steps, batch)
    if model.refiner is None:
        return samplers.run(denoise, x, settings['table'], keys, **options)
    # The networks share what their text encoders make of a caption.
    values = conditions.values_of(model.refiner.conditioning, said | batch, known)
    refine = denoiser_of(model.refiner, frozen[REFINER][0], frozen, values, guidance, clip)
    keys = keys, example_keys(stream(rng_steps, REFINER), batch)
    return samplers.run_both((denoise, refine), x, (settings['table'], settings['refiner_table']), keys, **options)


def edited(model: Model, frozen, batch, rng) -> Array | None:
    """x_0 [n, ...] of the image of a batch that is to be edited, None where there is none."""
    if not edits.reads(model.edits, batch):
        return None
    return model.space.encode(frozen, batch, stream(rng, 'encoder'))


def sample(model: Model, state: State, frozen, batch, rng, settings: dict) -> Array:
    """Samples, float32 [n, H, W, C] in [-1, 1]."""
    x_0 = run_sampler(model, state, frozen, batch, rng, settings)
    images = model.space.decode(frozen, x_0, stream(rng, 'decoder'))
    paste = model.edits.options.paste and edits.fills(model.edits, batch)
    return edits.pasted(images, batch) if paste else images


def trajectory(model: Model, state: State, frozen, batch, rng, settings: dict) -> dict[str, Array]:
    """'x': after each evaluation of the network, and 'x_0': its estimates, [steps, n, H, W, C]; latents decoded."""
    passed = run_sampler(model, state, frozen, batch, rng, settings, trajectory=True)[1]
    decoder_rng = stream(rng, 'decoder')
    if not model.space.latent:
        return passed
    return {k: jax.lax.map(lambda x: model.space.decode(frozen, x, decoder_rng), v) for k, v in passed.items()}


def evaluate(model: Model, state: State, frozen, batch, rng) -> dict[str, Array]:
    """Bits per dimension of images, or of latents the error of the noise, [n] each."""
    keys, process = example_keys(rng, batch), model.formulation.process
    # A clipped chain has a bound (Ho et al. 2020 clip); the density of the ODE needs the derivative.
    clip = model.sampler.clip and process.steps > 0
    batch = conditions.drawn(model.conditioning, lambda: example_keys(stream(rng, 'masks'), batch), batch)
    values = conditions.values_of(model.conditioning, batch, model.words.known(state.ema, frozen))
    denoise = denoiser_of(model, state, frozen, values, OFF, clip)
    if model.space.latent:
        x_0 = model.space.encode(frozen, batch, stream(rng, 'encoder'))
        return {'eps_error': likelihood.noise_error(denoise, x_0, process, keys)}
    steps = model.evaluation['steps']
    if process.steps:
        table, variance = model.formulation.table, model.evaluation['variance']
        return likelihood.variational_bound(denoise, batch['image'], table, variance, keys, steps)
    return likelihood.ode_likelihood(denoise, batch['image'], process, keys, steps)


def denoise(model: Model, state: State, frozen, batch, x: Array, sigma: Array) -> Array:
    """Estimate of the image of x = image + sigma eps, float32 [n, H, W, C]; sigma [n]."""
    process = model.formulation.process
    t = process.time(jnp.maximum(sigma, 1e-6))  # its logarithm is finite
    said = {DISTILLED: jnp.full(len(x), model.guidance.distilled, jnp.float32)}
    values = conditions.values_of(model.conditioning, said | batch, model.words.known(state.ema, frozen))
    estimator = denoiser_of(model, state, frozen, values, model.guidance, model.sampler.clip)
    return samplers.estimate(estimator, coefficients(process, t, x)[0] * x, t)[0]


def unconditional(model: Model, state: State, frozen, n: int, clip: bool) -> Callable:
    """The denoiser without any condition."""
    values = {condition.name: condition.absent(n) for condition in model.conditioning}
    return denoiser_of(model, state, frozen, values, OFF, clip)


def encode(model: Model, state: State, frozen, batch, rng) -> Array:
    """The noise [n, H, W, C], of variance 1, that `decode` turns into the images, by DDIM inversion; of the first
    stage's latents where there is one."""
    x, sampler = model.space.encode(frozen, batch, stream(rng, 'encoder')), model.sampler
    denoise = unconditional(model, state, frozen, len(x), sampler.clip)
    return samplers.ddim_inversion(denoise, x, sampler.schedule, stated=sampler.stated) / sampler.start


def decode(model: Model, state: State, frozen, batch, latents, rng) -> Array:
    """Images [n, H, W, C] of noise as `encode` gives it, by DDIM without any condition, the sampler itself where it is
    DDIM without noise."""
    sampler = model.sampler
    table = sampler.table
    if not sampler.ddim:
        table = samplers.with_levels(samplers.ddim.table, sampler.schedule, sampler.stated)
    denoise = unconditional(model, state, frozen, len(latents), sampler.clip and 'raw_weight' not in table)
    x = samplers.run(denoise, sampler.start * latents, table, None)
    return model.space.decode(frozen, x, stream(rng, 'decoder'))
