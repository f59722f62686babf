"""Keys: named streams, and that no family draws twice from one key.

A family's programs are traced, and the part of them that knows its keys is computed: what is done to keys and to the
integers that they are folded with, and nothing that depends on weights or images. So every key is seen by its value,
and two ways to come to one key are seen too.
"""

from __future__ import annotations

import collections
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from embedded import DISTINCT
from jax.extend.core import Literal
from support import assemble, first_batch, tiny

from jaxgen import config as configs
from jaxgen import contract, randomness, sample, sharding
from jaxgen.evaluation import held_out
from jaxgen.families import diffusion
from jaxgen.optim import make_optim
from jaxgen.train import make_call

UNKNOWN = object()
LARGEST = 4096  # numbers of an array that is computed
TURNS = 4  # of a loop that are followed, where it has more


def is_key(x) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def words(keys) -> list[tuple[int, ...]]:
    """Every key of an array of keys, as numbers."""
    data = np.asarray(jax.random.key_data(keys))
    return [tuple(int(word) for word in row) for row in data.reshape(-1, data.shape[-1])]


def traced(function, *args):
    """The jaxpr of function(*args), and its arguments in a row: UNKNOWN where there is a shape alone."""
    flat, tree = jax.tree.flatten(args)
    shapes = [a if isinstance(a, jax.ShapeDtypeStruct) else jax.typeof(a) for a in flat]
    jaxpr = jax.make_jaxpr(lambda *flat: function(*jax.tree.unflatten(tree, flat)))(*shapes)
    return jaxpr, [UNKNOWN if isinstance(a, jax.ShapeDtypeStruct) else a for a in flat]


class Recorder:
    """What was done with keys: `drawn`, {key: places that drew from it}; `derived`, the same of split and fold_in."""

    def __init__(self):
        self.drawn, self.derived = collections.defaultdict(list), collections.defaultdict(list)

    def program(self, name: str, function, *args) -> None:
        """Follows function(*args), of which arrays of shapes alone are unknown."""
        self.follow(name, *traced(function, *args))

    def follow(self, name: str, jaxpr, known) -> None:
        self.run(name, jaxpr.jaxpr, jaxpr.consts, known)

    def run(self, name: str, jaxpr, consts, args) -> list:
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        for eqn in jaxpr.eqns:
            given = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
            out = self.equation(name, eqn, given)
            env.update(zip(eqn.outvars, out, strict=True))
        return [v.val if isinstance(v, Literal) else env[v] for v in jaxpr.outvars]

    def equation(self, name: str, eqn, given) -> list:
        kind, params = eqn.primitive.name, eqn.params
        # What stands in a function that was jitted before may know no line of ours: then the call's stands for it.
        frames = [f for f in eqn.source_info.traceback.frames if f'{os.sep}jaxgen{os.sep}' in f.file_name]
        if frames:
            lines = (f'{os.path.basename(f.file_name)}:{f.line_num}' for f in frames[:3])
            name = f'{name.partition(" at ")[0]} at {" < ".join(lines)}'
        unknown = [UNKNOWN] * len(eqn.outvars)
        inner = params.get('jaxpr', params.get('call_jaxpr', params.get('fun_jaxpr')))
        if kind == 'scan':
            return self.scan(name, eqn, given)
        if kind == 'while':
            body = params['body_jaxpr']
            self.run(name, body.jaxpr, body.consts, given[params['cond_nconsts'] :])
            return unknown
        if kind == 'cond':
            outs = [self.run(name, b.jaxpr, b.consts, given[1:]) for b in params['branches']]
            return outs[int(given[0])] if given[0] is not UNKNOWN else unknown
        if inner is not None:
            closed = hasattr(inner, 'consts')
            body, consts = (inner.jaxpr, inner.consts) if closed else (inner, ())
            return self.run(name, body, consts, given)
        if kind == 'sharding_constraint':
            return given
        if kind in ('random_bits', 'random_split', 'random_fold_in'):
            assert given[0] is not UNKNOWN, f'{name}: {kind} of a key that is not known'
            if kind == 'random_fold_in':
                assert given[1] is not UNKNOWN, f'{name}: folded with what is not known'
            for key in words(given[0]):
                (self.drawn if kind == 'random_bits' else self.derived)[key].append(name)
            if kind == 'random_bits':
                return unknown
        small = all(math.prod(v.aval.shape) <= LARGEST for v in eqn.outvars)
        if any(g is UNKNOWN for g in given) or not small:
            return unknown
        out = eqn.primitive.bind(*given, **params)
        return list(out) if eqn.primitive.multiple_results else [out]

    def scan(self, name: str, eqn, given) -> list:
        p = eqn.params
        body, consts, carried = p['jaxpr'], p['num_consts'], p['num_carry']
        fixed, carry, xs = given[:consts], given[consts : consts + carried], given[consts + carried :]
        ys = []
        for i in range(p['length']):
            if i >= TURNS and not any(x is not UNKNOWN and is_key(x) for x in xs):
                carry, ys = [UNKNOWN] * carried, []
                break
            at = -1 - i if p['reverse'] else i
            out = self.run(name, body.jaxpr, body.consts, [*fixed, *carry, *(x if x is UNKNOWN else x[at] for x in xs)])
            carry = out[:carried]
            ys.append(out[carried:])
        stacked = [UNKNOWN] * (len(eqn.outvars) - carried)
        if len(ys) == p['length'] and ys:
            for i, column in enumerate(zip(*ys, strict=True)):
                if not any(y is UNKNOWN for y in column):
                    stacked[i] = jnp.stack(column[::-1] if p['reverse'] else column)
        return [*carry, *stacked]

    def twice(self) -> dict:
        """{key: places} of keys that were drawn from twice, or drawn from and derived from."""
        return {
            k: places + self.derived.get(k, [])
            for k, places in self.drawn.items()
            if len(places) > 1 or k in self.derived
        }


