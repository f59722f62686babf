"""Classification without training, by prompts: the class of an image is that whose texts it is the most similar to
(Radford et al. 2021, arXiv 2103.00020, section 3.1).

    texts = fill(('a photo of a {}', 'a drawing of a {}'), ['circle', 'square'])
    logits(run.encode(images), run.encode_text, texts, run.logit_scale)  # [n, 2]

Of the several prompts of a class are averaged (`ENSEMBLES`)

  embeddings     each of length 1; their mean is brought to length 1 (section 3.1.4)
  probabilities  exp(logit) of each: with prompts that state other things too, as whole captions do, the class is what
                 they have in common, whichever of these is right
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxgen import data, options
from jaxgen.errors import UserError
from jaxgen.evaluation.held_out import mean
from jaxgen.metrics.retrieval import normalised

SLOT = re.compile(r'\{(\w*)\}')
MOST_PROMPTS = 50_000  # of one evaluation
ENSEMBLES = ('embeddings', 'probabilities')
ROWS = 256  # images at a time


def fill(templates: Sequence[str], classes: Sequence[str | Sequence[str]]) -> list[list[str]]:
    """The prompts of each class: each of its texts in each template, in place of {}.

    Args:
      classes: the text of each, or several of them.

    Raises:
      UserError: there are no classes or no templates, a template without {}, or something that is no text.
    """
    if isinstance(templates, str) or not templates or not all(isinstance(one, str) for one in templates):
        raise UserError(f"templates must be texts like ('a photo of a {{}}',); they are {options.shown(templates)}")
    if without := next((one for one in templates if '{}' not in one), None):
        raise UserError(f'template {options.shown(without)} must hold {{}}, where the class is put')
    if isinstance(classes, str) or not isinstance(classes, Sequence | np.ndarray) or not len(classes):
        raise UserError(f'classes must be a list of texts; they are {options.shown(classes)}')
    filled = []
    for one in classes:
        texts = [one] if isinstance(one, str) or not isinstance(one, Sequence) else list(one)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f'a class must be a text or a list of texts; it is {options.shown(one)}')
        filled.append([template.replace('{}', text) for template in templates for text in texts])
    return filled


def embeddings(encode: Callable[[list[str]], np.ndarray], prompts: Sequence[Sequence[str]]) -> np.ndarray:
    """One embedding of length 1 for each class, float64 [classes, d], by its prompts.

    encode: texts -> embeddings [n, d] of length 1; each text is embedded once.
    """
    number = {text: i for i, text in enumerate(dict.fromkeys(itertools.chain.from_iterable(prompts)))}
    embedded = normalised(encode(list(number)))
    return normalised(np.stack([embedded[[number[text] for text in texts]].mean(0) for texts in prompts]))


def logits(
    images: np.ndarray,
    encode: Callable[[list[str]], np.ndarray],
    prompts: Sequence[Sequence[str]],
    scale: float,
    ensemble: str = 'embeddings',
) -> np.ndarray:
    """Logits of the classes, float64 [n, classes], by the embeddings of images [n, d].

    Args:
      encode: see `embeddings`.
      scale: of cosines.
      ensemble: one of `ENSEMBLES`.
    """
    if ensemble == 'embeddings':
        return scale * images @ embeddings(encode, prompts).T
    texts = embeddings(encode, [[text] for one in prompts for text in one])
    counts = [len(one) for one in prompts]
    starts = np.cumsum([0, *counts[:-1]])
    parts = []
    for i in range(0, len(images), ROWS):
        each = scale * images[i : i + ROWS] @ texts.T
        top = each.max(1, keepdims=True)
        with np.errstate(divide='ignore'):
            parts.append(top + np.log(np.add.reduceat(np.exp(each - top), starts, axis=1) / counts))
    return np.concatenate(parts)


# --- of a data set whose attributes have names


class Attribute(NamedTuple):
    """Something of an image that has named values."""

    feature: str  # of the data, 'label' or 'factors'
    entry: int | None  # of that feature; None: it is one number
    names: tuple[str, ...]  # of the values, by number


def attributes(section: dict) -> dict[str, Attribute]:
    """{name: Attribute} of the data of a section `data`: '' is the class, the others are factors with names."""
    known = {}
    try:
        names = data.spec({**section, 'features': ('image', 'label'), 'other': ''}).names
        known = {'': Attribute('label', None, names)} if names else {}
    except UserError:  # no labels
        pass
    factors = data.factor_names(section)
    return known | {name: Attribute('factors', entry, names) for name, (entry, names) in factors.items()}


def worded(template: str, values: dict[str, str]) -> str:
    """A template with a value in place of each slot."""
    return SLOT.sub(lambda slot: values[slot[1]], template)


def of_values(templates: Sequence[str], attribute: str, known: dict[str, Attribute]) -> list[list[str]]:
    """The prompts of each value of an attribute by the templates that have a slot for it, '{}' for the class and
    '{NAME}'; other slots go through all of their values. A list of none where no template has one.

    Raises:
      UserError: too many prompts.
    """
    filled: list[list[str]] = [[] for _ in known[attribute].names]
    for template in templates:
        slots = list(dict.fromkeys(SLOT.findall(template)))
        if attribute not in slots or not set(slots) <= set(known):
            continue
        others = [known[name].names for name in slots if name != attribute]
        if (n := math.prod(map(len, others)) * len(filled)) > MOST_PROMPTS:
            raise UserError(f'config.evaluate.templates: {template!r} makes {n:,} prompts, of {MOST_PROMPTS:,} at most')
        for i, value in enumerate(known[attribute].names):
            for rest in itertools.product(*others):
                values = iter(rest)
                said = {name: value if name == attribute else next(values) for name in slots}
                filled[i].append(worded(template, said))
    return filled


class Task(NamedTuple):
    """One classification: an attribute, and the prompts of its values."""

    attribute: Attribute
    prompts: list[list[str]]


def tasks(templates: Sequence[str], section: dict) -> dict[str, Task]:
    """{metric: Task}, of each attribute of the data that templates have a slot for: 'zero_shot_accuracy' is of the
    class, 'zero_shot_accuracy/NAME' of a factor.

    Args:
      section: the config's section `data`.

    Raises:
      UserError: a slot that has another name, or too many prompts.
    """
    known = attributes(section)
    named = {name for template in templates for name in SLOT.findall(template)} - {''}
    if unknown := min(named - set(known), default=''):
        some = ', '.join(f'{{{name}}}' for name in known) or 'none'
        raise UserError(f'config.evaluate.templates: {{{unknown}}} is unknown; {section["source"]} has {some}')
    made = {}
    for name, attribute in known.items():
        texts = of_values(templates, name, known)
        if all(texts):
            made[f'zero_shot_accuracy{"/" if name else ""}{name}'] = Task(attribute, texts)
    return made


def accuracy(task: Task, logits: np.ndarray, values: np.ndarray) -> dict:
    """{'value', 'stderr', 'n'}: the fraction of images whose likeliest class is theirs.

    Args:
      logits: [n, classes].
      values: of the attribute's feature, int [n] or [n, entries].
    """
    right = values if task.attribute.entry is None else values[:, task.attribute.entry]
    return mean((logits.argmax(1) == right).astype(np.float64))
