"""StarGAN v2: translation of images between many domains, in many styles (Choi et al. 2020, arXiv 1912.01865).

One generator G translates an image x of domain y into domain t, in a style s. Styles come from noise, s = F_t(z) by the
mapping network F, or from a reference image, s = E_t(reference) by the style encoder E: F, E and the discriminator D
have one output for each domain. With x' = G(x, s) the objectives are (eqs. 1 to 5)

    adversarial   E log s(D_y(x)) + E log(1 - s(D_t(x')))     which D maximises; G minimises -E log s(D_t(x'))
    style         E |s - E_t(x')|                             style reconstruction: x' has the style s
    diversity     E |x' - G(x, s2)|                           diversity sensitive: G maximises it, two styles differ
    cycle         E |x - G(x', E_y(x))|                       cycle consistency: with its own style x comes back

where s() is the sigmoid and D has R1 too. The weight of the diversity, which has no upper bound, falls to 0 over the
first `diversity_steps` updates.

As in the published code an update has four steps: D on styles from noise, D on those from references, then G, F and E
on the former and G alone on the latter. Its references are drawn for themselves; here they are the batch in another
order, and the second one is another image of the same domain where the batch has one.

For faces the published generator has no shortcuts round its norms; edges of the encoder's maps are added to the
decoder's instead (`high_pass`), at the positions that a network for facial landmarks (Wang et al. 2019, arXiv
1904.07399) detects. That network is not here: edges are added everywhere, or where the data's `mask` is white, in the
cycle too.

Domains are the data's labels. In sampling 'label' is the target domain and 'domain' that of the image.
"""

from __future__ import annotations

import functools
from typing import Annotated, NamedTuple

import chex
import einops
import jax
import jax.numpy as jnp

from jaxgen import options
from jaxgen.checks import check_size, size_text
from jaxgen.contract import Aux, Context, Family, Input, Latents, advance, gradient_step, new_state, shard_batch
from jaxgen.errors import UserError
from jaxgen.losses.adversarial import non_saturating_generator, r1_penalty, vanilla_discriminator
from jaxgen.networks import stargan2 as networks
from jaxgen.networks.layers import NORMS
from jaxgen.options import Count, NonNegative, OneOf
from jaxgen.randomness import example_keys, normal

Array = jax.Array

SOURCES = ('latent', 'reference')  # of styles
FORMER = {'most': 'max_width'}


class Networks(NamedTuple):
    """The four networks, as functions of the weights {network: weights}."""

    generator: networks.Generator
    mapping: networks.Mapping
    encoder: networks.StyleEncoder
    discriminator: networks.Discriminator

    def translate(self, params, x: Array, s: Array, mask: Array | None = None) -> Array:
        """G(x, s), images [n, H, W, C]; edges are added where `mask` [n, H, W, 1] is 1, or everywhere."""
        return self.generator.apply({'params': params['generator']}, x, s, mask)

    def mapped(self, params, z: Array, y: Array) -> Array:
        """F_y(z), styles [n, style] of latents [n, latent]."""
        return self.mapping.apply({'params': params['mapping']}, z, y)

    def encoded(self, params, x: Array, y: Array) -> Array:
        """E_y(x), styles [n, style] of images."""
        return self.encoder.apply({'params': params['encoder']}, x, y)

    def style(self, params, batch: dict, source: str, i: int) -> Array:
        """Style [n, style] of the target domain, by the first or second of two latents or references."""
        style = self.mapped if source == 'latent' else self.encoded
        return style(params, batch[source][:, i], batch['target'])

    def discriminate(self, params, x: Array, y: Array) -> Array:
        """D_y(x), logits [n]."""
        return self.discriminator.apply({'params': params['discriminator']}, x, y)


def partners(label: Array, rng: Array) -> Array:
    """Index int32 [n], for each example of a batch, of another one with its label, at random; its own where there is
    none.

    label: int32 [n].
    """
    score = jax.random.uniform(rng, (len(label), len(label)))
    score = jnp.where(jnp.eye(len(label), dtype=bool), -1.0, score)
    return jnp.where(label[:, None] == label[None], score, -2.0).argmax(1)


def edge_mask(batch: dict, mask: str) -> Array | None:
    """Weights [n, H, W, 1] from 0 to 1 of the added edges, by the feature of this name; None: 1 everywhere."""
    return (batch[mask] + 1) / 2 if mask else None


