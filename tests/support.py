"""Helpers of several test files."""

from __future__ import annotations

import functools
import glob
import importlib
import json
import os
import signal
import subprocess
import sys
import types
import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen import assembly, directory
from jaxgen import config as configs
from jaxgen.config import DEFAULTS
from jaxgen.contract import Array, Context
from jaxgen.data import builders
from jaxgen.main import run_main
from jaxgen.optim import Optim, make_optim

# A tenth of each drawn set is enough for tests, and drawing a whole one takes 25 s.
builders.SHAPES, builders.POINTS = {'train': 1000, 'test': 200}, {'train': 1000, 'test': 200}

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONFIGS = sorted(glob.glob(os.path.join(ROOT, 'configs', '*.py')))
NAMES = [configs.name(path) for path in CONFIGS]


def path(name: str, variant: str = 'tiny') -> str:
    """FILE:VARIANT of a config by its name."""
    return os.path.join(ROOT, 'configs', f'{name}.py') + (f':{variant}' if variant else '')


def tiny(name: str, **sections):
    """The tiny config of a name, with these fields changed."""
    return configs.make(**configs.deep_update(configs.load(path(name)).to_dict(), sections))


def config_of(name: str, fields: list[str]):
    """The config of a name or FILE:VARIANT with fields as the command takes them, 'model.blocks=1'."""
    return configs.override(configs.load(name), [f'--config.{field}' for field in fields])


def first_batch(config) -> dict:
    """The first training batch of a config, as families get it."""
    from jaxgen import data, sample

    batch = with_tokens(config, next(iter(data.batches(config.data, 'train', seed=0))))
    return sample.to_inside({k: jnp.asarray(v) for k, v in batch.items()})


def with_tokens(config, batch: dict) -> dict:
    """A batch with tokens in place of captions where the config's family reads them, by tokenizers made for it."""
    if 'caption' not in batch:
        return batch
    stage = functools.partial(shaped_stage, config.data.size)
    return with_tokenizers(assembly.assemble(config, stage=stage)).tokenised(batch)


def with_tokenizers(assembled):
    """The same with tokenizers that are trained on its captions, also those of stages."""
    from jaxgen.text import captions

    section = assembled.config.data
    made = {name: captions.trained(section, texts) for name, texts in assembled.texts.items()}
    assembled.__dict__['tokenizers'] = made  # where functools keeps them
    return assembled


def tiny_stage(folder: str):
    """The tiny config of the stage that a config names as the run in `folder`."""
    return configs.load(configs.named(folder).partition(':')[0] + ':tiny')


def train_stages(config, folder) -> None:
    """Trains the stages that a config stands on, and theirs before them, by their tiny configs."""
    from jaxgen.train import train

    for stage, name in config.stages.items():
        of_stage, config.stages[stage] = tiny_stage(name), str(folder / os.path.basename(name))
        train_stages(of_stage, folder)
        train(of_stage, config.stages[stage])


def shaped_stage(size, folder: str, mesh, dtype: str = ''):
    """That stage for images of `size`, as shapes."""
    config = configs.make(**configs.deep_update(tiny_stage(folder).to_dict(), {'data': {'size': size}}))
    a = assembly.assemble(config, mesh, functools.partial(shaped_stage, size))
    return a.family, a.abstract.replace(params=None, opt=None), a.frozen


def fresh_stage(folder: str, mesh, dtype: str = ''):
    """A stage of random weights by the tiny config of its name, where none is trained; see assembly.assemble."""

    config = tiny_stage(folder)
    config.train.dtype = dtype or config.train.dtype
    a = assembly.assemble(config, mesh, fresh_stage)
    state = jax.jit(a.family.init)(jax.random.key(7), first_batch(config), a.frozen)
    return a.family, state.replace(params=None, opt=None), a.frozen


def assemble(config, mesh=None):
    """assembly.assemble with stages of random weights."""

    return with_tokenizers(assembly.assemble(config, mesh, fresh_stage))


def context(image=(8, 8, 1), classes: int = 0, **changes) -> Context:
    """What `build` gets where config.optim has its defaults and 10 updates are made."""
    return Context(image, classes, make_optim(10, **DEFAULTS['optim']))._replace(**changes)


def sgd(rate: float = 0.1, accumulate: int = 1, newest: float = 1.0) -> Optim:
    """Gradient descent for every network; `newest` is the weight of the newest weights in their moving average."""
    return optimiser(optax.sgd(rate), accumulate, newest)


def optimiser(tx: optax.GradientTransformation, accumulate: int = 1, newest: float = 1.0) -> Optim:
    """The same with another transformation in place of gradient descent."""
    return Optim(lambda name, times=1: tx, accumulate, lambda step: newest)


def quantised_images(n: int, size: int = 8, seed: int = 1) -> Array:
    """Images [n, size, size, 1] whose pixels are quantised to 256 levels, in [-1, 1]."""
    levels = np.random.default_rng(seed).integers(0, 256, (n, size, size, 1))
    return jnp.asarray(levels / 127.5 - 1, jnp.float32)


STUCK = 'Termination timeout for'  # of XLA, where virtual devices wait for each other


