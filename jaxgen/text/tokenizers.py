"""Tokenizers: from texts to the numbers that a text encoder embeds, on the host, by the `tokenizers` library.

Three kinds of files are read, as the hub's folders hold them:

    vocab.json, merges.txt   byte-pair encoding of CLIP (Radford et al. 2021, arXiv 2103.00020, section 2.4), or of a
                             vocabulary trained here on captions
    tokenizer.json           any tokenizer of the library, T5's among them
    spiece.model             SentencePiece's unigrams of T5 (Raffel et al. 2020, arXiv 1910.10683)

They come from strangers and are data; nothing in them is executed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxgen.errors import UserError

START, END = '<|startoftext|>', '<|endoftext|>'
# Contractions, letters, single digits and runs of other characters: each is cut into pairs by itself.
WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
WORD_END = '</w>'
EXTRA = 100  # sentinels that T5's tokenizer has behind the pieces of its file
LARGEST = 64 * 2**20  # bytes of a tokenizer's file
LONGEST = 4096  # tokens of a text that a tokenizer may be made for
TRAINED = 100_000  # texts at most that a vocabulary is trained on
SPECIAL = {'bos_token', 'eos_token', 'pad_token', 'unk_token'}


class Tokens(NamedTuple):
    """Texts as numbers."""

    ids: np.ndarray  # int32 [n, length], padded at the end
    lengths: np.ndarray  # int32 [n]: of each text, its start and end included
    cut: int  # of the texts were longer, and lost their last tokens


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Texts to `Tokens`; made by `from_folder` or `train`.

    Attributes:
      length: tokens of every text, start and end included.
      pad: number behind the end of a text.
      end: number of the last token of a text; None: texts have none.
      files: contents of the files that `from_folder` makes the same tokenizer of, by name, but for `words`.
      words: {number of a word that was added: those of the tokens that it is for the encoder}.
      whole: no text is read in several parts, whatever its start and end.
    """

    backend: tokenizers.Tokenizer = dataclasses.field(repr=False)
    length: int
    pad: int
    end: int | None
    files: dict[str, bytes] = dataclasses.field(repr=False)
    words: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    whole: bool = False

    @property
    def vocabulary(self) -> int:
        """Tokens are numbers from 0 to vocabulary - 1."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def digest(self) -> str:
        """SHA-256 of its files and of the length of texts."""
        parts = [str(self.length).encode(), *(part for item in sorted(self.files.items()) for part in item)]
        digests = [hashlib.sha256(part if isinstance(part, bytes) else part.encode()).digest() for part in parts]
        return hashlib.sha256(b''.join(digests)).hexdigest()

    def __call__(self, texts: Sequence[str], chunks: int = 1) -> Tokens:
        """The tokens of texts; longer ones keep their first tokens and their end.

        Args:
          chunks: parts of a text, see `parts`: then ids are [n, chunks * length], and lengths the sums of the parts'.
        """
        rows, lengths, cut = [], np.zeros(len(texts), np.int32), 0
        for i, text in enumerate(texts):
            parts, rest = self.parts(text, chunks)
            rows.append(self.filled([ids for ids, _ in parts], self.pad, np.int32))
            lengths[i], cut = sum(len(ids) for ids, _ in parts), cut + bool(rest)
        ids = np.stack(rows) if rows else np.zeros((0, self.length), np.int32)
        return Tokens(ids, lengths, cut)

    @property
    def divisible(self) -> bool:
        """Whether a text may be read in several parts: those of CLIP's kind, with a start and an end of their own."""
        return not self.whole and self.length > 2 and len(self.backend.encode('').ids) == 2

    def filled(self, parts: list[list], value: float, dtype: Any) -> np.ndarray:
        """[chunks * length]: each part, filled up with a value."""
        out = np.full((len(parts), self.length), value, dtype)
        for row, part in zip(out, parts, strict=True):
            row[: len(part)] = part
        return out.reshape(-1)

    def parts(self, text: str, chunks: int = 1) -> tuple[list[tuple[list[int], list[tuple[int, int]]]], list[int]]:
        """The tokens of a text in parts of at most `length`, and where their characters are.

        Each part has a start and an end; those that are left over are empty. What is not `divisible` is one part.

        Returns:
          [(numbers, (first character, character after the last) of each)], and the first characters of the tokens that
          no part has.
        """
        ids, offsets = (list(x) for x in self.encoded(text))
        if chunks == 1 or not self.divisible:
            if len(ids) <= self.length:
                return [(ids, offsets)], []
            kept = self.length - (self.end is not None)
            ends = [self.end] if self.end is not None else []
            rest = [first for first, _ in offsets[kept:]]
            return [(ids[:kept] + ends, offsets[:kept] + [(0, 0)] * len(ends))], rest
        (first, *ids, last), offsets, room, none = ids, offsets[1:-1], self.length - 2, (0, 0)
        made = [
            ([first, *ids[i : i + room], last], [none, *offsets[i : i + room], none])
            for i in range(0, chunks * room, room)
        ]
        return made, [first for first, _ in offsets[chunks * room :]]

    def encoded(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """(numbers, where each lies in the text) of all tokens of a text."""
        encoding = self.backend.encode(text)
        if not self.words:
            return encoding.ids, encoding.offsets
        each = [(self.words.get(i, (i,)), at) for i, at in zip(encoding.ids, encoding.offsets, strict=True)]
        return [i for numbers, _ in each for i in numbers], [at for numbers, at in each for _ in numbers]

    def pieces(self, text: str) -> list[int]:
        """The numbers of a text's tokens without its start and end."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def with_word(self, word: str, numbers: Sequence[int]) -> Tokenizer:
        """The same with a word, upper or lower case as the tokenizer has it, that is these tokens.

        Raises:
          UserError: it is one token already.
        """
        if len(self.pieces(word)) == 1 or self.backend.token_to_id(word) is not None:
            raise UserError(f'{word!r} is a word of the tokenizer already: take another, like {f"<{word}>"!r}')
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.add_tokens([tokenizers.AddedToken(word, single_word=True, normalized=True)])
        words = {**self.words, backend.token_to_id(word): tuple(numbers)}
        return dataclasses.replace(self, backend=backend, words=words)

    def weights(self, text: str, characters: np.ndarray, chunks: int = 1) -> np.ndarray:
        """Of each token of a text the weight of its last character, float32 [chunks * length]; 1 of start, end and
        padding.

        Args:
          characters: weights of the text's characters.
        """
        parts, _ = self.parts(text, chunks)
        rows = [[characters[last - 1] if last > first else 1.0 for first, last in offsets] for _, offsets in parts]
        return self.filled(rows, 1.0, np.float32)

    def rest(self, text: str, chunks: int = 1) -> str:
        """The end of a text that its tokens leave out, '' where they are all of it."""
        _, rest = self.parts(text, chunks)
        return text[rest[0] :] if rest else ''

    def with_length(self, length: int) -> Tokenizer:
        """The same for texts of another number of tokens."""
        if not 2 <= length <= LONGEST:
            raise UserError(f'a tokenizer is for texts of 2 to {LONGEST} tokens, not {length}')
        config = json.loads(self.files.get('tokenizer_config.json', b'{}')) | {'model_max_length': length}
        files = {**self.files, 'tokenizer_config.json': json.dumps(config, indent=2).encode()}
        return dataclasses.replace(self, length=length, files=files)

    def with_pad(self, pad: int) -> Tokenizer:
        """The same with another number behind the end of a text."""
        token = self.backend.id_to_token(pad)
        if token is None:
            raise UserError(f'the tokenizer has no token of number {pad}')
        config = json.loads(self.files.get('tokenizer_config.json', b'{}')) | {'pad_token': token}
        files = {**self.files, 'tokenizer_config.json': json.dumps(config, indent=2).encode()}
        return of_files(files, kind_of(files), self.length)

    def save(self, folder: str) -> None:
        """Writes the files that `from_folder` reads."""
        os.makedirs(folder, exist_ok=True)
        for name, content in self.files.items():
            with open(os.path.join(folder, name), 'wb') as file:
                file.write(content)


def from_folder(folder: str, length: int = 0) -> Tokenizer:
    """The tokenizer of a folder of the hub.

    Args:
      length: tokens of a text; 0: as tokenizer_config.json says.

    Raises:
      UserError: there is none, it is damaged, or nothing says the length.
    """
    names = ('vocab.json', 'merges.txt', 'tokenizer.json', 'spiece.model', 'tokenizer_config.json')
    files = {}
    for name in (*names, 'special_tokens_map.json'):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            if os.path.getsize(path) > LARGEST:
                raise UserError(f'{path}: {os.path.getsize(path):,} bytes are more than a tokenizer has')
            with open(path, 'rb') as file:
                files[name] = file.read()
    kind = kind_of(files)
    if not kind or (kind == 'vocab.json' and 'merges.txt' not in files):
        missing = (
            'merges.txt beside its vocab.json' if kind else 'vocab.json with merges.txt, tokenizer.json or spiece.model'
        )
        raise UserError(f'no tokenizer in {folder}: it has no {missing}')
    try:
        return of_files(files, kind, length)
    except UserError:
        raise
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # the library's panics are no Exceptions
        raise UserError(f'{os.path.join(folder, kind)}: no tokenizer ({" ".join(str(e).split())[:200]})') from e


def kind_of(files: Container[str]) -> str:
    """The file that holds the vocabulary of a tokenizer of these files; '' where none does."""
    return next((name for name in ('vocab.json', 'tokenizer.json', 'spiece.model') if name in files), '')


def of_files(files: dict[str, bytes], kind: str, length: int) -> Tokenizer:
    """The tokenizer of these files' contents; `kind` names the one that holds its vocabulary."""
    said = special_tokens(files)
    if kind == 'vocab.json':
        vocabulary = json.loads(files['vocab.json'])
        said = {'bos_token': START, 'eos_token': END, 'pad_token': END, 'unk_token': END} | said
        backend = pair_encoding(vocabulary, parse_merges(files['merges.txt'].decode()), said)
    elif kind == 'tokenizer.json':
        backend = tokenizers.Tokenizer.from_str(files['tokenizer.json'].decode())
        backend.no_padding()
        backend.no_truncation()
    else:
        said = {'eos_token': '</s>', 'pad_token': '<pad>', 'unk_token': '<unk>'} | said
        backend = unigrams(files['spiece.model'], said)
    number = {name: backend.token_to_id(token) for name, token in said.items()}
    for name in ('eos_token', 'pad_token'):
        if name in said and number[name] is None:
            raise UserError(f'the tokenizer has no token {said[name]!r}, which is its {name}')
    end = number.get('eos_token')
    if end is None:  # it is what an empty text ends with, if with anything
        end = next(iter(backend.encode('').ids[-1:]), None)
    pad = number.get('pad_token')
    made = Tokenizer(backend, 0, next(n for n in (pad, end, 0) if n is not None), end, files)
    said_length = json.loads(files.get('tokenizer_config.json', b'{}')).get('model_max_length')
    if not length and not (isinstance(said_length, int) and 2 <= said_length <= LONGEST):
        raise UserError('nothing says how many tokens a text has: model_max_length in tokenizer_config.json, or length')
    return made.with_length(length or said_length)


def special_tokens(files: dict[str, bytes]) -> dict[str, str]:
    """{'eos_token': '</s>', ...} as tokenizer_config.json or, failing that, special_tokens_map.json says."""
    said: dict[str, str] = {}
    for name in ('special_tokens_map.json', 'tokenizer_config.json'):
        for key, token in json.loads(files.get(name, b'{}')).items():
            token = token.get('content') if isinstance(token, dict) else token
            if key in SPECIAL and isinstance(token, str):
                said[key] = token
    return said


def parse_merges(text: str) -> list[tuple[str, str]]:
    """Pairs of merges.txt, in their order; its first line may be a version's."""
    pairs = []
    for line in text.split('\n'):
        parts = line.split(' ')
        if len(parts) == 2 and not line.startswith('#version'):
            pairs.append((parts[0], parts[1]))
    return pairs


def pair_encoding(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], said: dict[str, str]
) -> tokenizers.Tokenizer:
    """CLIP's byte-pair encoding of small letters, a start before each text and an end behind it."""
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise UserError('vocab.json must number its tokens from 0, each number once')
    model = models.BPE(vocabulary, merges, unk_token=said['unk_token'], end_of_word_suffix=WORD_END)
    backend = tokenizers.Tokenizer(model)
    space = normalizers.Replace(tokenizers.Regex(r'\s+'), ' ')
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), space, normalizers.Lowercase()])
    backend.pre_tokenizer = split_words()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([said['bos_token'], said['eos_token'], said['pad_token']])
    ends = {name: (said[name], backend.token_to_id(said[name])) for name in ('bos_token', 'eos_token')}
    backend.post_processor = processors.RobertaProcessing(ends['eos_token'], ends['bos_token'], False, False)
    return backend


