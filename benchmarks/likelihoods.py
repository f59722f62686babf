"""Likelihoods of one data set's held-out split, side by side: the same examples, the same unit, for every family.

    python benchmarks/likelihoods.py --dataset=digits

Takes the runs in `runs/` whose families have a likelihood of images (train them first by their configs), measures bits
per dimension of 256 grey levels on the first examples of the test split, and beside it parameters, the time that
training took, and the speed of sampling, all systems in turns in one process at one batch size. Prints a table and
writes benchmarks/results/likelihoods_<dataset>.json (pip install -e '.[bench]').
"""

from __future__ import annotations

import argparse
import os
import sys

import jax
import tables
from trilemma import ROOT, find_runs, images_per_second, training_seconds

import jaxgen
from jaxgen import describe, directory, files, log, run
from jaxgen.diffusion.processes import CHAINS

# What each family's number is; a diffusion model in continuous time has an estimate by its ODE.
BOUND, EXACT, ODE = 'bound', 'exact', 'by the ODE'
KINDS = {
    'vae': 'bound of importance samples',
    'vdm': BOUND,
    'diffusion': BOUND,
    'pixelcnn': EXACT,
    'pixelcnn_pp': EXACT,
}
DEQUANTISED = 'exact density, bound by dequantisation'
KINDS |= {'real_nvp': DEQUANTISED, 'glow': DEQUANTISED}


def kind(r: run.Run) -> str:
    if r.config.family == 'diffusion' and r.config.model.process.name not in CHAINS:
        return ODE
    return KINDS.get(r.config.family, BOUND)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--dataset', default='digits', help='its classifier, classifier_<dataset>, says which data')
    parser.add_argument('--runs', default='runs', help='where the runs lie')
    parser.add_argument('--examples', type=int, default=0, help='of the test split, 0: all')
    parser.add_argument('--batch', type=int, default=64, help='samples drawn at once when speed is measured')
    parser.add_argument('--turns', type=int, default=3)
    arguments = parser.parse_args()
    like = directory.saved_config(os.path.join(arguments.runs, f'classifier_{arguments.dataset}'))
    rows = []
    candidates = find_runs(arguments.runs, like)
    for name, r in list(candidates.items()):
        traced = jax.eval_shape(
            r.assembled.family.evaluate, r.state, r.assembled.frozen,
            {k: jax.ShapeDtypeStruct((1, *v.shape), 'float32' if k == 'image' else v.dtype)
             for k, v in r.assembled.spec.features.items()} | {'index': jax.ShapeDtypeStruct((1,), 'int32')},
            jax.eval_shape(lambda: jax.random.key(0)),
        )  # fmt: skip
        if 'bits_per_dim' not in traced:
            del candidates[name]
            continue
        r.config.evaluate.examples = arguments.examples
        metric = r.evaluate()['bits_per_dim']
        more = {'parameters': describe.count(r.assembled.abstract.params), 'kind': kind(r)}
        rows.append({'name': name, **metric, **more, 'training_seconds': training_seconds(r.workdir)})
        log.say(f'{name}: {metric["value"]:.3f} +- {metric["stderr"]:.3f} bits/dim')
    if not rows:
        parser.error(f'no run in {arguments.runs} has a likelihood of {arguments.dataset}')
    speeds = images_per_second(candidates, arguments.batch, arguments.turns)
    for row in rows:
        row['images_per_second'] = speeds[row['name']]
    rows.sort(key=lambda row: row['value'])
    print(tables.likelihoods(rows))
    record = {
        'command': ' '.join(['python', *sys.argv]),
        'rows': rows,
        'examples': rows[0]['n'],
        'batch': arguments.batch,
        'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
        'cores': len(os.sched_getaffinity(0)),
        'versions': {'jax': jax.__version__, 'jaxgen': jaxgen.__version__},
    }
    files.save_json(os.path.join(ROOT, 'benchmarks', 'results', f'likelihoods_{arguments.dataset}.json'), record)


if __name__ == '__main__':
    main()
