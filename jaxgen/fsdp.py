"""Fully sharded data parallelism: weights that lie in parts are gathered where they are used, and nowhere else.

Every array of weights lies cut along one axis over `mesh.fsdp` devices (`sharding.cut_axes`), and every batch over all
of them. Left to itself XLA may as well keep the weights in place and send activations. Here a function is traced, and
evaluated again equation by equation with a mark on what is cut (`gathering`). What acts on numbers one by one (casts,
optimisers, averages, weight normalisation) leaves them cut; for any other equation the weights are gathered (`use`),
after their cast to the dtype of computation; into loops their parts go as they are, so that a stack of blocks is
gathered block by block. In a loss the gradient is summed over the devices and cut again at the same place, first over
those that hold one copy of the weights (`summed`), and the backward pass gathers anew in place of keeping what the
forward pass has gathered. So no network and no family mentions devices, a person's own included, and the memory is one
layer's weights beside the parts.

Zhao et al. 2023, arXiv 2304.11277; Rajbhandari et al. 2020, arXiv 1910.02054.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import api_util
from jax.extend import core
from jax.sharding import PartitionSpec as P

from jaxgen import sharding

# Equations that act on numbers one by one.
POINTWISE = frozenset((
    'add', 'sub', 'mul', 'div', 'neg', 'sqrt', 'rsqrt', 'pow', 'integer_pow', 'square', 'sign', 'abs', 'exp', 'exp2',
    'expm1', 'log', 'log1p', 'tanh', 'logistic', 'max', 'min', 'and', 'or', 'not', 'select_n', 'eq', 'ne', 'lt', 'le',
    'gt', 'ge', 'is_finite', 'convert_element_type', 'copy', 'copy_p', 'add_any', 'reduce_precision', 'clamp', 'erf',
))  # fmt: skip
REDUCTIONS = frozenset(('reduce_sum', 'reduce_max', 'reduce_min', 'reduce_and', 'reduce_or', 'reduce_prod'))
CALLS = frozenset(('jit', 'pjit', 'closed_call', 'core_call', 'custom_jvp_call'))


# Equations of one array that only arrange its numbers anew.
ARRANGEMENTS = frozenset(('reshape', 'transpose', 'squeeze', 'broadcast_in_dim', 'slice', 'rev', 'expand_dims'))


class Mark(NamedTuple):
    """That an array lies cut along an axis, and what is to be done to the whole once it is gathered."""

    axis: int
    after: tuple[Any, ...] = ()  # equations of `ARRANGEMENTS`


class Cut(NamedTuple):
    """An array that lies cut."""

    value: Any
    mark: Mark


def spec_of(axis: int) -> P:
    """The layout of an array that is cut along an axis."""
    return P(*[None] * axis, 'fsdp')


def laid(x: jax.Array, spec: P) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, spec)


def mark_of(x: Any) -> Mark | None:
    return x.mark if isinstance(x, Cut) else None


def marked(values: Sequence[Any], marks: Sequence[Mark | None]) -> list:
    """Arrays with marks on those that are cut."""
    return [v if mark is None else Cut(v, mark) for v, mark in zip(values, marks, strict=True)]


def bare(x: Any) -> Any:
    """An array as it lies."""
    return x.value if isinstance(x, Cut) else x


def plain(x: Any) -> Any:
    """An array, arranged as it is to be; cut where it could stay so."""
    return use(_identity, [x])[0] if isinstance(x, Cut) and x.mark.after else bare(x)


def _identity(args: Sequence[Any]) -> list:
    return list(args)


def use(
    function: Callable[[Sequence[Any]], list], args: Sequence[Any], examples: tuple[int, int, int] | None = None
) -> list:
    """Results of a function of arrays, some of which are cut and gathered for it.

    Its gradient gathers them anew, in place of keeping what was gathered; that of weights is summed over the devices,
    and cut again.

    Args:
      examples: of a function that is linear in its one cut array and has one other, see `examples_of`.
    """
    marks = [mark_of(x) for x in args]
    if not any(marks):
        return function(args)

    def whole(values) -> list:
        gathered = []
        for x, mark in zip(values, marks, strict=True):
            if mark is not None:
                for eqn in mark.after:
                    (x,) = bind(eqn, [x])
            gathered.append(x)
        return function(gathered)

    def gathered(values, again: bool) -> list:
        # The barrier keeps the compiler from taking the first gathered array for the second.
        return [
            x if mark is None else laid(jax.lax.optimization_barrier(x) if again else x, P())
            for x, mark in zip(values, marks, strict=True)
        ]

    @jax.custom_vjp
    def results(*values):
        return whole(gathered(values, again=False))

    def backward(values, gradient):
        if examples is not None:
            i, j = examples[0], 1 - examples[0]
            there = gathered(values, again=True)
            _, pull = jax.vjp(lambda x: whole([x, there[i]] if i else [there[i], x]), values[j])
            (dx,) = pull(gradient)
            (mark,) = filter(None, marks)
            dw = summed(whole, values, gradient, examples, mark.axis)
            return (dx, dw) if i else (dw, dx)
        _, pull = jax.vjp(lambda *values: whole(values), *gathered(values, again=True))
        # Whole first: what a gradient is computed from would else be cut along the same axis, and activations be sent
        # for it. XLA makes one reduce-scatter of the two, where the devices have it.
        return tuple(
            dx if mark is None else laid(laid(dx, P()), spec_of(mark.axis))
            for dx, mark in zip(pull(gradient), marks, strict=True)
        )

    # Not by `results` itself: policies of checkpoints would see one opaque call, and compute its products twice.
    results.defvjp(lambda *values: (whole(gathered(values, again=False)), values), backward)
    return results(*map(bare, args))


def examples_of(eqn, args: Sequence[Any]) -> tuple[int, int, int] | None:
    """Of a matrix product or convolution of cut weights with examples: (index of the weights, axis of the examples in
    the other array, that in the result); None where it is no such product, or there is one copy of the weights.

    The axis is the first of the other array, or what a convolution says. Were it of something else, the gradient would
    be the same, and would be computed in other parts.
    """
    mesh = jax.sharding.get_abstract_mesh()
    cuts = [i for i, x in enumerate(args) if isinstance(x, Cut)]
    if mesh.empty or mesh.manual_axes or mesh.shape.get('data', 1) == 1 or len(args) != 2 or len(cuts) != 1:
        return None
    (i,) = cuts
    if eqn.primitive.name == 'dot_general':
        contracted, along = eqn.params['dimension_numbers']
        axis, result = 0, 0 if i else eqn.invars[0].aval.ndim - len(contracted[0])
        if along[0] or axis in contracted[1 - i]:
            return None
    elif eqn.primitive.name == 'conv_general_dilated' and i == 1 and eqn.params['batch_group_count'] == 1:
        where = eqn.params['dimension_numbers']
        axis, result = where.lhs_spec[0], where.out_spec[0]
    else:
        return None
    return (i, axis, result) if args[1 - i].shape[axis] % mesh.size == 0 else None


def summed(whole: Callable, values: Sequence[Any], gradient: Any, examples: tuple[int, int, int], axis: int) -> Any:
    """The gradient of a product's weights, cut along `axis`, from that of its results: of each device's examples, cut
    and summed over the `fsdp` devices that hold one copy, then summed over the copies. A sum over all devices, to
    which XLA would come, sends the whole gradient twice where this sends it once and a part of it twice."""
    i, of_other, of_result = examples
    over = ('data', 'fsdp')

    def local(other, gradient):
        of = jax.ShapeDtypeStruct(values[i].shape, values[i].dtype)
        pull = jax.linear_transpose(lambda w: whole([other, w] if i else [w, other]), of)
        (reduced,) = pull(gradient)
        reduced = jax.lax.psum_scatter(reduced, 'fsdp', scatter_dimension=axis, tiled=True)
        return jax.lax.psum(reduced, 'data')

    places: Any = P(*[None] * of_other, over), [P(*[None] * of_result, over)]
    return jax.shard_map(local, in_specs=places, out_specs=spec_of(axis), check_vma=False)(values[1 - i], gradient)


def evaluate(jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list:
    """Results of a jaxpr, arrays or `Cut`, for such arguments."""
    known: dict[Any, Any] = {}

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    known.update(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, equation(eqn, list(map(read, eqn.invars))), strict=True))
    return list(map(read, jaxpr.outvars))


@functools.cache
def debug_of(arguments: int, results: int):
    """What JAX's messages call the arguments and results of one equation: by their numbers."""
    about = api_util.debug_info('fsdp', lambda *values: values, (None,) * arguments, {})
    names = tuple(f'values[{i}]' for i in range(arguments))
    return about._replace(arg_names=names, result_paths=tuple(f'result[{i}]' for i in range(results)))


