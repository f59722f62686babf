"""InfoGAN on drawn scenes of seven factors (jaxgen/data/shapes.py), 32x32: a category and five numbers.

    python -m jaxgen.main --config=configs/infogan_shapes.py

`--mode=evaluate` measures which factor each code came to stand for; `--mode=explore` shows traversals of each code.

With two categories, and a generator twice as fast as the discriminator, all samples of a pair became one image.

Time: 17.2 minutes on a CPU core with other work beside it
Paper: none
Ours: Fréchet distance 20.3, precision 0.94, recall 0.47; mutual information gap 0.303 (of the background 0.81, of
positions 0.58 and 0.60), beta-VAE score 0.731
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='infogan',
        data=dict(source='shapes', size=32, channels=3, features=('image', 'factors'), batch=64),
        model=dict(
            noise=32,
            categories=(8,),
            continuous=5,
            width=24,
            levels=3,
            hidden=128,
            discriminator_norm=False,
            r1=0.5,
            category_weight=0.5,
        ),
        optim=dict(lr=1e-3, b1=0.5, b2=0.99, ema=0.995, ema_warmup=True, networks=dict(generator=dict(lr=5e-4))),
        train=dict(steps=7000, updates_per_call=20, log_every=100, save_every=1000, sample_every=500),
        evaluate=dict(features='run:runs/classifier_shapes', samples=2000),
        variants={
            'tiny': dict(
                model=dict(
                    noise=3, categories=(3, 2), continuous=1, width=16, levels=2, hidden=32, recogniser_hidden=16
                ),
                optim=dict(lr=1e-3),
            ),
        },
    )
