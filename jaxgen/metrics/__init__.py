"""Metrics. Of arrays of images or features, from jaxgen/metrics/arrays.py:

    run = jaxgen.load('runs/classifier_digits')
    jaxgen.metrics.frechet_distance(samples, images, features=run)
    jaxgen.metrics.clip_score(samples, captions, features='runs/clip_shapes')
    jaxgen.metrics.kernel_distance(samples, images, features='pt_inception-2015-12-05-6726825d.pth')  # KID

and of the statistics that an evaluation gathers, in the other modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxgen.metrics.arrays import (
        clip_distance,
        clip_score,
        extract,
        frechet_distance,
        inception_score,
        kernel_distance,
        neighbourhood,
        r_precision,
    )

__all__ = [
    'clip_distance',
    'clip_score',
    'extract',
    'frechet_distance',
    'inception_score',
    'kernel_distance',
    'neighbourhood',
    'r_precision',
]


def __getattr__(name: str):
    if name in __all__:
        from jaxgen.metrics import arrays  # at the first use: it imports jax

        return getattr(arrays, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
