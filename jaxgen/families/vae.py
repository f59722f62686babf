"""VAE: variational autoencoder (Kingma & Welling 2013, arXiv 1312.6114).

p(x, z) = p(x | z) p(z), and an encoder q(z | x) = N(mean(x), diag exp(log_var(x))). Training maximises the evidence
lower bound (eq. 10)

    ELBO = E_q log p(x | z) - KL(q(z | x) || p(z)) <= log p(x)

with z = mean + exp(log_var / 2) eps, or, with `samples` = k > 1, the tighter importance weighted bound (Burda et al.
2015, eq. 8)

    L_k = E log 1/k sum_i p(x, z_i) / q(z_i | x),  ELBO = L_1 <= L_k <= log p(x).

`beta` other than 1 weights the KL term (beta-VAE, Higgins et al. 2017): no bound any more, but latents that are more
disentangled. `beta_warmup` lets the weight rise from 0 (Sonderby et al. 2016, arXiv 1602.02282). With `free_bits` = f
the KL term is sum_j max(f, KL_j), KL_j the mean over the batch of that of latent j: below f it costs nothing, so that
no latent is given up early (Kingma et al. 2016, arXiv 1606.04934, eq. 15). Metrics are of the bound (beta = 1) always.

The prior p(z) is N(0, I), or a mixture of the encoder's own posteriors at K learned images u_k, the pseudo-inputs
(VampPrior, Tomczak & Welling 2017, arXiv 1705.07120, eq. 9):

    p(z) = 1/K sum_k q(z | u_k).

Were the u_k all of the data, it would be the prior for which the bound is largest. Its KL has no closed form: it is
log q(z | x) - log p(z) at the z drawn.

`latent2` adds a second level of latents above the first (the same paper, section 3): p(x | z, z2) p(z | z2) p(z2) and
q(z | x, z2) q(z2 | x). The mixture is then the prior of z2.

`conditional` conditions encoder and decoder on the class: p(x | z, class) with one prior for all classes (Sohn et al.
2015, section 4.1). Such a model has no latents of an image without its class: encode is None.

Pixels, and what the units mean:
- 'bernoulli' with `binarise`: every image is drawn as bits with P(1) = (x + 1) / 2, anew in every
  update and once in evaluation. Bounds are on the log-likelihood of the bits, in nats per image.
- 'bernoulli' without: grey levels (x + 1) / 2 in [0, 1] go into the cross-entropy as they are: the log-likelihood of
  images that are black and white already. Of others it is a common loss, in nats per image, but no likelihood:
  compare it with nothing else.
- 'gaussian': density of x in [-1, 1], in nats per image. It depends on the pixels' scale and has no
  upper bound.
- 'discretised_gaussian', 'discretised_logistic': probability of the 256 quantisation levels, as the mass in a level's
  bin; bits per dimension are measured too.
One scale (the standard deviation, or a logistic's scale) is shared by all pixels (Rybkin et al. 2020), learned or fixed
at `scale`, or the decoder puts out one for each pixel of each image (Kingma & Welling; Tomczak & Welling).

Samples and reconstructions are the decoder's mean images, not draws from p(x | z): no pixel noise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Annotated, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen import options
from jaxgen.checks import check_labels, check_size
from jaxgen.contract import Aux, Context, Family, Latents, State, make_update, new_state
from jaxgen.errors import UserError
from jaxgen.losses import likelihoods
from jaxgen.losses.divergences import normal_kl, normal_kl_by_latent
from jaxgen.networks.vae import (
    ConvDecoder,
    ConvEncoder,
    JoinedDecoder,
    JoinedEncoder,
    MlpDecoder,
    MlpEncoder,
    PixelDistribution,
)
from jaxgen.options import Count, NonNegative, OneOf, Positive, Rule
from jaxgen.randomness import example_keys, normal

Array = jax.Array
Moments = tuple[Array, Array]  # mean and log variance of diagonal normals, [n, latent] both

ACTIVATIONS = {'relu': jax.nn.relu, 'silu': jax.nn.silu, 'tanh': jnp.tanh}
# log p(x | z), [n], of the decoder's output [n, H, W, C], the log standard deviation and x.
LIKELIHOODS = {
    'bernoulli': lambda logits, log_scale, x: likelihoods.bernoulli(logits, x),
    'gaussian': likelihoods.gaussian,
    'discretised_gaussian': likelihoods.discretised_gaussian,
    'discretised_logistic': likelihoods.discretised_logistic,
}

# --- distributions of latents


class Inference(NamedTuple):
    """q(z | x) of a batch, beside p(z)."""

    mean: Array  # [n, d]; of two levels that of q(z | x, z2) at the mean z2 of q(z2 | x), and behind it z2
    draw: Callable  # standard normal noise [n, d] -> z ~ q(z | x) [n, d], and log p(z) - log q(z | x) [n], nats
    kl: Array | None  # KL(q(z | x) || p(z)) [n], nats, where it has a closed form
    kl_by_latent: Array | None = None  # the same of each dimension, [n, d]


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
    """Log density at z [n, d] of a mixture of k normals with equal weights, [k, d]: [n], nats (VampPrior, eq. 9)."""
    return log_mean_exp(jax.vmap(log_normal, (None, 0, 0))(z, means, log_vars))


def infer(posterior: Moments, prior: Moments) -> Inference:
    """One level: q(z | x) with moments [n, d], and a prior of k normals [k, d]."""

    def draw(noise: Array) -> tuple[Array, Array]:
        z = reparameterise(*posterior, noise)
        return z, log_mixture(z, *prior) - log_normal(z, *posterior)

    if len(prior[0]) > 1:
        return Inference(posterior[0], draw, None)
    return Inference(posterior[0], draw, normal_kl(*posterior, *prior), normal_kl_by_latent(*posterior, *prior))


def infer_two_levels(posterior2: Moments, prior2: Moments, posterior: Callable, prior: Callable) -> Inference:
    """Two levels: q(z2 | x) and p(z2) as in `infer`, and by z2 [n, d2] the moments of q(z | x, z2) and p(z | z2).

    Latents are z and behind it z2, [n, d + d2].
    """
    upper = infer(posterior2, prior2)

    def draw(noise: Array) -> tuple[Array, Array]:
        d = noise.shape[1] - upper.mean.shape[1]
        z2, log_ratio = upper.draw(noise[:, d:])
        q = posterior(z2)
        z = reparameterise(*q, noise[:, :d])
        return jnp.concatenate([z, z2], 1), log_ratio + log_normal(z, *prior(z2)) - log_normal(z, *q)

    return Inference(jnp.concatenate([posterior(upper.mean)[0], upper.mean], 1), draw, None)


def importance_weight(log_likelihood: Callable, inference: Inference, noise: Array) -> tuple[Array, Array]:
    """Log weight of one importance sample z ~ q(z | x) per example (Burda et al. 2015, section 3).

    Args:
      log_likelihood: z [n, d] -> log p(x | z) [n].
      noise: standard normal, [n, d].

    Returns:
      log p(x, z) - log q(z | x), and log p(x | z); both [n], nats.
    """
    z, log_ratio = inference.draw(noise)
    log_x = log_likelihood(z)
    return log_x + log_ratio, log_x


def importance_sampled(
    log_likelihood: Callable, inference: Inference, keys: Array, size: int, k: int
) -> tuple[Array, Array, Array]:
    """Of k importance samples z_i ~ q(z | x) with weights w_i: log 1/k sum_i w_i, 1/k sum_i log w_i and
    1/k sum_i log p(x | z_i), [n] each, nats.

    Samples are drawn one after another, and nothing of them is kept but these sums: memory does not grow with k.

    Args:
      keys: [n]; the noise of sample i is drawn by fold_in(key, i).
      size: of the noise, [n, size].
    """

    def one(i: Array, run: tuple[Array, ...]) -> tuple[Array, ...]:
        largest, total, mean_w, mean_x = run  # sum_i w_i = exp(largest) total
        noise = normal(jax.vmap(jax.random.fold_in, (0, None))(keys, i), (size,))
        log_w, log_x = importance_weight(log_likelihood, inference, noise)
        new = jnp.maximum(largest, log_w)
        shift = jnp.where(jnp.isneginf(new), 0, new)  # weights of 0 alone, so far
        total = total * jnp.exp(largest - shift) + jnp.exp(log_w - shift)
        return new, total, mean_w + (log_w - mean_w) / (i + 1), mean_x + (log_x - mean_x) / (i + 1)

    zero = jnp.zeros(len(keys))
    largest, total, mean_w, mean_x = jax.lax.fori_loop(0, k, one, (zero - jnp.inf, zero, zero, zero))
    return largest + jnp.log(total) - math.log(k), mean_w, mean_x


# --- pixels


class Pixels(NamedTuple):
    """p(x | z) of pixels, and their ranges; the fields are arguments of `build`."""

    likelihood: str
    binarise: bool
    white: int
    encoder_range: str

    def unit_range(self, x: Array) -> Array:
        """Images in [-1, 1] as grey levels in [0, 1], `white` as 1."""
        return jnp.clip((x + 1) * (127.5 / self.white), 0, 1)

    def target(self, x: Array, keys: Array) -> Array:
        """x of log p(x | z), of images in [-1, 1]: bits drawn by keys [n], grey levels in [0, 1], or the images."""
        if self.likelihood != 'bernoulli':
            return x
        x = self.unit_range(x)
        return jax.vmap(jax.random.bernoulli)(keys, x).astype(jnp.float32) if self.binarise else x

    def signed(self, target: Array) -> Array:
        """The target in [-1, 1]."""
        return 2 * target - 1 if self.likelihood == 'bernoulli' else target

    def encoder_input(self, target: Array) -> Array:
        return target if self.encoder_range == 'unit' else self.signed(target)

    def log_prob(self, output: Array, log_scale: Array, target: Array) -> Array:
        """log p(x | z), [n], nats, by the decoder's output [n, H, W, C]."""
        return LIKELIHOODS[self.likelihood](output, log_scale, target)

    def mean_image(self, output: Array) -> Array:
        """The mean of p(x | z), in [-1, 1]."""
        return 2 * jax.nn.sigmoid(output) - 1 if self.likelihood == 'bernoulli' else jnp.clip(output, -1, 1)


