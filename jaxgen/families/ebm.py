"""Energy-based models: IGEBM (Du & Mordatch 2019, arXiv 1903.08689) and JEM (Grathwohl et al. 2020, arXiv 1912.03263).

A network maps x to k numbers f(x), and p(x) is proportional to exp(-E(x)) with

    E(x) = -log sum_y exp f(x)[y].

With k = 1 that is any energy, IGEBM. With one number for each class (`joint`) it is JEM: f are a classifier's logits,
p(y | x) their softmax, and what a classifier leaves free, the logits' size, is the image's likelihood. The constant
that makes p a distribution is not known, so energies compare images under one
model, not under two.

The gradient of log p(x) by the weights is that of E(samples) - E(data) (maximum likelihood), and samples come from
chains that go down the energy with noise (stochastic gradient Langevin dynamics),

    x <- x - step * clamp(dE/dx) + noise * eps.

Langevin's equation has noise = sqrt(2 step). Both papers take far less, which is the same chain at a low temperature:
the model that is trained is the one that these short chains sample. Chains go on where they stopped (persistent
contrastive divergence, Tieleman 2008): a replay buffer in State.extra holds them, is saved with the weights, and every
update goes on with a batch of it. A fraction of these, `fresh`, starts anew from uniform noise.

Differences to the published code: entries are drawn without repeats, so that no two chains end in one entry, and a
chain goes back where it came from (as in JEM; IGEBM's buffer drops the oldest). Noise comes after the step, as in
the papers' equation (IGEBM's code adds it before). JEM's classifier learns from the same batch as its energy. The
dropout within IGEBM's large network and its bound of each weight's gradient by three deviations are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxgen import options
from jaxgen.checks import check_size
from jaxgen.contract import Aux, Context, Family, State, advance, gradient_step, new_state, shard_batch, split_batch
from jaxgen.errors import UserError
from jaxgen.losses.likelihoods import cross_entropy
from jaxgen.networks import energy as energies
from jaxgen.networks.energy import ResidualEnergy
from jaxgen.networks.wide_resnet import WideResNet
from jaxgen.options import Count, Fraction, NonNegative, OneOf, Positive, Rule
from jaxgen.randomness import example_keys, normal

Array = jax.Array

NETWORKS = {'residual': ResidualEnergy, 'wide_resnet': WideResNet}


# --- chains


def langevin(
    energy: Callable, x: Array, keys: Array, *, steps: int, step: float, noise: float, clamp: float, bounded: bool,
    trajectory: bool = False,
) -> tuple[Array, Array | None]:  # fmt: skip
    """Chains of `steps` steps from x [n, H, W, C].

    Args:
      energy: images [n, H, W, C] -> [n], each by itself.
      keys: [n], one for each chain: what a chain does depends on no other.
      step, noise: of the equation above, for images in [-1, 1].
      clamp: the gradient's entries are clipped at this size, 0: not at all.
      bounded: every step's image is clipped to [-1, 1].

    Returns:
      The last images, and with `trajectory` the images after each step, [steps, n, H, W, C]. No gradient goes through.
    """
    chex.assert_rank(x, 4)
    chex.assert_shape(keys, (len(x),))
    gradient = jax.grad(lambda x: energy(x).sum())

    def one(x: Array, k: Array) -> tuple[Array, Array | None]:
        slope = gradient(x)
        slope = jnp.clip(slope, -clamp, clamp) if clamp else slope
        eps = normal(jax.vmap(jax.random.fold_in, (0, None))(keys, k), x.shape[1:])
        x = x - step * slope + noise * eps
        x = jnp.clip(x, -1, 1) if bounded else x
        return x, x if trajectory else None

    x, images = jax.lax.scan(one, jax.lax.stop_gradient(x), jnp.arange(steps))
    return jax.lax.stop_gradient(x), images


def uniform_noise(keys: Array, shape: tuple[int, ...]) -> Array:
    """Uniform noise in [-1, 1), [n, *shape], from keys [n]: where chains start."""
    return jax.vmap(lambda key: jax.random.uniform(key, shape, minval=-1, maxval=1))(keys)


def draw_chains(buffer: Array, rng: Array, n: int, fresh: float) -> tuple[Array, Array]:
    """n chains of the replay buffer [size, H, W, C] to go on with.

    Returns:
      Their indices in it, int32 [n], all different, and their images, about the fraction `fresh` of them uniform noise
      instead.
    """
    index_rng, fresh_rng, noise_rng = jax.random.split(rng, 3)
    # An order by random keys; jax.random.permutation does the same in several rounds, and compiles long.
    indices = jnp.argsort(jax.random.bits(index_rng, (len(buffer),)))[:n]
    new = jax.random.bernoulli(fresh_rng, fresh, (n,))
    noise = jax.random.uniform(noise_rng, (n, *buffer.shape[1:]), minval=-1, maxval=1)
    return indices, jnp.where(new[:, None, None, None], noise, buffer[indices])


def entries(buffer: Array, keys: Array) -> Array:
    """An entry of the replay buffer for each key [n], with repeats: images [n, H, W, C]."""
    return buffer[jax.vmap(lambda key: jax.random.randint(key, (), 0, len(buffer)))(keys)]


def shuffle_pixels(keys: Array, x: Array) -> Array:
    """Images [n, H, W, C] with their pixels in a random order; keys [n]."""

    def one(key: Array, x: Array) -> Array:
        return jax.random.permutation(key, x.reshape(-1, x.shape[-1])).reshape(x.shape)

    return jax.vmap(one)(keys, x)


# --- the energy


def energy_of(logits: Array) -> Array:
    """E = -log sum_y exp f(x)[y], [n], of f(x) [n, k] (JEM, section 3)."""
    return -jax.nn.logsumexp(logits, -1)


class Model(NamedTuple):
    """The network's outputs and energy by its weights, which are to be normalised first where they are `spectral`."""

    network: ResidualEnergy | WideResNet
    spectral: bool  # its kernels are divided by their singular values; State.extra['vectors'] has the vectors

    def normalised(self, weights, vectors):
        """Weights as the network takes them; worked out once for a whole chain."""
        return energies.normalise(weights, vectors) if self.spectral else weights

    def averaged(self, state: State):
        """The averaged weights, normalised."""
        return self.normalised(state.ema['energy'], state.extra['vectors']['ema'])

    def logits(self, weights, x: Array) -> Array:
        """f(x), [n, k]."""
        return self.network.apply({'params': weights}, x)

    def energy(self, weights, x: Array) -> Array:
        """E(x), [n, H, W, C] -> [n]."""
        return energy_of(self.logits(weights, x))


