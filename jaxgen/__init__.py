"""jaxgen: a JAX functional model zoo of generative models for images.

    run = jaxgen.load('runs/ddpm_digits')
    images = run.sample(n=16, seed=0)  # uint8 [16, H, W, C]

load(workdir)                    a trained run, see run.Run
list_configs('digits', 'vae')    the configs that there are
config(name, **overrides)        one of them with fields changed, see library.config
train(config, workdir)           the run that it makes, see library.train
import_weights(path, name, ...)  a run of published weights, see library.import_weights
published()                      the published weights that are known
metrics.frechet_distance(a, b)   and others, of arrays of images or features
testing.check_family(build)      the contract, held against a family of one's own
"""

from __future__ import annotations

import importlib
import os
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxgen.catalogue import Entry
    from jaxgen.run import Run

__version__ = '0.2.0'

# Modules that are imported at their first use, so that `import jaxgen` does not import jax.
LAZY = ('compilation', 'config', 'data', 'errors', 'files', 'metrics', 'testing', 'train')


class CallableModule(types.ModuleType):
    """A module that is also called, as the function of its name in library.py: jaxgen.config(...)."""

    def __call__(self, *args, **options):
        library = importlib.import_module('jaxgen.library')
        return getattr(library, self.__name__.rpartition('.')[2])(*args, **options)


def __getattr__(name: str):
    if name in LAZY:
        return importlib.import_module(f'jaxgen.{name}')
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY})


def load(workdir: str | os.PathLike, *, config=None, weights: str = 'ema', step: int | str | None = None) -> Run:
    """The trained run in `workdir`, ready to sample and evaluate. See `jaxgen.run.load` and `jaxgen.run.Run`.

    Args:
      config: fields that differ from the saved ones, {'model': {'sampler': 'ddim'}}: such as training does not depend
        on, and paths that have changed.
      weights: 'ema', 'params', or the width of an average that was kept, '0.07'.
      step: of the checkpoint, one of those that were kept; 'best', by config.train.stop_on; None: the newest.
    """
    from jaxgen import files
    from jaxgen.run import load as load_run

    return load_run(files.as_path(workdir, 'workdir'), config=config, weights=weights, step=step)


def list_configs(*words: str) -> list[Entry]:
    """The configs that come with jaxgen, of which each has all the words in its line or title: an Entry with `name`,
    `family`, `data`, `size`, `time`, `variants` and `title`, all texts."""
    from jaxgen import catalogue

    return catalogue.entries([str(word) for word in words])


def import_weights(
    path: str | os.PathLike,
    *,
    name: str = '',
    config=None,
    workdir: str | os.PathLike = '',
    names: str = '',
    discriminator: str | os.PathLike = '',
    tokenizer: str | os.PathLike = '',
) -> Run:
    """The run that holds published weights, which is made in `workdir`. See `jaxgen.library.import_weights`."""
    from jaxgen import library

    return library.import_weights(
        path,
        name=name,
        config=config,
        workdir=workdir,
        names=names,
        discriminator=discriminator,
        tokenizer=tokenizer,
    )


def published() -> tuple:
    """Published weights that the zoo can take, each with `name`, `config`, `names`, `where`, `licence`, `sha256`."""
    from jaxgen.weights.published import PUBLISHED

    return PUBLISHED
