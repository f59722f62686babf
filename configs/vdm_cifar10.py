"""Variational diffusion model on CIFAR-10 without augmentation, as in the paper: 30.6 million weights, 32x32.

    python -m jaxgen.main --config=configs/vdm_cifar10.py
    python -m jaxgen.main --config=configs/vdm_cifar10.py:augmented    # as released, 2.522 bits/dim (paper: 2.49)

Time: not measured
Paper: 2.65 bits/dim (Kingma et al. 2021, table 1); 2.637 of the weights that the authors released
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='vdm',
        data=dict(source='cifar10', size=32, channels=3, batch=128),
        model=dict(
            network=dict(channels=128, group_size=0, blocks=32, fourier=(6, 7), dropout=0.1),
            schedule=dict(gamma_min=-13.3, gamma_max=5.0),
        ),
        # Weight decay of all but biases, as in the release; the schedule's ends are not called so there.
        optim=dict(
            name='adamw',
            lr=2e-4,
            warmup=100,
            b2=0.99,
            weight_decay=0.01,
            no_decay=('bias',),
            ema=0.9999,
            networks=dict(schedule=dict(no_decay=())),
        ),
        train=dict(steps=10_000_000, log_every=1000, save_every=10_000, sample_every=100_000),
        variants={
            'augmented': dict(
                data=dict(batch=768),
                model=dict(
                    network=dict(channels=256, attention=False, dropout=0.05),
                    schedule=dict(name='network'),
                    augmentation='turns',
                ),
                optim=dict(lr=1e-4),
            ),
            'tiny': dict(
                data=dict(source='shapes'),
                model=dict(
                    network=dict(channels=8, group_size=4, blocks=2), sampler=dict(steps=5), likelihood=dict(times=3)
                ),
                optim=dict(warmup=2),
            ),
        },
    )
