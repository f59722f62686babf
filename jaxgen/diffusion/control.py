"""ControlNets beside the network of a diffusion model (Zhang et al. 2023, arXiv 2302.05543).

One is trained with `config.stages.base`, whose network stays as it is, and `config.model.controlnet`. In sampling every
stage that is such a run adds to the maps of the network too, several of them their sum, each by the numbers of its
section in `config.model.control`, that of the run itself under the name 'own'.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxgen.contract import Context, Input
from jaxgen.diffusion import adapters as adapting
from jaxgen.diffusion import conditioning as conditions
from jaxgen.diffusion.adapters import BASE
from jaxgen.diffusion.conditioning import Condition, Conditioning, Embeddings, Values
from jaxgen.errors import UserError
from jaxgen.networks.controlnet import ControlNet, hint_size
from jaxgen.networks.denoisers import Network
from jaxgen.networks.latent_unet import LatentUNet
from jaxgen.options import TRACED, Component, Count, Fraction, OneOf, PartialFields
from jaxgen.randomness import stream

Array = jax.Array

CONTROL = 'control'  # the network of `State`; among weights and embeddings, those of all ControlNets
OWN = 'own'  # in the section of scales, the run's own ControlNet


def controlnet(
    *,
    condition: str = 'edges',
    hint: Annotated[tuple[int, ...], '[1, inf)'] = (16, 32, 96, 256),
    image_channels: Count = 3,
    order: Annotated[str, OneOf('rgb', 'bgr')] = 'rgb',
    global_pool: bool = False,
    depths: Annotated[tuple[int, ...], '[0, inf)'] = (),
    middle_depth: Annotated[int, '[-1, inf)'] = -1,
) -> None:
    """A ControlNet of the latent U-Net of `config.stages.base`.

    Args:
      condition: the image of the batch that it reads, in `config.data.features`.
      hint: channels of the convolutions of this image; each but the first halves it, down to the size of the latents.
      image_channels: of the image that they read; one of one channel is repeated.
      order: of the image's channels, 'rgb' or, where the network was trained on them the other way round, 'bgr'.
      global_pool: what it adds is the mean over all pixels, and nothing without the conditions that guidance leaves out
        (the ControlNet of shuffled images).
      depths, middle_depth: of its transformers; () and -1: those of the U-Net, whose weights it starts from.
    """


COMPONENT = Component({'none': None, 'latent_unet': controlnet})


@dataclasses.dataclass(frozen=True)
class Control:
    """A ControlNet in sampling.

    Attributes:
      scale: of what it adds.
      start, end: fractions of the steps between which it adds something.
      guess: it adds nothing where guidance leaves conditions out, and little at fine resolutions: for sampling without
        a prompt (guess mode).
    """

    scale: Annotated[float, TRACED] = 1.0
    start: Annotated[Fraction, TRACED] = 0.0
    end: Annotated[Fraction, TRACED] = 1.0
    guess: bool = False


SECTION = PartialFields(Control)


class Net(NamedTuple):
    """A ControlNet of a model."""

    name: str  # OWN or its stage
    condition: str  # the image of the batch
    module: ControlNet
    control: Control

    @property
    def own(self) -> bool:
        return self.name == OWN

    @property
    def numbers(self) -> str:
        """Name in a batch of what `Control` says, [n, 3]: scale, and the interval of times."""
        return f'{CONTROL}/{self.name}'

    @property
    def left_out(self) -> bool:
        """Whether it adds nothing where guidance leaves conditions out."""
        return self.control.guess or self.module.global_pool


def section_of(family: Any) -> dict[str, Any]:
    """The section `controlnet` of a stage; {} where it is no run of a ControlNet."""
    about = adapting.built_of(family)
    section = about.get('model', {}).get('controlnet', {}) if about.get('family') == 'diffusion' else {}
    return section if section.get('name', 'none') != 'none' else {}


def is_controlnet(config: Mapping[str, Any]) -> bool:
    """Whether the run of a saved config holds a ControlNet alone."""
    section = config['model'].get('controlnet', {}) if config['family'] == 'diffusion' else {}
    return section.get('name', 'none') != 'none'


def controlnet_of(sections: dict[str, Any], run: str) -> dict[str, Any]:
    """What the config of a ControlNet has over that of its base: the recipe of Zhang et al. 2023 (AdamW, rate 1e-5,
    half of the captions left out), by the edges of images."""
    texts = {name: {'dropout': 0.5} for name, own in sections['model']['conditioning'].items() if own['kind'] == 'text'}
    features = tuple(dict.fromkeys((*sections['data']['features'], 'edges')))
    return {
        'stages': {BASE: run},
        'model': {'controlnet': {'name': 'latent_unet'}, 'conditioning': texts},
        'data': {'batch': 4, 'features': features},
        'optim': {'name': 'adamw', 'lr': 1e-5, 'weight_decay': 1e-2, 'ema': 0.0},
        'train': {'steps': 50_000, 'save_every': 1000, 'sample_every': 1000, 'samples': 16},
    }


def bind(
    context: Context, network: Any, model: Mapping[str, Any], section: Mapping[str, Any], control: Mapping[str, Any]
) -> tuple[Net, ...]:
    """The ControlNets of a model: its own first, then those of its stages.

    Args:
      network: the module that is controlled.
      model: complete config.model.
      section: complete config.model.controlnet.
      control: config.model.control.

    Raises:
      UserError: no base, or another one, another network than a latent U-Net, a control without a ControlNet.
    """
    own = {OWN: section} if section['name'] != 'none' else {}
    if own and BASE not in context.stages:
        raise UserError(
            f'config.model.controlnet needs config.stages.{BASE}, the diffusion run whose network it controls: '
            '--config=RUN:controlnet names it and takes its model'
        )
    if own and adapting.adapter_of(context.stages[BASE]).get('name', 'none') != 'none':
        raise UserError(
            f'config.stages.{BASE} is the run of an adapter: make one run of it and its base with --mode=merge, and '
            'name that'
        )
    staged = {name: section for name, family in context.stages.items() if (section := section_of(family))}
    if BASE in staged:
        raise UserError(f'config.stages.{BASE} is the run of a ControlNet: name the run whose network that controls')
    if OWN in staged:
        raise UserError(f"config.stages.{OWN}: this is the name of a run's own ControlNet: take another")
    every = own | staged
    for name, one in control.items():
        if name not in every:
            raise UserError(
                f'config.model.control.{name}: this run has no ControlNet of its own'
                if name == OWN
                else f'config.model.control.{name} needs config.stages.{name}, the run of a ControlNet'
            )
        if one.get('start', 0.0) > one.get('end', 1.0):
            raise UserError(f'config.model.control.{name}.start must be at most end, {one.get("end", 1.0)}')
    if every and not isinstance(network, LatentUNet):
        raise UserError(
            f"ControlNets are for config.model.network.name = 'latent_unet'; it is {type(network).__name__}"
        )
    for name in (*staged, *([BASE] if own else [])):
        adapting.check_same(model, context.stages[name], name)
    return tuple(
        Net(name, one['condition'], module_of(network, one), Control(**control.get(name, {})))
        for name, one in every.items()
    )


def module_of(network: LatentUNet, section: Mapping[str, Any]) -> ControlNet:
    """The ControlNet of a network by its complete section.

    Raises:
      UserError: another number of levels.
    """
    fields = {f.name: getattr(network, f.name) for f in dataclasses.fields(network) if f.name not in ('parent', 'name')}
    given = {name: section[name] for name in ('hint', 'image_channels', 'order', 'global_pool')}
    given['hint'] = tuple(given['hint'])  # JSON has lists
    if not given['hint']:
        raise UserError('config.model.controlnet.hint must be one number or more, (16, 32, 96, 256)')
    if section['depths']:
        if len(section['depths']) != len(network.multipliers):
            raise UserError(
                f'config.model.controlnet.depths must be {len(network.multipliers)} numbers, one for each level of the '
                f'network; they are {section["depths"]}'
            )
        given['depths'] = tuple(section['depths'])
    if section['middle_depth'] >= 0:
        given['middle_depth'] = section['middle_depth']
    return ControlNet(**fields | given)


# --- what goes into the network


def conditioning_of(nets: Sequence[Net], shape: tuple[int, ...]) -> Conditioning:
    """The conditions that the ControlNets read: {'image': [n, h, w, c], 'numbers': [n, 3]} each, {} of one that adds
    nothing.

    Args:
      shape: (height, width, channels) of x.
    """

    def make(net: Net) -> Condition:
        def compute(frozen: Any, batch: dict[str, Array], train: bool) -> dict[str, Array]:
            if net.own and net.condition not in batch:
                raise UserError(f'config.model.controlnet.condition needs {net.condition!r} in config.data.features')
            if net.condition not in batch or not (net.own or net.numbers in batch):
                return {}
            image = batch[net.condition]
            check_image(net, image.shape[1:], shape)
            everywhere = jnp.broadcast_to(jnp.array([1.0, -jnp.inf, jnp.inf], jnp.float32), (len(image), 3))
            return {'image': image, 'numbers': batch.get(net.numbers, everywhere)}

        def null(value: dict[str, Array]) -> dict[str, Array]:
            if not (value and net.left_out):
                return value
            return value | {'numbers': value['numbers'] * jnp.array([0.0, 1.0, 1.0])}

        def embed(value: dict[str, Array], x: Array) -> dict[str, Any]:
            return {CONTROL: {net.name: value}} if value else {}

        absent = None if net.own else lambda n: {}
        made = Condition(net.numbers, '', None, embed, null, 0.0, absent, optional=True, compute=compute)
        return made._replace(left_out=net.left_out)

    return tuple(make(net) for net in nets)


def check_image(net: Net, image: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raises UserError where an image of this shape is none for a ControlNet of x."""

    def by(size: tuple[int, ...]) -> str:
        return 'x'.join(map(str, size[:2]))

    halvings = len(net.module.hint) - 1
    size = hint_size(image[:2], halvings)
    if len(image) != 3 or size != tuple(shape[:2]):
        raise UserError(
            f'config.model.controlnet.hint: {halvings} halvings of {net.condition}, {by(image)}, are {by(size)} '
            f'pixels, and the network reads {by(shape)}'
        )
    if image[2] not in (1, net.module.image_channels):
        raise UserError(
            f'config.model.controlnet.image_channels must be {image[2]}, as {net.condition} has; it is '
            f'{net.module.image_channels}'
        )


