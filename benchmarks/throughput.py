"""Throughput of training, sampling or data loading for any config, as JSON on stdout.

    python benchmarks/throughput.py --config=configs/ddpm_digits.py --what=train
    python benchmarks/throughput.py --config=configs/ddpm_cifar10.py --what=train --batch=8 --vs=torch
    python benchmarks/throughput.py --config=configs/dit_imagenet256.py --batch=64 --config.train.remat=False
    python benchmarks/throughput.py --config=configs/ddpm_digits.py --vs=torch --cores=1      # ratios by processor time

Stages that a config stands on need no run: speed does not depend on what they learned.
`--vs=torch` builds the same U-Net with diffusers on torch, or the same DiT, checks that it has as many
parameters, and runs both in turns, so that a drift of the machine's speed changes both; the ratio is
jaxgen's speed over torch's, the median over the turns. With `--cores=1` the process keeps to one core and
time is that of the processor, which other processes change little; on more, threads that wait for
others are counted too, so time is by the clock. For training a turn is one update (Adam and
moving average on both sides); for sampling one network evaluation of ancestral sampling. On a GPU torch
has TensorFloat-32 as JAX has it, cuDNN's search for the fastest convolution, and autocast where
`--dtype=bfloat16`; both take turns on one device (set XLA_PYTHON_CLIENT_PREALLOCATE=false, or there is no
memory left for torch).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxgen
from jaxgen import assembly, conditions, data, files, sample, sharding
from jaxgen import config as configs
from jaxgen.evaluation.bound import BoundModel
from jaxgen.train import make_call


def untrained_stage(path: str, mesh, dtype: str = ''):
    """assembly.restored_stage without a run: first weights, which are as fast as trained ones."""
    file = configs.named(path)
    if not file:
        sys.exit(f'no config is of the name of the stage {path}')
    a = assembly.assemble(configs.load(file), mesh, untrained_stage)
    batch = {k: np.zeros((a.config.data.batch, *v.shape), v.dtype) for k, v in a.spec.features.items()}
    state = jax.jit(lambda *args: assembly.init_state(a.family, *args))(jax.random.key(0), batch, a.frozen)
    return a.family, state.replace(params=None, opt=None), a.frozen


def timed(action, clock=time.perf_counter) -> float:
    began = clock()
    action()
    return clock() - began


def jax_train(assembled):
    """An action that makes one update and waits for it."""
    config = assembled.config
    shardings = sharding.over_weights(assembled.mesh, assembled.abstract)
    shape, rng = assembled.spec.features, np.random.default_rng(0)
    one = {
        k: rng.integers(0, 256 if v.shape else max(assembled.spec.classes, 1), (config.data.batch, *v.shape)).astype(
            v.dtype
        )
        for k, v in shape.items()
    }
    batch = sharding.put_batch(assembled.mesh, one)
    init = jax.jit(
        lambda key, b: assembly.init_state(assembled.family, key, b, assembled.frozen), out_shardings=shardings
    )
    holder = [init(jax.random.key(0), batch)]
    call = make_call(assembled, shardings, 1, 0)
    stacked = jax.tree.map(lambda x: x[None], batch)

    def action():
        holder[0], _ = call(holder[0], assembled.frozen, stacked)
        jax.block_until_ready(holder[0])

    return action, holder[0]


def jax_sample(assembled, state):
    """An action that draws one batch and waits for it."""
    config = assembled.config
    n = config.sample.batch
    batch = conditions.first(assembled, config, n, {})
    model = BoundModel(assembled.family, state, assembled.frozen, assembled.mesh)
    return lambda: list(sample.draw(model, lambda _: batch, n, n, 0))


def torch_network(config, image):
    """diffusers' U-Net with the settings of a ddpm config, or a DiT: a module of (x, t) to a map."""
    import diffusers

    if config.model.network.name == 'dit':
        from accelerator import torch_dit

        net, learned = config.model.network, config.model.training.variance == 'learned'
        return torch_dit(net.channels, net.blocks, net.heads, image[2] * (1 + learned), image[0], image[2])
    model, levels = config.model.network, len(config.model.network.multipliers)
    here = [image[0] // 2**i in model.attention for i in range(levels)]
    return diffusers.UNet2DModel(
        sample_size=image[0],
        in_channels=image[2],
        out_channels=image[2],
        block_out_channels=[model.channels * m for m in model.multipliers],
        layers_per_block=model.blocks,
        down_block_types=['AttnDownBlock2D' if a else 'DownBlock2D' for a in here],
        up_block_types=['AttnUpBlock2D' if a else 'UpBlock2D' for a in reversed(here)],
        norm_num_groups=min(32, model.channels // 4),
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        attention_head_dim=None,
        dropout=model.dropout,
    )


def torch_actions(config, image, what: str):
    """The same work by torch: an update, or one network evaluation."""
    import torch

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    torch.set_default_device('cuda' if jax.default_backend() == 'gpu' else 'cpu')
    net = torch_network(config, image)
    half = torch.autocast(torch.get_default_device().type, torch.bfloat16, config.train.dtype == 'bfloat16')
    n = config.data.batch if what == 'train' else config.sample.batch
    x = torch.randn(n, image[2], image[0], image[1])
    averaged = [p.detach().clone() for p in net.parameters()]
    optimiser = torch.optim.Adam(net.parameters(), lr=config.optim.lr)
    steps = torch.linspace(1e-4, 0.02, 1000).neg().add(1).cumprod(0)

    def output(x, t):
        with half:
            out = net(x, t)
        return (out if isinstance(out, torch.Tensor) else out.sample).float()

    def update():
        t = torch.randint(0, 1000, (n,))
        noise, a = torch.randn_like(x), steps[t].view(-1, 1, 1, 1)
        estimate = output(a.sqrt() * x + (1 - a).sqrt() * noise, t)
        loss = torch.nn.functional.mse_loss(estimate[:, : image[2]], noise)
        optimiser.zero_grad()
        loss.backward()
        if config.optim.clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), config.optim.clip)
        optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, list(net.parameters()), 1 - config.optim.ema)
        loss.item()  # waits for the device

    @torch.no_grad()
    def evaluate():
        net.eval()
        output(x, torch.full((n,), 500)).sum().item()

    return (update if what == 'train' else evaluate), sum(p.numel() for p in net.parameters())


