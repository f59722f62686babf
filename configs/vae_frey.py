"""VAE with a VampPrior on the Frey faces, 28x20 in 256 grey levels: 40 latents, gated layers of 300.

    python -m jaxgen.main --config=configs/vae_frey.py
    python -m jaxgen.main --mode=evaluate --workdir=runs/vae_frey --step=best --config.model.iwae_samples=5000

The data are frey_rawface.mat in the working directory; --config.data.source names another place. About 1,565 images
train, 200 are held out for validation and 200 for testing. Pixels are discretised logistics, mean and scale of each by
the decoder. Training stops after 50 epochs without a smaller bound of the validation set. The variant `normal` has the
prior N(0, I), the variant `two` a second level of latents.

Differs: the encoder's input lies in [0, 1] in the release, here in [-1, 1]; a level's probability is at least 1e-7
there, and the first and last level have their bin's mass alone, here they have the tails; gradient norms are there
those of a gated layer's two matrices each, here of both together.

Time: not measured
Paper: none in nats (Tomczak & Welling 2017)
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='vae',
        data=dict(
            source='mat:frey_rawface.mat?image=ff&layout=(HW)N&size=28x20',
            size=(28, 20),
            channels=1,
            batch=100,
            test_fraction=200 / 1965,
            validation_fraction=200 / 1765,
        ),
        model=dict(
            network='gated',
            hidden=(300, 300),
            latent=40,
            prior='vamp',
            pseudo_inputs=500,
            pseudo_mean=0.8,
            likelihood='discretised_logistic',
            scales='pixel',
            scale=2.0,
            scale_range=(0.0222, 2.0),  # e^-4.5 to 1 of pixels in [0, 1]
            bounded_mean=True,
            beta_warmup=1600,  # 100 epochs
            iwae_samples=1,
        ),
        optim=dict(lr=5e-4, normalise=True, ema=0.999, ema_warmup=True),
        train=dict(
            steps=32_000,
            updates_per_call=16,
            log_every=400,
            save_every=1600,
            sample_every=3200,
            held_out_every=16,
            stop_on='validation/nll_elbo',
            patience=50,
        ),
        variants={
            'normal': dict(model=dict(prior='normal')),
            'two': dict(model=dict(latent2=40)),
            'tiny': dict(
                data=dict(source='digits', size=(8, 6), test_fraction=0.2, validation_fraction=0.0),
                model=dict(hidden=(16, 12), latent=4, pseudo_inputs=5, beta_warmup=2, iwae_samples=3),
            ),
        },
    )
