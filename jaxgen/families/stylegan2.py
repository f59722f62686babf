"""StyleGAN2 with adaptive discriminator augmentation.

Karras et al. 2020, Analyzing and Improving the Image Quality of StyleGAN (arXiv 1912.04958); Karras et al. 2020,
Training Generative Adversarial Networks with Limited Data (arXiv 2006.06676). Networks: networks/stylegan2.py. The
adversarial loss is the non-saturating one on logits, and each network has a regularisation of its own:

    discriminator  R1, gamma / 2 |grad D(x)|^2 at data x, through the augmentation
    generator      path length, (|J_w^T y| - a)^2 with J_w = dG / dw, y ~ N(0, I) and a the running mean of that length:
                   a step in w is to change the image by as much whatever its start and its direction (eq. 4)

Both are lazy (section 3.1): taken in one update of `r1_every` or `path_every` only, where they count as often, in a
step of their own. An optimiser that makes k + 1 steps in k updates is to have c times the learning rate and betas to
the power of c = k / (k + 1) (appendix B): the configs say so in config.optim.networks.

Samples are drawn at w' = mean + truncation (w - mean), with the mean of w over the latents of the last 200 updates or
so, by the averaged mapping network: the one that samples.

`encode` projects an image into W (section 5, appendix D): gradient descent from the mean of w to the w whose sample is
nearest to the image. Noise is optimised along with w, held to be noise by a penalty on its autocorrelation, so that w
need not explain what noise does; then it is dropped.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Annotated, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgen import options
from jaxgen.augmentation.adaptive import CHANGES, adapted, augment
from jaxgen.checks import check_discriminator, check_labels, size_text
from jaxgen.contract import (
    Aux,
    Context,
    Family,
    Latents,
    State,
    advance,
    by_settings,
    gradient_step,
    new_state,
    running_mean,
    shard_batch,
    store,
)
from jaxgen.errors import UserError
from jaxgen.losses import perceptual
from jaxgen.losses.adversarial import non_saturating_generator, r1_penalty, vanilla_discriminator
from jaxgen.networks.layers import downsample_mean
from jaxgen.networks.stylegan2 import ARCHITECTURES, Discriminator, Generator, noise_sizes, styles
from jaxgen.optim import Optim
from jaxgen.options import TRACED, Count, Fraction, NonNegative, OneOf
from jaxgen.randomness import example_keys, normal

Array = jax.Array

MEAN_DECAY = 0.995  # of the mean of w
DEVIATION_DECAY = 0.99  # of the mean deviation of a group of data
PATH_BATCH_SHRINK = 2  # the path length is taken of one in so many of a batch's images


class Networks(NamedTuple):
    """Both networks, and what is drawn for them."""

    generator: Generator
    discriminator: Discriminator
    conditional: bool
    mixing: float  # fraction of images with the styles of two latents
    augmentation: tuple[str, ...]

    @property
    def layers(self) -> int:
        """Layers that have a style."""
        return styles(self.generator.size)

    def label(self, batch: dict[str, Array]) -> Array | None:
        return batch['label'] if self.conditional else None

    def map(self, weights, z: Array, label: Array | None) -> Array:
        """w [n, latent] of z [n, latent]."""
        return self.generator.apply({'params': weights}, z, label, method='map')

    def synthesise(self, weights, w: Array, noise: list[Array]) -> Array:
        """Images [n, H, W, C], not clipped, of w [n, latent], or [n, layers, latent] with a style for each layer."""
        if w.ndim == 2:
            w = jnp.broadcast_to(w[:, None], (len(w), self.layers, w.shape[1]))
        return self.generator.apply({'params': weights}, w, noise, method='synthesise')

    def noise(self, rng: Array, n: int) -> list[Array]:
        """[n, s, s, 1] for each layer."""
        sizes = noise_sizes(self.generator.size)
        all_of_it = jax.random.normal(rng, (n, sum(s * s for s in sizes)))  # one draw compiles faster than many
        pieces = jnp.split(all_of_it, np.cumsum([s * s for s in sizes])[:-1], 1)
        return [piece.reshape(n, s, s, 1) for piece, s in zip(pieces, sizes, strict=True)]

    def mixed_styles(self, weights, batch: dict[str, Array], rng: Array) -> Array:
        """w [n, layers, latent] of two latents batch['z'] [n, 2, latent] each."""
        first, second = (self.map(weights, batch['z'][:, i], self.label(batch)) for i in (0, 1))
        return mix(first, second, self.layers, self.mixing, rng)

    def generate(self, weights, batch: dict[str, Array], rng: Array) -> Array:
        """Images of training's latents batch['z'] [n, 2, latent]."""
        mixing_rng, noise_rng = jax.random.split(rng)
        w = self.mixed_styles(weights, batch, mixing_rng)
        return self.synthesise(weights, w, self.noise(noise_rng, len(w)))

    def discriminate(self, params, x: Array, label: Array | None, p: Array, rng: Array) -> tuple[Array, Array]:
        """Values [n] of images augmented with probability p, and the deviations of their groups."""
        x = augment(x, rng, p, self.augmentation)
        return self.discriminator.apply({'params': params['discriminator']}, x, label)


