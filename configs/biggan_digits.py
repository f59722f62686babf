"""BigGAN, small, on scikit-learn's 8x8 handwritten digits.

    python -m jaxgen.main --config=configs/biggan_digits.py
    python -m jaxgen.main --mode=sample --workdir=runs/biggan_digits --condition=label=3

`--config.model.truncation=0.7` draws samples that are more typical and less diverse.

Time: 4.2 minutes on one CPU core with other work on it
Paper: none
Ours: Fréchet distance 0.36 (500 samples), precision 0.82, recall 0.75; conditional accuracy 99.4%
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='gan',
        data=dict(source='digits', size=8, channels=1, features=('image', 'label'), batch=128),  # 2 steps of 64 images
        model=dict(
            adversarial='hinge',
            network=dict(name='biggan', width=16, multipliers=(4, 2, 1), attention=(4,), embedding=16, pooling='sum'),
            conditional='projection',
            latent=24,
            discriminator_steps=2,
            spectral=('generator', 'discriminator'),
            orthogonal=1e-4,
        ),
        optim=dict(lr=4e-4, b1=0.0, b2=0.999, ema=0.998, ema_warmup=True, networks=dict(generator=dict(lr=1e-4))),
        train=dict(steps=3000, updates_per_call=10, log_every=100, save_every=1000, sample_every=1000),
        evaluate=dict(features='run:runs/classifier_digits', samples=2000),
        variants={
            'tiny': dict(
                data=dict(batch=16),
                model=dict(network=dict(width=4, multipliers=(2, 1), attention=(8,), embedding=3), latent=4),
                optim=dict(lr=4e-4),
            ),
        },
    )
