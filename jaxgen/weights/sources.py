"""All sources of published weights, and which of them a file is of."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from ml_collections import ConfigDict

from jaxgen.errors import UserError
from jaxgen.options import near
from jaxgen.weights import (
    compvis,
    controlnets,
    diffusers,
    edm,
    gans,
    guided,
    mapping,
    meta,
    numbered,
    text_encoders,
    text_to_image,
)
from jaxgen.weights.files import Weights
from jaxgen.weights.mapping import Entry
from jaxgen.weights.source import OF_DISCRIMINATOR, Shapes, Source

SOURCES: tuple[Source, ...] = (
    *diffusers.SOURCES,
    *controlnets.SOURCES,
    *guided.SOURCES,
    *compvis.SOURCES,
    *meta.SOURCES,
    *edm.SOURCES,
    *numbered.SOURCES,
    *gans.SOURCES,
    *text_encoders.SOURCES,
    *text_to_image.SOURCES,
)


# Prefixes of a discriminator's names in a file of several networks.
DISCRIMINATOR = re.compile(r'(.*?[._])??(D|netD|netD_dict|discriminator)\.(module\.)?')
# Prefixes of averages: ema., model_ema., EMA., emaModel., shadow., ...
AVERAGES = re.compile(r'(^|[._]|(?<=[a-z])(?=[A-Z]))(?i:ema|swa|shadow|averaged?|averages)([._]|(?=[A-Z]))')
# What training leaves beside the weights.
TRAINING = r'(?i:opt|optim|optimi[sz]ers?|lr_?schedulers?|(grad_?)?scaler)(_\w+)?\..*'


@dataclasses.dataclass(frozen=True)
class Fit:
    """A source's names for a config, and the weights under its names."""

    source: Source
    entries: list[Entry]
    weights: Weights
    present: float  # fraction of the expected names that the file has
    roots: tuple[str, ...] = ()  # prefixes under which the file has these weights, the first of which is taken


def for_config(config: ConfigDict, name: str = '') -> list[Source]:
    """The sources that have names for a config's networks.

    Args:
      name: only the source of this name; '' all.

    Raises:
      UserError: there are none.
    """
    fitting = [source for source in SOURCES if source.fits(config)]
    chosen = [source for source in fitting if name in ('', source.name)]
    if chosen:
        return chosen
    names = sorted({source.name for source in SOURCES})
    if name and name not in names:
        raise UserError(f'--names={name}: no such source{near(name, names)}')
    there = ', '.join(sorted({source.name for source in fitting}))
    raise UserError(
        f'--names={name} has no names for this config; these have: {there}'
        if there
        else f'no published weights are known for the networks of a {config.family} like this one'
    )


def entries_of(source: Source, config: ConfigDict, shapes: Shapes) -> list[Entry]:
    """The tensors of a source that our arrays are made of, but for the discriminator; those of `source.initial` have
    none."""
    kept = {path: shape for path, shape in shapes.items() if not source.has_none_of(path)}
    return mapping.entries(source.table(config, kept), kept)


def discriminator_entries(source: Source, config: ConfigDict, shapes: Shapes) -> list[Entry]:
    """The tensors that the discriminator is made of; [] where there is none, or none is published."""
    own = {path: shape for path, shape in shapes.items() if re.match(OF_DISCRIMINATOR, path)}
    if source.discriminator is None or not any(path.startswith('discriminator/') for path in own):
        return []
    return mapping.entries(source.discriminator(config, own), own)


def fit_discriminator(
    source: Source, config: ConfigDict, shapes: Shapes, weights: Weights, apart: Weights | None = None
) -> Fit | None:
    """The discriminator in a file, under one of the prefixes DISCRIMINATOR, or in a file of its own; None: there is
    none.

    Args:
      apart: its own file.
    """
    entries = discriminator_entries(source, config, shapes)
    if not entries:
        return None
    named = source.normalised(apart or weights)
    roots = (
        roots_of(source, entries, named) if apart else {m[0] for name in weights if (m := DISCRIMINATOR.match(name))}
    )
    insides = [named.below(root) for root in sorted(roots, key=lambda root: (len(root), root))]
    fits = [Fit(source, entries, inside, mapping.count_present(entries, inside)) for inside in insides]
    best = max(fits, key=lambda one: one.present, default=None)
    return best if best and (best.present or apart) else None


def roots_of(source: Source, entries: Sequence[Entry], weights: Weights) -> list[str]:
    """Prefixes under which a file may hold the weights of a source: its own, and those before some of the expected
    names, such as 'module.' and 'ema_model.'; averages first."""
    names = [name for entry in entries for name in entry.all_names]
    some = {*names[:: max(len(names) // 4, 1)]}
    before = {name.removesuffix(end) for end in some for name in weights if name.endswith(f'.{end}')}
    there = [*source.roots, *sorted(before - {*source.roots}, key=lambda root: (len(root), root))]
    return sorted(there, key=lambda root: not AVERAGES.search(root))


def fit(source: Source, config: ConfigDict, shapes: Shapes, weights: Weights) -> Fit:
    """A source with a file, under the root where most of the expected names are."""
    entries = entries_of(source, config, shapes)
    named = source.normalised(weights)
    fits, roots = [], roots_of(source, entries, named)
    for root in roots:
        inside = named.below(root)
        fits.append(Fit(source, entries, inside, mapping.count_present(entries, inside)))
    best = max(fits, key=lambda one: one.present)  # the first of equal ones
    whole = tuple(root for root, one in zip(roots, fits, strict=True) if one.present == best.present)
    return dataclasses.replace(best, roots=whole)


def choose(config: ConfigDict, shapes: Shapes, weights: Weights, name: str = '') -> Fit:
    """The source that a file is of.

    Raises:
      UserError: the file fits none of them, or fits two that compute something else with it.
    """
    fits = [fit(source, config, shapes, weights) for source in for_config(config, name)]
    best = max(fits, key=lambda one: one.present)
    others = [f for f in fits if f.present == best.present and f.source.distinct and differ(f.entries, best.entries)]
    if best.present and others:
        lines = '; '.join(f'--names={f.source.name} for {f.source.distinct}' for f in (best, *others))
        raise UserError(f'{weights.path}: names and shapes do not say which of these it is of: {lines}')
    return best


def differ(a: Sequence[Entry], b: Sequence[Entry]) -> bool:
    """Whether two lists of entries lay out a tensor in different ways: the order of heads, where there are several."""

    others = {entry.names: entry for entry in b}
    pairs = [(one, others[one.names]) for one in a if one.names in others]
    return any(
        (one.pattern, one.sizes) != (two.pattern, two.sizes) and max(e.sizes.get('h', 1) for e in (one, two)) > 1
        for one, two in pairs
    )