def run(
    command: Sequence[str], env: dict | None = None, timeout: float = 240, **options
) -> subprocess.CompletedProcess:
    """Runs a command in the project's folder, with what it prints as text.

    Virtual devices are threads, which on a busy machine can wait for each other in two collectives at once; XLA ends
    such a process after 40 s, and it is run again.

    Args:
      env: what differs in the environment.
    """
    env = {**os.environ, **(env or {})}
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=env)
        if done.returncode != -signal.SIGABRT or STUCK not in (done.stderr or ''):
            break
    return done


def main(*args: str, env: dict | None = None, timeout: float = 240) -> subprocess.CompletedProcess:
    """Runs the command in a process of its own, as its user would."""
    return run([sys.executable, '-W', 'error', '-m', 'jaxgen.main', *args], env, timeout)


def devices(n: int) -> dict[str, str]:
    """Environment of a process that sees n devices.

    XLA has as many threads as devices and a collective blocks one, so that several at a time, entered by the devices in
    different orders, can stop all of them for ever. NPROC is XLA's number of threads; one program is run at a time.
    """
    flags = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={n}'
    return {'XLA_FLAGS': flags, 'NPROC': str(8 * n), 'JAX_CPU_ENABLE_ASYNC_DISPATCH': 'false'}


def python_on(n: int, code: str, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess:
    """Runs Python code in a process that sees n devices."""
    return run([sys.executable, '-c', code, *arguments], devices(n), timeout)


def metrics(workdir) -> list[dict]:
    """Lines of metrics.jsonl without what depends on the clock."""
    from jaxgen.log import CLOCK

    with open(os.path.join(workdir, 'metrics.jsonl'), encoding='utf-8') as file:
        return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in file]


def assert_same(a, b) -> None:
    """Two trees are equal bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (keys, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(keys))


def random_weights(tree, seed: int = 0, scale: float = 0.5):
    """Normals of this standard deviation for the float32 among arrays or their shapes, zeros for the others."""
    rng = np.random.default_rng(seed)

    def one(a):
        values = scale * rng.normal(size=a.shape) if a.dtype == np.float32 else np.zeros(a.shape)
        return jnp.asarray(values, a.dtype)

    return jax.tree.map(one, tree)


def saved_state(workdir, step: int | None = None):
    """The whole State of a run's newest checkpoint."""
    from jaxgen import checkpoint

    assembled = assembly.assemble(directory.saved_config(str(workdir)))
    checkpoints = checkpoint.Checkpoints(str(workdir))
    state, _ = checkpoints.restore(assembled.abstract, assembled.mesh)
    checkpoints.close()
    assert step is None or int(state.step) == step
    return state


def mistake(capfd, *args: str) -> str:
    """The one line that a mistake gets; lines on what is loaded may stand before it."""
    code = run_main(['jaxgen', *args])
    out, err = capfd.readouterr()
    assert code == 2, (code, err)
    *before, line = err.splitlines()
    assert line.startswith('jaxgen: error: ') and all(one.startswith('jaxgen: 1 x cpu, ') for one in before), err
    assert not out
    return line + '\n'


def torch_fidelity():
    """The torch_fidelity package; skips the test where it or torch is missing.

    Its import asks for torchvision, for data sets and networks that no test needs. Where torchvision
    cannot be imported, empty modules stand in for it until that import is done.
    """
    pytest.importorskip('torch')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            importlib.import_module('torchvision')
            stand_ins = {}
        except Exception:  # a torchvision for another torch fails in many ways
            names = ('', '.datasets', '.transforms', '.transforms.functional')
            stand_ins = {f'torchvision{name}': types.ModuleType(f'torchvision{name}') for name in names}
            for name, module in stand_ins.items():
                parent, _, child = name.rpartition('.')
                if parent:
                    setattr(stand_ins[parent], child, module)
            for name in ('CIFAR10', 'CIFAR100', 'STL10'):  # inherited from at import
                setattr(stand_ins['torchvision.datasets'], name, object)
        before = {name: sys.modules[name] for name in stand_ins if name in sys.modules}
        sys.modules.update(stand_ins)
        try:
            return pytest.importorskip('torch_fidelity')
        finally:
            for name in stand_ins:
                del sys.modules[name]
            sys.modules.update(before)


def from_source(table, shapes, state: dict, network: str = 'denoiser', **fields) -> dict:
    """Weights of a torch module as ours, by a table of jaxgen/weights, which users' files are read with.

    Args:
      table: (config, shapes) -> Table, like weights.diffusers.unet.
      shapes: tree of our weights' shapes.
      state: the module's state dict.
      network: name of our network.
      fields: of config.model and config.model.network that the table reads.
    """
    from flax.traverse_util import flatten_dict, unflatten_dict

    from jaxgen.weights import mapping
    from jaxgen.weights.files import Tensor

    model = types.SimpleNamespace(network=types.SimpleNamespace(**fields), **fields)
    flat = {f'{network}/{path}': leaf.shape for path, leaf in flatten_dict(shapes, sep='/').items()}
    arrays = {name: tensor.detach().numpy() for name, tensor in state.items()}
    tensors = {name: Tensor(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()}
    entries = mapping.entries(table(types.SimpleNamespace(model=model), flat), flat)
    return unflatten_dict({e.path.removeprefix(f'{network}/'): e.read(tensors) for e in entries}, sep='/')
