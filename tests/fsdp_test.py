"""Weights move and activations do not: of every family's update and sampler, by the program that XLA makes for eight
devices; and what fsdp.py makes of functions, against the functions themselves."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest
from embedded import DISTINCT, FAMILIES, IN_QUICK_PART
from support import assemble, python_on, tiny

from jaxgen import collectives, describe, fsdp, sample, sharding
from jaxgen.contract import condition_names
from jaxgen.train import make_call

# A prime of which no array of weights has a multiple: an array whose size has this factor is of the batch, and has
# been derived from examples.
PRIME = 29
# Families that compare the examples of a batch with each other, or keep images, and so send them:
EXCEPTIONS = {
    'attngan': 'every caption is compared with every image',
    'clip': 'every text is compared with every image',
    'cyclegan': 'the pool of translated images takes one after another',
    'ddgan': 'standard deviations of groups of examples',
    'ebm': 'the buffer of chains is on every device',
    'stargan2': 'targets are images of other examples',
    'stylegan2': 'standard deviations of groups of examples',
}
PARTS = 4


def in_a_process(function: str, *arguments: str, timeout: float = 560) -> str:
    """Standard output of a function of this file, run where there are 8 devices."""
    code = f'import sys; sys.path.insert(0, "tests"); import conftest, fsdp_test; fsdp_test.{function}(sys.argv[1:])'
    done = python_on(8, code, *arguments, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def shapes(tree, places):
    """Shapes, dtypes and places of arrays."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=s), tree, places)


def programs(name: str) -> dict[str, str]:
    """{function: text} of the compiled update and sampler of a tiny config, nothing of which is run."""
    mesh = sharding.make_mesh(PARTS)
    size = PRIME * math.lcm(mesh.size, tiny(name).data.batch)
    fields = {'buffer': size} if tiny(name).family == 'ebm' else {}
    config = tiny(name, mesh={'fsdp': PARTS}, data={'batch': size}, model=fields)
    a = assemble(config, mesh)
    places = sharding.over_weights(mesh, a.abstract)
    state, frozen = shapes(a.abstract, places), shapes(a.frozen, sharding.over_weights(mesh, a.frozen))
    for leaf in jax.tree.leaves((state.params, a.frozen)):
        assert math.prod(leaf.shape) % PRIME, f'{name}: weights {leaf.shape} cannot be told from the batch'
    features = dict(a.features)

    def batch(n: int, names, leading: int = 0) -> dict:
        dims, place = (1,) * leading, sharding.over_batch(mesh, leading)
        return {
            k: jax.ShapeDtypeStruct((*dims, n, *features[k].shape), features[k].dtype, sharding=place) for k in names
        }

    found = {'update': make_call(a, places, 1, 0).trace(state, frozen, batch(size, features, 1))}
    if a.family.sample is not None:
        n, settings = PRIME * mesh.size, sample.settings_of(a.family)
        index = {'index': jax.ShapeDtypeStruct((n,), 'int32', sharding=sharding.over_batch(mesh))}
        given = state.replace(params=None, opt=None), frozen, {**batch(n, condition_names(a.family, features)), **index}
        with sharding.use(mesh):
            found['sample'] = sample.program(a.family).call.trace(*given, 0, settings)
    return {function: traced.lower().compile().as_text() for function, traced in found.items()}


def audit(names: list[str]) -> None:
    """Prints a line for each program that sends activations, and fails where none of the exceptions says so."""
    sharding.SMALLEST_SHARDED = 64  # so that tiny weights are cut too
    wrong = []
    for name in names:
        for function, text in programs(name).items():
            sent = collectives.collectives(text, small=0)
            gathered = sum(one.bytes for one in sent if one.kind == 'all-gather' and one.shape.size % PRIME)
            assert gathered, f'{name}: no weights are gathered in {function}'
            activations = [one for one in sent if one.shape.size % PRIME == 0 and len(one.shape.dims) > 1]
            kinds = {(one.kind, one.shape.dims, one.op_name[-60:]) for one in activations}
            print(
                f'{name} {function}: {sum(one.bytes for one in activations)} bytes of activations, {gathered} gathered'
            )
            if kinds and (tiny(name).family not in EXCEPTIONS or function == 'sample'):
                wrong.append(f'{name} {function}: {sorted(kinds)[:5]}')
    assert not wrong, '\n'.join(wrong)


def test_activations_are_not_sent():
    in_a_process('audit', 'dit_digits')


