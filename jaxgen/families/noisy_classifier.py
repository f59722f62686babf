"""A classifier of noisy images, log p(y | x_t), whose gradient guides a diffusion model to a class.

Dhariwal & Nichol 2021 (arXiv 2105.05233, section 4): the first half of ADM's U-Net with an attention pool classifies
x_t = alpha_t x_0 + sigma_t eps at times t drawn evenly, and minimises the cross-entropy -log p(y | x_t), in nats. It
knows how noisy an image is, and so how little it can know of the class.

`classify` takes images of any process: image + sigma eps is scaled to the classifier's own. So one classifier guides a
chain, a score SDE and EDM alike (`config.stages.classifier` and `config.model.guidance.classifier_scale` of a diffusion
model).
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgen import options
from jaxgen.contract import Aux, Context, Family, State, make_update, new_state
from jaxgen.diffusion import former as formats
from jaxgen.diffusion import processes
from jaxgen.diffusion.guidance import FARTHEST
from jaxgen.diffusion.processes import Process, coefficients, ends_at_noise, expanded
from jaxgen.errors import UserError
from jaxgen.losses.likelihoods import cross_entropy
from jaxgen.networks import denoisers
from jaxgen.networks.adm import ADMClassifier
from jaxgen.options import Component, Fields, Section
from jaxgen.randomness import example_keys, normal

Array = jax.Array

former = formats.noisy_classifier  # fields of runs that were saved before there were sections
MOVED = formats.MOVED['noisy_classifier']
EMPTY: dict[str, Any] = {}
FRACTIONS = (0.25, 0.5, 0.75)  # of the way to noise, where accuracy is measured beside the clean image
# Attributes of the network that follow from the data and the shared machinery; `heads` is for head_channels 0.
GIVEN = (*denoisers.GIVEN, 'classes', 'heads')


class Model(NamedTuple):
    """A noisy classifier, its parts bound to their options."""

    process: Process
    network: ADMClassifier


@options.checked
def build(
    context: Context,
    *,
    process: Annotated[Section, Component(processes.PROCESSES)] = 'linear',
    network: Annotated[Section, Fields(ADMClassifier, GIVEN)] = EMPTY,
) -> Family:
    """Classifier of noisy images; a classifier's sample is None.

    Args:
      process: from data to noise, a function of diffusion/processes.py.
      network: of ADM's classifier, see `networks.adm.Half`.

    Raises:
      UserError: no labels, a field of the network that cannot work with the image.
    """
    if not context.classes:
        raise UserError("config.data.features must hold 'label': the class is what the model learns")
    section = {'name': 'adm', **network}
    denoisers.check_network(section, context.image)
    module = ADMClassifier(**network, classes=context.classes, remat=context.remat, dtype=context.dtype)
    model = Model(processes.make(process), module)
    return Family(
        functools.partial(init, model, context),
        make_update(functools.partial(loss, model), context.optim, 'classifier'),
        None,
        functools.partial(evaluate, model),
        classify=functools.partial(classify, model),
        divisor=denoisers.divisor_of(section),
        larger=('accuracy',),
    )


def init(model: Model, context: Context, rng, batch, frozen) -> State:
    """The state before the first update."""
    params = model.network.init(rng, jnp.zeros((1, *context.image)), jnp.zeros(1))['params']
    return new_state({'classifier': params}, context.optim)


def logits_at(model: Model, params: Any, x_t: Array, t: Array, train: bool = False, rngs: Any = None) -> Array:
    """Logits of the classes, float32 [n, classes], of noisy images x_t at times t [n]."""
    return model.network.apply({'params': params}, x_t, model.process.c_noise(t), train=train, rngs=rngs)


def score(logits: Array, label: Array) -> tuple[Array, Array]:
    """Cross-entropy [n], nats, and whether the most probable class is the label, [n], 0 or 1."""
    return cross_entropy(logits, label), (logits.argmax(-1) == label).astype(jnp.float32)


def loss(model: Model, params, state: State, frozen, batch, rng) -> tuple[Array, Aux]:
    """The cross-entropy of noisy images, at times drawn evenly."""
    rng_t, rng_noise, rng_dropout = jax.random.split(rng, 3)
    x_0 = batch['image']
    t = processes.uniform_times(model.process, rng_t, len(x_0))
    alpha, sigma = coefficients(model.process, t, x_0)
    x_t = alpha * x_0 + sigma * jax.random.normal(rng_noise, x_0.shape)
    logits = logits_at(model, params['classifier'], x_t, t, True, {'dropout': rng_dropout})
    entropy, correct = score(logits, batch['label'])
    return entropy.mean(), Aux({'loss': entropy.mean(), 'accuracy': correct.mean()})


def classify(model: Model, state: State, frozen, batch, rng) -> Array:
    """Logits of the classes, float32 [n, classes].

    Args:
      batch: 'image', clean, or with 'sigma' [n] image + sigma eps.
    """
    process, x = model.process, batch['image']
    # The training images are no less noisy than at the first level, as which a clean image counts, and no noisier than
    # at the last, for which noisier ones are scaled down.
    ends = process.at(jnp.array([process.start, process.end], jnp.float32))
    # Where the last level is noise alone, sigma / alpha from FARTHEST on counts as it.
    lowest, highest = ends.sigma / jnp.maximum(ends.alpha, ends.sigma / FARTHEST * ends_at_noise(process))
    sigma = batch.get('sigma', jnp.zeros(len(x)))
    t = process.time(jnp.clip(sigma, lowest, highest))
    scale = highest / jnp.maximum(sigma, highest)
    return logits_at(model, state.ema['classifier'], coefficients(process, t, x)[0] * expanded(scale, x) * x, t)


def evaluate(model: Model, state: State, frozen, batch, rng) -> dict[str, Array]:
    """Per image 'cross_entropy', nats, and 'accuracy' of the clean image, and both at 25, 50 and 75 percent of the way
    to noise ('accuracy/0.25', ...), [n] each."""
    process, x_0, label = model.process, batch['image'], batch['label']
    entropy, correct = score(classify(model, state, frozen, {'image': x_0}, rng), label)
    metrics = {'cross_entropy': entropy, 'accuracy': correct}
    noise = normal(example_keys(rng, batch), x_0.shape[1:])
    for fraction in FRACTIONS:
        t = jnp.full(len(x_0), process.low + fraction * (process.end - process.low))
        alpha, sigma = coefficients(process, t, x_0)
        entropy, correct = score(logits_at(model, state.ema['classifier'], alpha * x_0 + sigma * noise, t), label)
        metrics |= {f'cross_entropy/{fraction}': entropy, f'accuracy/{fraction}': correct}
    return metrics
