"""DDPM on CIFAR-10 as in the paper: 35.7 million weights, 32x32.

    python -m jaxgen.main --config=configs/ddpm_cifar10.py

Time: 7.2 hours on one H100 in bfloat16 (--config.train.dtype=bfloat16), by the 0.032 s an update that
  benchmarks/throughput.py measured
Paper: FID 3.17, Inception score 9.46 (Ho et al. 2020, table 1; 50,000 samples against the training set)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='diffusion',
        data=dict(source='cifar10', size=32, channels=3, batch=128, flip=True),
        model=dict(
            network=dict(channels=128, group_size=0, multipliers=(1, 2, 2, 2), blocks=2, attention=(16,), dropout=0.1)
        ),
        optim=dict(lr=2e-4, warmup=5000, clip=1.0, ema=0.9999),
        train=dict(steps=800_000, log_every=100, save_every=5000, sample_every=20_000),
        variants={
            'tiny': dict(
                data=dict(source='shapes'),
                model=dict(
                    process=dict(timesteps=20, beta_end=0.5),
                    network=dict(channels=8, group_size=4, multipliers=(1,), blocks=1, attention=()),
                ),
                optim=dict(warmup=2),
            ),
        },
    )
