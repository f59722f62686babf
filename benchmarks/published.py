"""Counts the parameters of the published sizes, by abstract evaluation: no weights are made.

    python benchmarks/published.py                       # all rows of benchmarks/results/published.json; minutes
    python benchmarks/published.py --only=dit_imagenet256,edm_cifar10:ve
    python benchmarks/published.py --check --only=...    # exit code 1 where a stored count differs; writes nothing

Counts are those that `python -m jaxgen.main --mode=describe --config=configs/CONFIG.py:VARIANT` gives, by network.
After it `python benchmarks/tables.py` brings the documentation up to date.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from jaxgen import assembly, describe, files
from jaxgen import config as configs

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PATH = os.path.join(ROOT, 'benchmarks', 'results', 'published.json')


def name(row: dict) -> str:
    return row['config'] + (f':{row["variant"]}' if row['variant'] else '')


def count(row: dict) -> dict[str, int]:
    """{network: parameters} of a row's config."""
    variant = f':{row["variant"]}' if row['variant'] else ''
    config = configs.load(os.path.join(ROOT, 'configs', f'{row["config"]}.py{variant}'))
    params = assembly.assemble(config, stage=assembly.abstract_stage).abstract.params
    return {network: describe.count(weights) for network, weights in params.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='', help='CONFIG or CONFIG:VARIANT, with commas between')
    parser.add_argument('--check', action='store_true', help='write nothing')
    arguments = parser.parse_args()
    os.chdir(ROOT)  # configs name the stages that they stand on by relative paths
    with open(PATH, encoding='utf-8') as file:
        record = json.load(file)
    different = 0
    for row in record['models']:
        # A variant's own commas: iddpm_cifar10:imagenet64,conditional is named iddpm_cifar10 here.
        if not arguments.only or {name(row), row['config']} & set(arguments.only.split(',')):
            networks = count(row)
            same = networks == row['parameters']
            different += not same
            print(f'{name(row)}: {networks}' + ('' if same else f', stored: {row["parameters"]}'), flush=True)
            row['parameters'] = networks
            if not arguments.check:
                files.save_json(PATH, record)
    sys.exit(1 if different and arguments.check else 0)


if __name__ == '__main__':
    main()
