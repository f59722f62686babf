"""A convolution whose gradients are fast on CPUs inside loops too, and such a product of dense layers.

XLA for CPUs brings a convolution into the layout of its fast code only in the outermost computation. In the body of a
loop (`lax.scan` over critic steps, gradient accumulation, several updates per call) a gradient's convolution, whose
axes are permuted, runs by the slow code: 100 times slower at 32x32 pixels and 128 channels. So on CPUs the gradients
are written here as plain NHWC convolutions of transposed arrays. Numbers are the same to rounding; on other devices
JAX's own gradients are used.

A kernel's gradient sums over all positions of all images of a batch. As one convolution that is slow where they are
more than some two thousand (at 32x32 pixels a third to a seventh of the speed of few), so it is taken by few images at
a time.

JAX's gradient of a dense layer's weights is a product that is transposed afterwards. Of that XLA for CPUs makes one of
transposed arrays, which it writes number by number, each time with all that they are computed from in the loop: two to
two and a half times slower than the product of the arrays as they lie.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

MOST_POSITIONS = 1024  # over which one convolution sums for a kernel's gradient, but for those of one image

_forward_mode = False


@contextlib.contextmanager
def forward_mode():
    """A context in which convolutions and attention have JAX's own derivatives, so that `jax.jvp` of a network works.

    A function with a custom gradient has no other derivative.
    """
    global _forward_mode
    before, _forward_mode = _forward_mode, True
    try:
        yield
    finally:
        _forward_mode = before


def in_forward_mode() -> bool:
    """Whether functions with a custom gradient are to be avoided, for `jax.jvp`."""
    return _forward_mode


def _plain(x: Array, w: Array, window) -> Array:
    strides, padding, x_dilation, w_dilation, precision = window
    n = len(strides)
    spatial = 'DHW'[-n:]
    return lax.conv_general_dilated(
        x,
        w,
        strides,
        padding,
        x_dilation,
        w_dilation,
        dimension_numbers=(f'N{spatial}C', f'{spatial}IO', f'N{spatial}C'),
        precision=precision,
    )


# Of x [n, *size, c] and w [*kernel, c, o], with window = (strides, padding, x's dilation, w's
# dilation, precision), one number per spatial axis each.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x: Array, w: Array, window) -> Array:
    return _plain(x, w, window)


def _forward(x, w, window):
    # Not _plain: a second derivative differentiates this line, too.
    return _convolve(x, w, window), (x, w)


def _gradients(x: Array, w: Array, dy: Array, window) -> tuple[Array, Array]:
    """dx, dw as convolutions in the layout of the forward one. They are _convolve, so that their own gradients, which a
    gradient penalty needs, are fast as well."""
    strides, padding, x_dilation, w_dilation, precision = window
    axes = tuple(range(1, x.ndim - 1))
    x_padding, w_padding = [], []
    for i, axis in enumerate(axes):
        extent = (x.shape[axis] - 1) * x_dilation[i] + 1  # of x with zeros between its pixels
        kernel = (w.shape[i] - 1) * w_dilation[i] + 1
        dy_extent = (dy.shape[axis] - 1) * strides[i] + 1
        low = padding[i][0]
        x_padding.append((kernel - 1 - low, extent + low - dy_extent))
        w_padding.append((low, kernel - 1 + dy_extent - extent - low))
    # dx: dy with zeros for the strides, convolved with the flipped kernel whose channels are swapped.
    flipped = jnp.flip(w, tuple(a - 1 for a in axes)).swapaxes(-1, -2)
    dx = _convolve(dy, flipped, (x_dilation, tuple(x_padding), strides, w_dilation, precision))

    def kernel_gradient(x: Array, dy: Array) -> Array:
        # dw: the channels of x are the batch, the batch is the channels, and dy is the kernel.
        x_as_batch = x.transpose(x.ndim - 1, *axes, 0)  # [c, *size, n]
        dy_as_kernel = dy.transpose(*axes, 0, dy.ndim - 1)  # [*size, n, o]
        dw = _convolve(x_as_batch, dy_as_kernel, (w_dilation, tuple(w_padding), x_dilation, strides, precision))
        return dw.transpose(*axes, 0, x.ndim - 1)  # [c, *kernel, o] -> [*kernel, c, o]

    def transposed_kernel_gradient(x: Array, dy: Array) -> Array:
        # dw of a transposed convolution: dy is the image and x, with its zeros, the kernel. The other way round the
        # image has the zeros, under a kernel of the image's size: XLA's code for that is 10 to 15 times slower.
        dy_as_batch = dy.transpose(dy.ndim - 1, *axes, 0)  # [o, *size, n]
        x_as_kernel = x.transpose(*axes, 0, x.ndim - 1)  # [*size, n, c]
        dw = _convolve(dy_as_batch, x_as_kernel, (w_dilation, tuple(x_padding), strides, x_dilation, precision))
        return jnp.flip(dw, axes).transpose(*axes, x.ndim - 1, 0)  # [o, *kernel, c] -> [*kernel, c, o]

    if max(x_dilation) > 1:
        return dx, in_parts(transposed_kernel_gradient, x, dy, math.prod(x.shape[1:-1]))
    return dx, in_parts(kernel_gradient, x, dy, math.prod(dy.shape[1:-1]))


def in_parts(gradient: Callable[[Array, Array], Array], x: Array, dy: Array, positions: int) -> Array:
    """The sum of `gradient` over parts of a batch, in float32 and then in its dtype.

    On several devices it is taken at once: each has a part of the batch, and parts of it would be sent.

    Args:
      positions: over which the gradient of one image sums.
    """
    n = len(x)
    part = max(1, MOST_POSITIONS // positions)
    if part >= n or jax.sharding.get_abstract_mesh().size > 1:
        return gradient(x, dy)
    count = n // part

    def add(total: Array, one: tuple[Array, Array]) -> tuple[Array, None]:
        return total + gradient(*one).astype(jnp.float32), None

    parts = tuple(a[: count * part].reshape(count, part, *a.shape[1:]) for a in (x, dy))
    like = jax.eval_shape(gradient, x[:part], dy[:part])
    total, _ = lax.scan(add, jnp.zeros(like.shape, jnp.float32), parts)
    if n % part:
        total += gradient(x[count * part :], dy[count * part :]).astype(jnp.float32)
    return total.astype(like.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _backward(window, saved, dy):
    def own(x, w, dy):
        return jax.vjp(lambda x, w: _plain(x, w, window), x, w)[1](dy)

    def on_cpu(x, w, dy):
        return _gradients(x, w, dy, window)

    return lax.platform_dependent(*saved, dy, cpu=on_cpu, default=own)


_convolve.defvjp(_forward, _backward)


def convolve(
    x: Array,
    w: Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvDimensionNumbers | None = None,
    feature_group_count: int = 1,
    precision=None,
) -> Array:
    """lax.conv_general_dilated of [n, ..., c] with [..., c, o], the arguments as linen's Conv gives them."""
    n = x.ndim - 2
    ones = (1,) * n
    dilations = tuple(lhs_dilation or ones), tuple(rhs_dilation or ones)
    if _forward_mode or feature_group_count != 1:
        return lax.conv_general_dilated(
            x,
            w,
            strides,
            padding,
            *dilations,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            precision=precision,
        )
    if isinstance(padding, str):
        extents = [(s - 1) * d + 1 for s, d in zip(x.shape[1:-1], dilations[0], strict=True)]
        kernel = [(k - 1) * d + 1 for k, d in zip(w.shape[:-2], dilations[1], strict=True)]
        padding = lax.padtype_to_pads(extents, kernel, strides, padding)
    padding = tuple((int(low), int(high)) for low, high in padding)
    return _convolve(x, w, (tuple(strides), padding, *dilations, precision))


