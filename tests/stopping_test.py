"""Held-out metrics in training, the best checkpoint and early stopping, on a family whose metric is known by step."""

from __future__ import annotations

import dataclasses
import json
import os
import types

import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_same, metrics, mistake, path, saved_state, tiny

from jaxgen import config as configs
from jaxgen import directory, run, stopping
from jaxgen import train as loop
from jaxgen.assembly import assemble
from jaxgen.contract import Aux, Family, make_update, new_state
from jaxgen.errors import RunError, UserError

# By step, every second of which is evaluated: 5, 4, 3 (the best), 3 (no better), 6, 2.5 (better), ...
CURVE = [0, 9, 5, 0, 4, 0, 3, 0, 3, 0, 6, 9, 2.5, 0, 4, 0, 4, 0, 4, 0, 4]


def make(curve=CURVE, larger=()):
    """assemble() with one weight that gradient descent moves to the mean pixel, and a metric that follows `curve`."""

    def assembled(config, *args, **kwargs):
        a = assemble(config, *args, **kwargs)
        optim = loop_optim(config)

        def loss(params, state, frozen, batch, rng):
            value = jnp.square(batch['image'].mean() - params['net']['w']).sum()
            return value, Aux({'loss': value})

        def init(rng, batch, frozen):
            return new_state({'net': {'w': jnp.ones(3)}}, optim)

        def evaluate(state, frozen, batch, rng):
            n = len(batch['image'])
            return {
                'curve': jnp.full(n, jnp.asarray(curve, jnp.float32)[state.step]),
                'pixel': batch['image'].mean((1, 2, 3)),
            }

        family = Family(init, make_update(loss, optim, 'net'), None, evaluate, image=a.family.image, larger=larger)
        return dataclasses.replace(a, family=family)

    return assembled


def loop_optim(config):
    from jaxgen import optim

    return optim.make_optim(config.train.steps, batch=config.data.batch, **config.optim.to_dict())


def config_of(**train):
    fields = {'steps': 20, 'save_every': 3, 'keep': 1, 'log_every': 4, 'held_out_every': 2, 'patience': 2}
    return tiny(
        'vae_digits',
        data={'validation_fraction': 0.1, 'batch': 4},
        train={**fields, 'stop_on': 'validation/curve', **train},
    )


def best_of(workdir) -> dict:
    with open(os.path.join(workdir, 'best.json'), encoding='utf-8') as file:
        return json.load(file)


def kept(workdir) -> list[int]:
    return sorted(map(int, filter(str.isdigit, os.listdir(os.path.join(workdir, 'checkpoints')))))


def state_of(workdir):
    """The newest State, as the family above has it."""
    from jaxgen.checkpoint import Checkpoints

    a = loop.assemble(directory.saved_config(str(workdir)))
    checkpoints = Checkpoints(str(workdir))
    state, about = checkpoints.restore(a.abstract, a.mesh)
    checkpoints.close()
    return state, about


@pytest.fixture
def curve(monkeypatch):
    monkeypatch.setattr(loop, 'assemble', make())


def test_stops_where_the_curve_says(curve, tmp_path, capfd):
    workdir = str(tmp_path / 'run')
    loop.train(config_of(), workdir)
    # 3 at step 6 is the best; at 8 it is no smaller, at 10 neither: patience is 2. The newest and the best are kept.
    assert kept(workdir) == [6, 10]
    state, about = state_of(workdir)
    assert int(state.step) == 10
    assert about['best'] == {
        'metric': 'validation/curve',
        'examples': 144,
        'step': 6,
        'value': 3.0,
        'last': 10,
        'waited': 2,
    }
    assert best_of(workdir) == {'step': 6, 'metric': 'validation/curve', 'value': 3.0, 'n': 144}
    assert stopping.best_step(workdir) == 6
    said = capfd.readouterr().err
    assert 'stopped early at step 10 of 20: validation/curve has not improved in 2 evaluations' in said
    assert 'the best, 3, is of step 6 (--step=best)' in said
    lines = metrics(workdir)
    assert [(line['step'], line['validation/curve']) for line in lines if 'validation/curve' in line] == [
        (step, CURVE[step]) for step in (2, 4, 6, 8, 10)
    ]

    before = state, lines
    loop.train(config_of(), workdir)  # it is finished
    said = capfd.readouterr().err
    assert 'stopped early at step 10 of 20' in said and kept(workdir) == [6, 10]
    assert_same(state_of(workdir)[0], before[0])
    assert metrics(workdir) == before[1]
    loop.train(config_of(steps=40), workdir)  # more steps are no reason to go on
    assert kept(workdir) == [6, 10]

    loop.train(config_of(patience=4), workdir)  # 2.5 at step 12; 14 to 20 are no better
    assert stopping.best_step(workdir) == 12 and kept(workdir) == [12, 20]
    whole = str(tmp_path / 'whole')
    loop.train(config_of(patience=4), whole)
    assert_same(state_of(workdir), state_of(whole))
    assert metrics(workdir) == metrics(whole) and best_of(workdir) == best_of(whole) and kept(whole) == kept(workdir)


