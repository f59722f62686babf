"""Stable Diffusion 3's system on drawn scenes and their captions (jaxgen/data/shapes.py), 32x32: flow matching of
latents, with times near the middle drawn more often, by a transformer in which text and image are two streams (MMDiT).

    python -m jaxgen.main --config=configs/classifier_shapes.py    # for the autoencoder's perceptual distance
    python -m jaxgen.main --config=configs/kl_shapes.py:robust     # the autoencoder, whose latents these are
    python -m jaxgen.main --config=configs/clip_shapes.py          # the text encoder
    python -m jaxgen.main --config=configs/sd3_shapes.py

Commands and metrics are those of `ldm_text_shapes`. A token is one latent, 4x4 pixels.

Time: 31 minutes on two CPU cores with other work on them
Paper: none of this size
Differs: one text encoder of three
Ours: 1,296,580 parameters; of 2,000 samples of held-out captions 68.6% show the shape, 99.7% the colour, all the
background, 93.5% the size; 66.3% show all four; Fréchet distance 5.71 by the scenes' classifier
(`python -m jaxgen.main --mode=evaluate --workdir=runs/sd3_shapes --n=2000`)
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        stages=dict(first='runs/kl_shapes_robust', text='runs/clip_shapes'),
        data=dict(source='shapes', size=32, channels=3, features=('image', 'caption'), batch=64),
        model=dict(
            process='flow',
            network=dict(name='mmdit', channels=96, blocks=4, heads=4, patch=1, qk_norm=True, largest=8, unit=1.0),
            training=dict(prediction='flow', times=dict(name='logit_normal', mean=0.0, std=1.0)),
            conditioning=dict(
                caption=dict(kind='text', tokens=('text/last',), pooled=('text/embedding',), dropout=0.1)
            ),
            sampler=dict(name='euler', steps=25, clip=False),
            guidance=dict(scale=2.0),
            latent_scale=1.05,
        ),
        optim=dict(lr=1e-3, schedule='cosine', warmup=100, clip=1.0, ema=0.995, ema_warmup=True),
        train=dict(steps=4000, updates_per_call=5, log_every=50, save_every=500, sample_every=1000),
        evaluate=dict(features='run:runs/classifier_shapes', samples=2000),
        variants={
            'tiny': dict(
                model=dict(
                    network=dict(channels=16, blocks=2, heads=2, largest=16),
                    sampler=dict(steps=4),
                    likelihood=dict(steps=3),
                ),
                optim=dict(warmup=2),
            ),
        },
    )
