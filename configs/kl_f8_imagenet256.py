r"""KL-f8, the autoencoder of Stable Diffusion: 256x256 pixels to 32x32x4 latents, 83.7 million weights.

    python -m jaxgen.main --config=configs/kl_f8_imagenet256.py:lpips \
        --config.model.lpips="('vgg16-397923af.pth', 'vgg.pth')"

The variant `lpips` is the published loss. Its weights are for a person to fetch: torchvision's VGG-16
(https://download.pytorch.org/models/vgg16-397923af.pth) and LPIPS's own, version 0.1
(https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth). Without the variant the
loss has differences of pixels and the discriminator alone. `sd3` has the form of Stable Diffusion 3's and FLUX's
autoencoders, 16 channels of latents without a convolution there; `size512`, `size768`, `size1024` are of larger
images.

The released model was trained on OpenImages, with the losses below. Latent diffusion multiplies the latents by 0.18215,
one over their standard deviation: that is the later stage's business.

Differs: the data; the release cuts 256x256 pixels out of images at 384, here of the shorter side resized to 256. Its
batch is 4 for each GPU, 12 and two of these an update in its config for ImageNet; the numbers of GPUs and updates, and
whether images were mirrored, are not in it: here they are not.

Time: not measured
Paper: reconstruction FID 0.90, PSNR 24.19 (Rombach et al. 2022, table 8, and the released code; ImageNet validation)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='vqgan',
        data=dict(source='imagenet2012', size=256, channels=3, batch=96, crop='random'),
        model=dict(
            regulariser='kl',
            channels=128,
            group_size=0,
            multipliers=(1, 2, 4, 4),
            blocks=2,
            latent=4,
            kl_weight=1e-6,
            perceptual=0.0,
            adversarial=0.5,
            discriminator_start=50_001,
        ),
        # 4.5e-6 for each image of the batch, and no averages, as in the released code.
        optim=dict(lr=96 * 4.5e-6, b1=0.5, b2=0.9, ema=0.0),
        train=dict(steps=250_000, log_every=100, save_every=5000, sample_every=0),
        evaluate=dict(features='none', samples=50_000),
        variants={
            'lpips': dict(model=dict(perceptual=1.0)),
            'sd3': dict(model=dict(latent=16, latent_kernel=0)),
            'size512': dict(data=dict(size=512)),
            'size768': dict(data=dict(size=768)),
            'size1024': dict(data=dict(size=1024)),
            'tiny': dict(
                data=dict(source='shapes'),
                model=dict(
                    channels=8,
                    group_size=4,
                    multipliers=(1, 2),
                    blocks=1,
                    discriminator_start=1,
                    discriminator_channels=4,
                    discriminator_layers=1,
                ),
                optim=dict(ema=0.9),
            ),
        },
    )
