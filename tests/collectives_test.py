"""Collectives of compiled programs, by programs whose communication is known from arithmetic."""

from __future__ import annotations

import pytest
from support import python_on

from jaxgen import collectives as c

LOOP = """\
HloModule jit_f, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%fused_scatter (p: bf16[64,48]) -> bf16[16,48] {
  %p = bf16[64,48]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.9 = bf16[64,48]{1,0:T(8,128)(2,1)} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %cut = bf16[16,48]{1,0} dynamic-slice(%all-reduce.9, %p), dynamic_slice_sizes={16,48}
}

%body (carry: (s32[], f32[3,8,11])) -> (s32[], f32[3,8,11]) {
  %carry = (s32[], f32[3,8,11]{2,1,0}) parameter(0)
  %w = f32[2,48]{1,0} get-tuple-element(%carry), index=1
  %x = f32[4,5,48]{2,1,0} get-tuple-element(%carry), index=1
  %gathered = (f32[2,48]{1,0}, f32[8,48]{1,0}) all-gather-start(%w), channel_id=1, \
replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, metadata={op_name="jit(f)/while/body/calls=%nothing"}
  %done = f32[8,48]{1,0} all-gather-done(%gathered)
  ROOT %moved = f32[4,5,48]{2,1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
}

%condition (carry: (s32[], f32[3,8,11])) -> pred[] {
  %carry = (s32[], f32[3,8,11]{2,1,0}) parameter(0)
  %most = s32[] constant(7)
  %i = s32[] get-tuple-element(%carry), index=0
  ROOT %less = pred[] compare(%i, %most), direction=LT
}

ENTRY %main (p: f32[3,8,11]) -> f32[] {
  %p = f32[3,8,11]{2,1,0} parameter(0)
  %g = bf16[64,48]{1,0} parameter(1)
  %s = f32[] parameter(2)
  %start = (s32[], f32[3,8,11]{2,1,0}) tuple(%s, %p)
  %loop = (s32[], f32[3,8,11]{2,1,0}) while(%start), condition=%condition, body=%body
  %again = (s32[], f32[3,8,11]{2,1,0}) while(%start), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %scattered = bf16[16,48]{1,0} fusion(%g), kind=kCustom, calls=%fused_scatter
  %both = (f32[], f32[3,8,11]{2,1,0}) all-reduce(%s, %p), replica_groups={}, to_apply=%add
  ROOT %out = f32[] get-tuple-element(%both), index=0
}
"""


def test_loops_count_as_often_as_they_run_and_carriers_go_by_shape():
    found = c.collectives(LOOP, weights=[(6, 8, 48), (48, 64)], parts=[4], small=16)
    records = {(one.kind, one.shape.dtype, one.shape.dims, one.group, one.times, one.carrier) for one in found}
    assert records == {
        ('all-gather', 'f32', (8, 48), 4, 12, 'weights'),  # a layer of the stack, 7 + 5 times
        ('collective-permute', 'f32', (4, 5, 48), 0, 12, 'activations'),
        ('reduce-scatter', 'bf16', (64, 48), 4, 1, 'weights'),  # transposed
        ('all-reduce', 'f32', (), 0, 1, 'small'),
        ('all-reduce', 'f32', (3, 8, 11), 0, 1, 'activations'),
    }
    assert c.totals(found)['weights', 'all-gather'] == 12 * 8 * 48 * 4
    assert next(one for one in found if one.kind == 'all-gather').sent == 12 * 8 * 48 * 4 * 3 // 4
    assert next(one for one in found if one.kind == 'reduce-scatter').sent == 64 * 48 * 2 * 3 // 4


