"""What sharding.py promises of programs; where arrays lie is held by the contract's test on eight devices."""

from __future__ import annotations

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import config as configs
from jaxgen import functions, sample, sharding
from jaxgen.assembly import assemble
from jaxgen.errors import UserError
from jaxgen.evaluation import held_out
from jaxgen.train import make_call


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
    assert sharding.jit(lambda x: x + 1, deterministic=False)(1) == 2 and given.pop() == {}
    with pytest.raises(jax.errors.JaxRuntimeError, match='No such'):
        sharding.jit(lambda x: x + 1, compiler_options={'xla_gpu_deterministic_opts': True})(1)


@dataclasses.dataclass(frozen=True)
class Device:
    """A device that is not there."""

    id: int
    process_index: int
    slice_index: int | None
    platform: str = 'gpu'
    device_kind: str = 'none'


def cluster(slices: int, hosts: int, each: int) -> list[Device]:
    """Devices of `slices` slices of `hosts` hosts with `each` devices, in no order."""
    found = [
        Device((s * hosts + h) * each + i, s * hosts + h, s if slices > 1 else None)
        for s in range(slices) for h in range(hosts) for i in range(each)
    ]  # fmt: skip
    random.Random(0).shuffle(found)
    return found


@pytest.mark.parametrize('slices, hosts, each, fsdp', [
    (1, 1, 8, 1), (1, 2, 4, 2), (1, 4, 2, 4), (2, 1, 4, 4), (2, 2, 4, 8), (4, 2, 2, 2), (2, 4, 4, 1), (3, 1, 4, 2),
])  # fmt: skip
def test_weights_are_cut_within_a_slice_and_hosts_have_blocks(slices, hosts, each, fsdp):
    devices = cluster(slices, hosts, each)
    grid = sharding.arranged(devices, fsdp)
    assert grid.shape == (len(devices) // fsdp, fsdp) and set(grid.flat) == set(devices)
    for row in grid:
        assert len({device.slice_index for device in row}) == 1, 'one copy of the weights lies on two slices'
    blocks = np.array([device.process_index for device in grid.flat]).reshape(slices * hosts, each)
    assert (blocks == np.arange(slices * hosts)[:, None]).all(), 'a host has no block of the batch of its own'


@pytest.mark.parametrize('slices, each, fsdp', [(2, 4, 8), (2, 6, 4), (1, 6, 4)])
def test_weights_that_do_not_fit_a_slice_are_refused(slices, each, fsdp):
    with pytest.raises(UserError, match=f'fsdp = {fsdp} must divide the number of devices'):
        sharding.arranged(cluster(slices, 1, each), fsdp)


def test_slices_of_several_sizes_are_refused():
    with pytest.raises(UserError, match='of each slice, all equal: 4, 2'):
        sharding.arranged([Device(i, 0, int(i > 3)) for i in range(6)], 2)


@pytest.mark.parametrize('deterministic', [True, False])
def test_programs_of_a_run_have_its_choice_of_kernels(deterministic, monkeypatch):
    """Updates, samples, held-out metrics and functions; a run of the other kind beside it has its own."""
    given = []
    monkeypatch.setattr(sharding, 'jit', lambda function, deterministic=True, **_: given.append(deterministic))
    changes = [f'--config.train.deterministic={deterministic}']
    config = configs.override(configs.load('configs/vae_digits.py:tiny'), changes)
    a = assemble(config)
    make_call(a, None, 1, 0)
    sample.requested.cache_clear()
    functions.requested.cache_clear()
    sample.program(a.family)
    functions.program(a.family, 'encode')
    held_out.program(a.family)
    held_out.encoder(a.family)
    sample.requested.cache_clear()
    functions.requested.cache_clear()
    held_out.program.cache_clear()
    held_out.encoder.cache_clear()
    assert given == [deterministic] * 5