def test_larger_values_of_a_metric_may_be_better(monkeypatch, tmp_path):
    monkeypatch.setattr(loop, 'assemble', make(larger=('curve',)))
    workdir = str(tmp_path)
    loop.train(config_of(patience=3), workdir)  # 5 at step 2, then 4, 3, 3
    assert stopping.best_step(workdir) == 2 and int(state_of(workdir)[0].step) == 8
    assert stopping.larger_is_better('validation/accuracy/0', ('validation/accuracy',))
    assert not stopping.larger_is_better('validation/accuracy_error', ('validation/accuracy',))


def test_stops_on_a_metric_of_samples(monkeypatch, tmp_path, capfd):
    """Kept and counted as those of validation examples, in the checkpoint that they precede."""
    known = ['frechet/net', 'precision/net']
    evaluator = types.SimpleNamespace(check=lambda n: None, reference=None, metric_names=lambda: known)
    made = make()

    def assembled(*args, **kwargs):
        a = made(*args, **kwargs)
        return dataclasses.replace(a, family=a.family._replace(sample=lambda *args: None))

    monkeypatch.setattr(loop, 'assemble', assembled)
    monkeypatch.setattr(loop, 'make_evaluator', lambda *args: evaluator)
    monkeypatch.setattr(loop.Training, 'grid', lambda self: None)
    evaluated = []

    def evaluate(self, evaluator):
        evaluated.append(self.step)
        return {'frechet/net': CURVE[self.step], 'precision/net': -CURVE[self.step]}

    monkeypatch.setattr(loop.Training, 'evaluate', evaluate)
    fields = {'held_out_every': 0, 'evaluate_every': 2, 'stop_on': 'precision/net'}  # the larger the better
    changed = {'train': fields, 'evaluate': {'features': 'run:x'}}
    config = configs.make(**configs.deep_update(config_of().to_dict(), changed))
    workdir = str(tmp_path)
    loop.train(config, workdir)
    assert evaluated == [2, 4, 6, 8, 10] and stopping.best_step(workdir) == 6 and kept(workdir) == [6, 10]
    assert best_of(workdir) == {'step': 6, 'metric': 'precision/net', 'value': -3.0, 'n': 2000}
    loop.train(config, workdir)
    assert evaluated == [2, 4, 6, 8, 10], 'a finished run was evaluated again'
    assert [line['step'] for line in metrics(workdir) if 'frechet/net' in line] == evaluated
    config.train.stop_on = 'frechet/nets'
    with pytest.raises(UserError, match='no such metric; did you mean frechet/net'):
        loop.train(config, workdir)


class Killed(BaseException):
    """Ends the process as a kill would, but that the test goes on."""


