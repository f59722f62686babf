"""VAE: variational autoencoder (Kingma & Welling 2013, arXiv 1312.6114).

p(x, z) = p(x | z) p(z), and an encoder q(z | x) = N(mean(x), diag exp(log_var(x))). Training maximises the evidence
lower bound (eq. 10)

    ELBO = E_q log p(x | z) - KL(q(z | x) || p(z)) <= log p(x)

with z = mean + exp(log_var / 2) eps, or, with `samples` = k > 1, the tighter importance weighted bound (Burda et al.
2015, eq. 8)

    L_k = E log 1/k sum_i p(x, z_i) / q(z_i | x),  ELBO = L_1 <= L_k <= log p(x).

`beta` other than 1 weights the KL term (beta-VAE, Higgins et al. 2017): no bound any more, but a more factored code.
`beta_warmup` lets the weight rise from 0. What is measured is the bound (beta = 1) always.

The prior p(z) is N(0, I), or a mixture of the encoder's own posteriors at K learned pictures u_k, the pseudo-inputs
(VampPrior, Tomczak & Welling 2017, arXiv 1705.07120, eq. 9):

    p(z) = 1/K sum_k q(z | u_k).

Were the u_k all of the data, it would be the prior for which the bound is largest. Its KL has no closed form: it is
log q(z | x) - log p(z) at the z drawn.

`latent2` puts a second code above the first (the same paper, section 3): p(x | z, z2) p(z | z2) p(z2) and
q(z | x, z2) q(z2 | x). The prior is then z2's.

`conditional` tells encoder and decoder the class, so that p(x | z, class) with one prior for all classes (Sohn et al.
2015, section 4.1). Such a model has no code of a picture alone: encode and decode are None.

Pixels, and what the units mean:
- 'bernoulli' with `binarise`: every image is drawn as bits with P(1) = (x + 1) / 2, anew in every
  update and once in evaluation. Bounds are on the log-likelihood of the bits, in nats per image.
- 'bernoulli' without: grey levels (x + 1) / 2 in [0, 1] go into the cross-entropy as they are: the log-likelihood of
  pictures that are black and white already. Of others it is a common loss, in nats per image, but no likelihood:
  compare it with nothing else.
- 'gaussian': density of x in [-1, 1], in nats per image. It depends on the pixels' scale and has no
  upper bound.
- 'discretised_gaussian': probability of the 256 levels; bits per dimension are given too.
One log standard deviation is shared by all pixels (Rybkin et al. 2020), learned or fixed at `scale`.

Samples and reconstructions are the decoder's mean images, not draws from p(x | z): no pixel noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgen.checks import check_labels, check_size
from jaxgen.contract import Aux, Context, Family, Latents, make_update, new_state
from jaxgen.errors import UserError
from jaxgen.losses import likelihoods
from jaxgen.losses.divergences import normal_kl
from jaxgen.networks.vae import (
    ConvDecoder,
    ConvEncoder,
    JoinedDecoder,
    JoinedEncoder,
    MlpDecoder,
    MlpEncoder,
    Pixels,
)
from jaxgen.randomness import example_keys, normal

Array = jax.Array
ACTIVATIONS = {'relu': jax.nn.relu, 'silu': jax.nn.silu, 'tanh': jnp.tanh}
Moments = tuple[Array, Array]  # mean and log variance of diagonal normals, [n, latent] both


class Inference(NamedTuple):
    """What the encoder says of a batch."""

    code: Array  # [n, d], the most likely z
    draw: Callable  # standard normal noise [n, d] -> z ~ q(z | x) [n, d], and log p(z) - log q(z | x) [n], nats
    kl: Array | None  # KL(q(z | x) || p(z)) [n], nats, where it has a closed form


def reparameterise(mean: Array, log_var: Array, noise: Array) -> Array:
    """z ~ N(mean, exp(log_var)) from standard normal noise. Kingma & Welling 2013, section 2.4."""
    return mean + jnp.exp(0.5 * log_var) * noise


def log_normal(z: Array, mean: Array, log_var: Array) -> Array:
    """log N(z; mean, exp(log_var)), [n, d] -> [n]."""
    return likelihoods.gaussian(mean, 0.5 * log_var, z)


def log_mean_exp(x: Array) -> Array:
    """[k, n] -> [n]. Of log weights it is the bound L_k (Burda et al. 2015, eq. 8)."""
    return jax.nn.logsumexp(x, 0) - math.log(len(x))


def log_mixture(z: Array, means: Array, log_vars: Array) -> Array:
    """Log density at z [n, d] of even shares of k normals, [k, d]: [n], nats."""
    return log_mean_exp(jax.vmap(log_normal, (None, 0, 0))(z, means, log_vars))


def infer(posterior: Moments, prior: Moments) -> Inference:
    """One level: q(z | x) with moments [n, d], and a prior of k normals [k, d]."""

    def draw(noise: Array) -> tuple[Array, Array]:
        z = reparameterise(*posterior, noise)
        return z, log_mixture(z, *prior) - log_normal(z, *posterior)

    return Inference(posterior[0], draw, normal_kl(*posterior, *prior) if len(prior[0]) == 1 else None)


def infer_two(posterior2: Moments, prior2: Moments, posterior: Callable, prior: Callable) -> Inference:
    """Two levels: q(z2 | x) and p(z2) as in `infer`, and by z2 [n, d2] the moments of q(z | x, z2) and p(z | z2).

    The code is z and behind it z2, [n, d + d2].
    """
    above = infer(posterior2, prior2)

    def draw(noise: Array) -> tuple[Array, Array]:
        d = noise.shape[1] - above.code.shape[1]
        z2, log_ratio = above.draw(noise[:, d:])
        q = posterior(z2)
        z = reparameterise(*q, noise[:, :d])
        return jnp.concatenate([z, z2], 1), log_ratio + log_normal(z, *prior(z2)) - log_normal(z, *q)

    return Inference(jnp.concatenate([posterior(above.code)[0], above.code], 1), draw, None)


def weigh(log_likelihood: Callable, inference: Inference, noise: Array) -> tuple[Array, Array]:
    """One importance sample z ~ q(z | x) per example.

    Args:
      log_likelihood: z [n, d] -> log p(x | z) [n].
      noise: standard normal, [n, d].

    Returns:
      log p(x, z) - log q(z | x), and log p(x | z); both [n], nats.
    """
    z, log_ratio = inference.draw(noise)
    log_x = log_likelihood(z)
    return log_x + log_ratio, log_x


def build(
    context: Context,
    *,
    network: str = 'conv',
    latent: int = 16,
    latent2: int = 0,
    width: int = 32,
    levels: int = 2,
    activation: str = 'relu',
    hidden: tuple[int, ...] = (400,),
    conditional: bool = False,
    prior: str = 'normal',
    pseudo_inputs: int = 500,
    pseudo_mean: float = 0.05,
    pseudo_std: float = 0.01,
    pseudo_data: bool = False,
    likelihood: str = 'bernoulli',
    binarise: bool = False,
    white: int = 255,
    encoder_range: str = 'signed',
    scale: float = 0.1,
    learn_scale: bool = True,
    beta: float = 1.0,
    beta_warmup: int = 0,
    samples: int = 1,
    iwae_samples: int = 64,
) -> Family:
    """VAE.

    Args:
      network: 'conv' | 'mlp' | 'gated' (an mlp of gated layers, Tomczak & Welling 2017), for encoder and decoder.
      latent: dimensions of z.
      latent2: dimensions of the code above it; 0: none. Not with 'conv'.
      width, levels: of 'conv': channels at full size, doubled each of `levels` times that the
        image is halved.
      activation: of 'conv' and 'mlp': 'relu' | 'silu' | 'tanh' (Kingma & Welling's). Narrow networks of ReLUs can die
        for whole groups of images, say all bright ones, and give all of them one grey.
      hidden: of 'mlp' and 'gated': layer widths of the encoder; the decoder has them in reverse. A network of two
        inputs has all but the last layer for each of them alone.
      conditional: tell encoder and decoder the class, `batch['label']`.
      prior: 'normal' | 'vamp', of the highest code.
      pseudo_inputs: of 'vamp': their number, K.
      pseudo_mean, pseudo_std: and what their pixels are drawn from before the first update, black being 0 and white 1.
        They are held to [0, 1], and a pixel outside learns nothing.
      pseudo_data: start from pictures of the first batch instead, with noise of pseudo_std.
      likelihood: 'bernoulli' | 'gaussian' | 'discretised_gaussian', see the module's docstring.
      binarise: bits for pixels, with 'bernoulli' only.
      white: the stored pixel value, of 0 to 255, that stands for a bit of 1: it is 1 where bits are stored as 0 and 1.
        With 'bernoulli' only.
      encoder_range: what the encoder sees of bits and grey levels, 'signed': 2 x - 1 in [-1, 1]; 'unit': x in [0, 1],
        as in the papers. With 'bernoulli' only.
      scale, learn_scale: standard deviation of the gaussian ones, at the start or for good.
      beta: weight of the KL term in training.
      beta_warmup: updates in which it rises linearly to that, 0: none.
      samples: k of the bound that is trained, 1: the ELBO.
      iwae_samples: k of 'nll_iwae' in evaluate; also the draws by which a KL without a closed form is estimated.

    evaluate gives per image, in nats (see above for what of): 'nll_elbo' and 'nll_iwae', upper
    bounds on -log p(x), the second with iwae_samples; 'kl'; 'reconstruction' = E_q -log p(x | z);
    'squared_error', of the image decoded from q's mean, mean over pixels in [-1, 1];
    'bits_per_dim' for 'discretised_gaussian', from 'nll_iwae'.

    Raises:
      UserError: a value that cannot work.
    """
    log_probs = {
        'bernoulli': lambda pixels, log_scale, x: likelihoods.bernoulli(pixels, x),
        'gaussian': likelihoods.gaussian,
        'discretised_gaussian': likelihoods.discretised_gaussian,
    }
    divisor = 2**levels if network == 'conv' else 1
    if network not in ('conv', 'mlp', 'gated'):
        raise UserError(f"config.model.network must be 'conv', 'mlp' or 'gated'; it is {network!r}")
    if activation not in ACTIVATIONS:
        raise UserError(f'config.model.activation must be one of {tuple(ACTIVATIONS)}; it is {activation!r}')
    if prior not in ('normal', 'vamp'):
        raise UserError(f"config.model.prior must be 'normal' or 'vamp'; it is {prior!r}")
    if likelihood not in log_probs:
        raise UserError(f'config.model.likelihood must be one of {tuple(log_probs)}; it is {likelihood!r}')
    if encoder_range not in ('signed', 'unit'):
        raise UserError(f"config.model.encoder_range must be 'signed' or 'unit'; it is {encoder_range!r}")
    if likelihood != 'bernoulli' and encoder_range != 'signed':
        raise UserError("config.model.encoder_range = 'unit' needs config.model.likelihood = 'bernoulli'")
    if likelihood != 'bernoulli' and (binarise or white != 255):
        raise UserError("config.model.binarise and white need config.model.likelihood = 'bernoulli'")
    if min(latent, width, samples, iwae_samples, pseudo_inputs, *hidden) < 1 or scale <= 0:
        raise UserError(
            'config.model: latent, hidden, width, scale, samples, iwae_samples and pseudo_inputs must be more than 0'
        )
    if not 1 <= white <= 255:
        raise UserError(f'config.model.white must be 1 to 255; it is {white}')
    if min(levels, latent2, beta, beta_warmup, pseudo_std) < 0:
        raise UserError('config.model: levels, latent2, beta, beta_warmup and pseudo_std must be 0 or more')
    if samples > 1 and (beta != 1 or beta_warmup):
        raise UserError(
            'config.model.samples > 1 trains a bound without a KL term: set config.model.beta to 1 and beta_warmup to 0'
        )
    if latent2 and (network == 'conv' or not hidden):
        raise UserError("config.model.latent2 needs config.model.network 'mlp' or 'gated', with a hidden layer or more")
    check_labels(context, conditional)
    if conditional and (latent2 or prior != 'normal'):
        raise UserError(
            "config.model.conditional goes with one code and a normal prior: set latent2 to 0 and prior to 'normal'"
        )
    check_size(context.image, divisor, f'config.model.levels = {levels}')

    # What the layers of perceptrons do: None is the gate.
    dtype, unit = context.dtype, None if network == 'gated' else ACTIVATIONS[activation]
    # By name: encoder q(z | x), or q(z | x, z2) below encoder2 q(z2 | x); decoder2 p(z | z2).
    networks = {}
    if network == 'conv':
        networks['encoder'] = ConvEncoder(latent, width, levels, ACTIVATIONS[activation], dtype, context.remat)
        decoder = ConvDecoder(context.image, width, levels, ACTIVATIONS[activation], dtype, context.remat)
    elif latent2:
        networks['encoder'] = JoinedEncoder(latent, hidden, unit, dtype)
        networks['encoder2'] = MlpEncoder(latent2, hidden, unit, dtype)
        networks['decoder2'] = MlpEncoder(latent, hidden[::-1], unit, dtype)
        decoder = JoinedDecoder(context.image, latent, hidden, unit, dtype)
    else:
        networks['encoder'] = MlpEncoder(latent, hidden, unit, dtype)
        decoder = MlpDecoder(context.image, hidden, unit, dtype)
    networks['decoder'] = Pixels(decoder, math.log(scale), learn_scale and likelihood != 'bernoulli')
    trained = (*networks, *(['prior'] if prior == 'vamp' else []))
    highest, top, size = 'encoder2' if latent2 else 'encoder', latent2 or latent, latent + latent2
    classes = context.classes if conditional else 0

    def apply(params, name: str, *inputs):
        return networks[name].apply({'params': params[name]}, *inputs)

    def target(x: Array, keys: Array) -> Array:
        """Images in [-1, 1] as the likelihood takes them: [0, 1], bits by keys [n], or as they are."""
        if likelihood != 'bernoulli':
            return x
        x = jnp.clip((x + 1) * (127.5 / white), 0, 1)
        return jax.vmap(jax.random.bernoulli)(keys, x).astype(jnp.float32) if binarise else x

    def signed(x: Array) -> Array:
        """What the decoder is to explain, in [-1, 1] again."""
        return 2 * x - 1 if likelihood == 'bernoulli' else x

    def seen(x: Array) -> Array:
        """The encoder's input: what the decoder is to explain."""
        return x if encoder_range == 'unit' else signed(x)

    def told(batch) -> Array | None:
        return jax.nn.one_hot(batch['label'], classes) if conditional else None

    def pseudo_images(params) -> Array:
        unit_range = jnp.clip(params['prior']['pseudo_inputs'], 0, 1)
        return unit_range if encoder_range == 'unit' else 2 * unit_range - 1

    def prior_moments(params) -> Moments:
        if prior == 'normal':
            return jnp.zeros((1, top)), jnp.zeros((1, top))
        return apply(params, highest, pseudo_images(params))

    def inference(params, x: Array, label: Array | None) -> Inference:
        x = seen(x)
        if not latent2:
            return infer(apply(params, 'encoder', x, label), prior_moments(params))
        return infer_two(
            apply(params, 'encoder2', x),
            prior_moments(params),
            lambda z2: apply(params, 'encoder', x, z2),
            lambda z2: apply(params, 'decoder2', z2),
        )

    def pixels(params, z: Array, label: Array | None) -> tuple[Array, Array]:
        return apply(params, 'decoder', z if label is None else jnp.concatenate([z, label], 1))

    def log_likelihood(params, x: Array, label: Array | None) -> Callable:
        return lambda z: log_probs[likelihood](*pixels(params, z, label), x)

    def mean_image(params, z: Array, label: Array | None = None) -> Array:
        out, _ = pixels(params, z, label)
        return 2 * jax.nn.sigmoid(out) - 1 if likelihood == 'bernoulli' else jnp.clip(out, -1, 1)

    # Where others have earlier stages' weights, this loss has the weight of the KL term.
    def loss(params, state, frozen, batch, rng):
        weight = beta * jnp.minimum(1, (state.step + 1) / beta_warmup) if beta_warmup else beta
        pixel_rng, z_rng = jax.random.split(rng)
        x, label = target(batch['image'], jax.random.split(pixel_rng, len(batch['image']))), told(batch)
        found, log_p = inference(params, x, label), log_likelihood(params, x, label)
        noise = jax.random.normal(z_rng, (len(x), size) if samples == 1 else (samples, len(x), size))
        if samples == 1:
            log_w, log_x = weigh(log_p, found, noise)
            kl = log_x - log_w if found.kl is None else found.kl
            value = (weight * kl - log_x).mean()
        else:
            log_w, log_x = jax.vmap(lambda noise: weigh(log_p, found, noise))(noise)  # [k, n]
            kl = (log_x - log_w).mean(0) if found.kl is None else found.kl
            value = -log_mean_exp(log_w).mean()
        return value, Aux({'loss': value, 'kl': kl.mean(), 'reconstruction': -log_x.mean()})

    update = make_update(loss, context.optim, *trained)

    def init(rng, batch, frozen):
        rngs = dict(zip(('encoder', 'decoder', 'encoder2', 'decoder2', 'prior'), jax.random.split(rng, 5), strict=True))
        x, z2 = batch['image'], jnp.zeros((1, latent2))
        inputs = {
            'encoder': (x[:1], z2) if latent2 else (x, told(batch)),
            'encoder2': (x,),
            'decoder2': (z2,),
            'decoder': (jnp.zeros((1, size + classes)),),
        }
        params = {name: module.init(rngs[name], *inputs[name])['params'] for name, module in networks.items()}
        if prior == 'vamp':
            start = pseudo_mean
            if pseudo_data:
                # White is 1 here, whatever it is in the data.
                start = jnp.clip((x + 1) * (127.5 / white), 0, 1)[jnp.arange(pseudo_inputs) % len(x)]
            noise = jax.random.normal(rngs['prior'], (pseudo_inputs, *context.image))
            params['prior'] = {'pseudo_inputs': start + pseudo_std * noise}
        return new_state(params, context.optim)

    def sample(state, frozen, batch, rng):
        keys = example_keys(rng, batch)
        if prior == 'vamp':
            pairs = jax.vmap(jax.random.split)(keys)  # [n, 2]
            keys, chosen = pairs[:, 0], jax.vmap(lambda key: jax.random.randint(key, (), 0, pseudo_inputs))(pairs[:, 1])
            mean, log_var = jax.tree.map(lambda a: a[chosen], prior_moments(state.ema))
        else:
            mean = log_var = jnp.zeros(())
        noise = normal(keys, (size,))
        z = reparameterise(mean, log_var, noise[:, size - top :])
        if latent2:
            z = jnp.concatenate([reparameterise(*apply(state.ema, 'decoder2', z), noise[:, :latent]), z], 1)
        return mean_image(state.ema, z, told(batch))

    def evaluate(state, frozen, batch, rng):
        pixel_rng, z_rng = jax.random.split(rng)
        x, label = target(batch['image'], example_keys(pixel_rng, batch)), told(batch)
        found, log_p = inference(state.ema, x, label), log_likelihood(state.ema, x, label)
        # One sample after another: [k, n] numbers are kept, never k batches of images.
        keys = jax.vmap(jax.random.split, (0, None), 1)(example_keys(z_rng, batch), iwae_samples)  # [k, n]
        log_w, log_x = jax.lax.map(lambda keys: weigh(log_p, found, normal(keys, (size,))), keys)
        kl, reconstruction = (log_x - log_w).mean(0) if found.kl is None else found.kl, -log_x.mean(0)
        results = {
            'nll_elbo': reconstruction + kl,
            'nll_iwae': -log_mean_exp(log_w),
            'kl': kl,
            'reconstruction': reconstruction,
            'squared_error': jnp.square(mean_image(state.ema, found.code, label) - signed(x)).mean((1, 2, 3)),
        }
        if likelihood == 'discretised_gaussian':
            results['bits_per_dim'] = results['nll_iwae'] / (math.prod(context.image) * math.log(2))
        return results

    def encode(state, frozen, batch, rng):
        """Mean of q(z | x), [n, latent]; with latent2 that of q(z | x, z2) and behind it z2, the mean of q(z2 | x)."""
        x = target(batch['image'], jax.random.split(rng, len(batch['image'])))
        return inference(state.ema, x, None).code

    def decode(state, frozen, batch, latents, rng):
        return mean_image(state.ema, latents, told(batch))

    return Family(
        init,
        update,
        sample,
        evaluate,
        encode=None if conditional else encode,
        decode=decode,
        conditions=('label',) if conditional else (),
        divisor=divisor,
        free=('iwae_samples',),
        latents=Latents(shape=(size,)),
    )
