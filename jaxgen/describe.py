"""A description of a config without computing: parameters, bytes, batch and FLOPs of an update.

Everything comes from abstract evaluation: a model of any size is described on a small machine,
and no data are read.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxgen import sample


def count(tree) -> int:
    """The number of values in a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def size(tree) -> int:
    """The number of bytes of a tree."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def shape(variable) -> tuple[int, ...]:
    """The shape of a jaxpr's variable."""
    return variable.aval.shape


def flops(jaxpr: core.Jaxpr) -> int:
    """Multiplications and additions of the matrix products and convolutions of a jaxpr, two per pair.

    A scan's body counts as often as it runs (XLA's own cost analysis counts it once); a while
    loop's body, whose trips are not known, once; of a cond's branches the dearest.
    """
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == 'dot_general':
            (contract, _), _ = eqn.params['dimension_numbers']
            k = math.prod(shape(eqn.invars[0])[d] for d in contract)
            total += 2 * k * math.prod(shape(eqn.outvars[0]))
        elif name == 'conv_general_dilated':
            kernel, out = shape(eqn.invars[1]), shape(eqn.outvars[0])
            features = kernel[eqn.params['dimension_numbers'].rhs_spec[0]]
            # Taps that fall on zeros put in by dilation are no work; padding's are counted.
            holes = math.prod(eqn.params['lhs_dilation'])
            total += 2 * math.prod(out) * math.prod(kernel) // features // holes
        else:
            inner = [flops(j) for j in core.jaxprs_in_params(eqn.params)]
            if name == 'cond':
                total += max(inner, default=0)
            else:
                total += sum(inner) * (eqn.params['length'] if name == 'scan' else 1)
    return total


def describe(config, assembled) -> dict:
    """One JSON object: family, parameters by network, bytes, batch, FLOPs."""
    state, family = assembled.abstract, assembled.family
    batch = {
        k: jax.ShapeDtypeStruct((config.data.batch, *v.shape), v.dtype) for k, v in assembled.spec.features.items()
    }
    key = jax.eval_shape(lambda: jax.random.key(0))

    def update(state, frozen, batch, key):
        return family.update(state, frozen, sample.to_inside(batch), key)

    traced = jax.make_jaxpr(update)(state, assembled.frozen, batch, key)
    parameters = {name: count(weights) for name, weights in state.params.items()}
    return {
        'family': config.family,
        'parameters': {**parameters, 'total': sum(parameters.values())},
        'frozen_parameters': {name: count(stage) for name, stage in assembled.frozen.items()},
        'state_bytes': size(state),
        'batch': {k: [list(v.shape), jnp.dtype(v.dtype).name] for k, v in batch.items()},
        'update_flops': flops(traced.jaxpr),
        'steps': config.train.steps,
        'conditions': list(family.conditions),
    }
