"""An upsampler of the drawn scenes (jaxgen/data/shapes.py), from 8x8 to 32x32: what ADM's upsamplers are, small.

    python -m jaxgen.main --config=configs/upsampler_shapes.py

Time: 3.4 minutes on a CPU core with other work beside it
Paper: none
Ours: a classifier reads 99.8% of the colours, all backgrounds and 58% of the shapes as they are; Fréchet distance 12.3
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        data=dict(
            source='shapes', size=32, channels=3, batch=32, features=('image', 'low_resolution'), low_resolution=8
        ),
        model=dict(
            process='cosine',
            network=dict(channels=32, multipliers=(1, 2), blocks=1, attention=(), patch=2),
            training=dict(prediction='x0', weighting='min_snr'),
            conditioning=dict(low_resolution=dict()),
            sampler=dict(name='ddim', steps=50, spacing='trailing'),
            likelihood=dict(variance='fixed_small', steps=100),
        ),
        optim=dict(lr=2e-3, schedule='cosine', warmup=50, clip=1.0, ema=0.99, ema_warmup=True),
        train=dict(steps=600, log_every=50, save_every=300, sample_every=0),
        evaluate=dict(features='run:runs/classifier_shapes', samples=500, examples=64),
        variants={
            'tiny': dict(
                data=dict(low_resolution=4),
                model=dict(
                    process=dict(timesteps=20),
                    network=dict(channels=8, multipliers=(1,), attention=()),
                    sampler=dict(steps=4),
                    likelihood=dict(steps=0),
                ),
                optim=dict(warmup=2),
            ),
        },
    )
