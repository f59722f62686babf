"""The published weights that the zoo can take, by name."""

from __future__ import annotations

import dataclasses
import difflib

from ml_collections import ConfigDict

from jaxgen import config as configs
from jaxgen.errors import UserError


@dataclasses.dataclass(frozen=True)
class Published:
    """Weights that somebody published.

    Attributes:
      name: of the file or model, as published.
      config: that its networks are of, NAME or NAME:VARIANT.
      overrides: fields of the config that differ, '--config.x=y'.
      names: of the source, see `sources.SOURCES`.
      where: repository or hub page that publishes it.
      licence: as stated there; '' not read.
      sha256: of the file, where it is known.
    """

    name: str
    config: str
    names: str
    where: str
    licence: str = ''
    overrides: tuple[str, ...] = ()
    sha256: str = ''


HUB = 'huggingface.co/'
GITHUB = 'github.com/'
NC_DIT = 'CC BY-NC 4.0'
NC_EDM = 'CC BY-NC-SA 4.0'
NVIDIA = 'NVIDIA Source Code License, non-commercial'
GUIDED, IMPROVED = f'{GITHUB}openai/guided-diffusion', f'{GITHUB}openai/improved-diffusion'
EDM, SCORE = f'{GITHUB}NVlabs/edm', f'{GITHUB}yang-song/score_sde_pytorch'
VAR, LDM = f'{HUB}FoundationVision/var', f'{GITHUB}CompVis/latent-diffusion'
ADA = f'{GITHUB}NVlabs/stylegan2-ada-pytorch'
TAMING = f'{GITHUB}CompVis/taming-transformers'
DIFFUSERS_DIT = ('--config.model.network.freq_shift=1', '--config.model.network.mlp_eps=1e-05')
SIT_TIME = ('--config.model.training.time_scale=-0.001', '--config.model.training.time_shift=1.0')

# StyleGAN2-ADA's settings of CIFAR-10: no mixed styles, no path length.
CIFAR = tuple(
    f'--config.{field}'
    for field in (
        'data.source=cifar10', 'data.size=32', 'data.batch=64', 'data.flip=False',
        'model.mapping_layers=2', 'model.discriminator_architecture=orig', 'model.group=32', 'model.clamp=256.0',
        'model.r1=0.01', 'model.mixing=0.0', 'model.path=0.0', 'optim.ema_halflife=500000.0', 'optim.ema_rampup=0.05',
    )
)  # fmt: skip
OF_CLASSES = (
    "--config.data.features=('image','label')",
    '--config.model.conditional=True',
    '--config.model.discriminator_mapping_layers=8',
)

PUBLISHED: tuple[Published, ...] = (
    Published('google/ddpm-cifar10-32', 'ddpm_cifar10', 'diffusers', HUB + 'google/ddpm-cifar10-32', 'Apache-2.0'),
    Published(
        'google/ddpm-celebahq-256', 'ddpm_celebahq256', 'diffusers', HUB + 'google/ddpm-celebahq-256', 'Apache-2.0'
    ),
    Published('google/ddpm-church-256', 'ddpm_celebahq256', 'diffusers', HUB + 'google/ddpm-church-256', 'Apache-2.0'),
    Published(
        'google/ddpm-bedroom-256', 'ddpm_celebahq256', 'diffusers', HUB + 'google/ddpm-bedroom-256', 'Apache-2.0'
    ),
    Published('cifar10_uncond_50M_500K.pt', 'iddpm_cifar10', 'guided', IMPROVED, 'MIT'),
    Published('64x64_diffusion.pt', 'adm_imagenet64', 'guided_new_order', GUIDED, 'MIT'),
    Published('256x256_diffusion.pt', 'adm_imagenet256', 'guided', GUIDED, 'MIT'),
    Published('64x64_classifier.pt', 'noisy_classifier_imagenet64', 'guided', GUIDED, 'MIT'),
    Published('256x256_classifier.pt', 'noisy_classifier_imagenet256', 'guided', GUIDED, 'MIT'),
    Published('stabilityai/sd-vae-ft-mse', 'kl_f8_imagenet256', 'diffusers', HUB + 'stabilityai/sd-vae-ft-mse', 'MIT'),
    Published('kl-f8', 'kl_f8_imagenet256', 'compvis', LDM, 'MIT'),
    Published('vq-f4', 'vq_f4_celebahq256', 'compvis', LDM, 'MIT'),
    Published('ldm celeba256', 'ldm_celebahq256', 'guided', LDM, 'MIT'),
    Published('ldm ffhq256', 'ldm_celebahq256', 'guided', LDM, 'MIT'),
    Published('vqgan_imagenet_f16_1024', 'vqgan_imagenet256', 'compvis', TAMING, 'MIT'),
    Published('DiT-XL-2-256x256.pt', 'dit_imagenet256', 'dit', f'{GITHUB}facebookresearch/DiT', NC_DIT),
    Published(
        'facebook/DiT-XL-2-256', 'dit_imagenet256', 'diffusers', HUB + 'facebook/DiT-XL-2-256', NC_DIT, DIFFUSERS_DIT
    ),
    Published('SiT-XL-2-256x256.pt', 'sit_imagenet256', 'sit', f'{GITHUB}willisma/SiT', 'MIT', SIT_TIME),
    Published('vae_ch160v4096z32.pth', 'var_vqvae_imagenet256', 'var', VAR, 'MIT'),
    *(
        Published(f'var_d{depth}.pth', f'var_imagenet256{variant}', 'var', VAR, 'MIT')
        for depth, variant in ((16, ''), (20, ':d20'), (24, ':d24'), (30, ':d30'), (36, ':d36'))
    ),
    Published('edm-cifar10-32x32-uncond-vp', 'edm_cifar10', 'edm', EDM, NC_EDM),
    Published('cifar10_ncsnpp_continuous', 'ncsnpp_cifar10', 'score_sde', SCORE, 'Apache-2.0'),
    Published('cifar10_ddpmpp_continuous', 'ddpmpp_cifar10', 'score_sde', SCORE, 'Apache-2.0'),
    Published('ddgan cifar10', 'ddgan_cifar10', 'ddgan', f'{GITHUB}NVlabs/denoising-diffusion-gan', NVIDIA),
    Published('stylegan2-ada cifar10u', 'stylegan2_ffhq256', 'stylegan2', ADA, NVIDIA, CIFAR),
    Published('stylegan2-ada cifar10c', 'stylegan2_ffhq256', 'stylegan2', ADA, NVIDIA, (*CIFAR, *OF_CLASSES)),
    Published('stylegan2-ffhq-256x256', 'stylegan2_ffhq256', 'stylegan2', ADA, NVIDIA),
    Published('stylegan2-ffhq-1024x1024', 'stylegan2_ffhq1024', 'stylegan2', ADA, NVIDIA),
    Published('biggan 128x128 (G_ema.pth)', 'biggan_imagenet128', 'biggan', f'{GITHUB}ajbrock/BigGAN-PyTorch', 'MIT'),
)  # fmt: skip


def find(name: str) -> Published:
    """Published weights by their name.

    Raises:
      UserError: there are none of this name.
    """
    for one in PUBLISHED:
        if one.name == name:
            return one
    close = difflib.get_close_matches(name, [one.name for one in PUBLISHED], n=3, cutoff=0.4)
    hint = f'; did you mean {" or ".join(close)}?' if close else '; jaxgen.published() lists them'
    raise UserError(f'no published weights {name!r} are known{hint}')


def config_of(one: Published) -> ConfigDict:
    """The config of the networks of published weights."""
    return configs.override(configs.load(one.config), list(one.overrides))
