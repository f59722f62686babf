"""A source of published weights: a repository or library whose files have one set of names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxgen.weights.files import Weights
from jaxgen.weights.mapping import Substitution, Table, substituted

OF_DISCRIMINATOR = '(extra/)?discriminator/'  # our arrays, of a network that is not averaged
Shapes = Mapping[str, tuple[int, ...]]  # {path of one of our arrays: shape}


def numbers(weights: Mapping[str, Any], pattern: str) -> list[int]:
    """The numbers, rising, that the group of a pattern matches in the names of tensors."""
    return sorted({int(m[1]) for name in weights if (m := re.match(pattern, name))})


def of_shape(weights: Weights, name: str, axis: int) -> int:
    """Length of an axis of a tensor; 0 where it is not there."""
    shape = weights[name].shape if name in weights else ()
    return shape[axis] if len(shape) > axis else 0


def known(fields: dict[str, Any]) -> dict[str, Any]:
    """Those that the tensors tell: not 0."""
    return {field: value for field, value in fields.items() if value not in (0, ())}


# Fields of time as most sources count it, and of ADM's embedding of it.
COUNTED_AS_HERE: Mapping[str, Any] = {'model.training.time_scale': 1.0, 'model.training.time_shift': 0.0}
COSINES_FIRST: Mapping[str, Any] = {'model.network.sines_first': False, 'model.network.freq_shift': 0}


def no_fields(config: ConfigDict, weights: Weights | None) -> dict[str, Any]:
    return {}


def no_remarks(config: ConfigDict, weights: Weights) -> list[str]:
    return []


@dataclasses.dataclass(frozen=True)
class Source:
    """What is known of the files of one repository or library.

    Attributes:
      name: of the source, as --names takes it.
      title: what it is, in a line.
      fits: config -> whether its networks have a table here.
      table: (config, shapes of our arrays) -> Table.
      roots: prefixes under which a file may hold the weights, beside those that are seen in it (`sources.roots_of`); of
        those with the most expected names averages are taken, else the first.
      renamed: substitutions that turn names of older files into the present ones.
      prepare: weights -> weights under the names of the table, where substitutions do not do.
      rows: (pattern, replacement) of names that `prepare` gives to some rows of a tensor each, in the order of the
        names, and the name of that tensor in the file.
      skip: regular expression of names that a file may hold beside the weights.
      initial: regular expression of our arrays that such a file does not hold; they keep their initial values.
      discriminator: (config, shapes of our arrays) -> Table of the network of this name and of its entry in
        State.extra; None: there is no such file.
      discriminator_root: prefix of its names in an export; see `sources.DISCRIMINATOR` for those that are read.
      same: (path, path) of our arrays, the first of which start as the second, the published ones.
      fields: (config, weights) -> {field: value} that the source has, as 'model.network.groups': what names and shapes
        cannot tell, where a config with other values would load and compute something else; and what they do tell, so
        that a config of another size is one line with the fields to set.
      discriminator_fields: the same by the weights of the discriminator.
      classes: (name, axis, n): so many classes and n have that axis of that tensor; ('', 0, 0): not known.
      remarks: (config, weights) -> lines that are said at import: what names and shapes cannot tell and the source has
        not fixed, so that it is taken from the config.
      distinct: what another source with the same names does otherwise; where this is set the person has to say which
        one a file is of.
      licence: of the published files, '' where it differs from file to file.
    """

    name: str
    title: str
    fits: Callable[[ConfigDict], bool]
    table: Callable[[ConfigDict, Shapes], Table]
    roots: tuple[str, ...] = ('',)
    renamed: tuple[Substitution, ...] = ()
    prepare: Callable[[Weights], Weights] | None = None
    rows: tuple[str, str] = ('', '')
    skip: str = ''
    initial: str = ''
    discriminator: Callable[[ConfigDict, Shapes], Table] | None = None
    discriminator_root: str = 'D.'
    same: tuple[tuple[str, str], ...] = ()
    fields: Callable[[ConfigDict, Weights | None], dict[str, Any]] = no_fields
    remarks: Callable[[ConfigDict, Weights], list[str]] = no_remarks
    discriminator_fields: Callable[[ConfigDict, Weights | None], dict[str, Any]] = no_fields
    classes: tuple[str, int, int] = ('', 0, 0)
    distinct: str = ''
    licence: str = ''

    def keeps_initial(self, path: str) -> bool:
        """Whether one of our arrays is in no such file."""
        return bool(self.initial) and bool(re.fullmatch(self.initial, path))

    def has_none_of(self, path: str) -> bool:
        """Whether one of our arrays is in no file beside the discriminator's: it keeps its initial value, or is of that
        network."""
        return self.keeps_initial(path) or bool(re.match(OF_DISCRIMINATOR, path))

    def normalised(self, weights: Weights) -> Weights:
        """The weights under their present names."""
        if self.prepare:
            weights = self.prepare(weights)
        if not self.renamed:
            return weights
        names = {substituted(name, self.renamed): tensor for name, tensor in weights.tensors.items()}
        return dataclasses.replace(weights, tensors=names)


def network(config: ConfigDict) -> str:
    """The name of the denoiser's network, '' in other families."""
    section = config.model.get('network')
    return section.get('name', '') if config.family == 'diffusion' and section is not None else ''
