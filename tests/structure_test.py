"""Where things are: networks in networks/, every module in the API reference, no data set named in evaluation/."""

from __future__ import annotations

import ast
import glob
import os
import re

import pytest
from support import ROOT, path

from jaxgen import config as configs
from jaxgen.data.sources import OWN

FILES = [os.path.relpath(f, ROOT) for f in glob.glob(os.path.join(ROOT, 'jaxgen', '**', '*.py'), recursive=True)]


def networks(source: str) -> set[str]:
    """Names of the classes in a module's text that derive from nn.Module, by whatever name, or from one of these."""
    tree, known = ast.parse(source), {'Module'}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            known |= {a.asname for a in node.names if a.name == 'Module' and a.asname}
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    while True:
        more = {c.name for c in classes for b in c.bases if ast.unparse(b).rpartition('.')[2] in known} - known
        if not more:
            return {c.name for c in classes} & known
        known |= more


@pytest.mark.parametrize(
    'source, expected',
    [
        ('class A(nn.Module): pass', {'A'}),
        ('class A(Module): pass', {'A'}),
        ('from flax.linen import Module as M\nclass A(M): pass', {'A'}),
        ('class B(A): pass\nclass A(flax.linen.Module): pass', {'A', 'B'}),
        ('def build():\n  class A(nn.Module): pass', {'A'}),
        ('class A(NamedTuple):\n  module: nn.Module', set()),
    ],
)
def test_networks_of(source, expected):
    assert networks(source) == expected


def test_quick_part_has_every_family():
    """In README's test command each family is updated, sampled and resumed."""
    from embedded import DISTINCT, IN_QUICK_PART, UNTRAINED  # loads all configs

    assert sorted({*IN_QUICK_PART, *UNTRAINED}) == configs.families()
    assert {configs.load(path(name)).family: name for name in IN_QUICK_PART.values()} == IN_QUICK_PART
    assert set(IN_QUICK_PART.values()) <= set(DISTINCT.values())


def test_test_command_is_the_same_everywhere():
    command = "pytest -n 2 -m 'not slow'"
    for file in ('README.md', 'CONTRIBUTING.md', 'docs/guide.md', '.ci/run'):
        with open(os.path.join(ROOT, file), encoding='utf-8') as page:
            commands = re.findall(r'pytest [^`#\n]*', page.read())
        assert command in {text.split('||')[0].strip() for text in commands}, file


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
    packages = ('augmentation', 'families', 'networks', 'diffusion', 'losses', 'metrics', 'evaluation', 'data')
    missing = {m for m in modules if m.count('.') == 2 and m.split('.')[1] in packages} - set(documented)
    assert not missing, 'the reference lacks modules'


def test_test_files_import_no_test_file():
    """What several of them need stands in a module of helpers, tests/support.py above all."""
    files = glob.glob(os.path.join(ROOT, 'tests', '**', '*_test.py'), recursive=True)
    names = {os.path.basename(file).removesuffix('.py') for file in files}
    for file in files:
        with open(file, encoding='utf-8') as source:
            nodes = list(ast.walk(ast.parse(source.read())))
        imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        imported |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert not imported & names, file


def test_architecture_has_the_tree():
    """Every line of the tree names a file or folder, and those of jaxgen/ are all of them."""
    with open(os.path.join(ROOT, 'ARCHITECTURE.md'), encoding='utf-8') as page:
        tree = page.read().split('```')[1]
    inside = re.findall(r'^  (\S+)  ', tree, re.M)
    top = re.findall(r'^(\S+)', tree, re.M)
    assert top[0] == 'jaxgen/' and all(os.path.isdir(os.path.join(ROOT, name)) for name in top)
    entries = {file.split(os.sep)[1] + '/' * (file.count(os.sep) > 1) for file in FILES}
    assert set(inside) == entries - {'__init__.py'} and len(inside) == len(set(inside))


def data_sets(source: str) -> set[str]:
    """Data sets that a module's text names: modules of jaxgen.data that define one, and strings that are a source."""
    tree, names = ast.parse(source), {'builders', 'sources', 'folder', 'gaussians', 'shapes'}
    own = {name.partition(':')[0] for name in OWN} | {'folder', 'pairs', 'mnist', 'cifar10', 'celeb_a', 'imagenet2012'}
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body and is_docstring(node.body[0])
    }
    named = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('jaxgen.data'):
            named |= names & {*(node.module or '').split('.'), *(a.name for a in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            named |= own & {node.value.partition(':')[0]}
    return named


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


@pytest.mark.parametrize(
    'source, expected',
    [
        ('from jaxgen.data import shapes', {'shapes'}),
        ('from jaxgen.data.builders import png', {'builders'}),
        ("if section['source'] == 'gaussians:2': pass", {'gaussians'}),
        ("def f(x):\n  '''shapes'''\n  return x == 'shapes:outlined'", {'shapes'}),
        ("'''digits'''\nfrom jaxgen.data.loader import OTHER", set()),
    ],
)
def test_data_sets_of(source, expected):
    assert data_sets(source) == expected


def test_evaluation_knows_no_data_set_by_name():
    """What is known of a source beside its examples, its Spec, data.sample_metrics and data.same_test_scenes say."""
    for file in FILES:
        if file.startswith((os.path.join('jaxgen', 'evaluation'), os.path.join('jaxgen', 'metrics'))):
            with open(os.path.join(ROOT, file), encoding='utf-8') as source:
                assert not data_sets(source.read()), file


def test_a_bound_model_is_passed_whole():
    """Nothing in sampling and evaluation takes the weights of a model and its devices apart."""
    for file in FILES:
        if file.startswith(os.path.join('jaxgen', 'evaluation')) or file == os.path.join('jaxgen', 'sample.py'):
            with open(os.path.join(ROOT, file), encoding='utf-8') as source:
                functions = [n for n in ast.walk(ast.parse(source.read())) if isinstance(n, ast.FunctionDef)]
            for function in functions:
                names = {a.arg for a in (*function.args.args, *function.args.kwonlyargs)}
                assert not {'state', 'frozen', 'mesh'} <= names, f'{file}: {function.name}'
