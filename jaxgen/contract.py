"""The contract between a family and everything that families share. Read this first.

A family of generative models is to jaxgen what `optax.GradientTransformation` is to an
optimiser: a NamedTuple of pure functions over explicit state. The loop, the checkpoints, the
sharding and the measuring know these functions and no family by name.

A family lives in `jaxgen/families/<name>.py` and has one public function

    def build(context: Context, *, width: int = 128, ...) -> Family

whose keyword arguments (every one with a default) are the fields of `config.model`. A minimal
family is a loss and these lines:

    def loss(params, state, frozen, batch, rng):
        value = jnp.square(network.apply({'params': params['denoiser']}, batch['image'])).mean()
        return value, Aux({'loss': value})

    update = make_update(loss, context.optim, 'denoiser')

    def init(rng, batch, frozen):
        params = {'denoiser': network.init(rng, batch['image'])['params']}
        return new_state(params, context.optim)

Inside, images are NHWC float32 in [-1, 1]; outside (data sets, files) they are uint8.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxgen import fsdp
from jaxgen.errors import UserError
from jaxgen.optim import Optim, power_one_minus_decay, steps_within_update

Array = jax.Array
PyTree = Any


class State(flax.struct.PyTreeNode):
    """All that a run needs to go on: the checkpoint holds this and nothing else of the family."""

    step: Array  # int32 scalar, updates done
    params: PyTree  # {network: weights}
    opt: PyTree  # {network: optax state}
    ema: PyTree  # {network: averaged weights}, what sample and evaluate read; network@STD: another average of it
    extra: PyTree = None  # batch statistics, codebook counts, replay buffer


Batch = dict[str, Array]
Frozen = dict[str, Any]  # {stage: (its state, its own frozen)}, the weights of earlier stages; {} for most families


class Init(Protocol):
    """The state before the first update, of a training batch's shapes."""

    def __call__(self, rng: Array, batch: Batch, frozen: Frozen) -> State: ...


class Update(Protocol):
    """One update on a training batch: the next state, and {name: scalar} for the logs."""

    def __call__(self, state: State, frozen: Frozen, batch: Batch, rng: Array) -> tuple[State, dict[str, Array]]: ...


class Loss(Protocol):
    """The loss of a training batch and its Aux; `params` is what is differentiated, `state` the state before the step.

    `params` is {network: weights} of all networks; those of `state` are constants.
    """

    def __call__(self, params: PyTree, state: State, frozen: Frozen, batch: Batch, rng: Array) -> tuple[Array, Aux]: ...


class Sample(Protocol):
    """Samples, float32 [n, H, W, C] in [-1, 1].

    `batch` holds 'index' int32 [n], the number of each sample, which alone decides its noise, the arrays named in
    `Family.conditions`, and those of `Family.inputs` that a person gives. Where there are `Family.settings`, one more
    argument is such a tree.
    """

    def __call__(self, state: State, frozen: Frozen, batch: Batch, rng: Array, *settings: PyTree) -> Array: ...


class Trajectory(Protocol):
    """What sampling passes through, {name: [steps, n, H, W, C]}; arguments as for `Sample`."""

    def __call__(
        self, state: State, frozen: Frozen, batch: Batch, rng: Array, *settings: PyTree
    ) -> dict[str, Array]: ...


class Evaluate(Protocol):
    """Held-out metrics of each example, {name: float32 [n]}.

    `batch` holds what the data give, and 'index' int32 [n], the number of each example.
    """

    def __call__(self, state: State, frozen: Frozen, batch: Batch, rng: Array) -> dict[str, Array]: ...


class Encode(Protocol):
    """Latents or features [n, ...] of images, or integers as `Family.latents` says; `batch` may hold 'image' alone."""

    def __call__(self, state: State, frozen: Frozen, batch: Batch, rng: Array) -> Any: ...


class Prepare(Protocol):
    """What `update` may be given in place of batch['image']: arrays {name: [n, ...]} of each example, by the frozen
    stages alone. They are computed once for each image, not in each update, so they must not depend on rng (those that
    do are not kept), nor one example's on another.

    `batch` holds what the data give. `update` of a batch with these arrays and without the image is that of the image,
    with the same random numbers.
    """

    def __call__(self, frozen: Frozen, batch: Batch, rng: Array) -> dict[str, Array]: ...


