"""AttnGAN: images from captions, in stages (Xu et al. 2017, arXiv 1711.10485).

As in StackGAN++ (Zhang et al. 2017, arXiv 1710.10916) one generator makes an image at every stage, each twice as large
as the one before, and every stage has a discriminator of its own. The first stage is conditioned on the sentence only,
by a draw from a Gaussian about it (conditioning augmentation, StackGAN, 1612.03242); each later one attends, position
by position, to the words. With `attention` = False it gets the sentence's condition once more instead, which is
StackGAN++.

Discriminators take an image alone and with a caption; data with a wrong caption, another example's, count as fake.
With a = -log s(D) and b = -log(1 - s(D)), s being the sigmoid, a stage's discriminator minimises

    (E a(x) + E a(x, c)) / 2 + (E b(G) + E b(G, c) + E b(x, c')) / 3

and the generator, over all stages,

    sum (E a(G) + E a(G, c)) + kl * KL(condition || N(0, I)) + matching * DAMSM(G, c)

where the KL is a mean over dimensions, and DAMSM classifies, by their features, the caption of each image of the last
stage among the batch's, and the reverse (losses/matching.py). Captions that are the same word for word do not count as
others.

Where captions differ in many things at once, two of a batch hardly ever differ in one alone: a model that reads the
colour can ignore the shape. So with `swap` the wrong caption is the example's own but for one word, which another's has
in that position, and DAMSM has these as negatives too. (Yuksekgonul et al. 2022, arXiv 2210.01936, teach CLIP the order
of words by captions that are wrong in little.)

The encoders of captions and of images, which learn these features of the data, are published as a stage of their own.
Here they learn beside the GAN, one step in each update, from data alone: the GAN's steps leave them alone, and all of
the GAN reads captions by their moving averages, as sampling does.

State.extra holds the batch statistics of the averaged generator, see `layers.apply_averaged`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from jaxgen import options
from jaxgen.checks import check_size
from jaxgen.contract import Aux, Captions, Context, Family, Latents, advance, gradient_step, new_state, shard_batch
from jaxgen.errors import UserError
from jaxgen.losses.adversarial import check_penalties, non_saturating_generator, r1_penalty, vanilla_discriminator
from jaxgen.losses.divergences import normal_kl
from jaxgen.losses.matching import LOW, cosine, matching_loss, sentence_similarity, word_similarity
from jaxgen.networks.attngan import Discriminator, Generator, ImageEncoder
from jaxgen.networks.layers import apply_averaged, apply_in_training, downsample_mean, normalised, upsample_nearest
from jaxgen.networks.text import TextEncoder, word_numbers
from jaxgen.optim import Optim
from jaxgen.options import Count, NonNegative, Rate, Rule
from jaxgen.randomness import example_keys, normal

Array = jax.Array

FORMER = {'attend': 'gamma1', 'gather': 'gamma2', 'sharpness': 'gamma3'}


class Encoded(NamedTuple):
    """Captions and their features."""

    numbers: Array  # of their words, int32 [n, T]
    words: Array  # features [n, T, d]
    sentence: Array  # features [n, d]

    @property
    def mask(self) -> Array:
        """bool [n, T], true where there is a word."""
        return self.numbers > 0


class Networks(NamedTuple):
    """All networks, and what they take."""

    text: TextEncoder
    encoder: ImageEncoder
    generator: Generator
    discriminators: dict[str, Discriminator]  # of the stages, from the smallest image on
    latent: int  # dimensions of z
    length: int  # words of a caption that are read
    draw_condition: bool  # else it is the mean

    def numbers(self, batch: dict[str, Array]) -> Array:
        """Of the words of the captions in a batch, int32 [n, T]."""
        return word_numbers(batch['caption'], self.length, self.text.numbers)

    def encode(self, weights, numbers: Array, rng: Array | None = None) -> Encoded:
        """Captions by their words' numbers [n, T]; with dropout, given its rng.

        Features have a mean square of 1. The matching is of directions and leaves them any size: of the scenes'
        captions 0.01, which the generator hardly uses beside z, whose is 1. (The published ones stay as they are.)"""
        rngs = {} if rng is None else {'dropout': rng}
        words, sentence = self.text.apply({'params': weights}, numbers, rng is not None, rngs=rngs)
        return Encoded(numbers, normalised(words, 1e-6), normalised(sentence, 1e-6))

    def condition_noise(self, noise: Array) -> Array:
        """The noise of conditioning augmentation, from draws of N(0, 1)."""
        return noise if self.draw_condition else jnp.zeros_like(noise)

    def inputs(self, batch: dict) -> tuple[Array, ...]:
        """The generator's arguments, of a batch of 'z', 'noise' and encoded captions."""
        captions = batch['captions']
        return batch['z'], batch['noise'], captions.sentence, captions.words, captions.mask

    def discriminate(self, params, name: str, x: Array, sentences: list[Array]) -> tuple[Array, list[Array]]:
        """Values [n] of images alone, and with each of the sentences."""
        variables = {'params': params[name]}
        return self.discriminators[name].apply(variables, x, sentences, mutable=['batch_stats'])[0]

    def values(self, params, name: str, sentence: Array, x: Array) -> Array:
        """Of images alone and with their captions, [n, 2]."""
        alone, conditional = self.discriminate(params, name, x, [sentence])
        return jnp.stack([alone, *conditional], -1)

    def sizes(self, x: Array) -> tuple[Array, ...]:
        """Images [n, H, W, C] in the sizes of all stages."""
        sizes = [x]
        for _ in range(len(self.discriminators) - 1):
            sizes.append(downsample_mean(sizes[-1]))
        return tuple(reversed(sizes))


