"""The documentation: its tables are those of the results, its links lead somewhere, its images are used."""

from __future__ import annotations

import ast
import glob
import importlib.util
import os
import re

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAGES = [os.path.join(ROOT, 'README.md'), *glob.glob(os.path.join(ROOT, 'docs', '**', '*.md'), recursive=True)]


def load_tables():
    spec = importlib.util.spec_from_file_location('tables', os.path.join(ROOT, 'benchmarks', 'tables.py'))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = load_tables()


def read(path: str) -> str:
    with open(path, encoding='utf-8') as file:
        return file.read()


@pytest.mark.parametrize('path', PAGES, ids=lambda p: os.path.relpath(p, ROOT))
def test_tables_are_those_of_the_results(path):
    text = read(path)
    assert tables.filled(text) == text, 'run python benchmarks/tables.py'


def test_every_result_is_in_a_table():
    text = '\n'.join(map(read, PAGES))
    named = {name for _, _, names, _ in tables.TABLE.findall(text) for name in names.split()}
    pages = {s['page'] for s in tables.result('systems')['systems']}
    names = {os.path.basename(p)[: -len('.json')] for p in glob.glob(os.path.join(tables.RESULTS, '*.json'))}
    assert pages <= named | {'modes'}
    assert names - {'systems', 'published'} <= named
    assert {kind for _, kind, _, _ in tables.TABLE.findall(text)} >= {'systems', 'modes', 'published'}


@pytest.mark.parametrize('name', ['systems', 'published'])
def test_configs_of_the_results_exist(name):
    rows = tables.result(name)['systems' if name == 'systems' else 'models']
    for row in rows:
        path = os.path.join(ROOT, 'configs', f'{row["config"]}.py')
        assert os.path.isfile(path), row['config']
        for part in filter(None, row['variant'].split(',')):
            assert f"'{part}'" in read(path), f'{row["config"]}:{row["variant"]}'
        for command in row.get('commands', ()):
            for config in re.findall(r'--config=(\S+?\.py)', command):
                assert os.path.isfile(os.path.join(ROOT, config)), command


CONFIGS = sorted(glob.glob(os.path.join(ROOT, 'configs', '*.py')))
STATUSES = {'shape-checked', 'weights-checked', 'trained here'}


def docstring(path: str) -> str:
    return ast.get_docstring(ast.parse(read(path))) or ''


@pytest.mark.parametrize('path', CONFIGS, ids=os.path.basename)
def test_docstrings_of_configs(path):
    """Command, time, the paper's number and ours, which is a number or a status of published sizes."""
    text = docstring(path)
    assert f'python -m jaxgen.main --config=configs/{os.path.basename(path)}' in text
    entries = dict(re.findall(r'^(Time|Paper|Ours): *(\S.*)$', text, re.M))
    assert set(entries) == {'Time', 'Paper', 'Ours'}
    assert entries['Ours'] in STATUSES or re.search(r'\d', entries['Ours'])


def test_configs_without_numbers_have_the_status_of_the_table():
    of_table = {}
    for row in tables.result('published')['models']:
        of_table.setdefault(row['config'], set()).add(row['status'])
    said = {os.path.basename(p).removesuffix('.py'): re.search(r'^Ours: (.*)$', docstring(p), re.M)[1] for p in CONFIGS}
    assert set().union(*of_table.values()) <= STATUSES
    assert {k: v for k, v in said.items() if v in STATUSES} == {
        k: v.pop() if len(v) == 1 else v for k, v in of_table.items() if 'trained here' not in v
    }


@pytest.mark.parametrize('path', PAGES, ids=lambda p: os.path.relpath(p, ROOT))
def test_links_lead_to_files(path):
    for target in re.findall(r'\]\(([^)#\s]+)[^)]*\)', read(path)):
        if not target.startswith(('http://', 'https://')):
            assert os.path.exists(os.path.join(os.path.dirname(path), target)), target


