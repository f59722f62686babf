"""AttnGAN: pictures from captions, in stages (Xu et al. 2017, arXiv 1711.10485).

As in StackGAN++ (Zhang et al. 2017, arXiv 1710.10916) one generator paints an image at every stage, each twice as large
as the one before, and every stage has a discriminator of its own. The first stage knows the sentence only, as a draw
from a Gaussian about it (conditioning augmentation, StackGAN, 1612.03242); each later one looks, place by place, at the
words that fit there. With `attention` = False it gets the sentence once more instead, which is StackGAN++.

Discriminators judge an image alone and with a caption; data with a wrong caption, another example's, count as fake.
With a = -log s(D) and b = -log(1 - s(D)), s being the sigmoid, a stage's discriminator minimises

    (E a(x) + E a(x, c)) / 2 + (E b(G) + E b(G, c) + E b(x, c')) / 3

and the generator, over all stages,

    sum (E a(G) + E a(G, c)) + kl * KL(condition || N(0, I)) + matching * DAMSM(G, c)

where the KL is a mean over dimensions, and DAMSM tells, by their features, the caption of each image of the last stage
from the batch's others, and the reverse (losses/matching.py). Captions that are the same word for word do not count as
others.

Where captions differ in many things at once, two of a batch hardly ever differ in one alone: whoever knows the colour
need not look at the shape. So with `swap` the wrong caption is the example's own but for one word, which another's has
in that place, and DAMSM has these to tell from the right ones too. (Yuksekgonul et al. 2022, arXiv 2210.01936, teach
CLIP the order of words by captions that are wrong in little.)

The encoders of captions and of images, which learn these features of the data, are published as a stage of their own.
Here they learn beside the GAN, one step in each update, from data alone: neither player touches them, and all of the
GAN reads captions by their moving averages, which sample too.

Batch statistics of the averaged generator are kept as in families/gan.py.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen.checks import check_size
from jaxgen.contract import (
    Aux,
    Captions,
    Context,
    Family,
    Latents,
    advance,
    gradient_step,
    new_state,
    running_mean,
    shard_batch,
)
from jaxgen.errors import UserError
from jaxgen.losses.adversarial import check_penalties, non_saturating_generator, r1_penalty, vanilla_discriminator
from jaxgen.losses.divergences import normal_kl
from jaxgen.losses.matching import LOW, cosine, matching_loss, sentence_similarity, word_similarity
from jaxgen.networks import attngan as networks
from jaxgen.networks.layers import STATISTICS_DECAY, apply_in_training, downsample_mean, normalised, upsample_nearest
from jaxgen.networks.text import TextEncoder, word_numbers
from jaxgen.randomness import example_keys, normal

Array = jax.Array
PyTree = Any


def build(
    context: Context,
    *,
    stages: int = 3,
    doublings: int = 4,
    width: int = 32,
    latent: int = 100,
    condition: int = 100,
    blocks: int = 2,
    attention: bool = True,
    discriminator_width: int = 64,
    discriminator_norm: bool = True,
    r1: float = 0.0,
    swap: bool = False,
    words: int = 5450,
    length: int = 18,
    embedding: int = 300,
    features: int = 256,
    dropout: float = 0.5,
    encoder_width: int = 32,
    attend: float = 4.0,
    gather: float = 5.0,
    sharpness: float = 10.0,
    matching: float = 5.0,
    kl: float = 1.0,
) -> Family:
    """AttnGAN.

    Args:
      stages, doublings: the first image is 2^doublings times as large as the first map, and there are so many images.
      width, condition, blocks, attention: of the generator, see networks/attngan.py.
      latent: dimensions of z.
      discriminator_width, discriminator_norm: channels of the discriminators' first maps; their batch normalisation.
      r1: weight of R1 at data, of both of a discriminator's values (losses/adversarial.py); 0, as published: none.
      swap: wrong captions are right ones but for a word, which takes the place of another as it stands, be it an
        article. Captions of one kind of sentence are meant, whose words stand in the same places.
      words: numbers that words may have, see networks/text.py; more make it rarer that two words share one.
      length: words of a caption that are read.
      embedding, features, dropout: of the text encoder; the image encoder has as many features.
      encoder_width: channels of the image encoder's first map.
      attend, gather, sharpness: gamma_1, gamma_2 and gamma_3 of losses/matching.py.
      matching: weight of the matching of samples (lambda; 5 for birds, 50 for COCO); 0: none.
      kl: weight of the condition's KL; 0: the condition is its mean, not a draw.

    Samples are of the captions in the batch; trajectory shows the images of all stages, the small ones enlarged.
    evaluate gives per example the cosine of a picture's features with its caption's: 'match/image' of the data, and
    'match/sample' of a sample of the same caption.

    Raises:
      UserError: a value that cannot work.
    """
    levels = doublings + stages - 1
    divisor, height = 2**levels, context.image[0]
    if min(stages, doublings, width, latent, condition, discriminator_width, length, embedding, encoder_width) < 1:
        raise UserError(
            'config.model: stages, doublings, width, latent, condition, discriminator_width, length, embedding and '
            'encoder_width must be 1 or more'
        )
    if words < 2 or features < 2 or features % 2:
        raise UserError('config.model: words must be 2 or more, and features an even number')
    if min(blocks, r1, matching, kl, attend, gather, sharpness) < 0 or not 0 <= dropout < 1:
        raise UserError(
            'config.model: blocks, r1, matching, kl, attend, gather and sharpness must be 0 or more, and dropout in '
            '[0, 1)'
        )
    check_penalties(discriminator_norm, r1=r1)
    check_size(context.image, divisor, f'config.model.stages = {stages} and doublings = {doublings}')

    generator = networks.Generator(
        context.image, stages, doublings, width, condition, blocks, attention, context.remat, context.dtype
    )
    discriminators = {  # by the height of their images
        f'discriminator{height >> (stages - 1 - i)}': networks.Discriminator(
            discriminator_width, doublings + i, doublings, discriminator_norm, context.dtype
        )
        for i in range(stages)
    }
    text = TextEncoder(words, embedding, features, dropout)
    encoder = networks.ImageEncoder(encoder_width, levels, features, context.dtype)

    def numbers_of(batch) -> Array:
        """Of the words of the captions in a batch, int32 [n, T]."""
        return word_numbers(batch['caption'], length, words)

    def read(weights, numbers: Array, rng: Array | None = None) -> dict[str, Array]:
        """Captions by their words' 'numbers' [n, T], and their features: 'sentence' [n, d], 'words' [n, T, d], and
        'there' [n, T], where there is a word; with dropout, given its rng.

        Features have a mean square of 1. The matching goes by directions and leaves them any size: of the scenes'
        captions 0.01, which beside z, whose is 1, the generator hardly sees. (The published ones stay as they are.)"""
        found, sentence = text.apply(
            {'params': weights}, numbers, rng is not None, rngs={} if rng is None else {'dropout': rng}
        )
        found, sentence = normalised(found, 1e-6), normalised(sentence, 1e-6)
        return {'numbers': numbers, 'words': found, 'sentence': sentence, 'there': numbers > 0}

    def wrong_ones(numbers: Array, rng: Array) -> Array:
        """A wrong caption for each, [n, T]."""
        other = jnp.roll(numbers, 1, 0)
        if not swap:
            return other
        differ = (numbers != other) & (numbers > 0) & (other > 0)
        place = jnp.where(differ, jax.random.uniform(rng, numbers.shape), -1).argmax(1)
        return jnp.where(jnp.arange(length) == place[:, None], other, numbers)

    def noise_of(x: Array) -> Array:
        """What a condition is drawn by, from draws of N(0, 1)."""
        return x if kl else jnp.zeros_like(x)

    def mismatch(weights, images: Array, told: dict[str, Array]) -> Array:
        """The matching loss of images among what captions told: theirs, in this order, and perhaps more."""
        regions, whole = encoder.apply({'params': weights}, images)
        own = jnp.arange(len(images))[:, None] == jnp.arange(len(told['numbers']))
        same = (told['numbers'][: len(images), None] == told['numbers']).all(-1)
        by_word = word_similarity(regions, told['words'], told['there'], attend, gather)
        by_sentence = sentence_similarity(whole, told['sentence'])
        return matching_loss(by_word, own, same, sharpness) + matching_loss(by_sentence, own, same, sharpness)

    def among(told: PyTree, wrong: PyTree) -> PyTree:
        """What captions are told from: with `swap` wrong ones, behind all right ones."""
        return jax.tree.map(lambda *x: jnp.concatenate(x), told, wrong) if swap else told

    def paint(weights, given: dict[str, Array]):
        """In training: ((images, mean, log variance), batch statistics)."""
        arguments = given['z'], given['noise'], *(given['told'][name] for name in ('sentence', 'words', 'there'))
        return apply_in_training(generator, weights, *arguments)

    def judge(params, name: str, x: Array, sentences: list[Array]) -> tuple[Array, list[Array]]:
        variables = {'params': params[name]}
        return discriminators[name].apply(variables, x, sentences, mutable=['batch_stats'])[0]

    def values(params, name: str, sentence: Array, x: Array) -> Array:
        """Of images alone and with their captions, [n, 2]."""
        alone, told = judge(params, name, x, [sentence])
        return jnp.stack([alone, *told], -1)

    def smaller(x: Array) -> tuple[Array, ...]:
        """Images [n, H, W, C] in the sizes of all stages."""
        sizes = [x]
        for _ in range(stages - 1):
            sizes.append(downsample_mean(sizes[-1]))
        return tuple(reversed(sizes))

    def matching_step_loss(params, state, frozen, batch, rng):
        told = read(params['text'], among(batch['numbers'], batch['wrong']), rng)
        value = mismatch(params['encoder'], batch['image'], told)
        return value, Aux({'matching_loss': value})

    def discriminator_loss(params, state, frozen, batch, rng):
        own, other = batch['told']['sentence'], batch['wrong']['sentence']
        differ = (batch['told']['numbers'] != batch['wrong']['numbers']).any(-1)
        total, logs = 0.0, {}
        for name, x, made in zip(discriminators, smaller(batch['image']), batch['made'], strict=True):
            real, (right, wrong) = judge(params, name, x, [own, other])
            fake, (told,) = judge(params, name, made, [own])
            wrong = jnp.where(differ, wrong, LOW)  # one that is right after all counts as nothing
            value = vanilla_discriminator(jnp.stack([real, right]), jnp.stack([fake, told, wrong]))
            if r1:
                value += r1 * r1_penalty(functools.partial(values, params, name, own), x).mean()
            total, logs[f'{name}_loss'] = total + value, value
        return total, Aux(logs)

    def generator_loss(params, state, frozen, batch, rng):
        (images, mean, log_variance), _ = paint(params['generator'], batch)
        deceit = 0.0
        for name, x in zip(discriminators, images, strict=True):
            # Twice the mean of both.
            deceit += 2 * non_saturating_generator(values(params, name, batch['told']['sentence'], x))
        divergence = normal_kl(mean, log_variance).mean() / condition
        value, logs = deceit + kl * divergence, {'deceit': deceit, 'kl': divergence}
        if matching:
            logs['mismatch'] = mismatch(state.ema['encoder'], images[-1], among(batch['told'], batch['wrong']))
            value = value + matching * logs['mismatch']
        return value, Aux({'generator_loss': value, **logs})

    optim = context.optim
    matching_turn = gradient_step(matching_step_loss, optim, 'text', 'encoder')
    discriminator_turn = gradient_step(discriminator_loss, optim, *discriminators)
    generator_turn = gradient_step(generator_loss, optim, 'generator')

    def init(rng, batch, frozen):
        caption, x = batch['caption'][:1], batch['image'][:1]
        if caption.ndim != 2 or caption.dtype != jnp.uint8:
            raise UserError(
                f'a caption must be bytes, uint8 [n]; that of config.data.source is {caption.dtype} {caption.shape[1:]}'
            )
        if len(batch['image']) // optim.accumulate < 2:
            raise UserError('config.data.batch must be 2 or more (by config.optim.accumulate): captions are compared')
        text_rng, encoder_rng, generator_rng, *rngs = jax.random.split(rng, 3 + stages)
        sentence, of_words = jnp.zeros((1, features)), jnp.zeros((1, length, features))
        z, noise, there = jnp.zeros((1, latent)), jnp.zeros((1, condition)), jnp.ones((1, length), bool)
        painting = generator.init(generator_rng, z, noise, sentence, of_words, there, train=True)
        params = {
            'text': text.init(text_rng, jnp.zeros((1, length), jnp.int32))['params'],
            'encoder': encoder.init(encoder_rng, x)['params'],
            'generator': painting['params'],
            **{
                name: network.init(rngs[i], smaller(x)[i], [sentence])['params']
                for i, (name, network) in enumerate(discriminators.items())
            },
        }
        return new_state(params, optim, painting['batch_stats'], ema=('text', 'encoder', 'generator'))

    def update(state, frozen, batch, rng):
        matching_rng, wrong_rng, z_rng, noise_rng, discriminator_rng, generator_rng = jax.random.split(rng, 6)
        n, numbers = len(batch['image']), numbers_of(batch)
        captions = {'numbers': numbers, 'wrong': shard_batch(wrong_ones(numbers, wrong_rng))}
        state, matching_aux = matching_turn(state, frozen, {'image': batch['image'], **captions}, matching_rng)
        given = {
            'image': batch['image'],
            'told': read(state.ema['text'], captions['numbers']),
            'wrong': read(state.ema['text'], captions['wrong']),
            'z': shard_batch(jax.random.normal(z_rng, (n, latent))),
            'noise': noise_of(shard_batch(jax.random.normal(noise_rng, (n, condition)))),
        }
        (made, _, _), _ = paint(state.params['generator'], given)
        state, discriminator_aux = discriminator_turn(state, frozen, {**given, 'made': made}, discriminator_rng)
        state, generator_aux = generator_turn(state, frozen, given, generator_rng)
        after = advance(state, optim)
        _, found = paint(after.ema['generator'], given)
        logs = matching_aux.logs | discriminator_aux.logs | generator_aux.logs
        return after.replace(extra=running_mean(state, state.extra, found, STATISTICS_DECAY)), logs

    def draw(state, batch, rng, z: Array | None = None) -> tuple[Array, ...]:
        """Images of all stages for the captions in the batch, and for latents [n, latent] if there are any."""
        z_rng, noise_rng = jax.random.split(rng)
        told = read(state.ema['text'], numbers_of(batch))
        z = normal(example_keys(z_rng, batch), (latent,)) if z is None else z
        noise = noise_of(normal(example_keys(noise_rng, batch), (condition,)))
        variables = {'params': state.ema['generator'], 'batch_stats': state.extra}
        return generator.apply(variables, z, noise, told['sentence'], told['words'], told['there'])[0]

    def sample(state, frozen, batch, rng):
        return draw(state, batch, rng)[-1]

    def decode(state, frozen, batch, latents, rng):
        return draw(state, batch, rng, latents)[-1]

    def trajectory(state, frozen, batch, rng):
        images = list(draw(state, batch, rng))
        for i in range(stages):
            for _ in range(stages - 1 - i):
                images[i] = upsample_nearest(images[i])
        return {'stages': jnp.stack(images)}

    def evaluate(state, frozen, batch, rng):
        sentence = read(state.ema['text'], numbers_of(batch))['sentence']

        def match(x):
            return cosine(encoder.apply({'params': state.ema['encoder']}, x)[1], sentence)

        return {'match/image': match(batch['image']), 'match/sample': match(sample(state, frozen, batch, rng))}

    return Family(
        init,
        update,
        sample,
        evaluate,
        decode=decode,
        trajectory=trajectory,
        conditions=('caption',),
        divisor=divisor,
        statistics=True,
        latents=Latents(shape=(latent,)),
        captions=Captions(length),
    )