def mix(first: Array, second: Array, layers: int, probability: float, rng: Array) -> Array:
    """Styles of all layers [n, layers, latent]: of w `first` [n, latent], and with some probability, image by image, of
    `second` from a layer on that is drawn evenly, not the first one (Karras et al. 2019, arXiv 1812.04948, section
    3.1)."""
    chex.assert_equal_shape([first, second])
    coin, u = jax.random.uniform(rng, (len(first), 2)).T
    crossover = jnp.where(coin < probability, 1 + jnp.floor(u * (layers - 1)), layers)
    return jnp.where((jnp.arange(layers) < crossover[:, None])[..., None], first[:, None], second[:, None])


# --- losses


def generator_loss(networks: Networks, params, state, frozen, batch, rng):
    """-E log s(D(G(z))), of augmented samples."""
    rng, augment_rng = jax.random.split(rng)
    images = networks.generate(params['generator'], batch, rng)
    values, _ = networks.discriminate(params, images, networks.label(batch), state.extra['p'], augment_rng)
    value = non_saturating_generator(values)
    return value, Aux({'generator_loss': value})


def discriminator_loss(networks: Networks, params, state, frozen, batch, rng):
    """-E log s(D(x)) - E log(1 - s(D(G(z)))), of augmented data and samples."""
    rng, real_rng, fake_rng = jax.random.split(rng, 3)
    label, p = networks.label(batch), state.extra['p']
    images = networks.generate(params['generator'], batch, rng)
    real, deviation = networks.discriminate(params, batch['image'], label, p, real_rng)
    fake, _ = networks.discriminate(params, images, label, p, fake_rng)
    value = vanilla_discriminator(real, fake)
    kept = {'signs': jnp.sign(real).mean(), 'deviation': deviation.mean()}
    return value, Aux({'discriminator_loss': value, 'signs': kept['signs']}, kept)


def discriminator_extra(state: State, kept: dict) -> dict:
    """Entries of State.extra after a step of the discriminator: the sum of its signs, and the running deviation."""
    deviation = running_mean(state, state.extra['deviation'], kept['deviation'], DEVIATION_DECAY)
    return {'signs': state.extra['signs'] + kept['signs'], 'deviation': deviation}


def r1_loss(networks: Networks, weight: float, every: int, params, state, frozen, batch, rng):
    """R1 at augmented data, as much as in `every` updates."""

    def critic(x):
        return networks.discriminate(params, x, networks.label(batch), state.extra['p'], rng)[0]

    penalty = r1_penalty(critic, batch['image']).mean()
    return every * weight * penalty, Aux({}, {'r1': penalty})


def path_lengths(synthesise: Callable, w: Array, rng: Array) -> Array:
    """|J_w^T y| for a random image y of noise with a mean square of 1 / (H W), float32 [n].

    Args:
      synthesise: w -> images [n, H, W, C], each image by its own w.
      w: [n, layers, latent]. The squared length is the mean over layers.
    """
    chex.assert_rank(w, 3)
    images, transposed = jax.vjp(synthesise, w)
    y = jax.random.normal(rng, images.shape) / math.sqrt(images.shape[1] * images.shape[2])
    square = jnp.square(transposed(y)[0]).sum(-1).mean(-1)
    return jnp.sqrt(jnp.maximum(square, 1e-12))  # the root has no derivative at 0


