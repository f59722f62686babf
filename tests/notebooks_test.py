"""The notebooks of the documentation run, and the outputs stored in them are of the kinds that running them gives."""

from __future__ import annotations

import glob
import importlib.util
import json
import os

import pytest
from support import ROOT

FOLDER = os.path.join(ROOT, 'docs', 'notebooks')
NOTEBOOKS = sorted(glob.glob(os.path.join(FOLDER, '*.ipynb')))


def load_execute():
    spec = importlib.util.spec_from_file_location('execute', os.path.join(FOLDER, 'execute.py'))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


execute = load_execute()


def kinds(notebook: dict) -> list[list[str]]:
    """Of outputs, by cell: 'stream', 'image/png' or 'text/plain'."""
    cells = execute.code_cells(notebook)
    return [[kind for o in cell['outputs'] for kind in o.get('data', ['stream'])] for cell in cells]


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=os.path.basename)
def test_notebook_runs(path):
    with open(path, encoding='utf-8') as file:
        stored = json.load(file)
    assert kinds(execute.execute(path)) == kinds(stored), 'run python docs/notebooks/execute.py on it'


def test_all_notebooks_are_in_the_site():
    with open(os.path.join(ROOT, 'mkdocs.yml'), encoding='utf-8') as file:
        navigation = file.read()
    assert len(NOTEBOOKS) == 4
    for path in NOTEBOOKS:
        assert f'notebooks/{os.path.basename(path).removesuffix(".ipynb")}.md' in navigation


def test_a_cell_gives_what_it_prints_and_the_value_of_its_last_line():
    class Picture:
        def _repr_png_(self):
            return b'png'

    namespace = {'Picture': Picture}
    (stream,) = execute.run_cell('x = 3\nprint(x)\nprint("two")', 'cell', namespace)
    assert stream == {'output_type': 'stream', 'name': 'stdout', 'text': ['3\n', 'two\n']}
    assert execute.run_cell('x + 1', 'cell', namespace)[0]['data'] == {'text/plain': '4'}
    assert execute.run_cell('Picture()', 'cell', namespace)[0]['data'] == {'image/png': 'cG5n'}
    assert execute.run_cell('None', 'cell', namespace) == []
    with pytest.raises(AssertionError):
        execute.run_cell('assert x == 4', 'cell', namespace)
