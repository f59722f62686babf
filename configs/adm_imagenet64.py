r"""ADM on ImageNet 64x64, class-conditional (Dhariwal & Nichol 2021).

    python -m jaxgen.main --config=configs/adm_imagenet64.py

Samples with classifier guidance (configs/noisy_classifier_imagenet64.py):

    python -m jaxgen.main --mode=sample --workdir=runs/adm_imagenet64 --config.model.guidance.classifier_scale=1.0 \
        --config.stages.classifier=runs/noisy_classifier_imagenet64

Time: not measured
Paper: FID 2.07 (with 250 steps)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        data=dict(
            source='imagenet2012',
            size=64,
            channels=3,
            batch=2048,
            flip=True,
            features=('image', 'label'),
        ),
        model=dict(
            process='cosine',
            network=dict(
                name='adm',
                channels=192,
                group_size=0,
                multipliers=(1, 2, 3, 4),
                blocks=3,
                attention=(32, 16, 8),
                head_channels=64,
                dropout=0.1,
            ),
            training=dict(variance='learned'),
            conditioning=dict(label=dict()),
            sampler=dict(steps=250, spacing='respaced'),
        ),
        optim=dict(name='adamw', lr=1e-4, ema=0.9999, accumulate=8),
        train=dict(steps=540_000, log_every=100, save_every=5000, sample_every=20_000, dtype='bfloat16'),
        mesh=dict(fsdp=4),
        variants={
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
