"""DiT on ImageNet 256x256, class-conditional, on the latents of Stable Diffusion's autoencoder (Peebles & Xie 2022).

    python -m jaxgen.main --config=configs/dit_imagenet256.py

after its first stage, `configs/kl_f8_imagenet256.py`. XL/2; the others by their names, say `dit_imagenet256.py:b4`.

Time: not measured
Paper: FID 2.27 (XL/2, guidance 1.5); 68.4 for B/4 after 400,000 updates without guidance
Ours: shape-checked
"""

from jaxgen.config import make

# Blocks, channels and heads (table 1 of the paper).
SIZES = {'s': (12, 384, 6), 'b': (12, 768, 12), 'l': (24, 1024, 16), 'xl': (28, 1152, 16)}


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        stages=dict(first='runs/kl_f8_imagenet256'),
        data=dict(
            source='imagenet2012',
            size=256,
            channels=3,
            batch=256,
            flip=True,
            features=('image', 'label'),
            crop='center',
        ),
        model=dict(
            network=dict(name='dit', channels=1152, blocks=28, heads=16, patch=2),
            training=dict(variance='learned'),
            conditioning=dict(label=dict(dropout=0.1)),
            sampler=dict(steps=250, spacing='respaced', clip=False),
            guidance=dict(scale=1.5, channels=3),
            latent_scale=0.18215,
        ),
        optim=dict(lr=1e-4, ema=0.9999),
        train=dict(
            steps=7_000_000,
            log_every=100,
            save_every=5000,
            sample_every=50_000,
            samples=16,
            dtype='bfloat16',
            remat=True,
        ),
        mesh=dict(fsdp=4),
        sample=dict(batch=32),
        variants={
            **{
                f'{name}{patch}': dict(
                    model=dict(network=dict(channels=channels, blocks=blocks, heads=heads, patch=patch))
                )
                for name, (blocks, channels, heads) in SIZES.items()
                for patch in (2, 4, 8)
            },
            'tiny': dict(
                data=dict(source='shapes'),
                model=dict(
                    process=dict(timesteps=20),
                    network=dict(channels=16, blocks=2, heads=2, patch=1),
                    sampler=dict(steps=5),
                ),
            ),
        },
    )
