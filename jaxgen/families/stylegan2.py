"""StyleGAN2 with adaptive discriminator augmentation.

Karras et al. 2020, Analyzing and Improving the Image Quality of StyleGAN (arXiv 1912.04958); Karras et al. 2020,
Training Generative Adversarial Networks with Limited Data (arXiv 2006.06676). Networks: networks/stylegan2.py. The game
is the non-saturating one on logits, and each player has a penalty of its own:

    discriminator  R1, gamma / 2 |grad D(x)|^2 at data x, through the augmentation
    generator      path length, (|J_w^T y| - a)^2 with J_w = dG / dw, y ~ N(0, I) and a the running mean of that length:
                   a step in w is to change the image by as much wherever it starts and wherever it goes (eq. 4)

Both are lazy (section 3.1): taken in one update of `r1_every` or `path_every` only, where they count as often, in a
step of their own. An optimiser that makes k + 1 steps in k updates is to have c times the learning rate and betas to
the power of c = k / (k + 1) (appendix B): the configs say so in config.optim.networks.

Images are drawn at w' = mean + truncation (w - mean), with the mean of w over the latents of the last 200 updates or
so, by the averaged mapping network: the one that samples.

`encode` finds the w that paints an image (section 5, appendix D), by gradient descent from the mean of w. Noise is
fitted along with w, held to be noise by a penalty on its autocorrelation, so that w need not explain what noise does;
then it is given up.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgen.augmentation.adaptive import CHANGES, adapted, augment
from jaxgen.checks import check_labels
from jaxgen.contract import (
    Aux,
    Context,
    Family,
    Latents,
    advance,
    gradient_step,
    new_state,
    running_mean,
    shard_batch,
    store,
)
from jaxgen.errors import UserError
from jaxgen.losses import perceptual as perception
from jaxgen.losses.adversarial import non_saturating_generator, r1_penalty, vanilla_discriminator
from jaxgen.networks.layers import downsample_mean
from jaxgen.networks.stylegan2 import Discriminator, Generator, noise_sizes, styles
from jaxgen.optim import Optim
from jaxgen.randomness import example_keys, normal

Array = jax.Array

MEAN_DECAY = 0.995  # of the mean of w
DEVIATION_DECAY = 0.99  # of the mean deviation of a group of data
PATH_SHARE = 2  # the path length is taken of one in so many of a batch's images
# Of the projection of an image into w, as published.
PROJECTION = dict(rate=0.1, rise=0.05, fall=0.25, jitter=0.05, jitter_until=0.75, noise_penalty=1e5, draws=10_000)


def counted(optim: Optim, every: int) -> Optim:
    """The optimiser makes a step more in `every` updates, and its schedule goes by updates all the same."""
    return optim._replace(tx=lambda name, times=1: optim.tx(name, times * (every + 1) / every))


def mix(first: Array, second: Array, layers: int, share: float, rng: Array) -> Array:
    """Styles of all layers [n, layers, latent]: of w `first` [n, latent], and in a share of the images of `second` from
    a layer on that is drawn evenly, not the first one (Karras et al. 2019, arXiv 1812.04948, section 3.1)."""
    coin, u = jax.random.uniform(rng, (len(first), 2)).T
    since = jnp.where(coin < share, 1 + jnp.floor(u * (layers - 1)), layers)
    return jnp.where((jnp.arange(layers) < since[:, None])[..., None], first[:, None], second[:, None])


def path_lengths(paint: Callable, w: Array, rng: Array) -> Array:
    """|J_w^T y| for a random image y of noise with a mean square of 1 / (H W), float32 [n].

    Args:
      paint: w -> images [n, H, W, C], each image by its own w.
      w: [n, layers, latent]. The squared length is the mean over layers.
    """
    images, back = jax.vjp(paint, w)
    y = jax.random.normal(rng, images.shape) / math.sqrt(images.shape[1] * images.shape[2])
    square = jnp.square(back(y)[0]).sum(-1).mean(-1)
    return jnp.sqrt(jnp.maximum(square, 1e-12))  # the root has no derivative at 0


def autocorrelation(noise: Array) -> Array:
    """Penalty of a map [n, s, s, 1] that is not white: [n], over several sizes (appendix D, eq. 6)."""
    total = 0.0
    while True:
        for axis in (1, 2):
            total = total + jnp.square((noise * jnp.roll(noise, 1, axis)).mean((1, 2, 3)))
        if noise.shape[1] <= 8:
            return total
        noise = downsample_mean(noise)


def build(
    context: Context,
    *,
    latent: int = 512,
    mapping_layers: int = 8,
    channel_base: int = 32768,
    channel_max: int = 512,
    group: int = 4,
    conditional: bool = False,
    mixing: float = 0.9,
    r1: float = 10.0,
    r1_every: int = 16,
    path: float = 2.0,
    path_every: int = 4,
    path_decay: float = 0.01,
    augmentation: tuple[str, ...] = ('blit', 'geometric', 'colour'),
    augment_p: float = 0.0,
    augment_target: float = 0.6,
    augment_every: int = 4,
    augment_images: int = 500_000,
    truncation: float = 1.0,
    projection_steps: int = 1000,
    lpips: tuple[str, ...] = (),
) -> Family:
    """StyleGAN2-ADA.

    Args:
      latent: dimensions of z and of w.
      mapping_layers, channel_base, channel_max: see networks/stylegan2.py. The published code maps labels for a
        conditional discriminator by 8 layers always; here both networks have mapping_layers.
      group: images whose deviation the discriminator sees.
      conditional: both players are told the class, `batch['label']`; samples then take a class as their condition.
      mixing: share of training's images with the styles of two latents, the second from a random layer on.
      r1, r1_every: gamma of R1, 0: none; see above.
      path, path_every, path_decay: weight of the path length, 0: none; share of the newest batch in the running mean.
      augmentation: changes of what the discriminator sees, of 'blit', 'geometric' and 'colour'; (), none.
        See losses/adaptive_augmentation.py.
      augment_p: their probability at the start, or throughout if augment_target is 0.
      augment_target, augment_every, augment_images: target of E sign D(data); updates after which p takes a step;
        images in which it could go from 0 to 1.
      truncation: psi, of samples: 1, all of the distribution; 0, one image.
      projection_steps: of `encode`, 1000 in the paper.
      lpips: files with the weights of LPIPS on VGG-16, for `encode` to see with; or config.stages.perceptual, a run
        with features. Without either it measures by pixels.

    Logs: the losses without penalties; 'signs', E sign D(data), and 'augment_p'; 'r1' and 'path', the newest penalties
    without their weights, and 'path_length', the running mean.

    State.extra: what `update` carries on, and 'w', the mean of w. encode gives w [n, latent]; decode takes it, with
    noise of `rng` that is the same for all.

    evaluate gives 'discriminator' per image: its value, of meaning only next to that of other images under the same
    discriminator, and as if the image stood in a group as varied as the data's are.

    Raises:
      UserError: a value that cannot work.
    """
    height, columns, channels = context.image
    check_labels(context, conditional)
    if height != columns or height < 4 or height & (height - 1):
        raise UserError(f'config.data.size = {height} must be a power of two, at least 4')
    if min(latent, mapping_layers, group, r1_every, path_every, augment_every, augment_images, projection_steps) < 1:
        raise UserError(
            'config.model: latent, mapping_layers, group, r1_every, path_every, augment_every, augment_images and '
            'projection_steps must be 1 or more'
        )
    if min(channel_base // height, channel_max) < 1:
        raise UserError(f'config.model.channel_base must be {height} or more, channel_max 1 or more')
    if min(r1, path, truncation) < 0:
        raise UserError('config.model: r1, path and truncation must be 0 or more')
    shares = dict(mixing=mixing, path_decay=path_decay, augment_p=augment_p, augment_target=augment_target)
    for field, value in shares.items():
        if not 0 <= value <= 1:
            raise UserError(f'config.model.{field} must be between 0 and 1; it is {value}')
    if unknown := [name for name in augmentation if name not in CHANGES]:
        raise UserError(f'config.model.augmentation must be of {tuple(CHANGES)}; {unknown[0]!r} is not')
    seen_by = perception.measure(context.stages, lpips, context.image)  # (frozen, x, y) -> [n]

    common = dict(channel_base=channel_base, channel_max=channel_max, classes=context.classes if conditional else 0)
    common |= dict(mapping_layers=mapping_layers, dtype=context.dtype, remat=context.remat)
    generator = Generator(height, channels, latent, **common)
    discriminator = Discriminator(group=group, **common)
    layers = styles(height)

    def labels(batch) -> Array | None:
        return batch['label'] if conditional else None

    def to_w(weights, z: Array, label: Array | None) -> Array:
        return generator.apply({'params': weights}, z, label, method='map')

    def paint(weights, w: Array, noise) -> Array:
        """Images [n, H, W, C], not clipped, of w [n, layers, latent]."""
        return generator.apply({'params': weights}, w, noise, method='paint')

    def mixed(weights, batch, rng: Array) -> Array:
        """w [n, layers, latent] of two latents batch['z'] [n, 2, latent] each."""
        first, second = (to_w(weights, batch['z'][:, i], labels(batch)) for i in (0, 1))
        return mix(first, second, layers, mixing, rng)

    def noise_of(rng: Array, n: int) -> list[Array]:
        """[n, s, s, 1] for each layer."""
        areas = [s * s for s in noise_sizes(height)]
        all_of_it = jax.random.normal(rng, (n, sum(areas)))  # one draw compiles faster than many
        pieces = jnp.split(all_of_it, np.cumsum(areas)[:-1], 1)
        return [piece.reshape(n, s, s, 1) for piece, s in zip(pieces, noise_sizes(height), strict=True)]

    def generate(weights, batch, rng: Array) -> Array:
        mixing_rng, noise_rng = jax.random.split(rng)
        return paint(weights, mixed(weights, batch, mixing_rng), noise_of(noise_rng, len(batch['z'])))

    def judge(params, x: Array, label: Array | None, p: Array, rng: Array) -> tuple[Array, Array]:
        """Values [n] of augmented images, and the deviations of their groups."""
        return discriminator.apply({'params': params['discriminator']}, augment(x, rng, p, augmentation), label)

    def generator_loss(params, state, frozen, batch, rng):
        rng, augment_rng = jax.random.split(rng)
        images = generate(params['generator'], batch, rng)
        value = non_saturating_generator(judge(params, images, labels(batch), state.extra['p'], augment_rng)[0])
        return value, Aux({'generator_loss': value})

    def path_loss(params, state, frozen, batch, rng):
        mixing_rng, noise_rng, pixel_rng = jax.random.split(rng, 3)
        weights = params['generator']
        w = mixed(weights, batch, mixing_rng)
        noise = noise_of(noise_rng, len(w))
        lengths = path_lengths(lambda w: paint(weights, w, noise), w, pixel_rng)
        new = jax.lax.stop_gradient(lengths.mean())
        mean = state.extra['path_length'] + path_decay * (new - state.extra['path_length'])
        penalty = jnp.square(lengths - mean).mean()
        return path_every * path * penalty, Aux({}, {'path': penalty, 'path_length': mean})

    def discriminator_loss(params, state, frozen, batch, rng):
        rng, real_rng, fake_rng = jax.random.split(rng, 3)
        images = generate(params['generator'], batch, rng)
        real, deviation = judge(params, batch['image'], labels(batch), state.extra['p'], real_rng)
        fake, _ = judge(params, images, labels(batch), state.extra['p'], fake_rng)
        value = vanilla_discriminator(real, fake)
        kept = {'signs': jnp.sign(real).mean(), 'deviation': deviation.mean()}
        return value, Aux({'discriminator_loss': value, 'signs': kept['signs']}, kept)

    def r1_loss(params, state, frozen, batch, rng):
        def f(x):
            return judge(params, x, labels(batch), state.extra['p'], rng)[0]

        penalty = r1_penalty(f, batch['image']).mean()
        return r1_every * r1 * penalty, Aux({}, {'r1': penalty})

    def of_data(state, kept):
        """Entries of State.extra after a step of the discriminator: the sum of its signs, and the running deviation."""
        deviation = running_mean(state, state.extra['deviation'], kept['deviation'], DEVIATION_DECAY)
        return {'signs': state.extra['signs'] + kept['signs'], 'deviation': deviation}

    of_generator = counted(context.optim, path_every) if path else context.optim
    of_discriminator = counted(context.optim, r1_every) if r1 else context.optim
    generator_step = gradient_step(generator_loss, of_generator, 'generator')
    path_step = store(gradient_step(path_loss, of_generator, 'generator'))
    discriminator_step = store(gradient_step(discriminator_loss, of_discriminator, 'discriminator'), of_data)
    r1_step = store(gradient_step(r1_loss, of_discriminator, 'discriminator'))

    def init(rng, batch, frozen):
        generator_rng, discriminator_rng = jax.random.split(rng)
        n, parts = len(batch['image']), PATH_SHARE * context.optim.accumulate
        if path and n % parts:
            raise UserError(
                f'config.data.batch = {n} must be a multiple of {parts}: '
                f'the path length is taken of one image in {PATH_SHARE}'
            )
        label = batch['label'][:1] if conditional else None
        params = {
            'generator': generator.init(generator_rng, jnp.zeros((1, latent)), label)['params'],
            'discriminator': discriminator.init(discriminator_rng, batch['image'][:1], label)['params'],
        }
        extra = {name: jnp.zeros(()) for name in ('r1', 'path', 'path_length', 'signs', 'deviation')}
        extra |= {'p': jnp.full((), augment_p, jnp.float32), 'w': jnp.zeros(latent)}
        # Only the generator makes pictures; an averaged discriminator would serve nothing.
        return new_state(params, context.optim, extra, ema=('generator',))

    def update(state, frozen, batch, rng):
        latents_rng, generator_rng, path_rng, discriminator_rng, r1_rng = jax.random.split(rng, 5)
        n = len(batch['image'])
        told = {name: batch[name] for name in conditions}
        drawn = shard_batch(jax.random.normal(latents_rng, (n, 2, 2, latent)))  # two to mix, for each player
        latents = [{'z': drawn[:, i], **told} for i in (0, 1)]
        batch = {'image': batch['image'], **told}

        state, generator_aux = generator_step(state, frozen, latents[0], generator_rng)
        if path:
            few = jax.tree.map(lambda x: x[::PATH_SHARE], latents[0])
            state = jax.lax.cond(
                state.step % path_every == 0, lambda s: path_step(s, frozen, few, path_rng)[0], lambda s: s, state
            )
        state, discriminator_aux = discriminator_step(state, frozen, {**batch, **latents[1]}, discriminator_rng)
        if r1:
            state = jax.lax.cond(
                state.step % r1_every == 0, lambda s: r1_step(s, frozen, batch, r1_rng)[0], lambda s: s, state
            )
        logs = generator_aux.logs | discriminator_aux.logs | {'r1': state.extra['r1'], 'path': state.extra['path']}
        logs |= {'path_length': state.extra['path_length'], 'augment_p': state.extra['p']}

        now = (state.step + 1) % augment_every == 0
        signs = state.extra['signs']
        found = {'signs': jnp.where(now, 0.0, signs)}
        if augmentation and augment_target:
            p = state.extra['p']
            step = dict(target=augment_target, images_to_one=augment_images)
            found['p'] = jnp.where(now, adapted(p, signs / augment_every, n * augment_every, **step), p)
        decay = jnp.minimum(MEAN_DECAY, state.step / (state.step + 1))
        state = advance(state, context.optim)
        new = to_w(state.ema['generator'], latents[0]['z'][:, 0], labels(batch)).mean(0)
        found['w'] = decay * state.extra['w'] + (1 - decay) * new
        return state.replace(extra={**state.extra, **found}), logs

    def repeated(w: Array) -> Array:
        return jnp.broadcast_to(w[:, None], (len(w), layers, latent))

    def sample(state, frozen, batch, rng):
        keys = jax.vmap(jax.random.split)(example_keys(rng, batch))
        w = to_w(state.ema['generator'], normal(keys[:, 0], (latent,)), labels(batch))
        w = state.extra['w'] + truncation * (w - state.extra['w'])
        noise = jax.vmap(lambda key: [one[0] for one in noise_of(key, 1)])(keys[:, 1])
        return jnp.clip(paint(state.ema['generator'], repeated(w), noise), -1, 1)

    def decode(state, frozen, batch, latents, rng):
        return jnp.clip(paint(state.ema['generator'], repeated(latents), noise_of(rng, 1)), -1, 1)

    def difference(frozen, x: Array, y: Array) -> Array:
        """What `encode` makes small, [n]."""
        if seen_by is None:
            return jnp.square(x - y).mean((1, 2, 3))
        while lpips and x.shape[1] > 256:  # what VGG-16 was trained to see
            x, y = downsample_mean(x), downsample_mean(y)
        return seen_by(frozen, x, y)

    def encode(state, frozen, batch, rng):
        """float32 [n, latent], see above."""
        x, weights, of = batch['image'], state.ema['generator'], PROJECTION
        z_rng, label_rng, noise_rng, steps_rng = jax.random.split(rng, 4)
        label = jax.random.randint(label_rng, (of['draws'],), 0, context.classes) if conditional else None
        draws = to_w(weights, jax.random.normal(z_rng, (of['draws'], latent)), label)
        mean = draws.mean(0)
        deviation = jnp.sqrt(jnp.square(draws - mean).sum(-1).mean())

        def rate(step):
            t = step / projection_steps
            fall = 0.5 - 0.5 * jnp.cos(math.pi * jnp.minimum(1, (1 - t) / of['fall']))
            return of['rate'] * fall * jnp.minimum(1, t / of['rise'])

        def loss(fitted, jitter):
            w, noise = fitted
            y = paint(weights, repeated(w + jitter), noise)
            return (difference(frozen, x, y) + of['noise_penalty'] * sum(map(autocorrelation, noise))).sum()

        def white(noise):
            noise = noise - noise.mean((1, 2, 3), keepdims=True)
            return noise * jax.lax.rsqrt(jnp.square(noise).mean((1, 2, 3), keepdims=True))

        def one(carry, t_and_key):
            fitted, opt = carry
            t, key = t_and_key
            width = deviation * of['jitter'] * jnp.square(jnp.maximum(0, 1 - t / of['jitter_until']))
            slope = jax.grad(loss)(fitted, width * jax.random.normal(key, fitted[0].shape))
            change, opt = tx.update(slope, opt)
            w, noise = optax.apply_updates(fitted, change)
            return ((w, list(map(white, noise))), opt), None

        tx = optax.adam(rate)
        start = (jnp.broadcast_to(mean, (len(x), latent)), noise_of(noise_rng, len(x)))
        times = jnp.arange(projection_steps) / projection_steps
        steps = (times, jax.random.split(steps_rng, projection_steps))
        ((w, _), _), _ = jax.lax.scan(one, (start, tx.init(start)), steps)
        return w

    def evaluate(state, frozen, batch, rng):
        deviation = jnp.broadcast_to(state.extra['deviation'], (len(batch['image']),))
        variables = {'params': state.params['discriminator']}
        return {'discriminator': discriminator.apply(variables, batch['image'], labels(batch), deviation)[0]}

    conditions = ('label',) if conditional else ()
    return Family(
        init,
        update,
        sample,
        evaluate,
        encode,
        decode,
        conditions=conditions,
        divisor=4,
        free=('truncation', 'projection_steps', 'lpips'),
        latents=Latents(shape=(latent,)),
    )
