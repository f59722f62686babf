"""The sections of a config that all families share: every field with its type, default, allowed values and meaning.

`config.model` is the keyword signature of the family's `build` in the same way (see options.py). What several fields
must be together is checked in config.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from jaxgen.options import Fields, NamedTexts, OneOf, PartialFields, Rule


def is_box(box: tuple) -> bool:
    return not box or (
        len(box) == 4 and all(type(x) is int for x in box) and min(box) >= 0 and min(box[2:]) >= 1
    )  # fmt: skip


def is_size(size: int | tuple) -> bool:
    sides = size if isinstance(size, tuple) else (size, size)
    return len(sides) == 2 and all(type(side) is int and 1 <= side <= 65536 for side in sides)


def sides(size: int | tuple[int, ...]) -> tuple[int, int]:
    """(height, width) in pixels of images of `data.size`."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def is_interval(values: tuple, most: float = float('inf')) -> bool:
    """Whether these are (least, most) of positive numbers."""
    return len(values) == 2 and 0 < values[0] <= values[1] <= most


def is_features(name: str) -> bool:
    return name in ('none', 'inception') or name.startswith('run:')


@dataclass(frozen=True, kw_only=True)
class Data:
    """The images, and what is done to them before they are trained on.

    Attributes:
      source: digits, shapes, gaussians:1, folder:PATH, pairs:PATH, idx:PATH, npz:FILE, npy:PATH, mat:FILE,
        parquet:PATH, cifar:PATH or a TFDS name, see jaxgen/data.
      other: a second source, whose images come unpaired as the feature 'other', and their captions as 'other_caption'.
      prompt: caption of every example, in place of the source's own.
      other_prompt: caption of every image of `other`.
      size: pixels of each side of square images, 28, or (height, width), (28, 20).
      channels: of an image.
      features: arrays of a batch, ('image', 'label'), ('image', 'edges').
      caption: the column, field or feature of the source that the feature 'caption' is: 'prompt', 'captions/text'; ''
        is the first of the usual names, 'text', 'caption', ...
      classes: number of classes where the source does not tell it (a folder, a TFDS set).
      batch: examples of one update, over all devices.
      keep_classes: classes that training is restricted to; the test split keeps all, for detecting the others.
      box: (top, left, height, width) in pixels, cut out before anything else.
      crop: where the largest part of an image in the aspect ratio of size lies, which is resized to size; 'resized'
        is a random rectangle, see crop_area.
      crop_area: least and most area of random rectangles, as a fraction of the image's.
      crop_aspect: least and most width / height of random rectangles.
      crop_rate: fraction of the training images with a random crop; the others have the central part.
      jitter: pixels by which training images are enlarged before size is cut out anywhere.
      pad: pixels that training images are padded with before size is cut out anywhere.
      shift: fraction of the side by which training images are moved up or down, left or right, at most.
      fill: pixels beyond the border, of pad and shift.
      flip: mirror half of the training images left to right.
      white: the stored pixel value that is white, of 0 to 255: 1 where bits are stored as 0 and 1, as TFDS's
        binarized_mnist has them. Of the image alone, before anything else.
      binarise: pixels of black and white, 0 and 255: 'threshold', at half; 'fixed', bits drawn once for each image with
        the grey level x / 255 as P(white); 'dynamic', drawn anew each time that an example is trained on, and else
        those of 'fixed'. Of the image alone, not of features beside it.
      low_resolution: shorter side in pixels of the feature 'low_resolution', means of squares of the image; 0 is none.
      dir: directory of prepared sets; '' is $TFDS_DATA_DIR or ~/tensorflow_datasets.
      test_fraction: fraction held out of a source without a test split; 0: all of it is trained on, and nothing is held
        out.
      test_source: a source of the test split, all of it where it has no test split of its own; 'split:NAME' is a split
        of `source`. Then all of a source without a test split is trained on.
      validation_fraction: fraction of the training examples held out for validation, by class; 0 is none.
      validation_source: a source of the validation split, as test_source; '' is the split validation (a folder's val)
        that `source` has beside a test split.
      direct: images of a folder at most that are read once to verify them, and copied into a prepared set; those of a
        larger one are read where they lie, and its identity is their names and sizes.
      max_corrupt: largest fraction of unreadable images in a source that is trained on all the same.
      max_pixels: of one image; larger ones are unreadable, or end the run where a data set has them.
      threads: of the loader, which read, and decode where there are no processes; 0 is as many as there are cores.
      processes: of the loader, which decode images that are stored as files; None is as many as there are cores, up to
        32, and none on one core or for fewer than 2,048 images; 0 decodes in threads.
      draft: JPEG files are decoded at 1/2, 1/4 or 1/8 of their size where that leaves draft times the pixels that are
        needed, 2 for instance: faster, and slightly other pixels; 0 is in full.
      cache_mb: megabytes; sets that decode to less are decoded once and kept in memory.
      prepared: latents or codes of the images by frozen stages are computed once, not in every update: 'auto', where
        the views of an image are few (data.flip) and the training is long enough to gain by it; a run goes on as it
        began. 'off' | 'on'.
      prepared_dir: directory of these; '' is prepared in the person's cache directory, ~/.cache/jaxgen.
      prepared_gb: gigabytes of all that lie there, the least recently used of which are removed.
      disk_mb: megabytes of decoded images that are kept in the person's cache directory, of all sets together, for the
        next process; sets that decode to more are not; 0 keeps none.
    """

    source: str = 'digits'
    other: str = ''
    prompt: str = ''
    other_prompt: str = ''
    size: Annotated[int | tuple[int, ...], Rule(is_size, 'int, or (height, width) in pixels, each from 1 to 65536')] = 8
    channels: Annotated[int, OneOf(1, 3)] = 1
    features: Annotated[tuple[str, ...], Rule(lambda x: 'image' in x, "names of features, 'image' among them")] = (
        'image',
    )
    caption: str = ''
    classes: Annotated[int, '[0, inf)'] = 0
    batch: Annotated[int, '[1, inf)'] = 128
    keep_classes: Annotated[
        tuple[int, ...], Rule(lambda x: all(type(c) is int and c >= 0 for c in x), 'numbers of classes')
    ] = ()
    box: Annotated[tuple[int, ...], Rule(is_box, '(top, left, height, width) in pixels')] = ()
    crop: Annotated[str, OneOf('center', 'random', 'resized')] = 'center'
    crop_area: Annotated[
        tuple[float, ...], Rule(lambda x: is_interval(x, 1), '(least, most), above 0 and at most 1')
    ] = (0.08, 1.0)
    crop_aspect: Annotated[tuple[float, ...], Rule(is_interval, '(least, most), above 0')] = (0.75, 4 / 3)
    crop_rate: Annotated[float, '(0, 1]'] = 1.0
    jitter: Annotated[int, '[0, inf)'] = 0
    pad: Annotated[int, '[0, inf)'] = 0
    shift: Annotated[float, '[0, 0.5)'] = 0.0
    fill: Annotated[str, OneOf('reflect', 'edge')] = 'reflect'
    flip: bool = False
    white: Annotated[int, '[1, 255]'] = 255
    binarise: Annotated[str, OneOf('none', 'threshold', 'fixed', 'dynamic')] = 'none'
    low_resolution: Annotated[int, '[0, inf)'] = 0
    dir: str = ''
    test_fraction: Annotated[float, '[0, 1)'] = 0.2
    test_source: str = ''
    validation_fraction: Annotated[float, '[0, 1)'] = 0.0
    validation_source: str = ''
    direct: Annotated[int, '[0, inf)'] = 100_000
    max_corrupt: Annotated[float, '[0, 1]'] = 0.01
    max_pixels: Annotated[int, '[1, inf)'] = 2**26
    threads: Annotated[int, '[0, 1024]'] = 0
    processes: Annotated[int | None, '[0, 1024]'] = None
    draft: Annotated[int, '[0, 16]'] = 0
    cache_mb: Annotated[int, '[0, inf)'] = 512
    prepared: Annotated[str, OneOf('auto', 'on', 'off')] = 'auto'
    prepared_dir: str = ''
    prepared_gb: Annotated[float, '[0, inf)'] = 16.0
    disk_mb: Annotated[int, '[0, inf)'] = 4096