def path_loss(networks: Networks, weight: float, every: int, decay: float, params, state, frozen, batch, rng):
    """E (|J_w^T y| - a)^2 (eq. 4), as much as in `every` updates; a goes on by the mean length of this batch."""
    mixing_rng, noise_rng, pixel_rng = jax.random.split(rng, 3)
    weights = params['generator']
    w = networks.mixed_styles(weights, batch, mixing_rng)
    noise = networks.noise(noise_rng, len(w))
    lengths = path_lengths(lambda w: networks.synthesise(weights, w, noise), w, pixel_rng)
    new = jax.lax.stop_gradient(lengths.mean())
    mean = state.extra['path_length'] + decay * (new - state.extra['path_length'])
    penalty = jnp.square(lengths - mean).mean()
    return every * weight * penalty, Aux({}, {'path': penalty, 'path_length': mean})


# --- training


def counted(optim: Optim, every: int) -> Optim:
    """The optimiser makes a step more in `every` updates, and its schedule goes by updates all the same."""
    return optim._replace(tx=lambda name, times=1: optim.tx(name, times * (every + 1) / every))


def lazy_step(step: Callable, every: int) -> Callable:
    """(state, frozen, batch, rng) -> state after `step` in one of `every` updates, and as it is in the others."""

    def run(state: State, frozen, batch, rng) -> State:
        taken = state.step % every == 0
        return jax.lax.cond(taken, lambda s: step(s, frozen, batch, rng)[0], lambda s: s, state)

    return run


class Steps(NamedTuple):
    """The optimiser's steps of an update; None: a penalty without weight."""

    generator: Callable
    path: Callable | None
    discriminator: Callable
    r1: Callable | None


def make_steps(
    networks: Networks, optim: Optim, r1: float, r1_every: int, path: float, path_every: int, path_decay: float
) -> Steps:
    """The steps of an update, each penalty with the optimiser that its network has."""
    partial = functools.partial
    of_generator = counted(optim, path_every) if path else optim
    of_discriminator = counted(optim, r1_every) if r1 else optim
    path_step = gradient_step(partial(path_loss, networks, path, path_every, path_decay), of_generator, 'generator')
    discriminator_step = gradient_step(partial(discriminator_loss, networks), of_discriminator, 'discriminator')
    r1_step = gradient_step(partial(r1_loss, networks, r1, r1_every), of_discriminator, 'discriminator')
    return Steps(
        generator=gradient_step(partial(generator_loss, networks), of_generator, 'generator'),
        path=lazy_step(store(path_step), path_every) if path else None,
        discriminator=store(discriminator_step, discriminator_extra),
        r1=lazy_step(store(r1_step), r1_every) if r1 else None,
    )


class Adaptation(NamedTuple):
    """How the probability p of the augmentation follows E sign D(data); fields of `build`."""

    target: float  # 0: p is fixed
    every: int
    images: int

    def extra(self, extra: dict, step: Array, n: int) -> dict:
        """Entries of State.extra after update number `step`, of n images: the sum of signs since the last step of p,
        and p."""
        now = step % self.every == 0
        signs, p = extra['signs'], extra['p']
        entries = {'signs': jnp.where(now, 0.0, signs)}
        if self.target:
            new = adapted(p, signs / self.every, n * self.every, target=self.target, images_to_one=self.images)
            entries['p'] = jnp.where(now, new, p)
        return entries


def init(networks: Networks, optim: Optim, path: float, augment_p: float, rng, batch, frozen):
    """The state before the first update: both networks, and of the generator an average."""
    generator_rng, discriminator_rng = jax.random.split(rng)
    n, parts = len(batch['image']), PATH_BATCH_SHRINK * optim.accumulate
    if path and n % parts:
        raise UserError(
            f'config.data.batch = {n} must be a multiple of {parts}: '
            f'the path length is taken of one image in {PATH_BATCH_SHRINK}'
        )
    latent, label = networks.generator.latent, batch['label'][:1] if networks.conditional else None
    params = {
        'generator': networks.generator.init(generator_rng, jnp.zeros((1, latent)), label)['params'],
        'discriminator': networks.discriminator.init(discriminator_rng, batch['image'][:1], label)['params'],
    }
    extra = {name: jnp.zeros(()) for name in ('r1', 'path', 'path_length', 'signs', 'deviation')}
    extra |= {'p': jnp.full((), augment_p, jnp.float32), 'w': jnp.zeros(latent)}
    # Only the generator makes samples; an averaged discriminator would serve nothing.
    return new_state(params, optim, extra, ema=('generator',))


