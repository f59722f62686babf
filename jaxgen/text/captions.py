"""Captions of examples as tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxgen import data
from jaxgen.contract import NEGATIVE, Texts
from jaxgen.errors import UserError
from jaxgen.text import emphasis, tokenizers
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


def check_learned(section, made: Mapping[str, Tokenizer], word: str) -> None:
    """Raises UserError where no training caption has the word that is to be learned.

    Args:
      made: {name of tokens: their tokenizer}, which know the word.
    """
    examples = captions_of(section)
    captions = list(read(examples, COUNTED if examples.texts else COUNTED // 10))
    for tokenizer in made.values():
        number = tokenizer.backend.token_to_id(word)
        if number in tokenizer.words and not np.isin(tokenizer(captions).ids, tokenizer.words[number]).any():
            raise UserError(
                f'config.model.adapter.word: no training caption has the word {word!r}: say it in --config.data.prompt'
            )


def negative_name(name: str) -> str:
    """The name of the tokens of the text that stands for no caption, where `name` are a caption's, 'STAGE/tokens'."""
    return name.removesuffix('tokens') + 'negative'


def weights_name(name: str) -> str:
    """The name of the weights of tokens by this name: 'STAGE/weights', 'STAGE/negative_weights'."""
    return name.replace('/tokens', '/weights').replace('/negative', '/negative_weights')


def read_weights(
    texts: list[str], made: Mapping[str, Tokenizer], weighted: bool, chunks: int = 1
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Texts without the marks of weights, and {name of stages' tokens: their weights, float32 [n, length]}."""
    if not weighted:
        return texts, {}
    read = [emphasis.parsed(text) for text in texts]
    names = [name for name in made if '/' in name]
    return [text for text, _ in read], {
        name: np.stack([made[name].weights(*one, chunks) for one in read]) for name in names
    }


def tokenised(
    batch: Mapping[str, Any],
    made: Mapping[str, Tokenizer],
    negatives: bool = False,
    weighted: bool = False,
    chunks: int = 1,
) -> dict[str, Any]:
    """A batch whose 'caption' uint8 [n, L], where it has one, is replaced by {name: its tokens int32 [n, length]}.

    Args:
      negatives: beside 'STAGE/tokens' come 'STAGE/negative', the tokens of 'negative_caption' or, without one, of '',
        and whether there is one, see `contract.NEGATIVE`.
      weighted: texts are prompts with weights of their words (text/emphasis.py), and beside those come 'STAGE/weights'
        and 'STAGE/negative_weights', float32 [n, length].
      chunks: parts of a text for stages, see `tokenizers.Tokenizer.parts`: their arrays are [n, chunks * length].
    """
    out = dict(batch)
    captions, negative = out.pop('caption', None), out.pop('negative_caption', None)
    if (others := out.pop('other_caption', None)) is not None:
        texts = tokenizers.caption_texts(others)
        out |= {f'other/{name}': tokenizer(texts).ids for name, tokenizer in made.items()}
    if captions is None:
        return out
    texts = tokenizers.caption_texts(captions)
    texts, weights = read_weights(texts, made, weighted, chunks)
    out |= {name: tokenizer(texts, chunks if '/' in name else 1).ids for name, tokenizer in made.items()}
    out |= {weights_name(name): x for name, x in weights.items()}
    if negatives:
        unlike = [''] if negative is None else tokenizers.caption_texts(negative)
        unlike, weights = read_weights(unlike, made, weighted, chunks)
        one_or_each = {weights_name(negative_name(name)): x for name, x in weights.items()}
        stages = {name: tokenizer for name, tokenizer in made.items() if '/' in name}
        one_or_each |= {negative_name(name): tokenizer(unlike, chunks).ids for name, tokenizer in stages.items()}
        one_or_each[NEGATIVE] = np.array([bool(text) for text in unlike])
        out |= {name: np.array(np.broadcast_to(x, (len(texts), *x.shape[1:]))) for name, x in one_or_each.items()}
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
