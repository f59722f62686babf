"""The code of docs/library.md runs from top to bottom in an empty directory."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import types

import pytest
from support import ROOT


def stand_in(calls: list, **more) -> types.ModuleType:
    """A module in place of one that jaxgen does not depend on; what is called in it goes to `calls`."""
    module = types.ModuleType('stand_in')

    def record(name):
        return lambda *args, **options: calls.append((name, args, options))

    vars(module).update({name: record(name) for name in ('log', 'log_dict', 'log_metrics', 'Image')}, **more)
    return module


@pytest.mark.slow
def test_the_page_runs(tmp_path, monkeypatch, capsys):
    logged: list = []
    experiment = stand_in(logged)
    sessions = {name: lambda *_, **__: contextlib.nullcontext(experiment) for name in ('init', 'start_run')}
    for name in ('wandb', 'mlflow'):
        monkeypatch.setitem(sys.modules, name, stand_in(logged, **sessions))
    monkeypatch.chdir(tmp_path)
    with open(os.path.join(ROOT, 'docs', 'library.md'), encoding='utf-8') as page:
        blocks = re.findall(r'^```python\n(.*?)^```', page.read(), re.M | re.S)
    namespace: dict = {}
    for i, block in enumerate(blocks):
        exec(compile(block, f'docs/library.md, block {i}', 'exec'), namespace)
    assert len(blocks) >= 9
    assert [step for name, _, options in logged if name in ('log', 'log_metrics') for step in options.values()] == [
        2, 4, 6, 2, 4, 6,
    ]  # fmt: skip
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith('vae_digits vae 8x8x1') for line in printed) and '(4, 16, 16, 3)' in printed