# Fields of `optim` that are of the whole update, not of one network's optimiser.
OF_ALL_NETWORKS = ('accumulate', 'ema', 'ema_warmup', 'ema_std', 'ema_halflife', 'ema_rampup', 'networks')


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimiser, its schedules, and the moving average of the weights; see optim.py.

    Attributes:
      name: of the optimiser.
      lr: learning rate, after warm-up.
      schedule: factor of the learning rate by update, see optim.learning_rate.
      warmup: updates in which the learning rate rises linearly.
      plateau: fraction of the updates after warm-up before the rate falls (linear, cosine).
      floor: fraction of lr that is left at the end (linear, cosine, exponential, rsqrt).
      boundaries: updates at which lr is multiplied by decay_rate (step).
      decay_rate: factor at each boundary (step), or in every decay_every updates (exponential).
      decay_every: updates of one decay_rate (exponential), or before the rate falls (rsqrt).
      b1: decay of the gradient's moving average; of sgd its momentum.
      b2: decay of the squared gradient's moving average.
      eps: added to the root of that average.
      weight_decay: of adamw, times the learning rate.
      weight_decay_schedule: cosine goes to weight_decay_end at the last update.
      weight_decay_end: weight decay at the last update (cosine).
      no_decay: weights without weight_decay and l2, ('bias', 'scale'), by patterns for words of their paths.
      l2: l2 * weights is added to the clipped gradient; torch's Adam calls it weight_decay.
      clip: largest global norm of the gradient; 0 is off.
      normalise: each array's gradient is divided by its norm.
      accumulate: equal parts that a batch is cut into, one after another, for one gradient.
      ema: decay of the weights' moving average.
      ema_warmup: the decay at update n is at most (1 + n) / (10 + n).
      ema_halflife: half-life of the moving average in images, in place of ema; 0 is ema.
      ema_rampup: the half-life is at most this fraction of the images so far; 0 is no ramp-up.
      ema_std: widths of two more averages, (0.05, 0.1), for --weights=STD; with train.keep_every.
      networks: the fields that differ for one network.
    """

    name: Annotated[str, OneOf('adam', 'adamax', 'adamw', 'radam', 'rmsprop', 'sgd')] = 'adam'
    lr: Annotated[float, '(0, inf)'] = 2e-4
    schedule: Annotated[str, OneOf('constant', 'linear', 'cosine', 'half_linear', 'step', 'exponential', 'rsqrt')] = (
        'constant'
    )
    warmup: Annotated[int, '[0, inf)'] = 0
    plateau: Annotated[float, '[0, 1)'] = 0.0
    floor: Annotated[float, '[0, 1]'] = 0.0
    boundaries: Annotated[
        tuple[int, ...],
        Rule(lambda x: all(type(b) is int and b > 0 for b in x), 'numbers of updates, (60_000, 80_000)'),
    ] = ()
    decay_rate: Annotated[float, '(0, 1]'] = 1.0
    decay_every: Annotated[int, '[1, inf)'] = 1
    b1: Annotated[float, '[0, 1)'] = 0.9
    b2: Annotated[float, '[0, 1)'] = 0.999
    eps: Annotated[float, '[0, inf)'] = 1e-8
    weight_decay: Annotated[float, '[0, inf)'] = 0.0
    weight_decay_schedule: Annotated[str, OneOf('constant', 'cosine')] = 'constant'
    weight_decay_end: Annotated[float, '[0, inf)'] = 0.0
    no_decay: Annotated[
        tuple[str, ...], Rule(lambda x: all(isinstance(p, str) for p in x), "patterns, ('bias', 'scale')")
    ] = ()
    l2: Annotated[float, '[0, inf)'] = 0.0
    clip: Annotated[float, '[0, inf)'] = 0.0
    normalise: bool = False
    accumulate: Annotated[int, '[1, inf)'] = 1
    ema: Annotated[float, '[0, 1)'] = 0.9999
    ema_warmup: bool = False
    ema_halflife: Annotated[float, '[0, inf)'] = 0.0
    ema_rampup: Annotated[float, '[0, inf)'] = 0.0
    ema_std: Annotated[
        tuple[float, ...],
        Rule(
            lambda x: all(type(std) in (int, float) and 0 < std < 0.288 for std in x),
            'widths of more than 0 and less than 0.288',
        ),
    ] = ()
    networks: Annotated[dict[str, Any], PartialFields(Optim, omit=OF_ALL_NETWORKS)] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Train:
    """The loop: how long, how exact, and what is written when.

    Attributes:
      steps: updates.
      initial: run from whose averaged weights the training starts; '' is from random ones.
      updates_per_call: updates in one XLA program; every interval is a multiple of it.
      dtype: of computation; weights are float32.
      stages_dtype: of computation of frozen stages: 'run' is dtype, 'stage' that which each was trained in; 'auto' is
        'run', and in runs that began before there was this field 'stage'.
      remat: recompute activations in the backward pass, which takes time and saves memory.
      deterministic: kernels that give the same bits in every process, on GPUs (others have no choice): XLA takes these
        and not the fastest. It is an option of every program that is compiled, so that it may change on resume, and
        runs of both kinds may be in one Python program; XLA_FLAGS=--xla_gpu_deterministic_ops=true is for the whole
        process, is fixed with the first use of a device, and makes False do nothing.
      log_every: updates between two lines of metrics.
      save_every: updates between two checkpoints.
      keep: newest checkpoints that are kept.
      keep_every: and every checkpoint at a multiple of this; 0 is none.
      sample_every: updates between two grids of samples; 0 is only at the end.
      samples: images of a grid.
      evaluate_every: updates between two evaluations of samples, by config.evaluate.features; 0 is never.
      evaluate_samples: samples that are drawn for these.
      held_out_every: updates between two evaluations of the family's own metrics on validation examples, or on test
        examples where there are none; 0 is never.
      held_out_examples: of these; 0 is all.
      stop_on: metric by which the best checkpoint is kept, 'validation/NAME', or one of samples; '' is none.
      patience: evaluations without an improvement of it after which training stops; 0 is never.
    """

    steps: Annotated[int, '[1, inf)'] = 1000
    initial: str = ''
    updates_per_call: Annotated[int, '[1, inf)'] = 1
    dtype: Annotated[str, OneOf('float32', 'bfloat16')] = 'float32'
    stages_dtype: Annotated[str, OneOf('auto', 'run', 'stage')] = 'auto'
    remat: bool = False
    deterministic: bool = True
    log_every: Annotated[int, '[1, inf)'] = 50
    save_every: Annotated[int, '[1, inf)'] = 500
    keep: Annotated[int, '[1, inf)'] = 2
    keep_every: Annotated[int, '[0, inf)'] = 0
    sample_every: Annotated[int, '[0, inf)'] = 500
    samples: Annotated[int, '[1, inf)'] = 64
    evaluate_every: Annotated[int, '[0, inf)'] = 0
    evaluate_samples: Annotated[int, '[1, inf)'] = 2000
    held_out_every: Annotated[int, '[0, inf)'] = 0
    held_out_examples: Annotated[int, '[0, inf)'] = 0
    stop_on: str = ''
    patience: Annotated[int, '[0, inf)'] = 0


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """The layout of the devices.

    Attributes:
      fsdp: devices that share one copy of the weights; the batch is cut over all devices.
    """

    fsdp: Annotated[int, '[1, inf)'] = 1


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Sampling.

    Attributes:
      batch: samples drawn at once.
    """

    batch: Annotated[int, '[1, inf)'] = 256


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluation on held-out examples and of samples.

    Attributes:
      batch: examples measured at once.
      held_out: split of the family's own metrics; train is for comparison.
      examples: of that split; 0 is all.
      samples: drawn for metrics of samples.
      features: the feature network of these metrics.
      clip: a CLIP run by which samples are compared with their captions, and with the data, beside these: CLIP score,
        R-precision and CMMD.
      templates: prompts by which a CLIP run's test images are classified without training: {} is the name of the class,
        {colour} that of a factor's value; see evaluation/prompts.py.
      ensemble: what of the several prompts of a class is averaged.
      inception: file with the published weights, for 'inception'.
      split: images that samples are compared with; most papers take train.
      reference: a published file of moments (.npz with mu and sigma, as EDM, guided-diffusion and pytorch-fid have
        them) that samples are compared with in place of the images.
    """

    batch: Annotated[int, '[1, inf)'] = 256
    held_out: Annotated[str, OneOf('test', 'validation', 'train')] = 'test'
    examples: Annotated[int, '[0, inf)'] = 0
    samples: Annotated[int, '[1, inf)'] = 50_000
    features: Annotated[str, Rule(is_features, "'inception', 'run:PATH' or 'none'")] = 'none'
    clip: Annotated[str, Rule(lambda name: name == 'none' or name.startswith('run:'), "'run:PATH' or 'none'")] = 'none'
    templates: tuple[str, ...] = ('a photo of a {}',)
    ensemble: Annotated[str, OneOf('embeddings', 'probabilities')] = 'embeddings'
    inception: str = ''
    split: Annotated[str, OneOf('train', 'validation', 'test')] = 'train'
    reference: str = ''


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole config.

    Attributes:
      family: module in jaxgen/families.
      seed: of weights, order of the data, and noise.
      model: keyword arguments of the family's build.
      stages: run directories of earlier stages by their names.
    """

    family: str = ''
    seed: Annotated[int, '[0, 2147483647]'] = 0
    model: dict[str, Any] = field(default_factory=dict)
    stages: Annotated[dict[str, str], NamedTexts('the directory of a run')] = field(default_factory=dict)
    data: Annotated[dict[str, Any], Fields(Data)] = field(default_factory=dict)
    optim: Annotated[dict[str, Any], Fields(Optim)] = field(default_factory=dict)
    train: Annotated[dict[str, Any], Fields(Train)] = field(default_factory=dict)
    mesh: Annotated[dict[str, Any], Fields(Mesh)] = field(default_factory=dict)
    sample: Annotated[dict[str, Any], Fields(Sample)] = field(default_factory=dict)
    evaluate: Annotated[dict[str, Any], Fields(Evaluate)] = field(default_factory=dict)