def bind(eqn, args: Sequence[Any]) -> list:
    """Results of an equation as it stands."""
    if jax.sharding.get_abstract_mesh().manual_axes:  # in `summed`; the equation's own mesh is that outside
        results = eqn.primitive.bind(*args, **eqn.params)
        return list(results) if eqn.primitive.multiple_results else [results]
    values = {v: x for v, x in zip(eqn.invars, args, strict=True) if not isinstance(v, core.Literal)}
    alone = core.Jaxpr((), list(values), eqn.outvars, [eqn], eqn.effects, debug_of(len(values), len(eqn.outvars)))
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*values.values())


def equation(eqn, args: list) -> list:
    """Results of one equation, arrays or `Cut`."""
    name, cuts = eqn.primitive.name, [x for x in args if isinstance(x, Cut)]
    if not cuts:
        return bind(eqn, args)
    if name == 'optimization_barrier':
        return marked(bind(eqn, [bare(x) for x in args]), [mark_of(x) for x in args])
    # Gathered already; a differentiated checkpoint comes from a loss, in which it was evaluated.
    if name == 'sharding_constraint' or (name in CHECKPOINTS and eqn.params['differentiated']):
        return bind(eqn, [plain(x) for x in args])
    if name in INSIDE:
        return INSIDE[name](eqn, args)
    x, mark = cuts[0]
    if name in ARRANGEMENTS and len(args) == 1:
        return [Cut(x, mark._replace(after=(*mark.after, eqn)))]
    if not any(cut.mark.after for cut in cuts):
        if name in REDUCTIONS:
            summed, axis = eqn.params['axes'], mark.axis
            left = None if axis in summed else Mark(axis - sum(a < axis for a in summed))
            return marked(bind(eqn, [x]), [left])
        shapes = {bare(a).shape for a in args if getattr(bare(a), 'shape', ())}
        if name in POINTWISE and shapes == {x.shape} and {cut.mark.axis for cut in cuts} == {mark.axis}:
            results = bind(eqn, [bare(a) for a in args])
            return marked(results, [mark] * len(results))
    return use(functools.partial(bind, eqn), args, examples_of(eqn, args))


