"""Runs the code cells of notebooks, in order and in one namespace, and stores their outputs. No Jupyter is needed.

python docs/notebooks/execute.py docs/notebooks/*.ipynb
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import sys


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']


def displayed(value) -> dict:
    """An output in nbformat 4 for the value of a cell's last expression: its PNG where it has one, else its repr."""
    png = value._repr_png_() if hasattr(value, '_repr_png_') else None
    data = {'image/png': base64.b64encode(png).decode()} if png else {'text/plain': repr(value)}
    return {'output_type': 'execute_result', 'metadata': {}, 'data': data}


def run_cell(source: str, name: str, namespace: dict) -> list[dict]:
    """Outputs, in nbformat 4, of one cell: what it prints, then the value of its last line where that is an expression.

    Args:
      name: of the cell, for tracebacks.
      namespace: of the notebook; changed.
    """
    tree, value, printed = ast.parse(source, name), None, io.StringIO()
    last = ast.Expression(tree.body.pop().value) if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, 'exec', dont_inherit=True), namespace)  # not this file's __future__
        if last is not None:
            value = eval(compile(last, name, 'eval', dont_inherit=True), namespace)
    text = printed.getvalue()
    stream = [{'output_type': 'stream', 'name': 'stdout', 'text': text.splitlines(keepends=True)}] if text else []
    return stream + ([displayed(value)] if value is not None else [])


def execute(path: str) -> dict:
    """The notebook in a file, each cell with the outputs of this run.

    The working directory is that of the file, as in Jupyter.
    """
    with open(path, encoding='utf-8') as file:
        notebook = json.load(file)
    namespace = {'__name__': '__main__'}
    with contextlib.chdir(os.path.dirname(os.path.abspath(path))):
        for number, cell in enumerate(code_cells(notebook), 1):
            outputs = run_cell(''.join(cell['source']), f'{os.path.basename(path)}[{number}]', namespace)
            for output in outputs:
                if output['output_type'] == 'execute_result':
                    output['execution_count'] = number
            cell['execution_count'], cell['outputs'] = number, outputs
    return notebook


if __name__ == '__main__':
    for path in sys.argv[1:]:
        notebook = execute(path)
        with open(path, 'w', encoding='utf-8') as file:
            file.write(json.dumps(notebook, indent=1, ensure_ascii=False) + '\n')
