"""Costs of compiled programs, against sums by hand and the count on the jaxpr."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxgen import chips, collectives, costs, describe

CHIP = chips.Chip('a chip', 1e12, 1e12, 1e9, 1e9, 1e8, 1e7, 1e9, 16, 2, 256, 'this test')


def compiled(f, *shapes, dtype=jnp.float32):
    """(text of the compiled program, FLOPs counted on the jaxpr)."""
    arguments = [jax.ShapeDtypeStruct(s, dtype) for s in shapes]
    return jax.jit(f).lower(*arguments).compile().as_text(), describe.flops(jax.make_jaxpr(f)(*arguments).jaxpr)


def conv(x, w, stride=1, groups=1, padding='SAME', **dilation):
    dims = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=dims, feature_group_count=groups, **dilation
    )


def attention(q, k, v):
    return jax.nn.dot_product_attention(q, k, v)


def loop(x, w):
    return jax.lax.scan(lambda x, _: (jnp.tanh(conv(x, w)), None), x, None, 7)[0].sum()


@pytest.mark.parametrize('f, shapes', [
    (jnp.matmul, [(5, 70), (70, 11)]),
    (partial(jnp.einsum, 'bij,bjk->bik'), [(3, 5, 7), (3, 7, 11)]),
    (conv, [(2, 9, 8, 4), (3, 3, 4, 6)]),
    (partial(conv, stride=2), [(2, 9, 8, 4), (3, 3, 4, 6)]),
    (partial(conv, groups=2), [(2, 9, 8, 4), (3, 3, 2, 6)]),
    (partial(conv, lhs_dilation=(2, 2), padding=((1, 2), (2, 1))), [(2, 9, 8, 4), (3, 3, 4, 6)]),
    (jax.grad(lambda x, w: (conv(x, w) ** 2).sum(), (0, 1)), [(2, 9, 8, 4), (3, 3, 4, 6)]),
    (jax.grad(lambda q, k, v: (attention(q, k, v) ** 2).sum(), (0, 1, 2)), [(2, 16, 2, 8)] * 3),
    (loop, [(2, 8, 8, 4), (3, 3, 4, 4)]),
    (jax.grad(loop, (0, 1)), [(2, 8, 8, 4), (3, 3, 4, 4)]),
])  # fmt: skip
def test_operations_of_a_compiled_program_are_those_of_its_jaxpr(f, shapes):
    text, expected = compiled(f, *shapes)
    assert costs.costs(text, CHIP).flops == expected > 0


def test_bytes_of_a_program_on_cpus():
    """One product: two operands are read, the result is written."""
    text, flops = compiled(jnp.matmul, (300, 200), (200, 100))
    found = costs.costs(text, CHIP)
    assert found.bytes == {'matmul': 4 * (300 * 200 + 200 * 100 + 300 * 100)}
    assert found.computing == found.bytes['matmul'] / 1e9 > flops / 1e12
    assert found.hidden == found.in_turn == found.computing


# Of a kind that the compiler for TPUs writes: tiles of 8 x 128, S(1) is memory on the chip.
TPU = """\
HloModule jit_call, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%update (stack: f32[6,100,200], row: f32[100,200], i: s32[]) -> f32[6,100,200] {
  %stack = f32[6,100,200]{2,1,0:T(8,128)} parameter(0)
  %row = f32[100,200]{1,0:T(8,128)} parameter(1)
  %i = s32[]{:T(128)S(6)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %one = f32[1,100,200]{2,1,0:T(8,128)} bitcast(%row)
  ROOT %new = f32[6,100,200]{2,1,0:T(8,128)} dynamic-update-slice(%stack, %one, %i, %zero, %zero)
}

%product (stack: f32[6,100,200], w: bf16[200,200], i: s32[]) -> f32[100,200] {
  %stack = f32[6,100,200]{2,1,0:T(8,128)} parameter(0)
  %w = bf16[200,200]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %i = s32[]{:T(128)S(6)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %slice = f32[1,100,200]{2,1,0:T(8,128)} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,100,200}
  %rows = f32[100,200]{1,0:T(8,128)} bitcast(%slice)
  ROOT %xw = f32[100,200]{1,0:T(8,128)} convolution(%rows, %w), dim_labels=bf_io->bf
}

%start (w: bf16[50,200]) -> (bf16[50,200], bf16[200,200], u32[]) {
  %w = bf16[50,200]{1,0:T(8,128)(2,1)} parameter(0)
  %gather.1 = bf16[200,200]{1,0:T(8,128)(2,1)} all-gather(%w), channel_id=5, replica_groups=[4,4]<=[16], \
dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %begun = (bf16[50,200]{1,0:T(8,128)(2,1)}, bf16[200,200]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) \
custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%end (w: bf16[50,200], whole: bf16[200,200], flag: u32[]) -> bf16[200,200] {
  %w = bf16[50,200]{1,0:T(8,128)(2,1)} parameter(0)
  %whole = bf16[200,200]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %flag = u32[]{:S(2)} parameter(2)
  %gather.2 = bf16[200,200]{1,0:T(8,128)(2,1)} all-gather(%w), channel_id=5, replica_groups=[4,4]<=[16], \
dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %ended = bf16[200,200]{1,0:T(8,128)(2,1)S(1)} custom-call(%w, %whole, %gather.2, %flag), \
custom_call_target="AsyncCollectiveDone"
}

%body (carry: (s32[], f32[6,100,200], bf16[50,200])) -> (s32[], f32[6,100,200], bf16[50,200]) {
  %carry = (s32[]{:T(128)}, f32[6,100,200]{2,1,0:T(8,128)}, bf16[50,200]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%carry), index=0
  %stack = f32[6,100,200]{2,1,0:T(8,128)} get-tuple-element(%carry), index=1
  %w = bf16[50,200]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=2
  %begin = (bf16[50,200]{1,0:T(8,128)(2,1)}, bf16[200,200]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) fusion(%w), \
kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%start
  %w.2 = bf16[50,200]{1,0:T(8,128)(2,1)} get-tuple-element(%begin), index=0
  %whole = bf16[200,200]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%begin), index=1
  %flag = u32[]{:S(2)} get-tuple-element(%begin), index=2
  %gathered = bf16[200,200]{1,0:T(8,128)(2,1)S(1)} fusion(%w.2, %whole, %flag), kind=kCustom, calls=%end
  %row = f32[100,200]{1,0:T(8,128)} fusion(%stack, %gathered, %i), kind=kOutput, calls=%product, \
metadata={op_name="jit(call)/while/body/dot_general"}, backend_config={"window_config":{"estimated_cycles":"500"}}
  %stack.2 = f32[6,100,200]{2,1,0:T(8,128)} fusion(%stack, %row, %i), kind=kLoop, calls=%update
  ROOT %next = (s32[]{:T(128)}, f32[6,100,200]{2,1,0:T(8,128)}, bf16[50,200]{1,0:T(8,128)(2,1)}) \
tuple(%i, %stack.2, %w.2)
}

%condition (carry: (s32[], f32[6,100,200], bf16[50,200])) -> pred[] {
  %carry = (s32[]{:T(128)}, f32[6,100,200]{2,1,0:T(8,128)}, bf16[50,200]{1,0:T(8,128)(2,1)}) parameter(0)
  %most = s32[]{:T(128)} constant(6)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%carry), index=0
  ROOT %less = pred[]{:T(512)S(6)} compare(%i, %most), direction=LT
}