def platform() -> str:
    """That of the devices whose mesh the program under way is traced in the context of, or else of this machine's."""
    device = getattr(jax.sharding.get_abstract_mesh(), 'abstract_device', None)
    return device.platform if device is not None else jax.default_backend()


@jax.custom_vjp
def _product(x: Array, w: Array) -> Array:
    return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


def _product_forward(x: Array, w: Array):
    # Not _product: rematerialisation keeps or drops products, and sees them here.
    return lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ()))), (x, w)


def _product_backward(saved, dy: Array):
    x, w = saved
    dx = lax.dot_general(dy, w, (((dy.ndim - 1,), (1,)), ((), ())))
    leading = tuple(range(x.ndim - 1))
    dw = lax.dot_general(x, dy, ((leading, leading), ((), ())))  # [c, o] at once
    return dx, dw


_product.defvjp(_product_forward, _product_backward)


def product(x: Array, w: Array, dimension_numbers, precision=None, preferred_element_type=None, **options) -> Array:
    """lax.dot_general of [..., c] with [c, o], the arguments as linen's Dense gives them."""
    plain = precision is not None or preferred_element_type is not None or options or x.ndim < 2 or x.dtype != w.dtype
    several = jax.sharding.get_abstract_mesh().size > 1  # fsdp.py sees how weights are used
    if plain or several or _forward_mode or platform() != 'cpu':
        return lax.dot_general(x, w, dimension_numbers, precision, preferred_element_type, **options)
    return _product(x, w)
