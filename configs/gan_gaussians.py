"""A GAN on 25 Gaussians that stand in a square: are all of them covered, or does it collapse onto a few?

    python -m jaxgen.main --config=configs/gan_gaussians.py
    python -m jaxgen.main --mode=evaluate --workdir=runs/gan_gaussians

`--mode=evaluate` counts the modes that samples cover and the fraction of samples that are near one. The variants have
other adversarial losses with the same networks: `minimax`, `least_squares`, `wgan_gp`, and `r1`.

Time: 2.6 minutes on one CPU core with much other work on it
Paper: none
Ours: 25 modes of 25; 0.95 of the samples within three standard deviations of one. `minimax` and `least_squares` 25 and
0.96, `wgan_gp` 25 and 0.93; `r1` not measured
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    wasserstein = dict(adversarial='wasserstein', penalty=1.0, discriminator_steps=5)
    return make(
        variant,
        family='gan',
        data=dict(source='gaussians:2', size=1, channels=3, batch=256),
        model=dict(
            adversarial='non_saturating',
            network=dict(name='mlp', hidden=(128, 128, 128)),
            latent=2,
            dequantise=True,
        ),
        optim=dict(lr=1e-3, b1=0.5, b2=0.999, ema=0.998, ema_warmup=True),
        train=dict(steps=8000, updates_per_call=50, log_every=500, save_every=4000, sample_every=4000),
        evaluate=dict(samples=2500),
        variants={
            'minimax': dict(model=dict(adversarial='minimax')),
            'least_squares': dict(model=dict(adversarial='least_squares')),
            'r1': dict(model=dict(r1=0.01)),
            'wgan_gp': dict(data=dict(batch=1280), model=wasserstein, optim=dict(b1=0.0, b2=0.9)),
            'tiny': dict(
                data=dict(batch=10, size=1),
                model=dict(network=dict(hidden=(16, 12))),
                optim=dict(lr=1e-3),
                evaluate=dict(samples=8),
            ),
        },
    )
