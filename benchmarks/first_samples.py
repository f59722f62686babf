"""Time to the first and to later samples of five families, what is compiled for them, and the time that another option
takes, as benchmarks/results/first_samples.json.

    python benchmarks/first_samples.py
    python benchmarks/first_samples.py --configs=glow_digits --n=16 --out=/tmp/first_samples.json

The weights are new ones, which are as fast as trained ones. Every config has a process of its own, so that nothing is
compiled before, and no compilation cache on disk. All calls of `Run.sample` but the one named 'program' draw with
options that are arguments of the compiled sampler.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
# {config: (options that are arguments, options that are another program)}
OPTIONS = {
    'ddpm_digits': ({'sampler': {'name': 'ddim', 'steps': 50, 'eta': 0.5}}, {'sampler.steps': 25}),
    'vae_digits': ({}, {}),
    'gan_digits': ({'truncation': 0.9}, {'truncation': 0.0}),
    'pixelcnn_digits': ({'temperature': 0.9}, {'sampler': 'plain'}),
    'glow_digits': ({'temperature': 0.9}, {}),
}
CHANGED = {
    'ddpm_digits': {'sampler.eta': 0.9},
    'gan_digits': {'truncation': 0.5},
    'pixelcnn_digits': {'temperature': 0.5},
    'glow_digits': {'temperature': 0.5},
}


def measure(name: str, n: int, turns: int) -> dict:
    """Seconds and compiled programs of each call, for one config."""
    import jax

    from jaxgen import assembly, run
    from jaxgen import config as configs
    from jaxgen.contract import State

    compiles = []

    def listen(event: str, duration: float, **_):
        if 'backend_compile' in event:
            compiles.append(duration)

    config = configs.load(os.path.join(os.path.dirname(HERE), 'configs', f'{name}.py'))
    assembled = assembly.assemble(config)
    state = jax.tree.map(lambda a: 0.05 * jax.random.normal(jax.random.key(0), a.shape), assembled.abstract.ema)
    extra = jax.tree.map(lambda a: jax.numpy.zeros(a.shape, a.dtype), assembled.abstract.extra)
    state = State(jax.numpy.zeros((), int), None, None, jax.block_until_ready(state), extra)
    made = run.Run('', config, assembled, state, 'ema')
    jax.monitoring.register_event_duration_secs_listener(listen)
    first, program = OPTIONS[name]
    changed = first | CHANGED.get(name, {})

    def call(count: int, seed: int, options: dict) -> dict:
        del compiles[:]
        began = time.perf_counter()
        made.sample(count, seed, **options)
        return {'seconds': time.perf_counter() - began, 'compiled': len(compiles)}

    def several(count: int, options: dict) -> dict:
        calls = [call(count, seed, options) for seed in range(1, turns + 1)]
        middle = statistics.median(c['seconds'] for c in calls)
        return {'seconds': middle, 'compiled': sum(c['compiled'] for c in calls)}

    steps = {'first': call(n, 0, first), 'second': several(n, first), 'number': several(n + 1, first)}
    if changed != first:
        steps['option'] = several(n, changed)
        began = time.perf_counter()
        for _ in range(10):
            made.assembled.variants.clear()
            made.with_sampling(**changed)
        steps['family'] = {'seconds': (time.perf_counter() - began) / 10, 'compiled': 0}
    if program:
        steps['program'] = call(n, 0, first | program)
        steps['back'] = several(n, first)
    return {'config': name, 'n': n, 'options': first, 'changed': changed, 'program': first | program, 'calls': steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--configs', default=','.join(OPTIONS))
    parser.add_argument('--n', type=int, default=4)
    parser.add_argument('--turns', type=int, default=5, help='calls of which the median is taken')
    parser.add_argument('--out', default=os.path.join(HERE, 'results', 'first_samples.json'))
    parser.add_argument('--one', default='', help='of one config, as JSON on stdout')
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.n, arguments.turns)))
        return
    import jax
    import tables

    import jaxgen
    from jaxgen import files

    rows = []
    for name in arguments.configs.split(','):
        numbers = [f'--n={arguments.n}', f'--turns={arguments.turns}']
        environment = {**os.environ, 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
        command = [sys.executable, os.path.abspath(__file__), f'--one={name}', *numbers]
        done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(tables.first_samples(rows))
    record = {
        'command': ' '.join(['python', *sys.argv]),
        'rows': rows,
        'turns': arguments.turns,
        'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
        'cores': len(os.sched_getaffinity(0)),
        'versions': {'jax': jax.__version__, 'jaxgen': jaxgen.__version__},
    }
    files.save_json(arguments.out, record)


if __name__ == '__main__':
    main()