class Matching(NamedTuple):
    """DAMSM and what it compares; fields of `build`."""

    gamma1: float
    gamma2: float
    gamma3: float
    swap: bool

    def candidates(self, captions, wrong):
        """The captions that images are matched with: theirs, and with `swap` the wrong ones behind them."""
        return jax.tree.map(lambda *x: jnp.concatenate(x), captions, wrong) if self.swap else captions

    def wrong(self, numbers: Array, rng: Array) -> Array:
        """A wrong caption for each, by its words' numbers [n, T]."""
        other = jnp.roll(numbers, 1, 0)
        if not self.swap:
            return other
        differ = (numbers != other) & (numbers > 0) & (other > 0)
        position = jnp.where(differ, jax.random.uniform(rng, numbers.shape), -1).argmax(1)
        return jnp.where(jnp.arange(numbers.shape[1]) == position[:, None], other, numbers)

    def loss(self, networks: Networks, weights, images: Array, captions: Encoded) -> Array:
        """DAMSM of images and captions: theirs, in this order, and perhaps more; `weights` of the image encoder."""
        regions, whole = networks.encoder.apply({'params': weights}, images)
        own = jnp.arange(len(images))[:, None] == jnp.arange(len(captions.numbers))
        same = (captions.numbers[: len(images), None] == captions.numbers).all(-1)
        by_word = word_similarity(regions, captions.words, captions.mask, self.gamma1, self.gamma2)
        by_sentence = sentence_similarity(whole, captions.sentence)
        losses = (matching_loss(similarity, own, same, self.gamma3) for similarity in (by_word, by_sentence))
        return sum(losses)


# --- losses


def encoders_loss(networks: Networks, matching: Matching, params, state, frozen, batch, rng):
    """DAMSM of data, which both encoders learn from; the batch holds the words' numbers of captions and wrong ones."""
    numbers = matching.candidates(batch['numbers'], batch['wrong'])
    value = matching.loss(networks, params['encoder'], batch['image'], networks.encode(params['text'], numbers, rng))
    return value, Aux({'matching_loss': value})


