"""NCSN on CIFAR-10 as in the paper (Song & Ermon 2019): 30.1 million weights, 32x32.

    python -m jaxgen.main --config=configs/ncsn_cifar10.py

Differs: the released code dequantises images by uniform noise in training, and starts sampling from uniform noise in
[0, 1] where this starts from sigma_max times normal noise.

Time: not measured
Paper: FID 25.32, Inception Score 8.87
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        data=dict(source='cifar10', size=32, channels=3, batch=128, flip=True),
        model=dict(
            process=dict(name='geometric', timesteps=10, sigma_min=0.02, sigma_max=2.0),
            network=dict(name='refinenet', channels=128),
            training=dict(prediction='score'),
            sampler=dict(
                name='annealed_langevin', langevin_steps=100, langevin_size=1.6e-4, final_denoising=False, clip=False
            ),
            likelihood=dict(variance='fixed_small'),
        ),
        # Without a moving average, which came with NCSNv2.
        optim=dict(lr=1e-3, ema=0.0),
        train=dict(steps=200_000, log_every=100, save_every=5000, sample_every=20_000),
        variants={
            'tiny': dict(
                data=dict(source='shapes'),
                model=dict(
                    process=dict(timesteps=4), network=dict(channels=8, stages=2), sampler=dict(langevin_steps=2)
                ),
                optim=dict(warmup=2),
            ),
        },
    )