PADDED = """\
HloModule jit_f, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter (input: bf16[48,64]) -> bf16[48,18] {
  %input = bf16[48,64]{0,1:T(8,128)(2,1)} parameter(0)
  %zero = bf16[] constant(0)
  %filled = bf16[48,72]{0,1:T(8,128)(2,1)} pad(%input, %zero), padding=0_0x0_8
  %all-reduce.1 = bf16[48,72]{0,1:T(8,128)(2,1)} all-reduce(%filled), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %cut = bf16[48,18]{0,1} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={48,18}
}

%all-reduce-scatter.2 (input: bf16[40,64]) -> bf16[40,18] {
  %input = bf16[40,64]{0,1:T(8,128)(2,1)} parameter(0)
  %zero = bf16[] constant(0)
  %filled = bf16[40,72]{0,1:T(8,128)(2,1)} pad(%input, %zero), padding=0_0x0_8
  %all-reduce.2 = bf16[40,72]{0,1:T(8,128)(2,1)} all-reduce(%filled), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %cut = bf16[40,18]{0,1} dynamic-slice(%all-reduce.2, %zero, %zero), dynamic_slice_sizes={40,18}
}

%two (a: bf16[48,64], b: bf16[40,64]) -> (bf16[40,72], bf16[48,72]) {
  %a = bf16[48,64]{0,1} parameter(0)
  %b = bf16[40,64]{0,1} parameter(1)
  %zero = bf16[] constant(0)
  %more = bf16[48,72]{0,1} pad(%a, %zero), padding=0_0x0_8
  %less = bf16[40,72]{0,1} pad(%b, %zero), padding=0_0x0_8
  ROOT %both = (bf16[40,72]{0,1}, bf16[48,72]{0,1}) tuple(%less, %more)
}

ENTRY %main (g: bf16[48,64], h: bf16[40,64]) -> bf16[48,6] {
  %g = bf16[48,64]{0,1} parameter(0)
  %h = bf16[40,64]{0,1} parameter(1)
  %part = bf16[48,18]{0,1} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
  %edge = bf16[48,6]{0,1} slice(%part), slice={[0:48], [12:18]}
  %shifted = bf16[48,6]{0,1} collective-permute(%edge), source_target_pairs={{0,1},{1,2},{2,3}}
  %other = bf16[40,18]{0,1} fusion(%h), kind=kCustom, calls=%all-reduce-scatter.2
  %scaled = bf16[48,18]{0,1} multiply(%part, %part)
  %product = bf16[48,18]{0,1} collective-permute(%scaled), source_target_pairs={{0,1},{1,2},{2,3}}
  %pair = (bf16[40,72]{0,1}, bf16[48,72]{0,1}) fusion(%g, %h), kind=kLoop, calls=%two
  %first = bf16[40,72]{0,1} get-tuple-element(%pair), index=0
  %second = bf16[48,72]{0,1} get-tuple-element(%pair), index=1
  ROOT %sums = (bf16[40,72]{0,1}, bf16[48,72]{0,1}) all-reduce(%first, %second), replica_groups=[2,4]<=[8], \
to_apply=%add
}
"""


def test_what_the_compiler_fills_up_cuts_or_shifts_keeps_its_carrier():
    """A gradient of 48 x 64 numbers that is filled up to 48 x 72 before it is scattered over 4, and its shift to parts
    of 16; beside it the same of an array that is no weight, and a product."""
    found = c.collectives(PADDED, weights=[(48, 64)], parts=[4], small=16)
    carriers = {(one.kind, one.shape.dims, one.name): one.carrier for one in found}
    assert carriers == {
        ('reduce-scatter', (48, 72), 'all-reduce.1'): 'weights',
        ('collective-permute', (48, 6), 'shifted'): 'weights',
        ('reduce-scatter', (40, 72), 'all-reduce.2'): 'activations',
        ('collective-permute', (48, 18), 'product'): 'activations',
        ('all-reduce', (40, 72), 'sums'): 'activations',
        ('all-reduce', (48, 72), 'sums'): 'weights',
    }
    assert {one.bytes for one in found if one.name == 'all-reduce.1'} == {48 * 72 * 2}  # as it is sent


@pytest.mark.parametrize('dims, expected', [
    ((8, 48), True), ((48, 8), True), ((1, 8, 48), True), ((384,), True), ((6, 384), True), ((2, 48), True),
    ((8, 12), True), ((4, 2, 48), True), ((16, 24), False), ((8, 40), False), ((6, 8), False), ((24, 8), False),
])  # fmt: skip
def test_shapes_of_weights(dims, expected):
    """Whole, a layer, a part, transposed, with axes merged or one in pieces; not any array of the same size."""
    assert (dims in c.Weights([(6, 8, 48)], [4])) is expected


@pytest.mark.parametrize('text, expected', [
    ('replica_groups={{0,4},{1,5},{2,6},{3,7}}, x={1}', 2), ('replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}', 4),
    ("replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}, dimensions={2}", 4),
    ("replica_groups=mesh['a'=2,'b'=8] {'a','b':(2)4}", 8), ('replica_groups={}, to_apply=%add', 0),
])  # fmt: skip
def test_groups(text, expected):
    assert c.group_size(f'(%x), channel_id=3, {text}') == expected


