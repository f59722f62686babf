"""Gated PixelCNN, class-conditional, on black and white MNIST: 0.4 million weights, 28x28.

    python -m jaxgen.main --config=configs/gated_pixelcnn_mnist.py

The sizes are those of a public port, https://github.com/anordertoreclaim/PixelCNN, which repeats the grey channel three
times; its 930 weights that nothing reads are left out. Metrics are in nats per image of 3 x 28 x 28 bits. The variant
`fixed` has the protocol of the papers, one channel, no classes and the bits of Larochelle & Murray (2011): then they
are in nats per image of 28 x 28 bits.

Differs: the port's learning rate goes up and down between 1e-4 and 1e-3 every 4,000 updates; it averages no
weights.

Time: not measured
Paper: none for this size
Ours: shape-checked
"""

from jaxgen.config import make


def get_config(variant: str = ''):
    return make(
        variant,
        family='pixelcnn',
        data=dict(source='mnist', size=28, channels=3, features=('image', 'label'), batch=32),
        model=dict(
            network=dict(name='gated', channels=30, blocks=6, kernel=7, hidden_kernel=7, head=10),
            levels=2,
            conditional=True,
        ),
        optim=dict(lr=1e-3, clip=1.0, l2=1e-4, ema=0.9995),
        train=dict(steps=50_000, log_every=100, save_every=5000, sample_every=5000),
        variants={
            'fixed': dict(
                data=dict(source='binarized_mnist', white=1, channels=1, features=('image',)),
                model=dict(conditional=False),
            ),
            'tiny': dict(
                data=dict(source='shapes'),
                model=dict(network=dict(channels=6, blocks=1, kernel=3, hidden_kernel=3)),
                optim=dict(lr=1e-2),
            ),
        },
    )
