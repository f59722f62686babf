"""The configs of embedded data, and one of each family and network among them.

What holds by the shared machinery and the family, and not by the size of a network, is held against the latter. All
others are traced; the formulations of diffusion have tests of their own.
"""

from __future__ import annotations

from support import NAMES, path

from jaxgen import config as configs
from jaxgen.sections import sides

SOURCES = ('digits', 'shapes', 'gaussians')
UNTRAINED = ('encoder',)  # families that are imported, and that nothing trains


def is_embedded(name: str) -> bool:
    """Whether a config trains on data made here, at a small size: a published one may stand on scenes of 256 pixels."""
    config = configs.load(path(name, ''))
    data = config.data
    return config.family not in UNTRAINED and data.source.partition(':')[0] in SOURCES and max(sides(data.size)) <= 64


EMBEDDED = [name for name in NAMES if is_embedded(name)]


def last_of_each(names, variant: str = 'tiny') -> dict:
    """{(family, network): name of a config}, the last one of each."""
    return {(c.family, network_name(c)): n for n in names for c in [configs.load(path(n, variant))]}


def network_name(config) -> str | None:
    """The network that config.model names, itself or as a section, or what is trained beside that of a base."""
    network = config.model.to_dict().get('network')
    name = network.get('name') if isinstance(network, dict) else network
    return f'{name} of a base' if 'base' in config.stages else name


# What goes on from a run is of that run's model.
DISTINCT = last_of_each(n for n in reversed(EMBEDDED) if not configs.load(path(n, '')).train.initial)
FAMILIES = {family: n for (family, _), n in DISTINCT.items()}

# One config of each family is in the quick part, of some families a smaller one than the last.
IN_QUICK_PART = FAMILIES | {
    'diffusion': 'ddpm_digits',
    'gan': 'conditional_gan_digits',
    'vae': 'conditional_vae_digits',
}
