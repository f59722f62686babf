"""Random changes of images within a training step, and degradations that a model learns to undo.

    edm            non-leaky augmentation of a diffusion model's training images, whose network is conditioned on it
    diff_augment   DiffAugment, of the inputs of a GAN's discriminator
    adaptive       ADA, the same with a probability that follows the discriminator's overfitting
    corruptions    low resolution, greyscale, blur, and masks: the inputs of restoration and inpainting
    warp           affine resampling without aliasing, for edm and adaptive

All run inside the jitted update, on images float32 [n, H, W, C] in [-1, 1], each example with its own change. Crops,
mirroring and shifts by (seed, example number) are the loader's, see jaxgen/data/transforms.py.
"""
