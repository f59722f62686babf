"""Configs of fine-tuning, derived from the run that is tuned: --config=RUN:lora.

What a family makes of its runs stands in its module's table TUNING, {variant: (sections of the config, RUN) -> sections
that are put over them}. The model, sizes and stages are the run's; the data are the person's to name, but for the
variants in its TUNED_ON_ITS_OWN.
"""

from __future__ import annotations

import os

from ml_collections import ConfigDict

from jaxgen import config as configs
from jaxgen import directory, files, origin
from jaxgen.config import DEFAULTS, UnknownVariant
from jaxgen.errors import UserError

UNNAMED = 'folder:'  # a source without a path, which is refused: the person names one
# What the person's images are made to fit.
KEPT = ('size', 'channels', 'features', 'classes')


def derived(run: str, variant: str, same_data: bool = False) -> ConfigDict:
    """The config by which a run is tuned; it is not complete before `data.source` is set.

    Args:
      variant: of the table of the run's family, 'lora'.
      same_data: the data are the run's, where it was trained by this person: nothing will be trained on them.

    Raises:
      UserError: there is no such run, or its family is not tuned so.
    """
    saved = directory.saved_config(run)
    origin.check_layout(run, everything=not origin.is_own(run, saved))
    table = getattr(configs.module(saved.family), 'TUNING', {})
    if not table:
        raise UserError(f'--config={run}: a {saved.family} has no fine-tuning; name a config, not a run')
    if variant not in table:
        raise UnknownVariant(variant, list(table))
    sections = saved.to_dict()
    data = {name: sections['data'][name] for name in KEPT} | {'source': UNNAMED}
    same_data = same_data or variant in getattr(configs.module(saved.family), 'TUNED_ON_ITS_OWN', ())
    if same_data and origin.is_own(run, saved):
        data = sections['data']
    usual = {name: DEFAULTS[name] for name in ('optim', 'train', 'sample', 'evaluate', 'mesh')}
    for name in ('dtype', 'remat'):
        usual['train'] = {**usual['train'], name: sections['train'][name]}
    usual['mesh'] = sections['mesh']
    stages = {name: origin.stage(run, saved, name) for name in saved.stages}
    # A stage of a stranger's run that lies elsewhere is the person's to name: it is looked for in the run.
    used = configs.complete({**sections, 'stages': stages})
    for field in origin.unnamed(run, saved, used, set()):
        if (name := field.removeprefix('stages.')) in stages:
            stages[name] = files.absolute(os.path.join(os.path.expanduser(run), 'stages', name))
    sections['stages'] = stages
    base = {**sections, **usual, 'data': {**DEFAULTS['data'], **data}}
    over = table[variant](sections, files.absolute(os.path.expanduser(run)))
    return ConfigDict(configs.update_sections(base, over))


def for_weights(name: str) -> ConfigDict:
    """`config.load` of a config for weights that are imported: nothing is trained, so that no data need be named."""
    file, variant = configs.split_variant(name)
    return derived(file, variant, same_data=True) if is_run(file) else configs.load(name)


def is_run(path: str) -> bool:
    """Whether a path is a run's directory."""
    return os.path.isfile(os.path.join(os.path.expanduser(path), 'config.json'))