def test_every_image_is_shown():
    text = '\n'.join(map(read, PAGES))
    images = {os.path.basename(p) for p in glob.glob(os.path.join(ROOT, 'docs', 'images', '*.png'))}
    assert images == {os.path.basename(name) for name in re.findall(r'\]\(([^)\s]+\.png)\)', text)}


def test_readme_is_short():
    assert os.path.getsize(os.path.join(ROOT, 'README.md')) <= 6000


def test_tables_of_rows_made_by_hand():
    rows = [
        {'name': 'a', 'value': 2.0, 'stderr': 0.125, 'kind': 'exact', 'parameters': 1234, 'training_seconds': 61.4,
         'images_per_second': 1000.6},
        {'name': 'b', 'value': 1.5, 'stderr': 0.25, 'kind': 'bound', 'parameters': 5, 'training_seconds': 2.0,
         'images_per_second': 3.0},
    ]  # fmt: skip
    assert tables.likelihoods(rows).splitlines()[2:] == [
        '| b | 1.50 ± 0.25 | bound | 5 | 2 s | 3 |',
        '| a | 2.00 ± 0.12 | exact | 1,234 | 61 s | 1,001 |',
    ]
    point = {'metrics': {'frechet/net': {'value': 1.0}, 'recall/net': {'value': 0.5}}}
    # Heun's 3 evaluations stand in column 4, and 1 in its own.
    rows = [{'run': 'r', 'sampler': 'Heun', 'evaluations': n, **point} for n in (1, 3)]
    rows.append({'run': 'r', 'sampler': 'Euler', 'evaluations': 2, **point})
    assert tables.samplers(rows, 'net').splitlines() == [
        '| run, sampler | 1 | 2 | 4 |',
        '| --- | --- | --- | --- |',
        '| r, Heun | 1.00 (0.50) |  | 1.00 (0.50) |',
        '| r, Euler |  | 1.00 (0.50) |  |',
    ]
    assert tables.shown_metric({'metric': 'accuracy', 'value': 0.753, 'n': 2000}) == 'accuracy 75.3 % (n = 2,000)'


def test_the_table_of_slices():
    """A program that fits has its numbers, one that does not what it needs and what to change."""
    about = {'config': 'a', 'program': 'update', 'mesh': {'data': 4, 'fsdp': 4}, 'batch': 256, 'dtype': 'bfloat16'}
    sent = {'kind': 'all-gather', 'bytes': 1, 'times': 1, 'seconds': 1.0}
    fits = {
        'fits': True,
        'flops': 3e14,
        'memory': {'used': 4 * 2**30, 'limit': 16 * 2**30},
        'hbm_bytes': {'matmul': 2e10, 'copy': 1e10},
        'collectives': [{**sent, 'carrier': 'weights', 'sent': 5e9}, {**sent, 'carrier': 'weights', 'sent': 1e9}],
        'seconds': {'least': 0.385, 'in_turn': 1.56},
        'fraction_of_peak': 0.26,
        'advice': ['do this', 'do that'],
    }
    does_not = {'fits': False, 'flops': 1e12, 'memory': {'used': None, 'limit': 2**30}, 'advice': []}
    rows = [{**about, 'topology': 'v5e:4x4', 'compiled': fits}, {**about, 'topology': 'v5e:1x1', 'compiled': does_not}]
    failed = {**about, 'topology': 'v5e:2x2', 'error': 'not compiled'}
    first, second = tables.slices({'rows': [*rows, failed]}, 'update').splitlines()[2:]
    assert first == (
        '| `a` | `v5e:4x4`, fsdp 4 | 256, bfloat16 | 4.0 of 16 GiB | 300 | 30 | 6 / 0 | 385 to 1,560 | 26 % | do this; '
        'do that |'
    )
    assert second.startswith('| `a` | `v5e:1x1`, fsdp 4 | 256, bfloat16 | more than 1 GiB: does not fit | 1 |')
    assert tables.slices({'rows': rows}, 'sample').count('\n') == 1