def update(networks: Networks, optim: Optim, steps: Steps, adaptation: Adaptation, state, frozen, batch, rng):
    """One update: a step of each network, the lazy penalties, and the probability of the augmentation."""
    latents_rng, generator_rng, path_rng, discriminator_rng, r1_rng = jax.random.split(rng, 5)
    n = len(batch['image'])
    condition = {'label': batch['label']} if networks.conditional else {}
    # Two latents to mix, for each network.
    z = shard_batch(jax.random.normal(latents_rng, (n, 2, 2, networks.generator.latent)))
    latents = [{'z': z[:, i], **condition} for i in (0, 1)]
    batch = {'image': batch['image'], **condition}

    state, generator_aux = steps.generator(state, frozen, latents[0], generator_rng)
    if steps.path:
        few = jax.tree.map(lambda x: x[::PATH_BATCH_SHRINK], latents[0])
        state = steps.path(state, frozen, few, path_rng)
    state, discriminator_aux = steps.discriminator(state, frozen, {**batch, **latents[1]}, discriminator_rng)
    if steps.r1:
        state = steps.r1(state, frozen, batch, r1_rng)
    logs = {name: state.extra[name] for name in ('r1', 'path', 'path_length')} | {'augment_p': state.extra['p']}

    after = advance(state, optim)
    w = networks.map(after.ema['generator'], latents[0]['z'][:, 0], networks.label(batch)).mean(0)
    extra = {'w': running_mean(state, state.extra['w'], w, MEAN_DECAY)}
    extra |= adaptation.extra(state.extra, after.step, n)
    return after.replace(extra={**state.extra, **extra}), generator_aux.logs | discriminator_aux.logs | logs


# --- samples


def sample(networks: Networks, state, frozen, batch, rng, settings: dict):
    """Images [n, H, W, C] at w' = mean + truncation (w - mean), each with noise of its own."""
    weights, mean = state.ema['generator'], state.extra['w']
    keys = jax.vmap(jax.random.split)(example_keys(rng, batch))
    w = networks.map(weights, normal(keys[:, 0], (networks.generator.latent,)), networks.label(batch))
    noise = jax.vmap(lambda key: [one[0] for one in networks.noise(key, 1)])(keys[:, 1])
    return jnp.clip(networks.synthesise(weights, mean + settings['truncation'] * (w - mean), noise), -1, 1)


def decode(networks: Networks, state, frozen, batch, latents, rng):
    """Images [n, H, W, C] of w [n, latent], all with the same noise."""
    return jnp.clip(networks.synthesise(state.ema['generator'], latents, networks.noise(rng, 1)), -1, 1)


def evaluate(networks: Networks, state, frozen, batch, rng):
    """{'discriminator': value [n] of each image}, as of one in a group with the running deviation, which before the
    first update, where weights are published ones, is that of this batch."""
    check_discriminator(state.params)
    x, label, variables = batch['image'], networks.label(batch), {'params': state.params['discriminator']}

    def own(deviation: Array) -> Array:
        return networks.discriminator.apply(variables, x, label, jnp.broadcast_to(deviation, (len(x),)))[0]

    def by_batch(deviation: Array) -> Array:
        return own(networks.discriminator.apply(variables, x, label)[1].mean())

    return {'discriminator': jax.lax.cond(state.step > 0, own, by_batch, state.extra['deviation'])}


# --- projection of images into W (section 5, appendix D), with the published numbers

PROJECTION_RATE = 0.1  # learning rate
RAMP_UP, RAMP_DOWN = 0.05, 0.25  # fractions of the steps in which it rises and falls
W_NOISE = 0.05  # added to w at first, in standard deviations of w
W_NOISE_END = 0.75  # fraction of the steps after which there is none
NOISE_PENALTY = 1e5  # weight of the autocorrelation
W_DRAWS = 10_000  # that mean and deviation are taken of


def autocorrelation(noise: Array) -> Array:
    """Penalty of a map [n, s, s, 1] that is not white: [n], over several sizes (appendix D, eq. 6)."""
    total = 0.0
    while True:
        for axis in (1, 2):
            total = total + jnp.square((noise * jnp.roll(noise, 1, axis)).mean((1, 2, 3)))
        if noise.shape[1] <= 8:
            return total
        noise = downsample_mean(noise)


