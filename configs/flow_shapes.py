"""Flow matching (rectified flow) on the drawn scenes (jaxgen/data/shapes.py), 32x32, by their latents of 8x8x4.

    python -m jaxgen.main --config=configs/classifier_shapes.py    # sees how alike two pictures are
    python -m jaxgen.main --config=configs/kl_shapes.py            # the autoencoder, whose latents these are
    python -m jaxgen.main --config=configs/flow_shapes.py

Time: 26.7 minutes on one CPU core with much other work on it, after 11.4 minutes of kl_shapes
Paper: none
Ours: Fréchet distance 11.3 by the scenes' classifier (500 samples), precision 0.92, recall 0.70
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        stages=dict(first='runs/kl_shapes'),
        data=dict(source='shapes', size=32, channels=3, batch=64),
        model=dict(
            process='flow',
            network=dict(channels=32, multipliers=(1, 2), blocks=2, attention=(8, 4), dropout=0.0),
            training=dict(prediction='flow', times=dict(name='logit_normal', mean=0.0, std=1.0)),
            sampler=dict(name='euler', steps=50, clip=False),
            latent_scale=0.5,
        ),
        optim=dict(lr=1.5e-3, schedule='cosine', warmup=100, clip=1.0, ema=0.998, ema_warmup=True),
        train=dict(steps=2400, updates_per_call=5, log_every=50, save_every=600, sample_every=1200),
        evaluate=dict(features='run:runs/classifier_shapes', samples=2000),
        variants={
            'tiny': dict(
                model=dict(
                    network=dict(channels=8, multipliers=(1,), blocks=1, attention=()),
                    sampler=dict(steps=4),
                    likelihood=dict(steps=3),
                ),
                optim=dict(warmup=2),
            ),
        },
    )