def call(eqn, args: list) -> list:
    """A call is evaluated in place."""
    inner = eqn.params.get('jaxpr', eqn.params.get('call_jaxpr'))
    return evaluate(inner.jaxpr, inner.consts, args) if hasattr(inner, 'consts') else evaluate(inner, (), args)


def checkpoint(eqn, args: list) -> list:
    """A checkpoint of the same policy, within which weights are gathered: they are gathered anew with the rest."""
    marks = [mark_of(x) for x in args]
    outer: list[Mark | None] = []

    def function(*values):
        results = evaluate(eqn.params['jaxpr'], (), marked(values, marks))
        outer[:] = map(mark_of, results)
        return [bare(x) for x in results]

    again = jax.checkpoint(function, prevent_cse=eqn.params['prevent_cse'], policy=eqn.params['policy'])
    return marked(again(*map(bare, args)), outer)


def scan(eqn, args: list) -> list:
    """A loop over the parts of stacked weights, of which each turn gathers its own."""
    p = eqn.params
    body, n_consts, n_carry = p['jaxpr'], p['num_consts'], p['num_carry']
    consts, carry, xs = args[:n_consts], args[n_consts : n_consts + n_carry], args[n_consts + n_carry :]
    carry = [settled(x) for x in carry]
    xs = [use(_identity, [x])[0] if isinstance(x, Cut) and (x.mark.after or not x.mark.axis) else x for x in xs]
    marks = [mark_of(x) for x in carry]
    of_one = [None if mark is None else Mark(mark.axis - 1) for mark in map(mark_of, xs)]

    def turn(carry, xs):
        held, (carry, xs) = held_back(consts, (carry, xs))
        results = evaluate(body.jaxpr, body.consts, [*held, *marked(carry, marks), *marked(xs, of_one)])
        return as_carried(results[:n_carry], marks), [plain(x) for x in results[n_carry:]]

    carry, ys = jax.lax.scan(
        turn, [bare(x) for x in carry], [bare(x) for x in xs], p['length'], p['reverse'], p['unroll']
    )
    return [*marked(carry, marks), *ys]


def held_back(consts: list, changing: Any) -> tuple[list, Any]:
    """The constants of a loop's body, those that are cut tied to what changes with each turn, and the latter: the
    compiler would else gather the weights of all layers once before the loop, and keep them."""
    leaves, structure = jax.tree.flatten(changing)
    ties = [i for i, x in enumerate(leaves) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)]
    at = [i for i, x in enumerate(consts) if isinstance(x, Cut)]
    if not at or not ties:
        return consts, changing
    *values, leaves[ties[0]] = jax.lax.optimization_barrier((*(consts[i].value for i in at), leaves[ties[0]]))
    held = list(consts)
    for i, value in zip(at, values, strict=True):
        held[i] = consts[i]._replace(value=value)
    return held, jax.tree.unflatten(structure, leaves)


