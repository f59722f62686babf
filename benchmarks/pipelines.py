"""Import of whole pipelines at their published sizes, and an evaluation of the network beside diffusers.

    python benchmarks/pipelines.py --model=sd15 --dtype=float16 --compute=float32
    python benchmarks/pipelines.py --model=sdxl --dtype=bfloat16 --compute=bfloat16 --programs=jaxgen

A folder of the hub with random weights is written (the names and shapes of diffusers' and transformers' own classes, a
small tokenizer), imported by the command in a process of its own, and its network evaluated by jaxgen and by diffusers
in turns (`--programs=jaxgen`: by it alone): latents of 64 x 64 or `--side`, a batch of two as with guidance. Memory is
the most that the process had resident (VmHWM), and `apart` that without what an import of a pipeline of few weights
takes. The pages of the files are dropped first, so they are read from the disk. Results go to
benchmarks/results/pipelines.json. Linux; torch and diffusers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from weights import DTYPES, STEP, write_weights

from jaxgen import files
from jaxgen.text import tokenizers

RESULTS = os.path.join(os.path.dirname(__file__), 'results', 'pipelines.json')
BATCH = 2
BETAS = {'beta_schedule': 'scaled_linear', 'beta_start': 0.00085, 'beta_end': 0.012, 'num_train_timesteps': 1000}
SCHEDULER = {
    '_class_name': 'DDIMScheduler', **BETAS, 'clip_sample': False, 'set_alpha_to_one': False, 'steps_offset': 1,
}  # fmt: skip
CLIP = {'vocab_size': 49_408, 'max_position_embeddings': 77, 'eos_token_id': 2}
CLIP_L = {**CLIP, 'hidden_size': 768, 'intermediate_size': 3072, 'num_hidden_layers': 12, 'num_attention_heads': 12}
CLIP_G = {
    **CLIP, 'hidden_size': 1280, 'intermediate_size': 5120, 'num_hidden_layers': 32, 'num_attention_heads': 20,
    'projection_dim': 1280, 'hidden_act': 'gelu',
}  # fmt: skip
CROSSED = [['CrossAttnDownBlock2D'] * 3 + ['DownBlock2D'], ['UpBlock2D'] + ['CrossAttnUpBlock2D'] * 3]
CROSSED_XL = [['DownBlock2D'] + ['CrossAttnDownBlock2D'] * 2, ['CrossAttnUpBlock2D'] * 2 + ['UpBlock2D']]
VAE = {
    'block_out_channels': [128, 256, 512, 512], 'layers_per_block': 2, 'latent_channels': 4,
    'down_block_types': ['DownEncoderBlock2D'] * 4, 'up_block_types': ['UpDecoderBlock2D'] * 4,
}  # fmt: skip
SMALL = {'block_out_channels': [32, 32], 'layers_per_block': 1, 'sample_size': 64}
# {model: (class of the pipeline, {folder: (library, class, its options)})}
MODELS = {
    'sd15': ('StableDiffusionPipeline', {
        'unet': ('diffusers', 'UNet2DConditionModel', {
            'sample_size': 64, 'cross_attention_dim': 768, 'attention_head_dim': 8,
            'down_block_types': CROSSED[0], 'up_block_types': CROSSED[1],
        }),
        'vae': ('diffusers', 'AutoencoderKL', {**VAE, 'sample_size': 512}),
        'text_encoder': ('transformers', 'CLIPTextModel', CLIP_L),
    }),
    'sdxl': ('StableDiffusionXLPipeline', {
        'unet': ('diffusers', 'UNet2DConditionModel', {
            'sample_size': 128, 'block_out_channels': [320, 640, 1280], 'cross_attention_dim': 2048,
            'attention_head_dim': [5, 10, 20], 'transformer_layers_per_block': [1, 2, 10],
            'down_block_types': CROSSED_XL[0], 'up_block_types': CROSSED_XL[1], 'use_linear_projection': True,
            'addition_embed_type': 'text_time', 'addition_time_embed_dim': 256,
            'projection_class_embeddings_input_dim': 2816,
        }),
        'vae': ('diffusers', 'AutoencoderKL', {**VAE, 'sample_size': 1024, 'scaling_factor': 0.13025}),
        'text_encoder': ('transformers', 'CLIPTextModel', CLIP_L),
        'text_encoder_2': ('transformers', 'CLIPTextModelWithProjection', CLIP_G),
    }),
    'small': ('StableDiffusionPipeline', {
        'unet': ('diffusers', 'UNet2DConditionModel', {
            **SMALL, 'cross_attention_dim': 32, 'attention_head_dim': 4,
            'down_block_types': CROSSED[0][2:], 'up_block_types': CROSSED[1][:2],
        }),
        'vae': ('diffusers', 'AutoencoderKL', {
            **SMALL, 'down_block_types': VAE['down_block_types'][:2], 'up_block_types': VAE['up_block_types'][:2],
        }),
        'text_encoder': ('transformers', 'CLIPTextModel', {
            **CLIP, 'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 4,
        }),
    }),
}  # fmt: skip
WEIGHTS = {'diffusers': 'diffusion_pytorch_model.safetensors', 'transformers': 'model.safetensors'}
# Makes an evaluation for each line that it reads, and says how many seconds it took, those of all cores, the deviation
# of what it gave and the most bytes that were resident. Both read the same file of inputs: x [n, h, w, c], t [n],
# tokens [n, l, d], pooled and sizes [n, ...] of SDXL.
OF_JAX = """
import sys, time
import jax, jax.numpy as jnp, numpy as np
import jaxgen
from jaxgen.networks import denoisers, latent_unet
folder, inputs, dtype = sys.argv[1:]
run = jaxgen.load(folder, config={'train.dtype': dtype})
context = run.assembled.context
shape = context.stages['first'].latents.shape
module = denoisers.make_module(run.config.model.network.to_dict(), shape, shape[-1], context)
made = dict(np.load(inputs))
x, t, tokens = (jnp.asarray(made[name]) for name in ('x', 't', 'tokens'))
pooled = None
if 'pooled' in made:
    numbers = latent_unet.embedded_numbers(jnp.asarray(made['sizes']), 256)
    pooled = jnp.concatenate([jnp.asarray(made['pooled']), numbers], -1)
