"""Conditions: arrays of another kind than their condition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxgen.diffusion import conditioning as conditions
from jaxgen.errors import UserError


@pytest.mark.parametrize(
    ('kind', 'dtype', 'shape'),
    [('class', 'float32', (2,)), ('embedding', 'int32', (2,)), ('tokens', 'int32', (2, 3)),
     ('image', 'float32', (2, 5)),
     ('words', 'float32', (2, 3)), ('mask', 'int32', (2,))],
)  # fmt: skip
def test_arrays_of_another_kind(kind, dtype, shape):
    one = conditions.Condition('c', 'vector', None, conditions.same, jnp.zeros_like, 0.0, kind=kind)
    with pytest.raises(UserError, match=r'config\.model\.conditioning\.c of kind'):
        conditions.init((one,), jax.random.key(0), {'c': jnp.zeros(shape, dtype)})
