"""A description of a config without computing: parameters, bytes, batch and FLOPs of an update.

Everything comes from abstract evaluation: a model of any size is described on a small machine,
and no data are read.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

from jaxgen import prepare, sample
from jaxgen.contract import untrained
from jaxgen.data import views


def count(tree) -> int:
    """The number of values in a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def size(tree) -> int:
    """The number of bytes of a tree."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def shape(variable) -> tuple[int, ...]:
    """The shape of a jaxpr's variable."""
    return variable.aval.shape


@functools.lru_cache(maxsize=4096)
def taps(size: int, out: int, window: int, stride: int, before: int, dilation: int, spread: int) -> int:
    """How often the taps of a window meet an element of the input along one axis, over all positions of the output:
    padding, and zeros put in by dilation, are no work.

    Args:
      size, out: of the input and the output; window: taps.
      before: padding before the first element; dilation: of the input; spread: of the window.
    """
    place = stride * np.arange(out)[:, None] + spread * np.arange(window)[None] - before
    return int(((place >= 0) & (place <= dilation * (size - 1)) & (place % dilation == 0)).sum())


def convolution_flops(eqn) -> int:
    """Those of one equation, by the taps that meet an element of the input."""
    p, (x, kernel), out = eqn.params, map(shape, eqn.invars), shape(eqn.outvars[0])
    where = p['dimension_numbers']
    axes = zip(
        (x[d] for d in where.lhs_spec[2:]),
        (out[d] for d in where.out_spec[2:]),
        (kernel[d] for d in where.rhs_spec[2:]),
        p['window_strides'],
        (before for before, _ in p['padding']),
        p['lhs_dilation'],
        p['rhs_dilation'],
        strict=True,
    )
    batch, features = (out[d] for d in where.out_spec[:2])
    return 2 * batch * features * kernel[where.rhs_spec[1]] * math.prod(taps(*axis) for axis in axes)


def repetitions(eqn) -> int:
    """How often the jaxprs of an equation run: a scan's, a kernel's for each element of its grid, and what is mapped
    over devices on each."""
    if eqn.primitive.name == 'pallas_call':
        return math.prod(n for n in eqn.params['grid_mapping'].grid if isinstance(n, int))
    if eqn.primitive.name == 'shard_map':
        sizes = eqn.params['mesh'].shape
        return math.prod(sizes[axis] for axis in eqn.params.get('manual_axes', sizes))
    return eqn.params['length'] if eqn.primitive.name == 'scan' else 1


def flops(jaxpr: core.Jaxpr, within: str = '', platform: str = '') -> int:
    """Multiplications and additions of the matrix products and convolutions of a jaxpr, two per pair.

    A scan's body counts as often as it runs (XLA's own cost analysis counts it once); a while
    loop's body, whose trips are not known, once; of a cond's branches the dearest, of a choice by platform that
    platform's. Equations whose results nobody reads are left out, as XLA leaves them out: a gradient's jaxpr holds
    forward computations once more that only `jax.vjp` in a custom rule needs.

    Args:
      within: a primitive; only what it holds counts, 'pallas_call' for kernels.
      platform: cpu, tpu, cuda or rocm; that of this machine by default.
    """
    total = 0
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    for eqn in live.eqns:
        name = eqn.primitive.name
        if name == 'dot_general':
            (contract, _), _ = eqn.params['dimension_numbers']
            k = math.prod(shape(eqn.invars[0])[d] for d in contract)
            total += 0 if within else 2 * k * math.prod(shape(eqn.outvars[0]))
        elif name == 'conv_general_dilated':
            total += 0 if within else convolution_flops(eqn)
        else:
            inside = '' if name == within else within
            inner = [flops(j, inside, platform) for j in core.jaxprs_in_params(eqn.params)]
            if name != 'cond':
                total += sum(inner) * repetitions(eqn)
            elif platforms := eqn.params.get('branches_platforms'):
                total += inner[branch_of(platforms, platform)]
            else:
                total += max(inner, default=0)
    return total


def branch_of(platforms: tuple, platform: str) -> int:
    """Which branch of a choice by platform is taken; each has the names of its platforms, or None for all others."""
    backend = platform or jax.default_backend()
    names = {'cuda', 'rocm'} if backend == 'gpu' else {backend}
    return next(i for i, listed in enumerate(platforms) if listed is None or names & set(listed))


def shapes_of(features: dict, n: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of n examples."""
    return {name: jax.ShapeDtypeStruct((n, *f.shape), f.dtype) for name, f in features.items()}


def update_flops(assembled, batch: dict) -> int:
    """FLOPs of an update on a batch, given as shapes."""
    key = jax.eval_shape(lambda: jax.random.key(0))

    def update(state, frozen, batch, key):
        return assembled.family.update(state, frozen, sample.to_inside(batch), key)

    return flops(jax.make_jaxpr(update)(assembled.abstract, assembled.frozen, batch, key).jaxpr)


def describe(config, assembled) -> dict:
    """One JSON object: family, parameters by network, bytes, batch, FLOPs of an update; where frozen stages can compute
    once what they make of an image, see prepare.py, those of an update after that, and of one image."""
    state, family = assembled.abstract, assembled.family
    batch = shapes_of(assembled.features, config.data.batch)
    trained = family.update is not untrained
    parameters = {name: count(weights) for name, weights in state.params.items()}
    about = {
        'family': config.family,
        'parameters': {**parameters, 'total': sum(parameters.values())},
        'frozen_parameters': {name: count(stage) for name, stage in assembled.frozen.items()},
        'state_bytes': size(state),
        'batch': {k: [list(v.shape), jnp.dtype(v.dtype).name] for k, v in batch.items()},
        **({'update_flops': update_flops(assembled, batch), 'steps': config.train.steps} if trained else {}),
        'conditions': list(family.conditions),
    }
    made = prepare.batch_features(assembled)
    if made.keys() == assembled.features.keys():
        return about
    one = jax.make_jaxpr(prepare.function(assembled))(assembled.frozen, shapes_of(assembled.features, 1))
    own = shapes_of({name: f for name, f in made.items() if name not in batch}, 1)
    return about | {
        'prepared': {
            'features': {k: [list(v.shape[1:]), jnp.dtype(v.dtype).name] for k, v in own.items()},
            'bytes_per_image': size(own),
            'views': views.count(config.data),
            'flops_per_image': flops(one.jaxpr),
            'update_flops': update_flops(assembled, shapes_of(made, config.data.batch)),
        }
    }