def record(config) -> Recorder:
    """All programs of a run with one seed: the first weights, two updates, sampling and evaluation."""
    a = assemble(config)
    family, seed, recorder = a.family, 0, Recorder()
    batch = jax.eval_shape(lambda: first_batch(config))
    state, frozen = a.abstract, jax.eval_shape(lambda x: x, a.frozen)
    n, key = batch['image'].shape[0], jax.random.key(seed)
    recorder.program('init', family.init, randomness.stream(key, 'init'), batch, frozen)
    call = make_call(a, sharding.over_weights(a.mesh, state), 1, seed)
    raw = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), batch)
    jaxpr, known = traced(call, state.replace(step=jnp.int32(0)), frozen, raw)
    for step in range(2):
        recorder.follow(f'update {step}', jaxpr, [jnp.int32(step), *known[1:]])  # State's first field
    numbers = {'index': jnp.arange(n, dtype=jnp.int32)}
    if family.sample is not None:
        given = {k: batch[k] for k in contract.condition_names(family, batch)} | numbers
        recorder.program(
            'sample', lambda *x: sample.program(family).call(*x, sample.settings_of(family)), state, frozen, given, seed
        )
    recorder.program('evaluate', lambda *x: held_out.program(family)(*x), state, frozen, batch | numbers, seed)
    return recorder


# Where the same noise is wanted twice. Consistency models: the network and its target drop the same (Song et al. 2023,
# appendix C), and both stand in the loss.
SHARED = {'consistency': ('update', 2)}


def check(config) -> None:
    recorder = record(config)
    assert recorder.drawn
    program, times = SHARED.get(config.family, ('', 1))
    places = {
        tuple(sorted(set(p))) for p in recorder.twice().values() if len(p) > times or not p[0].startswith(program)
    }
    assert not places, '\n'.join(map(str, sorted(places)))


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(DISTINCT.values()))
def test_no_key_is_used_twice(name):
    """In the first weights, two updates, sampling and evaluation, of one seed."""
    check(tiny(name))


# Where keys meet: augmentation, noise beside dropout, scales of codes, codes that start anew.
MEETINGS = {
    'edm_digits': dict(model=dict(training=dict(augmentation=0.5))),
    'pix2pix_shapes': dict(model=dict(noise=0.5)),
    'var_vqvae_digits': {},
    'vqvae_digits': dict(model=dict(restart=1.0)),
}


@pytest.mark.parametrize('name', MEETINGS)
def test_no_key_is_used_twice_where_keys_meet(name):
    check(tiny(name, **MEETINGS[name]))


