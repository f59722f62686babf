"""FLUX's system on drawn scenes and their captions (jaxgen/data/shapes.py), 32x32: flow matching of latents by a
transformer with blocks of two streams, text and image, then of one, and rotary positions.

    python -m jaxgen.main --config=configs/classifier_shapes.py    # for the autoencoder's perceptual distance
    python -m jaxgen.main --config=configs/kl_shapes.py:robust     # the autoencoder, whose latents these are
    python -m jaxgen.main --config=configs/clip_shapes.py          # the text encoder
    python -m jaxgen.main --config=configs/flux_shapes.py

Variants distil it (jaxgen/diffusion/distillation.py): `distilled` learns the guided estimate in one evaluation, and
reads the scale, as FLUX.1-dev does; `few` learns from that one to draw in four steps, as FLUX.1-schnell does.

    python -m jaxgen.main --config=configs/flux_shapes.py:distilled    # of runs/flux_shapes
    python -m jaxgen.main --mode=sample --workdir=runs/flux_shapes_distilled --config.model.guidance.distilled=3.0
    python -m jaxgen.main --config=configs/flux_shapes.py:few          # of runs/flux_shapes_distilled

Commands and metrics are those of `ldm_text_shapes`. A token is 2x2 latents, 8x8 pixels.

Time: 42 minutes on two CPU cores with much other work on them
Paper: none
Differs: one text encoder of two, whose hidden states and embedding are read; guidance is classifier-free, distilled in
a variant; `few` is trained without a discriminator
Ours: 2,300,432 parameters; of 2,000 samples of held-out captions 59.3% show the shape, 99.5% the colour, all the
background, 90.6% the size; 56.9% show all four; Fréchet distance 6.40 by the scenes' classifier
(`python -m jaxgen.main --mode=evaluate --workdir=runs/flux_shapes --n=2000`); of 1,000 57.6% and 55.5% by
`distilled` (25 evaluations for a sample, not 50), 54.7% and 51.8% by `few` (4)
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
            network=dict(
                name='flux',
                channels=128,
                heads=4,
                blocks=2,
                single_blocks=4,
                axes=(8, 12, 12),
                patch=2,
                distilled=False,
            ),
            training=dict(prediction='flow', times=dict(name='logit_normal', mean=0.0, std=1.0)),
            conditioning=dict(
                caption=dict(kind='text', tokens=('text/last',), pooled=('text/embedding',), dropout=0.1)
            ),
            sampler=dict(name='euler', steps=25, clip=False),
            guidance=dict(scale=2.0),
            latent_scale=1.05,
        ),
        optim=dict(lr=1e-3, schedule='cosine', warmup=100, clip=1.0, ema=0.995, ema_warmup=True),
        train=dict(steps=4000, updates_per_call=5, log_every=50, save_every=500, sample_every=2000),
        evaluate=dict(features='run:runs/classifier_shapes', samples=2000),
        variants={
            'distilled': dict(
                stages=dict(teacher='runs/flux_shapes'),
                model=dict(
                    network=dict(distilled=True),
                    guidance=dict(scale=1.0, distilled=2.0),
                    distillation=dict(name='guidance', scales=(1.0, 4.0)),
                ),
                optim=dict(lr=5e-4),
                train=dict(steps=1200),
            ),
            'few': dict(
                stages=dict(teacher='runs/flux_shapes_distilled'),
                model=dict(
                    network=dict(distilled=True),
                    sampler=dict(steps=4),
                    guidance=dict(scale=1.0, distilled=2.0),
                    distillation=dict(name='progressive', steps=4, teacher_steps=3, scales=(1.0, 4.0)),
                ),
                train=dict(steps=400),
            ),
            'tiny': dict(
                model=dict(
                    network=dict(channels=16, blocks=1, single_blocks=2, heads=2, axes=(2, 2, 4)),
                    sampler=dict(steps=4),
                    likelihood=dict(steps=3),
                ),
                optim=dict(warmup=2),
            ),
        },
    )
