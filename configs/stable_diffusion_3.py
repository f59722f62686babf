"""Stable Diffusion 3 medium, 1024x1024 (Esser et al. 2024, arXiv 2403.03206): flow matching by a transformer of two
streams (MMDiT) that reads two CLIP text encoders side by side, T5 behind them, and both pooled texts.

    python -m jaxgen.main --config=configs/stable_diffusion_3.py --mode=describe
    python -m jaxgen.main --mode=import --from=stable-diffusion-3-medium-diffusers --workdir=runs/sd3
    python -m jaxgen.main --mode=sample --workdir=runs/sd3 --condition=caption='a cat with a sign that says hello world'

Variants: `:medium35` and `:large35`, Stable Diffusion 3.5.

2,028,328,000 weights.

Differs: data are drawn scenes, where a person names no others; a caption is dropped for all encoders at once, and the
paper drops each of the three in 46.4 % of the examples; a table of positions of 56,623,104 numbers is computed.

Time: not measured
Paper: GenEval 0.62 at 2 billion parameters, 512 pixels (table 5)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        stages=dict(
            first='runs/kl_f8_imagenet256_sd3_size1024',
            text='runs/clip_text_l14_projection',
            text_2='runs/clip_text_l14_bigg14',
            text_3='runs/t5_xxl',
        ),
        data=dict(source='shapes', size=1024, channels=3, features=('image', 'caption'), batch=1024),
        model=dict(
            process='flow',
            network='mmdit',
            training=dict(prediction='flow', times=dict(name='logit_normal', mean=0.0, std=1.0)),
            conditioning=dict(
                caption=dict(
                    kind='text',
                    tokens=('text/before+text_2/before', 'text_3/last'),
                    pooled=('text/embedding', 'text_2/embedding'),
                    dropout=0.1,
                )
            ),
            sampler=dict(name='euler', steps=28, shift=3.0, clip=False),
            guidance=dict(scale=7.0),
            latent_scale=1.5305,
            latent_shift=0.0609,
        ),
        optim=dict(lr=1e-4, warmup=1000, ema=0.9999),
        train=dict(
            steps=500_000, log_every=100, save_every=5000, sample_every=50_000, samples=4, dtype='bfloat16', remat=True
        ),
        evaluate=dict(features='inception', samples=10_000),
        sample=dict(batch=4),
        variants={
            'medium35': dict(model=dict(network=dict(qk_norm=True, dual=13, largest=384))),
            'large35': dict(model=dict(network=dict(qk_norm=True, channels=2432, blocks=38, heads=38))),
            'tiny': dict(
                model=dict(
                    network=dict(channels=16, blocks=2, heads=2, largest=8, unit=1.0),
                    sampler=dict(steps=4),
                    likelihood=dict(steps=3),
                ),
            ),
        },
    )