def discriminator_loss(networks: Networks, r1: float, params, state, frozen, batch, rng):
    """Sum over the stages of the discriminators' losses, see above; the batch holds the samples of all stages."""
    captions, wrong = batch['captions'], batch['wrong']
    differ = (captions.numbers != wrong.numbers).any(-1)
    images = networks.sizes(batch['image'])
    total, logs = 0.0, {}
    for name, x, sample in zip(networks.discriminators, images, batch['samples'], strict=True):
        sentences = [captions.sentence, wrong.sentence]
        real, (real_matched, mismatched) = networks.discriminate(params, name, x, sentences)
        fake, (fake_matched,) = networks.discriminate(params, name, sample, sentences[:1])
        mismatched = jnp.where(differ, mismatched, LOW)  # a wrong caption that is the right one counts as nothing
        value = vanilla_discriminator(jnp.stack([real, real_matched]), jnp.stack([fake, fake_matched, mismatched]))
        if r1:
            value += r1 * r1_penalty(functools.partial(networks.values, params, name, sentences[0]), x).mean()
        total, logs[f'{name}_loss'] = total + value, value
    return total, Aux(logs)


def generator_loss(networks: Networks, matching: Matching, weight: float, kl: float, params, state, frozen, batch, rng):
    """Adversarial loss over all stages, KL of the condition and DAMSM of the last stage, with its weight; see above."""
    (images, mean, log_variance), _ = apply_in_training(
        networks.generator, params['generator'], *networks.inputs(batch)
    )
    adversarial = 0.0
    for name, x in zip(networks.discriminators, images, strict=True):
        # Twice the mean of both.
        adversarial += 2 * non_saturating_generator(networks.values(params, name, batch['captions'].sentence, x))
    divergence = normal_kl(mean, log_variance).mean() / mean.shape[-1]
    value, logs = adversarial + kl * divergence, {'adversarial': adversarial, 'kl': divergence}
    if weight:
        candidates = matching.candidates(batch['captions'], batch['wrong'])
        logs['damsm'] = matching.loss(networks, state.ema['encoder'], images[-1], candidates)
        value = value + weight * logs['damsm']
    return value, Aux({'generator_loss': value, **logs})


# --- training


def init(networks: Networks, optim: Optim, rng, batch, frozen):
    """The state before the first update: all networks, and averages of those that sampling needs."""
    caption, x = batch['caption'][:1], batch['image'][:1]
    if caption.ndim != 2 or caption.dtype != jnp.uint8:
        raise UserError(
            f'a caption must be bytes, uint8 [n]; that of config.data.source is {caption.dtype} {caption.shape[1:]}'
        )
    if len(batch['image']) // optim.accumulate < 2:
        raise UserError('config.data.batch must be 2 or more (by config.optim.accumulate): captions are compared')
    text_rng, encoder_rng, generator_rng, *rngs = jax.random.split(rng, 3 + len(networks.discriminators))
    features, length = networks.text.features, networks.length
    sentence, words, mask = jnp.zeros((1, features)), jnp.zeros((1, length, features)), jnp.ones((1, length), bool)
    z, noise = jnp.zeros((1, networks.latent)), jnp.zeros((1, networks.generator.condition))
    variables = networks.generator.init(generator_rng, z, noise, sentence, words, mask, train=True)
    params = {
        'text': networks.text.init(text_rng, jnp.zeros((1, length), jnp.int32))['params'],
        'encoder': networks.encoder.init(encoder_rng, x)['params'],
        'generator': variables['params'],
    }
    for key, image, (name, network) in zip(rngs, networks.sizes(x), networks.discriminators.items(), strict=True):
        params[name] = network.init(key, image, [sentence])['params']
    return new_state(params, optim, variables['batch_stats'], ema=('text', 'encoder', 'generator'))


class Steps(NamedTuple):
    """The optimiser's steps of an update."""

    encoders: Callable
    discriminators: Callable
    generator: Callable


