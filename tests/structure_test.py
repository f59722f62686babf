"""Where things are: networks in networks/, and every module of the package in the API reference."""

from __future__ import annotations

import ast
import glob
import os
import re

import pytest
from support import ROOT

FILES = [os.path.relpath(f, ROOT) for f in glob.glob(os.path.join(ROOT, 'jaxgen', '**', '*.py'), recursive=True)]


def networks(source: str) -> set[str]:
    """Names of the classes in a module's text that derive from nn.Module, by whatever name, or from one of these."""
    tree, found = ast.parse(source), {'Module'}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {a.asname for a in node.names if a.name == 'Module' and a.asname}
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    while True:
        more = {c.name for c in classes for b in c.bases if ast.unparse(b).rpartition('.')[2] in found} - found
        if not more:
            return {c.name for c in classes} & found
        found |= more


@pytest.mark.parametrize(
    'source, wanted',
    [
        ('class A(nn.Module): pass', {'A'}),
        ('class A(Module): pass', {'A'}),
        ('from flax.linen import Module as M\nclass A(M): pass', {'A'}),
        ('class B(A): pass\nclass A(flax.linen.Module): pass', {'A', 'B'}),
        ('def build():\n  class A(nn.Module): pass', {'A'}),
        ('class A(NamedTuple):\n  module: nn.Module', set()),
    ],
)
def test_networks_of(source, wanted):
    assert networks(source) == wanted


def test_networks_are_in_networks():
    elsewhere = {}
    for file in FILES:
        with open(os.path.join(ROOT, file), encoding='utf-8') as source:
            names = networks(source.read())
        if names and not file.startswith(os.path.join('jaxgen', 'networks')):
            elsewhere[file] = names
    assert not elsewhere, 'training recipes and metrics take their networks from jaxgen/networks'


def test_api_reference_names_every_module():
    documented = []
    for file in glob.glob(os.path.join(ROOT, 'docs', 'reference', '*.md')):
        with open(file, encoding='utf-8') as page:
            documented += re.findall(r'^::: (\S+)', page.read(), re.M)
    assert len(documented) == len(set(documented))
    modules = {file.removesuffix('.py').replace(os.sep, '.').removesuffix('.__init__') for file in FILES}
    assert not set(documented) - modules, 'the reference names modules that are not there'
    packages = ('augmentation', 'families', 'networks', 'diffusion', 'losses', 'metrics', 'data')
    missing = {m for m in modules if m.count('.') == 2 and m.split('.')[1] in packages} - set(documented)
    assert not missing, 'the reference lacks modules'
