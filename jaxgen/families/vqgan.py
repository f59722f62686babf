"""VQGAN and the KL autoencoder: first stages, whose latents other models are trained on.

Esser et al. 2021, Taming Transformers for High-Resolution Image Synthesis (arXiv 2012.09841): `regulariser` = 'vq', a
map of codes out of one codebook. Rombach et al. 2022, High-Resolution Image Synthesis with Latent Diffusion Models
(arXiv 2112.10752), section 3.1 and appendix G: 'kl', a map of numbers held near N(0, I) very loosely; and VQ-f4, which
is 'vq' with a large codebook of few numbers. Tian et al. 2024, Visual Autoregressive Modeling (arXiv 2404.02905),
section 3.2: 'vq' with `scales`, codes on grids of several sizes whose vectors add up to the map, see
networks/multiscale.py. One network, one loss:

    nll + regulariser + adversarial * weight * deceit,  weight = |d nll / d w| / (|d deceit / d w| + 1e-4)

with deceit the generator's side of a game with a discriminator, and w the kernel of the decoder's last layer (VQGAN's
eq. 7). What pixels and what a network sees make one figure of each image, d = mean |x - y| + perceptual *
distance(x, y), see `jaxgen/losses/perceptual.py`; or of squares (`pixels` = 'l2', as later VQGANs have it). What it
becomes:

- 'vq': nll = d, and the regulariser is codebook_weight * (codebook loss + beta * commitment). The released code of
  VQGAN has the two the other way round: beta = 0.25 weights the codebook loss, the commitment counts in full. That is
  codebook_weight = 0.25 and beta = 4 here.
- 'kl': nll = D (d / s + log s), with D numbers in an image and s = 1: sums over the image, as the KL term is a sum over
  its latents, and kl_weight = 1e-6 is meant beside sums. s can be learned (`learn_scale`); in the released code it is a
  parameter that no optimiser has.

From update `discriminator_start` on a PatchGAN is in the game: it learns to tell x from y, by a hinge loss, and the
decoder to be taken for real. Both have their own optimiser (`config.optim.networks.discriminator`), and neither step
touches the other's weights. Half the sum of both parts is the discriminator's loss in the released code: the same to
Adam.

`sample` is no model of images. Codes are drawn each on its own by how often training met them, latents from normals of
their channels' mean and variance. A prior is what draws: a transformer over the codes, a diffusion of the latents.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgen.checks import check_size
from jaxgen.contract import Aux, Context, Family, Latents, advance, gradient_step, new_state, running_mean
from jaxgen.errors import UserError
from jaxgen.losses import perceptual as perception
from jaxgen.losses.adversarial import ADVERSARIAL_LOSSES, adaptive_weight
from jaxgen.losses.divergences import normal_kl
from jaxgen.networks import patchgan, quantise
from jaxgen.networks.first_stage import Decoder, Encoder, last_layer
from jaxgen.networks.layers import STATISTICS_DECAY, apply_in_training, check_groups
from jaxgen.networks.multiscale import MultiScale, grids_of
from jaxgen.randomness import example_keys, normal, stream

Array = jax.Array

LATENTS_DECAY = 0.99  # of the running statistics of latents and codes, slower than those of batches
LOG_VAR_BOUNDS = (-30.0, 20.0)  # of the encoder's log variances, as in the published code


def with_slope(f: Callable, y: Array) -> tuple[Array, dict, Array]:
    """f(y) -> (scalar, aux) together with d f / d y, each computed once.

    Gradients go from the returned scalar to y and to nothing else that f reads. The loss needs the slopes for its
    weights, and a second pass through the perceptual network and the discriminator would cost as much as the first.
    """
    fixed = jax.lax.stop_gradient(y)
    (value, aux), slope = jax.value_and_grad(f, has_aux=True)(fixed)
    value, aux, slope = jax.lax.stop_gradient((value, aux, slope))
    return value + jnp.vdot(slope, y - fixed), aux, slope


def build(
    context: Context,
    *,
    regulariser: str = 'kl',
    channels: int = 128,
    multipliers: tuple[int, ...] = (1, 2, 4, 4),
    blocks: int = 2,
    attention: tuple[int, ...] = (),
    groups: int = 32,
    group_size: int = 4,
    eps: float = 1e-6,
    latent: int = 4,
    latent_kernel: int = 1,
    kl_weight: float = 1e-6,
    first_log_var: float = 0.0,
    learn_scale: bool = False,
    vocabulary: int = 1024,
    scales: tuple[int, ...] = (),
    beta: float = 0.25,
    codebook_weight: float = 1.0,
    restart: float = 0.0,
    interface: str = 'codes',
    pixels: str = 'l1',
    perceptual: float = 1.0,
    lpips: tuple[str, ...] = (),
    adversarial: float = 0.5,
    game: str = 'hinge',
    discriminator_start: int = 0,
    discriminator_channels: int = 64,
    discriminator_layers: int = 3,
    discriminator_norm: str = 'batch',
) -> Family:
    """VQGAN or KL autoencoder.

    Args:
      regulariser: 'vq' | 'kl'.
      channels, multipliers, blocks, attention, groups, group_size, eps: of encoder and decoder, see
        networks/first_stage.py. The latents are smaller than the image by 2 ** (levels - 1).
      latent: numbers at each position of the latents, or of one code.
      latent_kernel: of the convolutions on either side of the latents: 1, or 3 in VAR's.
      kl_weight, learn_scale: of 'kl', see above.
      first_log_var: of 'kl': log variance of the posterior before the first update, about. At the published 0 the noise
        is louder than the latents at first, and a short training learns to do without them: colours are the last thing
        to come. -6 lets them through from the start.
      vocabulary, beta, codebook_weight: of 'vq', see above.
      scales: of 'vq': rows of each grid of codes, coarse first, the last as many as the latents have; (): one grid.
      restart: of 'vq': codes that fewer latents per update came to, on average, start anew at one of the batch's; 0,
        as published: never.
      interface: of 'vq': 'codes' | 'latents', what `encode` gives later stages and `decode` takes. 'latents' are the
        encoder's numbers as they are, and `decode` finds their codes: so latent diffusion uses VQ-f4.
      pixels: 'l1' | 'l2', the mean of absolute or of squared differences. The former is content with a median: small
        figures on plain backgrounds come late with it, and their colours last.
      perceptual: weight of the perceptual distance; 0: none. It needs one of two:
      lpips: files with the weights of LPIPS on VGG-16, see losses/perceptual.py; else a run with features, whose
        directory is config.stages.perceptual.
      adversarial: weight of the adversarial loss; 0: there is no discriminator.
      game: of losses/adversarial.py: 'hinge' | 'non_saturating' | ..., see ADVERSARIAL_LOSSES there.
      discriminator_start: update from which on the discriminator learns and is listened to.
      discriminator_channels, discriminator_layers, discriminator_norm: see networks/patchgan.py.

    encode gives the mean latents of 'kl', float32 [n, h, w, latent], or for 'vq' a tuple of the codes, int32 [n, h, w]
    of each grid, or latents before they are quantised. State.extra has 'latents' for 'kl': running mean and square of
    the latents by channel; a later stage divides by their deviation.

    update logs 'reconstruction', d above. For 'vq' it logs 'perplexity', the exp of the entropy of the batch's codes,
    and 'usage', the share of codes met in the batch; with scales also those of each, 'usage/scale0', ... evaluate gives
    per image, of its reconstruction from the mean latents or codes: 'squared_error' and 'absolute_error', means over
    pixels in [-1, 1]; 'perceptual', the distance; 'kl', nats; 'bits_per_code', -log2 of the shares that codes have in
    training (in their grid), mean over codes; and what the discriminator says, 'discriminator_real' and
    'discriminator_fake', means over patches.

    Raises:
      UserError: a value that cannot work, or there is nothing to measure the perceptual distance with.
    """
    height, columns, image_channels = context.image
    quantised = regulariser == 'vq'
    divisor = 2 ** max(len(multipliers) - 1, 0)
    if regulariser not in ('vq', 'kl'):
        raise UserError(f"config.model.regulariser must be 'vq' or 'kl'; it is {regulariser!r}")
    if not multipliers or min(channels, blocks, latent, latent_kernel, *multipliers) < 1 or vocabulary < 2:
        raise UserError(
            'config.model: channels, multipliers, blocks, latent and latent_kernel must be 1 or more, vocabulary 2 or '
            'more'
        )
    check_groups('config.model', groups, group_size, eps, [channels * m for m in (1, *multipliers)])
    if min(kl_weight, beta, codebook_weight, restart, perceptual, adversarial, discriminator_start) < 0:
        raise UserError(
            'config.model: kl_weight, beta, codebook_weight, restart, perceptual, adversarial and discriminator_start '
            'must be 0 or more'
        )
    if interface not in ('codes', 'latents'):
        raise UserError(f"config.model.interface must be 'codes' or 'latents'; it is {interface!r}")
    if learn_scale and quantised:
        raise UserError("config.model.learn_scale needs config.model.regulariser = 'kl'")
    if game not in ADVERSARIAL_LOSSES:
        raise UserError(f'config.model.game must be one of {tuple(ADVERSARIAL_LOSSES)}; it is {game!r}')
    if pixels not in ('l1', 'l2'):
        raise UserError(f"config.model.pixels must be 'l1' or 'l2'; it is {pixels!r}")
    check_size(context.image, divisor, f'config.model.multipliers = {multipliers}')
    if adversarial:
        patchgan.check(
            'discriminator_', context.image, discriminator_channels, discriminator_layers, discriminator_norm
        )
    seen = perception.measure(context.stages, lpips, context.image)  # (frozen, x, y) -> [n]
    if perceptual and seen is None:
        raise UserError(
            'config.model.perceptual needs a network to see with: name a run of a classifier as '
            'config.stages.perceptual, give weights as config.model.lpips, or set it to 0'
        )

    grid = (height // divisor, columns // divisor)
    if scales and not quantised:
        raise UserError("config.model.scales needs config.model.regulariser = 'vq'")
    if scales and not (scales[0] >= 1 and scales[-1] == grid[0] and list(scales) == sorted(set(scales))):
        raise UserError(
            f'config.model.scales must rise from 1 or more to {grid[0]}, the rows of the latents; they are {scales}'
        )
    grids = grids_of(scales, grid) if scales else (grid,)
    count_shape = (len(grids), vocabulary) if scales else (vocabulary,)
    size = math.prod(context.image)
    sizes = dict(channels=channels, multipliers=multipliers, blocks=blocks, attention=attention)
    sizes |= dict(groups=groups, group_size=group_size, eps=eps, latent_kernel=latent_kernel)
    rest = dict(height=context.image[0], remat=context.remat, dtype=context.dtype)
    encoder = Encoder(outputs=latent if quantised else 2 * latent, **sizes, **rest)
    decoder = Decoder(image_channels=image_channels, **sizes, **rest)
    quantiser = MultiScale(grids, latent, **({} if scales else dict(phis=0)))
    discriminator = patchgan.PatchGAN(
        discriminator_channels, discriminator_layers, discriminator_norm, dtype=context.dtype
    )
    last = last_layer(image_channels, context.dtype)
    discriminator_objective, generator_objective = ADVERSARIAL_LOSSES[game]

    def posterior(params, x: Array) -> tuple[Array, Array]:
        """Mean and log variance, [n, h, w, latent]."""
        mean, log_var = jnp.split(encoder.apply({'params': params['encoder']}, x), 2, -1)
        return mean, jnp.clip(log_var, *LOG_VAR_BOUNDS)

    def coded(params, z: Array) -> tuple[list[Array], list[Array], list[Array]]:
        """For each grid what was looked up, [n, *grid, latent], what the decoder would get if it were the last one,
        [n, h, w, latent], and the codes, int32 [n, *grid]."""
        return quantiser.apply({'params': params.get('phi', {})}, z, params['codebook']['embedding'])

    def added(params, codes: Array, k: int) -> Array:
        """What the codes of grid k add to the map that is decoded, [n, h, w, latent]."""
        phi, book = params.get('phi', {}), params['codebook']['embedding']
        return quantiser.apply({'params': phi}, codes, book, k, method='added')

    def by_grid(count: Array) -> Array:
        """How often each code was met, [grids, vocabulary]."""
        return count.reshape(-1, vocabulary)

    def find(params, x: Array) -> tuple[Array, list[Array], list[Array], list[Array]]:
        """Latents [n, h, w, latent], and what `coded` gives of them."""
        z = encoder.apply({'params': params['encoder']}, x)
        return z, *coded(params, z)

    def latents(params, x: Array, rng: Array) -> tuple[Array, Array, dict, dict]:
        """What the decoder gets in training, the regulariser's loss, logs, and what is kept of the latents."""
        if quantised:
            z, looked_up, sums, codes = find(params, x)
            terms = [quantise.losses(z, vectors) for vectors in sums]
            to_latents, to_codes = (sum(t) / len(t) for t in zip(*terms, strict=True))
            counts = [quantise.statistics(*q, vocabulary)['count'] for q in zip(looked_up, codes, strict=True)]
            value = codebook_weight * (to_latents + beta * to_codes)
            found = {'count': jnp.stack(counts).reshape(count_shape)}
            return quantise.straight_through(z, sums[-1]), value, {'commitment': to_codes}, found
        mean, log_var = posterior(params, x)
        z = mean + jnp.exp(0.5 * log_var) * jax.random.normal(rng, mean.shape)
        kl = normal_kl(mean, log_var).mean()
        found = {'mean': z.mean((0, 1, 2)), 'square': jnp.square(z).mean((0, 1, 2))}
        return z, kl_weight * kl, {'kl': kl}, {'latents': jax.lax.stop_gradient(found)}

    def paint(params, z: Array) -> tuple[Array, Array]:
        """Images, not clipped, and what the decoder's last layer saw."""
        return decoder.apply({'params': params['decoder']}, z)

    def picture(params, z: Array) -> Array:
        return jnp.clip(paint(params, z)[0], -1, 1)

    def judge(params, x: Array) -> tuple[Array, dict]:
        """Values by patch, [n, rows, columns], with the statistics of this batch, and these."""
        return apply_in_training(discriminator, params['discriminator'], x)

    def by_last_layer(params, h: Array, slope: Array) -> Array:
        """Gradient by the last layer's kernel, from the gradient by the images that it made of h."""
        weights = jax.lax.stop_gradient(params['decoder']['last'])
        h = jax.lax.stop_gradient(h)
        image, back = jax.vjp(lambda w: last.apply({'params': {**weights, 'kernel': w}}, h), weights['kernel'])
        return back(slope.astype(image.dtype))[0]

    def generator_loss(params, state, frozen, batch, rng):
        x = batch['image']
        z, regular, logs, kept = latents(params, x, rng)
        y, h = paint(params, z)

        def difference(y):
            absolute = jnp.abs(x - y).mean()
            of_pixels = absolute if pixels == 'l1' else jnp.square(x - y).mean()
            distance = seen(frozen, x, y).mean() if perceptual else jnp.zeros(())
            return of_pixels + perceptual * distance, {'absolute_error': absolute, 'perceptual': distance}

        reconstruction, parts, slope = with_slope(difference, y)
        log_scale = params['scale']['log_scale'] if learn_scale else jnp.zeros(())
        by_scale = 1.0 if quantised else size * jnp.exp(-log_scale)
        nll = by_scale * reconstruction + (0.0 if quantised else size * log_scale)
        value = nll + regular
        if adversarial:
            deceit, _, its_slope = with_slope(lambda y: (generator_objective(judge(params, y)[0]), {}), y)
            weight = adaptive_weight(by_last_layer(params, h, by_scale * slope), by_last_layer(params, h, its_slope))
            value = value + jnp.where(state.step >= discriminator_start, adversarial * weight, 0.0) * deceit
            logs |= {'generator_loss': deceit, 'adaptive_weight': weight}
        if learn_scale:
            logs['log_scale'] = log_scale
        return value, Aux({'loss': value, 'reconstruction': reconstruction, **parts, **logs}, kept)

    def discriminator_loss(params, state, frozen, batch, rng):
        x = batch['image']
        y = jax.lax.stop_gradient(paint(params, latents(params, x, rng)[0])[0])
        real, of_real = judge(params, x)
        fake, of_fake = judge(params, y)
        value = discriminator_objective(real, fake)
        logs = {'discriminator_loss': value, 'discriminator_real': real.mean(), 'discriminator_fake': fake.mean()}
        kept = {'discriminator': jax.tree.map(lambda a, b: (a + b) / 2, of_real, of_fake)}
        return jnp.where(state.step >= discriminator_start, value, 0.0), Aux(logs, kept)

    parts = {'encoder': True, 'decoder': True, 'codebook': quantised, 'phi': scales, 'scale': learn_scale}
    trained = [name for name, there in parts.items() if there]
    generator_step = gradient_step(generator_loss, context.optim, *trained)
    discriminator_step = gradient_step(discriminator_loss, context.optim, 'discriminator')

    def init(rng, batch, frozen):
        encoder_rng, decoder_rng, codebook_rng, discriminator_rng = jax.random.split(rng, 4)
        empty = jnp.zeros((1, *grid, latent))
        params = {
            'encoder': encoder.init(encoder_rng, batch['image'][:1])['params'],
            'decoder': decoder.init(decoder_rng, empty)['params'],
        }
        if not quantised:
            bias = params['encoder']['to_latent']['bias']
            params['encoder']['to_latent'] |= {'bias': bias.at[latent:].add(first_log_var)}
        if quantised:
            bound = 1 / vocabulary  # the published code's start, close together
            book = jax.random.uniform(codebook_rng, (vocabulary, latent), minval=-bound, maxval=bound)
            params['codebook'] = {'embedding': book}
            if scales:
                params['phi'] = quantiser.init(stream(rng, 'phi'), empty, book)['params']
            extra = {'count': jnp.ones(count_shape)}
        else:
            extra = {'latents': {'mean': jnp.zeros(latent), 'square': jnp.ones(latent)}}
        if learn_scale:
            params['scale'] = {'log_scale': jnp.zeros(())}
        averaged = tuple(params)
        if adversarial:
            variables = discriminator.init(discriminator_rng, batch['image'][:1])
            params['discriminator'] = variables['params']
            extra['discriminator'] = variables.get('batch_stats', {})
        return new_state(params, context.optim, extra, averaged)

    def restarted(state, x: Array, rng: Array):
        """The state with its dead codes replaced."""
        looked_up = jnp.concatenate([q.reshape(-1, latent) for q in find(state.params, x)[1]])
        old, counts = state.params['codebook']['embedding'], by_grid(state.extra['count'])
        book, count, dead = quantise.restart(old, counts.sum(0), looked_up, rng, restart)
        counts = jnp.where(dead, count / len(grids), counts).reshape(count_shape)
        state = quantise.with_restarted(state, 'embedding', book, dead)
        return state.replace(extra={**state.extra, 'count': counts})

    def update(state, frozen, batch, rng):
        generator_rng, discriminator_rng, restart_rng = jax.random.split(rng, 3)
        state, (logs, kept) = generator_step(state, frozen, batch, generator_rng)
        decays = dict.fromkeys(kept, LATENTS_DECAY)
        if adversarial:
            state, discriminator_aux = discriminator_step(state, frozen, batch, discriminator_rng)
            kept |= discriminator_aux.kept
            decays['discriminator'] = STATISTICS_DECAY
            logs |= discriminator_aux.logs
        if quantised:
            # Means over the parts of an accumulated gradient; counts are of the whole batch.
            kept['count'] = kept['count'] * context.optim.accumulate
            counts = by_grid(kept['count'])
            for tail, count in [('', counts.sum(0)), *((f'/scale{k}', counts[k]) for k in range(len(scales)))]:
                logs[f'perplexity{tail}'] = quantise.perplexity_of_counts(count)
                logs[f'usage{tail}'] = (count > 0).mean()

        extra = {name: running_mean(state, state.extra[name], kept[name], decays[name]) for name in kept}
        state = advance(state.replace(extra=extra), context.optim)
        if quantised and restart:
            # The batch's latents are wanted only where a code is dead: most updates go without.
            dead = (by_grid(state.extra['count']).sum(0) < restart).any()
            state = jax.lax.cond(dead, lambda s: restarted(s, batch['image'], restart_rng), lambda s: s, state)
        return state, logs

    def shares(state) -> Array:
        """How often training met each code, [grids, vocabulary], none 0; the sum over each grid's is 1."""
        count = jax.vmap(quantise.smoothed)(by_grid(state.extra['count']))
        return count / count.sum(-1, keepdims=True)

    def evaluate(state, frozen, batch, rng):
        x, figures = batch['image'], {}
        if quantised:
            _, _, sums, codes = find(state.ema, x)
            z = sums[-1]
            bits = sum(-jnp.log2(share)[c].sum((1, 2)) for share, c in zip(shares(state), codes, strict=True))
            figures['bits_per_code'] = bits / sum(math.prod(g) for g in grids)
        else:
            z, log_var = posterior(state.ema, x)
            figures['kl'] = normal_kl(z, log_var)
        y = picture(state.ema, z)
        figures['squared_error'] = jnp.square(x - y).mean((1, 2, 3))
        figures['absolute_error'] = jnp.abs(x - y).mean((1, 2, 3))
        if perceptual:
            figures['perceptual'] = seen(frozen, x, y)
        if adversarial:
            variables = {'params': state.params['discriminator'], 'batch_stats': state.extra['discriminator']}
            for name, images in (('real', x), ('fake', y)):
                figures[f'discriminator_{name}'] = discriminator.apply(variables, images).mean((1, 2))
        return figures

    def encode(state, frozen, batch, rng):
        """Mean latents, or latents before they are quantised, float32 [n, h, w, latent]; or a tuple of the codes."""
        if not quantised:
            return posterior(state.ema, batch['image'])[0]
        z, _, _, codes = find(state.ema, batch['image'])
        return tuple(codes) if interface == 'codes' else z

    def encode_sampled(state, frozen, batch, rng):
        """Latents drawn from the posterior, float32 [n, h, w, latent]; a draw for each place of the batch."""
        mean, log_var = posterior(state.ema, batch['image'])
        return mean + jnp.exp(0.5 * log_var) * jax.random.normal(rng, mean.shape)

    def embed(state, frozen, codes, k):
        """What codes int32 [n, *grids[k]] add to the map that is decoded, float32 [n, h, w, latent]."""
        return added(state.ema, codes, k)

    def by_codes(state, codes: tuple[Array, ...]) -> Array:
        return picture(state.ema, sum(added(state.ema, c, k) for k, c in enumerate(codes)))

    def decode(state, frozen, batch, latents, rng):
        """What `encode` gives -> images [n, H, W, C] in [-1, 1]. Latents need not be any that it gave."""
        if not quantised:
            return picture(state.ema, latents)
        if interface == 'latents':
            return picture(state.ema, coded(state.ema, latents)[1][-1])
        return by_codes(state, latents)

    def sample(state, frozen, batch, rng):
        keys = example_keys(rng, batch)
        if quantised:
            log_share = jnp.log(shares(state))

            def draw(key, k):
                return jax.random.categorical(jax.random.fold_in(key, k), log_share[k], shape=grids[k])

            return by_codes(state, tuple(jax.vmap(functools.partial(draw, k=k))(keys) for k in range(len(grids))))
        mean, square = state.extra['latents']['mean'], state.extra['latents']['square']
        deviation = jnp.sqrt(jnp.maximum(square - jnp.square(mean), 0))
        return decode(state, frozen, batch, mean + deviation * normal(keys, (*grid, latent)), rng)

    discrete = quantised and interface == 'codes'
    described = Latents(grids=grids, vocabulary=vocabulary) if discrete else Latents((*grid, latent))
    kind: dict = {'latents': described}
    kind |= dict(embed=embed) if discrete and scales else {}
    kind['encode_sampled'] = None if quantised else encode_sampled
    return Family(init, update, sample, evaluate, encode, decode, divisor=divisor, **kind)