@pytest.mark.slow
@pytest.mark.parametrize('part', range(4))
def test_activations_are_not_sent_in_any_family(part):
    in_a_process('audit', *sorted(set(FAMILIES.values()) | set(IN_QUICK_PART.values()))[part::4])


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=() if name == 'dit_digits' else pytest.mark.slow)
        for name in sorted({*DISTINCT.values()})
    ],
)
def test_products_are_computed_as_often_as_without_parts(name, monkeypatch):
    """Gathers are made once more in the backward pass; what a checkpoint keeps of a block is still kept."""
    monkeypatch.setattr(sharding, 'SMALLEST_SHARDED', 64)
    size = 4 * tiny(name).data.batch
    config = tiny(name, data={'batch': size}, model={'buffer': size} if tiny(name).family == 'ebm' else {})
    a = assemble(config)
    batch = describe.shapes_of(a.features, size)
    mesh = jax.sharding.AbstractMesh((1, PARTS), ('data', 'fsdp'))
    whole = describe.update_flops(a, batch)
    # Gradients of gradients pass the rule twice, and what two of a GAN's steps have in common is traced in both.
    more = {'attngan_shapes': 0.02, 'ddgan_digits': 0.06, 'stargan2_digits': 0.08, 'stylegan2_digits': 0.15}
    with jax.sharding.use_abstract_mesh(mesh):
        assert whole <= describe.update_flops(a, batch) <= (1 + more.get(name, 0)) * whole


# --- what is made of functions


def layers(weights, x):
    """A function with everything that weights pass through: a stack in a loop, casts, weight normalisation, a loop with
    a condition, branches, a checkpoint, a jitted call."""

    def block(x, w):
        return jnp.tanh(x @ (w / jnp.sqrt((w**2).sum(0, keepdims=True))).astype(x.dtype)), None

    x = jax.lax.scan(jax.checkpoint(block), x, weights['stack'])[0]
    x = jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.tanh(s[1] @ weights['square'])), (0, x))[1]
    x = jax.lax.cond(x.sum() > 1e9, lambda x: x, lambda x: x + weights['square'][0], x)
    return x @ jax.jit(lambda w: 2 * w)(weights['square']), weights['square'] - weights['stack'][0]


def differentiable(weights, x):
    """The same without the loop of unknown length."""

    def block(x, w):
        return jnp.tanh(x @ (w / jnp.sqrt((w**2).sum(0, keepdims=True)))), None

    x = jax.lax.scan(jax.checkpoint(block), x, weights['stack'])[0]
    for w in weights['list']:
        x = jnp.tanh(jax.lax.cond(w.sum() > 1e9, lambda x, w: x, lambda x, w: x @ w, x, w))
    return jnp.square(x).mean(), x


def compare(_) -> None:
    """Values and gradients are those of the functions alone; layouts are those of the weights; no program has all
    weights at once."""
    sharding.SMALLEST_SHARDED = 64
    mesh = sharding.make_mesh(PARTS)
    keys = iter(jax.random.split(jax.random.key(0), 30))
    side, depth = 256, 8
    weights = {
        'stack': jax.random.normal(next(keys), (depth, side, side)),
        'square': jax.random.normal(next(keys), (side, side)) / 16,
        'list': [jax.random.normal(next(keys), (side, side)) / 16 for _ in range(depth)],
    }
    x = jax.random.normal(next(keys), (16, side))
    placed = jax.device_put(weights, sharding.over_weights(mesh, weights)), sharding.put_batch(mesh, {'x': x})['x']

    def close(a, b):
        assert jax.tree.all(jax.tree.map(lambda a, b: jnp.allclose(a, b, rtol=1e-4, atol=1e-5), a, b))

    plain = jax.device_get((layers(weights, x), jax.grad(differentiable, has_aux=True)(weights, x)))
    with sharding.use(mesh):
        values = jax.jit(fsdp.gathering(layers))(*placed)
        gradient = jax.jit(jax.grad(fsdp.gathering(differentiable), has_aux=True))
        grads = gradient(*placed)
        compiled = gradient.lower(*placed).compile()
        stack = {**weights, 'list': []}
        stack_alone = gradient.lower({**placed[0], 'list': []}, placed[1]).compile()
    close(plain, jax.device_get((values, grads)))
    sent = collectives.collectives(compiled.as_text(), [w.shape for w in jax.tree.leaves(weights)], [PARTS], small=64)
    assert {one.carrier for one in sent} <= {'weights', 'small'}, collectives.totals(sent)
    sums = ('reduce-scatter', 'all-reduce')
    whole = weights['stack'].nbytes + sum(w.nbytes for w in weights['list'])
    # Forwards and backwards; the last matrix is there already when the backward pass begins.
    gathered = sum(one.bytes for one in sent if one.kind == 'all-gather' and one.carrier == 'weights')
    assert 2 * whole - weights['square'].nbytes <= gathered <= 2 * whole, (gathered, whole)
    # Gradients of products are summed in parts over the devices of one copy, and these parts over the copies; those of
    # weights that are normalised before their product, as the stack's, over all devices.
    summed = {kind: sum(one.bytes for one in sent if (one.kind, one.carrier) == (kind, 'weights')) for kind in sums}
    products = whole - weights['stack'].nbytes
    assert summed == {'reduce-scatter': products, 'all-reduce': products / PARTS + weights['stack'].nbytes}
    # The stack's gradients in parts, and a few whole matrices beside them.
    most = stack['stack'].nbytes / PARTS + 4 * weights['square'].nbytes
    assert stack_alone.memory_analysis().temp_size_in_bytes < most < stack['stack'].nbytes, (
        stack_alone.memory_analysis()
    )


