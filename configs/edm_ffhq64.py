"""EDM on FFHQ 64x64, unconditional (Karras et al. 2022); `:ve` has NCSN++'s network.

    python -m jaxgen.main --config=configs/edm_ffhq64.py --config.data.source=folder:/where/images1024x1024/lies

FFHQ is for a person to fetch (https://github.com/NVlabs/ffhq-dataset): 70,000 faces, 1024x1024 pixels.

Time: not measured
Paper: FID 2.39, `:ve` 2.53, 79 evaluations
Ours: not measured
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        data=dict(source='folder:images1024x1024', size=64, channels=3, batch=256),
        model=dict(
            network='ncsnpp',
            ncsnpp=dict(channels=128, multipliers=(1, 2, 2, 2), blocks=4, attention=(16,), dropout=0.05),
            augmentation=0.15,
            process='ve',
            sigma_min=0.002,
            sigma_max=80.0,
            prediction='edm',
            times='lognormal',
            variance='fixed_small',
            sampler='heun',
            sample_steps=40,
            spacing='karras',
            clip=False,
            ode_steps=100,
        ),
        # 10 million images of warm-up, 200 million in all; the average's half-life is 500,000 images.
        optim=dict(lr=2e-4, warmup=39_063, ema=0.99964517),
        train=dict(steps=781_250, log_every=100, save_every=5000, sample_every=20_000),
        variants={
            've': dict(model=dict(ncsnpp=dict(embedding='fourier', resampling='fir', pyramid='residual'))),
            'tiny': dict(
                data=dict(source='shapes', size=8, batch=8),
                model=dict(
                    ncsnpp=dict(channels=8, multipliers=(1, 2), blocks=1, attention=(4,)), sample_steps=4, ode_steps=3
                ),
                optim=dict(lr=3e-3, warmup=2),
                train=dict(steps=4, log_every=1, save_every=2, sample_every=0, samples=4),
                sample=dict(batch=4),
                evaluate=dict(batch=8, examples=8),
            ),
        },
    )