def classification_metrics(logits: Array, label: Array) -> tuple[Array, Array]:
    """Cross-entropy [n], nats, and whether the likeliest class is the label, 0 or 1, [n]."""
    return cross_entropy(logits, label), (logits.argmax(-1) == label).astype(jnp.float32)


def loss(
    model: Model, params, state, frozen, batch, rng, *, joint: bool, classification: float, data_noise: float,
    regulariser: float, limit: float,
):  # fmt: skip
    """Contrastive divergence between 'image' and 'chains' of the batch, with the squared energies as regulariser, and
    for `joint` the cross-entropy of 'label'."""
    weights = model.normalised(params['energy'], state.extra['vectors']['params'])
    x = batch['image'] + data_noise * jax.random.normal(rng, batch['image'].shape)
    logits = model.logits(weights, x)
    real, drawn = energy_of(logits), model.energy(weights, batch['chains'])
    value = (real - drawn).mean() + regulariser * (jnp.square(real) + jnp.square(drawn)).mean()
    largest = jnp.maximum(jnp.abs(real).max(), jnp.abs(drawn).max())
    logs = {
        'energy/data': real.mean(),
        'energy/samples': drawn.mean(),
        'energy/largest': jnp.where(largest <= limit, largest, jnp.inf),
    }
    if joint:
        entropy, correct = classification_metrics(logits, batch['label'])
        value = value + classification * entropy.mean()
        logs |= {'cross_entropy': entropy.mean(), 'accuracy': correct.mean()}
    return value, Aux({'loss': value, **logs})