def settled(x: Any) -> Any:
    """An array or `Cut` that is arranged as it is to be."""
    return plain(x) if isinstance(x, Cut) and x.mark.after else x


def as_carried(results: Sequence[Any], marks: Sequence[Mark | None]) -> list:
    """What a loop hands on, laid as it began."""

    def one(x, mark):
        if mark is None:
            return use(_identity, [x])[0]
        return bare(x) if mark_of(x) == mark else laid(plain(x), spec_of(mark.axis))

    return [one(x, mark) for x, mark in zip(results, marks, strict=True)]


def while_loop(eqn, args: list) -> list:
    p = eqn.params
    n, m = p['cond_nconsts'], p['body_nconsts']
    of_condition, of_body, carry = args[:n], args[n : n + m], [settled(x) for x in args[n + m :]]
    marks = [mark_of(x) for x in carry]

    def goes_on(carry):
        inner = p['cond_jaxpr']
        return plain(evaluate(inner.jaxpr, inner.consts, [*of_condition, *marked(carry, marks)])[0])

    def turn(carry):
        inner = p['body_jaxpr']
        held, carry = held_back(of_body, carry)
        return as_carried(evaluate(inner.jaxpr, inner.consts, [*held, *marked(carry, marks)]), marks)

    return marked(jax.lax.while_loop(goes_on, turn, [bare(x) for x in carry]), marks)


def conditional(eqn, args: list) -> list:
    """A choice between branches; what one of them leaves cut is cut. One by platform, which is made when the program is
    lowered, stays as it is: no other platform's branch may be compiled."""
    if eqn.params.get('branches_platforms'):
        return use(functools.partial(bind, eqn), args)
    index, *operands = args
    marks = [mark_of(x) for x in operands]
    of_branches: list[list[Mark | None]] = []

    def of(branch):
        def function(*values):
            results = [settled(x) for x in evaluate(branch.jaxpr, branch.consts, marked(values, marks))]
            of_branches.append([mark_of(x) for x in results])
            return [bare(x) for x in results]

        return function

    results = jax.lax.switch(plain(index), list(map(of, eqn.params['branches'])), *map(bare, operands))
    outer = [next((mark for mark in column if mark is not None), None) for column in zip(*of_branches, strict=True)]
    return marked(results, outer)


CHECKPOINTS = frozenset(('checkpoint', 'remat', 'remat2'))
INSIDE: dict[str, Callable[[Any, list], list]] = {
    **dict.fromkeys(CALLS, call),
    **dict.fromkeys(CHECKPOINTS, checkpoint),
    'scan': scan,
    'while': while_loop,
    'cond': conditional,
}


def parts() -> int:
    """In how many parts weights lie in the program that is being traced."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape.get('fsdp', 1)


def cut(tree):
    """Arrays of the shapes of weights, gradients for instance, laid as these lie."""
    n = parts()
    if n == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    axes = sharding.cut_axes(tree, n)
    return jax.tree.unflatten(
        structure, [x if axis is None else laid(x, spec_of(axis)) for x, axis in zip(leaves, axes, strict=True)]
    )


def gathering(function: Callable) -> Callable:
    """Returns `function`, (weights, *rest) -> arrays, with the leaves of `weights` that are cut gathered where they are
    used. The mesh is that in whose context it is called (`sharding.use`); without a cut it is the function itself."""

    @functools.wraps(function)
    def at_use(weights, *rest):
        n = parts()
        if n == 1:
            return function(weights, *rest)
        traced, shapes = jax.make_jaxpr(function, return_shape=True)(weights, *rest)
        marks = [None if axis is None else Mark(axis) for axis in sharding.cut_axes(weights, n)]
        args = jax.tree.leaves((weights, rest))
        args = [*marked(args[: len(marks)], marks), *args[len(marks) :]]
        results = evaluate(traced.jaxpr, traced.consts, args)
        return jax.tree.unflatten(jax.tree.structure(shapes), list(map(plain, results)))

    return at_use


def of_model(function: Callable) -> Callable:
    """`gathering` of a function of a family, (state, frozen, *rest) -> arrays, the weights of which are both."""

    def of_weights(weights, *rest):
        return function(*weights, *rest)

    at_use = gathering(of_weights)
    return functools.wraps(function)(lambda state, frozen, *rest: at_use((state, frozen), *rest))