# --- the model


class Model(NamedTuple):
    """The networks, the prior and the likelihood. Methods take the weights, {network: weights}."""

    networks: dict[str, nn.Module]  # encoder, decoder; of two levels encoder2 of q(z2 | x) and decoder2 of p(z | z2)
    pixels: Pixels
    image: tuple[int, int, int]
    latent: int
    latent2: int  # 0: one level
    classes: int  # that encoder and decoder are conditioned on; 0: none
    pseudo_inputs: int  # components of the VampPrior; 0: N(0, I)

    @property
    def size(self) -> int:
        """Dimensions of all latents."""
        return self.latent + self.latent2

    @property
    def top_size(self) -> int:
        """Dimensions of the highest level's latents."""
        return self.latent2 or self.latent

    def apply(self, params, name: str, *inputs):
        return self.networks[name].apply({'params': params[name]}, *inputs)

    def condition(self, batch: dict) -> Array | None:
        """The class, one-hot [n, classes]."""
        return jax.nn.one_hot(batch['label'], self.classes) if self.classes else None

    def prior_moments(self, params) -> Moments:
        """Of the components of the highest level's prior, [k, d] both."""
        if not self.pseudo_inputs:
            return jnp.zeros((1, self.top_size)), jnp.zeros((1, self.top_size))
        unit_range = jnp.clip(params['prior']['pseudo_inputs'], 0, 1)
        images = unit_range if self.pixels.encoder_range == 'unit' else 2 * unit_range - 1
        return self.apply(params, 'encoder2' if self.latent2 else 'encoder', images)

    def infer(self, params, target: Array, condition: Array | None) -> Inference:
        x = self.pixels.encoder_input(target)
        if not self.latent2:
            return infer(self.apply(params, 'encoder', x, condition), self.prior_moments(params))
        return infer_two_levels(
            self.apply(params, 'encoder2', x),
            self.prior_moments(params),
            lambda z2: self.apply(params, 'encoder', x, z2),
            lambda z2: self.apply(params, 'decoder2', z2),
        )

    def decode(self, params, z: Array, condition: Array | None) -> tuple[Array, Array]:
        """The decoder's output [n, H, W, C], and the log standard deviation."""
        return self.apply(params, 'decoder', z if condition is None else jnp.concatenate([z, condition], 1))

    def log_likelihood(self, params, target: Array, condition: Array | None) -> Callable:
        """z [n, d] -> log p(x | z) [n], nats."""
        return lambda z: self.pixels.log_prob(*self.decode(params, z, condition), target)

    def mean_image(self, params, z: Array, condition: Array | None) -> Array:
        return self.pixels.mean_image(self.decode(params, z, condition)[0])


