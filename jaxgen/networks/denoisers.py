"""The networks that a diffusion model may have, by name: each maps x_t, t (and class) to a map of x_t's size.

Their own fields are sections of `config.model`, taken from the attributes of their modules.
"""

from __future__ import annotations

import dataclasses

from jaxgen.errors import UserError
from jaxgen.networks.adm import ADMUNet
from jaxgen.networks.dit import DiT
from jaxgen.networks.layers import check_groups
from jaxgen.networks.ncsnpp import EMBEDDINGS, PYRAMIDS, RESAMPLINGS, NCSNpp
from jaxgen.networks.refinenet import RefineNet
from jaxgen.networks.unet import UNet

NETWORKS = {'unet': UNet, 'adm': ADMUNet, 'ncsnpp': NCSNpp, 'dit': DiT, 'refinenet': RefineNet}
# Attributes of the networks that others decide: the data, the prediction, the shared machinery.
GIVEN = ('classes', 'out_channels', 'augment', 'sigmas', 'remat', 'dtype', 'parent', 'name')
# {network: {field that a config sets: default}}
FIELDS = {
    name: {f.name: f.default for f in dataclasses.fields(network) if f.name not in GIVEN}
    for name, network in NETWORKS.items()
}


def check_network(network: str, section: dict, image: tuple[int, int, int]) -> int:
    """What the image's height and width must be multiples of.

    Raises:
      UserError: a field of the network that cannot work with the image.
    """
    where, channels = f'config.model.{network}', section['channels']
    if channels < 4 or channels % 2:
        raise UserError(f'{where}.channels must be even and at least 4; it is {channels}')
    # Not every network has all of these fields.
    if section.get('blocks', 1) < 1:
        raise UserError(f'{where}.blocks must be at least 1; it is {section["blocks"]}')
    if not 0 <= section.get('dropout', 0) < 1:
        raise UserError(f'{where}.dropout must be in [0, 1); it is {section["dropout"]}')
    if network == 'dit':
        divisor, heads = section['patch'], section['heads']
        if divisor < 1 or heads < 1 or channels % heads or channels % 4:
            raise UserError(
                f'{where}: patch {divisor} and heads {heads} must be at least 1, and channels {channels} a multiple of '
                'heads and of 4'
            )
    elif network == 'refinenet':
        divisor = 2
        if not 1 <= section['stages'] <= 4:
            raise UserError(f'{where}.stages must be from 1 to 4; it is {section["stages"]}')
    else:
        multipliers = section['multipliers']
        if not multipliers or min(multipliers) <= 0:
            raise UserError(f'{where}.multipliers must be one or more numbers above 0; they are {multipliers}')
        # UNet and NCSNpp begin with `channels`, ADM's with those of the first level.
        widths = [int(channels * m) for m in ((1, *multipliers) if network != 'adm' else multipliers)]
        check_groups(where, section['groups'], section['group_size'], section['eps'], widths)
        patch = section.get('patch', 1)
        if patch < 1:
            raise UserError(f'{where}.patch must be at least 1; it is {patch}')
        divisor = patch * 2 ** (len(multipliers) - 1)
    for size in image[:2]:
        if size % divisor:
            raise UserError(
                f'images of {size} pixels do not fit {where}: config.data.size must be a multiple of {divisor}'
            )
    top = image[0] // section.get('patch', 1)
    sizes = [top >> level for level in range(len(section.get('multipliers', ())))]
    for size in section.get('attention', ()):
        if size not in sizes:
            raise UserError(f'{where}.attention: no level of the network has {size} rows, only {sizes}')
    if network == 'ncsnpp':
        for name, allowed in {'embedding': EMBEDDINGS, 'resampling': RESAMPLINGS, 'pyramid': PYRAMIDS}.items():
            if section[name] not in allowed:
                raise UserError(f'{where}.{name} must be one of {allowed}; it is {section[name]!r}')
    if network == 'adm':
        part = section['head_channels'] or section['heads']
        if section['head_channels'] < 0 or part < 1:
            raise UserError(f'{where}: head_channels must be 0 or more, and heads 1 or more where they are 0')
        for size, multiplier in zip(sizes, section['multipliers'], strict=True):
            if (size in section['attention'] or size == sizes[-1]) and int(channels * multiplier) % part:
                raise UserError(
                    f'{where}: {int(channels * multiplier)} channels at {size} pixels, where there is attention, must '
                    f'be a multiple of head_channels, or else of heads: {part}'
                )
    return divisor