def with_inputs(inputs: tuple[Input, ...], nets: Sequence[Net], image: tuple[int, int, int]) -> tuple[Input, ...]:
    """Inputs, and the images that a person may give to the ControlNets that are stages."""
    taken = {one.name for one in inputs} | {net.condition for net in nets if net.own}
    shapes = {net.condition: (*image[:2], net.module.image_channels) for net in nets if net.condition not in taken}
    return inputs + tuple(Input(name, shape) for name, shape in shapes.items())


def read_from_data(nets: Sequence[Net]) -> tuple[str, ...]:
    """The image of the data that this run's own ControlNet reads."""
    return tuple(net.condition for net in nets if net.own)


def attach(network: Network, nets: Sequence[Net]) -> Network:
    """The network with ControlNets beside it, whose weights lie among its weights under the name CONTROL. They alone
    are trained: the network is applied as in sampling."""
    if not nets:
        return network
    modules = {net.name: net for net in nets}

    def apply(params: Any, x: Array, t: Array, embeddings: Embeddings, *, train: bool = False, rngs: Any = None):
        controls: Any = embeddings.get(CONTROL, {})
        others = {part: value for part, value in embeddings.items() if part != CONTROL}
        own = {name: weights for name, weights in params.items() if name != CONTROL}
        maps = None
        for name, value in controls.items():
            new = maps_of(modules[name], params[CONTROL][name], x, t, value, others, train, rngs)
            maps = new if maps is None else [a + b for a, b in zip(maps, new, strict=True)]
        if maps is not None:
            others['control'] = maps
        trained = CONTROL in params and OWN in params[CONTROL]
        return network.apply(own, x, t, others, train=train and not trained, rngs=rngs)

    return Network(network.init, apply)