def update(networks: Networks, optim: Optim, steps: Steps, matching: Matching, state, frozen, batch, rng):
    """One update: a step of the encoders, one of all discriminators, one of the generator, and its statistics."""
    encoders_rng, wrong_rng, z_rng, noise_rng, discriminator_rng, generator_rng = jax.random.split(rng, 6)
    n, numbers = len(batch['image']), networks.numbers(batch)
    wrong = shard_batch(matching.wrong(numbers, wrong_rng))
    captions = {'image': batch['image'], 'numbers': numbers, 'wrong': wrong}
    state, encoders_aux = steps.encoders(state, frozen, captions, encoders_rng)
    noise = shard_batch(jax.random.normal(noise_rng, (n, networks.generator.condition)))
    batch = {
        'image': batch['image'],
        'captions': networks.encode(state.ema['text'], numbers),
        'wrong': networks.encode(state.ema['text'], wrong),
        'z': shard_batch(jax.random.normal(z_rng, (n, networks.latent))),
        'noise': networks.condition_noise(noise),
    }
    inputs = networks.inputs(batch)
    (samples, _, _), _ = apply_in_training(networks.generator, state.params['generator'], *inputs)
    state, discriminator_aux = steps.discriminators(state, frozen, {**batch, 'samples': samples}, discriminator_rng)
    state, generator_aux = steps.generator(state, frozen, batch, generator_rng)
    after = advance(state, optim)
    _, statistics = apply_averaged(networks.generator, after.ema['generator'], state, state.extra, *inputs)
    logs = encoders_aux.logs | discriminator_aux.logs | generator_aux.logs
    return after.replace(extra=statistics), logs


# --- samples


def generate(networks: Networks, state, batch, rng, z: Array | None = None) -> tuple[Array, ...]:
    """Images of all stages for the captions in the batch, and for latents [n, latent] if there are any."""
    z_rng, noise_rng = jax.random.split(rng)
    z = normal(example_keys(z_rng, batch), (networks.latent,)) if z is None else z
    noise = normal(example_keys(noise_rng, batch), (networks.generator.condition,))
    captions = networks.encode(state.ema['text'], networks.numbers(batch))
    inputs = networks.inputs({'z': z, 'noise': networks.condition_noise(noise), 'captions': captions})
    return networks.generator.apply({'params': state.ema['generator'], 'batch_stats': state.extra}, *inputs)[0]


def sample(networks: Networks, state, frozen, batch, rng):
    """Images [n, H, W, C] of the last stage for the captions of a batch."""
    return generate(networks, state, batch, rng)[-1]


def decode(networks: Networks, state, frozen, batch, latents, rng):
    """Images [n, H, W, C] of the last stage for captions and latents [n, latent]."""
    return generate(networks, state, batch, rng, latents)[-1]


def trajectory(networks: Networks, state, frozen, batch, rng):
    """{'stages': images [stages, n, H, W, C]}, the small ones enlarged."""
    images = list(generate(networks, state, batch, rng))
    for i, x in enumerate(images):
        for _ in range(len(images) - 1 - i):
            x = upsample_nearest(x)
        images[i] = x
    return {'stages': jnp.stack(images)}


def evaluate(networks: Networks, state, frozen, batch, rng):
    """Cosines [n] of images' and captions' features: {'match/image': of data, 'match/sample': of samples}."""
    sentence = networks.encode(state.ema['text'], networks.numbers(batch)).sentence

    def match(x):
        return cosine(networks.encoder.apply({'params': state.ema['encoder']}, x)[1], sentence)

    samples = sample(networks, state, frozen, batch, rng)
    return {'match/image': match(batch['image']), 'match/sample': match(samples)}


