"""Images drawn by the published code of repositories that are no packages, for `references_test.py`.

    python tests/weights/make_references.py guided=guided-diffusion improved=improved-diffusion edm=edm dit=DiT sit=SiT

Each argument is a clone of the repository: openai/guided-diffusion, openai/improved-diffusion, NVlabs/edm,
facebookresearch/DiT, willisma/SiT; images of those that are not named stay as they are. It takes torch, diffusers, timm
and torchdiffeq. The networks are small, and their weights and all noise are numbers by a rule (`weight`, `noise`), so
that the test makes the same ones without the repositories. Names and shapes of the weights are those of names.json.

references.npz has the images [n, H, W, C] of each case in units of 1 / SCALE.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator

import numpy as np

FOLDER = os.path.dirname(os.path.abspath(__file__))
SCALE = 16_000
IMAGES, SIDE, STEPS = 2, 16, 10
LABELS = [1, 6]
with open(os.path.join(FOLDER, 'names.json'), encoding='utf-8') as file:
    NAMES = json.load(file)

# {case: names of its networks in NAMES}
CASES = {
    'ADM, ancestral': ['ADM'],
    'ADM, ddim': ['ADM'],
    'ADM, classifier': ['ADM', 'ADM classifier'],
    'ADM, classifier, ddim': ['ADM', 'ADM classifier'],
    'upsampler': ['ADM upsampler'],
    'IDDPM, cosine of 4000': ['IDDPM'],
    'IDDPM, fixed variance': ['IDDPM, fixed variance'],
    'EDM, DDPM++': ['EDM, DDPM++'],
    'EDM, ADM with churn': ['EDM, ADM'],
    'DiT': ['DiT of latents'],
    'SiT, Euler': ['SiT'],
    'SiT, SDE': ['SiT'],
}  # fmt: skip


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor by its name: normal numbers of variance 1 over the fan in; of vectors 0.1 times normal numbers, around
    1 where they are gains of norms."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        return np.float32(x / np.sqrt(np.prod(shape[1:])))
    return np.float32(0.1 * x + (name.endswith('weight') and 'freqs' not in name))


def weights(network: str) -> dict[str, np.ndarray]:
    """All of them by their names in NAMES, but those that are fixed."""
    return {
        name: weight(name, tuple(shape))
        for name, shape in NAMES[network]['tensors'].items()
        if not name.endswith(('pos_embed', 'resample_filter'))
    }


def noise(seed: int, *shape: int) -> np.ndarray:
    """Normal numbers, [n, H, W, C] or so."""
    return np.float32(np.random.default_rng(seed).standard_normal(shape))


def start(channels: int = 3, side: int = SIDE) -> np.ndarray:
    return noise(0, IMAGES, side, side, channels)


def added(step: int, channels: int = 3, side: int = SIDE) -> np.ndarray:
    """The noise that is added in a step, counted from 0 in the order of sampling."""
    return noise(1 + step, IMAGES, side, side, channels)


def low_resolution() -> np.ndarray:
    return np.tanh(noise(100, IMAGES, SIDE // 4, SIDE // 4, 3))


# --- in torch


def nchw(x: np.ndarray):
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def nhwc(x) -> np.ndarray:
    return np.moveaxis(x.detach().numpy(), 1, -1)


def filled(model, network: str):
    """The model with the weights of the rule.

    Raises:
      ValueError: its names or shapes are not those of NAMES.
    """
    import torch

    tensors = NAMES[network]['tensors']
    state = {name: list(value.shape) for name, value in model.state_dict().items()}
    if state != tensors:
        raise ValueError(f'{network}: {sorted(set(map(str, state.items())) ^ set(map(str, tensors.items())))[:8]}')
    model.load_state_dict({name: torch.from_numpy(x) for name, x in weights(network).items()}, strict=False)
    return model.eval()


@contextlib.contextmanager
def noise_in_order(names: list[str], **shape) -> Iterator[None]:
    """torch's functions of these names return the noise of one step after another, of the first IMAGES examples."""
    import torch

    before, step = {name: getattr(torch, name) for name in names}, -1

    def draw(like, *args, **kwargs):
        nonlocal step
        step += 1
        one = nchw(added(step, **shape))
        n = like[0] if isinstance(like, torch.Size) else len(like)
        return torch.cat([one] * (n // IMAGES))

    try:
        for name in names:
            setattr(torch, name, draw)
        yield
    finally:
        for name, function in before.items():
            setattr(torch, name, function)


def openai(package: str, folder: str):
    """Modules of guided-diffusion and improved-diffusion."""
    import importlib

    sys.path.insert(0, folder)
    return importlib.import_module(f'{package}.script_util'), importlib.import_module(f'{package}.unet')


def guided(folder: str) -> Iterator[tuple[str, np.ndarray]]:
    """ADM with its classifier, and an upsampler."""
    import torch
    import torch.nn.functional as F

    make, networks = openai('guided_diffusion', folder)
    half = dict(
        image_size=SIDE, in_channels=3, model_channels=32, num_res_blocks=1, attention_resolutions=(2,),
        channel_mult=(1, 2), num_head_channels=16, use_scale_shift_norm=True, resblock_updown=True,
    )  # fmt: skip
    order = dict(use_new_attention_order=True)
    model = filled(networks.UNetModel(**half, **order, out_channels=6, num_classes=8), 'ADM')
    classifier = filled(networks.EncoderUNetModel(**half, out_channels=8, pool='attention'), 'ADM classifier')
    label = torch.tensor(LABELS)

    def gradient(x, t, y):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            selected = F.log_softmax(classifier(x, t), -1)[range(len(x)), y]
            return torch.autograd.grad(selected.sum(), x)[0] * 20.0

    def draw(model, respacing, given, schedule='cosine', **options):
        diffusion = make.create_gaussian_diffusion(
            learn_sigma=True, noise_schedule=schedule, timestep_respacing=respacing
        )
        loop = diffusion.ddim_sample_loop if respacing.startswith('ddim') else diffusion.p_sample_loop
        x = nchw(start())
        with noise_in_order(['randn_like']):
            return nhwc(loop(model, x.shape, noise=x, model_kwargs=given, device='cpu', **options))

    yield 'ADM, ancestral', draw(model, '10', {'y': label})
    yield 'ADM, ddim', draw(model, 'ddim10', {'y': label})
    yield 'ADM, classifier', draw(model, '10', {'y': label}, cond_fn=gradient)
    yield 'ADM, classifier, ddim', draw(model, 'ddim10', {'y': label}, cond_fn=gradient)
    upsampler = filled(networks.SuperResModel(**half, out_channels=6, num_classes=8), 'ADM upsampler')
    yield 'upsampler', draw(upsampler, '10', {'y': label, 'low_res': nchw(low_resolution())}, 'linear')


def improved(folder: str) -> Iterator[tuple[str, np.ndarray]]:
    """Improved DDPM of CIFAR-10: 4000 steps of the cosine schedule, and a fixed variance."""
    import types

    for name in ('blobfile', 'mpi4py', 'mpi4py.MPI'):  # of its distributed training alone
        sys.modules.setdefault(name, types.ModuleType(name))
    make, networks = openai('improved_diffusion', folder)
    for case, network, learned, options in (
        ('IDDPM, cosine of 4000', 'IDDPM', True, dict(steps=4000, noise_schedule='cosine')),
        ('IDDPM, fixed variance', 'IDDPM, fixed variance', False, dict(steps=1000, noise_schedule='linear')),
    ):
        model = networks.UNetModel(
            in_channels=3, model_channels=32, out_channels=6 if learned else 3, num_res_blocks=2,
            attention_resolutions=(2,), channel_mult=(1, 2), num_heads=4, use_scale_shift_norm=True,
        )  # fmt: skip
        diffusion = make.create_gaussian_diffusion(
            learn_sigma=learned, timestep_respacing='10', rescale_timesteps=True, **options
        )
        x = nchw(start())
        with noise_in_order(['randn_like']):
            yield case, nhwc(diffusion.p_sample_loop(filled(model, network), x.shape, noise=x, device='cpu'))


def edm(folder: str) -> Iterator[tuple[str, np.ndarray]]:
    """EDM's Heun, without noise, and with churn."""
    import torch

    sys.path.insert(0, folder)
    from generate import edm_sampler
    from training.networks import EDMPrecond

    common = dict(img_resolution=SIDE, img_channels=3, label_dim=8, channel_mult=[1, 2], num_blocks=1)
    common |= dict(attn_resolutions=[8])
    label = torch.eye(8)[LABELS]
    model = EDMPrecond(**common, model_type='SongUNet', model_channels=32, augment_dim=9)
    options = dict(num_steps=STEPS)
    yield 'EDM, DDPM++', nhwc(edm_sampler(filled(model, 'EDM, DDPM++'), nchw(start()), label, **options).float())
    model = EDMPrecond(**common, model_type='DhariwalUNet', model_channels=64)
    churn = dict(S_churn=4, S_min=0.05, S_max=50, S_noise=1.003)
    with noise_in_order(['randn_like']):
        drawn = edm_sampler(
            filled(model, 'EDM, ADM'), nchw(start()), label, randn_like=torch.randn_like, **options, **churn
        )
    yield 'EDM, ADM with churn', nhwc(drawn.float())


def dit(folder: str) -> Iterator[tuple[str, np.ndarray]]:
    """DiT with guidance, on the latents of a KL autoencoder, as sample.py draws."""
    import torch
    from diffusers import AutoencoderKL

    sys.path.insert(0, folder)
    for name in [name for name in sys.modules if name == 'models' or name.startswith('diffusion.')]:
        del sys.modules[name]
    from diffusion import create_diffusion
    from models import DiT

    model = DiT(8, 2, 4, 64, 2, 4, num_classes=8)
    filled(model, 'DiT of latents')
    stage = AutoencoderKL(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=SIDE, latent_channels=4,
        down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2,
    )  # fmt: skip
    filled(stage, 'KL autoencoder of diffusers')
    z = nchw(start(4, 8))
    z, label = torch.cat([z, z]), torch.tensor([*LABELS, 8, 8])
    with noise_in_order(['randn_like'], channels=4, side=8):
        drawn = create_diffusion('10').p_sample_loop(
            model.forward_with_cfg, z.shape, z, clip_denoised=False, model_kwargs=dict(y=label, cfg_scale=2.5),
            device='cpu',
        )  # fmt: skip
    yield 'DiT', nhwc(stage.decode(drawn[:IMAGES] / 0.18215).sample)


def sit(folder: str) -> Iterator[tuple[str, np.ndarray]]:
    """SiT by its ODE, in steps of Euler, and by its SDE, with guidance."""
    import torch

    sys.path.insert(0, folder)
    sys.modules.pop('models', None)
    from models import SiT
    from transport import Sampler, create_transport

    model = filled(SiT(8, 2, 3, 64, 2, 4, num_classes=10), 'SiT')
    sampler = Sampler(create_transport('Linear', 'velocity', None, None, None))
    z = nchw(start(3, 8))
    given = dict(y=torch.tensor([*LABELS, 10, 10]), cfg_scale=2.0)
    ode = sampler.sample_ode(sampling_method='euler', num_steps=STEPS + 1)
    yield 'SiT, Euler', nhwc(ode(torch.cat([z, z]), model.forward_with_cfg, **given)[-1][:IMAGES])
    sde = sampler.sample_sde(diffusion_form='sigma', last_step='Mean', last_step_size=0.04, num_steps=STEPS)
    with noise_in_order(['randn'], channels=3, side=8):
        yield 'SiT, SDE', nhwc(sde(torch.cat([z, z]), model.forward_with_cfg, **given)[-1][:IMAGES])


REPOSITORIES: dict[str, Callable] = {'guided': guided, 'improved': improved, 'edm': edm, 'dit': dit, 'sit': sit}


def main(arguments: list[str]) -> None:
    path = os.path.join(FOLDER, 'references.npz')
    images = dict(np.load(path)) if os.path.exists(path) else {}
    for argument in arguments:
        name, _, folder = argument.partition('=')
        for case, drawn in REPOSITORIES[name](os.path.abspath(folder)):
            drawn = np.clip(drawn, -1, 1)
            print(f'{case}: {drawn.shape}, mean {drawn.mean():.3f}, std {drawn.std():.3f}, '
                  f'{(abs(drawn) == 1).mean():.0%} at the ends')  # fmt: skip
            images[case] = np.int16(np.round(SCALE * drawn))
    np.savez_compressed(path, **images)


if __name__ == '__main__':
    main(sys.argv[1:])
