"""Memory and time of importing, loading and exporting published weights, of any config at any size.

    python benchmarks/weights.py --config=CONFIG [--config.FIELD=VALUE ...] --small=--config.FIELD=VALUE --names=SOURCE

A file of random weights with the names of a source is written, a run is made of it, the run is loaded, and a file is
made of the run, each in a process of its own. Memory is the most that the process had resident (VmHWM), mapped files
included, less that of the same with `--small`, the fields of a network of few weights: what the weights cost. The pages
of the file are dropped first, so `read` is what came from the disk while it was imported. Results go to
benchmarks/results/weights.json, which keeps those of other configs and dtypes. Linux.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time

import numpy as np

from jaxgen import assembly, files
from jaxgen import config as configs
from jaxgen.weights import sources
from jaxgen.weights.importing import flat_shapes, published_part

RESULTS = os.path.join(os.path.dirname(__file__), 'results', 'weights.json')
DTYPES = {'float32': ('F32', 'float32'), 'bfloat16': ('BF16', 'bfloat16'), 'float16': ('F16', 'float16')}
# What a process does, with sys.argv[1:], and then says of itself.
STEP = """
import json, sys, time
import jax
import jaxgen
from jaxgen.main import run_main
start = time.perf_counter()
what, *arguments = sys.argv[1:]
if what == 'load':
    run = jaxgen.load(arguments[0])
    jax.block_until_ready(run.state)
elif run_main(['jaxgen', *arguments]):
    sys.exit(1)
seconds = time.perf_counter() - start
def value(file, name):
    return next(int(line.split()[1]) for line in open(file) if line.startswith(name))
print(json.dumps({'resident': 1024 * value('/proc/self/status', 'VmHWM'), 'seconds': seconds,
                  'read': value('/proc/self/io', 'read_bytes')}))
"""


def drop(path: str) -> None:
    """Drops the pages of a file, so that it is read from the disk."""
    with open(path, 'rb+') as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_weights(path: str, shapes: dict[str, tuple[int, ...]], dtype: str, seed: int) -> None:
    """Writes random weights in pieces: of norms ones, else such that what a layer gives has about its input's size."""
    kind, name = DTYPES[dtype]
    numbers, header, offset = np.dtype(name), {}, 0
    for tensor, shape in shapes.items():
        after = offset + math.prod(shape) * numbers.itemsize
        header[tensor] = {'dtype': kind, 'shape': list(shape), 'data_offsets': [offset, after]}
        offset = after
    text, rng = json.dumps(header).encode(), np.random.default_rng(seed)
    with open(path, 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for tensor, shape in shapes.items():
            rest = math.prod(shape)
            scale = 0.5 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.02
            while rest:
                n = min(rest, 2**22)
                drawn = scale * rng.standard_normal(n, np.float32) + float(len(shape) == 1 and 'weight' in tensor)
                file.write(drawn.astype(numbers).tobytes())
                rest -= n
    drop(path)


def write_file(path: str, config, names: str, dtype: str) -> int:
    """Writes random weights by the names of a source; the number of parameters."""
    assembled = assembly.assemble(config, stage=assembly.abstract_stage)
    shapes = flat_shapes(published_part(assembled.abstract))
    entries = sources.entries_of(sources.for_config(config, names)[0], config, shapes)
    tensors = {name: entry.their_shape() for entry in entries for name in entry.all_names}
    write_weights(path, tensors, dtype, seed=0)
    return sum(math.prod(shape) for shape in tensors.values())


def measure(what: str, *arguments: str) -> dict:
    """What a process says of itself."""
    done = subprocess.run([sys.executable, '-c', STEP, what, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def steps(folder: str, name: str, overrides: list[str], names: str, dtype: str) -> tuple[int, int, dict[str, dict]]:
    """(parameters, bytes of the file, {step: measurement}) of a config."""
    file, run, out = (os.path.join(folder, part) for part in ('in.safetensors', 'run', 'out.safetensors'))
    parameters = write_file(file, configs.override(configs.load(name), overrides), names, dtype)
    size = os.path.getsize(file)
    given = [f'--config={name}', f'--from={file}', f'--workdir={run}', f'--names={names}', *overrides]
    steps = {'import': measure('main', '--mode=import', *given)}
    os.remove(file)
    steps['load'] = measure('load', run)
    steps['export'] = measure('main', '--mode=export', f'--workdir={run}', f'--to={out}', f'--names={names}')
    return parameters, size, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--config', required=True)
    parser.add_argument('--names', required=True, help='the source whose names the file has')
    parser.add_argument('--dtype', default='float32', choices=DTYPES)
    parser.add_argument('--small', action='append', default=[], help='--config.FIELD=VALUE of a small network')
    known, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        _, _, small = steps(folder, known.config, [*overrides, *known.small], known.names, known.dtype)
    with tempfile.TemporaryDirectory() as folder:
        parameters, size, large = steps(folder, known.config, overrides, known.names, known.dtype)
    row = {'config': known.config, 'overrides': overrides, 'dtype': known.dtype, 'parameters': parameters, 'file': size}
    for step, one in large.items():
        extra = one['resident'] - small[step]['resident']
        row[step] = {'memory': extra, 'ratio': round(extra / size, 3), 'seconds': round(one['seconds'], 1)}
    row['import']['read'] = round(large['import']['read'] / size, 3)
    print(json.dumps(row, indent=2))
    rows = []
    if os.path.exists(RESULTS):
        with open(RESULTS, encoding='utf-8') as file:
            rows = json.load(file)['rows']
    rows = [one for one in rows if any(one[key] != row[key] for key in ('config', 'overrides', 'dtype'))]
    date = time.strftime('%Y-%m-%d')
    files.save_json(RESULTS, {'command': __doc__.splitlines()[2].strip(), 'rows': [*rows, {**row, 'date': date}]})


if __name__ == '__main__':
    main()