def continue_chains(model: Model, chain: Callable, weights, x: Array, rng: Array, parts: int) -> Array:
    """Last images [n, H, W, C] of chains of the energy with these weights, from x; noise is by their index.

    Args:
      chain: (energy, x, keys) -> (images, ...), `langevin` with its parameters.
      parts: run one after another, to need no more memory than a gradient that is accumulated in as many.
    """
    chains = {'x': x, 'index': jnp.arange(len(x))}

    def part(one):
        return chain(lambda x: model.energy(weights, x), one['x'], example_keys(rng, one))[0]

    if parts == 1:
        return part(chains)
    return jnp.swapaxes(jax.lax.map(part, split_batch(chains, parts)), 0, 1).reshape(x.shape)


def run_sampler(model: Model, chain: Callable, start: str, state: State, batch: dict, rng: Array):
    """Result of `chain` from noise or entries of the buffer (`start`), with the averaged weights; see `langevin`."""
    start_rng, chain_rng = jax.random.split(rng)
    keys, buffer = example_keys(start_rng, batch), state.extra['buffer']
    x = uniform_noise(keys, buffer.shape[1:]) if start == 'noise' else entries(buffer, keys)
    weights = model.averaged(state)
    return chain(lambda x: model.energy(weights, x), x, example_keys(chain_rng, batch))


def evaluate(model: Model, joint: bool, state, frozen, batch, rng):
    """Energies of each image and of others, and how often its own is lower: see `build`."""
    keys = [example_keys(one, batch) for one in jax.random.split(rng, 3)]
    weights = model.averaged(state)
    logits = model.logits(weights, batch['image'])
    own = energy_of(logits)
    others = {
        'noise': uniform_noise(keys[0], batch['image'].shape[1:]),
        'shuffled': shuffle_pixels(keys[1], batch['image']),
        'chains': entries(state.extra['buffer'], keys[2]),
    }
    other = {name: model.energy(weights, x) for name, x in others.items()}
    metrics = {'energy': own, **{f'energy/{name}': e for name, e in other.items()}}
    metrics |= {f'below/{name}': (own < other[name]).astype(jnp.float32) for name in ('noise', 'shuffled')}
    if joint and 'label' in batch:
        metrics['cross_entropy'], metrics['accuracy'] = classification_metrics(logits, batch['label'])
    return metrics


def classify(model: Model, state, frozen, batch, rng):
    """Logits of the classes, float32 [n, classes]."""
    if 'sigma' in batch:
        raise UserError('this classifier was not trained on such noise: guidance needs the run of a noisy_classifier')
    return model.logits(model.averaged(state), batch['image'])