def absolute(x: Array, y: Array) -> Array:
    """Mean absolute difference of each example, [n]."""
    chex.assert_equal_shape([x, y])
    return jnp.abs(x - y).reshape(len(x), -1).mean(1)


def discriminator_loss(nets: Networks, params, state, frozen, batch, rng, *, r1: float):
    """Adversarial loss of D (eq. 1) on images and on 'translated' ones, and R1 with weight `r1`."""
    x, y = batch['image'], batch['domain']
    real, fake = nets.discriminate(params, x, y), nets.discriminate(params, batch['translated'], batch['target'])
    value = vanilla_discriminator(real, fake)
    logs = {'discriminator_loss': value, 'discriminator_real': real.mean(), 'discriminator_fake': fake.mean()}
    if r1:
        logs['r1'] = r1_penalty(lambda x: nets.discriminate(params, x, y), x).mean()
        value = value + r1 * logs['r1']
    return value, Aux(logs)


def generator_loss(
    nets: Networks, params, state, frozen, batch, rng, *, source: str, style_weight: float, diversity: float,
    diversity_steps: int, cycle: float,
):  # fmt: skip
    """Full objective of G, F and E (eq. 5), by styles from latents or from references (`source`)."""
    x, y, target, mask = batch['image'], batch['domain'], batch['target'], batch.get('mask')
    s, s2 = (nets.style(params, batch, source, i) for i in range(2))
    translated = nets.translate(params, x, s, mask)
    adversarial = non_saturating_generator(nets.discriminate(params, translated, target))  # eq. 1
    style_error = absolute(nets.encoded(params, translated, target), s).mean()  # eq. 2
    # No gradient by the second image: the first is to differ from it.
    other = nets.translate(jax.lax.stop_gradient(params), x, jax.lax.stop_gradient(s2), mask)
    difference = absolute(translated, other).mean()  # eq. 3
    cycle_error = absolute(nets.translate(params, translated, nets.encoded(params, x, y), mask), x).mean()  # eq. 4
    weight = diversity * jnp.maximum(1 - state.step / diversity_steps, 0)
    value = adversarial + style_weight * style_error - weight * difference + cycle * cycle_error  # eq. 5
    logs = {'generator_loss': value, 'adversarial': adversarial, 'style_error': style_error}
    return value, Aux(logs | {'diversity': difference, 'cycle_error': cycle_error})


def with_targets(batch: dict, rngs: tuple[Array, Array, Array], latent: int, mask: str) -> dict:
    """The batch of an update: 'image', 'domain' and 'mask' as they are; target domains by another order of the batch;
    two latents and two references for each target, 'latent' [n, 2, latent] and 'reference' [n, 2, H, W, C]."""
    z_rng, order_rng, partner_rng = rngs
    x, y = batch['image'], batch['domain']
    order = jax.random.permutation(order_rng, len(x))
    second = partners(y, partner_rng)[order]
    return {
        'image': x,
        'domain': y,
        **({'mask': edge_mask(batch, mask)} if mask else {}),
        'target': y[order],
        'latent': jax.random.normal(z_rng, (len(x), 2, latent)),
        'reference': jnp.stack([x[order], x[second]], 1),
    }


def discriminator_batch(nets: Networks, params, batch: dict) -> dict:
    """Every example twice, 'translated' by the styles from its latent and from its reference, for two steps of D.

    A step takes every second example (`split_batch`): the first one the former, the second one the latter.
    """
    styles = jnp.stack([nets.style(params, batch, source, 0) for source in SOURCES], 1)  # [n, 2, style]
    twice = {name: jnp.repeat(a, 2, 0) for name, a in batch.items() if name not in SOURCES}
    styles = einops.rearrange(styles, 'n sources d -> (n sources) d')
    return twice | {'translated': nets.translate(params, twice['image'], styles, twice.get('mask'))}


def decode(nets: Networks, mask: str, state, frozen, batch, latents, rng):
    """The images translated into the domains 'label', in the styles of these latents [n, latent]."""
    s = nets.mapped(state.ema, latents, batch['label'])
    return jnp.clip(nets.translate(state.ema, batch['image'], s, edge_mask(batch, mask)), -1, 1)