def killed(step: int, where: str):
    """(object, method, the method that kills the process at a step): before its call or, with '+', after it."""
    name, after = where.rstrip('+'), where.endswith('+')
    owner = stopping.HeldOut if name == 'evaluate' else loop.Training
    method = getattr(owner, name)

    def kill(self, *args, **kwargs):
        value = method(self, *args, **kwargs) if after else None
        if (int(args[0].state.step) if name == 'evaluate' else self.step) == step:
            if name != 'evaluate':
                self.checkpoints.wait()  # a process that is killed has no thread that goes on saving
            raise Killed('here')
        return value if after else method(self, *args, **kwargs)

    return owner, name, kill


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ('step', 'where'),
    [
        (6, 'evaluate'),  # before the best is known
        (6, 'save+'),  # its checkpoint is there, best.json is not
        (10, 'count'),  # in the evaluation that ends the training
        (10, 'report'),  # after it
        *(pytest.param(6, where, marks=SLOW) for where in ('count', 'count+', 'write', 'write+', 'save', 'write_best')),
        *(pytest.param(10, where, marks=SLOW) for where in ('evaluate', 'count+', 'save', 'save+', 'report+')),
        *(pytest.param(8, where, marks=SLOW) for where in ('evaluate', 'count', 'count+', 'write', 'write+')),
    ],
)
def test_killed_in_an_evaluation_and_at_the_stop(step, where, curve, tmp_path, monkeypatch, uninterrupted):
    """6 is the best and a multiple of save_every, at 10 the training stops."""
    with monkeypatch.context() as patch:
        patch.setattr(*killed(step, where))
        with pytest.raises(Killed):
            loop.train(config_of(), str(tmp_path))
    check_equal(tmp_path, uninterrupted)


def test_fault_in_an_evaluation_saves_first(curve, tmp_path, monkeypatch, uninterrupted):
    def fail(self, model):
        raise OSError('the data are gone')

    with monkeypatch.context() as patch:
        patch.setattr(stopping.HeldOut, 'evaluate', fail)
        with pytest.raises(RunError, match='the data are gone'):
            loop.train(config_of(), str(tmp_path))
    assert kept(tmp_path) == [2]  # of the first evaluation, and no multiple of save_every
    check_equal(tmp_path, uninterrupted)


def check_equal(workdir, uninterrupted) -> None:
    """The run goes on, and is what it would have been."""
    loop.train(config_of(), str(workdir))
    assert_same(state_of(workdir), state_of(uninterrupted))
    assert metrics(workdir) == metrics(uninterrupted)
    assert best_of(workdir) == best_of(uninterrupted) and kept(workdir) == kept(uninterrupted)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp('uninterrupted'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, 'assemble', make())
        loop.train(config_of(), workdir)
    return workdir


def test_metrics_that_are_not_finite_are_no_improvement(monkeypatch, tmp_path, capfd):
    curve = [0, 0, np.inf, 0, 5, 0, np.nan, 0, -np.inf, 0, 4]
    monkeypatch.setattr(loop, 'assemble', make(curve))
    workdir = str(tmp_path)
    loop.train(config_of(steps=10, patience=3), workdir)
    assert best_of(workdir)['step'] == 10 and best_of(workdir)['value'] == 4
    values = {line['step']: line.get('validation/curve') for line in metrics(workdir) if 'validation/pixel' in line}
    assert values == {2: None, 4: 5, 6: None, 8: None, 10: 4}
    assert 'at step 6 curve is not finite for example 0 of the validation split' in capfd.readouterr().err


def test_another_metric_begins_anew(curve, tmp_path, capfd):
    workdir = str(tmp_path)
    loop.train(config_of(steps=8, patience=0), workdir)
    assert stopping.best_step(workdir) == 6
    loop.train(config_of(steps=10, patience=0, stop_on='validation/pixel'), workdir)
    assert 'the best so far was by validation/curve of 144 examples: the count begins anew' in capfd.readouterr().err
    assert best_of(workdir)['metric'] == 'validation/pixel' and best_of(workdir)['step'] == 8  # all are equal
    loop.train(config_of(steps=12, patience=0, stop_on='', held_out_every=0), workdir)
    assert not os.path.exists(tmp_path / 'best.json')