@options.checked
def build(
    context: Context,
    *,
    stages: Count = 3,
    doublings: Count = 4,
    width: Count = 32,
    latent: Count = 100,
    condition: Count = 100,
    blocks: Annotated[int, '[0, inf)'] = 2,
    attention: bool = True,
    discriminator_width: Count = 64,
    discriminator_norm: bool = True,
    r1: NonNegative = 0.0,
    swap: bool = False,
    words: Annotated[int, '[2, inf)'] = 5450,
    length: Count = 18,
    embedding: Count = 300,
    features: Annotated[int, '[2, inf)', Rule(lambda n: n % 2 == 0, 'even')] = 256,
    dropout: Rate = 0.5,
    encoder_width: Count = 32,
    gamma1: NonNegative = 4.0,
    gamma2: NonNegative = 5.0,
    gamma3: NonNegative = 10.0,
    matching: NonNegative = 5.0,
    kl: NonNegative = 1.0,
) -> Family:
    """AttnGAN.

    Args:
      stages, doublings: the first image is 2^doublings times as large as the first map, and there are so many images.
      width, condition, blocks, attention: of the generator, see networks/attngan.py.
      latent: dimensions of z.
      discriminator_width, discriminator_norm: channels of the discriminators' first maps; their batch normalisation.
      r1: weight of R1 at data, of both of a discriminator's values (losses/adversarial.py); 0, as published: none.
      swap: wrong captions are right ones but for a word, which takes the place of another as it stands, be it an
        article. Captions of one kind of sentence are meant, whose words stand in the same positions.
      words: numbers that words may have, see networks/text.py; more make collisions rarer.
      length: words of a caption that are read.
      embedding, features, dropout: of the text encoder; the image encoder has as many features.
      encoder_width: channels of the image encoder's first map.
      gamma1, gamma2, gamma3: of losses/matching.py.
      matching: weight of the matching of samples (lambda; 5 for birds, 50 for COCO); 0: none.
      kl: weight of the condition's KL; 0: the condition is its mean, not a draw.

    Logs: the discriminators' losses by image height, 'generator_loss' with its parts 'adversarial', 'kl' and 'damsm',
    and 'matching_loss', DAMSM of data.

    Samples are of the captions in the batch; trajectory has the images of all stages, the small ones enlarged.
    evaluate returns per example the cosine of an image's features with its caption's: 'match/image' of the data, and
    'match/sample' of a sample of the same caption.

    Raises:
      UserError: values that do not fit each other or the data.
    """
    levels, height = doublings + stages - 1, context.image[0]
    check_penalties(discriminator_norm, r1=r1)
    check_size(context.image, 2**levels, f'config.model.stages = {stages} and doublings = {doublings}')
    discriminators = {  # by the height of their images
        f'discriminator{height >> (stages - 1 - i)}': Discriminator(
            discriminator_width, doublings + i, doublings, discriminator_norm, context.dtype
        )
        for i in range(stages)
    }
    networks = Networks(
        TextEncoder(words, embedding, features, dropout),
        ImageEncoder(encoder_width, levels, features, context.dtype),
        Generator(context.image, stages, doublings, width, condition, blocks, attention, context.remat, context.dtype),
        discriminators,
        latent,
        length,
        draw_condition=kl > 0,
    )
    damsm, optim, partial = Matching(gamma1, gamma2, gamma3, swap), context.optim, functools.partial
    steps = Steps(
        gradient_step(partial(encoders_loss, networks, damsm), optim, 'text', 'encoder'),
        gradient_step(partial(discriminator_loss, networks, r1), optim, *discriminators),
        gradient_step(partial(generator_loss, networks, damsm, matching, kl), optim, 'generator'),
    )
    return Family(
        partial(init, networks, optim),
        partial(update, networks, optim, steps, damsm),
        partial(sample, networks),
        partial(evaluate, networks),
        decode=partial(decode, networks),
        trajectory=partial(trajectory, networks),
        conditions=('caption',),
        divisor=2**levels,
        statistics=True,
        latents=Latents(shape=(latent,)),
        captions=Captions(length),
        larger=('match',),
    )
