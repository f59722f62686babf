"""Stable Diffusion XL, 1024x1024 (Podell et al. 2023, arXiv 2307.01952): a U-Net of 2.6 billion weights that reads the
hidden states of two text encoders side by side, the pooled text of the second, and the sizes and crop of the image.

    python -m jaxgen.main --config=configs/stable_diffusion_xl.py --mode=describe
    python -m jaxgen.main --mode=import --from=stable-diffusion-xl-base-1.0 --workdir=runs/sdxl
    python -m jaxgen.main --mode=sample --workdir=runs/sdxl --condition=caption='an astronaut in a jungle'

Variant: `:refiner`, whose network goes on from the base's images at the last fifth of the noise levels; it reads the
second encoder alone, and an aesthetic score in place of the target's size.

2,567,463,684 weights; 2,259,526,660 of `:refiner`.

Differs: data are drawn scenes, where a person names no others; images of several aspect ratios (section 2.3) are not
mixed in a batch. Learning rate and batch of the last phase are not published for all phases.

Time: not measured
Paper: preferred in 48.4 % of comparisons with the refiner, 36.9 % without, among four (section 2, figure 1)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        stages=dict(
            first='runs/kl_f8_imagenet256_size1024', text='runs/clip_text_l14', text_2='runs/clip_text_l14_bigg14'
        ),
        data=dict(source='shapes', size=1024, channels=3, features=('image', 'caption'), batch=2048),
        model=dict(
            process='scaled_linear',
            network=dict(
                name='latent_unet',
                channels=320,
                multipliers=(1, 2, 4),
                depths=(0, 2, 10),
                middle_depth=10,
                head_channels=64,
            ),
            conditioning=dict(
                caption=dict(
                    kind='text',
                    tokens=('text/before+text_2/before',),
                    pooled=('text_2/embedding',),
                    empty='zeros',
                    dropout=0.05,
                ),
                sizes=dict(kind='numbers'),
            ),
            sampler=dict(name='ddim', steps=50, clip=False),
            guidance=dict(scale=5.0),
            latent_scale=0.13025,
        ),
        optim=dict(name='adamw', lr=1e-5, weight_decay=0.01, ema=0.9999),
        train=dict(
            steps=600_000, log_every=100, save_every=5000, sample_every=50_000, samples=4, dtype='bfloat16', remat=True
        ),
        evaluate=dict(features='inception', samples=10_000),
        sample=dict(batch=4),
        variants={
            'refiner': dict(
                model=dict(
                    network=dict(
                        channels=384, multipliers=(1, 2, 4, 4), depths=(0, 4, 4, 0), middle_depth=4, head_channels=64
                    ),
                    conditioning=dict(
                        caption=dict(tokens=('text_2/before',), empty='encoded'),
                        sizes=dict(values=(1024.0, 1024.0, 0.0, 0.0, 6.0), absent=(1024.0, 1024.0, 0.0, 0.0, 2.5)),
                    ),
                ),
            ),
            'tiny': dict(
                model=dict(
                    process=dict(timesteps=20),
                    network=dict(
                        channels=8,
                        multipliers=(1, 2),
                        depths=(0, 2),
                        middle_depth=2,
                        blocks=1,
                        head_channels=8,
                        group_size=4,
                    ),
                    conditioning=dict(sizes=dict(features=4)),
                    sampler=dict(steps=4),
                    likelihood=dict(steps=3),
                ),
            ),
        },
    )
