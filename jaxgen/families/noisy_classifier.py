"""A classifier of noisy images, log p(y | x_t), whose gradient guides a diffusion model to a class.

Dhariwal & Nichol 2021 (arXiv 2105.05233, section 4): the first half of ADM's U-Net with an attention pool is shown
x_t = alpha_t x_0 + sigma_t eps at steps t drawn evenly, and minimises the cross-entropy -log p(y | x_t), in nats. It
knows how noisy an image is, and so how little it can know of the class.

`classify` takes images of any process: image + sigma eps is scaled to the classifier's own. So one classifier guides a
chain, a score SDE and EDM alike (`config.stages.classifier` and `config.model.classifier_scale` of a diffusion model).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxgen.contract import Aux, Context, Family, make_update, new_state
from jaxgen.diffusion import processes
from jaxgen.diffusion.guidance import FARTHEST
from jaxgen.errors import UserError
from jaxgen.losses.likelihoods import cross_entropy
from jaxgen.networks.adm import ADMClassifier
from jaxgen.networks.denoisers import GIVEN, check_network
from jaxgen.randomness import example_keys, normal

Array = jax.Array

FIELDS = {f.name: f.default for f in dataclasses.fields(ADMClassifier) if f.name not in GIVEN}
PARTS = (0.25, 0.5, 0.75)  # of the way to noise, where accuracy is measured beside the clean image


def build(
    context: Context,
    *,
    adm: dict = FIELDS,
    process: str = 'linear',
    timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Family:
    """Args:
      adm: how the network looks, see `networks.adm.Half`.
      process, timesteps, beta_start, beta_end, sigma_min, sigma_max: see `processes.make`.

    classify gives logits [n, classes] of images, or with 'sigma' [n] in the batch of image + sigma eps. evaluate gives
    per image 'cross_entropy', nats, and 'accuracy' of the clean image, and both at 25, 50 and 75 percent of the way to
    noise ('accuracy/0.25', ...). sample is None.

    Raises:
      UserError: no labels, a field of the network that cannot work with the image, no such process.
    """
    if not context.classes:
        raise UserError("config.data.features must hold 'label': the class is what the model learns")
    if process not in processes.PROCESSES:
        raise UserError(f'config.model.process must be one of {processes.PROCESSES}; it is {process!r}')
    section = {**FIELDS, **adm}
    divisor = check_network('adm', section, context.image)
    if not section['head_channels']:
        raise UserError('config.model.adm.head_channels must be 1 or more: the last attention has heads of so many')
    network = ADMClassifier(**section, classes=context.classes, remat=context.remat, dtype=context.dtype)
    way = processes.make(
        process, timesteps=timesteps, beta_start=beta_start, beta_end=beta_end, sigma_min=sigma_min, sigma_max=sigma_max
    )

    def level(t: Array):
        """alpha and sigma at times t [n], [n, 1, 1, 1] each."""
        at = way.at(t)
        return at.alpha[:, None, None, None], at.sigma[:, None, None, None]

    def apply(weights, x, t, train: bool = False, rngs=None) -> Array:
        return network.apply({'params': weights['classifier']}, x, way.told(t), train=train, rngs=rngs)

    def score(logits: Array, label: Array) -> tuple[Array, Array]:
        """Cross-entropy [n], nats, and hits [n], 0 or 1."""
        return cross_entropy(logits, label), (logits.argmax(-1) == label).astype(jnp.float32)

    def loss(params, state, frozen, batch, rng):
        rng_t, rng_noise, rng_dropout = jax.random.split(rng, 3)
        x_0 = batch['image']
        t = processes.uniform_times(way, rng_t, len(x_0))
        alpha, sigma = level(t)
        x_t = alpha * x_0 + sigma * jax.random.normal(rng_noise, x_0.shape)
        entropy, hits = score(apply(params, x_t, t, True, {'dropout': rng_dropout}), batch['label'])
        return entropy.mean(), Aux({'loss': entropy.mean(), 'accuracy': hits.mean()})

    update = make_update(loss, context.optim, 'classifier')

    def init(rng, batch, frozen):
        weights = network.init(rng, jnp.zeros((1, *context.image)), jnp.zeros(1))['params']
        return new_state({'classifier': weights}, context.optim)

    def evaluate(state, frozen, batch, rng):
        x_0, label, n = batch['image'], batch['label'], len(batch['image'])
        entropy, hits = score(classify(state, frozen, {'image': x_0}, rng), label)
        figures = {'cross_entropy': entropy, 'accuracy': hits}
        noise = normal(example_keys(rng, batch), x_0.shape[1:])
        for part in PARTS:
            t = jnp.full(n, way.low + part * (way.end - way.low))
            alpha, sigma = level(t)
            entropy, hits = score(apply(state.ema, alpha * x_0 + sigma * noise, t), label)
            figures |= {f'cross_entropy/{part}': entropy, f'accuracy/{part}': hits}
        return figures

    def classify(state, frozen, batch, rng):
        """Logits, float32 [n, classes]. batch: 'image', and 'sigma' [n] of image + sigma eps (none: clean images)."""
        x = batch['image']
        # There is nothing it was shown below the first level, as which a clean image counts, nor above the last, for
        # which what is noisier is scaled down.
        ends = way.at(jnp.array([way.start, way.end], jnp.float32))
        # A flow's last level is noise alone: from FARTHEST on counts as it.
        lowest, highest = ends.sigma / jnp.maximum(ends.alpha, ends.sigma / FARTHEST * (process == 'flow'))
        sigma = batch.get('sigma', jnp.zeros(len(x)))
        t = way.time(jnp.clip(sigma, lowest, highest))
        scale = highest / jnp.maximum(sigma, highest)
        return apply(state.ema, level(t)[0] * scale[:, None, None, None] * x, t)

    return Family(init, update, None, evaluate, classify=classify, divisor=divisor)
