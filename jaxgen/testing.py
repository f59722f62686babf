"""The contract of families (contract.py), held against one of a person's own:

    from jaxgen.testing import check_family

    def test_contract():
        check_family(mypackage.myfamily.build, image=(8, 8, 1), classes=10, width=4)

What is wrong is a ContractError, one line that names the function, the primitive of its program where there is one, and
the remedy. Some checks need several devices: on a CPU set XLA_FLAGS=--xla_force_host_platform_device_count=8, and
NPROC=64: XLA has as many threads as NPROC says, each collective blocks one, and with as few as devices all can wait for
each other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxgen import config as configs
from jaxgen import fsdp, imports, sharding
from jaxgen.contract import Context, Family, State
from jaxgen.optim import Optim, make_optim

# Primitives that no program of a family may have, and what to do.
FORBIDDEN = {
    'pure_callback': 'it calls Python on the host in every step: compute it with jax.numpy, or once in build',
    'io_callback': 'it calls Python on the host in every step: return what is to be written as a log',
    'debug_callback': 'it prints from the device in every step: return the value as a log',
    'debug_print': 'it prints from the device in every step: return the value as a log',
    'infeed': 'programs get their data as arguments: take it from batch',
    'outfeed': 'programs give their results back: return it as a log',
    'rng_uniform': 'its numbers follow no key: draw with jax.random from rng',
}
# What tracing raises, and what to do.
UNTRACEABLE = (
    (jax.errors.TracerArrayConversionError, 'NumPy gets an array of the program: use jax.numpy'),
    (
        jax.errors.ConcretizationTypeError,
        'Python branches on the value of an array, or makes a number of it: use jnp.where, lax.cond or lax.scan',
    ),
    (jax.errors.UnexpectedTracerError, 'an array of one program was kept for another: return it, or put it into State'),
)
RANGE = 1.0001  # of pixels, with rounding
NOISE = 1e-3  # by which two samples differ at least somewhere
FUNCTIONS = ('sample', 'evaluate', 'encode', 'decode', 'classify', 'denoise')


class ContractError(AssertionError):
    """A family does not keep the contract."""


def require(holds, message: str) -> None:
    """Raises ContractError with the message unless something holds."""
    if not holds:
        raise ContractError(message)


class Subject(NamedTuple):
    """A family with what its functions get."""

    family: Family
    frozen: dict[str, Any]
    batch: dict[str, jax.Array]  # as `update` gets it
    conditions: dict[str, jax.Array]  # as `sample` gets it: 'index' and Family.conditions

    @property
    def n(self) -> int:
        return len(self.batch['image'])

    @property
    def image(self) -> tuple[int, ...]:
        return self.batch['image'].shape[1:]

    @property
    def numbered(self) -> dict[str, jax.Array]:
        """The batch as `evaluate` gets it."""
        return {**self.batch, 'index': jnp.arange(self.n, dtype=jnp.int32)}


def leaves(tree) -> Iterator[tuple[str, Any]]:
    """(path, leaf) of each leaf."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path), leaf


def check_same(a, b, message: str) -> None:
    """Raises ContractError where two trees are not equal bit for bit."""
    structures: list = [jax.tree.structure(tree) for tree in (a, b)]
    require(structures[0] == structures[1], f'{message}: other entries')
    for (path, x), y in zip(leaves(a), jax.tree.leaves(b), strict=True):
        require(np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True), f'{message}: {path} differs')