def maps_of(
    net: Net, weights: Any, x: Array, t: Array, value: dict[str, Array], others: Embeddings, train: bool, rngs: Any
) -> list[Array]:
    """What a ControlNet adds at the network's times t [n]."""
    made = net.module.apply(
        {'params': weights}, x, t, unit(net, value['image']), **read(others), train=train, rngs=rngs
    )
    scale, low, high = value['numbers'].T
    scale = jnp.where((low <= t) & (t <= high), scale, 0)
    by_map = np.ones(len(made))
    if net.left_out and not net.module.global_pool:
        by_map = np.logspace(-1, 0, len(made))
    return [(scale * factor)[:, None, None, None].astype(m.dtype) * m for m, factor in zip(made, by_map, strict=True)]


def read(embeddings: Embeddings) -> Embeddings:
    """The embeddings that a ControlNet reads."""
    return {part: value for part, value in embeddings.items() if part in ControlNet.takes}


def unit(net: Net, image: Array) -> Array:
    """An image in [-1, 1] as a ControlNet reads it, in [0, 1] and of its number of channels."""
    return jnp.broadcast_to((image + 1) / 2, (*image.shape[:-1], net.module.image_channels))


# --- weights


def weights_of(nets: Sequence[Net], networks: Mapping[str, Any], frozen: Any) -> dict[str, Any]:
    """{CONTROL: {name: weights}} of the ControlNets; {} without any."""
    if not nets:
        return {}
    return {CONTROL: {net.name: networks[CONTROL] if net.own else frozen[net.name][0].ema[CONTROL] for net in nets}}