@options.checked
def build(
    context: Context,
    *,
    network: Annotated[str, OneOf(*NETWORKS)] = 'residual',
    width: Count = 128,
    multipliers: Annotated[tuple[int, ...], '[1, inf)', Rule(len, 'one number or more')] = (1, 2, 4),
    blocks: Count = 3,
    joint: bool = False,
    classification: NonNegative = 1.0,
    buffer: Count = 10_000,
    fresh: Fraction = 0.05,
    steps: Count = 60,
    step: Positive = 40.0,
    noise: NonNegative = 0.01,
    clamp: NonNegative = 0.005,
    bounded: bool = True,
    data_noise: NonNegative = 0.0,
    regulariser: NonNegative = 1.0,
    limit: Positive = 1e4,
    sample_steps: Count = 1000,
    start: Annotated[str, OneOf('noise', 'buffer')] = 'noise',
) -> Family:
    """Energy-based model.

    Args:
      network: 'residual', IGEBM's with spectral normalisation; 'wide_resnet', JEM's without any normalisation.
      width, multipliers, blocks: channels of the first group of blocks, those of each group as a multiple, and blocks
        of a group. Every group of 'residual' halves the image, of 'wide_resnet' every one but the first.
      joint: with a number for each class, and their cross-entropy in the loss (JEM).
      classification: weight of the cross-entropy.
      buffer: chains in the replay buffer.
      fresh: fraction of a batch of chains that starts anew, from noise.
      steps: of the chains in each update.
      step, noise, clamp, bounded: of the chains, see `langevin`. The defaults are IGEBM's for images in [0, 1] (10,
        0.005, 0.01), in our scale: there x is half of ours, and so the gradient twice.
      data_noise: standard deviation of noise on the data, in training only.
      regulariser: weight of the mean squared energies of data and of samples, without which nothing holds the energies
        near 0 and their differences from growing.
      limit: the training is stopped where an energy is larger than this, or not a number.
      sample_steps: of the chains of samples.
      start: of samples: 'noise', or 'buffer': an entry of the buffer that their key chooses. The second is easier for
        the model, since these chains are as old as the training.

    The update's logs hold mean energies of data and samples, the largest energy (infinite beyond `limit`: training
    stops), and how far chains moved.

    evaluate returns for each image 'energy', and for comparison those of other images under the same model:
    'energy/noise', uniform noise, 'energy/shuffled', the image's own pixels in a random order, and 'energy/chains', an
    entry of the buffer; 'below/noise' and 'below/shuffled', 1 where the image's energy is the lower one: their means
    are the areas under the ROC curve of the energy as a detector of such images. With `joint` also 'cross_entropy', in
    nats, and 'accuracy'.

    Raises:
      UserError: a value that cannot work.
    """
    if joint and context.classes < 2:
        raise UserError("config.data.features must hold 'label', of 2 classes or more: config.model.joint learns them")
    divisor = 2 ** (len(multipliers) - (network == 'wide_resnet'))
    check_size(context.image, divisor, f'config.model.multipliers = {multipliers}')

    outputs = context.classes if joint else 1
    net = NETWORKS[network](width, multipliers, blocks, outputs, context.dtype, context.remat)
    model = Model(net, spectral=network == 'residual')
    chain = functools.partial(langevin, step=step, noise=noise, clamp=clamp, bounded=bounded)
    weighting = dict(joint=joint, classification=classification, regulariser=regulariser)
    gradient = gradient_step(
        functools.partial(loss, model, data_noise=data_noise, limit=limit, **weighting), context.optim, 'energy'
    )

    def init(rng, batch, frozen):
        net_rng, buffer_rng = jax.random.split(rng)
        n = len(batch['image'])
        if n > buffer:
            raise UserError(f'config.model.buffer = {buffer} must hold at least config.data.batch = {n} chains')
        weights = net.init(net_rng, batch['image'][:1])['params']
        vectors = energies.start_vectors(weights) if model.spectral else {}
        extra = {
            'buffer': jax.random.uniform(buffer_rng, (buffer, *context.image), minval=-1, maxval=1),
            'vectors': {'params': vectors, 'ema': jax.tree.map(jnp.copy, vectors)},
        }
        return new_state({'energy': weights}, context.optim, extra)

    def update(state, frozen, batch, rng):
        draw_rng, chain_rng, noise_rng = jax.random.split(rng, 3)
        vectors, memory = state.extra['vectors'], state.extra['buffer']
        indices, x = draw_chains(memory, draw_rng, len(batch['image']), fresh)
        x = shard_batch(x)
        weights = model.normalised(state.params['energy'], vectors['params'])
        moved = continue_chains(
            model, functools.partial(chain, steps=steps), weights, x, chain_rng, context.optim.accumulate
        )
        memory = memory.at[indices].set(moved, unique_indices=True)
        inputs = {name: batch[name] for name in ('image', *(('label',) if joint else ()))}
        state, (logs, _) = gradient(state, frozen, {**inputs, 'chains': moved}, noise_rng)
        logs['moved'] = jnp.sqrt(jnp.square(moved - x).mean())
        state = advance(state, context.optim)
        vectors = {kind: energies.iterate(getattr(state, kind)['energy'], own) for kind, own in vectors.items()}
        return state.replace(extra={'buffer': memory, 'vectors': vectors}), logs

    sampling = functools.partial(chain, steps=sample_steps)

    def sample(state, frozen, batch, rng):
        return jnp.clip(run_sampler(model, sampling, start, state, batch, rng)[0], -1, 1)

    def trajectory(state, frozen, batch, rng):
        recorded = functools.partial(sampling, trajectory=True)
        return {'x': run_sampler(model, recorded, start, state, batch, rng)[1]}

    return Family(
        init,
        update,
        sample,
        functools.partial(evaluate, model, joint),
        classify=functools.partial(classify, model) if joint else None,
        trajectory=trajectory,
        divisor=divisor,
        free=('sample_steps', 'start'),
        larger=('below', *(('accuracy',) if joint else ())),
        sampling=('sample_steps', 'start'),
    )
