"""Training steps and network evaluations on one accelerator, with the same networks in torch beside them, as JSON.

    benchmarks/accelerator.sh                    on one card, 10 minutes at most
    benchmarks/accelerator.sh --only=dit_xl2     some networks
    benchmarks/accelerator.sh --tiny             the same at tiny sizes, on any machine, to see that it runs

A training step is a forward and a backward pass of the mean square error of noise, Adam, and the weights' moving
average; an evaluation is what a sampler calls at each of its steps. Weights are float32, computation is bfloat16.
jaxgen is measured with deterministic kernels and without, and without flash attention; torch with torch.compile,
channels last, its scaled_dot_product_attention and fused Adam, cuDNN's search for the fastest convolution, and
TensorFloat-32 where anything is float32. A network of torch has as many weights, or it is an error. StyleGAN2 is the
family's whole update and its samples, and has no twin in torch here.

Each network is measured in a process of its own for each framework, so that neither finds the other's memory taken. A
row is written as soon as it is measured, with the device and the versions; rows of the same device and versions that
are in the file already are not measured again, so it can be stopped and started at any time. `fraction_of_peak` is by
the products and convolutions of the network as written, and the figures of jaxgen/chips.py; null for other devices.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Fields of the network, then the batch of a training step and of an evaluation, height and width, and channels of x.
NETWORKS = {
    'ddpm_cifar10': ('unet', dict(channels=128, group_size=0), 128, 256, 32, 3),
    'dit_b2': ('dit', dict(channels=768, blocks=12, heads=12, out_channels=8), 128, 128, 32, 4),
    'dit_xl2': ('dit', dict(channels=1152, blocks=28, heads=16, out_channels=8), 32, 64, 32, 4),
    'adm_imagenet64': ('adm', dict(out_channels=6, group_size=0), 16, 32, 64, 3),
    'sd_unet': ('latent_unet', dict(out_channels=4), 8, 16, 64, 4),
    'stylegan2_ffhq256': ('stylegan2', {}, 16, 32, 256, 3),
}
TINY = {
    'ddpm_cifar10': ('unet', dict(channels=32, multipliers=(1, 2), blocks=1, attention=(8,)), 2, 2, 16, 3),
    'dit_b2': ('dit', dict(channels=32, blocks=2, heads=4, out_channels=8), 2, 2, 8, 4),
    'dit_xl2': ('dit', dict(channels=48, blocks=2, heads=4, out_channels=8), 2, 2, 8, 4),
    'adm_imagenet64': (
        'adm', dict(channels=32, multipliers=(1.0, 2.0), blocks=1, attention=(8,), head_channels=16, out_channels=6,
                    group_size=0), 2, 2, 16, 3,
    ),
    'sd_unet': (
        'latent_unet', dict(channels=32, multipliers=(1.0, 2.0), blocks=1, depths=(1, 0), heads=4, out_channels=4),
        2, 2, 16, 4,
    ),
    'stylegan2_ffhq256': ('stylegan2', {}, 4, 4, 0, 3),
}  # fmt: skip
TEXT = (77, 768)  # tokens of a text, and their features, for the network of Stable Diffusion
# (deterministic, attention) of jaxgen; '' is what attention.py chooses.
VARIANTS = ((True, ''), (False, ''), (False, 'plain'))
TURNS, WARM = 5, 2


def flax_network(kind: str, fields: dict, dtype):
    from jaxgen.networks.adm import ADMUNet
    from jaxgen.networks.dit import DiT
    from jaxgen.networks.latent_unet import LatentUNet
    from jaxgen.networks.unet import UNet

    return {'unet': UNet, 'dit': DiT, 'adm': ADMUNet, 'latent_unet': LatentUNet}[kind](**fields, dtype=dtype)


def timed(action, calls: int) -> list[float]:
    """Seconds of a call, of each turn."""
    for _ in range(WARM):
        action(1)
    seconds = []
    for _ in range(TURNS if calls > 1 else 1):
        began = time.perf_counter()
        action(calls)
        seconds.append((time.perf_counter() - began) / calls)
    return seconds


@contextlib.contextmanager
def attention_by(name: str):
    """A context in which programs are traced with this implementation of attention."""
    before = os.environ.get('JAXGEN_ATTENTION')
    os.environ['JAXGEN_ATTENTION'] = name
    try:
        yield
    finally:
        os.environ.pop('JAXGEN_ATTENTION') if before is None else os.environ.update(JAXGEN_ATTENTION=before)


def emit(what: str, images: int, seconds: list[float], flops: float, peak: float | None, **rest) -> None:
    """Prints a row's measurements as a line of JSON."""
    middle = statistics.median(seconds)
    row = {'what': what, 'batch': images, 'seconds': {'min': min(seconds), 'median': middle, 'max': max(seconds)}}
    row |= {'images_per_second': images / middle, 'flops': flops}
    row |= {'fraction_of_peak': flops / middle / peak if peak and flops else None}
    print(json.dumps(row | rest), flush=True)


