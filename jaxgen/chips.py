"""Accelerators by their published specifications: what a program's time is estimated with."""

from __future__ import annotations

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """The published specifications of one chip.

    Attributes:
      peak: operations a second of matrix products in bfloat16.
      float32: the same of float32 operands at JAX's default precision: TPUs round them to bfloat16, GPUs to TF32.
      memory: bytes of HBM. bandwidth: bytes a second of it.
      link: bytes a second in one direction of one link to a neighbour; of a GPU all its links together.
      wraps: length from which on an axis of the torus is closed to a ring; 0: no torus.
      network: bytes a second of one chip to other slices, or to GPUs of other nodes.
      clock: cycles a second, from the peak and the size of the matrix units; 0: not used.
      axes: of the torus. most: chips of the largest slice.
      source: where they are published.
    """

    name: str
    peak: float
    float32: float
    memory: float
    bandwidth: float
    link: float
    network: float
    clock: float
    wraps: int
    axes: int
    most: int
    source: str

    def rate(self, dtype: str, passes: int = 1) -> float:
        """Operations a second of matrix products; `passes` of bfloat16 make one of a higher precision on TPUs."""
        if self.wraps:
            return self.peak / passes
        if dtype in ('f32', 'f64'):
            return self.float32 / (2 if passes > 1 else 1)
        return self.peak


DOCS = 'cloud.google.com/tpu/docs/'
TPUS = {
    'v5e': Chip('TPU v5e', 197e12, 197e12, 16 * GIB, 819e9, 50e9, 3.125e9, 1.5e9, 16, 2, 256, DOCS + 'v5e'),
    'v5p': Chip('TPU v5p', 459e12, 459e12, 95 * GIB, 2765e9, 100e9, 6.25e9, 1.75e9, 4, 3, 6144, DOCS + 'v5p'),
    'v6e': Chip('TPU v6e', 918e12, 918e12, 32 * GIB, 1600e9, 100e9, 12.5e9, 0, 16, 2, 256, DOCS + 'v6e'),
}
DATA_SHEET = "NVIDIA's data sheet, without sparsity"
GPUS = {
    'h100': Chip('H100 SXM', 989.4e12, 494.7e12, 80e9, 3350e9, 450e9, 50e9, 0, 0, 1, 4096, DATA_SHEET),
    'h200': Chip('H200 SXM', 989.4e12, 494.7e12, 141e9, 4800e9, 450e9, 50e9, 0, 0, 1, 4096, DATA_SHEET),
}
CHIPS = {**TPUS, **GPUS}
IN_ONE_NODE = 8  # GPUs that are joined by NVLink


def group_rate(chip: Chip, places: list[tuple[int, ...]], shape: tuple[int, ...], joined: bool = True) -> float:
    """Bytes a second that each chip of a group sends in a ring.

    On a torus a group has, along each axis that it extends over, one link to send on, and two where the axis is closed
    to a ring.

    Args:
      places: coordinates of the chips of the group.
      shape: chips along each axis of the slice.
      joined: whether they are of one slice, or one node of GPUs.
    """
    if not joined:
        return chip.network
    if not chip.wraps:
        return chip.link
    links = 0
    for axis, length in enumerate(shape):
        over = len({place[axis] for place in places})
        if over > 1:
            links += 2 if over == length and length >= chip.wraps else 1
    return chip.link * max(links, 1)
