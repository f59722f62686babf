"""StyleGAN2 with adaptive discriminator augmentation, on scikit-learn's 8x8 handwritten digits.

    python -m jaxgen.main --config=configs/stylegan2_digits.py

Time: not measured
Paper: none
Ours: not measured
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='stylegan2',
        data=dict(source='digits', size=8, channels=1, batch=64),
        model=dict(
            latent=64,
            mapping_layers=2,
            channel_base=512,
            channel_max=32,
            r1=0.3,
            augment_images=200_000,
            projection_steps=200,
        ),
        optim=dict(
            lr=2e-3,
            b1=0.0,
            b2=0.99,
            ema=0.998,
            ema_warmup=True,
            # Lazy penalties: see families/stylegan2.py.
            networks=dict(
                generator=dict(lr=2e-3 * 4 / 5, b2=0.99 ** (4 / 5)),
                discriminator=dict(lr=2e-3 * 16 / 17, b2=0.99 ** (16 / 17)),
            ),
        ),
        train=dict(steps=3000, updates_per_call=10, log_every=100, save_every=1000, sample_every=1000),
        evaluate=dict(features='run:runs/classifier_digits', samples=2000),
        variants={
            'conditional': dict(data=dict(features=('image', 'label')), model=dict(conditional=True)),
            'tiny': dict(
                data=dict(batch=8),
                model=dict(
                    latent=8,
                    channel_base=64,
                    channel_max=8,
                    augmentation=('blit', 'colour'),
                    augment_p=0.5,
                    augment_every=1,
                    r1_every=2,
                    path_every=2,
                    projection_steps=2,
                ),
                train=dict(steps=4, updates_per_call=1, log_every=1, save_every=2, sample_every=0, samples=4),
                sample=dict(batch=4),
                evaluate=dict(batch=8, examples=8, features='none'),
            ),
        },
    )