class Decode(Protocol):
    """Images, float32 [n, H, W, C] in [-1, 1], of latents as `Family.latents` describes them.

    `batch` holds the arrays named in `Family.conditions` where there is no `encode`: what would be drawn under them
    from these latents. It may be empty otherwise.
    """

    def __call__(self, state: State, frozen: Frozen, batch: Batch, latents: Any, rng: Array) -> Array: ...


class Classify(Protocol):
    """Logits [n, classes] of images; where `batch` holds 'sigma' [n] too, of noisy ones, image + sigma eps."""

    def __call__(self, state: State, frozen: Frozen, batch: Batch, rng: Array) -> Any: ...


class Denoise(Protocol):
    """Estimate of the images, float32 [n, H, W, C], not clipped, of x = image + sigma eps with sigma [n].

    This is what a diffusion model is to later stages, whatever its own process. `batch` as for `Sample`.
    """

    def __call__(self, state: State, frozen: Frozen, batch: Batch, x: Array, sigma: Array) -> Array: ...


class Embed(Protocol):
    """What the codes [n, h, w] of grid k add to the map that is decoded, float32 [n, H, W, D]."""

    def __call__(self, state: State, frozen: Frozen, codes: Array, k: int) -> Array: ...


class EncodeText(Protocol):
    """The features of texts for a later stage, a networks.clip.TextOutput, by tokens int32 [n, Family.texts.length];
    the averaged weights may hold rows of further tokens, see WORDS."""

    def __call__(self, state: State, frozen: Frozen, tokens: Array) -> Any: ...


class LogitScale(Protocol):
    """What the cosines of embeddings of images and texts are multiplied by to be logits, float32 []."""

    def __call__(self, state: State) -> Array: ...


class Posterior(NamedTuple):
    """The distribution of latents given an image, of which `encode` gives the mean."""

    moments: Encode  # {name: [n, ...]}, its parameters
    draw: Callable[[dict[str, Array], Array], Array]  # (moments, rng) -> latents


class Latents(NamedTuple):
    """What `encode` gives of one example and `decode` takes, for a later stage to be built on: an array of real numbers
    of a shape, or, where there are `grids`, a tuple of int32 [n, h, w], one for each grid."""

    shape: tuple[int, ...] = ()  # of one example's latents; (): there are none, or they are integers
    grids: tuple[tuple[int, int], ...] = ()  # (h, w) of each grid of integers, coarse ones first,
    vocabulary: int = 0  # each integer from 0 to vocabulary - 1


class Captions(NamedTuple):
    """What `sample` reads of a caption."""

    words: int = 0  # at most; longer ones are refused on the command line. 0: any number
    encoded: bool = False  # by stages: a batch holds 'STAGE/tokens' int32 [n, length] for each stage with `texts`, and
    # the same of the text that stands for no caption, 'STAGE/negative', with NEGATIVE
    weighted: bool = False  # in sampling captions are prompts with weights of words: a batch holds 'STAGE/weights' and
    # 'STAGE/negative_weights', float32 [n, length]
    chunks: int = 1  # in sampling the arrays above are [n, chunks * length], the parts of a text one behind the other,
    # of stages whose texts are divisible
    negative: bool = False  # negative prompts change samples: there is guidance away from them
    added: tuple[tuple[str, str, int], ...] = ()  # (stage, word, tokens) of new words: the numbers of their tokens come
    # behind the vocabulary of the stage, in this order
    learned: str = ''  # the one of them that is trained, which captions must have


WORDS = 'words'  # in State.ema of a text encoder: rows [n, D] of tokens behind its vocabulary
NEGATIVE = 'has_negative'  # bool [n] of a batch: whether 'STAGE/negative' are of a negative prompt, and not of ''


ENCODED = ('/tokens', '/negative', '/weights', '/negative_weights')  # ends of names


def condition_names(family: Family, names: Iterable[str]) -> list[str]:
    """Which of the arrays of a batch `sample` reads beside 'index'."""
    encoded = family.captions.encoded

    def read(name: str) -> bool:
        return name in family.conditions or (encoded and (name == NEGATIVE or name.endswith(ENCODED)))

    return [name for name in names if read(name)]


