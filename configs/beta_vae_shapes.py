"""beta-VAE with beta = 4 on drawn scenes of seven factors (jaxgen/data/shapes.py), 32x32.

    python -m jaxgen.main --config=configs/beta_vae_shapes.py

`--mode=evaluate` measures disentanglement of the latents; `--mode=explore` traverses each of them. The
variant `vae` has beta = 1.

Time: 9.3 minutes on one CPU core with other work on it, 5.5 minutes of CPU time
Paper: none
Ours: mutual information gap 0.158, beta-VAE score 0.448; five of ten latents in use. `vae`: 0.132 and 0.452
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='vae',
        data=dict(source='shapes', size=32, channels=3, features=('image', 'factors'), batch=64),
        model=dict(network='conv', width=8, levels=3, latent=10, activation='silu', likelihood='bernoulli', beta=4.0),
        optim=dict(lr=2e-3, schedule='cosine', warmup=100, ema=0.999, ema_warmup=True),
        train=dict(steps=4000, updates_per_call=20, log_every=200, save_every=1000, sample_every=2000),
        evaluate=dict(features='run:runs/classifier_shapes', samples=2000),
        variants={
            'vae': dict(model=dict(beta=1.0)),
            'tiny': dict(
                model=dict(
                    width=4, levels=1, latent=4, activation='relu', likelihood='gaussian', scale=0.3, iwae_samples=3
                ),
                optim=dict(lr=1e-2, warmup=0),
            ),
        },
    )
