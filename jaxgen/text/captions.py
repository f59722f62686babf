"""Captions of examples as tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxgen import data
from jaxgen.contract import Texts
from jaxgen.text import tokenizers
from jaxgen.text.tokenizers import TRAINED, Tokenizer


def trained(section, texts: Texts) -> Tokenizer:
    """A tokenizer of the captions of the training split of a section `data`."""
    examples = data.dataset({**section.to_dict(), 'features': ('caption',)}, 'train')

    def read() -> Iterator[str]:
        for i in range(min(len(examples), TRAINED)):
            yield tokenizers.caption_text(examples[i]['caption'])

    return tokenizers.train(read(), texts.vocabulary, texts.length)


def tokenised(batch: Mapping[str, Any], made: Mapping[str, Tokenizer]) -> dict[str, Any]:
    """A batch whose 'caption' uint8 [n, L], where it has one, is replaced by {name: its tokens int32 [n, length]}."""
    out = dict(batch)
    if 'caption' in out:
        texts = [tokenizers.caption_text(caption) for caption in np.asarray(out.pop('caption'))]
        out |= {name: tokenizer(texts).ids for name, tokenizer in made.items()}
    return out


class Tokenised:
    """Examples of a split with tokens in place of captions; all else as those have it."""

    def __init__(self, examples, tokenise: Callable[[dict], dict]):
        self.examples, self.tokenise = examples, tokenise

    def __len__(self) -> int:
        return len(self.examples)

    def __getattr__(self, name: str):
        return getattr(self.examples, name)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return {name: x[0] for name, x in self.tokenise({k: x[None] for k, x in self.examples[i].items()}).items()}

    def take(self, *arguments, **named) -> dict[str, np.ndarray]:
        return self.tokenise(self.examples.take(*arguments, **named))

    def take_cyclic(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        return self.tokenise(self.examples.take_cyclic(numbers))