def test_a_stage_that_draws_has_keys_of_its_own():
    """A first stage whose `encode` and `decode` draw, as the posterior's of a KL autoencoder may."""
    image, latents = (8, 8, 1), (2, 2, 3)

    def stage():
        def encode(state, frozen, batch, rng):
            first, second = jax.random.split(rng)
            return jax.random.normal(first, (len(batch['image']), *latents)) + 0 * jax.random.normal(second)

        def decode(state, frozen, batch, z, rng):
            first, second = jax.random.split(rng)
            return jax.random.normal(first, (len(z), *image)) + 0 * jax.random.normal(second)

        return contract.Family(None, None, None, None, encode, decode, image=image, latents=contract.Latents(latents))

    optim = make_optim(10, **configs.DEFAULTS['optim'])
    family = diffusion.build(
        contract.Context(image, 0, optim, {'first': stage()}),
        network=dict(channels=8, multipliers=(1,), blocks=1, attention=()), process=dict(timesteps=20),
        sampler=dict(steps=3, clip=False),
    )  # fmt: skip
    batch, frozen = {'image': jax.ShapeDtypeStruct((2, *image), jnp.float32)}, {'first': ({}, {})}
    state = jax.eval_shape(family.init, jax.random.key(0), batch, frozen)
    numbers, recorder = {'index': jnp.arange(2)}, Recorder()
    recorder.program('update', family.update, state, frozen, batch, jax.random.key(1))
    recorder.program('sample', family.sample, state, frozen, numbers, jax.random.key(2))
    recorder.program('evaluate', family.evaluate, state, frozen, batch | numbers, jax.random.key(3))
    assert {name.partition(' ')[0] for places in recorder.drawn.values() for name in places} == {
        'update', 'sample', 'evaluate',
    }  # fmt: skip
    assert not recorder.twice(), recorder.twice()


def test_the_recorder_sees_what_coincides():
    """split(k, n)[i] and fold_in(k, i) are one key, whichever loop or function they are made in."""

    def both(key):
        return jax.random.normal(jax.random.split(key, 3)[1]) + jax.random.normal(jax.random.fold_in(key, 1))

    def in_a_loop(key):
        def one(total, i):
            return total + jax.random.normal(jax.random.fold_in(key, i)), None

        start = jax.random.uniform(jax.random.split(key)[1])
        return jax.lax.scan(one, start, jnp.arange(3))[0]

    def drawn_and_split(key):
        return jax.random.normal(key) + jax.random.normal(jax.random.split(key)[0])

    def by_example(key):
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(4))
        return jax.vmap(jax.random.normal)(keys).sum() + jax.random.normal(jax.random.split(key, 9)[3])

    def apart(key):
        first, second = randomness.streams(key, 'first', 'second')
        return both(first) + jax.random.normal(jax.random.split(second)[0])

    for function, count in ((both, 1), (in_a_loop, 1), (drawn_and_split, 1), (by_example, 1), (apart, 1)):
        recorder = Recorder()
        recorder.program('program', jax.jit(function), jax.random.key(3))
        assert len(recorder.twice()) == count, function.__name__
    recorder = Recorder()
    recorder.program('program', lambda key: sum(map(jax.random.normal, jax.random.split(key, 5))), jax.random.key(3))
    assert not recorder.twice() and len(recorder.drawn) == 5


def test_streams_are_apart_from_indices():
    """A name's key is none that split or fold_in gives for an index, and is the same in every version."""
    key = jax.random.key(0)
    named = randomness.streams(key, 'sample', 'update', 'init', 'evaluate')
    by_index = {*words(jax.random.split(key, 1000)), *(words(jax.random.fold_in(key, i))[0] for i in range(50))}
    assert len({words(k)[0] for k in named}) == 4 and not {words(k)[0] for k in named} & by_index
    assert words(jax.random.fold_in(key, 7)) == words(jax.random.split(key, 1000)[7]), 'why names are needed'
    assert randomness.stream_id('123456789') == 0xCBF43926  # the check value of CRC-32
    with pytest.raises(ValueError, match='two of the streams'):
        randomness.streams(key, 'sample', 'update', 'sample')
