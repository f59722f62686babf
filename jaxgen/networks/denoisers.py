"""The networks that a diffusion model may have, by name: each maps x_t, its time and its conditions to a map of x_t's
size.

Their fields are `config.model.network`, the attributes of their modules. A network is used as the pair `Network(init,
apply)`, which adapters wrap: functions Network -> Network.

One of a person's own is named by its dotted path: a linen module with __call__(x, t, *, vector=None, tokens=None,
train=False), of which vector and tokens are given where there are such conditions. `out_channels`, `dtype` and `remat`
are set where it has such attributes; the image's sides must be multiples of an attribute `divisor` of the class.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxgen.checks import size_text
from jaxgen.contract import Context
from jaxgen.diffusion import conditioning as conditions
from jaxgen.diffusion.conditioning import Conditioning, Embeddings, Values
from jaxgen.errors import UserError
from jaxgen.imports import OwnToo, is_dotted
from jaxgen.networks.adm import ADMUNet
from jaxgen.networks.dit import DiT
from jaxgen.networks.latent_unet import LatentUNet
from jaxgen.networks.layers import check_groups
from jaxgen.networks.mmdit import Flux, MMDiT
from jaxgen.networks.ncsnpp import NCSNpp
from jaxgen.networks.refinenet import RefineNet
from jaxgen.networks.unet import UNet
from jaxgen.options import Component, own_fields
from jaxgen.randomness import stream

Array = jax.Array

NETWORKS = OwnToo(
    {
        'unet': UNet,
        'adm': ADMUNet,
        'ncsnpp': NCSNpp,
        'dit': DiT,
        'refinenet': RefineNet,
        'latent_unet': LatentUNet,
        'mmdit': MMDiT,
        'flux': Flux,
    }
)
# Attributes of the networks that others decide: the prediction, the process, the shared machinery.
GIVEN = ('out_channels', 'levels', 'sigmas', 'remat', 'dtype')
COMPONENT = Component(NETWORKS, omit=GIVEN)
TRANSFORMERS = ('dit', 'mmdit', 'flux')


class Network(NamedTuple):
    """A network with its conditions: what LoRA and ControlNet wrap."""

    init: Callable  # (rng, x, values) -> params
    apply: Callable  # (params, x, t, embeddings, *, train=False, rngs=None) -> output like x


def make_module(section: dict, shape: tuple[int, ...], out_channels: int, context: Context, **given: Any) -> Any:
    """The linen module of a complete section {'name': ..., its fields}.

    Args:
      shape: (height, width, channels) of x, without conditions.
      given: attributes that the process decides.

    Raises:
      UserError: a field that does not go with the others or with the shape.
    """
    section = at_size(section, shape, context)
    check_network(section, shape)
    made = NETWORKS[section['name']]
    given |= dict(out_channels=out_channels, remat=context.remat, dtype=context.dtype)
    if is_dotted(section['name']):  # a person's own has those of these attributes that it reads
        given = {name: value for name, value in given.items() if name in getattr(made, '__dataclass_fields__', {})}
    return made(**own_fields(section), **given)


def at_size(section: dict, shape: tuple[int, ...], context: Context) -> dict:
    """A section with attention at the same levels as in training, where images are of another size."""
    if not (context.trained and section.get('attention')) or is_dotted(section['name']):
        return section
    patch, levels = section.get('patch', 1), range(len(section['multipliers']))
    here = shape[0] // patch
    there = shape[0] * context.trained[0] // context.image[0] // patch
    heights = tuple(here >> level for level in levels if there >> level in section['attention'])
    return {**section, 'attention': heights}


def bind(module: nn.Module, conditioning: Conditioning) -> Network:
    """The network of a module and its conditions; parameters of the conditions' embeddings lie among the module's."""

    def apply(params: Any, x: Array, t: Array, embeddings: Embeddings, *, train: bool = False, rngs: Any = None):
        inputs, others = with_planes(x, embeddings)
        return module.apply({'params': params}, inputs, t, **others, train=train, rngs=rngs)

    def init(rng: Array, x: Array, values: Values) -> Any:
        embedded = conditions.init(conditioning, stream(rng, 'conditions'), values)
        inputs, others = with_planes(x, conditions.embed(conditioning, embedded, values, x))
        params = dict(module.init(rng, inputs, jnp.zeros(len(x)), **others, train=False)['params'])
        if taken := sorted(params.keys() & embedded.keys()):
            raise UserError(f'config.model.conditioning.{taken[0]}: the network has a layer of that name, take another')
        return params | embedded

    return Network(init, apply)


def with_planes(x: Array, embeddings: Embeddings) -> tuple[Array, Embeddings]:
    """x with the planes behind its channels, and the other embeddings."""
    others = {part: value for part, value in embeddings.items() if part != 'planes'}
    return jnp.concatenate([x, embeddings['planes']], -1) if 'planes' in embeddings else x, others


def tokens_of(section: dict, shape: tuple[int, ...]) -> int:
    """The number of patches of x [*shape] that a transformer reads as tokens; 0 of other networks."""
    if section['name'] not in TRANSFORMERS:
        return 0
    return math.prod(side // section['patch'] for side in shape[:2])


def divisor_of(section: dict) -> int:
    """Number of which an image's height and width must be multiples, for a complete section."""
    if is_dotted(section['name']):
        return getattr(NETWORKS[section['name']], 'divisor', 1)
    if section['name'] in TRANSFORMERS:
        return section['patch']
    if section['name'] == 'refinenet':
        return 2
    if section['name'] == 'latent_unet':
        return 1
    return section.get('patch', 1) * 2 ** (len(section['multipliers']) - 1)


