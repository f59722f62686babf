r"""VQ-f4, the first stage of latent diffusion's CelebA-HQ model: 256x256 pixels to 64x64 codes of 3 numbers.

    python -m jaxgen.main --config=configs/vq_f4_celebahq256.py:lpips \
        --config.model.lpips="('vgg16-397923af.pth', 'vgg.pth')"

The variant `lpips` is the published loss. Its weights are for a person to fetch: torchvision's VGG-16
(https://download.pytorch.org/models/vgg16-397923af.pth) and LPIPS's own, version 0.1
(https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth). Without the variant the
loss has differences of pixels and the discriminator alone.

55.3 million weights. The released model was trained on OpenImages, with the losses below. Latent diffusion models the
encoder's outputs before they are quantised: `interface` = 'latents'.

Differs: the data, which need no crop; the release's loader of OpenImages is not in it, so mirroring is not known.

Time: not measured
Paper: reconstruction FID 0.58, PSNR 27.43 (Rombach et al. 2022, table 8; trained on OpenImages, ImageNet validation)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='vqgan',
        data=dict(source='celeb_a_hq/256', size=256, channels=3, batch=64, flip=True),
        model=dict(
            regulariser='vq',
            channels=128,
            group_size=0,
            multipliers=(1, 2, 4),
            blocks=2,
            latent=3,
            interface='latents',
            vocabulary=8192,
            codebook_weight=0.25,
            beta=4.0,
            perceptual=0.0,
            adversarial=0.75,
            discriminator_start=0,
        ),
        # 4.5e-6 for each image of the batch, and no averages, as in the released code.
        optim=dict(lr=64 * 4.5e-6, b1=0.5, b2=0.9, ema=0.0),
        train=dict(steps=530_000, log_every=100, save_every=5000, sample_every=0),
        evaluate=dict(features='none', samples=50_000),
        variants={
            'lpips': dict(model=dict(perceptual=1.0)),
            'tiny': dict(
                data=dict(source='shapes'),
                model=dict(
                    channels=8,
                    group_size=4,
                    multipliers=(1, 2),
                    blocks=1,
                    vocabulary=8,
                    discriminator_start=1,
                    discriminator_channels=4,
                    discriminator_layers=1,
                ),
                optim=dict(ema=0.9),
            ),
        },
    )
