r"""VAR's first stage on ImageNet: 256x256 pixels to codes out of 4096 on ten grids, from 1 to 16x16.

    python -m jaxgen.main --config=configs/var_vqvae_imagenet256.py:lpips \
        --config.model.lpips="('vgg16-397923af.pth', 'vgg.pth')"

The variant `lpips` is the published kind of loss, by weights that are fetched as in `configs/vqgan_imagenet256.py`;
`px512` is for 512x512 pixels: `:px512,lpips`. The network is the published one, and it was trained on OpenImages with
settings that were not published.

Differs: for that reason the settings are those of VQGAN's release (no mirroring), but for the weights of the codebook
loss; and the data are ImageNet's.

Time: not measured
Paper: none
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='vqgan',
        data=dict(source='imagenet2012', size=256, channels=3, batch=96, crop='random'),
        model=dict(
            regulariser='vq',
            channels=160,
            group_size=0,
            multipliers=(1, 1, 2, 2, 4),
            blocks=2,
            attention=(16,),
            latent=32,
            latent_kernel=3,
            vocabulary=4096,
            scales=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
            beta=0.25,
            perceptual=0.0,
            adversarial=0.8,
            discriminator_start=250_001,
        ),
        optim=dict(lr=96 * 4.5e-6, b1=0.5, b2=0.9, ema=0.0),
        train=dict(steps=500_000, log_every=100, save_every=5000, sample_every=0),
        evaluate=dict(features='none', samples=50_000),
        variants={
            'lpips': dict(model=dict(perceptual=1.0)),
            'px512': dict(data=dict(size=512), model=dict(attention=(32,), scales=(1, 2, 3, 4, 6, 9, 13, 18, 24, 32))),
            'tiny': dict(
                data=dict(source='shapes'),
                model=dict(
                    channels=8,
                    group_size=4,
                    multipliers=(1, 2),
                    blocks=1,
                    attention=(4,),
                    latent=4,
                    vocabulary=8,
                    scales=(1, 3, 4),
                    discriminator_start=1,
                    discriminator_channels=4,
                    discriminator_layers=1,
                ),
                optim=dict(ema=0.9),
            ),
        },
    )
