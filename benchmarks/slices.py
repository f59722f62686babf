"""What the large configs take on slices of TPUs and nodes of GPUs that are not here: `--mode=compile` for each.

    python benchmarks/slices.py                                   # all rows, hours; goes on where it stopped
    python benchmarks/slices.py --only=dit_imagenet256 --topology=v5e:4x4,h100:8
    python benchmarks/slices.py --program=update                  # without samplers
    python benchmarks/slices.py --again --only=var_imagenet256    # rows that are there too
    python benchmarks/slices.py --list                            # the rows, and which are there

Needs `pip install 'jaxgen[tpu]'` and no TPU. Each row is a process of its own and is saved at once in
benchmarks/results/slices.json; after it `python benchmarks/tables.py` brings the documentation up to date. Rows whose
batch cannot be cut over the chips are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile

from jaxgen import config as configs
from jaxgen import files, slices

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PATH = os.path.join(ROOT, 'benchmarks', 'results', 'slices.json')
CONFIGS = (
    'dit_imagenet256',
    'ddpm_celebahq256',
    'adm_imagenet64',
    'sit_imagenet256',
    'var_imagenet256',
    'transformer_imagenet256',
    'stylegan2_ffhq1024',
    'adm_imagenet256',
    'var_imagenet256:d30',
    'stable_diffusion',
    'stable_diffusion_xl',
    'stable_diffusion_3',
    'flux',
)
# Slices of 4 to 256 chips, and the least fsdp on each: a config's own where that is larger, at most the chips.
TOPOLOGIES = {'v5e:4x4': 4, 'h100:8': 1, 'v5p:2x2x4': 1, 'v5e:2x2': 4, 'v5e:8x8': 4, 'v6e:8x8': 1, 'v5e:16x16': 4}
PROGRAMS = ('update', 'sample')
SECONDS = 3600  # of a row


def key(row: dict) -> tuple[str, str, str]:
    return row['config'], row['topology'], row['program']


def rows(only: list[str], topologies: list[str], programs: list[str]) -> list[dict]:
    """The rows of configs, slices and programs, [] for all of the table: config, topology, program and the fields that
    are set.
    Those whose batch or `fsdp` does not go with the number of chips are left out."""
    made = []
    loaded = {name: configs.load(name) for name in only or CONFIGS}
    for topology, program, (name, config) in itertools.product(
        topologies or TOPOLOGIES, programs or PROGRAMS, loaded.items()
    ):
        chips = slices.chips_of(topology)
        fsdp = min(max(TOPOLOGIES.get(topology, 1), config.mesh.fsdp), chips)
        if config.data.batch // config.optim.accumulate % chips or chips % fsdp:
            continue
        fields = [f'--config.mesh.fsdp={fsdp}'] if fsdp != config.mesh.fsdp else []
        made.append({'config': name, 'topology': topology, 'program': program, 'fields': fields})
    return made


def compile_row(row: dict) -> dict:
    """A row with what a process of its own compiled, or with its error."""
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, 'about.json')
        command = [sys.executable, os.path.abspath(__file__), '--one', *key(row), out, *row['fields']]
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=SECONDS, stderr=subprocess.PIPE, text=True)
        except subprocess.TimeoutExpired:
            return {**row, 'error': f'not compiled within {SECONDS} s'}
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f'exit code {done.returncode}']
            return {**row, 'error': lines[-1][:300]}
        with open(out, encoding='utf-8') as file:
            return {**row, **json.load(file)}


def one(name: str, topology: str, program: str, out: str, *fields: str) -> None:
    """Compiles one program and writes what it takes."""
    config = configs.override(configs.load(name), list(fields))
    about = slices.report(config, topology, (program,))
    about['compiled'] = about.pop(program)
    files.save_json(out, about)


def main() -> None:
    if sys.argv[1:2] == ['--one']:
        os.environ['JAX_PLATFORMS'] = 'cpu'
        one(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='', help='these configs, with commas between')
    parser.add_argument('--topology', default='', help='these slices, with commas between')
    parser.add_argument('--program', default='', help='update or sample alone')
    parser.add_argument('--again', action='store_true', help='compile rows that are there, too')
    parser.add_argument('--list', action='store_true', help='compile nothing')
    parser.add_argument('--out', default=PATH)
    arguments = parser.parse_args()
    record: dict = {'command': 'python benchmarks/slices.py', 'rows': []}
    if os.path.exists(arguments.out):
        with open(arguments.out, encoding='utf-8') as file:
            record = json.load(file)
    given = (arguments.only, arguments.topology, arguments.program)
    only, topologies, programs = (text.split(',') if text else [] for text in given)
    for row in rows(only, topologies, programs):
        there = {key(r): r for r in record['rows']}
        old = there.get(key(row))
        if arguments.list:
            print(*key(row), *row['fields'], '' if old is None else 'there')
            continue
        if old is not None and 'error' not in old and not arguments.again:
            continue
        there[key(row)] = compile_row(row)
        order = {key(r): i for i, r in enumerate(rows([], [], []))}
        record['rows'] = sorted(there.values(), key=lambda r: order.get(key(r), len(order)))
        files.save_json(arguments.out, record)
        compiled = there[key(row)].get('compiled', {})
        print(*key(row), there[key(row)].get('error', f'{compiled.get("compile_seconds")} s to compile'), flush=True)


if __name__ == '__main__':
    main()
