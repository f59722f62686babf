"""check_family: passes what keeps the contract, and names what does not, each rule broken on purpose."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import python_on

from jaxgen import options
from jaxgen.contract import Aux, Context, Family, Latents, advance, gradient_step, make_update, new_state
from jaxgen.randomness import example_keys, normal
from jaxgen.testing import ContractError, check_family

counter = np.zeros(1)


@options.checked
def build(context: Context, *, broken: str = '') -> Family:
    """An autoencoder of pixels: x -> a x + b, of which one rule of the contract may be broken.

    Args:
      broken: which one.
    """
    image, drawn = context.image, np.random.default_rng().normal()

    def network(params, x):
        return params['a'] * x + params['b']

    def loss(params, state, frozen, batch, rng):
        x, net = batch['image'], params['net']
        if broken == 'NumPy':
            return np.asarray(x).mean() + 0 * net['a'], Aux({'loss': x.mean()})
        value = jnp.square(network(net, x) - x).mean()
        if broken == 'branch' and value > 0:
            value = value * 2
        if broken == 'callback':
            value += jax.pure_callback(lambda v: v, jax.ShapeDtypeStruct((), jnp.float32), jax.lax.stop_gradient(value))
        if broken == 'print':
            jax.debug.print('{}', value)
        if broken == 'scatter':
            value += jnp.square(params['net']['table'][batch['label']]).mean()
        if broken == 'Python state':
            counter[0] += 1
            value *= counter[0]
        if broken == 'NumPy in build':
            value *= 1 + drawn
        if broken == 'sum':
            value = jnp.square(network(net, x) - x).sum() / 64
        if broken == 'nan':
            value = jnp.log(-1 - jnp.square(value))
        log = jnp.square(x).mean((1, 2, 3)) if broken == 'log' else value
        return value, Aux({'loss': log})

    def init(rng, batch, frozen):
        if broken == 'weights':
            weights = {'a': jnp.ones((), jnp.bfloat16), 'b': jnp.zeros(image)}
        else:
            weights = {'a': jnp.ones(()), 'b': jnp.zeros(image)}
        if broken == 'scatter':
            weights['table'] = jnp.ones((3, 2))
        weights['b'] += 0.1
        return new_state({'net': weights} | ({'idle': {'w': jnp.ones(3)}} if broken == 'idle' else {}), context.optim)

    def sample(state, frozen, batch, rng):
        keys = jax.random.split(rng, len(batch['index'])) if broken == 'number' else example_keys(rng, batch)
        if broken == 'one sample':
            keys = jax.vmap(lambda i: jax.random.fold_in(rng, 0 * i))(batch['index'])
        x = network(state.ema['net'], normal(keys, image))
        x = x.mean(0) + 0.1 * x if broken == 'beside' else x
        x = x if broken == 'range' else jnp.clip(x, -1, 1)
        return x.astype(jnp.bfloat16) if broken == 'type' else x[:, :4] if broken == 'shape' else x

    def evaluate(state, frozen, batch, rng):
        error = jnp.square(network(state.ema['net'], batch['image']) - batch['image']).mean((1, 2, 3))
        if broken == 'metric':
            return {'error': error.mean()}
        return {'error': error + (jnp.arange(len(error)) if broken == 'metric by place' else 0)}

    def encode(state, frozen, batch, rng):
        z = network(state.ema['net'], batch['image']).reshape(len(batch['image']), -1)
        return z[:, :3] if broken == 'latents' else z

    def decode(state, frozen, batch, z, rng):
        return z if broken == 'decode' else z.reshape(len(z), *image)

    update = make_update(loss, context.optim, 'net')
    if broken == 'no pair':
        return Family(init, lambda *_: None, sample, evaluate)
    if broken == 'no step':
        step = gradient_step(loss, context.optim, 'net')

        def update(state, frozen, batch, rng):
            state, aux = step(state, frozen, batch, rng)
            return state, aux.logs

    if broken == 'tree':

        def update(state, frozen, batch, rng):
            state, aux = gradient_step(loss, context.optim, 'net')(state, frozen, batch, rng)
            return advance(state, context.optim).replace(extra={'new': jnp.ones(3)}), aux.logs

    size = int(np.prod(image))
    return Family(init, update, sample, evaluate, encode, decode, latents=Latents(shape=(size,)))


def test_what_keeps_the_contract_passes():
    check_family(build, image=(4, 4, 1), classes=3)


BROKEN = {
    'NumPy': r'update cannot be compiled: NumPy gets an array of the program: use jax\.numpy',
    'branch': r'update cannot be compiled: Python branches on the value of an array.*jnp\.where',
    'callback': r'update has the primitive pure_callback \(.*testing_test\.py:\d+\): it calls Python on the host',
    'print': r'update has the primitive debug_(print|callback) \(.*testing_test\.py:\d+\): it prints',
    'scatter': r'update has the primitive scatter-add.*one_hot',
    'Python state': 'the same update gave two results: it must depend on its arguments alone',
    'NumPy in build': 'resumed updates are others: build must depend on its arguments alone',
    'sum': r'with optim\.accumulate = 2 an update is another: losses are means',
    'nan': "the log 'loss' is nan in update 0",
    'log': "logs are scalars; 'loss' is ",
    'weights': r"weights are float32 always; .*'a'\] is bfloat16",
    'idle': "params of 'idle' did not change: pass its name to make_update",
    'no pair': r'update must return \(state, \{name: scalar\}\); it returns a NoneType',
    'no step': '2 updates count 0 steps: end an update with advance',
    'tree': r"update changes shape, dtype or presence of State.*extra\['new'\]",
    'number': 'a sample must depend on its number alone',
    'one sample': 'all samples are one sample',
    'beside': 'a sample must depend on its number alone, not on its place: .* nor on n',
    'range': r'samples lie in \[-1, 1\]; these go to',
    'type': 'samples are float32; they are bfloat16',
    'shape': r'sample must give \[4, 8, 8, 1\]; it gives \[4, 4, 8, 1\]',
    'metric': r"metrics are \[n\]; 'error' is \[\]",
    'metric by place': "the metric 'error' of an example must depend on its number alone",
    'latents': r'encode gives \[8, 3\], and Family.latents says \[8, 64\]',
    'decode': r'decode must give \[8, 8, 8, 1\]; it gives \[8, 64\]',
}


# What is checked late, when several programs have been compiled.
LATE = ('sum', 'one sample', 'beside', 'range', 'type', 'shape', 'metric', 'metric by place', 'latents', 'decode')


@pytest.mark.parametrize(
    'broken', [pytest.param(name, marks=pytest.mark.slow) if name in LATE else name for name in BROKEN]
)
def test_what_breaks_a_rule_is_named(broken):
    with warnings.catch_warnings(), pytest.raises(ContractError, match=BROKEN[broken]) as e:
        warnings.simplefilter('ignore')
        check_family(build, classes=3, broken=broken)
    assert '\n' not in str(e.value)


def test_what_is_given_must_fit():
    def conditional(context):
        return build(context)._replace(conditions=('mask',), divisor=3)

    for changes, message in [
        ({}, 'conditioned on mask: give them in batch='),
        ({'batch': {'mask': np.zeros((3, 8, 8, 1))}}, "batch\\['mask'\\] must have 8 examples; it has 3"),
        ({'batch': {'mask': np.zeros((8, 8, 8, 1))}}, 'multiples of Family.divisor = 3'),
        ({'batch': {'mask': 3}}, "batch\\['mask'\\] must have 8 examples; it has 0"),
        ({'batch': 3}, 'batch must be'),
        ({'image': (8, 8)}, r'image must be \(height, width, channels\); it is \(8, 8\)'),
        ({'image': '8x8'}, 'image must be'),
        ({'n': 3}, 'n must be an even number'),
        ({'classes': -1}, 'classes must be 0 or more'),
    ]:
        with pytest.raises(ContractError, match=message):
            check_family(conditional, **changes)
    with pytest.raises(ContractError, match='build must return a Family; it is a NoneType'):
        check_family(lambda context: None)
    with pytest.raises(ContractError, match='build must be a function, or the name of a family; it is None'):
        check_family(None)


def on_devices() -> None:
    """Runs in a process of 4 devices."""
    assert jax.device_count() == 4
    check_family(build, image=(4, 4, 1))
    with pytest.raises(ContractError, match='over several devices an update is another'):

        def by_devices(context):
            family = build(context)

            def update(state, frozen, batch, rng):
                state, logs = family.update(state, frozen, batch, rng)
                size = max(jax.sharding.get_abstract_mesh().size, 1)
                return state.replace(params=jax.tree.map(lambda x: x * size, state.params)), logs

            return family._replace(update=update)

        check_family(by_devices, image=(4, 4, 1))


@pytest.mark.slow
def test_on_several_devices():
    code = 'import sys; sys.path.insert(0, "tests"); import testing_test; testing_test.on_devices()'
    done = python_on(4, code)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_a_family_of_jaxgen_by_its_name():
    check_family('vae', width=4, latent=2, levels=2)