def measure_data(config, seconds: float) -> dict:
    """Images per second out of the loader, alone."""
    stream = iter(data.batches(config.data, 'train', seed=0))
    next(stream)
    began, n = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        n += len(next(stream)['image'])
    return {'images_per_second': n / (time.perf_counter() - began)}


def evaluations(model: dict) -> int:
    """Network evaluations of a sample by config.model, of samplers with one a step."""
    sampler, process = (s if isinstance(s, dict) else {} for s in map(model.get, ('sampler', 'process')))
    return sampler.get('steps') or process.get('timesteps') or model.get('sample_steps') or 1


def measure(config, what: str, turns: int, vs: str, clock=time.perf_counter) -> dict:
    assembled = assembly.assemble(config, stage=untrained_stage)
    action, state = jax_train(assembled)
    images, calls = config.data.batch, 1
    if what == 'sample':
        action, images = jax_sample(assembled, state), config.sample.batch
        calls = evaluations(config.model.to_dict())
    actions = {'jaxgen': (action, calls)}
    result = {}
    if vs:
        other, count = torch_actions(config, assembled.spec.features['image'].shape, what)
        own = sum(x.size for x in jax.tree.leaves(assembled.abstract.params))
        if own != count:
            sys.exit(f'not the same network: {own} and {count} parameters')
        result['parameters'] = own
        actions['torch'] = (other, 1)
    for warm, _ in actions.values():
        warm()
        warm()
    seconds = {name: [] for name in actions}
    for _ in range(turns):
        for name, (act, c) in actions.items():
            seconds[name].append(timed(act, clock) / c)
    unit = 'update' if what == 'train' else 'network evaluation'
    for name, times in seconds.items():
        middle = statistics.median(times)
        result[name] = {
            f'seconds_per_{unit.replace(" ", "_")}': {'min': min(times), 'median': middle, 'max': max(times)},
            'images_per_second': images / (middle * (calls if what == 'sample' else 1)),
        }
    if vs:
        ratios = [t / j for j, t in zip(seconds['jaxgen'], seconds['torch'], strict=True)]
        result['speed_over_torch'] = {
            'min': min(ratios),
            'median': statistics.median(ratios),
            'max': max(ratios),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', required=True)
    parser.add_argument('--what', choices=('train', 'sample', 'data'), default='train')
    parser.add_argument('--vs', choices=('', 'torch'), default='')
    parser.add_argument('--batch', type=int, default=0, help='in place of the config')
    parser.add_argument('--turns', type=int, default=10)
    parser.add_argument('--cores', type=int, default=0, choices=(0, 1), help='1: one core, by processor time')
    parser.add_argument('--dtype', choices=('', 'float32', 'bfloat16'), default='')
    parser.add_argument('--out', default='', help='write the JSON here too')
    arguments, rest = parser.parse_known_args()
    overrides = [text for text in rest if text.startswith('--config.')]
    if rest != overrides:
        parser.error(f'unknown arguments: {" ".join(text for text in rest if text not in overrides)}')
    if arguments.cores:  # before the threads of either framework are
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    config = configs.override(configs.load(arguments.config), overrides)
    if arguments.vs and (config.family != 'diffusion' or arguments.what == 'data'):
        sys.exit('--vs=torch is for training and sampling of U-Nets of ddpm and of DiT')
    if arguments.batch:
        config.data.batch = config.sample.batch = arguments.batch
    if arguments.dtype:
        config.train.dtype = arguments.dtype
    if arguments.what == 'data':
        result = measure_data(config, 10)
    else:
        clock = time.process_time if arguments.cores else time.perf_counter
        result = measure(config, arguments.what, arguments.turns, arguments.vs, clock)
    packages = ('jax', 'flax', 'numpy', *(('torch', 'diffusers') if arguments.vs else ()))
    record = {
        'command': ' '.join(['python', *sys.argv]),
        'what': arguments.what,
        'config': configs.name(arguments.config),
        'batch': config.data.batch,
        'dtype': jnp.dtype(config.train.dtype).name,
        'clock': 'processor' if arguments.cores else 'wall',
        **result,
        'peak_bytes': (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use'),
        'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
        'cores': len(os.sched_getaffinity(0)),
        'machine': platform.machine(),
        'versions': {'jaxgen': jaxgen.__version__, 'python': platform.python_version()}
        | {p: importlib.metadata.version(p) for p in packages},
    }
    print(json.dumps(record, indent=2))
    if arguments.out:
        files.save_json(arguments.out, record)


if __name__ == '__main__':
    main()
