"""StyleGAN2 on FFHQ, 1024x1024: the paper's config F, 30.4 and 29.0 million weights.

    python -m jaxgen.main --config=configs/stylegan2_ffhq1024.py --config.data.source=folder:FFHQ

The images are for a person to fetch (https://github.com/NVlabs/ffhq-dataset). The paper has no augmentation but
mirroring, and trains on 25 million images. Its truncated samples are of psi = 0.5 or so: --config.model.truncation.

Time: not measured
Paper: FID 2.84, perceptual path length 145.0, precision 0.689, recall 0.492 (Karras et al. 2020)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='stylegan2',
        data=dict(source='folder:FFHQ', size=1024, channels=3, batch=32, flip=True, test_fraction=0.02),
        model=dict(latent=512, mapping_layers=8, channel_base=32768, channel_max=512, r1=10.0, augmentation=()),
        optim=dict(
            lr=2e-3,
            b1=0.0,
            b2=0.99,
            ema_halflife=10_000.0,
            # Lazy penalties: see families/stylegan2.py.
            networks=dict(
                generator=dict(lr=2e-3 * 4 / 5, b2=0.99 ** (4 / 5)),
                discriminator=dict(lr=2e-3 * 16 / 17, b2=0.99 ** (16 / 17)),
            ),
        ),
        train=dict(steps=781_250, log_every=100, save_every=5000, sample_every=20_000, samples=16, remat=True),
        sample=dict(batch=16),
        evaluate=dict(batch=16),
        variants={
            'tiny': dict(
                data=dict(source='shapes'),
                model=dict(latent=8, mapping_layers=2, channel_base=64, channel_max=8, projection_steps=2),
                optim=dict(lr=2e-3),
            ),
        },
    )
