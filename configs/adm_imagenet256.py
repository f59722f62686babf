r"""ADM on ImageNet 256x256, class-conditional (Dhariwal & Nichol 2021).

    python -m jaxgen.main --config=configs/adm_imagenet256.py
    python -m jaxgen.main --config=configs/adm_imagenet256.py:unconditional
    python -m jaxgen.main --config=configs/adm_imagenet256.py:size128         # and size512

Samples with classifier guidance (configs/noisy_classifier_imagenet256.py):

    python -m jaxgen.main --mode=sample --workdir=runs/adm_imagenet256 --config.model.guidance.classifier_scale=1.0 \
        --config.stages.classifier=runs/noisy_classifier_imagenet256

With `:unconditional` the published scale is 10, with `:size128` 0.5, with `:size512` 4.

The upsamplers, from 64 and from 128 pixels, which see the means of 4x4 pixels of an image and its class:

    python -m jaxgen.main --config=configs/adm_imagenet256.py:upsampler       # and upsampler512

Time: not measured
Paper: FID 10.94 without guidance, 4.59 with classifier guidance (ADM-G); `:size128` 2.97, `:size512` 7.72 with it;
3.94 and 3.85 (512 pixels) where upsamplers enlarge guided samples
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        data=dict(
            source='imagenet2012',
            size=256,
            channels=3,
            batch=256,
            flip=True,
            features=('image', 'label'),
        ),
        model=dict(
            network=dict(
                name='adm',
                channels=256,
                group_size=0,
                multipliers=(1, 1, 2, 2, 4, 4),
                blocks=2,
                attention=(32, 16, 8),
                head_channels=64,
            ),
            training=dict(variance='learned'),
            conditioning=dict(label=dict()),
            sampler=dict(steps=250, spacing='respaced'),
        ),
        optim=dict(name='adamw', lr=1e-4, ema=0.9999),
        train=dict(
            steps=1_980_000,
            log_every=100,
            save_every=5000,
            sample_every=20_000,
            samples=16,
            dtype='bfloat16',
            remat=True,
        ),
        mesh=dict(fsdp=4),
        sample=dict(batch=16),
        variants={
            'unconditional': dict(data=dict(features=('image',)), model=dict(conditioning=dict(label=None))),
            'size128': dict(
                data=dict(size=128),
                model=dict(network=dict(multipliers=(1, 1, 2, 3, 4), heads=4, head_channels=0)),
                train=dict(steps=4_360_000),
            ),
            # In float32, as published.
            'size512': dict(
                data=dict(size=512),
                model=dict(network=dict(multipliers=(0.5, 1, 1, 2, 2, 4, 4))),
                train=dict(steps=1_940_000, dtype='float32'),
            ),
            'upsampler': dict(
                data=dict(features=('image', 'label', 'low_resolution'), low_resolution=64),
                model=dict(
                    network=dict(channels=192, heads=4, head_channels=0), conditioning=dict(low_resolution=dict())
                ),
                train=dict(steps=500_000),
            ),
            'upsampler512': dict(
                data=dict(size=512, features=('image', 'label', 'low_resolution'), low_resolution=128),
                model=dict(network=dict(channels=192, attention=(32, 16)), conditioning=dict(low_resolution=dict())),
                train=dict(steps=1_050_000),
            ),
            'tiny': dict(
                data=dict(source='shapes'),
                model=dict(
                    process=dict(timesteps=20),
                    network=dict(channels=8, group_size=2, multipliers=(1,), blocks=1, attention=(), head_channels=4),
                    sampler=dict(steps=5),
                ),
                optim=dict(warmup=2),
            ),
        },
    )