%cheap (x: f32[100,200]) -> f32[100,200] {
  %x = f32[100,200]{1,0:T(8,128)} parameter(0)
  ROOT %same = f32[100,200]{1,0:T(8,128)} negate(%x)
}

%dear (x: f32[100,200]) -> f32[100,200] {
  %x = f32[100,200]{1,0:T(8,128)} parameter(0)
  %all = f32[100,200]{1,0:T(8,128)} all-reduce(%x), replica_groups=[1,16]<=[16], to_apply=%add
  ROOT %twice = f32[100,200]{1,0:T(8,128)} add(%all, %all)
}

ENTRY %main (s: s32[], stack: f32[6,100,200], w: bf16[50,200], which: s32[]) -> f32[100,200] {
  %s = s32[]{:T(128)} parameter(0)
  %stack = f32[6,100,200]{2,1,0:T(8,128)} parameter(1)
  %w = bf16[50,200]{1,0:T(8,128)(2,1)} parameter(2)
  %which = s32[]{:T(128)S(6)} parameter(3)
  %all = (s32[]{:T(128)}, f32[6,100,200]{2,1,0:T(8,128)}, bf16[50,200]{1,0:T(8,128)(2,1)}) tuple(%s, %stack, %w)
  %run = (s32[]{:T(128)}, f32[6,100,200]{2,1,0:T(8,128)}, bf16[50,200]{1,0:T(8,128)(2,1)}) while(%all), \
condition=%condition, body=%body
  %last = f32[6,100,200]{2,1,0:T(8,128)} get-tuple-element(%run), index=1
  %x = f32[100,200]{1,0:T(8,128)S(1)} slice(%last), slice={[0:1], [0:100], [0:200]}
  ROOT %out = f32[100,200]{1,0:T(8,128)} conditional(%which, %x, %x), branch_computations={%cheap, %dear}
}
"""
ROW = 4 * 104 * 256  # bytes of f32[100,200] in tiles
PART = 2 * 56 * 256  # of bf16[50,200]


def test_bytes_operations_and_time_of_a_program_for_tpus():
    found = costs.costs(TPU, CHIP, weights=[(200, 200)], parts=[4])
    product = 2 * 100 * 200 * 200
    assert (found.flops, found.cycles) == (6 * product, 6 * 500)
    assert found.bytes == {
        'matmul': 6 * (ROW + ROW),  # a slice of the stack in, a row out; the weights are on the chip
        'copy': 6 * (ROW + ROW) + ROW,  # a row into the stack, in place; and the slice before the branches
        'collective': 6 * PART + 2 * ROW,  # what is gathered lands on the chip; the branch that takes longest
        'other': 3 * ROW + 7 * 4,  # the sum of two arrays; the constant that the counter is compared with
    }
    assert found.seconds['matmul'] == pytest.approx(6 * max(product / 1e12, 2 * ROW / 1e9))
    sent = {(one.carrier, one.kind): one.sent for one in found.collectives}
    assert sent == {
        ('weights', 'all-gather'): 6 * 200 * 200 * 2 * 3 // 4,  # once in each round, though two fusions name it
        ('activations', 'all-reduce'): 2 * 100 * 200 * 4 * 15 // 16,
    }
    assert found.communicating == pytest.approx(sum(sent.values()) / 1e8)
    assert found.hidden == max(found.computing, found.communicating)


def test_only_the_branch_that_takes_longest_runs():
    module = collectives.parse(TPU)
    times = collectives.runs(module, costs.Accounts(module, CHIP).seconds_of)
    assert (times['dear'], times['cheap'], times['body'], times['main']) == (1, 0, 6, 1)


@pytest.mark.parametrize('text, expected', [
    ('f32[100,200]{1,0:T(8,128)}', 4 * 104 * 256), ('f32[100,200]{0,1:T(8,128)}', 4 * 128 * 200),
    ('bf16[3,5,7]{2,1,0:T(8,128)(2,1)}', 2 * 3 * 8 * 128), ('f32[7]{0:T(128)}', 4 * 128), ('f32[100,200]{1,0}', 80000),
    ('pred[]', 1), ('s4[3]{0}', 2),
])  # fmt: skip
def test_bytes_in_memory(text, expected):
    (shape,) = collectives.shapes_of(text)
    assert shape.stored == expected and shape.in_main_memory


def test_memory_on_the_chip():
    on_chip, main = collectives.shapes_of('(f32[4]{0:T(128)S(1)}, f32[4]{0:T(128)S(0)})')
    assert main.in_main_memory and not on_chip.in_main_memory


def test_higher_precision_takes_more_passes():
    text = """\