class Texts(NamedTuple):
    """The tokens that the family reads of captions: batch['tokens'], int32 [n, length]."""

    vocabulary: int = 0  # tokens at most; 0: it reads none
    length: int = 0  # of a text, its start and end included
    divisible: bool = True  # longer texts may be read in parts, each with a start and an end, see Captions.chunks


class Input(NamedTuple):
    """An image that `sample` and `trajectory` read where the batch holds it, and do without otherwise."""

    name: str
    shape: tuple[int, int, int]  # of one example's
    instead_of: str = ''  # the condition that the batch need not hold then
    beside: tuple[str, ...] = ()  # others without which it is not read
    otherwise: str = ''  # what else a person may do who gives it without them
    required: bool = False  # as the family is set, nothing is sampled without it


class Family(NamedTuple):
    """The pure functions that `build` returns, and facts about them. All are traced: no Python side effects.

    `batch` is a dict of arrays with a leading batch axis: 'image' float32 [n, H, W, C] in [-1, 1], labels and other
    conditions by name. `encode` and `classify` may count on 'image' alone.
    """

    init: Init
    update: Update  # `untrained`: nothing trains it, it is imported
    sample: Sample | None  # None: the family draws no samples
    evaluate: Evaluate
    encode: Encode | None = None
    decode: Decode | None = None
    classify: Classify | None = None
    denoise: Denoise | None = None
    trajectory: Trajectory | None = None
    embed: Embed | None = None  # of integer latents whose grids are scales of one map
    posterior: Posterior | None = None  # of the latents: later stages are trained on draws from it
    encode_text: EncodeText | None = None
    logit_scale: LogitScale | None = None  # where `encode` of images and `encode_text` are into one space
    prepare: Prepare | None = None  # where `update` reads of an image what frozen stages make of it, and nothing else
    conditions: tuple[str, ...] = ()  # names in `batch` that sample reads beside 'index'
    inputs: tuple[Input, ...] = ()  # further images, that a person may give beside or in place of these
    displayed: tuple[str, ...] = ()  # names in `batch` that trajectory displays too, where they are there
    divisor: int = 1  # the image's height and width must be multiples of this
    free: tuple[str, ...] = ()  # fields and sections of config.model that no update reads: they may change on resume
    sampling: tuple[str, ...] = ()  # those of them that sample reads
    merged: tuple[Callable, Callable] | None = None  # of adapters and their base as an ordinary run: (state, frozen) ->
    # {network: weights}, and sections of the config -> those of that run
    settings: Callable[[], PyTree] | None = None  # values of fields marked TRACED, as `sample` takes them
    config: str = ''  # JSON of {'family', 'model'} of the config that it is built of; `assembly.make_family` says it
    program: Hashable = None  # equal for families whose programs differ in settings alone; see assembly.make_family
    deterministic: bool = True  # of its programs, see `sharding.jit`; `assembly.make_family` says it
    latents: Latents = Latents()
    captions: Captions = Captions()
    texts: Texts = Texts()
    image: tuple[int, ...] = ()  # (height, width, channels) of the examples; `assembly.assemble` says it
    larger: tuple[
        str, ...
    ] = ()  # metrics of `evaluate` of which larger values are better; 'accuracy' also 'accuracy/0'
    statistics: bool = False  # State.extra holds batch statistics or norms of the averaged weights: no others sample


def untrained(state: State, frozen: Frozen, batch: Batch, rng: Array) -> tuple[State, dict[str, Array]]:
    """The `update` of families whose weights are imported; `train.check_trains` refuses them before it is traced."""
    raise UserError('nothing trains this family: its weights are imported')


def by_settings(function: Callable, settings: Callable[[], PyTree]) -> Callable:
    """`function`, the last argument of which is a tree like `settings()`, with that one where none is given.

    So the settings of a family are arguments of its compiled sampler: Python numbers, and tables that were computed
    from the options beforehand. Of an option that is off there is no entry.
    """

    def sample(state: State, frozen: Frozen, batch: Batch, rng: Array, given: PyTree = None):
        return function(state, frozen, batch, rng, settings() if given is None else given)

    return sample


