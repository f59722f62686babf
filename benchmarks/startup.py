"""How long a training takes from its command to its first update, with an empty compilation cache and with a full one.

    python benchmarks/startup.py --config=ddpm_digits --turns=3 --out=benchmarks/results/startup_ddpm_digits.json

Each turn is a process of its own in a new run directory, ended at its first update: when the progress bar is drawn.
Seconds of the processor are of all its threads. 'resumed' goes on from a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version

import jaxgen
from jaxgen import config as configs
from jaxgen import files


def start(arguments: list[str], cache: str) -> dict[str, float]:
    """Seconds from the start of a process to its first line, to the line before the compile and to the first update."""
    command = [sys.executable, '-m', 'jaxgen', *arguments, f'--cache={cache}']
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, bufsize=0)
    seen, seconds = b'', {}
    while piece := process.stderr.read(4096):
        seen += piece
        for name, text in {'first_line': b'jaxgen: ', 'compiling': b'compiling', 'first_update': b'step/s]'}.items():
            if text in seen:
                seconds.setdefault(name, time.monotonic() - began)
        if 'first_update' in seconds:
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if 'first_update' not in seconds:
        sys.exit(seen.decode(errors='replace'))
    return seconds | {'processor': after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def measure(config: str, turns: int, rest: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        cache, common = os.path.join(folder, 'cache'), [f'--config={config}', *rest]
        cold = start([*common, f'--workdir={folder}/cold'], cache)
        warm = [start([*common, f'--workdir={folder}/warm{i}'], cache) for i in range(turns)]
        short = [f'--config.train.{name}=4' for name in ('steps', 'save_every', 'sample_every', 'samples')]
        command = [sys.executable, '-m', 'jaxgen', *common, *short, f'--workdir={folder}/resumed', f'--cache={cache}']
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        resumed = [start([*common, f'--workdir={folder}/resumed'], cache) for _ in range(turns)]
    return {'cold': cold, 'warm': warm, 'resumed': resumed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default='ddpm_digits')
    parser.add_argument('--turns', type=int, default=3)
    parser.add_argument('--out', default='', help='write the JSON here too')
    arguments, rest = parser.parse_known_args()
    result = {
        'command': ' '.join(['python', os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        'what': 'startup',
        'config': configs.name(arguments.config),
        'seconds': measure(arguments.config, arguments.turns, rest),
        'load': os.getloadavg()[0],  # of the machine at the end; others share it
        'cores': os.cpu_count(),
        'machine': platform.machine(),
        'versions': {
            'jaxgen': jaxgen.__version__,
            'python': platform.python_version(),
            **{name: version(name) for name in ('jax', 'flax', 'numpy')},
        },
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        files.save_json(arguments.out, result)


if __name__ == '__main__':
    main()