def trajectory(nets: Networks, mask: str, latent: int, state, frozen, batch, rng):
    """Rows [1 + domains, n, H, W, C], the image itself first: in every domain by one z ('latent'), and in the domains
    and styles ('results') of the images that come after it in the batch ('references'), where their domains are
    known."""
    x, where = batch['image'], edge_mask(batch, mask)
    z = normal(example_keys(rng, batch), (latent,))
    rows = {'latent': [x], **({'references': [x], 'results': [x]} if 'domain' in batch else {})}
    for i in range(nets.mapping.domains):
        s = nets.mapped(state.ema, z, jnp.full(len(x), i))
        rows['latent'].append(nets.translate(state.ema, x, s, where))
        if 'domain' not in batch:
            continue
        reference, its_domain = (jnp.roll(batch[name], -1 - i, 0) for name in ('image', 'domain'))
        rows['references'].append(reference)
        s = nets.encoded(state.ema, reference, its_domain)
        rows['results'].append(nets.translate(state.ema, x, s, where))
    return {name: jnp.clip(jnp.stack(row), -1, 1) for name, row in rows.items()}


def evaluate(nets: Networks, mask: str, latent: int, state, frozen, batch, rng):
    """Metrics of each image's translation into another domain, drawn by its key: see `build`."""
    x, y, where = batch['image'], batch['domain'], edge_mask(batch, mask)
    keys = jax.vmap(jax.random.split)(example_keys(rng, batch))  # [n, 2]
    z = normal(keys[:, 0], (2, latent))
    domains = nets.mapping.domains
    target = (y + jax.vmap(lambda key: jax.random.randint(key, (), 1, domains))(keys[:, 1])) % domains
    s, s2 = (nets.mapped(state.ema, z[:, i], target) for i in range(2))
    translated, other = (nets.translate(state.ema, x, style, where) for style in (s, s2))
    own = nets.encoded(state.ema, x, y)
    return {
        'cycle_error': absolute(nets.translate(state.ema, translated, own, where), x),
        'style_error': absolute(nets.encoded(state.ema, translated, target), s),
        'diversity': absolute(translated, other),
    }


def check(
    context: Context, divisor: int, width: int, max_width: int, halvings: int, norm: str, high_pass: float,
    skips: tuple[int, ...], mask: str,
) -> None:  # fmt: skip
    """Raises UserError where fields do not go together, or not with the data."""
    height, columns, _ = context.image
    if context.classes < 2:
        raise UserError(
            "StarGAN v2 needs domains: take a data set of 2 classes or more, with 'label' and 'domain' in "
            'config.data.features'
        )
    if max_width < width:
        raise UserError(f'config.model.max_width = {max_width} must not be less than config.model.width = {width}')
    check_size(context.image, divisor, f'config.model.halvings = {halvings}')
    if norm == 'instance' and min(height, columns) < 2 << halvings:
        raise UserError(
            f'config.model.norm = {norm!r} needs 2 pixels of the smallest map: config.model.halvings = {halvings} are '
            f'too many for config.data.size = {size_text(context.image)}'
        )
    sizes = [height >> i for i in range(halvings)]
    if bool(skips) != bool(high_pass) or not set(skips) <= set(sizes):
        raise UserError(
            f'config.model.skips must be sizes of {sizes} where config.model.high_pass is not 0; they are {skips}'
        )
    if mask and not high_pass:
        raise UserError('config.model.mask is of the added edges: it needs config.model.high_pass and skips')


