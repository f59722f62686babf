"""Two networks, one after the other: the refiner of SDXL (Podell et al. 2023, arXiv 2307.01952, section 2.5).

The run's own network takes the steps of the sampler at high noise levels, and that of `config.stages.refiner`, another
diffusion run of the same process and latents, those below. Sampler and guidance are this run's for both; a method that
uses earlier estimates begins anew with the second. Its conditions are its own, and the stages that they read are those
of this run with the same names: its text encoders, say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import numpy as np

from jaxgen.diffusion import adapters as adapting
from jaxgen.diffusion import levels
from jaxgen.diffusion.levels import Sampler
from jaxgen.diffusion.processes import Process
from jaxgen.diffusion.samplers import Table
from jaxgen.errors import UserError

REFINER = 'refiner'  # its stage
SHARED = ('process', 'latent_scale', 'latent_shift')  # of config.model
OWN = ('network', 'training', 'conditioning')


@dataclasses.dataclass(frozen=True)
class Refining:
    """Where the network of `config.stages.refiner` goes on.

    Attributes:
      start: fraction of the process, from its noisy end, that is this run's network's: the noise levels below 1 - start
        of its time are the refiner's (denoising_end and denoising_start of diffusers).
    """

    start: Annotated[float, '(0, 1)'] = 0.8


def sections_of(family: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """config.model of the refiner's run with the sampler and the guidance of this one.

    Args:
      family: of its stage.
      given: the complete sections of config.model here.

    Raises:
      UserError: it is no diffusion run, a part of one, or of another process or other latents.
    """
    about = adapting.built_of(family)
    if about.get('family') != 'diffusion':
        raise UserError(f'config.stages.{REFINER} must be a diffusion run, whose network goes on with the sample')
    model = about['model']
    for section in ('adapter', 'controlnet'):
        if model[section]['name'] != 'none':
            raise UserError(
                f'config.stages.{REFINER} is the run of part of a network, config.model.{section}: name a whole one'
            )
    here, there = (adapting.flat_fields({name: one[name] for name in SHARED}) for one in (given, model))
    wrong = [path for path in sorted(here.keys() | there.keys()) if here.get(path) != there.get(path)]
    if wrong:
        path = wrong[0]
        raise UserError(
            f'config.stages.{REFINER} is a run of another process or other latents: config.model{path} = '
            f'{here.get(path)!r} here, {there.get(path)!r} there'
        )
    return {name: model[name] for name in (*SHARED, *OWN)} | {name: given[name] for name in ('sampler', 'guidance')}


def boundary(refining: Refining, process: Process) -> float:
    """The time of the process below which the refiner is evaluated."""
    if process.steps:
        return float(round(process.steps - refining.start * process.steps))
    return (1 - refining.start) * process.end


def tables(
    refining: Refining, process: Process, sampler: Sampler, make: Callable[[int], Sampler], by_evaluation: bool
) -> tuple[Table, Table]:
    """The tables of this network and of the refiner's.

    Args:
      sampler: which begins at the level that `editing.strength` says.
      make: (skip) -> the sampler without that many levels from the noisy end, see `levels.make`.
      by_evaluation: without that many evaluations (PNDM).

    Raises:
      UserError: no level for one of them.
    """
    least, whole = boundary(refining, process), make(0)
    times = np.asarray(whole.table['t'] if by_evaluation else whole.schedule.t)
    above = int(np.sum(times >= least))
    first = levels.ended(sampler.table, least)
    if not len(first['t']) or above == len(times):
        which = 'the refiner' if len(first['t']) else "this run's network"
        raise UserError(
            f'config.model.refiner.start = {refining.start} leaves none of {len(times)} noise levels to {which}'
        )
    return first, make(above).table
