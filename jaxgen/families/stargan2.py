"""StarGAN v2: pictures of many domains turned into one another, in many styles (Choi et al. 2020, arXiv 1912.01865).

One generator G turns a picture x of domain y into one of domain t that looks as a style s says. Styles come from noise,
s = F_t(z) by the mapping network F, or from another picture, s = E_t(reference) by the encoder E: F, E and the
discriminator D have one output for each domain. With x' = G(x, s) the loss is (eqs. 1 to 5)

    adversarial   E log s(D_y(x)) + E log(1 - s(D_t(x')))     which D maximises; G minimises -E log s(D_t(x'))
    style         E |s - E_t(x')|                             what is painted shows the style that was asked for
    diversity     E |x' - G(x, s2)|                           which G maximises: two styles are two pictures
    cycle         E |x - G(x', E_y(x))|                       with its own style x comes back: the rest was kept

where s is the sigmoid and D has R1 too. The weight of the diversity, which has no upper bound, falls to 0 over the
first `diversity_steps` updates.

As in the published code an update has four steps: D on styles from noise, D on those from references, then G, F and E
on the former and G alone on the latter. Its references are drawn for themselves; here they are the batch in another
order, and the second one is another picture of the same domain where the batch has one.

For faces the published generator has no shortcuts round its norms; edges of the encoder's maps are added to the
decoder's instead (`high_pass`), at the places where a network that finds faces' landmarks (Wang et al. 2019, arXiv
1904.07399) sees them. That network is not here: edges are added everywhere, or where the data's `mask` says, on the way
back too.

Domains are the data's labels. In sampling 'label' is the domain that is asked for, and 'domain' that of the picture.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxgen.checks import check_size
from jaxgen.contract import Aux, Context, Family, Latents, advance, gradient_step, new_state, shard_batch
from jaxgen.errors import UserError
from jaxgen.losses.adversarial import non_saturating_generator, r1_penalty, vanilla_discriminator
from jaxgen.networks import stargan2 as networks
from jaxgen.networks.layers import NORMS
from jaxgen.randomness import example_keys, normal

Array = jax.Array

GUIDES = ('latent', 'reference')  # where styles come from


def partners(label: Array, rng: Array) -> Array:
    """For each example of a batch the number of another one with its label, at random; its own where it is alone.

    label: int32 [n]. Returns int32 [n].
    """
    score = jax.random.uniform(rng, (len(label), len(label)))
    score = jnp.where(jnp.eye(len(label), dtype=bool), -1.0, score)
    return jnp.where(label[:, None] == label[None], score, -2.0).argmax(1)


def build(
    context: Context,
    *,
    width: int = 64,
    most: int = 512,
    halvings: int = 4,
    blocks: int = 2,
    norm: str = 'instance',
    high_pass: float = 0.0,
    skips: tuple[int, ...] = (),
    mask: str = '',
    latent: int = 16,
    style: int = 64,
    hidden: int = 512,
    mapping_layers: int = 4,
    r1: float = 1.0,
    style_weight: float = 1.0,
    diversity: float = 1.0,
    diversity_steps: int = 100_000,
    cycle: float = 1.0,
) -> Family:
    """StarGAN v2.

    Args:
      width, most: channels at full size and the most there may be, of generator, encoder and discriminator.
      halvings, blocks, norm, high_pass, skips: of the generator, see networks/stargan2.py.
      mask: the feature, a picture of one channel, that is white where edges are added; '': everywhere.
      latent, style: dimensions of z and of s.
      hidden, mapping_layers: of F: so many layers for all domains, and as many for each.
      r1: gamma, the weight of R1.
      style_weight, diversity, cycle: weights of the losses above.
      diversity_steps: updates until that of the diversity is 0.

    sample turns pictures of the test split into the domain that is asked for, each in a style from its own noise.
    trajectory shows a picture in every domain by one z ('latent'), and in the domains and styles ('results') of those
    that come after it in the batch ('references'). evaluate turns each image into a domain that it is not of and
    gives 'cycle_error', 'style_error' and 'diversity', the absolute errors and differences of the losses above: means
    over pixels in [-1, 1], or over the dimensions of s.

    Raises:
      UserError: a value that cannot work.
    """
    height, columns, _ = context.image
    divisor = 2 ** max(halvings, networks.halvings(height, columns))
    if context.classes < 2:
        raise UserError(
            "StarGAN v2 needs domains: take a data set of 2 classes or more, with 'label' and 'domain' in "
            'config.data.features'
        )
    if min(width, halvings, latent, style, hidden, mapping_layers, diversity_steps) < 1 or blocks < 0 or most < width:
        raise UserError(
            'config.model: width, halvings, latent, style, hidden, mapping_layers and diversity_steps must be 1 or '
            'more, blocks 0 or more, most not less than width'
        )
    if norm not in NORMS:
        raise UserError(f'config.model.norm must be one of {NORMS}; it is {norm!r}')
    if min(high_pass, r1, style_weight, diversity, cycle) < 0:
        raise UserError('config.model: high_pass, r1, style_weight, diversity and cycle must be 0 or more')
    check_size(context.image, divisor, f'config.model.halvings = {halvings}')
    if norm == 'instance' and min(height, columns) < 2 << halvings:
        raise UserError(
            f'config.model.norm = {norm!r} needs 2 pixels of the smallest map: config.model.halvings = {halvings} are '
            f'too many for config.data.size = {height}'
        )
    sizes = [height >> i for i in range(halvings)]
    if bool(skips) != bool(high_pass) or not set(skips) <= set(sizes):
        raise UserError(
            f'config.model.skips must be sizes of {sizes} where config.model.high_pass is not 0; they are {skips}'
        )
    if mask and not high_pass:
        raise UserError('config.model.mask says where edges are added: it needs config.model.high_pass and skips')

    domains, wide = context.classes, dict(width=width, most=most, remat=context.remat, dtype=context.dtype)
    generator = networks.Generator(
        halvings=halvings, blocks=blocks, norm=norm, high_pass=high_pass, skips=skips, **wide
    )
    mapping = networks.Mapping(domains, style, hidden, mapping_layers)
    encoder = networks.StyleEncoder(domains, style, **wide)
    discriminator = networks.Discriminator(domains, **wide)

    def places(batch) -> Array | None:
        """Where edges are added, [n, H, W, 1] from 0 to 1, or everywhere."""
        return (batch[mask] + 1) / 2 if mask else None

    def turn(params, x: Array, s: Array, where: Array | None) -> Array:
        return generator.apply({'params': params['generator']}, x, s, where)

    def judge(params, x: Array, y: Array) -> Array:
        return discriminator.apply({'params': params['discriminator']}, x, y)

    def drawn(params, z: Array, y: Array) -> Array:
        """F_y(z)"""
        return mapping.apply({'params': params['mapping']}, z, y)

    def seen(params, x: Array, y: Array) -> Array:
        """E_y(x)"""
        return encoder.apply({'params': params['encoder']}, x, y)

    def asked(params, batch, guide: str, which: int) -> Array:
        """The first or second style [n, style] that is asked for."""
        return (drawn if guide == 'latent' else seen)(params, batch[guide][:, which], batch['target'])

    def absolute(x: Array, y: Array) -> Array:
        """[n]"""
        return jnp.abs(x - y).reshape(len(x), -1).mean(1)

    def discriminator_loss(params, state, frozen, batch, rng):
        x, y = batch['image'], batch['domain']
        real, fake = judge(params, x, y), judge(params, batch['made'], batch['target'])
        value = vanilla_discriminator(real, fake)
        logs = {'discriminator_loss': value, 'discriminator_real': real.mean(), 'discriminator_fake': fake.mean()}
        if r1:
            logs['r1'] = r1_penalty(lambda x: judge(params, x, y), x).mean()
            value = value + r1 * logs['r1']
        return value, Aux(logs)

    def generator_loss(guide, params, state, frozen, batch, rng):
        x, y, target, where = batch['image'], batch['domain'], batch['target'], places(batch)
        s, s2 = (asked(params, batch, guide, i) for i in range(2))
        made = turn(params, x, s, where)
        deceit = non_saturating_generator(judge(params, made, target))
        style_error = absolute(seen(params, made, target), s).mean()
        # The second picture is only what the first is to differ from.
        other = turn(jax.lax.stop_gradient(params), x, jax.lax.stop_gradient(s2), where)
        difference = absolute(made, other).mean()
        cycle_error = absolute(turn(params, made, seen(params, x, y), where), x).mean()
        weight = diversity * jnp.maximum(1 - state.step / diversity_steps, 0)
        value = deceit + style_weight * style_error - weight * difference + cycle * cycle_error
        logs = {'generator_loss': value, 'deceit': deceit, 'style_error': style_error}
        logs |= {'diversity': difference, 'cycle_error': cycle_error}
        return value, Aux(logs)

    discriminator_step = gradient_step(discriminator_loss, context.optim, 'discriminator', times=len(GUIDES))
    # The generator takes a step for each guide too: its rate goes by updates all the same.
    optim = context.optim._replace(tx=lambda name: context.optim.tx(name, len(GUIDES) if name == 'generator' else 1))
    trained = {'latent': ('generator', 'mapping', 'encoder'), 'reference': ('generator',)}
    generator_steps = {
        guide: gradient_step(functools.partial(generator_loss, guide), optim, *trained[guide]) for guide in GUIDES
    }

    def init(rng, batch, frozen):
        if mask and batch[mask].shape[-1] != 1:
            raise UserError(f'config.model.mask = {mask!r} must be a picture of one channel')
        generator_rng, mapping_rng, encoder_rng, discriminator_rng = jax.random.split(rng, 4)
        x, y = batch['image'][:1], batch['domain'][:1]
        params = {
            'generator': generator.init(generator_rng, x, jnp.zeros((1, style)))['params'],
            'mapping': mapping.init(mapping_rng, jnp.zeros((1, latent)), y)['params'],
            'encoder': encoder.init(encoder_rng, x, y)['params'],
            'discriminator': discriminator.init(discriminator_rng, x, y)['params'],
        }
        return new_state(params, optim, ema=('generator', 'mapping', 'encoder'))

    def update(state, frozen, batch, rng):
        z_rng, order_rng, partner_rng, discriminator_rng, *generator_rngs = jax.random.split(rng, 6)
        x, y = batch['image'], batch['domain']
        order = jax.random.permutation(order_rng, len(x))
        second = partners(y, partner_rng)[order]
        given = {
            **{name: batch[name] for name in ('image', 'domain', *((mask,) if mask else ()))},
            'target': y[order],
            'latent': jax.random.normal(z_rng, (len(x), 2, latent)),
            'reference': jnp.stack([x[order], x[second]], 1),
        }
        given = shard_batch(given)
        # A step of D takes every second example of its batch: first those made by latents, then those by references.
        styles = jnp.stack([asked(state.params, given, guide, 0) for guide in GUIDES], 1)
        twice = {name: jnp.repeat(a, 2, 0) for name, a in given.items() if name not in GUIDES}
        made = turn(state.params, twice['image'], styles.reshape(-1, style), places(twice))
        state, (logs, _) = discriminator_step(state, frozen, twice | {'made': made}, discriminator_rng)
        for (guide, step), step_rng in zip(generator_steps.items(), generator_rngs, strict=True):
            state, aux = step(state, frozen, given, step_rng)
            logs |= {f'{guide}/{name}': v for name, v in aux.logs.items()}
        return advance(state, optim), logs

    def decode(state, frozen, batch, latents, rng):
        s = drawn(state.ema, latents, batch['label'])
        return jnp.clip(turn(state.ema, batch['image'], s, places(batch)), -1, 1)

    def sample(state, frozen, batch, rng):
        return decode(state, frozen, batch, normal(example_keys(rng, batch), (latent,)), rng)

    def trajectory(state, frozen, batch, rng):
        """By row, [1 + domains, n, H, W, C]; the picture itself stands first."""
        x, z, where = batch['image'], normal(example_keys(rng, batch), (latent,)), places(batch)
        rows = {'latent': [x], 'references': [x], 'results': [x]}
        for i in range(domains):
            s = drawn(state.ema, z, jnp.full(len(x), i))
            rows['latent'].append(turn(state.ema, x, s, where))
            reference, its_domain = (jnp.roll(batch[name], -1 - i, 0) for name in ('image', 'domain'))
            rows['references'].append(reference)
            rows['results'].append(turn(state.ema, x, seen(state.ema, reference, its_domain), where))
        return {name: jnp.clip(jnp.stack(row), -1, 1) for name, row in rows.items()}

    def evaluate(state, frozen, batch, rng):
        x, y, where = batch['image'], batch['domain'], places(batch)
        keys = jax.vmap(jax.random.split)(example_keys(rng, batch))  # [n, 2]
        z = normal(keys[:, 0], (2, latent))
        target = (y + jax.vmap(lambda key: jax.random.randint(key, (), 1, domains))(keys[:, 1])) % domains
        s, s2 = (drawn(state.ema, z[:, i], target) for i in range(2))
        made, other = turn(state.ema, x, s, where), turn(state.ema, x, s2, where)
        return {
            'cycle_error': absolute(turn(state.ema, made, seen(state.ema, x, y), where), x),
            'style_error': absolute(seen(state.ema, made, target), s),
            'diversity': absolute(made, other),
        }

    conditions = ('label', 'domain', 'image', *((mask,) if mask else ()))
    return Family(
        init,
        update,
        sample,
        evaluate,
        decode=decode,
        trajectory=trajectory,
        conditions=conditions,
        divisor=divisor,
        latents=Latents(shape=(latent,)),
    )