def init(
    net: Net, rng: Array, conditioning: Conditioning, shapes: Any, values: Values, x: Array, frozen: Any
) -> dict[str, Any]:
    """Weights of a ControlNet before the first update: those of the base where it has them.

    Args:
      shapes: of the weights of the network by its config.
      values: of a batch of one, the ControlNet's own among them.

    Raises:
      UserError: the base has other weights than the network of this config.
    """
    base = frozen[BASE][0].ema['denoiser']
    adapting.check_weights(shapes, base, BASE)
    embeddings: Any = conditions.embed(conditioning, base, values, x)
    image = unit(net, embeddings[CONTROL][net.name]['image'])
    t, given = jnp.zeros(len(x)), read(embeddings)
    made = flatten_dict(net.module.init(stream(rng, CONTROL), x, t, image, **given, train=False)['params'], sep='/')
    there = flatten_dict(base, sep='/')

    def start(path: str, new: Array) -> Array:
        return there[path].astype(new.dtype) if path in there and there[path].shape == new.shape else new

    return unflatten_dict({path: start(path, new) for path, new in made.items()}, sep='/')


# --- sampling


def settings_of(nets: Sequence[Net], times: np.ndarray) -> dict[str, dict[str, float]]:
    """{name: numbers of `Control`} as arguments of a sampler.

    Args:
      times: as the network embeds them, of each evaluation of the sampler in their order.
    """
    return {net.name: {'scale': net.control.scale, **interval(times, net.control)} for net in nets}


def interval(times: np.ndarray, control: Control) -> dict[str, float]:
    """The times between which a ControlNet adds something: of evaluation i of M where i / M is at least start and
    (i + 1) / M at most end. Halfway between two of them one interval ends."""
    i, n = np.arange(len(times)), len(times)
    active = times[(i / n >= control.start) & ((i + 1) / n <= control.end)]
    if not len(active):
        return {'low': np.inf, 'high': -np.inf}
    below, above = times[times < active.min()], times[times > active.max()]
    low = (below.max() + active.min()) / 2 if len(below) else -np.inf
    high = (above.min() + active.max()) / 2 if len(above) else np.inf
    return {'low': float(low), 'high': float(high)}


def batch_of(nets: Sequence[Net], settings: Mapping[str, Any], n: int) -> dict[str, Array]:
    """The arrays of a batch that say what the ControlNets add in sampling."""

    def numbers(one: Mapping[str, Any]) -> Array:
        row = jnp.stack([jnp.asarray(one[name], jnp.float32) for name in ('scale', 'low', 'high')])
        return jnp.broadcast_to(row, (n, 3))

    return {net.numbers: numbers(settings[net.name]) for net in nets}
