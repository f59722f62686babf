"""Updates a second from images, which frozen stages encode in every update, and from what they made of them once.

    python benchmarks/prepared.py --out=benchmarks/results/prepared.json
    python benchmarks/prepared.py --configs=flow_shapes,maskgit_digits --seconds=5

Both programs of a config run in turns in one process, so that other work on the machine meets both; the ratios are
medians of those of the turns, by the clock, and by processor time, which other work changes little. Stages have first
weights, which are as fast as trained ones. `small` are a DiT-S/2 of 64 x 64 images in the latents of a KL autoencoder
of 8 times less sides, and a MaskGIT on the codes of VQGAN: what a published size is to its stage, at a size for two
cores; of shapes 100 are drawn. FLOPs are those of `--mode=describe`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time

import jax
import numpy as np

from jaxgen import assembly, data, describe, files, prepare, sharding
from jaxgen import config as configs
from jaxgen.data import builders
from jaxgen.evaluation import record
from jaxgen.train import make_call

CONFIGS = 'flow_shapes,maskgit_digits,transformer_digits,var_digits,small_dit,small_maskgit'
builders.SHAPES = {'train': 100, 'test': 50}  # drawing and encoding more of them takes minutes
SMALL_STAGE = {
    'family': 'vqgan',
    'data': {'source': 'shapes', 'size': 64, 'channels': 3, 'batch': 8},
    'model': {'channels': 32, 'perceptual': 0.0, 'adversarial': 0.0},
}
SMALL = {
    'small_dit': {
        'stage': {'regulariser': 'kl', 'multipliers': (1, 2, 4, 4), 'latent': 4},
        'family': 'diffusion',
        'model': {
            'network': {'name': 'dit', 'channels': 384, 'blocks': 12, 'heads': 6, 'patch': 2},
            'sampler': {'name': 'ddim', 'clip': False},
        },
    },
    'small_maskgit': {
        'stage': {'regulariser': 'vq', 'multipliers': (1, 2, 4, 4), 'latent': 16, 'vocabulary': 1024},
        'family': 'maskgit',
        'model': {'channels': 384, 'blocks': 12, 'heads': 6},
    },
}


def of_stage(fields: dict):
    """A function of the stages of a config for assembly.assemble: first weights by the config of the stage's name, or
    of these fields."""

    def stage(path: str, mesh, dtype: str = ''):
        config = small_stage(fields) if fields else configs.load(configs.named(path))
        config.train.dtype = dtype or config.train.dtype
        a = assembly.assemble(config, mesh, stage)
        batch = {k: np.zeros((a.config.data.batch, *v.shape), v.dtype) for k, v in a.spec.features.items()}
        state = jax.jit(lambda *args: assembly.init_state(a.family, *args))(jax.random.key(0), batch, a.frozen)
        return a.family, state.replace(params=None, opt=None), a.frozen

    return stage


def small_stage(fields: dict):
    return configs.make(**configs.deep_update(SMALL_STAGE, {'model': fields}))


def assembled(name: str):
    """A config by its name, or one of SMALL, with stages of first weights."""
    if name not in SMALL:
        config = configs.load(configs.named(name))
        return assembly.assemble(config, stage=of_stage({}))
    small = {k: v for k, v in SMALL[name].items() if k != 'stage'}
    shared = {'data': SMALL_STAGE['data'] | {'flip': True}, 'stages': {'first': 'small'}}
    config = configs.make(**configs.deep_update(shared, small))
    return assembly.assemble(config, stage=of_stage(SMALL[name]['stage']))


def seconds_of(call, state, frozen, batches, least: float):
    """((seconds, processor seconds) of a call, the state after it), means over so many seconds."""
    began, busy, n = time.perf_counter(), time.process_time(), 0
    while n == 0 or time.perf_counter() - began < least:
        state, logs = call(state, frozen, batches)
        jax.block_until_ready(logs)
        n += 1
    return ((time.perf_counter() - began) / n, (time.process_time() - busy) / n), state


def measure(name: str, seconds: float, turns: int, folder: str) -> dict:
    """Updates a second of a config both ways, and what the set took."""
    a = assembled(name)
    a.config.data.dir = os.path.join(folder, 'data')
    about = describe.describe(a.config, a)
    a.config.data.prepared, a.config.data.prepared_dir = 'on', os.path.join(folder, 'sets')
    examples, began = a.dataset('train'), time.perf_counter()
    made = prepare.for_training(a, examples)
    assert made is not None
    took = time.perf_counter() - began
    shardings = sharding.over_weights(a.mesh, a.abstract)
    calls, batches, states = {}, {}, {}
    for way, read in (('images', None), ('prepared', made)):
        stream = data.batches(a.config.data, 'train', seed=0, prepared=read)
        batches[way] = sharding.put_batch(a.mesh, {k: x[None] for k, x in next(stream).items()}, leading=1)
        stream.close()
        calls[way] = make_call(a, shardings, 1, 0)
    first = {k: x[0] for k, x in batches['images'].items()}
    for way in calls:
        states[way] = jax.jit(a.init)(jax.random.key(0), first, a.frozen)
        _, states[way] = seconds_of(calls[way], states[way], a.frozen, batches[way], 0)
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in calls}
    for _ in range(turns):
        for way, call in calls.items():
            value, states[way] = seconds_of(call, states[way], a.frozen, batches[way], seconds)
            times[way].append(value)
    pairs = list(zip(times['images'], times['prepared'], strict=True))
    by_clock, by_processor = ([i[k] / p[k] for i, p in pairs] for k in range(2))
    return {
        'batch': a.config.data.batch,
        'updates_per_second': {way: 1 / statistics.median(t for t, _ in values) for way, values in times.items()},
        'ratio': statistics.median(by_clock),
        'ratios': by_clock,
        'processor_ratio': statistics.median(by_processor),
        'processor_ratios': by_processor,
        'flops': {'images': about['update_flops'], 'prepared': about['prepared']['update_flops']},
        'flops_ratio': about['update_flops'] / about['prepared']['update_flops'],
        'set': {
            'images': made.layout.examples,
            'views': made.layout.views,
            'bytes': made.layout.nbytes,
            'seconds': took,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--configs', default=CONFIGS)
    parser.add_argument('--seconds', type=float, default=4.0, help='of each of the two in a turn')
    parser.add_argument('--turns', type=int, default=5)
    parser.add_argument('--out', default='')
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.configs.split(','):
            results[name] = measure(name, options.seconds, options.turns, folder)
            print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
    about = {'command': ' '.join(['python', *sys.argv]), **record.surroundings(), 'results': results}
    if options.out:
        files.save_json(options.out, about)
    print(json.dumps(about, indent=2))


if __name__ == '__main__':
    main()