evaluate = jax.jit(lambda params: module.apply({'params': params}, x, t, tokens=tokens, pooled=pooled, train=False))
weights = run.state.ema['denoiser']
"""
OF_TORCH = """
import sys, time
import diffusers, numpy as np, torch
folder, inputs, dtype = sys.argv[1:]
kind = getattr(torch, dtype)
net = diffusers.UNet2DConditionModel.from_pretrained(folder, torch_dtype=kind).eval()
made = {name: torch.from_numpy(x) for name, x in dict(np.load(inputs)).items()}
x, tokens = made['x'].permute(0, 3, 1, 2).contiguous().to(kind), made['tokens'].to(kind)
more = {}
if 'pooled' in made:
    more = {'added_cond_kwargs': {'text_embeds': made['pooled'].to(kind), 'time_ids': made['sizes'].to(kind)}}
weights = None
@torch.inference_mode()
def evaluate(_):
    return net(x, made['t'], tokens, **more).sample
"""
TURNS = """
for line in sys.stdin:
    start, of_cores = time.perf_counter(), time.process_time()
    out = evaluate(weights)
    value = float((out.astype(jnp.float32) if 'jnp' in globals() else out.float()).std())
    seconds = time.perf_counter() - start, time.process_time() - of_cores
    resident = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))
    print(*seconds, value, 1024 * int(resident), flush=True)