def whitened(noise: Array) -> Array:
    """Maps [n, s, s, 1] with mean 0 and mean square 1 each."""
    noise = noise - noise.mean((1, 2, 3), keepdims=True)
    return noise * jax.lax.rsqrt(jnp.square(noise).mean((1, 2, 3), keepdims=True))


def projection_rate(t: Array) -> Array:
    """Learning rate at the fraction t of the steps."""
    fall = 0.5 - 0.5 * jnp.cos(math.pi * jnp.minimum(1, (1 - t) / RAMP_DOWN))
    return PROJECTION_RATE * fall * jnp.minimum(1, t / RAMP_UP)


def image_distance(measure: Callable | None, most: int, frozen, x: Array, y: Array) -> Array:
    """Objective of the projection, [n]: a perceptual distance of images no larger than `most` (0: of any size), or
    else the mean squared difference of pixels."""
    chex.assert_equal_shape([x, y])
    if measure is None:
        return jnp.square(x - y).mean((1, 2, 3))
    while most and x.shape[1] > most:
        x, y = downsample_mean(x), downsample_mean(y)
    return measure(frozen, x, y)


def encode(networks: Networks, distance: Callable, steps: int, state, frozen, batch, rng):
    """w float32 [n, latent] whose sample has the least distance to the image, see above."""
    x, weights = batch['image'], state.ema['generator']
    latent, classes = networks.generator.latent, networks.generator.classes
    z_rng, label_rng, noise_rng, steps_rng = jax.random.split(rng, 4)
    label = jax.random.randint(label_rng, (W_DRAWS,), 0, classes) if networks.conditional else None
    draws = networks.map(weights, jax.random.normal(z_rng, (W_DRAWS, latent)), label)
    mean = draws.mean(0)
    deviation = jnp.sqrt(jnp.square(draws - mean).sum(-1).mean())

    def loss(variables, w_noise):
        w, noise = variables
        y = networks.synthesise(weights, w + w_noise, noise)
        return (distance(frozen, x, y) + NOISE_PENALTY * sum(map(autocorrelation, noise))).sum()

    def one(carry, t_and_key):
        variables, opt = carry
        t, key = t_and_key
        width = deviation * W_NOISE * jnp.square(jnp.maximum(0, 1 - t / W_NOISE_END))
        gradient = jax.grad(loss)(variables, width * jax.random.normal(key, variables[0].shape))
        change, opt = tx.update(gradient, opt)
        w, noise = optax.apply_updates(variables, change)
        return ((w, list(map(whitened, noise))), opt), None

    tx = optax.adam(lambda step: projection_rate(step / steps))
    start = (jnp.broadcast_to(mean, (len(x), latent)), networks.noise(noise_rng, len(x)))
    times = (jnp.arange(steps) / steps, jax.random.split(steps_rng, steps))
    ((w, _), _), _ = jax.lax.scan(one, (start, tx.init(start)), times)
    return w


def check(context: Context, conditional: bool, channel_base: int) -> None:
    """Raises UserError for fields that do not fit the data."""
    height, columns, _ = context.image
    check_labels(context, conditional)
    if height != columns:
        raise UserError(
            f'StyleGAN2 makes square images: set config.data.size to one number; it is {size_text(context.image)}'
        )
    if height < 4 or height & (height - 1):
        raise UserError(f'config.data.size = {height} must be a power of two, at least 4')
    if channel_base < height:
        raise UserError(f'config.model.channel_base must be config.data.size = {height} or more; it is {channel_base}')