def split_words() -> pre_tokenizers.PreTokenizer:
    """Words by `WORDS`, as bytes that are printable characters each."""
    words = pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior='removed', invert=True)
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def unigrams(file: bytes, said: dict[str, str]) -> tokenizers.Tokenizer:
    """T5's tokenizer of a SentencePiece file: its unigrams, the sentinels <extra_id_99> to <extra_id_0>, an end."""
    pieces, unknown, characters = read_sentencepiece(file)
    pieces = [*pieces, *((f'<extra_id_{i}>', 0.0) for i in reversed(range(EXTRA)))]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=False))
    if characters:
        backend.normalizer = normalizers.Precompiled(characters)
    space = pre_tokenizers.Metaspace(replacement='\u2581', prepend_scheme='always', split=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])
    backend.decoder = decoders.Metaspace(replacement='\u2581', prepend_scheme='always', split=True)
    backend.add_special_tokens([*(f'<extra_id_{i}>' for i in range(EXTRA)), *said.values()])
    end = said['eos_token']
    backend.post_processor = processors.TemplateProcessing(
        single=['$A', end], special_tokens=[(end, backend.token_to_id(end))]
    )
    return backend


def read_sentencepiece(file: bytes) -> tuple[list[tuple[str, float]], int, bytes]:
    """(pieces with their log-probabilities, number of the unknown one, table of the normaliser's characters) of a
    SentencePiece model, by the fields of its protocol buffer.

    Raises:
      UserError: it is no such file, or of another algorithm than unigrams.
    """
    pieces, unknown, characters, algorithm = [], 0, b'', 1
    for number, value in fields(file):
        if number == 1:  # a piece: its text, score and type
            piece = dict(fields(value))
            score = np.frombuffer(piece.get(2, b'\0' * 4), '<f4')[0]
            pieces.append((piece[1].decode(), float(score)))
        elif number == 2:  # how it was trained
            trained = dict(fields(value))
            algorithm, unknown = trained.get(3, 1), trained.get(40, 0)
        elif number == 3:  # the normaliser
            characters = dict(fields(value)).get(2, b'')
    if algorithm != 1 or not pieces:
        raise UserError('spiece.model holds no unigrams, which T5 has')
    return pieces, unknown, characters


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protocol buffer's message: an int, or bytes of what is longer or not whole."""
    view, at = memoryview(message), 0
    while at < len(view):
        key, at = varint(view, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = varint(view, at)
            yield number, value
            continue
        if kind == 2:
            size, at = varint(view, at)
        else:
            size = {1: 8, 5: 4}[kind]
        if at + size > len(view):
            raise ValueError('it ends too early')
        yield number, bytes(view[at : at + size])
        at += size


def varint(view: memoryview, at: int) -> tuple[int, int]:
    """(value, place behind it) of a number of protocol buffers."""
    value = 0
    for i in range(10):
        value |= (view[at + i] & 127) << 7 * i
        if view[at + i] < 128:
            return value, at + i + 1
    raise ValueError('a number of more than ten bytes')


def train(texts: Iterable[str], vocabulary: int, length: int) -> Tokenizer:
    """A byte-pair encoding of the form of CLIP's, trained on texts: the same for the same texts. It reads any text,
    since each byte is a token.

    Args:
      texts: of which the first 100,000 are read.
      vocabulary: tokens at most; 514 are the bytes, each within a word and as its end, and a text's start and end.
      length: tokens of a text, start and end included.

    Raises:
      UserError: vocabulary is less than 514.
    """
    least = 2 * 256 + 2
    if vocabulary < least:
        raise UserError(f'a vocabulary has at least {least} tokens, not {vocabulary}')
    backend = tokenizers.Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = split_words()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, end_of_word_suffix=WORD_END, show_progress=False)
    backend.train_from_iterator((text for text, _ in zip(texts, range(TRAINED), strict=False)), trainer)
    merges = [tuple(pair) for pair in json.loads(backend.to_str())['model']['merges']]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([*alphabet, *(letter + WORD_END for letter in alphabet)])
    kept = []
    for first, second in merges:
        if first in tokens and second in tokens and len(tokens) + 2 < vocabulary:
            tokens[first + second] = None
            kept.append(f'{first} {second}')
    numbers = {token: i for i, token in enumerate([*tokens, START, END])}
    config = {'model_max_length': length, 'bos_token': START, 'eos_token': END, 'pad_token': END, 'unk_token': END}
    return of_files(
        {
            'vocab.json': json.dumps(numbers, ensure_ascii=False).encode(),
            'merges.txt': '\n'.join(['#version: 0.2', *kept, '']).encode(),
            'tokenizer_config.json': json.dumps({**config, 'tokenizer_class': 'CLIPTokenizer'}, indent=2).encode(),
        },
        'vocab.json',
        0,
    )


def caption_text(caption: np.ndarray) -> str:
    """The text of a caption as data sets hold it, uint8 [L] with zeros behind it."""
    return re.sub('\0+$', '', bytes(caption).decode(errors='replace'))


def caption_texts(captions: np.ndarray) -> list[str]:
    """The texts of captions as data sets hold them, uint8 [n, L]."""
    return [caption_text(caption) for caption in np.asarray(captions)]
