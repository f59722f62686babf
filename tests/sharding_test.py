"""What sharding.py promises of programs; where arrays lie is held by the contract's test on eight devices."""

from __future__ import annotations

import jax
import pytest

from jaxgen import sharding


def test_programs_for_gpus_give_the_same_bits_in_every_process(monkeypatch):
    """The option reaches XLA, which refuses those that it does not know, beside the caller's own."""
    given = []
    plain = jax.jit
    monkeypatch.setattr(jax, 'jit', lambda f, **options: given.append(options) or plain(f, **options))
    assert sharding.jit(lambda x: x + 1)(1) == 2
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    assert sharding.jit(lambda x: x + 1, compiler_options={'xla_backend_optimization_level': 0})(1) == 2
    fixed = {'xla_gpu_deterministic_ops': True}
    assert given == [{}, {'compiler_options': {**fixed, 'xla_backend_optimization_level': 0}}]
    with pytest.raises(jax.errors.JaxRuntimeError, match='No such'):
        sharding.jit(lambda x: x + 1, compiler_options={'xla_gpu_deterministic_opts': True})(1)