def check_network(section: dict, shape: tuple[int, ...], where: str = 'config.model.network') -> None:
    """Raises UserError where fields of a network do not go with each other or with what it is applied to.

    Args:
      section: complete, {'name': ..., its fields}.
      shape: (height, width, channels).
    """
    name, divisor = section['name'], divisor_of(section)
    if shape[0] % divisor or shape[1] % divisor:
        raise UserError(
            f'images of {size_text(shape)} pixels do not fit {where}: config.data.size must be a multiple of {divisor}'
        )
    if name in TRANSFORMERS:
        check_transformer(name, section, shape, where)
    if 'multipliers' in section and not is_dotted(name):
        check_levels(name, section, shape[0] // section.get('patch', 1), where)


def check_transformer(name: str, section: dict, shape: tuple[int, ...], where: str) -> None:
    """Raises UserError where widths, heads and depths of a transformer do not go together."""
    channels, heads = section['channels'], section['heads']
    if channels % heads:
        raise UserError(f'{where}: channels {channels} must be a multiple of heads {heads}')
    if name == 'flux' and (sum(section['axes']) != channels // heads or any(n % 2 for n in section['axes'])):
        raise UserError(
            f'{where}.axes: three even numbers whose sum is channels / heads = {channels // heads}; they are '
            f'{section["axes"]}'
        )
    if name != 'mmdit':
        return
    if section['dual'] >= section['blocks']:
        raise UserError(f'{where}.dual must be less than blocks, {section["blocks"]}; it is {section["dual"]}')
    rows = max(shape[:2]) // section['patch']
    if rows > section['largest']:
        raise UserError(f'{where}.largest must be at least the {rows} patches of a side; it is {section["largest"]}')


def check_levels(name: str, section: dict, top: int, where: str) -> None:
    """Raises UserError where widths, heads or attention do not go with a U-Net's resolution levels.

    Args:
      top: height of the first level.
    """
    channels, multipliers = section['channels'], section['multipliers']
    # UNet and NCSNpp begin with `channels`, ADM's with those of the first level.
    like_adm = name in ('adm', 'latent_unet')
    widths = [int(channels * m) for m in (multipliers if like_adm else (1, *multipliers))]
    check_groups(where, section['groups'], section['group_size'], section['eps'], widths)
    sizes = [top >> level for level in range(len(multipliers))]
    for size in section['attention']:
        if size not in sizes:
            raise UserError(f'{where}.attention: no level of the network has {size} rows, only {sizes}')
    if name == 'latent_unet':
        check_depths(section, widths, where)
    if name != 'adm':
        return
    part = section['head_channels'] or section['heads']
    for size, multiplier in zip(sizes, multipliers, strict=True):
        if (size in section['attention'] or size == sizes[-1]) and int(channels * multiplier) % part:
            raise UserError(
                f'{where}: {int(channels * multiplier)} channels at {size} pixels, where there is attention, must '
                f'be a multiple of head_channels, or else of heads: {part}'
            )


def check_depths(section: dict, widths: list[int], where: str) -> None:
    """Raises UserError where the transformers of a latent U-Net do not go with its levels."""
    depths, part = (*section['depths'], section['middle_depth']), section['head_channels'] or section['heads']
    if len(section['depths']) != len(widths):
        raise UserError(f'{where}.depths must be {len(widths)} numbers, as multipliers; they are {section["depths"]}')
    if section['attention']:
        raise UserError(f'{where}.attention: this network has transformers by depths; it must be ()')
    for depth, width in zip(depths, (*widths, widths[-1]), strict=True):
        if depth and width % part:
            raise UserError(
                f'{where}: the {width} channels of a level with a transformer must be a multiple of head_channels, or '
                f'else of heads: {part}'
            )
