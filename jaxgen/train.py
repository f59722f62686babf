"""The training loop, once for all families; it imports none."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import jaxgen
from jaxgen import (
    compilation,
    conditions,
    data,
    describe,
    files,
    fsdp,
    hosts,
    interrupt,
    locks,
    log,
    origin,
    prepare,
    randomness,
    sample,
    sharding,
    stopping,
)
from jaxgen import config as configs
from jaxgen.assembly import Assembled, assemble, check_stages, restored_alone, say_if_initial
from jaxgen.checkpoint import Checkpoints, stopped
from jaxgen.contract import Family, State, untrained
from jaxgen.data.prepared import PreparedSet
from jaxgen.directory import TOKENIZER, check_cycle, check_moved_data, save_config, saved_config
from jaxgen.errors import RunError, UserError
from jaxgen.evaluation.bound import BoundModel
from jaxgen.run import Run, make_evaluator
from jaxgen.text import captions

# With several hosts, calls between two agreements on whether one of them has a signal to stop.
CALLS_PER_AGREEMENT = 10
PROFILED_CALLS = (10, 15)  # first and last call under --profile, after compiling

# (step, logs, run): called on every host where a line of metrics is written, with its means. `run` is a Run of the
# present weights (run.step says which: updates go on while logs are fetched), to be used within the call.
Callback = Callable[[int, dict[str, float], Run], object]


@contextlib.contextmanager
def only_one(workdir: str):
    """Holds the run directory; a second training in it is refused."""
    locks.check_platform()
    try:
        os.makedirs(workdir, exist_ok=True)
        origin.check_layout(workdir)
        lock = open(os.open(os.path.join(workdir, 'lock'), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), 'wb')  # noqa: SIM115
    except OSError as e:
        raise UserError(f'--workdir={workdir} cannot be written to: {e.strerror}') from e
    with lock as file:
        try:
            locks.hold(file.fileno())
        except OSError as e:
            raise UserError(f'another training is running in {workdir}: wait for it, or give another --workdir') from e
        yield


def check_fits(config, mesh) -> None:
    """Raises UserError where sizes and devices do not go together."""
    sharding.check_batch(mesh, 'config.data.batch', config.data.batch)
    part = config.data.batch // config.optim.accumulate
    if config.optim.accumulate > 1:
        sharding.check_batch(mesh, 'config.data.batch / config.optim.accumulate', part)


def check_resume(workdir: str, config, free: tuple[str, ...], imported: bool = False) -> list[str]:
    """The fields whose folders or runs have moved.

    Args:
      imported: the run holds published weights and was not trained yet: data, optimiser and loop may be any.

    Raises:
      UserError: the run in `workdir` was started with another config.
    """
    changed = configs.differences_that_matter(saved_config(workdir), config, free)
    if imported:
        changed = [line for line in changed if line.startswith(('family:', 'model.', 'stages.'))]
    if changed:
        raise UserError(
            f'the run in {workdir} was started with another config: {"; ".join(changed)}; '
            'put it back, or give another --workdir'
        )
    return configs.moved(saved_config(workdir), config)


def as_it_began(workdir: str, config):
    """A copy of the config with what 'auto' stood for when the training in `workdir` began, if there is one."""
    config = configs.complete(config.to_dict())
    with contextlib.suppress(OSError):
        if any(name.isdecimal() for name in os.listdir(os.path.join(workdir, 'checkpoints'))):
            saved = saved_config(workdir)
            for field in configs.BEFORE:
                section, name = field.split('.')
                if config[section][name] == 'auto':
                    config[section][name] = saved[section][name]
    if config.train.stages_dtype == 'auto':
        config.train.stages_dtype = 'run'
    return config


def check_trains(config, family: Family) -> None:
    """Raises UserError where a family has no training."""
    if family.update is untrained:
        raise UserError(
            f'nothing here trains the family {config.family!r}: import a published one, --mode=import --from=FOLDER '
            '--workdir=runs/NAME, and name its run as a stage of another, --config.stages.NAME=runs/NAME'
        )


def make_call(assembled: Assembled, shardings, updates: int, seed: int):
    """The jitted program of `updates` updates: (state, frozen, batches [updates, ...]) -> (state, logs [updates])."""

    def call(state, frozen, batches):
        def one(state, batch):
            # The step alone decides the noise: history does not, so resuming cannot change it.
            rng = jax.random.fold_in(randomness.stream(jax.random.key(seed), 'update'), state.step)
            # For contract.shard_batch and for fsdp.py.
            with jax.sharding.use_abstract_mesh(assembled.mesh.abstract_mesh):
                return fsdp.of_model(assembled.family.update)(state, frozen, sample.to_inside(batch), rng)

        return jax.lax.scan(one, state, batches) if updates > 1 else one_step(one, state, batches)

    def one_step(one, state, batches):
        state, logs = one(state, jax.tree.map(lambda x: x[0], batches))
        return state, jax.tree.map(lambda x: x[None], logs)

    places = shardings, sharding.replicated(assembled.mesh)
    deterministic = assembled.family.deterministic
    return sharding.jit(call, deterministic, donate_argnums=0, out_shardings=places)


@jax.jit
def all_finite(state) -> jax.Array:
    """Whether no weight, statistic or moment in a state is infinite or not a number."""
    leaves = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]))


def reads_more(here: tuple[int, ...], there: tuple[int, ...]) -> bool:
    """Whether a kernel [h, w, channels, features] of this shape is that of a convolution with more input channels."""
    return len(here) == len(there) == 4 and here[2] > there[2] and (*here[:2], here[3]) == (*there[:2], there[3])


def widened(here: jax.Array, there: jax.Array) -> jax.Array:
    """A kernel with zeros for the input channels that `here` has more; see `reads_more`."""
    if here.shape == there.shape:
        return there
    return jnp.pad(there, ((0, 0), (0, 0), (0, here.shape[2] - there.shape[2]), (0, 0)))


class Training:
    """One process's training of one run: the mutable things of the loop, and what is done with them."""

    def __init__(self, config, workdir: str, callbacks: Sequence[Callback] = ()):
        self.config = config = as_it_began(workdir, config)
        self.workdir, self.callbacks = workdir, callbacks
        check_cycle(workdir, config)
        self.a = a = assemble(config, sharding.make_mesh(config.mesh.fsdp), workdir=workdir)
        check_trains(config, a.family)
        self.first = jax.process_index() == 0
        check_fits(config, a.mesh)
        self.k = config.train.updates_per_call
        self.job, self.seconds = compilation.job(config, a.mesh), 0.0  # what is compiled, and for how long
        self.checkpoints = Checkpoints(workdir, config.train.keep, config.train.keep_every)
        imported = self.checkpoints.steps() == [0]  # training saves none before its first update
        moved, before = [], None
        if self.checkpoints.steps():
            moved, before = check_resume(workdir, config, a.family.free, imported), saved_config(workdir)
        if config.data.test_source:
            a.dataset('test')  # its mistakes come before anything is computed
        self.held_out = stopping.HeldOut(config, a) if config.train.held_out_every else None
        self.evaluator = None
        if config.train.evaluate_every and a.family.sample is not None:
            self.evaluator = make_evaluator(config, a.mesh)
            self.evaluator.check(config.train.evaluate_samples)
        self.best, self.larger = stopping.start(config, a, self.held_out, self.evaluator)
        restored = self.checkpoints.restore(a.abstract, a.mesh)
        examples, images = self.look_at_data()
        self.prepared = prepare.for_training(a, examples)
        examples.close()
        config.data.prepared = 'on' if self.prepared else 'off' if a.family.prepare else config.data.prepared
        self.about = {
            'jax': jax.__version__, 'stages': a.stage_digests, 'data': examples.identity, 'devices': jax.device_count()
        }  # fmt: skip
        if a.texts:
            self.about['tokenizers'] = a.tokenizer_digests
        if self.prepared:
            self.about['prepared'] = self.prepared.identity
        self.frozen = jax.device_put(a.frozen, sharding.over_weights(a.mesh, a.frozen))
        self.shardings = sharding.over_weights(a.mesh, a.abstract)
        self.call = make_call(a, self.shardings, self.k, config.seed)
        if restored:
            self.state, about = restored
            check_stages(about, a, workdir, moved)
            if self.state.opt is None:
                self.state = self.from_imported(self.state)
            else:
                check_moved_data(about, config, workdir, moved)
            self.check_layout(before, about)
            if 'imported' in about:
                self.about['imported'] = about['imported']
            if about.get('data', self.about['data']) != self.about['data']:
                log.say('WARNING: the training data are not those that this run was trained on until now')
            if about['step'] and about.get('prepared') != self.about.get('prepared'):
                log.say(
                    'WARNING: until now the latents or codes of this run were '
                    f'{"others, of the same images" if "prepared" in about else "computed in the updates"}: what '
                    'follows differs by rounding'
                )
            self.meter = log.Meter(about['meter'])
            self.best = stopping.resumed(self.best, about.get('best'))
            self.introduce(images, about['step'], f'going on from step {about["step"]} of {config.train.steps}')
        else:
            self.introduce(images, 0, f'from step 0 to {config.train.steps}')
            if a.family.captions.learned:
                captions.check_learned(config.data, a.tokenizers, a.family.captions.learned)
            for line in captions.cut_off(config.data, a.tokenizers) if self.first and a.texts else ():
                log.say(line)
            began = time.monotonic()
            self.state, self.meter = self.fresh(), log.Meter()
            if config.train.initial:
                self.state = self.started_from(self.state, self.initial(self.state))
            self.seconds = time.monotonic() - began
        self.checkpoints.kept.best = self.best.step
        if self.first:
            save_config(workdir, config, a.spec)
            if 'tokens' in a.texts:
                a.tokenizers['tokens'].save(os.path.join(workdir, TOKENIZER))
            stopping.write(workdir, self.best)
        if self.evaluator:
            _ = self.evaluator.reference  # computed now, where a signal loses nothing
        self.step = int(self.state.step)
        self.pending: tuple[int, dict] | None = None  # logs of the last call, not yet looked at
        self.lines: list[tuple[int, dict]] = []  # of metrics, that the callbacks have not had yet
        self.writer = log.Writer(workdir, self.step, config.train.steps, config.data.batch) if self.first else None

    def check_layout(self, before, about: dict) -> None:
        """Says where updates are computed in other pieces than before.

        Args:
          before: the saved config.

        Raises:
          UserError: calls of several updates cannot begin at the checkpoint's step.
        """
        if about['step'] % self.k:
            raise UserError(
                f'config.train.updates_per_call = {self.k} must divide the step of the checkpoint, {about["step"]}'
            )
        changed = configs.other_layout(before, self.config)
        devices = about.get('devices', jax.device_count())
        if devices != jax.device_count():
            changed.append(f'devices: {devices} -> {jax.device_count()}')
        if changed and self.first and about['step']:
            noise = ' and draws other noise' if any('accumulate' in line for line in changed) else ''
            log.say(f'{"; ".join(changed)}: from here on the training rounds otherwise{noise}: its bits may differ')

    def look_at_data(self):
        """The training examples, and how many images there are, in words."""
        began = time.monotonic()
        examples = self.a.dataset('train')
        count = f'{len(examples):,} training'
        if time.monotonic() - began < 1:  # a folder of a million files is not listed twice for a number
            for split in ('validation', 'test'):
                with contextlib.suppress(UserError):
                    count += f', {len(data.dataset(self.config.data, split)):,} {split}'
        return examples, f'{count} images'

    def introduce(self, images: str, step: int, where: str) -> None:
        """Lines that say what is trained on what."""
        if not self.first:
            return
        c, parameters = self.config, describe.count(self.a.abstract.params)
        shape = 'x'.join(map(str, self.a.spec.features['image'].shape))
        log.say(f'{compilation.devices()}; {c.family}, {parameters:,} parameters; {c.data.source}: {images} of {shape}')
        compiling = f'; {compilation.notice(self.job)}' if step < c.train.steps else ''
        log.say(f'{self.workdir}: {where}{compiling}')

    def batches(self, start: int, prepared: PreparedSet | None):
        return data.batches(
            self.config.data, 'train', seed=self.config.seed, start=start, prepared=prepared, finish=self.a.tokenised,
            process_index=jax.process_index(), process_count=jax.process_count(),
        )  # fmt: skip

    def first_batch(self, prepared: PreparedSet | None) -> dict:
        """Batch 0 on the devices."""
        with contextlib.closing(self.batches(0, prepared)) as stream:
            return sharding.put_batch(self.a.mesh, next(stream))

    def fresh(self):
        """State before the first update, from the first batch (some families set weights by data).
        Made in place: no device ever holds the whole of a sharded one."""
        one = self.first_batch(None)
        ahead = self.compile_ahead(self.first_batch(self.prepared) if self.prepared else one)
        # XLA for CPUs takes longer to optimise a hundred random generators than to run them once as they are.
        once = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
        init = sharding.jit(self.a.init, out_shardings=self.shardings, compiler_options=once)
        try:
            return init(randomness.stream(jax.random.key(self.config.seed), 'init'), one, self.frozen)
        finally:
            ahead.join()  # a process must not end while a thread compiles

    def compile_ahead(self, one: dict) -> threading.Thread:
        """A thread that traces and compiles the first call, while the initial state is compiled and computed: XLA
        compiles, and takes programs from the cache, beside Python. The call itself then finds the program.

        one: a batch on the devices, of which the call takes `updates_per_call`.
        """
        mesh, k = self.a.mesh, self.k

        def shapes(tree, places):
            return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, places)

        def compile_call() -> None:
            stacked = {name: jax.ShapeDtypeStruct((k, *x.shape), x.dtype) for name, x in one.items()}
            places = jax.tree.map(lambda _: sharding.over_batch(mesh, leading=1), stacked)
            with contextlib.suppress(Exception):  # the call raises the same, in the main thread
                state, batches = shapes(self.a.abstract, self.shardings), shapes(stacked, places)
                self.call.trace(state, self.frozen, batches).lower().compile()

        # Several hosts compile in one order; on GPUs `sharding.jit` chooses the program at the call.
        beside = jax.process_count() == 1 and hasattr(self.call, 'trace')
        thread = threading.Thread(target=compile_call if beside else lambda: None, name='compile', daemon=True)
        thread.start()
        return thread

    def from_imported(self, published: State) -> State:
        """State before the first update that starts from published weights: those that are averaged, and the averages,
        are the published ones in float32, and so are other networks that were published; the rest and the optimisers
        start as in any run."""
        return self.started_from(self.fresh(), published)

    def initial(self, state: State) -> State:
        """The weights of `config.train.initial`, as published ones. A convolution that reads more channels than there,
        those of a mask beside x, begins with zeros for the further ones.

        Args:
          state: before the first update, of random weights.

        Raises:
          UserError: they are of another model.
        """
        path = self.config.train.initial
        there, saved = restored_alone(path, self.config.stages.to_dict(), self.a.mesh)
        if there.config.family != self.config.family:
            raise UserError(f'config.train.initial = {path} is a {there.config.family}, not a {self.config.family}')
        ema = {name: saved.ema.get(name.partition('@')[0]) for name in self.a.abstract.ema}
        here, have = (
            {jax.tree_util.keystr(keys): x.shape for keys, x in jax.tree_util.tree_leaves_with_path(tree)}
            for tree in (self.a.abstract.ema, ema)
        )
        wider = {name for name in here.keys() & have.keys() if reads_more(here[name], have[name])}
        for name in sorted(here.keys() | have.keys()):
            if here.get(name) != have.get(name) and name not in wider:
                raise UserError(
                    f'config.train.initial = {path} has other weights: {name} is {have.get(name)} there and '
                    f'{here.get(name)} here: --config={path}:full takes the model from it'
                )
        for name in sorted(wider) if self.first else ():
            log.say(f'{name} reads {here[name][-2]} channels, and {have[name][-2]} in {path}: the others begin at 0')
        if wider:
            ema = jax.tree.map(widened, state.ema, ema)
        return state.replace(params={}, ema=ema, extra=None)

    def started_from(self, state: State, published: State) -> State:
        """A state before the first update with these weights, see `from_imported`."""

        def start(state: State, published: State) -> State:
            ema = jax.tree.map(lambda new, old: new.astype(old.dtype), published.ema, state.ema)
            there = {**published.params, **published.ema}
            params = {
                name: jax.tree.map(lambda new, old: jnp.array(new, old.dtype), there.get(name, own), own)
                for name, own in state.params.items()
            }
            extra = state.extra if published.extra is None else published.extra
            return state.replace(params=params, ema=ema, extra=extra)

        return sharding.jit(start, donate_argnums=0, out_shardings=self.shardings)(state, published)

    def not_finite(self, what: str) -> RunError:
        """The error that stops the training, which names the last good checkpoint."""
        try:
            self.checkpoints.wait()  # the newest may still be on its way to the disk
        except RunError as e:
            return RunError(f'{what}; {e}')
        good = self.checkpoints.steps()
        last = f'the last good checkpoint is of step {good[-1]}' if good else 'there is no checkpoint yet'
        return RunError(f'{what}; {last}')

    def look_at_logs(self) -> None:
        """Reads the logs of the last call, stops if anything in them is not finite, writes a line if one is due."""
        if self.pending is None:
            return
        (start, logs), self.pending = self.pending, None
        logs = jax.device_get(logs)
        for i in range(self.k):
            step, values = start + i + 1, {name: float(v[i]) for name, v in logs.items()}
            bad = [f'{name} = {value}' for name, value in values.items() if not np.isfinite(value)]
            if bad:
                raise self.not_finite(f'{", ".join(bad)} at step {step}: stopped')
            self.meter.add(values)
            if step % self.config.train.log_every == 0:
                means = self.meter.take()
                if self.writer:
                    self.writer.line(step, means)
                if self.callbacks:
                    self.lines.append((step, means))
        if self.writer:
            self.writer.progress(start + self.k, values.get('loss', next(iter(values.values()))))

    def view(self) -> Run:
        """A Run of the present weights, which are gone with the next update."""
        ema = {name: average for name, average in self.state.ema.items() if '@' not in name}
        return Run(self.workdir, self.config, self.a, self.state.replace(opt=None, ema=ema), 'ema')

    def call_back(self) -> None:
        """Calls the callbacks with the lines of metrics that they have not had. Where one raises an exception, the
        state is saved, and all hosts stop."""
        lines, self.lines = self.lines, []
        for step, means in lines:
            error: BaseException | None = None
            try:
                with self.still():
                    for callback in self.callbacks:
                        callback(step, dict(means), self.view())
            except (Exception, SystemExit) as e:
                error = e
            if sharding.any_host(error is not None):
                self.save()
                self.checkpoints.wait()
                log.say(f'a callback raised an exception: stopped and saved at step {self.step}; train again to go on')
                raise error or RunError('a callback raised an exception on another host')
        if lines and self.writer:
            self.writer.pause()

    def save(self) -> None:
        """Saves the state, unless it is not finite."""
        self.look_at_logs()
        if not all_finite(self.state):
            raise self.not_finite(f'weights or optimiser state are not finite at step {self.step}: not saved')
        examples = self.step * self.config.data.batch
        about = {'examples': examples, 'meter': self.meter.state(), 'best': self.best._asdict(), **self.about}
        self.checkpoints.save(self.state, about)

    def save_and_leave(self) -> None:
        """Saves and ends the process with the exit code of an interruption."""
        self.save()
        self.checkpoints.wait()
        self.call_back()
        hosts.stop()
        interrupt.stop(f'stopped and saved at step {self.step}; the same command goes on from there')

    def still(self):
        """A block in which the state stands still while the main thread may be long in XLA: on a signal the
        watcher thread saves and leaves. Several hosts must save together, so there it waits."""
        return interrupt.on_signal(self.save_and_leave if jax.process_count() == 1 else None)

    def grid_path(self) -> str:
        """The file of the samples of this step."""
        return os.path.join(self.workdir, 'samples', f'step_{self.step:07d}.png')

    def model(self) -> BoundModel:
        """The family with its present weights."""
        return BoundModel(self.a.family, self.state, self.frozen, self.a.mesh)

    def draw(self, n: int):
        """n samples, from the same noise each time."""
        provide = conditions.provider(self.a, self.config, {})
        model = self.model()
        return sample.draw(model, provide, n, model.batch_size(self.config.sample.batch, n), 0)

    def grid(self) -> None:
        """Draws samples and writes their grid."""
        if self.a.family.sample is None:
            return
        images = list(self.draw(self.config.train.samples))
        if self.writer:
            sheet = files.grid(np.concatenate(images))
            files.save_png(self.grid_path(), sheet)
            self.writer.image(self.step, 'samples', sheet)
            self.writer.pause()

    def evaluate(self, evaluator) -> dict[str, float]:
        """Metrics of samples."""
        n = self.config.train.evaluate_samples
        metrics = evaluator.compare((evaluator.extract(piece, n) for piece in self.draw(n)), n)
        return {name: metric['value'] for name, metric in metrics.items()}

    def write(self, metrics: dict[str, float], held_out: bool, again: bool) -> None:
        """Writes the metrics of this step, unless they are there since before the training was stopped."""
        if again and sharding.any_host(bool(self.writer and self.writer.has_metrics(self.step, held_out))):
            return
        if self.callbacks:
            self.lines.append((self.step, metrics))
        if self.writer:
            self.writer.metrics(self.step, metrics)
            self.writer.pause()

    def report(self, again: bool = False) -> None:
        """The grid and the metrics of samples that are due at this step.

        again: only those that are not there, since the training was stopped while they were made.
        """
        train, end = self.config.train, self.ends

        def is_due(every: int, there: Callable[[], bool]) -> bool:  # all hosts say the same
            return (self.due(every) or end) and not (again and sharding.any_host(self.first and there()))

        if is_due(train.sample_every, lambda: os.path.exists(self.grid_path())):
            self.grid()
        counted = self.due(train.evaluate_every) and stopping.on_samples(self.config)  # by `watch`
        if (
            self.evaluator
            and not counted
            and is_due(train.evaluate_every, lambda: bool(self.writer and self.writer.has_metrics(self.step)))
        ):
            self.write(self.evaluate(self.evaluator), held_out=False, again=again)

    def watch(self, again: bool = False) -> bool:
        """Makes the evaluations that are due at this step and that the end of the training may depend on, before the
        checkpoint of the step is saved: it holds what they came to. Returns whether the step is the best so far.

        again: the training was stopped at this step, and only what is not in its checkpoint or metrics is made.
        """
        train, best = self.config.train, self.best
        if self.held_out and self.due(train.held_out_every):
            stops = train.stop_on.startswith('validation/')
            if not (again and (best.last >= self.step if stops else self.has_held_out())):
                metrics = self.held_out.evaluate(self.model())
                self.write(metrics, held_out=True, again=again)
                self.count(metrics, stops)
        on_samples = self.due(train.evaluate_every) and stopping.on_samples(self.config)
        if self.evaluator and on_samples and not (again and best.last >= self.step):
            metrics = self.evaluate(self.evaluator)
            self.write(metrics, held_out=False, again=again)
            self.count(metrics)
        return self.best.step > best.step

    def has_held_out(self) -> bool:
        """Whether held-out metrics of this step are written. All hosts say the same."""
        return sharding.any_host(bool(self.writer and self.writer.has_metrics(self.step, held_out=True)))

    def count(self, metrics: dict[str, float], stops: bool = True) -> None:
        """Counts an evaluation of the metric that the training stops on."""
        if not stops:
            return
        value = metrics.get(self.best.metric, float('nan'))
        # One host decides for all: their sums might be rounded differently.
        better = sharding.any_host(self.first and stopping.is_better(self.best, value, self.larger))
        self.best = stopping.counted(self.best, self.step, value, better)
        self.checkpoints.kept.best = self.best.step
        if self.first:
            log.say(stopping.count_line(self.best, self.step, value, self.config.train.patience))

    @property
    def stopped(self) -> bool:
        """Whether the training has ended early."""
        return 0 < self.config.train.patience <= self.best.waited

    @property
    def ends(self) -> bool:
        """Whether this step is the last one."""
        return self.step >= self.config.train.steps or self.stopped

    def due(self, every: int) -> bool:
        """Whether this step is a multiple of an interval; 0: none is."""
        return bool(every) and self.step % every == 0

    def first_call(self, call, placed: dict):
        """The results of a process's first call, once they are there: it compiles, which takes from seconds to minutes,
        and the next starts know how long."""
        began = time.monotonic()
        results = jax.block_until_ready(call(self.state, self.frozen, placed))
        seconds = self.seconds + time.monotonic() - began
        if self.first and not compilation.loaded('call'):
            compilation.measured(self.job, seconds)
            log.say(f'compiled in {seconds:.0f} s')
        return results

    def loop(self, profile: bool, closing: contextlib.ExitStack) -> None:
        """Updates up to train.steps. What `closing` holds at the end is closed by the caller."""
        train = self.config.train
        call = self.call
        stream, calls = self.batches(self.step, self.prepared), 0
        closing.enter_context(contextlib.closing(stream))

        if self.step:
            self.go_on()
        while not self.ends:
            batches = [next(stream) for _ in range(self.k)]
            stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
            placed = sharding.put_batch(self.a.mesh, stacked, leading=1)
            if profile and calls == PROFILED_CALLS[0]:
                jax.profiler.start_trace(os.path.join(self.workdir, 'profile'))
            state, logs = call(self.state, self.frozen, placed) if calls else self.first_call(call, placed)
            self.look_at_logs()  # of the call before, while this one runs
            self.state, self.pending = state, (self.step, logs)
            self.step += self.k
            calls += 1
            if calls == 1:  # until here leaving at once lost nothing; from here on there is something to save
                closing.enter_context(interrupt.on_signal(None))
            self.call_back()
            if profile and calls == PROFILED_CALLS[1]:
                jax.block_until_ready(self.state)
                jax.profiler.stop_trace()
            better = self.is_watched() and self.watch_still()
            if self.due(train.save_every) or self.ends or better:
                self.save()
            if better:
                self.write_best()
            agree = jax.process_count() == 1 or calls % CALLS_PER_AGREEMENT == 0
            if agree and sharding.any_host(interrupt.requested()):
                self.save_and_leave()
            if self.due(train.sample_every) or self.due(train.evaluate_every) or self.ends:
                self.look_at_logs()
                with self.still():
                    self.report()
            self.call_back()  # with the metrics of these evaluations
        self.look_at_logs()
        self.call_back()
        if self.stopped:
            log.say(stopping.stop_line(self.best, self.step, train.steps))
        elif calls == 0:
            log.say(f'already at step {self.step} of {train.steps}; for more: --config.train.steps=N')

    def go_on(self) -> None:
        """What a training that was stopped at this step has not done there."""
        if self.is_watched() and self.watch(again=True):
            self.write_best()
        self.report(again=True)

    def is_watched(self) -> bool:
        """Whether `watch` has something to do at this step."""
        train = self.config.train
        return self.due(train.held_out_every) or (self.due(train.evaluate_every) and stopping.on_samples(self.config))

    def watch_still(self) -> bool:
        """`watch`; the state is saved where the evaluation fails."""
        self.look_at_logs()
        try:
            with self.still():
                return self.watch()
        except Exception:
            if jax.process_count() == 1:  # others do not know of it
                self.save()
                self.checkpoints.wait()
            raise

    def write_best(self) -> None:
        """Says in best.json that this step is the best, once its checkpoint is there."""
        self.checkpoints.wait()
        if self.first:
            stopping.write(self.workdir, self.best)

    def close(self) -> None:
        if self.writer:
            self.writer.close()


def train(config, workdir: str, profile: bool = False, callbacks: Sequence[Callback] = ()) -> Run:
    """Trains the run in `workdir` to config.train.steps, from its newest checkpoint if there is one; the trained Run.

    Raises:
      UserError: the config does not fit itself, the devices or the checkpoint.
      RunError: not a number, a full disk, no readable checkpoint.
      Exception: a callback's, after the state was saved.
    """
    workdir = os.path.expanduser(workdir)
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            stack.enter_context(only_one(workdir))
        try:
            training = Training(config, workdir, callbacks)
            stack.callback(training.close)
            training.loop(profile, stack)
            training.checkpoints.close()
            if training.first and 'imported' not in training.about:
                say_if_initial(workdir, config, training.step, training.a.family.statistics)
        except OSError as e:
            raise stopped(workdir, e) from e
        except BaseException:
            if jax.process_count() == 1:  # the program may go on
                with contextlib.suppress(Exception):
                    training.checkpoints.close()
            raise
        log.say(f'trained to step {training.step}: {workdir}')
        return training.view()


sys.modules[__name__].__class__ = jaxgen.CallableModule  # jaxgen.train(config, workdir): library.train