def test_functions_are_the_same():
    in_a_process('compare')


def test_without_parts_nothing_is_changed():
    assert str(jax.make_jaxpr(fsdp.gathering(jnp.sin))(1.0)) == str(jax.make_jaxpr(jnp.sin)(1.0))
    with sharding.use(sharding.make_mesh(1)):
        assert str(jax.make_jaxpr(fsdp.gathering(jnp.sin))(1.0)) == str(jax.make_jaxpr(jnp.sin)(1.0))


def test_a_choice_by_platform_stays_one(monkeypatch):
    """No program holds the branch of another platform, whose kernels it could not compile."""

    def function(weights, x):
        return jax.lax.platform_dependent(weights, x, tpu=lambda w, x: jnp.sinh(x @ w), default=lambda w, x: x @ w)

    def gradient(weights, x):
        return jax.grad(lambda weights: fsdp.gathering(function)(weights, x).sum())(weights)

    monkeypatch.setattr(sharding, 'SMALLEST_SHARDED', 1)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1, PARTS), ('data', 'fsdp'))):
        traced = jax.jit(gradient).trace(jnp.ones((8, 8)), jnp.ones((8, 8)))
        platforms = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ('cpu', 'tpu')}
    assert 'cosh' in platforms['tpu'] and 'cosh' not in platforms['cpu']


def test_extra_is_whole():
    from jaxgen.contract import State

    shape = jnp.zeros((128, 64))
    state = State(shape[0, 0], {'a': shape}, {'a': shape}, {'a': shape}, {'buffer': shape})
    assert sharding.cut_axes(state, 4) == [None, 0, 0, 0, None]
    assert sharding.cut_axes({'one': (state, {})}, 4) == [None, 0, 0, 0, None]
    assert sharding.cut_axes({'ema': {'a': shape}, 'extra': {'buffer': shape}}, 4) == [0, None]


def penalised(_) -> None:
    """A network of every kind of layer and of parameters of its own, in a loss with a gradient penalty, in a loop of
    accumulation under a checkpoint: its gradient is that of the function alone, and lies as the weights do."""
    import flax.linen as nn
    import numpy as np

    from jaxgen.networks import layers as kinds

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, label):
            x = kinds.Conv(16)(x) + kinds.Embed(12, 16)(label)[:, None, None]
            x = kinds.Conv(32, stride=2)(nn.silu(kinds.GroupNorm(8)(x)))
            x = kinds.Norm('instance', 32)(x).reshape(len(x), -1, 32)
            x = nn.relu(kinds.Dense(24)(x + self.param('positions', nn.initializers.normal(1.0), (16, 32))))
            heads = self.param('heads', nn.initializers.normal(0.1), (24, 4, 6))
            return jnp.einsum('ntc,chd->nthd', x, heads).sum((1, 2)) @ heads.reshape(24, 24).T[:6, :8]

    sharding.SMALLEST_SHARDED = 16
    key, mesh, network = jax.random.key(0), sharding.make_mesh(PARTS), Network()
    batch = {'x': np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype('float32'), 'label': np.arange(16) % 12}
    weights = network.init(key, **batch)

    def loss(weights, batch):
        value, slope = jax.value_and_grad(lambda x: network.apply(weights, x, batch['label']).sum())(batch['x'])
        y = network.apply(weights, batch['x'] + jax.random.normal(key, batch['x'].shape), batch['label'])
        return jnp.square(y).mean() + jnp.square(slope).mean() + 1e-3 * value

    def twice(loss):
        def add(total, _):
            return jax.tree.map(jnp.add, total, jax.grad(jax.checkpoint(loss))(weights_there, batch_there)), None

        return lambda zero: jax.lax.scan(add, zero, length=2)[0]

    places = sharding.over_weights(mesh, weights)
    weights_there, batch_there = jax.device_put(weights, places), sharding.put_batch(mesh, batch)
    expected = jax.jit(jax.grad(loss))(weights, batch)
    with sharding.use(mesh):
        one = jax.jit(jax.grad(fsdp.gathering(loss)))(weights_there, batch_there)
        two = jax.jit(twice(fsdp.gathering(loss)))(jax.tree.map(jnp.zeros_like, weights_there))
    assert any('fsdp' in str(place.spec) for place in jax.tree.leaves(places))
    assert jax.tree.all(jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), one, places))
    scale = max(float(abs(x).max()) for x in jax.tree.leaves(expected))  # biases before a norm have rounding alone
    for a, b, c in zip(*map(jax.tree.leaves, (expected, one, two)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5 * scale)
        np.testing.assert_allclose(2 * a, c, rtol=2e-3, atol=2e-5 * scale)


@pytest.mark.slow
def test_gradients_of_gradients_in_loops():
    in_a_process('penalised')