def loss(
    model: Model, beta: float, beta_warmup: int, free_bits: float, samples: int, bound: str,
    params, state: State, frozen, batch, rng,
):  # fmt: skip
    """Minus the bound, nats per image: KL + reconstruction (eq. 10), the mean over samples, or -L_k (Burda et al., eq.
    8)."""
    weight = beta * jnp.minimum(1, (state.step + 1) / beta_warmup) if beta_warmup else beta
    pixel_rng, z_rng = jax.random.split(rng)
    x = model.pixels.target(batch['image'], jax.random.split(pixel_rng, len(batch['image'])))
    condition = model.condition(batch)
    inference, log_p = model.infer(params, x, condition), model.log_likelihood(params, x, condition)
    noise = jax.random.normal(z_rng, (len(x), model.size) if samples == 1 else (samples, len(x), model.size))
    if samples == 1:
        log_w, log_x = importance_weight(log_p, inference, noise)
        kl = log_x - log_w if inference.kl is None else inference.kl
        value = (weight * kl - log_x).mean()
        if free_bits:
            cost = jnp.maximum(inference.kl_by_latent.mean(0), free_bits).sum()
            value = weight * cost - log_x.mean()
    else:
        log_w, log_x = jax.vmap(lambda noise: importance_weight(log_p, inference, noise))(noise)  # [k, n]
        kl = (log_x - log_w).mean(0) if inference.kl is None else inference.kl
        value = -log_mean_exp(log_w).mean() if bound == 'importance' else (weight * kl - log_x.mean(0)).mean()
    return value, Aux({'loss': value, 'kl': kl.mean(), 'reconstruction': -log_x.mean()})