def peak_of(kind: str) -> float | None:
    """Published operations a second in bfloat16 of a device's kind, such as 'NVIDIA H100 80GB HBM3'."""
    from jaxgen.chips import CHIPS

    words = kind.lower().replace('tpu v5 lite', 'v5e').replace('tpu v6 lite', 'v6e')
    return next((chip.peak for name, chip in CHIPS.items() if name in words), None)


def jaxgen_rows(name: str, tiny: bool, done: set[tuple]) -> None:
    import jax
    import jax.numpy as jnp
    import optax

    from jaxgen import describe, sharding

    kind, fields, batch, sampled, size, channels = (TINY if tiny else NETWORKS)[name]
    peak = peak_of(jax.devices()[0].device_kind)
    if kind == 'stylegan2':
        return stylegan2_rows(tiny, batch, sampled, size, peak, done)
    net = flax_network(kind, fields, jnp.bfloat16)

    def inputs(n: int) -> tuple[jax.Array, jax.Array, dict]:
        x = jax.random.normal(jax.random.key(0), (n, size, size, channels))
        more = {}
        if kind == 'latent_unet':
            more['tokens'] = jax.random.normal(jax.random.key(1), (n, *TEXT))
        return x, jnp.full(n, 500.0), more

    x, t, more = inputs(batch)
    params = jax.jit(lambda key, x, t, more: net.init(key, x, t, **more, train=False))(jax.random.key(0), x, t, more)
    tx = optax.adam(1e-4)

    def step(state, x, t, more):
        params, opt, ema = state

        def loss(params):
            out = net.apply(params, x, t, **more, train=True, rngs={'dropout': jax.random.key(0)})
            return jnp.square(out[..., :channels] - x).mean()

        updates, opt = tx.update(jax.grad(loss)(params), opt)
        params = optax.apply_updates(params, updates)
        return params, opt, jax.tree.map(lambda e, p: e + 1e-4 * (p - e), ema, params)

    def evaluate(params, x, t, more):
        return net.apply(params, x, t, **more, train=False)

    state = params, tx.init(params), jax.tree.map(jnp.copy, params)
    with attention_by('plain'):  # a kernel's products are not in a jaxpr
        flops = {
            'train': describe.flops(jax.make_jaxpr(step)(state, x, t, more).jaxpr),
            'evaluate': describe.flops(jax.make_jaxpr(evaluate)(params, *inputs(sampled)).jaxpr),
        }
    count = describe.count(params)
    for what in ('train', 'evaluate'):
        for deterministic, attention in VARIANTS:
            if ('jaxgen', what, deterministic, attention) in done:
                continue
            holder = [jax.tree.map(jnp.copy, state)]
            arrays = inputs(batch if what == 'train' else sampled)
            with attention_by(attention):
                if what == 'train':
                    program = sharding.jit(lambda *a: step(*a), deterministic, donate_argnums=0)
                else:
                    program = sharding.jit(lambda *a: evaluate(*a), deterministic)

                def action(calls: int, program=program, holder=holder, arrays=arrays, what=what):
                    for _ in range(calls):
                        if what == 'train':
                            holder[0] = program(holder[0], *arrays)
                        else:
                            out = program(params, *arrays)
                    jax.block_until_ready(holder[0] if what == 'train' else out)

                seconds = timed(action, 1 if tiny else 10)
            emit(
                what, len(arrays[0]), seconds, flops[what], peak, framework='jaxgen', deterministic=deterministic,
                attention=attention, parameters=count,
            )  # fmt: skip
            del holder, action
    return None