class Context(NamedTuple):
    """What the shared machinery hands to every family's `build`, from the config."""

    image: tuple[int, int, int]  # H, W, C of one image
    classes: int  # number of classes of batch['label']; 0: the data has no labels
    optim: Optim
    stages: dict[str, Family] = {}  # earlier stages by name, their weights come in `frozen`
    dtype: Any = jnp.float32  # dtype of computation; weights are float32 always
    remat: bool = False  # recompute activations in the backward pass, block by block
    trained: tuple[int, ...] = ()  # H, W, C of the images that the weights are of, where `image` is another size
    tokenizer: Callable[[str], Any] | None = None  # stage -> its text.tokenizers.Tokenizer; None: no stage is trained


def new_state(params: PyTree, optim: Optim, extra: PyTree = None, ema: tuple[str, ...] = ()) -> State:
    """State before the first update.

    Args:
      params: {network: weights}, all networks of the family.
      ema: names of the networks to average; () means all of them.
    """
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt={name: optim.tx(name).init(weights) for name, weights in params.items()},
        # Copies: State is donated, and one buffer must not be donated twice.
        ema={
            name + suffix: jax.tree.map(jnp.copy, params[name])
            for name in (ema or params)
            for suffix in ('', *(f'@{std}' for std in optim.ema_std))
        },
        extra=extra,
    )


class Aux(NamedTuple):
    """What a loss gives beside its value; over the parts of an accumulated gradient, means of both."""

    logs: dict[str, Array]  # scalars by name, written to the run's metrics
    kept: PyTree = None  # arrays that the family keeps in State.extra: batch statistics, codebook counts, errors


def gradient_step(loss: Loss, optim: Optim, *networks: str, times: int = 1) -> Callable:
    """Returns one optimiser step on the named networks, (state, frozen, batch, rng) -> (state, Aux).

    `params` and `opt` of these networks are updated, and nothing else of the state. With `optim.accumulate` = m > 1
    the gradient is the mean over m equal parts of the batch, taken one after another to save memory.

    Args:
      loss: (params, state, frozen, batch, rng) -> (scalar, Aux). `params` is {network: weights} of all networks, and
        what is differentiated; `state` is the whole state before the step, its `params` constants.
      networks: the networks that are trained.
      times: optimiser steps within one update, one after another, see `repeat`; the Aux is their mean.
    """
    if times > 1:
        return repeat(gradient_step(loss, steps_within_update(optim, times), *networks), times)

    def step(state: State, frozen: PyTree, batch: PyTree, rng: Array) -> tuple[State, Aux]:
        def of_weights(weights, batch, rng):
            trained, state, frozen = weights
            return loss({**state.params, **trained}, state, frozen, batch, rng)

        def of_trained(trained, batch, rng):
            return fsdp.gathering(of_weights)((trained, state, frozen), batch, rng)

        trained = {name: state.params[name] for name in networks}
        gradient = jax.grad(of_trained, has_aux=True)
        if optim.accumulate == 1:
            grads, aux = gradient(trained, batch, rng)
        else:
            m = optim.accumulate

            def one(total, part):
                return jax.tree.map(jnp.add, total, gradient(trained, *part)), None

            parts = (split_batch(batch, m), jax.random.split(rng, m))
            like = jax.eval_shape(gradient, trained, *jax.tree.map(lambda x: x[0], parts))
            grads, aux = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
            total, _ = jax.lax.scan(one, (fsdp.cut(grads), aux), parts)
            grads, aux = jax.tree.map(lambda x: x / m, total)

        params, opt, logs = dict(state.params), dict(state.opt), dict(aux.logs)
        for name in networks:
            logs[f'grad_norm/{name}'] = optax.tree.norm(grads[name])
            updates, opt[name] = optim.tx(name).update(grads[name], opt[name], params[name])
            params[name] = optax.apply_updates(params[name], updates)
        return state.replace(params=params, opt=opt), Aux(logs, aux.kept)

    return step


def store(step: Callable, entries: Callable = lambda state, kept: kept) -> Callable:
    """Returns `step` with what its loss kept put into State.extra at once, (...) -> (state, Aux of logs alone).

    Args:
      entries: (state, Aux.kept) -> {name: new entry of State.extra}; the kept arrays as they are, by default.
    """

    def stored(state: State, frozen: PyTree, batch: PyTree, rng: Array) -> tuple[State, Aux]:
        state, aux = step(state, frozen, batch, rng)
        return state.replace(extra={**state.extra, **entries(state, aux.kept)}), Aux(aux.logs)

    return stored


