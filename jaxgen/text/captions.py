"""Captions of examples as tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxgen import data
from jaxgen.contract import NEGATIVE, Texts
from jaxgen.text import tokenizers
from jaxgen.text.tokenizers import TRAINED, Tokenizer

COUNTED = 10_000  # examples that are looked at for captions that are too long


def trained(section, texts: Texts) -> Tokenizer:
    """A tokenizer of the captions of the training split of a section `data`."""
    return tokenizers.train(read(captions_of(section), TRAINED), texts.vocabulary, texts.length)


def captions_of(section):
    """The training examples of a section `data`, their captions alone."""
    return data.dataset({**section.to_dict(), 'features': ('caption',)}, 'train')


def read(examples, most: int) -> Iterator[str]:
    """All captions of the first `most` examples."""
    for i in range(min(len(examples), most)):
        if examples.texts:
            yield from (text.decode() for text in examples.texts.one(i)['caption'])
        else:
            yield tokenizers.caption_text(examples[i]['caption'])


def cut_off(section, made: Mapping[str, Tokenizer]) -> list[str]:
    """Lines about training captions that have more tokens than there is room for.

    Args:
      made: {name of tokens: their tokenizer}.
    """
    if not made:
        return []
    examples = captions_of(section)
    captions = list(read(examples, COUNTED if examples.texts else COUNTED // 10))
    lines = []
    for length, tokenizer in {one.length: one for one in made.values()}.items():
        if cut := tokenizer(captions).cut:
            lines.append(
                f'{cut:,} of the first {len(captions):,} training captions have more than {length} tokens: their ends '
                'are left out'
            )
    return lines


def negative_name(name: str) -> str:
    """The name of the tokens of the text that stands for no caption, where `name` are a caption's, 'STAGE/tokens'."""
    return name.removesuffix('tokens') + 'negative'


def tokenised(batch: Mapping[str, Any], made: Mapping[str, Tokenizer], negatives: bool = False) -> dict[str, Any]:
    """A batch whose 'caption' uint8 [n, L], where it has one, is replaced by {name: its tokens int32 [n, length]}.

    Args:
      negatives: beside 'STAGE/tokens' come 'STAGE/negative', the tokens of 'negative_caption' or, without one, of '',
        and whether there is one, see `contract.NEGATIVE`.
    """
    out = dict(batch)
    captions, negative = out.pop('caption', None), out.pop('negative_caption', None)
    if (others := out.pop('other_caption', None)) is not None:
        texts = [tokenizers.caption_text(caption) for caption in np.asarray(others)]
        out |= {f'other/{name}': tokenizer(texts).ids for name, tokenizer in made.items()}
    if captions is None:
        return out
    texts = [tokenizers.caption_text(caption) for caption in np.asarray(captions)]
    out |= {name: tokenizer(texts).ids for name, tokenizer in made.items()}
    if negatives:
        unlike = ['']
        if negative is not None:
            unlike = [tokenizers.caption_text(caption) for caption in np.asarray(negative)]
        for name, tokenizer in made.items():
            if '/' in name:
                ids = tokenizer(unlike).ids
                out[negative_name(name)] = np.array(np.broadcast_to(ids, (len(texts), ids.shape[1])))
        out[NEGATIVE] = np.array(np.broadcast_to([bool(text) for text in unlike], len(texts)))
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