def init(model: Model, optim, start: Callable, rng: Array, batch: dict, frozen: dict) -> State:
    """start: (the first images, rng) -> pseudo-inputs."""
    names = ('encoder', 'decoder', 'encoder2', 'decoder2', 'prior')
    rngs = dict(zip(names, jax.random.split(rng, len(names)), strict=True))
    x, z2 = batch['image'], jnp.zeros((1, model.latent2))
    inputs = {
        'encoder': (x[:1], z2) if model.latent2 else (x, model.condition(batch)),
        'encoder2': (x,),
        'decoder2': (z2,),
        'decoder': (jnp.zeros((1, model.size + model.classes)),),
    }
    params = {name: module.init(rngs[name], *inputs[name])['params'] for name, module in model.networks.items()}
    if model.pseudo_inputs:
        params['prior'] = {'pseudo_inputs': start(x, rngs['prior'])}
    return new_state(params, optim)


def start_pseudo_inputs(model: Model, mean: float, std: float, of_data: bool, x: Array, rng: Array) -> Array:
    """The pseudo-inputs before the first update, [K, H, W, C] about [0, 1]: a constant, or images x, and noise."""
    if of_data:
        mean = model.pixels.unit_range(x)[jnp.arange(model.pseudo_inputs) % len(x)]
    return mean + std * jax.random.normal(rng, (model.pseudo_inputs, *model.image))