@pytest.mark.parametrize('condition, expected', [
    ('%most = s32[] constant(7)\n  ROOT %less = pred[] compare(%i, %most), direction=LT', 5),
    ('%most = s32[] constant(7)\n  ROOT %less = pred[] compare(%i, %most), direction=LE', 6),
    ('%n = s32[] get-tuple-element(%carry), index=1\n  ROOT %less = pred[] compare(%i, %n), direction=LT', 28),
    ('%n = s32[] get-tuple-element(%carry), index=1\n  ROOT %f = pred[] fusion(%n, %i), kind=kLoop, calls=%fused', 28),
    ('%most = s32[] constant(7)\n  ROOT %more = pred[] compare(%most, %i), direction=GT', 5),
    ('%x = f32[] constant(100)\n  %y = f32[] convert(%i)\n  ROOT %more = pred[] compare(%y, %x), direction=LT', 1),
    ('%n = s32[] constant(7)\n  %l = pred[] compare(%i, %n), direction=LT\n  ROOT %and = pred[] and(%l, %i)', 1),
])  # fmt: skip
def test_trips_of_a_loop(condition, expected):
    """The counter starts from 2; its bound is a constant of the condition, or among what the loop begins with. A loop
    that goes on by anything else counts once."""
    module = c.parse(f"""\
%fused (p: s32[], q: s32[]) -> pred[] {{
  %p = s32[] parameter(0)
  %q = s32[] parameter(1)
  ROOT %lt = pred[] compare(%q, %p), direction=LT
}}
%condition (carry: (s32[], s32[])) -> pred[] {{
  %carry = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  {condition}
}}
%body (carry: (s32[], s32[])) -> (s32[], s32[]) {{
  ROOT %carry = (s32[], s32[]) parameter(0)
}}
ENTRY %main (x: f32[]) -> (s32[], s32[]) {{
  %two = s32[] constant(2)
  %start = s32[] copy(%two)
  %bound = s32[] constant(30)
  %begin = (s32[], s32[]) tuple(%start, %bound)
  ROOT %loop = (s32[], s32[]) while(%begin), condition=%condition, body=%body
}}
""")
    assert c.trips(module, module.computations['main']['loop']) == expected


def test_what_goes_between_slices_is_sent_by_their_hosts():
    text = """\
ENTRY %main (g: f32[64,48]) -> f32[64,48] {
  %g = f32[64,48]{1,0} parameter(0)
  %now = token[] after-all()
  %send = (f32[64,48]{1,0}, u32[], token[]) send(%g, %now), channel_id=8, is_host_transfer=true, frontend_attributes={\
_xla_megascale_target="{1:3}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), channel_id=8, is_host_transfer=true
  %recv = (f32[64,48]{1,0}, u32[], token[]) recv(%now), channel_id=9, is_host_transfer=true
  %got = (f32[64,48]{1,0}, token[]) recv-done(%recv), channel_id=9, is_host_transfer=true
  ROOT %sum = f32[64,48]{1,0} get-tuple-element(%got), index=0
}
"""
    (found,) = c.collectives(text, weights=[(64, 48)], small=16)
    assert (found.kind, found.group, found.carrier, found.bytes) == ('all-reduce', 3, 'weights', 4 * 64 * 48)
    assert found.sent == 2 * found.bytes * 2 // 3


def test_a_kernels_description_of_several_lines_ends_no_computation():
    kernel = """%k = f32[8,48]{1,0} custom-call(%p), custom_call_target="tpu_custom_call", backend_config={"a":"{
"b": "x = y(",
}", "c": {
}}, metadata={op_name="jit(f)/kernel"}
"""
    text = f'ENTRY %main (p: f32[8,48]) -> f32[8,48] {{\n  %p = f32[8,48]{{1,0}} parameter(0)\n  {kernel}'
    text += '  ROOT %sum = f32[8,48]{1,0} all-reduce(%k), replica_groups={{0,1}}, to_apply=%add\n}\n'
    body = c.parse(text).computations['main']
    assert list(body) == ['p', 'k', 'sum'] and body['k'].op_name == 'jit(f)/kernel' and body['sum'].root
    assert [one.kind for one in c.collectives(text)] == ['all-reduce']


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match='no entry'):
        c.parse('HloModule nothing')


def test_a_program_of_eight_devices():
    """A batch cut over 8 against a stack of 3 cut matrices, gathered in the loop: 3 gathers of [64, 96]; the gradient's
    reduction is of the same size."""
    code = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxgen import collectives
mesh = jax.make_mesh((2, 4), ('data', 'fsdp'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
put = lambda *spec: NamedSharding(mesh, P(*spec))
def loss(w, x):
    def one(x, w):
        w = jax.lax.with_sharding_constraint(w, put())
        return jnp.tanh(jax.lax.with_sharding_constraint(x @ w @ w.T, put(('data', 'fsdp')))), None
    return jax.lax.scan(one, x, w)[0].sum()
w, x = jax.ShapeDtypeStruct((3, 64, 96), 'float32', sharding=put(None, None, 'fsdp')), None
x = jax.ShapeDtypeStruct((40, 64), 'float32', sharding=put(('data', 'fsdp')))
found = collectives.collectives(jax.jit(loss).lower(w, x).compile().as_text(), [w.shape], [4], small=1)
assert collectives.totals(found) == {('small', 'all-reduce'): 4, ('weights', 'all-gather'): 3 * 64 * 96 * 4}, found
assert {one.group for one in found if one.carrier == 'weights'} == {4}
"""
    done = python_on(8, code)
    assert done.returncode == 0, done.stderr[-2000:]
