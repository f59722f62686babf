"""What sharding.py promises of programs; where arrays lie is held by the contract's test on eight devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxgen import sharding


def maxima(x):
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (2,), (2,), 'VALID')


@pytest.mark.parametrize('function, expected', [
    (lambda x, i: x[i] * 2, False),
    (lambda x, i: jax.grad(lambda x: (x[i] ** 2).sum())(x), True),  # of a look-up
    (lambda x, i: jax.grad(lambda x: (x[:2] ** 2).sum())(x), False),
    (lambda x, i: x.at[i[0]].add(1.0), False),  # one place
    (lambda x, i: x.at[i].set(0.0, unique_indices=True), False),
    (lambda x, i: jax.grad(lambda x: maxima(x).sum())(x), True),
    (lambda x, i: jax.lax.scan(lambda x, _: (jax.jit(lambda x: x.at[i].add(1.0))(x), None), x, length=2)[0], True),
])  # fmt: skip
def test_writes_that_may_meet_are_found(function, expected):
    traced = jax.make_jaxpr(function)(jnp.zeros(6), jnp.arange(3))
    assert sharding.overlapping_writes(traced.jaxpr) == expected


def test_programs_for_gpus_give_the_same_bits_in_every_process(monkeypatch):
    """The option reaches XLA, which refuses those that it does not know, beside the caller's own; and not where writes
    may meet."""
    given, plain = [], jax.jit

    def jit(function, **options):
        program = plain(function, **options)

        class Program:
            trace = program.trace

            def __call__(self, *args):
                given.append(options)
                return program(*args)

        return Program()

    monkeypatch.setattr(jax, 'jit', jit)
    assert sharding.jit(lambda x: x + 1)(1) == 2
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    mine, fixed = {'xla_backend_optimization_level': 0}, {'xla_gpu_deterministic_ops': True}
    program = sharding.jit(lambda x: x + 1, compiler_options=mine)
    assert program(1) == 2 and program(2) == 3
    assert sharding.jit(lambda x, i: x.at[i].add(1.0))(jnp.zeros(2), jnp.zeros(3, int))[0] == 3
    assert given == [{}, *[{'compiler_options': fixed | mine}] * 2, {}]
    with pytest.raises(jax.errors.JaxRuntimeError, match='No such'):
        sharding.jit(lambda x: x + 1, compiler_options={'xla_gpu_deterministic_opts': True})(1)
