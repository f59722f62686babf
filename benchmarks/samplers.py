"""Quality by the number of network evaluations: formulations times samplers times steps, of trained runs.

    python benchmarks/samplers.py --dataset=digits

Takes the runs in `runs/` of diffusion models of the data set (train them first by their configs), draws samples of each
by its samplers with 1 to 1000 evaluations of the network, and measures Fréchet distance and recall by the features of
the data set's classifier, against the training split. Runs with a likelihood have bits per dimension of the test split
beside them. Prints a table, and writes benchmarks/results/samplers_<dataset>.json and the plot
docs/images/samplers_<dataset>.png (pip install -e '.[bench]').
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import jax
import tables

import jaxgen
from jaxgen import config as configs
from jaxgen import directory, files, log, run
from jaxgen.evaluation import cache

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# {system: {sampler's name in the table: (fields of config.model.sampler, evaluations -> levels)}}; an entry is left out
# where the levels are no whole number.
ONE, HEUN, TWO = (lambda n: n), (lambda n: (n + 1) / 2), (lambda n: n / 2)
SAMPLERS = {
    'ddpm': {
        'ancestral': ({'name': 'ancestral'}, ONE),
        'DDIM': ({'name': 'ddim'}, ONE),
        'DPM-Solver++ 2M': ({'name': 'dpm_solver_pp', 'spacing': 'respaced'}, ONE),
        'UniPC': ({'name': 'unipc', 'spacing': 'respaced'}, ONE),
    },
    'score_vp': {'predictor-corrector': ({'name': 'predictor_corrector'}, TWO)},
    'edm': {'Euler': ({'name': 'euler'}, ONE), 'Heun': ({'name': 'heun'}, HEUN)},
    'flow': {
        'Euler': ({'name': 'euler'}, ONE),
        'Heun': ({'name': 'heun'}, HEUN),
        'Euler-Maruyama': ({'name': 'euler_maruyama'}, ONE),
    },
    'consistency': {'multistep': ({}, ONE)},
}
# Evaluations: every sampler's, and those of the one sampler that needs so many.
EVALUATIONS = (1, 2, 4, 8, 16, 32, 64)
MANY = {('ddpm', 'ancestral'): (250, 1000)}
MOST = {'consistency': 8}


def points(dataset: str, evaluations: tuple[int, ...], many: bool):
    """(run's name, sampler, evaluations, fields of config.model.sampler) of all points of the table."""
    for system, samplers in SAMPLERS.items():
        for name, (fields, levels) in samplers.items():
            for count in (*evaluations, *(MANY.get((system, name), ()) if many else ())):
                if levels is HEUN and count % 2 == 0:  # it takes an odd number: one less, but for 2
                    count = count - 1 if count > 2 else 0
                steps = levels(count)
                if count and steps == int(steps) and count <= MOST.get(system, count):
                    yield f'{system}_{dataset}', name, count, {**fields, 'steps': int(steps)}


def measure(workdir: str, fields: dict, evaluator, n: int, batch: int) -> dict:
    """Metrics of n samples, and images per second once the program is compiled."""
    config = directory.saved_config(workdir)
    sections = {'model': {'sampler': fields}, 'sample': {'batch': batch}}
    r = run.load(workdir, config=configs.complete(configs.update_sections(config.to_dict(), sections)))
    metrics = r.compare(evaluator, n)
    cache.clear(workdir)
    began = time.perf_counter()
    r.sample(batch, seed=1)
    return {'metrics': metrics, 'images_per_second': batch / (time.perf_counter() - began)}


def draw(rows: list[dict], network: str, title: str, path: str) -> None:
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout='constrained')
    axes.set_prop_cycle(color=plt.get_cmap('tab20').colors)  # the usual ten are too few
    for key in dict.fromkeys((r['run'], r['sampler']) for r in rows):
        own = [r for r in rows if (r['run'], r['sampler']) == key]
        x = [r['evaluations'] for r in own]
        y = [r['metrics'][f'frechet/{network}']['value'] for r in own]
        axes.plot(x, y, marker='o', markersize=3, linewidth=1.2, label=', '.join(key))
    axes.set(xscale='log', yscale='log', xlabel='network evaluations per sample', title=title)
    axes.set(ylabel=f'Fréchet distance, {network}')
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--dataset', default='digits', help="the last part of the configs' names")
    parser.add_argument('--runs', default='runs', help='where the runs lie')
    parser.add_argument('--n', type=int, default=500, help='samples of every point')
    parser.add_argument('--batch', type=int, default=250, help='samples drawn at once')
    parser.add_argument('--examples', type=int, default=64, help='of the test split, for bits per dimension')
    parser.add_argument('--most', type=int, default=1000, help='evaluations, at most')
    arguments = parser.parse_args()
    network = f'classifier_{arguments.dataset}'
    like = directory.saved_config(os.path.join(arguments.runs, network))
    like.evaluate.features = f'run:{os.path.join(arguments.runs, network)}'

    evaluations = tuple(n for n in EVALUATIONS if n <= arguments.most)
    selected = [p for p in points(arguments.dataset, evaluations, True) if p[2] <= arguments.most]
    there = {name for name, *_ in selected if os.path.isdir(os.path.join(arguments.runs, name, 'checkpoints'))}
    for name in sorted({name for name, *_ in selected} - there):
        log.say(f'{name} is left out: no run in {arguments.runs}')
    if not there:
        parser.error(f'no run of a diffusion model of {arguments.dataset} in {arguments.runs}: train one first')
    first = run.load(os.path.join(arguments.runs, sorted(there)[0]))
    evaluator = run.make_evaluator(like, first.assembled.mesh)
    evaluator.check(arguments.n)

    rows = []
    for name, sampler, count, fields in selected:
        if name in there:
            workdir = os.path.join(arguments.runs, name)
            point = measure(workdir, fields, evaluator, arguments.n, arguments.batch)
            rows.append({'run': name, 'sampler': sampler, 'evaluations': count, **point})
            value = point['metrics'][f'frechet/{network}']['value']
            log.say(f'{name}, {sampler}, {count}: {value:.3f}, {point["images_per_second"]:.1f} images/s')
    bits = {}
    for name in sorted(there):
        workdir = os.path.join(arguments.runs, name)
        config = directory.saved_config(workdir)
        config.evaluate.examples = arguments.examples
        metrics = run.load(workdir, config=config).evaluate()
        if 'bits_per_dim' in metrics:
            bits[name] = metrics['bits_per_dim']
    print(tables.samplers(rows, network))
    for name, metric in bits.items():
        print(f'{name}: {metric["value"]:.3f} +- {metric["stderr"]:.3f} bits/dim')
    here = os.path.join(ROOT, 'benchmarks')
    record = {
        'command': ' '.join(['python', *sys.argv]),
        'rows': rows,
        'bits_per_dim': bits,
        'samples': arguments.n,
        'batch': arguments.batch,
        **evaluator.about(),
        'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
        'cores': len(os.sched_getaffinity(0)),
        'versions': {'jax': jax.__version__, 'jaxgen': jaxgen.__version__},
    }
    files.save_json(os.path.join(here, 'results', f'samplers_{arguments.dataset}.json'), record)
    title = f'Quality by network evaluations: {arguments.dataset}'
    draw(rows, network, title, os.path.join(ROOT, 'docs', 'images', f'samplers_{arguments.dataset}.png'))


if __name__ == '__main__':
    main()
