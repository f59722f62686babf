"""Files of textual inversion: the rows of one new word, as diffusers, AUTOMATIC1111's web UI and SDXL's trainers write
them, in and out.

    {'<word>': [n, D] or [D]}            learned_embeds.safetensors and .bin of diffusers
    {'string_to_param': {'*': [n, D]}}   .pt of the web UI, whose word is the file's name; 'emb_params' in safetensors
    {'clip_l': [n, D], 'clip_g': ...}    of several text encoders, whose word is the file's name
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from ml_collections import ConfigDict

import jaxgen
from jaxgen import assembly, directory, files, log, merging
from jaxgen import config as configs
from jaxgen.diffusion import inversion
from jaxgen.diffusion.adapters import BASE, INVERSION
from jaxgen.errors import UserError
from jaxgen.run import Run
from jaxgen.weights import mapping
from jaxgen.weights.files import Tensor, Weights, open_weights

WEB_UI = ('string_to_param.', 'emb_params')  # beginnings of names of tensors whose word the file does not say
CLIP, T5 = ('clip_l', 'clip_g'), 't5xxl'  # names by text encoder
MOST = 1024  # rows of a word


def names_of(base: ConfigDict) -> dict[str, str]:
    """{text encoder of a base: its name in files}, in their order."""
    encoders = inversion.encoders_of(base.model.to_dict())
    made, clips = {}, iter(CLIP)
    for encoder in encoders:
        model = directory.saved_config(base.stages[encoder]).model
        is_t5 = model.get('network', {}).get('name') == 't5'
        made[encoder] = T5 if is_t5 else next(clips, encoder)
    return made


def word_and_rows(weights: Weights) -> tuple[str, dict[str, Tensor]]:
    """(the word, {name of a text encoder, '' where there is but one: its rows}) of a file.

    Raises:
      UserError: it is a file of something else.
    """
    stem = os.path.splitext(os.path.basename(os.path.abspath(weights.path)))[0]
    tensors = weights.tensors
    if set(tensors) <= {*CLIP, T5}:
        word, rows = stem, dict(tensors)
    elif len(tensors) == 1:
        ((name, tensor),) = tensors.items()
        word, rows = stem if name.startswith(WEB_UI) else name, {'': tensor}
    else:
        raise UserError(
            f'{weights.path} is no file of textual inversion: it has {len(tensors)} tensors, and should have one, or '
            f'those of {", ".join(CLIP)}'
        )
    for name, tensor in rows.items():
        if len(tensor.shape) not in (1, 2) or not tensor.shape[0] >= 1 or tensor.dtype.name not in mapping.DTYPES:
            raise UserError(
                f'{weights.path} is no file of textual inversion: {name or word} is {tensor.dtype} of '
                f'{list(tensor.shape)}, and should be numbers of [tokens, width]'
            )
    counts = {tensor.shape[0] if len(tensor.shape) == 2 else 1 for tensor in rows.values()}
    if len(counts) > 1 or max(counts) > MOST:
        raise UserError(
            f'{weights.path}: the word is {" and ".join(map(str, sorted(counts)))} tokens, and should be one number of '
            f'them for all text encoders, of {MOST} at most'
        )
    return word, rows


def placed(path: str, rows: Mapping[str, Tensor], names: Mapping[str, str], widths: Mapping[str, int]) -> dict:
    """{text encoder: rows} by the names in the file, or else by their width.

    Args:
      names, widths: of the text encoders.

    Raises:
      UserError: none is of this width.
    """
    made: dict[str, Tensor] = {}
    for name, tensor in rows.items():
        width = tensor.shape[-1]
        by_name = [encoder for encoder in names if names[encoder] == name and len(names) > 1]
        fitting = [e for e in by_name or names if widths[e] == width and e not in made]
        if not fitting:
            there = ', '.join(f'{encoder} {widths[encoder]}' for encoder in by_name or names)
            raise UserError(
                f'{path} is a word of another text encoder: {name or "it"} is {width} wide, and config.stages has '
                f'{there}'
            )
        made[fitting[0]] = tensor
    return made


def import_word(config: ConfigDict, path: str, workdir: str, licence: str = '') -> None:
    """Writes the run `workdir`, at step 0, of a file of textual inversion.

    Args:
      config: as of `tuning.derived`, BASE:inversion; its word, where it has one, is taken in place of the file's.

    Raises:
      UserError: the file cannot be read safely, or is of another text encoder.
    """
    weights = open_weights(path)
    word, rows = word_and_rows(weights)
    word = config.model.adapter.word or word
    base, spec, _ = directory.read(config.stages[BASE])
    frozen = assembly.assemble(base, stage=assembly.abstract_stage, spec=spec).frozen
    names = names_of(base)
    widths = {encoder: inversion.table_of(frozen[encoder][0]).shape[1] for encoder in names}
    placed_rows = placed(weights.path, rows, names, widths)
    made = {name: np.atleast_2d(mapping.finite(word, x.read()).astype(np.float32)) for name, x in placed_rows.items()}
    vectors = len(next(iter(made.values())))
    encoders = () if set(made) == set(names) else tuple(sorted(made))
    adapter = {'name': INVERSION, 'word': word, 'vectors': vectors, 'initial': '', 'encoders': encoders}
    config = configs.complete(configs.update_sections(config.to_dict(), {'model': {'adapter': adapter}}))
    assembled = assembly.assemble(config, stage=assembly.abstract_stage, spec=spec)
    for encoder, words, _ in assembled.family.captions.added:
        if tokenizer := directory.saved_tokenizer(config.stages[encoder]):
            tokenizer.with_word(words, range(vectors))
    record: dict[str, Any] = {
        'source': INVERSION,
        'title': 'textual inversion',
        'file': os.path.basename(os.path.abspath(weights.path)),
        'licence': licence,
        'sha256': weights.sha256,
        'jaxgen': jaxgen.__version__,
    }
    ema = {INVERSION: {name: jnp.asarray(x) for name, x in made.items()}}
    merging.write(workdir, '--workdir', 'import', config, spec, ema, None, record)
    log.say(f'imported the word {word!r} of {vectors} tokens of {", ".join(made)}: {workdir} is a run at step 0')


def export_word(run: Run, to: str, names: str = '') -> None:
    """Writes the word of a run as a .safetensors file or one of torch, as diffusers reads it.

    Raises:
      UserError: another kind of file, or names that there are not.
    """
    from jaxgen.weights.exporting import write_torch  # which exports runs of all kinds

    if names not in ('', 'diffusers'):
        raise UserError(f'--names={names}: the names of a word are diffusers')
    if not to.endswith(('.safetensors', '.pt', '.bin')):
        raise UserError(f'--to={to}: a word is written as FILE.safetensors, FILE.pt or FILE.bin')
    rows = {encoder: np.asarray(x, np.float32) for encoder, x in run.state.ema[INVERSION].items()}
    encoders = names_of(directory.read(run.config.stages[BASE])[0])
    word = run.config.model.adapter.word
    made = {word if len(encoders) == 1 else encoders[encoder]: np.array(x, order='C') for encoder, x in rows.items()}
    if to.endswith('.safetensors'):
        metadata = {'format': 'pt', 'jaxgen': jaxgen.__version__, 'step': str(run.step), 'word': word}
        with files.replacing(to) as file:
            file.write(safetensors.numpy.save(made, metadata))
    else:
        write_torch(to, made.items())
    log.say(f'exported the word {word!r} of {", ".join(rows)}: {to}')