@options.checked
def build(
    context: Context,
    *,
    latent: Count = 512,
    mapping_layers: Count = 8,
    channel_base: Count = 32768,
    channel_max: Count = 512,
    generator_architecture: Annotated[str, OneOf(*ARCHITECTURES)] = 'skip',
    discriminator_architecture: Annotated[str, OneOf(*ARCHITECTURES)] = 'resnet',
    discriminator_mapping_layers: Annotated[int, '[0, inf)'] = 0,
    clamp: NonNegative = 0.0,
    group: Count = 4,
    conditional: bool = False,
    mixing: Fraction = 0.9,
    r1: NonNegative = 10.0,
    r1_every: Count = 16,
    path: NonNegative = 2.0,
    path_every: Count = 4,
    path_decay: Fraction = 0.01,
    augmentation: Annotated[tuple[str, ...], OneOf(*CHANGES)] = ('blit', 'geometric', 'colour'),
    augment_p: Fraction = 0.0,
    augment_target: Fraction = 0.6,
    augment_every: Count = 4,
    augment_images: Count = 500_000,
    truncation: Annotated[NonNegative, TRACED] = 1.0,
    projection_steps: Count = 1000,
    lpips: tuple[str, ...] = (),
) -> Family:
    """StyleGAN2-ADA.

    Args:
      latent: dimensions of z and of w.
      mapping_layers, channel_base, channel_max: see networks/stylegan2.py.
      generator_architecture, discriminator_architecture: 'orig', layers alone; 'skip', every size adds to the image, or
        reads it; 'resnet', residual. The paper's are the defaults; for CIFAR-10 the discriminator is 'orig'.
      discriminator_mapping_layers: of a conditional discriminator, 8 in the published code always; 0: mapping_layers.
      clamp: bound of all maps, so that they fit half precision, 256 in the published code; 0: none.
      group: images of the minibatch standard deviation.
      conditional: both networks are conditioned on the class, `batch['label']`, and so are samples.
      mixing: fraction of training's images with the styles of two latents, the second from a random layer on.
      r1, r1_every: gamma of R1, 0: none; it is taken in one of so many updates.
      path, path_every, path_decay: weight of the path length, 0: none; it is taken in one of so many updates; weight of
        the newest batch in its running mean.
      augmentation: of the discriminator's inputs, of 'blit', 'geometric' and 'colour'; (), none. See
        augmentation/adaptive.py.
      augment_p: their probability at the start, or throughout if augment_target is 0.
      augment_target, augment_every, augment_images: target of E sign D(data); updates after which p takes a step;
        images in which it could go from 0 to 1.
      truncation: psi, of samples: 1, all of the distribution; 0, one image.
      projection_steps: of `encode`, 1000 in the paper.
      lpips: files with the weights of LPIPS on VGG-16, the distance of `encode`; or config.stages.perceptual, a run
        with features. Without either it is that of pixels.

    Logs: the losses without penalties; 'signs', E sign D(data), and 'augment_p'; 'r1' and 'path', the newest penalties
    without their weights, and 'path_length', the running mean.

    encode returns w [n, latent]; decode takes it, with noise of `rng` that is the same for all. evaluate returns
    'discriminator' per image: its value, of meaning only next to that of other images under the same discriminator, and
    as if the image stood in a group as varied as the data's are.

    Raises:
      UserError: values that do not fit the data.
    """
    check(context, conditional, channel_base)
    size, _, channels = context.image
    common = dict(channel_base=channel_base, channel_max=channel_max, classes=context.classes if conditional else 0)
    common |= dict(clamp=clamp, dtype=context.dtype, remat=context.remat)
    generator = Generator(
        size, channels, latent, architecture=generator_architecture, mapping_layers=mapping_layers, **common
    )
    discriminator = Discriminator(
        group=group, architecture=discriminator_architecture,
        mapping_layers=discriminator_mapping_layers or mapping_layers, **common,
    )  # fmt: skip
    networks = Networks(generator, discriminator, conditional, mixing, augmentation)
    steps = make_steps(networks, context.optim, r1, r1_every, path, path_every, path_decay)
    adaptation = Adaptation(augment_target if augmentation else 0.0, augment_every, augment_images)
    measure = perceptual.measure(context.stages, lpips, context.image)  # (frozen, x, y) -> [n]
    distance = functools.partial(image_distance, measure, 256 if lpips else 0)  # VGG-16 was trained on such images
    partial = functools.partial

    def settings():
        return {'truncation': truncation}

    return Family(
        partial(init, networks, context.optim, path, augment_p),
        partial(update, networks, context.optim, steps, adaptation),
        by_settings(partial(sample, networks), settings),
        partial(evaluate, networks),
        partial(encode, networks, distance, projection_steps),
        partial(decode, networks),
        conditions=('label',) if conditional else (),
        divisor=4,
        free=('truncation', 'projection_steps', 'lpips'),
        sampling=('truncation',),
        settings=settings,
        latents=Latents(shape=(latent,)),
    )