"""


def write_folder(folder: str, model: str, dtype: str) -> dict[str, int]:
    """Writes a pipeline with random weights; {folder of a part: numbers in it}."""
    import diffusers
    import torch
    import transformers

    libraries = {'diffusers': diffusers, 'transformers': transformers}
    kind, parts = MODELS[model]
    index, counts = {'_class_name': kind, 'scheduler': ['diffusers', 'DDIMScheduler']}, {}
    made = tokenizers.train(('a red heart on a mat', 'a blue star'), 550, 77)
    for seed, (part, (library, cls, options)) in enumerate(parts.items()):
        inside = os.path.join(folder, part)
        os.makedirs(inside)
        with torch.device('meta'):
            if library == 'diffusers':
                net = getattr(libraries[library], cls)(**options)
                said = {'_class_name': cls, **options}
            else:
                config = transformers.CLIPTextConfig(**options)
                net = getattr(libraries[library], cls)(config)
                said = {**config.to_dict(), 'architectures': [cls]}
        files.save_json(os.path.join(inside, 'config.json'), said)
        shapes = {name: tuple(x.shape) for name, x in net.state_dict().items() if x.is_floating_point()}
        counts[part] = sum(map(math.prod, shapes.values()))
        write_weights(os.path.join(inside, WEIGHTS[library]), shapes, dtype, seed)
        index[part] = [library, cls]
        if library == 'transformers':
            beside = part.replace('text_encoder', 'tokenizer')
            made.save(os.path.join(folder, beside))
            index[beside] = ['transformers', 'CLIPTokenizer']
    os.makedirs(os.path.join(folder, 'scheduler'))
    files.save_json(os.path.join(folder, 'scheduler', 'scheduler_config.json'), SCHEDULER)
    files.save_json(os.path.join(folder, 'model_index.json'), index)
    return counts


def imported(folder: str, workdir: str) -> dict:
    """What the command says of itself: most bytes resident, seconds, bytes read from the disk."""
    command = [sys.executable, '-c', STEP, 'main', '--mode=import', f'--from={folder}', f'--workdir={workdir}']
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def size_of(folder: str) -> int:
    return sum(os.path.getsize(os.path.join(top, name)) for top, _, names in os.walk(folder) for name in names)


def inputs_of(model: str, side: int) -> dict[str, np.ndarray]:
    """Latents, times and conditions of an evaluation."""
    rng, options = np.random.default_rng(0), MODELS[model][1]['unet'][2]

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    made = {'x': normal(BATCH, side, side, 4), 't': np.full(BATCH, 500, np.float32)}
    made['tokens'] = normal(BATCH, 77, options['cross_attention_dim'])
    if 'addition_embed_type' in options:
        made |= {'pooled': normal(BATCH, 1280), 'sizes': np.full((BATCH, 6), 8 * side, np.float32)}
    return made


def turns(commands: dict[str, list[str]], n: int) -> dict[str, dict]:
    """{name: seconds of n evaluations after the first, by the clock and of all cores, the deviation of what they gave,
    the most bytes resident}, one after another by turns of processes that each hold their weights."""
    processes = {
        name: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name, command in commands.items()
    }
    lines: dict[str, list[list[float]]] = {name: [] for name in processes}
    for _ in range(n + 1):
        for name, process in processes.items():
            process.stdin.write('\n')
            process.stdin.flush()
            lines[name].append([float(number) for number in process.stdout.readline().split()])
    for process in processes.values():
        process.stdin.close()
        process.wait()
    names = ('seconds', 'of_cores', 'deviation', 'resident')
    made = {}
    for name, rows in lines.items():
        columns = dict(zip(names, zip(*rows, strict=True), strict=True))
        made[name] = {
            'first': columns['seconds'][0],
            'seconds': columns['seconds'][1:],
            'of_cores': columns['of_cores'][1:],
            'deviation': columns['deviation'][-1],
            'resident': int(columns['resident'][-1]),
        }
    return made


def ratio(measured: dict[str, dict], name: str) -> float | None:
    """The median of torch's seconds over jaxgen's of the same turn; None where only one of them was measured."""
    if len(measured) < 2:
        return None
    pairs = zip(measured['torch'][name], measured['jaxgen'][name], strict=True)
    return statistics.median(torch / own for torch, own in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', required=True, choices=MODELS)
    parser.add_argument('--dtype', default='float16', choices=DTYPES, help='of the files')
    parser.add_argument('--compute', default='float32', choices=('float32', 'bfloat16'), help='of an evaluation')
    parser.add_argument('--programs', nargs='+', default=['jaxgen', 'torch'], choices=('jaxgen', 'torch'))
    parser.add_argument('--side', type=int, default=64, help='of the latents')
    parser.add_argument('--turns', type=int, default=5)
    parser.add_argument('--folder', default='', help='where the files go for the time of the measurement')
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder or None) as folder:
        hub, run = os.path.join(folder, 'hub'), os.path.join(folder, 'run')
        write_folder(hub, 'small', arguments.dtype)
        small = imported(hub, run)
        for one in (hub, run):
            shutil.rmtree(one)
        counts = write_folder(hub, arguments.model, arguments.dtype)
        large, size = imported(hub, run), size_of(hub)
        inputs = os.path.join(folder, 'inputs.npz')
        np.savez(inputs, **inputs_of(arguments.model, arguments.side))
        given = {'jaxgen': (OF_JAX, run), 'torch': (OF_TORCH, os.path.join(hub, 'unet'))}
        commands = {
            name: [sys.executable, '-c', program + TURNS, path, inputs, arguments.compute]
            for name, (program, path) in given.items()
            if name in arguments.programs
        }
        measured = turns(commands, arguments.turns)
    row = {
        'model': arguments.model,
        'pipeline': MODELS[arguments.model][0],
        'command': ' '.join(['python', *sys.argv]).partition(' --folder')[0],
        'dtype': arguments.dtype,
        'compute': arguments.compute,
        'side': arguments.side,
        'parameters': counts,
        'file': size,
        'import': {
            'seconds': round(large['seconds'], 1),
            'resident': large['resident'],
            'apart': large['resident'] - small['resident'],
            'read': round(large['read'] / size, 3),
        },
        'evaluation': {name: statistics.median(one['seconds']) for name, one in measured.items()},
        'turns': measured,
        'speed_over_torch': ratio(measured, 'seconds'),
        'speed_over_torch_of_cores': ratio(measured, 'of_cores'),
        'cores': len(os.sched_getaffinity(0)),
        'date': time.strftime('%Y-%m-%d'),
    }
    print(json.dumps(row, indent=2))
    rows = []
    if os.path.exists(RESULTS):
        with open(RESULTS, encoding='utf-8') as file:
            rows = json.load(file)['rows']
    rows = [one for one in rows if one['model'] != row['model'] or one['dtype'] != row['dtype']]
    if arguments.model != 'small':
        files.save_json(RESULTS, {'rows': [*rows, row]})


if __name__ == '__main__':
    main()