def repeat(step: Callable, times: int) -> Callable:
    """Returns `times` such steps, one after another, each on its own equal part of the batch (several steps of a
    discriminator per step of the generator, say); the Aux is their mean. Learning rates follow the count of updates
    where the step was made with `steps_within_update(optim, times)`."""

    def steps(state: State, frozen: PyTree, batch: PyTree, rng: Array) -> tuple[State, Aux]:
        def one(state, part):
            return step(state, frozen, *part)

        state, aux = jax.lax.scan(one, state, (split_batch(batch, times), jax.random.split(rng, times)))
        return state, jax.tree.map(lambda x: x.mean(0), aux)

    return step if times == 1 else steps


def make_update(loss: Loss, optim: Optim, *networks: str) -> Update:
    """Returns the update of a family with one loss, (state, frozen, batch, rng) -> (state, {name: scalar}): a
    gradient step on the named networks, then `advance`. For the arguments see `gradient_step`."""
    step = gradient_step(loss, optim, *networks)

    def update(state: State, frozen: PyTree, batch: PyTree, rng: Array) -> tuple[State, dict]:
        state, aux = step(state, frozen, batch, rng)
        return advance(state, optim), aux.logs

    return update


def advance(state: State, optim: Optim) -> State:
    """Ends an update: the weights' moving averages take a step and `step` counts up."""

    def averaged(name: str, average: PyTree) -> PyTree:
        network, _, std = name.partition('@')
        newest = power_one_minus_decay(state.step, float(std)) if std else optim.one_minus_decay(state.step)
        # Not decay * e + newest * p: where their rounded sum is not 1, a long run's average would drift.
        return jax.tree.map(lambda e, p: jnp.where(newest < 1, e + newest * (p - e), p), average, state.params[network])

    ema = {name: averaged(name, average) for name, average in state.ema.items()}
    return state.replace(step=state.step + 1, ema=ema)


def running_mean(state: State, old: PyTree, new: PyTree, decay: float) -> PyTree:
    """Running average of what updates find (batch statistics, counts of codes): `old` with `new` of this update in it.

    At first all count alike: the start values would else linger. `state.step` says how many are in `old`: before
    `advance` the values of init do not count.
    """
    kept = jnp.minimum(decay, state.step / (state.step + 1))
    return jax.tree.map(lambda a, b: kept * a + (1 - kept) * b, old, new)


def split_batch(batch: PyTree, n: int) -> PyTree:
    """Cuts every [n * b, ...] into [n, b, ...] for a scan over n parts.

    Part i takes examples i, i + n, i + 2n, ...: the reshape to [b, n, ...] keeps the sharded
    leading axis in place, where one to [n, b, ...] would gather the whole batch on every device.
    """
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(len(x) // n, n, *x.shape[1:]), 0, 1), batch)


def shard_batch(x: PyTree) -> PyTree:
    """Lays arrays [n, ...] that a family made itself over the devices, as a batch lies.

    What meets the batch is spread without this. What does not, like the latents of a generator's
    step, XLA would have every device compute whole. Without a mesh, or where n cannot be cut into
    equal parts, nothing is done.
    """
    mesh = jax.sharding.get_abstract_mesh()
    place = jax.sharding.PartitionSpec(mesh.axis_names)

    def one(x):
        return x if mesh.empty or len(x) % mesh.size else jax.lax.with_sharding_constraint(x, place)

    return jax.tree.map(one, x)


def together(*arrays: Array) -> Array:
    """Arrays [n, ...] as one, [k n, ...], which a network takes in one call; `apart` undoes it.

    Where weights are cut, so that a batch is too, an example's copies lie side by side: each device has its own.
    """
    if fsdp.parts() == 1:
        return jnp.concatenate(arrays)
    return jnp.stack(arrays, 1).reshape(-1, *arrays[0].shape[1:])


def apart(x: Array, k: int) -> list[Array]:
    """The k arrays [n, ...] of which `together` has made x."""
    if fsdp.parts() == 1:
        return jnp.split(x, k)
    return [x.reshape(-1, k, *x.shape[1:])[:, i] for i in range(k)]