def check_close(a, b, message: str, rtol: float = 0.0, atol: float = 2e-4) -> None:
    """Raises ContractError where two trees of one structure differ by more than rounding."""
    for (path, x), y in zip(leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if not np.allclose(x, y, rtol=rtol, atol=atol):
            raise ContractError(f'{message} ({path or "it"} differs by {np.abs(x - y).max():.2g})')


# --- programs


def equations(jaxpr) -> Iterator[Any]:
    """Every equation of a program, those of loops and calls within too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def place(eqn) -> str:
    """' (FILE:LINE)' of the person's line that an equation comes from, '' where that is not known."""
    traceback = eqn.source_info.traceback
    inside = ('/jax/', '/flax/', '/optax/', '/jaxgen/testing.py', '/jaxgen/contract.py')
    frames = [f for f in (traceback.frames if traceback else ()) if not any(part in f.file_name for part in inside)]
    return f' ({frames[0].file_name}:{frames[0].line_num})' if frames else ''


def trace(name: str, function: Callable, *args):
    """(jaxpr, outputs as shapes) of a function of a family.

    Raises:
      ContractError: it cannot be traced.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    try:
        traced = jax.jit(function).trace(*shapes)  # a later call of it is not traced again
    except tuple(kind for kind, _ in UNTRACEABLE) as e:
        remedy = next(text for kind, text in UNTRACEABLE if isinstance(e, kind))
        raise ContractError(f'{name} cannot be compiled: {remedy} ({first_sentence(e)})') from e
    return traced.jaxpr.jaxpr, traced.out_info


def require_array(name: str, output) -> None:
    """Raises ContractError where what a function returns is no array."""
    require(isinstance(output, jax.ShapeDtypeStruct), f'{name} must return an array; it is a {type(output).__name__}')


def first_sentence(e: BaseException) -> str:
    """The first line of an exception."""
    return str(e).strip().split('\n')[0][:200]


def check_primitives(name: str, jaxpr, writes: bool = False) -> None:
    """Raises ContractError where a program has a primitive that it must not have.

    Args:
      writes: also those that write several numbers to one index: GPUs add these up in no fixed order.
    """
    for eqn in equations(jaxpr):
        kind = eqn.primitive.name
        require(kind not in FORBIDDEN, f'{name} has the primitive {kind}{place(eqn)}: {FORBIDDEN.get(kind)}')
        require(
            not (writes and sharding.overlaps(eqn)),
            f'{name} has the primitive {kind}{place(eqn)}, which may write to one index more than once, in no fixed '
            'order on GPUs: look up by a product with jax.nn.one_hot or layers.Embed, take maxima by layers.max_pool',
        )


# --- the functions of a family


def check_init(subject: Subject, abstract: State | None = None) -> State:
    """The first state, after checks of its tree.

    Args:
      abstract: the same as shapes, made of a specification of the data.
    """
    family, key = subject.family, jax.random.key(0)
    jaxpr, shapes = trace('init', family.init, key, subject.batch, subject.frozen)
    check_primitives('init', jaxpr)
    require(
        isinstance(shapes, State), f'init must return a State, by contract.new_state; it is {type(shapes).__name__}'
    )
    for field in ('params', 'opt', 'ema'):
        tree = getattr(shapes, field)
        require(isinstance(tree, dict) and tree, f'State.{field} must be a dict by network, of one or more')
    require(
        set(shapes.ema) <= {f'{name}{suffix}' for name in shapes.params for suffix in suffixes(shapes, name)},
        f'State.ema has {sorted(shapes.ema)}, and the networks are {sorted(shapes.params)}: see contract.new_state',
    )
    for path, leaf in leaves((shapes.params, shapes.ema)):
        require(leaf.dtype == jnp.float32, f'weights are float32 always; {path} is {leaf.dtype}: see Context.dtype')
    state = jax.jit(family.init)(key, subject.batch, subject.frozen)
    require(int(state.step) == 0 and state.step.dtype == jnp.int32, 'State.step must begin as 0, int32')
    kinds = jax.tree.map(lambda a: (a.shape, a.dtype), state)
    if abstract is not None:
        like = jax.tree.map(lambda a: (a.shape, a.dtype), abstract)
        require(kinds == like, 'init gives another tree from a batch than from its specification: use shapes alone')
    return state


def suffixes(state: State, name: str) -> list[str]:
    """'' and '@STD' of the averages that a network has."""
    return ['', *(key[len(name) :] for key in state.ema if key.startswith(f'{name}@'))]


def check_update(subject: Subject, start: State, steps: int = 2, writes: bool = True) -> State:
    """The state after some updates, after checks of them."""
    family, key = subject.family, jax.random.key(0)
    jaxpr, outputs = trace('update', family.update, start, subject.frozen, subject.batch, key)
    check_primitives('update', jaxpr, writes)
    pair = type(outputs) is tuple and len(outputs) == 2 and isinstance(outputs[0], State)
    require(pair, f'update must return (state, {{name: scalar}}); it returns a {type(outputs).__name__}')
    after, logs = outputs
    changed = {path for path, kind in kinds_of(after) ^ kinds_of(start)}
    require(not changed, f'update changes shape, dtype or presence of State{min(changed, default="")}: keep the tree')
    require(isinstance(logs, dict) and logs, 'update must return (state, {name: scalar}), with one log or more')
    for name, log in logs.items():
        require(log.shape == (), f'logs are scalars; {name!r} is {list(log.shape)}: take its mean')
    state, update = start, jax.jit(family.update)
    for i in range(steps):
        state, values = update(state, subject.frozen, subject.batch, jax.random.key(i))
        for name, value in values.items():
            require(np.isfinite(value), f'the log {name!r} is {value} in update {i}')
    require(int(state.step) == steps, f'{steps} updates count {int(state.step)} steps: end an update with advance')
    for field in ('params', 'ema'):
        for network, weights in getattr(state, field).items():
            before = jax.tree.leaves(getattr(start, field)[network])
            moved = [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(weights), before, strict=True)]
            remedy = 'pass its name to make_update' if field == 'params' else 'end an update with advance'
            require(any(moved) or not moved, f'{field} of {network!r} did not change: {remedy}')
    return state


def check_prepare(subject: Subject, start: State) -> None:
    """Raises ContractError where an update that gets what `prepare` makes of the images, in place of these, is another.
    One that draws random numbers is not computed beforehand, and may be."""
    family, frozen = subject.family, subject.frozen
    if family.prepare is None:
        return
    jaxpr, shapes = trace('prepare', family.prepare, frozen, subject.batch, jax.random.key(0))
    check_primitives('prepare', jaxpr)
    require(isinstance(shapes, dict) and shapes, 'prepare must return {name: [n, ...]}, with one array or more')
    for name, made in shapes.items():
        require(made.shape[:1] == (subject.n,), f'what prepare makes is [n, ...]; {name!r} is {list(made.shape)}')
        require(name not in subject.batch, f'prepare makes {name!r}, and the batch has one: call it STAGE/NAME')
    make = jax.jit(family.prepare)
    made = make(frozen, subject.batch, jax.random.key(0))
    turned = make(frozen, {k: v[::-1] for k, v in subject.batch.items()}, jax.random.key(0))
    other = make(frozen, subject.batch, jax.random.key(1))
    if any(not np.array_equal(made[name], other[name]) for name in made):
        return
    for name, values in made.items():
        check_close(values, turned[name][::-1], f'{name!r} of an example must not depend on the others', rtol=1e-3)
    rest = {name: x for name, x in subject.batch.items() if name != 'image'}
    update, key = jax.jit(family.update), jax.random.key(2)
    of_images = update(start, frozen, subject.batch, key)[1]
    try:
        prepared = update(start, frozen, rest | made, key)[1]
    except KeyError as e:
        raise ContractError(f'update of what prepare makes reads batch[{e.args[0]!r}], which is not there then') from e
    require(set(of_images) == set(prepared), 'update of what prepare makes has other logs than of images')
    check_close(of_images, prepared, 'update of what prepare makes is another than of images', rtol=2e-3)


def kinds_of(state) -> set[tuple[str, tuple]]:
    """(path, (shape, dtype)) of each leaf."""
    return {(path, (tuple(jnp.shape(x)), jnp.result_type(x))) for path, x in leaves(state)}


def check_pure(subject: Subject, again: Family, state: State) -> None:
    """Raises ContractError where the next update depends on more than its arguments: on what Python keeps, on a family
    that was built before, or on arrays that were donated.

    Args:
      again: the family, built a second time, as in the process that resumes.
    """
    key, host = jax.random.key(7), jax.device_get(state)
    once = jax.jit(subject.family.update)(state, subject.frozen, subject.batch, key)
    twice = jax.jit(lambda *args: subject.family.update(*args))(host, subject.frozen, subject.batch, key)
    check_same(once, twice, 'the same update gave two results: it must depend on its arguments alone, not on Python')
    resumed = jax.jit(again.update)(host, subject.frozen, subject.batch, key)
    check_same(once, resumed, 'resumed updates are others: build must depend on its arguments alone, not on NumPy')
    try:
        donated = jax.jit(lambda *args: again.update(*args), donate_argnums=0)(
            jax.tree.map(jnp.copy, state), subject.frozen, subject.batch, key
        )
    except (ValueError, RuntimeError, jax.errors.JaxRuntimeError) as e:
        raise ContractError(f'update cannot be given its state to overwrite ({first_sentence(e)})') from e
    check_same(once, donated, 'an update that overwrites its state gave another result')


def check_sample(subject: Subject, state: State, fewer: bool = True) -> jax.Array:
    """Samples, after checks of them.

    Args:
      fewer: half as many are drawn too, and are the same; this compiles once more.
    """
    family: Any = subject.family
    given, key = subject.conditions, jax.random.key(1)
    n = len(given['index'])
    jaxpr, shape = trace('sample', family.sample, state, subject.frozen, given, key)
    check_primitives('sample', jaxpr)
    expected = (n, *subject.image)
    require_array('sample', shape)
    require(shape.shape == expected, f'sample must give {list(expected)}; it gives {list(shape.shape)}')
    require(shape.dtype == jnp.float32, f'samples are float32; they are {shape.dtype}')
    draw = jax.jit(family.sample)
    images = draw(state, subject.frozen, given, key)
    require(np.isfinite(images).all(), 'samples are not finite')
    largest = float(np.abs(images).max())
    require(largest <= RANGE, f'samples lie in [-1, 1]; these go to {largest:.3g}: clip them')
    # A sample is a function of the seed and its number: not of its place, nor of what is drawn beside it.
    numbers = 'a sample must depend on its number alone, not on its place: draw by randomness.example_keys'
    turned = draw(state, subject.frozen, {k: v[::-1] for k, v in given.items()}, key)
    check_close(images, turned[::-1], numbers)
    if fewer:
        half = {k: v[: n // 2] for k, v in given.items()}
        check_close(images[: n // 2], draw(state, subject.frozen, half, key), f'{numbers}, nor on n')
    # Where images are given there need be no other noise in it: other ones are given too.
    others = {k: v[::-1] if v.ndim == 4 else v for k, v in given.items()} | {'index': given['index'] + n}
    other = draw(state, subject.frozen, others, key)
    require(np.abs(images - other).max() > NOISE, 'all samples are one sample: draw by randomness.example_keys')
    return images


def check_evaluate(subject: Subject, state: State) -> None:
    """Raises ContractError where the family's metrics are not one number for each example, by its number."""
    family, key, batch = subject.family, jax.random.key(2), subject.numbered
    jaxpr, _ = trace('evaluate', family.evaluate, state, subject.frozen, batch, key)
    check_primitives('evaluate', jaxpr)
    measure = jax.jit(family.evaluate)
    metrics = measure(state, subject.frozen, batch, key)
    require(isinstance(metrics, dict) and metrics, 'evaluate must return {name: [n]}, with one metric or more')
    turned = measure(state, subject.frozen, {k: v[::-1] for k, v in batch.items()}, key)
    for name, values in metrics.items():
        require(values.shape == (subject.n,), f'metrics are [n]; {name!r} is {list(values.shape)}')
        require(np.isfinite(values).all(), f'the metric {name!r} is not finite')
        by_number = f'the metric {name!r} of an example must depend on its number alone: draw by example_keys'
        check_close(values, turned[name][::-1], by_number, rtol=1e-3, atol=1e-4)


def check_latents(subject: Subject, state: State) -> None:
    """Raises ContractError where encode, decode and classify do not fit Family.latents and the images."""
    family, frozen, n, key = subject.family, subject.frozen, subject.n, jax.random.key(3)
    images, latents = {'image': subject.batch['image']}, family.latents
    z: Any = None
    if family.encode is not None:
        jaxpr, _ = trace('encode', family.encode, state, frozen, images, key)
        check_primitives('encode', jaxpr)
        z = jax.jit(family.encode)(state, frozen, images, key)
        if latents.grids:
            check_codes(z, latents, n)
        else:
            shape = (n, *(latents.shape or jnp.shape(z)[1:]))
            require(jnp.shape(z) == shape, f'encode gives {list(jnp.shape(z))}, and Family.latents says {list(shape)}')
            require(np.isfinite(z).all(), 'latents are not finite')
    if family.decode is not None:
        conditional = family.encode is None
        count = len(subject.conditions['index']) if conditional else n
        given = subject.conditions if conditional and family.conditions else {}
        if conditional:
            require(latents.shape, 'a family that decodes and does not encode must say Family.latents.shape')
            z = jax.ShapeDtypeStruct((count, *latents.shape), jnp.float32)
        jaxpr, decoded = trace('decode', family.decode, state, frozen, given, z, key)
        check_primitives('decode', jaxpr)
        shape = (count, *subject.image)
        require_array('decode', decoded)
        require(decoded.shape == shape, f'decode must give {list(shape)}; it gives {list(decoded.shape)}')
    if family.classify is not None:
        jaxpr, logits = trace('classify', family.classify, state, frozen, images, key)
        check_primitives('classify', jaxpr)
        require_array('classify', logits)
        require(logits.ndim == 2 and logits.shape[0] == n, f'logits are [n, classes]; they are {list(logits.shape)}')


def check_codes(z, latents, n: int) -> None:
    """Raises ContractError where codes are not what Family.latents says."""
    shapes = [(n, *grid) for grid in latents.grids]
    require(isinstance(z, tuple) and [a.shape for a in z] == shapes, f'encode must give integers of {shapes}')
    for codes in z:
        require(codes.dtype == jnp.int32, f'codes are int32; they are {codes.dtype}')
        inside = codes.min() >= 0 and codes.max() < latents.vocabulary
        require(inside, f'codes lie in 0 to {latents.vocabulary - 1}, by Family.latents; they go to {int(codes.max())}')


def check_accumulation(subject: Subject, whole: Family, parts: Family) -> None:
    """Raises ContractError where a gradient over two halves of the batch is another, unless noise or statistics make it
    so.

    Args:
      whole, parts: the family with optim.accumulate of 1 and of 2, by gradient descent.
    """
    start = jax.jit(whole.init)(jax.random.key(0), subject.batch, subject.frozen)
    args = (start, subject.frozen, subject.batch, jax.random.key(0))
    jaxpr, _ = trace('update', whole.update, *args)
    once, halves = jax.jit(whole.update)(*args), jax.jit(parts.update)(*args)
    draws = any(eqn.primitive.name == 'random_bits' for eqn in equations(jaxpr))
    if not draws and not jax.tree.leaves(start.extra):
        message = 'with optim.accumulate = 2 an update is another: losses are means over the batch'
        check_close(once[0].params, halves[0].params, message, rtol=2e-3, atol=2e-5)


def check_devices(subject: Subject, build: Callable[[], Family], start: State) -> None:
    """Raises ContractError where an update over all devices, weights cut over two, is another than on one.

    Args:
      build: makes the family anew, by gradient descent.
    """
    results = []
    for devices, parts in ((jax.devices()[:1], 1), (jax.devices(), 2 - jax.device_count() % 2)):
        mesh = sharding.make_mesh(parts, devices)
        family, places = build(), sharding.over_weights(mesh, start)
        state = jax.device_put(jax.device_get(start), places)
        frozen = jax.device_put(jax.device_get(subject.frozen), sharding.over_weights(mesh, subject.frozen))

        def update(state, frozen, batch, key, family=family, mesh=mesh):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return fsdp.of_model(family.update)(state, frozen, batch, key)

        batch = sharding.put_batch(mesh, jax.device_get(subject.batch))
        program = jax.jit(update, out_shardings=(places, sharding.replicated(mesh)))
        results.append(jax.device_get(program(state, frozen, batch, jax.random.key(0))[0].params))
    check_close(results[0], results[1], 'over several devices an update is another: by the place of an example', 2e-3)


# --- all of them


def descent(accumulate: int = 1) -> Optim:
    """Gradient descent: Adam's first steps are the sign of the gradient, which rounding can turn."""
    fields = configs.DEFAULTS['optim'] | {'name': 'sgd', 'lr': 0.1, 'accumulate': accumulate, 'ema': 0.5}
    return make_optim(100, batch=1, **fields)


def random_batch(image: tuple[int, int, int], classes: int, n: int) -> dict[str, jax.Array]:
    """Images of 8-bit levels in [-1, 1], and labels where there are classes."""
    rng = np.random.default_rng(0)
    batch = {'image': jnp.asarray(rng.integers(0, 256, (n, *image)) / 127.5 - 1, jnp.float32)}
    return batch | ({'label': jnp.arange(n, dtype=jnp.int32) % classes} if classes else {})


def check_family(
    build: Callable[..., Family] | str,
    image: tuple[int, int, int] = (8, 8, 1),
    classes: int = 0,
    *,
    batch: dict[str, Any] | None = None,
    n: int = 8,
    stages: dict[str, tuple[Family, State, dict]] | None = None,
    **options,
) -> None:
    """Holds a family to the contract.

    Args:
      build: the family's function, (context, **options) -> Family, or its name or dotted path.
      image: height, width and channels.
      classes: of batch['label']; 0: there are no labels.
      batch: arrays [n, ...] that it reads beside image and label.
      n: examples, an even number, and a multiple of the number of devices where there are several.
      stages: {name: (family, state, its own frozen)} of earlier stages.
      **options: as in config.model; small ones, so that compiling takes seconds.

    Raises:
      ContractError: what it does not keep, in one line.
    """
    if isinstance(build, str):
        imports.name(build)
        build = configs.builder(build)
    require(callable(build), f'build must be a function, or the name of a family; it is {build!r}')
    make: Callable = build
    whole = (
        isinstance(image, list | tuple) and len(image) == 3 and all(type(size) is int and size > 0 for size in image)
    )
    require(whole, f'image must be (height, width, channels); it is {image!r}')
    require(
        type(n) is int and n > 0 and n % 2 == 0, f'n must be an even number, for gradients over halves; it is {n!r}'
    )
    require(type(classes) is int and classes >= 0, f'classes must be 0 or more; it is {classes!r}')
    require(isinstance(batch, dict | None), f'batch must be {{name: array}}; it is {batch!r}')
    image = (image[0], image[1], image[2])
    n = math.lcm(n, jax.device_count()) if jax.device_count() <= 64 else n
    data = random_batch(image, classes, n) | {k: jnp.asarray(v) for k, v in (batch or {}).items()}
    families = {name: family for name, (family, _, _) in (stages or {}).items()}
    frozen = {name: (state, its_frozen) for name, (_, state, its_frozen) in (stages or {}).items()}

    def family_by(optim: Optim) -> Family:
        family = make(Context(image, classes, optim, families), **options)
        require(isinstance(family, Family), f'build must return a Family; it is a {type(family).__name__}')
        return family._replace(image=image)

    adam = make_optim(100, batch=n, **configs.DEFAULTS['optim'] | {'ema': 0.5, 'lr': 1e-3})
    family = family_by(adam)
    for name, value in data.items():
        count = len(value) if value.ndim else 0
        require(count == n, f'batch[{name!r}] must have {n} examples; it has {count}')
    missing = sorted(set(family.conditions) - set(data))
    require(not missing, f'the family is conditioned on {", ".join(missing)}: give them in batch=')
    for side in image[:2]:
        require(side % family.divisor == 0, f'image sides must be multiples of Family.divisor = {family.divisor}')
    few = {name: data[name][:4] for name in family.conditions} | {'index': jnp.arange(4, dtype=jnp.int32)}
    subject = Subject(family, frozen, data, few)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), data)
    _, abstract = trace('init', family.init, jax.random.key(0), shapes, frozen)
    start = check_init(subject, abstract)
    state = check_update(subject, start)
    check_prepare(subject, start)
    check_pure(
        subject, family_by(make_optim(100, batch=n, **configs.DEFAULTS['optim'] | {'ema': 0.5, 'lr': 1e-3})), state
    )
    check_accumulation(subject, family_by(descent()), family_by(descent(2)))
    if family.sample is not None:
        check_sample(subject, state)
    check_evaluate(subject, state)
    check_latents(subject, state)
    if jax.device_count() > 1:
        start = jax.jit(family_by(descent()).init)(jax.random.key(0), data, frozen)
        check_devices(subject, functools.partial(family_by, descent()), start)