ENTRY %main (x: f32[256,256]) -> f32[256,256] {
  %x = f32[256,256]{1,0:T(8,128)S(1)} parameter(0)
  ROOT %xx = f32[256,256]{1,0:T(8,128)S(1)} convolution(%x, %x), dim_labels=bf_io->bf, \
operand_precision={highest,highest}
}
"""
    once, six = (costs.costs(t, CHIP) for t in (text.replace(', operand_precision={highest,highest}', ''), text))
    assert once.computing == pytest.approx(2 * 256**3 / 1e12) and six.computing == pytest.approx(6 * once.computing)


@pytest.mark.parametrize('text, expected', [
    ('replica_groups={{0,4},{1,5},{2,6},{3,7}}', [0, 4]), ('replica_groups=[2,4]<=[8]', [0, 1, 2, 3]),
    ('replica_groups=[4,2]<=[2,4]T(1,0)', [0, 4]), ('source_target_pairs={{3,0},{0,1}}', [3, 0]),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={2}", [0, 1, 2, 3]),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}, dimensions={2}", [0, 4]),
    ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, dimensions={2}", [0, 2, 4, 6]),
    ("replica_groups=mesh['a'=2,'b'=8] {'a','b':(2)4}", [0, 1, 2, 3, 8, 9, 10, 11]), ('replica_groups={}', []),
])  # fmt: skip
def test_first_groups(text, expected):
    assert collectives.first_group(f'(%x), channel_id=3, {text}') == expected


def test_links_of_a_group():
    """On 4 x 4 chips of a v5e an axis is a line with one link to send on; 16 chips are a ring with two."""
    v5e, v5p, h100 = (chips.CHIPS[name] for name in ('v5e', 'v5p', 'h100'))
    row, block = [(i, 0, 0) for i in range(4)], [(i, j, 0) for i in range(4) for j in range(4)]
    assert chips.group_rate(v5e, row, (4, 4)) == 50e9
    assert chips.group_rate(v5e, block, (4, 4)) == 100e9
    assert chips.group_rate(v5e, [(i, 0, 0) for i in range(16)], (16, 16)) == 100e9
    assert chips.group_rate(v5e, [(0, 0, 0)], (4, 4)) == 50e9
    assert chips.group_rate(v5p, [(i, j, k) for i, j, _ in block for k in range(4)], (4, 4, 4)) == 600e9
    assert chips.group_rate(h100, [(i,) for i in range(8)], (8,)) == 450e9
    assert chips.group_rate(h100, [(i,) for i in range(16)], (16,), joined=False) == 50e9
    assert chips.group_rate(v5e, block, (4, 4), joined=False) == 6.4e12 / 8 / 256, 'that of a pod, by its chips'


def test_a_gpu_has_no_tiles_and_no_memory_on_the_chip():
    """What is prefetched onto a TPU's chip is read from main memory once, by the instruction that needs it."""
    text = """\
ENTRY %main (w: f32[100,200], x: f32[50,100]) -> f32[50,200] {
  %w = f32[100,200]{1,0:T(8,128)} parameter(0)
  %x = f32[50,100]{1,0:T(8,128)} parameter(1)
  %start = (f32[100,200]{1,0:T(8,128)S(1)}, f32[100,200]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%w)
  %done = f32[100,200]{1,0:T(8,128)S(1)} copy-done(%start)
  ROOT %xw = f32[50,200]{1,0:T(8,128)} convolution(%x, %done), dim_labels=bf_io->bf
}
"""
    tpu, gpu = costs.costs(text, CHIP), costs.costs(text, CHIP._replace(wraps=0))
    assert tpu.bytes == {'matmul': 4 * 56 * (128 + 256), 'copy': 4 * 104 * 256}
    assert gpu.bytes == {'matmul': 4 * (100 * 200 + 50 * 100 + 50 * 200)}


def test_a_kernel_costs_what_its_author_estimates_and_its_arrays():
    text = """\
ENTRY %main (x: bf16[64,128]) -> bf16[64,128] {
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %y = bf16[64,128]{1,0:T(8,128)(2,1)} custom-call(%x), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"body":"","cost_estimate":{"flops":"5000000000","bytes_accessed":"1"}}}
}
"""
    found = costs.costs(text, CHIP)
    assert (found.flops, found.bytes) == (5_000_000_000, {'kernel': 2 * 2 * 64 * 128})
    assert found.computing == pytest.approx(5e9 / 1e12)
    bare = costs.costs(
        text.replace('"cost_estimate":{"flops":"5000000000","bytes_accessed":"1"}', ''), CHIP, kernels=8e9
    )
    assert (bare.flops, bare.bytes) == (8_000_000_000, found.bytes) and bare.computing == pytest.approx(8e9 / 1e12)
