"""InfoGAN on MNIST: one category of ten values and two continuous codes.

    python -m jaxgen.main --config=configs/infogan_mnist.py

`--mode=explore` shows traversals of each code (traversals.png).

Differs: weights are averaged for sampling, in the release they are not.

Time: not measured
Paper: the category matches the digit's class with 5% error (Chen et al. 2016)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='infogan',
        data=dict(source='mnist', size=28, channels=1, batch=128),
        model=dict(
            noise=62,
            categories=(10,),
            continuous=2,
            width=64,
            levels=2,
            hidden=1024,
            continuous_weight=1.0,
            slope=0.01,
            unit_deviation=True,
        ),
        optim=dict(lr=2e-4, b1=0.5, b2=0.999, ema=0.999, ema_warmup=True, networks=dict(generator=dict(lr=1e-3))),
        train=dict(steps=5000, log_every=100, save_every=1000, sample_every=1000),  # 50 times 100
        variants={
            'tiny': dict(
                data=dict(source='digits'),
                model=dict(noise=3, categories=(3,), width=4, hidden=8, recogniser_hidden=6),
                optim=dict(lr=2e-4),
            ),
        },
    )