def stylegan2_rows(tiny: bool, batch: int, sampled: int, size: int, peak: float | None, done: set[tuple]) -> None:
    """The whole update of the family, as it is trained, and batches of samples."""
    import jax
    from throughput import jax_sample, jax_train

    from jaxgen import assembly, describe
    from jaxgen import config as configs

    path = os.path.join(ROOT, 'configs', f'stylegan2_ffhq256.py{":tiny" if tiny else ""}')
    for deterministic in (True, False):
        if all(('jaxgen', what, deterministic, '') in done for what in ('train', 'evaluate')):
            continue
        config = configs.load(path)
        config.data.source = 'shapes'
        config.data.size = size or config.data.size
        config.data.batch, config.sample.batch = batch, sampled
        config.train.dtype, config.train.deterministic = 'bfloat16', deterministic
        assembled = assembly.assemble(config)
        train, state = jax_train(assembled)
        state = jax.tree.map(jax.numpy.copy, state)  # an update's own is donated
        draw = jax_sample(assembled, state)
        count = sum(describe.count(weights) for weights in assembled.abstract.params.values())
        # The penalties are in some of the updates, so that the FLOPs of one differ: they are not counted.
        for what, n, action, calls in (('train', batch, train, 16), ('evaluate', sampled, draw, 4)):
            seconds = timed(functools.partial(repeat, action), 1 if tiny else calls)
            emit(
                what, n, seconds, 0, peak, framework='jaxgen', deterministic=deterministic, attention='',
                parameters=count,
            )  # fmt: skip


def repeat(action, calls: int) -> None:
    for _ in range(calls):
        action()


