"""The loop of generators that translate images: layers that halve the image, and layers that double it again."""

from __future__ import annotations

from collections.abc import Callable

import jax

Array = jax.Array


def hourglass(x: Array, levels: int, down: Callable, middle: Callable, up: Callable) -> Array:
    """The result of `up` 0, whose input is that of `up` 1, and so on; of the innermost, `middle` of the last `down`.

    Args:
      x: [n, H, W, C].
      down: (i, x) -> x, layer i of `levels` towards the smallest map.
      middle: x -> x, at the smallest size.
      up: (i, x, skip) -> x, the layer back from the size after `down` i to that before it; `skip` is the input of
        `down` i.
    """
    inputs = []
    for i in range(levels):
        inputs.append(x)
        x = down(i, x)
    x = middle(x)
    for i in reversed(range(levels)):
        x = up(i, x, inputs[i])
    return x
