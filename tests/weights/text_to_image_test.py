"""Networks that read texts, and text encoders: those of diffusers and transformers, their weights by our tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from references import read, shaken

from jaxgen.networks import clip, controlnet, latent_unet, mmdit, t5
from jaxgen.weights import text_encoders, text_to_image

RNG = np.random.default_rng(0)


def drawn(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def their_output(module, *arguments, **named):
    torch = pytest.importorskip('torch')
    with torch.no_grad():
        named = {k: torch.tensor(x) if isinstance(x, np.ndarray) else x for k, x in named.items()}
        return module(*(torch.tensor(x) for x in arguments), **named)


def maps(x):
    """[n, H, W, C] as torch has it, or back."""
    return x.transpose(0, 3, 1, 2)


@pytest.mark.parametrize('activation', ['quick_gelu', pytest.param('gelu', marks=pytest.mark.slow)])
def test_clip(activation):
    transformers = pytest.importorskip('transformers')
    own = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, projection_dim=20)
    text = transformers.CLIPTextConfig(
        vocab_size=99, max_position_embeddings=11, hidden_act=activation, eos_token_id=98, **own
    )
    vision = transformers.CLIPVisionConfig(image_size=12, patch_size=4, hidden_act=activation, **own)
    both = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=20)
    theirs = shaken(transformers.CLIPModel(both))
    reader = clip.TextTower(99, 11, 32, 3, 4, 40, 20, activation)
    viewer = clip.VisionTower(4, 32, 3, 4, 40, 20, activation)
    tokens, images = RNG.integers(0, 97, (2, 11)), drawn(2, 12, 12, 3)
    tokens[0, 5:] = tokens[1, -1] = 98
    params = {
        'text': reader.init(jax.random.key(0), tokens)['params'],
        'vision': viewer.init(jax.random.key(0), images)['params'],
        'scale': {'value': jnp.zeros(())},
    }
    config = ConfigDict({'model': {'vision': {'patch': 4}}})
    params = read(text_encoders.clip(config, {}), params, theirs, root='')
    read_text = jax.jit(reader.apply)({'params': params['text']}, tokens)
    seen = jax.jit(viewer.apply)({'params': params['vision']}, images)
    of_text = their_output(theirs.text_model, tokens, output_hidden_states=True)
    of_image = their_output(theirs.vision_model, maps(images), output_hidden_states=True)
    outputs = their_output(theirs, tokens, maps(images))
    for ours, other in (
        (read_text.last, of_text.last_hidden_state),
        (read_text.before, of_text.hidden_states[-2]),
        (read_text.pooled, of_text.pooler_output),
        (seen.last, of_image.last_hidden_state),
        (seen.before, of_image.hidden_states[-2]),
        (seen.pooled, of_image.pooler_output),
    ):
        np.testing.assert_allclose(ours, other.detach(), atol=2e-5)
    for ours, other in ((read_text.embedding, outputs.text_embeds), (seen.embedding, outputs.image_embeds)):
        np.testing.assert_allclose(ours / np.linalg.norm(ours, axis=-1, keepdims=True), other.detach(), atol=2e-5)


def test_t5():
    transformers = pytest.importorskip('transformers')
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=6, d_ff=50, num_layers=3, num_heads=4, feed_forward_proj='gated-gelu',
        relative_attention_num_buckets=12, relative_attention_max_distance=20,
    )  # fmt: skip
    theirs = transformers.T5EncoderModel(config).eval()
    network = t5.T5Encoder(99, 32, 3, 4, 6, 50, 12, 20)
    tokens, mask = RNG.integers(0, 99, (2, 47)), np.ones((2, 47), bool)
    mask[0, 9:] = False
    params = {'text': network.init(jax.random.key(0), tokens)['params']}
    tied = ('encoder.embed_tokens.weight',)
    params = read(text_encoders.t5(ConfigDict(), {}), params, theirs, tied, '')['text']
    ours = jax.jit(network.apply)({'params': params}, tokens)
    np.testing.assert_allclose(ours, their_output(theirs, tokens).last_hidden_state, atol=2e-5)
    ours = jax.jit(network.apply)({'params': params}, tokens, mask)
    other = their_output(theirs, tokens, attention_mask=mask.astype(np.int64)).last_hidden_state
    np.testing.assert_allclose(ours[mask], other[mask], atol=2e-5)


# multipliers, depths, depth of the middle, width of a head (0: four heads), size, whether pooled vectors are read
U_NETS = {
    'stable_diffusion_1': ((1, 2, 2), (1, 1, 0), 1, 0, (16, 8), False),
    'stable_diffusion_2_at_odd_sizes': ((1, 2, 2), (1, 1, 0), 1, 8, (13, 9), False),
    'sdxl': ((1, 2, 4), (0, 2, 3), 3, 8, (7, 12), True),
}


@pytest.mark.parametrize('system', [pytest.param(s, marks=() if s == 'sdxl' else pytest.mark.slow) for s in U_NETS])
def test_latent_unet(system):
    diffusers = pytest.importorskip('diffusers')
    multipliers, depths, middle, width, size, pooled = U_NETS[system]
    kinds = ['CrossAttnDownBlock2D' if depth else 'DownBlock2D' for depth in depths]
    widths = [32 * m for m in multipliers]
    more = dict(addition_embed_type='text_time', addition_time_embed_dim=8, projection_class_embeddings_input_dim=60)
    theirs = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=widths, layers_per_block=2,
        down_block_types=kinds, up_block_types=[k.replace('Down', 'Up') for k in kinds[::-1]], cross_attention_dim=24,
        attention_head_dim=[w // width for w in widths] if width else 4, use_linear_projection=bool(width),
        transformer_layers_per_block=[max(1, depth) for depth in depths], **(more if pooled else {}),
    )  # fmt: skip
    theirs = shaken(theirs)
    network = latent_unet.LatentUNet(32, multipliers, heads=4, head_channels=width, depths=depths, middle_depth=middle)
    x, t, tokens = drawn(2, *size, 4), np.array([3, 801]), drawn(2, 7, 24)
    texts, sizes = drawn(2, 12), np.array([[64, 48, 0, 3, 64, 40], [32, 32, 1, 0, 64, 64]], np.float32)
    numbers = latent_unet.embedded_numbers(sizes, 8)
    vector = jnp.concatenate([texts, numbers], -1) if pooled else None

    def init():
        return network.init(jax.random.key(0), x, t, tokens=tokens, pooled=vector, train=False)['params']

    config = ConfigDict({'model': {'network': {'multipliers': multipliers, 'linear_projection': bool(width)}}})
    params = read(text_to_image.latent_unet(config, {}), jax.eval_shape(init), theirs)
    given = dict(added_cond_kwargs={'text_embeds': texts, 'time_ids': sizes}) if pooled else {}

    @jax.jit
    def ours(params):
        return network.apply({'params': params}, x, t, tokens=tokens, pooled=vector, train=False)

    torch = pytest.importorskip('torch')
    with torch.no_grad():
        given = {key: {k: torch.tensor(v) for k, v in value.items()} for key, value in given.items()}
        other = theirs(torch.tensor(maps(x)), torch.tensor(t), torch.tensor(tokens), **given).sample.numpy()
    np.testing.assert_allclose(ours(params), other.transpose(0, 2, 3, 1), atol=1e-5)
    assert other.std() > 0.02


# As U_NETS; then channels of the hint, channels of the image and their order, the image's size, whether maps are means
CONTROLS = {
    'stable_diffusion_1': ((1, 2, 2), (1, 1, 0), 1, 0, (16, 8), False, (4, 6, 8, 12), 3, 'bgr', (128, 64), False),
    'stable_diffusion_2_at_odd_sizes': ((1, 2), (1, 0), 1, 8, (13, 9), False, (4, 5), 1, 'rgb', (25, 18), True),
    'sdxl': ((1, 2, 4), (0, 2, 3), 3, 8, (7, 12), True, (6, 4, 5), 3, 'rgb', (28, 48), False),
}


@pytest.mark.parametrize('system', [pytest.param(s, marks=() if 'odd' in s else pytest.mark.slow) for s in CONTROLS])
def test_controlnet(system):
    diffusers = pytest.importorskip('diffusers')
    torch = pytest.importorskip('torch')
    (
        multipliers, depths, middle, width, size, pooled, hint, image_channels, order, image_size, mean,
    ) = CONTROLS[system]  # fmt: skip
    widths = [32 * m for m in multipliers]
    more = dict(addition_embed_type='text_time', addition_time_embed_dim=8, projection_class_embeddings_input_dim=60)
    theirs = diffusers.ControlNetModel(
        in_channels=4, block_out_channels=widths, layers_per_block=2, cross_attention_dim=24,
        down_block_types=['CrossAttnDownBlock2D' if depth else 'DownBlock2D' for depth in depths],
        attention_head_dim=[w // width for w in widths] if width else 4, use_linear_projection=bool(width),
        transformer_layers_per_block=[*(max(1, depth) for depth in depths[:-1]), middle],
        conditioning_channels=image_channels, controlnet_conditioning_channel_order=order,
        conditioning_embedding_out_channels=hint, global_pool_conditions=mean, **(more if pooled else {}),
    )  # fmt: skip
    theirs = shaken(theirs)
    zeros = [theirs.controlnet_cond_embedding.conv_out, *theirs.controlnet_down_blocks, theirs.controlnet_mid_block]
    for module in zeros:
        torch.nn.init.normal_(module.weight, std=0.1)
    network = controlnet.ControlNet(
        32, multipliers, heads=4, head_channels=width, depths=depths, middle_depth=middle, hint=hint,
        image_channels=image_channels, order=order, global_pool=mean,
    )  # fmt: skip
    x, t, tokens = drawn(2, *size, 4), np.array([3, 801]), drawn(2, 7, 24)
    image = RNG.uniform(size=(2, *image_size, image_channels)).astype(np.float32)
    texts, sizes = drawn(2, 12), np.array([[64, 48, 0, 3, 64, 40], [32, 32, 1, 0, 64, 64]], np.float32)
    vector = jnp.concatenate([texts, latent_unet.embedded_numbers(sizes, 8)], -1) if pooled else None
    assert controlnet.hint_size(image_size, len(hint) - 1) == size

    def init():
        return network.init(jax.random.key(0), x, t, image, tokens=tokens, pooled=vector, train=False)['params']

    config = ConfigDict({'model': {'network': {'multipliers': multipliers, 'linear_projection': bool(width)}}})
    params = read(text_to_image.controlnet(config, {}), jax.eval_shape(init), theirs, root='control/')
    given = {k: torch.tensor(v) for k, v in dict(text_embeds=texts, time_ids=sizes).items()} if pooled else None

    @jax.jit
    def ours(params):
        return network.apply({'params': params}, x, t, image, tokens=tokens, pooled=vector, train=False)

    with torch.no_grad():
        inputs = [torch.tensor(one) for one in (maps(x), t, tokens, maps(image))]
        other = theirs(*inputs, added_cond_kwargs=given)
    others = [*other.down_block_res_samples, other.mid_block_res_sample]
    made = ours(params)
    assert len(made) == len(others)
    for one, another in zip(made, others, strict=True):
        np.testing.assert_allclose(one, another.numpy().transpose(0, 2, 3, 1), atol=2e-5)
        assert another.std() > 0.02
    start = jax.jit(init)()  # a new one adds nothing
    assert all(not np.any(one) for one in ours(start))


def transformer_output(network, table, theirs, other, x, t, pooled, tokens, beside=(), **named):
    """Our output by their weights."""

    def init():
        return network.init(jax.random.key(0), x, t, tokens=tokens, pooled=pooled, **named)['params']

    params = read(table, jax.eval_shape(init), theirs, beside)

    @jax.jit
    def ours(params):
        return network.apply({'params': params}, x, t, tokens=tokens, pooled=pooled, **named)

    np.testing.assert_allclose(ours(params), other, atol=2e-5)
    assert other.std() > 0.1


@pytest.mark.parametrize(
    ('blocks', 'dual', 'qk_norm'), [pytest.param(3, 0, False, marks=pytest.mark.slow), (4, 2, True)]
)
def test_mmdit(blocks, dual, qk_norm):
    diffusers = pytest.importorskip('diffusers')
    theirs = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=blocks, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=20, caption_projection_dim=32, pooled_projection_dim=12, out_channels=4,
        pos_embed_max_size=12, qk_norm='rms_norm' if qk_norm else None, dual_attention_layers=tuple(range(dual)),
    )  # fmt: skip
    theirs = shaken(theirs)
    network = mmdit.MMDiT(32, 4, 2, blocks=blocks, dual=dual, qk_norm=qk_norm, largest=12, unit=3)
    x, t, pooled, tokens = drawn(2, 8, 12, 4), np.array([3.0, 700.0], np.float32), drawn(2, 12), drawn(2, 5, 20)
    config = ConfigDict({'model': {'network': {'blocks': blocks, 'dual': dual, 'patch': 2}}})
    other = maps_back(their_output(theirs, maps(x), tokens, pooled, t).sample)
    beside = ('pos_embed.pos_embed',)  # a table that is computed
    transformer_output(network, text_to_image.mmdit(config, {}), theirs, other, x, t, pooled, tokens, beside)


def maps_back(x):
    return x.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize('distilled', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_flux(distilled):
    diffusers = pytest.importorskip('diffusers')
    theirs = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=20, pooled_projection_dim=12, guidance_embeds=distilled, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    theirs = shaken(theirs)
    network = mmdit.Flux(32, 2, 2, blocks=2, single_blocks=3, axes=(4, 4, 8), distilled=distilled)
    x, t, pooled, tokens = drawn(2, 8, 12, 4), np.array([300.0, 900.0], np.float32), drawn(2, 12), drawn(2, 5, 20)
    packed = x.reshape(2, 4, 2, 6, 2, 4).transpose(0, 1, 3, 5, 2, 4).reshape(2, 24, 16)
    places = np.concatenate([np.zeros((4, 6, 1)), np.moveaxis(np.indices((4, 6)), 0, -1)], -1).reshape(-1, 3)
    scale = np.array([3.5, 1.0], np.float32)
    named = dict(guidance=scale) if distilled else {}
    other = their_output(
        theirs, packed, tokens, pooled, t / 1000, places.astype(np.float32), np.zeros((5, 3), np.float32), **named
    )
    other = other.sample.numpy().reshape(2, 4, 6, 4, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(2, 8, 12, 4)
    table = text_to_image.flux(ConfigDict({'model': {'network': {}}}), {})
    transformer_output(network, table, theirs, other, x, t, pooled, tokens, **named)
