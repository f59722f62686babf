"""What an update costs as resolution, batch and depth double, beside what the arithmetic demands.

    python benchmarks/growth.py --out=benchmarks/results/growth.json --plot
    python benchmarks/growth.py --networks=dit --turns=3

A U-Net of DDPM, a DiT and a transformer over codes, small enough for one core, each from one size on: twice and four
times the batch, the blocks, and the sides of an image. All programs of a network take turns in one process that keeps
to one core, and time is that of the processor, so that other work on the machine changes little; a turn's growth is its
time over that of the smallest size in the same turn, and the median over the turns counts. The transformer reads codes
that were prepared, as training does.

The demand of a size is the growth of its FLOPs (`--mode=describe`: products and convolutions) or, where main memory is
what limits, that of the bytes that the instructions of the compiled program read and write (jaxgen/costs.py, loops
counted): what lies between the two is what the arithmetic demands, `outside` is the distance beyond them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time

import jax
import numpy as np

from jaxgen import assembly, chips, costs, describe, files, prepare, sharding
from jaxgen import config as configs
from jaxgen.evaluation import record
from jaxgen.train import make_call

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
AXES = ('batch', 'depth', 'resolution')
FACTORS = (2, 4)
WITHIN = 0.1  # of the demand
# Of each network: the fields of its config, and batch, blocks and sides of an image at the smallest size.
NETWORKS = {
    'unet': (
        {
            'family': 'diffusion',
            'model': {'network': {'channels': 32, 'multipliers': (1, 2)}},
        },
        {'batch': 8, 'depth': 1, 'resolution': 16},
    ),
    'dit': (
        {
            'family': 'diffusion',
            'model': {'network': {'name': 'dit', 'channels': 128, 'heads': 4, 'patch': 2}},
        },
        {'batch': 32, 'depth': 4, 'resolution': 8},
    ),
    'transformer': (
        {
            'family': 'transformer',
            'stages': {'first': 'stage'},
            'model': {'channels': 128, 'heads': 4},
        },
        {'batch': 32, 'depth': 4, 'resolution': 16},
    ),
}
# VQGAN whose codes have a quarter of the image's sides.
STAGE = {
    'family': 'vqgan',
    'model': {
        'regulariser': 'vq', 'channels': 32, 'multipliers': (1, 1, 1), 'blocks': 1, 'attention': (), 'latent': 16,
        'vocabulary': 256, 'perceptual': 0.0, 'adversarial': 0.0,
    },
}  # fmt: skip
NAMES = {'unet': 'U-Net of DDPM', 'dit': 'DiT', 'transformer': 'transformer over codes'}


def assembled(name: str, size: dict[str, int]) -> assembly.Assembled:
    """A network at a batch, depth and resolution."""
    fields, _ = NETWORKS[name]
    side = size['resolution']
    data = {'source': 'shapes', 'size': side, 'channels': 3, 'batch': size['batch']}

    def stage(path: str, mesh, dtype: str = ''):
        own = assembly.assemble(configs.make(**STAGE, data=data | {'batch': 1}), mesh)
        return own.family, own.abstract.replace(params=None, opt=None), own.frozen

    model: dict = {'blocks': size['depth']}
    if 'network' in fields['model']:
        model = {'network': model}
        if name == 'unet':
            model['network']['attention'] = (side // 2,)  # at its lowest level
    config = configs.make(**configs.deep_update({'data': data}, configs.deep_update(fields, {'model': model})))
    return assembly.assemble(config, stage=stage)


def program(name: str, size: dict[str, int]):
    """(an action that makes one update and waits for it, FLOPs, bytes) at a size."""
    a = assembled(name, size)
    features = prepare.batch_features(a)
    rng = np.random.default_rng(0)
    batch = {key: rng.integers(0, 256, (a.config.data.batch, *x.shape)).astype(x.dtype) for key, x in features.items()}
    flops = describe.update_flops(a, describe.shapes_of(features, a.config.data.batch))
    shardings = sharding.over_weights(a.mesh, a.abstract)
    placed = sharding.put_batch(a.mesh, batch)
    # The frozen stage is abstract: what it makes of the images is in the batch.
    frozen = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), a.frozen)
    state = jax.jit(lambda key, b: a.init(key, b, frozen), out_shardings=shardings)(jax.random.key(0), placed)
    stacked = jax.tree.map(lambda x: x[None], placed)
    call = make_call(a, shardings, 1, 0).lower(state, frozen, stacked).compile()
    moved = costs.costs(call.as_text(), chips.TPUS['v5e']).bytes  # the chip is for its times, which are not read
    holder = [state]

    def action() -> None:
        holder[0], _ = call(holder[0], frozen, stacked)
        jax.block_until_ready(holder[0])

    return action, flops, sum(moved.values())


def sizes(name: str) -> dict[tuple[str, int], dict[str, int]]:
    """{(axis, factor): size}; the smallest is ('', 1)."""
    _, first = NETWORKS[name]
    grown = {(axis, factor): first | {axis: factor * first[axis]} for axis in AXES for factor in FACTORS}
    return {('', 1): first, **grown}


def measure(name: str, turns: int) -> list[dict]:
    """A row for each size: processor seconds of an update, and how they, FLOPs and bytes grew."""
    programs = {}
    for key, size in sizes(name).items():
        programs[key] = program(name, size)
        programs[key][0]()
        print(name, *key, 'compiled', file=sys.stderr, flush=True)
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in programs}
    for _ in range(turns):
        for key, (action, *_) in programs.items():
            began = time.process_time()
            action()
            seconds[key].append(time.process_time() - began)
    _, flops, moved = programs['', 1]
    rows = []
    for (axis, factor), (_, own_flops, own_bytes) in programs.items():
        times = seconds[axis, factor]
        grown = [t / first for t, first in zip(times, seconds['', 1], strict=True)]
        row = {
            'network': name, 'axis': axis, 'factor': factor, 'size': sizes(name)[axis, factor], 'flops': own_flops,
            'bytes': own_bytes, 'seconds': statistics.median(times), 'growth': statistics.median(grown),
            'growths': grown, 'flops_growth': own_flops / flops, 'bytes_growth': own_bytes / moved,
        }  # fmt: skip
        rows.append(row | {'outside': outside(row)})
    return rows


def outside(row: dict) -> float:
    """How far a growth is beyond that of the FLOPs and that of the bytes, as a fraction of the nearer; below 0: cheaper
    than both."""
    low, high = sorted((row['flops_growth'], row['bytes_growth']))
    return row['growth'] / min(max(row['growth'], low), high) - 1


def plot(rows: list[dict], path: str) -> None:
    """The growth of time over that of the FLOPs, with the growth of the bytes as the other end of a bar."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4.8))
    colours, markers = ('tab:blue', 'tab:orange', 'tab:green'), ('o', 's', '^')
    line = np.array([1.0, 2 * max(r['flops_growth'] for r in rows)])
    axis.fill_between(line, line * (1 - WITHIN), line * (1 + WITHIN), color='0.85', label='FLOPs, and 10 % about them')
    axis.plot(line, line, color='0.5', linewidth=0.8)
    for name, colour in zip(NETWORKS, colours, strict=True):
        for which, marker in zip(AXES, markers, strict=True):
            own = [r for r in rows if r['network'] == name and r['axis'] == which]
            if not own:
                continue
            x, y = ([r[key] for r in own] for key in ('flops_growth', 'growth'))
            axis.plot(x, y, marker, color=colour, markersize=5, label=f'{NAMES[name]}, {which}')
            axis.vlines(x, *zip(*(sorted((r['flops_growth'], r['bytes_growth'])) for r in own), strict=True),
                        color=colour, linewidth=0.8)  # fmt: skip
    axis.set_xscale('log', base=2)
    axis.set_yscale('log', base=2)
    axis.set_xlabel("FLOPs of an update over the smallest size's")
    axis.set_ylabel("seconds of an update over the smallest size's")
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--networks', default=','.join(NETWORKS), help='with commas between')
    parser.add_argument('--turns', type=int, default=7)
    parser.add_argument('--out', default='')
    parser.add_argument('--plot', action='store_true', help='docs/images/growth.png')
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before there are threads
    rows: list[dict] = []
    for name in options.networks.split(','):
        rows += measure(name, options.turns)
        about = {'command': ' '.join(['python', *sys.argv]), **record.surroundings(), 'rows': rows}
        if options.out:
            files.save_json(options.out, about)
    for r in rows:
        print(
            f'{r["network"]:<12}{r["axis"]:<11}x{r["factor"]}  {r["seconds"]:7.3f} s  time x{r["growth"]:.2f}  '
            f'FLOPs x{r["flops_growth"]:.2f}  bytes x{r["bytes_growth"]:.2f}  outside {100 * r["outside"]:+.0f} %'
        )
    if options.plot:
        plot(rows, os.path.join(ROOT, 'docs', 'images', 'growth.png'))
    if not options.out:
        print(json.dumps(about))


if __name__ == '__main__':
    main()