def sample(model: Model, state: State, frozen, batch, rng) -> Array:
    """Mean images of z ~ p(z), level by level."""
    keys = example_keys(rng, batch)
    if model.pseudo_inputs:
        pairs = jax.vmap(jax.random.split)(keys)  # [n, 2]
        keys, component_keys = pairs[:, 0], pairs[:, 1]
        component = jax.vmap(lambda key: jax.random.randint(key, (), 0, model.pseudo_inputs))(component_keys)
        mean, log_var = jax.tree.map(lambda a: a[component], model.prior_moments(state.ema))
    else:
        mean = log_var = jnp.zeros(())
    noise = normal(keys, (model.size,))
    z = reparameterise(mean, log_var, noise[:, model.size - model.top_size :])
    if model.latent2:
        lower = reparameterise(*model.apply(state.ema, 'decoder2', z), noise[:, : model.latent])
        z = jnp.concatenate([lower, z], 1)
    return model.mean_image(state.ema, z, model.condition(batch))


def evaluate(model: Model, iwae_samples: int, state: State, frozen, batch, rng) -> dict[str, Array]:
    """Metrics per image [n], in nats (of bits, grey levels or densities, see the module's docstring).

    'nll_elbo' and 'nll_iwae', upper bounds on -log p(x), the second with iwae_samples; 'kl'; 'reconstruction' =
    E_q -log p(x | z); 'squared_error', of the image decoded from q's mean, mean over pixels in [-1, 1]; 'bits_per_dim'
    for the discretised likelihoods, from 'nll_iwae'.
    """
    pixel_rng, z_rng = jax.random.split(rng)
    x, condition = model.pixels.target(batch['image'], example_keys(pixel_rng, batch)), model.condition(batch)
    inference, log_p = model.infer(state.ema, x, condition), model.log_likelihood(state.ema, x, condition)
    keys = example_keys(z_rng, batch)
    bound, log_w, log_x = importance_sampled(log_p, inference, keys, model.size, iwae_samples)
    kl, reconstruction = log_x - log_w if inference.kl is None else inference.kl, -log_x
    mean_image = model.mean_image(state.ema, inference.mean, condition)
    metrics = {
        'nll_elbo': reconstruction + kl,
        'nll_iwae': -bound,
        'kl': kl,
        'reconstruction': reconstruction,
        'squared_error': jnp.square(mean_image - model.pixels.signed(x)).mean((1, 2, 3)),
    }
    if model.pixels.likelihood.startswith('discretised'):
        metrics['bits_per_dim'] = metrics['nll_iwae'] / (math.prod(model.image) * math.log(2))
    return metrics


def encode(model: Model, state: State, frozen, batch, rng) -> Array:
    """Mean of q(z | x), [n, latent]; with latent2 that of q(z | x, z2) and behind it z2, the mean of q(z2 | x)."""
    x = model.pixels.target(batch['image'], jax.random.split(rng, len(batch['image'])))
    return model.infer(state.ema, x, None).mean


def decode(model: Model, state: State, frozen, batch, latents, rng) -> Array:
    return model.mean_image(state.ema, latents, model.condition(batch))


def make_networks(
    context: Context, network: str, latent: int, latent2: int, width: int, levels: int, activation: str, hidden: tuple,
    outputs: int,
) -> tuple[dict[str, nn.Module], nn.Module]:  # fmt: skip
    """Encoders and decoder2 by name, and the decoder of images, with `outputs` channels; the other arguments are those
    of `build`."""
    dtype, unit, image = context.dtype, ACTIVATIONS[activation], (*context.image[:2], outputs)
    if network == 'conv':
        encoder = ConvEncoder(latent, width, levels, unit, dtype, context.remat)
        return {'encoder': encoder}, ConvDecoder(image, width, levels, unit, dtype, context.remat)
    unit = None if network == 'gated' else unit  # None: gated layers
    if not latent2:
        return {'encoder': MlpEncoder(latent, hidden, unit, dtype)}, MlpDecoder(image, hidden, unit, dtype)
    networks = {
        'encoder': JoinedEncoder(latent, hidden, unit, dtype),
        'encoder2': MlpEncoder(latent2, hidden, unit, dtype),
        'decoder2': MlpEncoder(latent, hidden[::-1], unit, dtype),
    }
    return networks, JoinedDecoder(image, latent, hidden, unit, dtype)