@options.checked
def build(
    context: Context,
    *,
    width: Count = 64,
    max_width: Count = 512,
    halvings: Count = 4,
    blocks: Annotated[int, '[0, inf)'] = 2,
    norm: Annotated[str, OneOf(*NORMS)] = 'instance',
    high_pass: NonNegative = 0.0,
    skips: tuple[int, ...] = (),
    mask: str = '',
    latent: Count = 16,
    style: Count = 64,
    hidden: Count = 512,
    mapping_layers: Count = 4,
    r1: NonNegative = 1.0,
    style_weight: NonNegative = 1.0,
    diversity: NonNegative = 1.0,
    diversity_steps: Count = 100_000,
    cycle: NonNegative = 1.0,
) -> Family:
    """StarGAN v2.

    Args:
      width, max_width: channels at full size and their maximum, of generator, encoder and discriminator.
      halvings: of the image, in the generator's encoder.
      blocks: of the generator at the smallest size, in its encoder and again in its decoder.
      norm: of the generator: of each channel or of groups of them, see networks/stargan2.py.
      high_pass: 0, or the divisor of the edges that are added to the generator's decoder, which then has no shortcuts.
      skips: heights of the maps whose edges are added.
      mask: the feature, an image of one channel, that is white where edges are added; '': everywhere.
      latent, style: dimensions of z and of s.
      hidden, mapping_layers: units of F's layers; as many layers for all domains as for each.
      r1: gamma, the weight of R1.
      style_weight, diversity, cycle: weights of the objectives above.
      diversity_steps: updates until that of the diversity is 0.

    sample translates images of the test split into the domain 'label', each in a style from its own noise, or in that
    of 'reference', an image of this domain, where the batch holds one. trajectory
    displays translations into every domain, see there. evaluate translates each image into another domain and returns
    'cycle_error', 'style_error' and 'diversity', the absolute errors and differences of the objectives above: means
    over pixels in [-1, 1], or over the dimensions of s.

    Raises:
      UserError: a value that cannot work.
    """
    divisor = 2 ** max(halvings, networks.halvings(*context.image[:2]))
    check(context, divisor, width, max_width, halvings, norm, high_pass, skips, mask)
    sizes = dict(width=width, max_width=max_width, remat=context.remat, dtype=context.dtype)
    nets = Networks(
        networks.Generator(halvings=halvings, blocks=blocks, norm=norm, high_pass=high_pass, skips=skips, **sizes),
        networks.Mapping(context.classes, style, hidden, mapping_layers),
        networks.StyleEncoder(context.classes, style, **sizes),
        networks.Discriminator(context.classes, **sizes),
    )
    discriminator_step = gradient_step(
        functools.partial(discriminator_loss, nets, r1=r1), context.optim, 'discriminator', times=len(SOURCES)
    )
    # The generator takes a step for each source too: its learning rate goes by updates all the same.
    optim = context.optim._replace(tx=lambda name: context.optim.tx(name, len(SOURCES) if name == 'generator' else 1))
    trained = {'latent': ('generator', 'mapping', 'encoder'), 'reference': ('generator',)}
    weights = dict(style_weight=style_weight, diversity=diversity, diversity_steps=diversity_steps, cycle=cycle)

    def generator_step(source: str):
        loss = functools.partial(generator_loss, nets, source=source, **weights)
        return gradient_step(loss, optim, *trained[source])

    generator_steps = {source: generator_step(source) for source in SOURCES}

    def init(rng, batch, frozen):
        if mask and batch[mask].shape[-1] != 1:
            raise UserError(f'config.model.mask = {mask!r} must be an image of one channel')
        rngs = dict(zip(Networks._fields, jax.random.split(rng, 4), strict=True))
        x, y, z, s = batch['image'][:1], batch['domain'][:1], jnp.zeros((1, latent)), jnp.zeros((1, style))
        inputs = {'generator': (x, s), 'mapping': (z, y), 'encoder': (x, y), 'discriminator': (x, y)}
        params = {name: getattr(nets, name).init(rngs[name], *inputs[name])['params'] for name in inputs}
        return new_state(params, optim, ema=('generator', 'mapping', 'encoder'))

    def update(state, frozen, batch, rng):
        *batch_rngs, discriminator_rng, latent_rng, reference_rng = jax.random.split(rng, 6)
        batch = shard_batch(with_targets(batch, batch_rngs, latent, mask))
        twice = discriminator_batch(nets, state.params, batch)
        state, (logs, _) = discriminator_step(state, frozen, twice, discriminator_rng)
        for source, step_rng in zip(SOURCES, (latent_rng, reference_rng), strict=True):
            state, aux = generator_steps[source](state, frozen, batch, step_rng)
            logs |= {f'{source}/{name}': v for name, v in aux.logs.items()}
        return advance(state, context.optim), logs

    def sample(state, frozen, batch, rng):
        if 'reference' not in batch:
            return decode(nets, mask, state, frozen, batch, normal(example_keys(rng, batch), (latent,)), rng)
        s = nets.encoded(state.ema, batch['reference'], batch['label'])
        return jnp.clip(nets.translate(state.ema, batch['image'], s, edge_mask(batch, mask)), -1, 1)

    return Family(
        init,
        update,
        sample,
        functools.partial(evaluate, nets, mask, latent),
        decode=functools.partial(decode, nets, mask),
        trajectory=functools.partial(trajectory, nets, mask, latent),
        conditions=('label', 'image', *((mask,) if mask else ())),
        inputs=(Input('reference', context.image),),
        displayed=('domain',),
        divisor=divisor,
        latents=Latents(shape=(latent,)),
        larger=('diversity',),
    )
