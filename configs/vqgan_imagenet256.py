r"""VQGAN on ImageNet: 256x256 pixels to 16x16 codes out of 1024, 72.1 million weights; or out of 16384.

    python -m jaxgen.main --config=configs/vqgan_imagenet256.py:lpips \
        --config.model.lpips="('vgg16-397923af.pth', 'vgg.pth')"

The variant `lpips` is the published loss. Its weights are for a person to fetch: torchvision's VGG-16
(https://download.pytorch.org/models/vgg16-397923af.pth) and LPIPS's own, version 0.1
(https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth). Without the variant the
loss has differences of pixels and the discriminator alone. `k16384` is the larger codebook: `:k16384,lpips`.

The codebook loss counts by a quarter and the commitment in full, as in the released code; see families/vqgan.py.

Differs: images are resized by bicubic interpolation, there bilinear; the number of updates and of GPUs (8, of 12 images
each) is not in the release.

Time: not measured
Paper: reconstruction FID 7.94, `:k16384` 4.98 (Esser et al. 2021 and the released code; ImageNet validation)
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
            channels=128,
            group_size=0,
            multipliers=(1, 1, 2, 2, 4),
            blocks=2,
            attention=(16,),
            latent=256,
            vocabulary=1024,
            codebook_weight=0.25,
            beta=4.0,
            perceptual=0.0,
            adversarial=0.8,
            discriminator_start=250_001,
        ),
        # 4.5e-6 for each image of the batch, and no averages, as in the released code.
        optim=dict(lr=96 * 4.5e-6, b1=0.5, b2=0.9, ema=0.0),
        train=dict(steps=500_000, log_every=100, save_every=5000, sample_every=0),
        evaluate=dict(features='none', samples=50_000),
        variants={
            'lpips': dict(model=dict(perceptual=1.0)),
            'k16384': dict(model=dict(vocabulary=16_384)),
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
                    discriminator_start=1,
                    discriminator_channels=4,
                    discriminator_layers=1,
                ),
                optim=dict(ema=0.9),
            ),
        },
    )