def torch_dit(channels: int, blocks: int, heads: int, out_channels: int, size: int, in_channels: int):
    """DiT with patches of 2 x 2, conditioned on time alone."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.modulation, self.qkv = nn.Linear(channels, 6 * channels), nn.Linear(channels, 3 * channels)
            self.out = nn.Linear(channels, channels)
            self.mlp1, self.mlp2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

        def forward(self, x, condition):
            shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
            h = F.layer_norm(x, (channels,), eps=1e-6) * (1 + scale1) + shift1
            q, k, v = self.qkv(h).unflatten(-1, (3, heads, channels // heads)).permute(2, 0, 3, 1, 4)
            h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + gate1 * self.out(h)
            h = F.layer_norm(x, (channels,), eps=1e-6) * (1 + scale2) + shift2
            return x + gate2 * self.mlp2(F.gelu(self.mlp1(h), approximate='tanh'))

    class DiT(nn.Module):
        def __init__(self):
            super().__init__()
            self.time = nn.Sequential(nn.Linear(256, channels), nn.SiLU(), nn.Linear(channels, channels), nn.SiLU())
            self.first = nn.Conv2d(in_channels, channels, 2, 2)
            self.register_buffer('positions', torch.randn(1, (size // 2) ** 2, channels))
            self.blocks = nn.ModuleList(Block() for _ in range(blocks))
            self.modulation = nn.Linear(channels, 2 * channels)
            self.last = nn.Linear(channels, 4 * out_channels)

        def forward(self, x, t):
            angles = t[:, None] * torch.exp(-9.21 / 128 * torch.arange(128, device=t.device))
            condition = self.time(torch.cat([angles.cos(), angles.sin()], 1))
            h = self.first(x).flatten(2).transpose(1, 2) + self.positions
            for block in self.blocks:
                h = block(h, condition)
            shift, scale = self.modulation(condition)[:, None].chunk(2, -1)
            h = self.last(F.layer_norm(h, (channels,), eps=1e-6) * (1 + scale) + shift)
            h = h.transpose(1, 2).unflatten(2, (size // 2, size // 2))
            return F.pixel_shuffle(h, 2)

    return DiT()


def torch_network(kind: str, fields: dict, size: int, channels: int):
    """The same network: a module of (x, t[, texts]) to a map."""
    import diffusers

    if kind == 'dit':
        return torch_dit(**fields, size=size, in_channels=channels)
    width, many = fields.get('channels', {'unet': 128, 'adm': 192, 'latent_unet': 320}[kind]), fields.get('multipliers')
    many = many or {'unet': (1, 2, 2, 2), 'adm': (1, 2, 3, 4), 'latent_unet': (1, 2, 4, 4)}[kind]
    blocks = fields.get('blocks', 3 if kind == 'adm' else 2)
    common = dict(
        sample_size=size, in_channels=channels, out_channels=fields.get('out_channels', channels),
        block_out_channels=[int(width * m) for m in many], layers_per_block=blocks,
        norm_num_groups=min(32, width // 4) if kind == 'unet' and 'group_size' not in fields else 32,
    )  # fmt: skip
    here = [size // 2**i in fields.get('attention', (16,) if kind == 'unet' else (32, 16, 8)) for i in range(len(many))]
    if kind == 'unet':
        down = ['AttnDownBlock2D' if a else 'DownBlock2D' for a in here]
        up = ['AttnUpBlock2D' if a else 'UpBlock2D' for a in reversed(here)]
        return diffusers.UNet2DModel(
            **common, down_block_types=down, up_block_types=up, norm_eps=1e-6, downsample_padding=0,
            flip_sin_to_cos=False, freq_shift=1, attention_head_dim=None,
        )  # fmt: skip
    if kind == 'adm':
        down = ['AttnDownBlock2D' if a else 'ResnetDownsampleBlock2D' for a in here]
        up = ['AttnUpBlock2D' if a else 'ResnetUpsampleBlock2D' for a in reversed(here)]
        return diffusers.UNet2DModel(
            **common, down_block_types=down, up_block_types=up, attention_head_dim=fields.get('head_channels', 64),
            resnet_time_scale_shift='scale_shift', attn_norm_num_groups=32, downsample_type='resnet',
            upsample_type='resnet',
        )  # fmt: skip
    deep = fields.get('depths', (1, 1, 1, 0))
    return diffusers.UNet2DConditionModel(
        **common,
        down_block_types=['CrossAttnDownBlock2D' if d else 'DownBlock2D' for d in deep],
        up_block_types=['CrossAttnUpBlock2D' if d else 'UpBlock2D' for d in reversed(deep)],
        cross_attention_dim=TEXT[1], attention_head_dim=fields.get('heads', 8),
    )  # fmt: skip


def torch_rows(name: str, tiny: bool, done: set[tuple], flops: dict[str, float]) -> None:
    import torch

    kind, fields, batch, sampled, size, channels = (TINY if tiny else NETWORKS)[name]
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    peak = peak_of(torch.cuda.get_device_name()) if device == 'cuda' else None
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    net = torch_network(kind, fields, size, channels).to(device, memory_format=torch.channels_last)
    count = sum(p.numel() for p in net.parameters())
    compiled = torch.compile(net) if device == 'cuda' else net
    half = torch.autocast(device, torch.bfloat16, device == 'cuda')  # very slow on CPUs
    weights = list(net.parameters())
    averaged = [p.detach().clone() for p in weights]
    optimiser = torch.optim.Adam(weights, lr=1e-4, **({'fused': True} if device == 'cuda' else {}))

    def inputs(n: int) -> list:
        x = torch.randn(n, channels, size, size, device=device).to(memory_format=torch.channels_last)
        texts = [torch.randn(n, *TEXT, device=device)] if kind == 'latent_unet' else []
        return [x, torch.full((n,), 500.0, device=device), *texts]

    def output(arrays: list):
        with half:
            out = compiled(*arrays)
        return (out if isinstance(out, torch.Tensor) else out.sample).float()

    def train(calls: int, arrays: list):
        for _ in range(calls):
            loss = (output(arrays)[:, :channels] - arrays[0]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                torch._foreach_lerp_(averaged, weights, 1e-4)
        loss.item()  # waits for the device

    @torch.no_grad()
    def evaluate(calls: int, arrays: list):
        for _ in range(calls):
            out = output(arrays)
        out.sum().item()

    for what, action, n in (('train', train, batch), ('evaluate', evaluate, sampled)):
        if ('torch', what, False, '') in done:
            continue
        arrays = inputs(n)
        seconds = timed(lambda calls, action=action, arrays=arrays: action(calls, arrays), 1 if tiny else 10)
        emit(
            what, n, seconds, flops.get(what, 0), peak, framework='torch', deterministic=False, attention='',
            parameters=count, compiled=device == 'cuda', dtype='bfloat16' if device == 'cuda' else 'float32',
        )  # fmt: skip


def about() -> dict:
    """The device and the versions, from a process of its own: this one must hold no memory of the device."""
    code = 'import jax; print(jax.devices()[0].device_kind, end="")'
    done = subprocess.run([sys.executable, '-c', code], env=environment(), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f'no device: {done.stderr.strip().splitlines()[-1]}')
    versions = {'python': platform.python_version()}
    for package in ('jaxgen', 'jax', 'jaxlib', 'flax', 'torch', 'diffusers'):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {'device': done.stdout, 'versions': versions}


def environment() -> dict[str, str]:
    paths = [ROOT, os.path.join(ROOT, 'benchmarks'), os.environ.get('PYTHONPATH', '')]
    return {
        **os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths)), 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
    }  # fmt: skip


def key(row: dict) -> tuple:
    return row['framework'], row['what'], row['deterministic'], row['attention']


def with_ratios(rows: list[dict]) -> list[dict]:
    """The rows, each of jaxgen's with its speed over torch's of the same work where both were measured."""
    theirs = {(r['network'], r['what'], r['batch']): r for r in rows if r['framework'] == 'torch'}
    for row in rows:
        other = theirs.get((row['network'], row.get('what'), row.get('batch')))
        if row['framework'] == 'jaxgen' and other:
            if row['parameters'] != other['parameters']:
                sys.exit(
                    f'{row["network"]}: not the same network: {row["parameters"]} and {other["parameters"]} weights'
                )
            row['speed_over_torch'] = other['seconds']['median'] / row['seconds']['median']
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='', help=f'networks, with commas: {", ".join(NETWORKS)}')
    parser.add_argument('--minutes', type=float, default=9.5, help='nothing is begun or goes on after them')
    parser.add_argument('--tiny', action='store_true')
    parser.add_argument('--out', default='', help='by default benchmarks/results/accelerator_DEVICE.json')
    parser.add_argument('--alone', default='', help=argparse.SUPPRESS)  # FRAMEWORK:NETWORK, in a process of its own
    arguments = parser.parse_args()
    if arguments.alone:
        framework, _, name = arguments.alone.partition(':')
        given = json.loads(sys.stdin.read())
        done = {tuple(k) for k in given['done']}
        if framework == 'torch':
            torch_rows(name, arguments.tiny, done, given['flops'])
        else:
            jaxgen_rows(name, arguments.tiny, done)
        return

    from jaxgen import files

    began, names = time.monotonic(), arguments.only.split(',') if arguments.only else list(NETWORKS)
    if unknown := [name for name in names if name not in NETWORKS]:
        parser.error(f'no such network: {", ".join(unknown)}; they are {", ".join(NETWORKS)}')
    here = about()
    where = here['device'].lower().replace(' ', '_') + ('_tiny' if arguments.tiny else '')
    out = arguments.out or os.path.join(ROOT, 'benchmarks', 'results', f'accelerator_{where}.json')
    rows = []
    if os.path.exists(out):
        with open(out) as f:
            rows = [r for r in json.load(f)['rows'] if {k: r[k] for k in here} == here]
    with_torch = 'torch' in here['versions'] and 'diffusers' in here['versions']
    for name in names:
        for framework in ('jaxgen', *(('torch',) if with_torch and name != 'stylegan2_ffhq256' else ())):
            left = 60 * arguments.minutes - (time.monotonic() - began)
            if left < 5:
                sys.exit(f'{arguments.minutes} minutes are over: start it again for what is left; {out}')
            own = [r for r in rows if r['network'] == name]
            done = [key(r) for r in own]
            flops = {r['what']: r['flops'] for r in own}
            command = [sys.executable, __file__, f'--alone={framework}:{name}', *(['--tiny'] if arguments.tiny else [])]
            print(f'{framework} {name}', file=sys.stderr, flush=True)
            process = subprocess.Popen(
                command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            timer = threading.Timer(left, process.kill)
            timer.start()
            try:
                process.stdin.write(json.dumps({'done': done, 'flops': flops}))
                process.stdin.close()
                for line in process.stdout:
                    if not line.startswith('{'):
                        continue
                    rows.append({'network': name, 'dtype': 'bfloat16', **json.loads(line), **here})
                    files.save_json(out, {'command': 'benchmarks/accelerator.sh', 'rows': with_ratios(rows)})
                code = process.wait()
            finally:
                timer.cancel()
                process.kill()
            if code and time.monotonic() - began < 60 * arguments.minutes:
                print(f'{framework} {name} failed with exit code {code}; see above', file=sys.stderr, flush=True)
    print(out)


if __name__ == '__main__':
    main()
