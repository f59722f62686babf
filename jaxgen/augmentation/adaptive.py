"""Adaptive discriminator augmentation (Karras et al. 2020, arXiv 2006.06676): random changes of its inputs.

Data and samples alike go through random changes before the discriminator, each change with probability p, each image
with its own; the generator's gradients flow back through them. As long as p is well below 1 the changes do not leak
into the samples: of all distributions of images only the data's equals the augmented data after them. p follows how
much the discriminator overfits, r_t = E sign D(data), towards r_t = 0.6 (section 3.1).

Changes, with the paper's strengths (appendix B):

    blit       mirroring, quarter turns, moves by whole pixels up to an eighth of the side
    geometric  scaling, rotation, stretching, moves by parts of a pixel
    colour     brightness, contrast, inverted luma; with three channels hue and saturation too

Filtering, noise and holes, which did not help there, are left out. What moves in from outside is the image mirrored at
its edges. Geometric changes are made without aliasing: the image is enlarged twofold by the low-pass filter of a
wavelet, read bilinearly, and made smaller by the same filter. The paper's code does blits that way too, together with
the rest; here they move pixels as they are. An image to which a change does not happen stays as it is, bit for bit.

A change is a function (x, p, u, g) of images float32 [n, H, W, 1 or 3], the probability p, and for every image numbers
of U(0, 1) and N(0, 1), u [n, 7] and g [n, 4]: random numbers are dear to compile, and so drawn together.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxgen.augmentation.warp import rotation, warp

Array = jax.Array

BLIT_MOVE = 0.125  # of the side, the farthest
SCALE_STD = 0.2  # of the logarithm to base 2, as the next
STRETCH_STD = 0.2
MOVE_STD = 0.125  # of the side
BRIGHTNESS_STD = 0.2  # of pixels in [-1, 1]
CONTRAST_STD = 0.5  # of the logarithm to base 2, as the next
SATURATION_STD = 1.0
UNIFORMS, NORMALS = 7, 4  # that a change takes


def of_each(values: Array) -> Array:
    """[n] as [n, 1, 1, 1], beside images."""
    return values[:, None, None, None]


def blit(x: Array, p: Array | float, u: Array, g: Array) -> Array:
    """Mirrored, turned and moved by whole pixels, each with probability p.

    Where H is not W there are no quarter turns, only half ones.
    """
    _, height, width, _ = x.shape
    coin = u[:, :3] < p
    mirrored = coin[:, 0] & (u[:, 3] < 0.5)
    turns = jnp.where(coin[:, 1], jnp.floor(4 * u[:, 4]), 0)
    moves = jnp.where(coin[:, 2:], 2 * u[:, 5:] - 1, 0)
    x = jnp.where(of_each(mirrored), x[:, :, ::-1], x)
    if height == width:  # a quarter turn is the transpose, upside down
        x = jnp.where(of_each(turns % 2 == 1), x.swapaxes(1, 2)[:, ::-1], x)
    x = jnp.where(of_each(turns >= 2), x[:, ::-1, ::-1], x)
    return moved(x, jnp.round(moves * BLIT_MOVE * jnp.array([height, width])).astype(jnp.int32))


def moved(x: Array, moves: Array) -> Array:
    """Images [n, H, W, C] moved down and right by whole pixels [n, 2], not farther than BLIT_MOVE of the side."""
    _, height, width, channels = x.shape
    most = [math.ceil(BLIT_MOVE * size) for size in (height, width)]
    y = jnp.pad(x, ((0, 0), *((m, m) for m in most), (0, 0)), mode='reflect')

    def one(image, move):
        return jax.lax.dynamic_slice(image, (*(jnp.array(most) - move), 0), (height, width, channels))

    return jax.vmap(one)(y, moves)


def geometric(x: Array, p: Array | float, u: Array, g: Array) -> Array:
    """Scaled, rotated, stretched and moved, each with probability p.

    Rotation is before or after stretching, or both, together with probability p.
    """
    _, height, width, _ = x.shape
    coin = u[:, :3] < p
    turned = u[:, 3:5] < 1 - jnp.sqrt(jnp.clip(1 - p, 0, 1))
    scale = jnp.exp2(jnp.where(coin[:, 0], SCALE_STD * g[:, 0], 0))
    stretch = jnp.exp2(jnp.where(coin[:, 1], STRETCH_STD * g[:, 1], 0))
    move = jnp.where(coin[:, 2:], MOVE_STD * g[:, 2:] * jnp.array([height, width]), 0)
    before, after = jnp.where(turned, math.pi * (2 * u[:, 5:] - 1), 0).T

    # y = rotate(after) diag(stretch, 1 / stretch) rotate(before) scale x + move, solved for x, the position to read.
    shrink = jnp.stack([1 / stretch, stretch], -1)[:, :, None] * rotation(-after)
    back = jnp.matmul(rotation(-before), shrink, precision='highest') / scale[:, None, None]
    offset = -jnp.matmul(back, move[:, :, None], precision='highest')[..., 0]
    stays = (jnp.abs(back - jnp.eye(2)).max((1, 2)) == 0) & (jnp.abs(offset).max(1) == 0)
    return jnp.where(of_each(stays), x, warp(x, back, offset))


def colour(x: Array, p: Array | float, u: Array, g: Array) -> Array:
    """Of other brightness, contrast, luma, hue and saturation, each with probability p."""
    coin = u[:, :5] < p
    brightness = jnp.where(coin[:, 0], BRIGHTNESS_STD * g[:, 0], 0)
    contrast = jnp.exp2(jnp.where(coin[:, 1], CONTRAST_STD * g[:, 1], 0))
    sign = jnp.where(coin[:, 2] & (u[:, 5] < 0.5), -1.0, 1.0)
    coin &= x.shape[-1] > 1  # grey has neither hue nor saturation
    hue = jnp.where(coin[:, 3], math.pi * (2 * u[:, 6] - 1), 0)
    saturation = jnp.exp2(jnp.where(coin[:, 4], SATURATION_STD * g[:, 2], 0))
    stays = (brightness == 0) & (contrast == 1) & (sign == 1) & (hue == 0) & (saturation == 1)
    return jnp.where(of_each(stays), x, recoloured(x, brightness, contrast, sign, hue, saturation))


def recoloured(x: Array, brightness: Array, contrast: Array, sign: Array, hue: Array, saturation: Array) -> Array:
    """Images [n, H, W, C] with these changes, [n] each, in the order of the arguments.

    Luma is a colour's part along (1, 1, 1) and chroma the rest: brightness is added to luma, contrast scales both, sign
    turns luma round, hue turns chroma about that axis, saturation scales chroma.
    """
    brightness, contrast, sign, hue, saturation = map(of_each, (brightness, contrast, sign, hue, saturation))
    luma = x.mean(-1, keepdims=True)
    chroma = x - luma
    # The product of (1, 1, 1) / sqrt(3) with chroma (r, g, b) is (b - g, r - b, g - r) / sqrt(3).
    across = (jnp.roll(chroma, 1, -1) - jnp.roll(chroma, -1, -1)) / math.sqrt(3)
    turned = jnp.cos(hue) * chroma + jnp.sin(hue) * across
    return sign * contrast * (luma + brightness) + contrast * saturation * turned


CHANGES = {'blit': blit, 'geometric': geometric, 'colour': colour}


def augment(x: Array, rng: Array, p: Array | float, changes: tuple[str, ...]) -> Array:
    """Images float32 [n, H, W, 1 or 3] after the named changes, in the order of CHANGES, each with probability p."""
    chosen = [change for name, change in CHANGES.items() if name in changes]
    if not chosen:
        return x
    uniform_rng, normal_rng = jax.random.split(rng)
    u = jax.random.uniform(uniform_rng, (len(x), len(chosen), UNIFORMS))
    g = jax.random.normal(normal_rng, (len(x), len(chosen), NORMALS))
    for i, change in enumerate(chosen):
        x = change(x, p, u[:, i], g[:, i])
    return x


def adapted(p: Array, signs: Array, images: int, *, target: float, images_to_one: int) -> Array:
    """p after `images` of the data had these signs on average: one step up or down, within 0 and 1.

    Args:
      signs: r_t, mean of sign D(data) since the last step.
      target: of r_t.
      images_to_one: images in which p would go from 0 to 1 if all steps were up.
    """
    return jnp.clip(p + jnp.sign(signs - target) * images / images_to_one, 0.0, 1.0)