def check(pixels: Pixels, network: str, latent2: int, hidden: tuple[int, ...], conditional: bool, prior: str) -> None:
    """Raises UserError where options do not go together."""
    if pixels.likelihood != 'bernoulli' and pixels.encoder_range != 'signed':
        raise UserError("config.model.encoder_range = 'unit' needs config.model.likelihood = 'bernoulli'")
    if pixels.likelihood != 'bernoulli' and (pixels.binarise or pixels.white != 255):
        raise UserError("config.model.binarise and white need config.model.likelihood = 'bernoulli'")
    if latent2 and (network == 'conv' or not hidden):
        raise UserError("config.model.latent2 needs config.model.network 'mlp' or 'gated', with a hidden layer or more")
    if conditional and (latent2 or prior != 'normal'):
        raise UserError(
            'config.model.conditional needs one level of latents and a normal prior: set latent2 to 0 and prior to '
            "'normal'"
        )


def is_scale_range(values: tuple) -> bool:
    return not values or (len(values) == 2 and 0 < values[0] < values[1])


def check_scales(likelihood: str, learn_scale: bool, scales: str, scale_range: tuple, bounded_mean: bool) -> None:
    """Raises UserError where options of the pixels' scales do not go together."""
    if likelihood == 'bernoulli' and (scales != 'shared' or scale_range or bounded_mean):
        others = ', '.join(map(repr, (name for name in LIKELIHOODS if name != 'bernoulli')))
        raise UserError(
            f'config.model.scales, scale_range and bounded_mean need a config.model.likelihood with a scale: {others}'
        )
    if scales == 'pixel' and not learn_scale:
        raise UserError("config.model.scales = 'pixel' are learned: set config.model.learn_scale to True")


