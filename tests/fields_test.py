"""--mode=fields: every field of every config is there, with a meaning, in columns."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from support import CONFIGS, ROOT, mistake, path

from jaxgen import config as configs
from jaxgen import fields
from jaxgen.main import run_main


def test_every_field_of_every_config_is_described():
    for file in CONFIGS:
        config = configs.load(file)
        lines = fields.describe(config)
        paths = [line.path for line in lines]
        flat = configs.flat(config.to_dict())
        assert len(set(paths)) == len(paths) and set(flat) <= set(paths), file
        sections = set(paths) - set(flat)  # by names of a person's choice
        assert all(isinstance(configs.get(config, one), configs.ConfigDict) for one in sections), (file, sections)
        assert not [line.path for line in lines if not line.meaning], file


def text(capsys, monkeypatch, width: int, *overrides: str) -> str:
    monkeypatch.setenv('COLUMNS', str(width))
    arguments = [f'--config.{field}' for field in overrides]
    assert run_main(['jaxgen', '--mode=fields', f'--config={path("vae_digits", "")}', *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize('width', [60, 80, 100, 500])
def test_text_fits_the_terminal(width, capsys, monkeypatch, no_compile):
    lines = text(capsys, monkeypatch, width).split('\n')
    assert max(map(len, lines)) <= min(width, fields.WIDEST)
    columns = {re.match(r' *', line).end() for line in lines if line.startswith('   ')}
    assert len(columns) == 1, 'meanings are aligned'


def test_text_says_value_default_and_what_is_allowed(capsys, monkeypatch):
    shown = ' '.join(text(capsys, monkeypatch, 100, 'optim.lr=0.5', 'optim.networks.coder.clip=2').split())
    assert 'optim.lr 0.5 learning rate, after warm-up (float, more than 0; default 0.0002)' in shown
    assert "data.crop 'center' where the largest part of an image in the aspect ratio of size lies" in shown
    assert "(str, one of 'center', 'random', 'resized')" in shown
    assert 'optim.networks coder the fields that differ for one network' in shown
    assert 'optim.networks.coder.clip 2.0 largest global norm' in shown
    assert 'model.latent 10 dimensions of z' in shown
    assert 'stages {} run directories' in shown
    assert 'data.size 8 pixels of each side of square images, 28, or (height, width)' in shown
    assert '(int or tuple of int, int, or (height, width) in pixels, each from 1 to 65536)' in shown


def test_mistakes(capfd):
    assert 'needs --config=NAME' in mistake(capfd, '--mode=fields')
    assert '--workdir is read by' in mistake(capfd, '--mode=fields', f'--config={path("vae_digits")}', '--workdir=x')
    config = f'--config={path("vae_digits")}'
    assert 'no such field' in mistake(capfd, '--mode=fields', config, '--config.model.latnet=3')


def test_a_reader_may_close_the_pipe():
    command = [sys.executable, '-m', 'jaxgen.main', '--mode=fields', f'--config={path("vae_digits")}']
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, cwd=ROOT, timeout=120)
    os.close(write)
    assert process.returncode == 0 and not process.stderr