def test_validation_changes_no_update_and_is_what_evaluate_says(tmp_path, capfd):
    """Of a real family, whose metrics are random estimates."""
    fields = {'data': {'validation_fraction': 0.1}, 'evaluate': {'examples': 0}}
    plain, watched = str(tmp_path / 'plain'), str(tmp_path / 'watched')
    loop.train(tiny('vae_digits', **fields, train={'save_every': 4}), plain)
    intervals = {'save_every': 4, 'held_out_every': 2, 'stop_on': 'validation/kl'}
    called = []
    config = tiny('vae_digits', **fields, train=intervals)
    loop.train(config, watched, callbacks=[lambda step, logs, run: called.append((step, *logs))])
    assert_same(saved_state(plain, 4), saved_state(watched, 4))
    lines = metrics(watched)
    assert [line for line in lines if 'loss' in line] == metrics(plain)
    (newest,) = [line for line in lines if line['step'] == 4 and 'validation/nll_elbo' in line]
    trained = run.load(watched, config={'evaluate': {'held_out': 'validation'}})
    evaluated = trained.evaluate()
    assert {f'validation/{name}' for name in evaluated} == newest.keys() - {'step', 'examples'}
    for name, metric in evaluated.items():
        assert metric['n'] == 144
        np.testing.assert_allclose(metric['value'], newest[f'validation/{name}'], rtol=1e-6)
    assert evaluated != run.load(watched).evaluate()  # on the test split
    kl = {line['step']: line['validation/kl'] for line in lines if 'validation/kl' in line}
    best = min(kl, key=kl.get)
    assert list(kl) == [2, 4] and run.load(watched, step='best').step == best and best_of(watched)['value'] == kl[best]
    assert [names[0] for names in called if 'validation/kl' in names] == [2, 4]
    assert [names[0] for names in called if 'loss' in names] == [1, 2, 3, 4]
    capfd.readouterr()
    assert 'none is kept without config.train.stop_on' in mistake(
        capfd, '--mode=sample', f'--workdir={plain}', '--step=best'
    )


def test_without_a_validation_split_the_test_split_is_logged(curve, tmp_path):
    config = tiny('vae_digits', train={'steps': 2, 'held_out_every': 2, 'held_out_examples': 7})
    loop.train(config, str(tmp_path))
    (line,) = [line for line in metrics(tmp_path) if 'test/curve' in line]
    assert line == {'step': 2, 'examples': 16, 'test/curve': 5.0, 'test/pixel': line['test/pixel']}
    from jaxgen import data

    x = data.dataset(config.data, 'test').take(np.arange(7))['image'] / 127.5 - 1
    np.testing.assert_allclose(line['test/pixel'], x.mean(), rtol=1e-5)


FOUR = dict.fromkeys(('train.updates_per_call', 'train.save_every', 'train.log_every'), 4)
FIELDS = {
    'data.validation_fraction': 0.1,
    'train.held_out_every': 2,
    'train.stop_on': 'validation/kl',
    'train.patience': 2,
}


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'train.stop_on': 'validation/klx'}, 'this run has no such metric; did you mean validation/kl'),
        ({'train.stop_on': 'kl'}, 'must be validation/NAME, of the family, or METRIC/NETWORK, of samples'),
        ({'train.stop_on': 'test/kl'}, 'hold validation examples out'),
        ({'train.stop_on': ''}, 'config.train.patience = 2 needs config.train.stop_on'),
        ({'train.held_out_every': 0}, 'needs config.train.held_out_every'),
        ({'train.stop_on': 'frechet/x'}, 'needs config.train.evaluate_every'),
        ({'data.validation_fraction': 0}, 'has no validation split: set config.data.validation_fraction'),
        ({'data.validation_fraction': 1}, r'config.data.validation_fraction must be in [0, 1)'),
        ({'data.test_source': 'digit'}, "config.data.test_source: no source 'digit'"),
        (
            dict.fromkeys(('train.updates_per_call', 'train.save_every', 'train.log_every'), 4),
            'train.held_out_every = 2 must be a multiple of',
        ),
    ],
)
def test_mistakes(fields, message, capfd, tmp_path, no_compile):
    args = [f'--config.{name}={value}' for name, value in {**FIELDS, **fields}.items()]
    assert message in mistake(capfd, f'--config={path("vae_digits")}', f'--workdir={tmp_path / "run"}', *args)
