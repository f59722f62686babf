"""A generator of one number, fitted by the Jensen-Shannon divergence of histograms to a mixture of three Gaussians.

    python -m jaxgen.main --config=configs/js_generator_gaussians.py
    python benchmarks/histograms.py --run=runs/js_generator_gaussians

Time: 2.4 minutes on 2 CPU cores with other work on them, 44 seconds of CPU time
Paper: none
Ours: 7.21 bits/dim of 256 levels (2,000 test points; the mixture's entropy is 6.94); JS 0.022 nats between histograms
of 2,000 samples and of the test points (0.006 between as many training points and them)
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='js_generator',
        data=dict(source='gaussians:1', size=1, channels=1, batch=2048),
        model=dict(latent=1, hidden=(64, 64), bins=64, smoothing=(0.5, 2.0)),
        optim=dict(lr=5e-3, schedule='cosine', ema=0.99, ema_warmup=True),
        train=dict(steps=2000, updates_per_call=50, log_every=100, save_every=1000, sample_every=1000),
        variants={
            'tiny': dict(
                data=dict(batch=64, size=1), model=dict(hidden=(8, 8), bins=16, measured=512), optim=dict(lr=1e-2)
            ),
        },
    )