@options.checked
def build(
    context: Context,
    *,
    network: Annotated[str, OneOf('conv', 'mlp', 'gated')] = 'conv',
    latent: Count = 16,
    latent2: Annotated[int, '[0, inf)'] = 0,
    width: Count = 32,
    levels: Annotated[int, '[0, inf)'] = 2,
    activation: Annotated[str, OneOf(*ACTIVATIONS)] = 'relu',
    hidden: Annotated[tuple[int, ...], '[1, inf)'] = (400,),
    conditional: bool = False,
    prior: Annotated[str, OneOf('normal', 'vamp')] = 'normal',
    pseudo_inputs: Count = 500,
    pseudo_mean: float = 0.05,
    pseudo_std: NonNegative = 0.01,
    pseudo_data: bool = False,
    likelihood: Annotated[str, OneOf(*LIKELIHOODS)] = 'bernoulli',
    binarise: bool = False,
    white: Annotated[int, '[1, 255]'] = 255,
    encoder_range: Annotated[str, OneOf('signed', 'unit')] = 'signed',
    scale: Positive = 0.1,
    learn_scale: bool = True,
    scales: Annotated[str, OneOf('shared', 'pixel')] = 'shared',
    scale_range: Annotated[tuple[float, ...], Rule(is_scale_range, '(least, most), above 0')] = (),
    bounded_mean: bool = False,
    beta: NonNegative = 1.0,
    beta_warmup: Annotated[int, '[0, inf)'] = 0,
    free_bits: NonNegative = 0.0,
    samples: Count = 1,
    bound: Annotated[str, OneOf('importance', 'elbo')] = 'importance',
    iwae_samples: Count = 64,
) -> Family:
    """VAE.

    Args:
      network: of encoder and decoder: 'conv', 'mlp', or 'gated', an mlp of gated layers (Tomczak & Welling 2017).
      latent: dimensions of z.
      latent2: dimensions of the level above it; 0: none. Not with 'conv'.
      width, levels: of 'conv': channels at full size, doubled each of `levels` times that the image is halved.
      activation: of 'conv' and 'mlp'; Kingma & Welling's is 'tanh'. Narrow networks of ReLUs can die for whole groups
        of images, say all bright ones, which are then decoded as one grey.
      hidden: of 'mlp' and 'gated': layer widths of the encoder; the decoder has them in reverse. A network of two
        inputs has all but the last layer for each of them alone.
      conditional: condition encoder and decoder on the class, `batch['label']`.
      prior: of the highest level: 'normal' or 'vamp'.
      pseudo_inputs: of 'vamp': their number, K.
      pseudo_mean, pseudo_std: of 'vamp': distribution of their pixels before the first update, black being 0 and white
        1. They are clipped to [0, 1], and a pixel outside learns nothing.
      pseudo_data: of 'vamp': start from images of the first batch instead, with noise of pseudo_std.
      likelihood: of pixels, see the module's docstring.
      binarise: bits for pixels, with 'bernoulli' only.
      white: the stored pixel value, of 0 to 255, that stands for a bit of 1: it is 1 where bits are stored as 0 and 1.
        With 'bernoulli' only.
      encoder_range: of the encoder's input of bits and grey levels x, 'signed': 2 x - 1 in [-1, 1]; 'unit': x in
        [0, 1], as in the papers. With 'bernoulli' only.
      scale, learn_scale: standard deviation of the gaussian ones, scale of the logistic one, at the start or fixed.
      scales: 'shared' by all pixels, or 'pixel': one for each pixel of each image, by the decoder; learned both.
      scale_range: least and most scale; (): any.
      bounded_mean: means of the gaussian ones and the logistic one lie in (-1, 1), by a sigmoid.
      beta: weight of the KL term in training.
      beta_warmup: updates in which it rises linearly to that; 0: none.
      free_bits: nats of the KL of each latent, mean over the batch, that cost nothing in training. It needs the prior
        'normal', one level and samples = 1.
      samples: k of the bound that is trained; 1: the ELBO.
      bound: of k > 1: 'importance', L_k, or 'elbo', the mean of k estimates of the ELBO.
      iwae_samples: k of 'nll_iwae' in evaluate; also the draws by which a KL without a closed form is estimated.

    Raises:
      UserError: a value that cannot work.
    """
    pixels = Pixels(likelihood, binarise, white, encoder_range)
    check(pixels, network, latent2, hidden, conditional, prior)
    check_scales(likelihood, learn_scale, scales, scale_range, bounded_mean)
    if samples > 1 and bound == 'importance' and (beta != 1 or beta_warmup):
        raise UserError(
            'config.model.samples > 1 trains a bound without a KL term: set config.model.beta to 1 and beta_warmup to '
            "0, or bound to 'elbo'"
        )
    if free_bits and (samples > 1 or latent2 or prior != 'normal'):
        raise UserError(
            'config.model.free_bits needs a KL of each latent: set config.model.samples to 1, latent2 to 0 and prior '
            "to 'normal'"
        )
    check_labels(context, conditional)
    divisor = 2**levels if network == 'conv' else 1
    check_size(context.image, divisor, f'config.model.levels = {levels}')

    outputs = context.image[2] * (2 if scales == 'pixel' else 1)
    networks, decoder = make_networks(context, network, latent, latent2, width, levels, activation, hidden, outputs)
    learned = scales if learn_scale and likelihood != 'bernoulli' else 'fixed'
    log_range = tuple(map(math.log, scale_range))
    model = Model(
        networks={**networks, 'decoder': PixelDistribution(decoder, math.log(scale), learned, log_range, bounded_mean)},
        pixels=pixels,
        image=context.image,
        latent=latent,
        latent2=latent2,
        classes=context.classes if conditional else 0,
        pseudo_inputs=pseudo_inputs if prior == 'vamp' else 0,
    )
    objective = functools.partial(loss, model, beta, beta_warmup, free_bits, samples, bound)
    start = functools.partial(start_pseudo_inputs, model, pseudo_mean, pseudo_std, pseudo_data)
    trained = (*model.networks, *(['prior'] if prior == 'vamp' else []))
    return Family(
        init=functools.partial(init, model, context.optim, start),
        update=make_update(objective, context.optim, *trained),
        sample=functools.partial(sample, model),
        evaluate=functools.partial(evaluate, model, iwae_samples),
        encode=None if conditional else functools.partial(encode, model),
        decode=functools.partial(decode, model),
        conditions=('label',) if conditional else (),
        divisor=divisor,
        free=('iwae_samples',),
        latents=Latents(shape=(model.size,)),
    )
