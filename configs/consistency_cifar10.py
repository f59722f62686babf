"""Consistency models of CIFAR-10, unconditional: without a teacher or distilled from one.

    python -m jaxgen.main --config=configs/consistency_cifar10.py             # improved training, arXiv 2310.14189
    python -m jaxgen.main --config=configs/consistency_cifar10.py:training    # the first paper's, arXiv 2303.01469
    python -m jaxgen.main --config=configs/consistency_cifar10.py:distill     # distils runs/edm_cifar10

The first paper compares images by LPIPS, whose weights are for a person to fetch (see configs/kl_f8_imagenet256.py); so
does `:training,lpips` or `:distill,lpips` with `--config.model.distance.lpips="('vgg16-397923af.pth', 'vgg.pth')"`.

Time: not measured
Paper: FID 2.83, with two evaluations (`sampler.levels=(80.0,0.821)`) 2.46; training 8.70, 5.83; distill 3.55, 2.93
Ours: shape-checked

The improved recipe's settings are those that its paper states; its code is not published. Those of the other two are
of the published code. What differs: training and distill reach the FIDs above with LPIPS, here they compare pixels
unless LPIPS is chosen; and the teacher, whose network distill takes, is EDM's DDPM++, there it is NCSN++.
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='consistency',
        data=dict(source='cifar10', size=32, channels=3, batch=1024, flip=True),
        model=dict(
            network=dict(
                name='ncsnpp',
                channels=128,
                multipliers=(2, 2, 2),
                blocks=4,
                attention=(16,),
                dropout=0.3,
                embedding='fourier',
                fourier_scale=0.02,
                resampling='fir',
                pyramid='residual',
            ),
            discretisation=dict(total_steps=400_000),
        ),
        optim=dict(name='radam', lr=1e-4, ema=0.99993),
        train=dict(steps=400_000, log_every=100, save_every=5000, sample_every=20_000),
        variants={
            'training': dict(
                data=dict(batch=512),
                model=dict(
                    network=dict(dropout=0.0, fourier_scale=16.0),
                    discretisation=dict(name='sqrt', start_scales=2, end_scales=150, total_steps=800_000),
                    times='uniform',
                    distance='l2',
                    weighting='none',
                    target=dict(name='average', decay=0.9, adaptive=True),
                ),
                optim=dict(lr=2e-4, ema=0.9999),  # the released config's
                train=dict(steps=800_000),
            ),
            'distill': dict(
                stages=dict(teacher='runs/edm_cifar10'),
                data=dict(batch=512),
                model=dict(
                    network=dict(dropout=0.0, embedding='positional', resampling='box', pyramid='none'),
                    discretisation=dict(name='constant', end_scales=17),
                    times='uniform',
                    distance='l2',
                    weighting='none',
                ),
                optim=dict(lr=4e-4, ema=0.9999),
                train=dict(steps=800_000),
            ),
            'lpips': dict(model=dict(distance='perceptual')),
            'tiny': dict(
                data=dict(source='shapes'),
                model=dict(
                    network=dict(channels=8, multipliers=(1,), blocks=1, attention=()),
                    discretisation=dict(name='doubling', start_scales=2, end_scales=8, total_steps=4),
                    sampler=dict(steps=2),
                ),
                optim=dict(warmup=2),
            ),
        },
    )
