"""Energy-based models: IGEBM (Du & Mordatch 2019, arXiv 1903.08689) and JEM (Grathwohl et al. 2020, arXiv 1912.03263).

A network gives k numbers f(x), and p(x) is proportional to exp(-E(x)) with

    E(x) = -log sum_y exp f(x)[y].

With k = 1 that is any energy, IGEBM. With one number for each class (`joint`) it is JEM: f are a classifier's logits,
p(y | x) their softmax, and what a classifier leaves free, the logits' size, is the image's likelihood. The constant
that makes p a distribution is not known, so energies of one model compare images, and those of two say nothing.

The gradient of log p(x) by the weights is that of E(samples) - E(data) (maximum likelihood), and samples come from
chains that go down the energy with noise (stochastic gradient Langevin dynamics),

    x <- x - step * clamp(dE/dx) + noise * eps.

Langevin's equation asks for noise = sqrt(2 step). Both papers take far less, which is the same chain at a low
temperature: the model that is trained is the one that these short chains sample. Chains go on where they stopped
(persistent contrastive divergence, Tieleman 2008): a buffer in State.extra holds them, is saved with the weights, and
every update goes on with a batch of it. A share of these, `fresh`, starts anew from uniform noise.

Differences to the published code: entries are drawn without repeats, so that no two chains end in one place, and a
chain goes back where it came from (as in JEM; IGEBM's buffer drops the oldest). Noise comes after the step, as in
the papers' equation (IGEBM's code adds it before). JEM's classifier learns from the same batch as its energy. The
dropout within IGEBM's large network and its bound of each weight's gradient by three deviations are left out.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgen.checks import check_size
from jaxgen.contract import Aux, Context, Family, advance, gradient_step, new_state, shard_batch, split_batch
from jaxgen.errors import UserError
from jaxgen.losses.likelihoods import cross_entropy
from jaxgen.networks import energy as energies
from jaxgen.networks.energy import ResidualEnergy
from jaxgen.networks.wide_resnet import WideResNet
from jaxgen.randomness import example_keys, normal

Array = jax.Array


def langevin(
    energy: Callable, x: Array, keys: Array, *, steps: int, step: float, noise: float, clamp: float, bounded: bool,
    trajectory: bool = False,
) -> tuple[Array, Array | None]:  # fmt: skip
    """Chains of `steps` steps from x [n, H, W, C].

    Args:
      energy: images [n, H, W, C] -> [n], each by itself.
      keys: [n], one for each chain: what a chain does depends on no other.
      step, noise: of the equation above, for images in [-1, 1].
      clamp: the gradient's entries are cut off at this size, 0: nowhere.
      bounded: every step's image is cut off at [-1, 1].

    Returns:
      The last images, and with `trajectory` the images after each step, [steps, n, H, W, C]. No gradient goes through.
    """
    slope = jax.grad(lambda x: energy(x).sum())

    def one(x: Array, k: Array) -> tuple[Array, Array | None]:
        down = slope(x)
        down = jnp.clip(down, -clamp, clamp) if clamp else down
        eps = normal(jax.vmap(jax.random.fold_in, (0, None))(keys, k), x.shape[1:])
        x = x - step * down + noise * eps
        x = jnp.clip(x, -1, 1) if bounded else x
        return x, x if trajectory else None

    x, seen = jax.lax.scan(one, jax.lax.stop_gradient(x), jnp.arange(steps))
    return jax.lax.stop_gradient(x), seen


def uniform(keys: Array, shape: tuple[int, ...]) -> Array:
    """Uniform noise in [-1, 1), [n, *shape], from keys [n]: where chains start."""
    return jax.vmap(lambda key: jax.random.uniform(key, shape, minval=-1, maxval=1))(keys)


def draw(buffer: Array, rng: Array, n: int, fresh: float) -> tuple[Array, Array]:
    """n chains of the buffer [size, H, W, C] to go on with.

    Returns:
      Their places, int32 [n], all different, and their images, of which about the share `fresh` are noise instead.
    """
    place_rng, fresh_rng, noise_rng = jax.random.split(rng, 3)
    # An order by random keys; jax.random.permutation does the same in several rounds, and compiles long.
    places = jnp.argsort(jax.random.bits(place_rng, (len(buffer),)))[:n]
    new = jax.random.bernoulli(fresh_rng, fresh, (n,))
    noise = jax.random.uniform(noise_rng, (n, *buffer.shape[1:]), minval=-1, maxval=1)
    return places, jnp.where(new[:, None, None, None], noise, buffer[places])


def shuffled(keys: Array, x: Array) -> Array:
    """Images [n, H, W, C] with their pixels in a random order; keys [n]."""

    def one(key: Array, x: Array) -> Array:
        return jax.random.permutation(key, x.reshape(-1, x.shape[-1])).reshape(x.shape)

    return jax.vmap(one)(keys, x)


def build(
    context: Context,
    *,
    network: str = 'residual',
    width: int = 128,
    multipliers: tuple[int, ...] = (1, 2, 4),
    blocks: int = 3,
    joint: bool = False,
    classification: float = 1.0,
    buffer: int = 10_000,
    fresh: float = 0.05,
    steps: int = 60,
    step: float = 40.0,
    noise: float = 0.01,
    clamp: float = 0.005,
    bounded: bool = True,
    data_noise: float = 0.0,
    regulariser: float = 1.0,
    limit: float = 1e4,
    sample_steps: int = 1000,
    start: str = 'noise',
) -> Family:
    """Energy-based model.

    Args:
      network: 'residual', IGEBM's with spectral normalisation; 'wide_resnet', JEM's without any normalisation.
      width, multipliers, blocks: channels of the first group of blocks, those of each group as a multiple, and blocks
        of a group. Every group of 'residual' halves the image, of 'wide_resnet' every one but the first.
      joint: with a number for each class, and their cross-entropy in the loss (JEM).
      classification: its weight.
      buffer: chains kept.
      fresh: share of a batch of chains that starts anew.
      steps: of the chains in each update.
      step, noise, clamp, bounded: see `langevin`. The defaults are IGEBM's for images in [0, 1] (10, 0.005, 0.01), in
        our scale: there x is half of ours, and so the gradient twice.
      data_noise: standard deviation of noise on the data, in training only.
      regulariser: weight of the mean squared energies of data and of samples, without which nothing holds the energies
        near 0 and their differences from growing.
      limit: the training is stopped where an energy is larger than this, or not a number.
      sample_steps: of the chains that make pictures.
      start: 'noise', or 'buffer': they go on from an entry of the buffer that their key chooses. The second asks less
        of the model, since these chains are as old as the training.

    The update's logs hold mean energies of data and samples, the largest energy (infinite beyond `limit`: training
    stops), and how far chains moved.

    evaluate gives per image 'energy', and for comparison those of other images under the same model:
    'energy/noise', uniform noise, 'energy/shuffled', the image's own pixels in a random order, and 'energy/chains', an
    entry of the buffer; 'below/noise' and 'below/shuffled', 1 where the image's energy is the lower one: their means
    are areas under the ROC curve of telling the two kinds apart. With `joint` also 'cross_entropy', in nats, and
    'accuracy'.

    Raises:
      UserError: a value that cannot work.
    """
    if network not in ('residual', 'wide_resnet'):
        raise UserError(f"config.model.network must be 'residual' or 'wide_resnet'; it is {network!r}")
    if start not in ('noise', 'buffer'):
        raise UserError(f"config.model.start must be 'noise' or 'buffer'; it is {start!r}")
    if min(width, blocks, buffer, steps, sample_steps, len(multipliers), *multipliers) < 1:
        raise UserError(
            'config.model: width, multipliers, blocks, buffer, steps and sample_steps must be 1 or more each'
        )
    if min(step, limit) <= 0 or min(noise, clamp, data_noise, regulariser, classification) < 0:
        raise UserError(
            'config.model: step and limit must be more than 0; noise, clamp, data_noise, regulariser and '
            'classification 0 or more'
        )
    if not 0 <= fresh <= 1:
        raise UserError(f'config.model.fresh = {fresh} must be from 0 to 1')
    if joint and context.classes < 2:
        raise UserError("config.data.features must hold 'label', of 2 classes or more: config.model.joint learns them")
    divisor = 2 ** (len(multipliers) - (network == 'wide_resnet'))
    check_size(context.image, divisor, f'config.model.multipliers = {multipliers}')

    shape = context.image
    module = {'residual': ResidualEnergy, 'wide_resnet': WideResNet}[network]
    outputs = context.classes if joint else 1
    net = module(width, multipliers, blocks, outputs, context.dtype, context.remat)
    spectral = network == 'residual'
    chains = {'step': step, 'noise': noise, 'clamp': clamp, 'bounded': bounded}

    def effective(weights, vectors):
        """Weights as the network takes them; worked out once for a whole chain."""
        return energies.normalise(weights, vectors) if spectral else weights

    def logits(weights, x: Array) -> Array:
        return net.apply({'params': weights}, x)

    def energy_of(f: Array) -> Array:
        return -jax.nn.logsumexp(f, -1)

    def energy(weights, x: Array) -> Array:
        """[n, H, W, C] -> [n]."""
        return energy_of(logits(weights, x))

    def averaged(state):
        return effective(state.ema['energy'], state.extra['vectors']['ema'])

    def score(f: Array, label: Array) -> tuple[Array, Array]:
        """Cross-entropy [n], nats, and hits [n], 0 or 1."""
        return cross_entropy(f, label), (f.argmax(-1) == label).astype(jnp.float32)

    def loss(params, state, frozen, batch, rng):
        weights = effective(params['energy'], state.extra['vectors']['params'])
        x = batch['image'] + data_noise * jax.random.normal(rng, batch['image'].shape)
        f = logits(weights, x)
        real, drawn = energy_of(f), energy(weights, batch['chains'])
        value = (real - drawn).mean() + regulariser * (jnp.square(real) + jnp.square(drawn)).mean()
        largest = jnp.maximum(jnp.abs(real).max(), jnp.abs(drawn).max())
        logs = {
            'energy/data': real.mean(),
            'energy/samples': drawn.mean(),
            'energy/largest': jnp.where(largest <= limit, largest, jnp.inf),
        }
        if joint:
            entropy, hits = score(f, batch['label'])
            value = value + classification * entropy.mean()
            logs |= {'cross_entropy': entropy.mean(), 'accuracy': hits.mean()}
        return value, Aux({'loss': value, **logs})

    step = gradient_step(loss, context.optim, 'energy')

    def init(rng, batch, frozen):
        net_rng, buffer_rng = jax.random.split(rng)
        n = len(batch['image'])
        if n > buffer:
            raise UserError(f'config.model.buffer = {buffer} must hold at least config.data.batch = {n} chains')
        weights = net.init(net_rng, batch['image'][:1])['params']
        vectors = energies.start_vectors(weights) if spectral else {}
        extra = {
            'buffer': jax.random.uniform(buffer_rng, (buffer, *shape), minval=-1, maxval=1),
            'vectors': {'params': vectors, 'ema': jax.tree.map(jnp.copy, vectors)},
        }
        return new_state({'energy': weights}, context.optim, extra)

    def go_on(weights, x: Array, rng: Array) -> Array:
        """Chains from x, in as many parts as a gradient is taken in, to need no more memory than that."""
        m, like = context.optim.accumulate, {'x': x, 'index': jnp.arange(len(x))}

        def part(one):
            return langevin(lambda x: energy(weights, x), one['x'], example_keys(rng, one), steps=steps, **chains)[0]

        if m == 1:
            return part(like)
        return jnp.swapaxes(jax.lax.map(part, split_batch(like, m)), 0, 1).reshape(x.shape)

    def update(state, frozen, batch, rng):
        draw_rng, chain_rng, noise_rng = jax.random.split(rng, 3)
        vectors, memory = state.extra['vectors'], state.extra['buffer']
        places, x = draw(memory, draw_rng, len(batch['image']), fresh)
        x = shard_batch(x)
        moved = go_on(effective(state.params['energy'], vectors['params']), x, chain_rng)
        memory = memory.at[places].set(moved, unique_indices=True)
        used = {name: batch[name] for name in ('image', *(('label',) if joint else ()))}
        state, (logs, _) = step(state, frozen, {**used, 'chains': moved}, noise_rng)
        logs['moved'] = jnp.sqrt(jnp.square(moved - x).mean())
        state = advance(state, context.optim)
        if spectral:
            vectors = {kind: energies.turn(getattr(state, kind)['energy'], vectors[kind]) for kind in vectors}
        return state.replace(extra={'buffer': memory, 'vectors': vectors}), logs

    def entry(state, keys: Array) -> Array:
        """An entry of the buffer for each key."""
        memory = state.extra['buffer']
        return memory[jax.vmap(lambda key: jax.random.randint(key, (), 0, len(memory)))(keys)]

    def walk(state, batch, rng, trajectory=False):
        start_rng, chain_rng = jax.random.split(rng)
        keys = example_keys(start_rng, batch)
        x = uniform(keys, shape) if start == 'noise' else entry(state, keys)
        weights = averaged(state)
        return langevin(
            lambda x: energy(weights, x), x, example_keys(chain_rng, batch), steps=sample_steps, **chains,
            trajectory=trajectory,
        )  # fmt: skip

    def sample(state, frozen, batch, rng):
        return jnp.clip(walk(state, batch, rng)[0], -1, 1)

    def trajectory(state, frozen, batch, rng):
        return {'x': walk(state, batch, rng, trajectory=True)[1]}

    def evaluate(state, frozen, batch, rng):
        keys = [example_keys(one, batch) for one in jax.random.split(rng, 3)]
        weights = averaged(state)
        f = logits(weights, batch['image'])
        own = energy_of(f)
        others = {
            'noise': uniform(keys[0], shape),
            'shuffled': shuffled(keys[1], batch['image']),
            'chains': entry(state, keys[2]),
        }
        found = {name: energy(weights, x) for name, x in others.items()}
        results = {'energy': own, **{f'energy/{name}': e for name, e in found.items()}}
        for name in ('noise', 'shuffled'):
            results[f'below/{name}'] = (own < found[name]).astype(jnp.float32)
        if joint and 'label' in batch:
            results['cross_entropy'], results['accuracy'] = score(f, batch['label'])
        return results

    def classify(state, frozen, batch, rng):
        """Logits of the classes, float32 [n, classes]."""
        if 'sigma' in batch:
            raise UserError('this classifier never saw such noise: guidance needs the run of a noisy_classifier')
        return logits(averaged(state), batch['image'])

    return Family(
        init,
        update,
        sample,
        evaluate,
        classify=classify if joint else None,
        trajectory=trajectory,
        divisor=divisor,
        free=('sample_steps', 'start'),
    )
