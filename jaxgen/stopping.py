"""Held-out metrics while a run trains, the best checkpoint by one of them, and when to stop.

What is known of the best is a value, `Best`, which every checkpoint holds: a resumed run has the best and the count of
an uninterrupted one. `best.json` says it to those who use the run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxgen import config as configs
from jaxgen import data, files, log, sharding
from jaxgen.errors import UserError
from jaxgen.evaluation import held_out, samples
from jaxgen.evaluation.bound import BoundModel
from jaxgen.options import near

NAME = 'best.json'


class Best(NamedTuple):
    """The best evaluation of a metric so far."""

    metric: str = ''
    examples: int = 0  # that it is of
    step: int = -1  # of the best; -1: there is none
    value: float = 0.0
    last: int = -1  # step of the last evaluation
    waited: int = 0  # evaluations since the best


def counted(best: Best, step: int, value: float, better: bool) -> Best:
    """`best` after the evaluation at a step."""
    if better:
        return best._replace(step=step, value=value, last=step, waited=0)
    return best._replace(last=step, waited=best.waited + 1)


def is_better(best: Best, value: float, larger: bool) -> bool:
    """Whether a value is better than the best so far; what is not a number never is."""
    if not np.isfinite(value):
        return False
    return best.step < 0 or (value > best.value if larger else value < best.value)


def larger_is_better(name: str, larger: Sequence[str]) -> bool:
    """Whether of a metric larger values are better: it is one of these names, or one of their parts, 'accuracy/0'."""
    return any(name == one or name.startswith(f'{one}/') for one in larger)


class HeldOut:
    """The family's own metrics on the split that training is watched on, by their names, 'validation/nll'."""

    def __init__(self, config, assembled):
        """Raises UserError where there is no such split."""
        section = config.data.to_dict()
        self.split, self.assembled, self.config = data.held_out(section), assembled, config
        self.source = assembled.dataset(self.split)
        self.n = min(config.train.held_out_examples or len(self.source), len(self.source))

    def names(self) -> list[str]:
        """The metrics' names; compiles nothing."""
        a, size = self.assembled, self.config.evaluate.batch
        return [f'{self.split}/{name}' for name in held_out.metric_names(a, sharding.round_up(a.mesh, size))]

    def evaluate(self, model: BoundModel) -> dict[str, float]:
        """{name: mean}; those that are not finite are left out, and said."""
        c = self.config
        values = held_out.map_examples(
            held_out.program(model.family), model, self.source, self.n, c.evaluate.batch, c.seed, quiet=True
        )
        metrics = {f'{self.split}/{name}': float(x.mean()) for name, x in values.items() if np.isfinite(x).all()}
        for name in values:
            if f'{self.split}/{name}' not in metrics:
                where = int(np.argmin(np.isfinite(values[name])))
                log.say(
                    f'WARNING: at step {int(model.state.step)} {name} is not finite for example {where} of the '
                    f'{self.split} split: it is left out, and is no improvement'
                )
        return metrics


def on_samples(config) -> bool:
    """Whether train.stop_on is a metric of samples."""
    return bool(config.train.stop_on) and not config.train.stop_on.startswith(('validation/', 'test/'))


def start(config, assembled, watched: HeldOut | None, evaluator) -> tuple[Best, bool]:
    """(before the first evaluation, whether larger values of the metric are better). Compiles nothing.

    Args:
      evaluator: of samples, where these are evaluated in training.

    Raises:
      UserError: the metric is none that this run has.
    """
    name = config.train.stop_on
    if not name:
        return Best(), False
    if on_samples(config):
        known, larger = (evaluator.metric_names() if evaluator else []), samples.LARGER
        examples = config.train.evaluate_samples
    else:
        assert watched is not None  # config.check_stopping
        if watched.split != 'validation':
            raise UserError(
                f'config.train.stop_on = {name!r}: {config.data.source} has no validation split: set '
                'config.data.validation_fraction, to 0.1, say, or config.data.validation_source'
            )
        known, examples = watched.names(), watched.n
        larger = tuple(f'{watched.split}/{metric}' for metric in assembled.family.larger)
    if name not in known:
        raise UserError(f'config.train.stop_on = {name!r}: this run has no such metric{near(name, known)}')
    return Best(name, examples), larger_is_better(name, larger)


def resumed(new: Best, saved: dict | None) -> Best:
    """The best so far of the run that a checkpoint with `saved`, a Best as a dict, is of; `new` where that was by
    another metric."""
    try:
        best = Best(**(saved or {}))
    except TypeError:
        best = Best()
    if best.metric and new.metric and best[:2] != new[:2]:
        log.say(f'the best so far was by {best.metric} of {best.examples} examples: the count begins anew')
    return best if best[:2] == new[:2] else new


def write(workdir: str, best: Best) -> None:
    """Writes best.json, or removes that of a best that is no more."""
    path = os.path.join(workdir, NAME)
    if best.step >= 0:
        files.save_json(path, {'step': best.step, 'metric': best.metric, 'value': best.value, 'n': best.examples})
    elif os.path.lexists(path):
        os.remove(path)


def best_step(workdir: str) -> int:
    """The step of the best checkpoint of a run.

    Raises:
      UserError: the run has none.
    """
    path = os.path.join(workdir, NAME)
    if not os.path.isfile(path):
        raise UserError(f'{workdir} has no best checkpoint: none is kept without config.train.stop_on')

    def parse(saved) -> int:
        if not isinstance(saved, dict) or type(saved.get('step')) is not int or saved['step'] < 0:
            raise ValueError('it names no step')
        return saved['step']

    return configs.parse_json(path, parse, 'name a step, --step=N')


def stop_line(best: Best, step: int, steps: int) -> str:
    """What is said where training has stopped early."""
    so_far = (
        f'the best, {best.value:.6g}, is of step {best.step} (--step=best)' if best.step >= 0 else 'it was never finite'
    )
    return (
        f'stopped early at step {step} of {steps}: {best.metric} has not improved in {best.waited} evaluations; '
        f'{so_far}; for more: a larger --config.train.patience'
    )


def count_line(best: Best, step: int, value: float, patience: int) -> str:
    """What is said of an evaluation."""
    result = f'{value:.6g}' if np.isfinite(value) else 'not finite'
    if best.step == step:
        return f'step {step}: {best.metric} = {result}, the best so far'
    of = f' of {patience}' if patience else ''
    return f'step {step}: {best.metric} = {result}, {best.waited}{of} without an improvement'
