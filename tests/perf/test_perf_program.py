"""What is read from the text of compiled programs, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fmjax.perf.program import Collective, read_program
from fmjax.train import make_mesh

# From a step that XLA compiled for four TPU v5e chips: a loop whose turns only its condition tells,
# slices of stacked layers, arrays in vector memory, one gather in three kernels (one channel), a
# sum in parts that is called a whole one, and groups in three ways of writing.
TPU = """HloModule jit_f, is_scheduled=true

%fused_slice (param_0.45: bf16[4,256,512], param_1.45: s32[]) -> bf16[1,256,512] {
  %param_0.45 = bf16[4,256,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.45 = s32[]{:T(128)S(6)} parameter(1)
  %constant.121 = s32[]{:T(128)} constant(0)
  ROOT %dynamic-slice.32 = bf16[1,256,512]{2,1,0} dynamic-slice(%param_0.45, %param_1.45, %constant.121, %constant.121), dynamic_slice_sizes={1,256,512}
}

%fused_start (param_0.58: bf16[1,256,512]) -> (bf16[1,256,512], bf16[1,512,512], u32[]) {
  %param_0.58 = bf16[1,256,512]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.19 = bf16[1,512,512]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.58), channel_id=8, replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, dimensions={1}
  ROOT %custom-call.4 = (bf16[1,256,512]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,512,512]{2,1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) custom-call(%all-gather.19), custom_call_target="AsyncCollectiveStart"
}

%fused_done (param_0.66: bf16[1,256,512]) -> bf16[1,512,512] {
  %param_0.66 = bf16[1,256,512]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.23 = bf16[1,512,512]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.66), channel_id=8, replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, dimensions={1}
  ROOT %custom-call.6 = bf16[1,512,512]{2,1,0:T(8,128)(2,1)} custom-call(%param_0.66, %all-gather.23), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.clone.1 (input.2: f32[512,512]) -> f32[256,512] {
  %input.2 = f32[512,512]{1,0:T(8,128)} parameter(0)
  %all-reduce.5 = f32[512,512]{1,0:T(8,128)} all-reduce(%input.2), channel_id=5, replica_groups={{0,1},{2,3}}, to_apply=%add.clone
  %constant.127 = s32[]{:T(128)} constant(0)
  ROOT %dynamic-slice.37 = f32[256,512]{1,0:T(8,128)S(1)} dynamic-slice(%all-reduce.5, %constant.127, %constant.127), dynamic_slice_sizes={256,512}
}

%body (wide.param.4: (s32[], bf16[4,256,512], f32[512,512])) -> (s32[], bf16[4,256,512], f32[512,512]) {
  %wide.param.4 = (s32[]{:T(128)}, bf16[4,256,512]{2,1,0:T(8,128)(2,1)}, /*index=2*/f32[512,512]{1,0:T(8,128)}) parameter(0)
  %get-tuple-element.304 = s32[]{:T(128)} get-tuple-element(%wide.param.4), index=0
  %copy.9 = s32[]{:T(128)S(6)} copy(%get-tuple-element.304)
  %get-tuple-element.316 = bf16[4,256,512]{2,1,0:T(8,128)(2,1)} get-tuple-element(%wide.param.4), index=1
  %get-tuple-element.317 = f32[512,512]{1,0:T(8,128)} get-tuple-element(%wide.param.4), index=2
  %slice_fusion.4 = bf16[1,256,512]{2,1,0:T(8,128)(2,1)S(1)} fusion(%get-tuple-element.316, %copy.9), kind=kLoop, calls=%fused_slice
  %async-collective-start = (bf16[1,256,512]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,512,512]{2,1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) fusion(%slice_fusion.4), kind=kCustom, calls=%fused_start
  %async-collective-done = bf16[1,512,512]{2,1,0:T(8,128)(2,1)} fusion(%slice_fusion.4), kind=kCustom, calls=%fused_done
  %fusion.25 = f32[256,512]{1,0:T(8,128)S(1)} fusion(%get-tuple-element.317), kind=kCustom, calls=%all-reduce-scatter.clone.1
  %all-reduce.6 = f32[256,512]{1,0:T(8,128)S(1)} all-reduce(%fusion.25), channel_id=6, replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add.1.clone
  %one = s32[]{:T(128)} constant(1)
  %add.25 = s32[]{:T(128)S(6)} add(%copy.9, %one)
  ROOT %tuple.54 = (s32[]{:T(128)}, bf16[4,256,512]{2,1,0:T(8,128)(2,1)}, f32[512,512]{1,0:T(8,128)}) tuple(%add.25, %get-tuple-element.316, %get-tuple-element.317)
}

%condition (wide.param.1: (s32[], bf16[4,256,512], f32[512,512])) -> pred[] {
  %constant.52.clone.1 = s32[]{:T(128)} constant(4)
  %wide.param.1 = (s32[]{:T(128)}, bf16[4,256,512]{2,1,0:T(8,128)(2,1)}, f32[512,512]{1,0:T(8,128)}) parameter(0)
  %get-tuple-element.224 = s32[]{:T(128)} get-tuple-element(%wide.param.1), index=0
  ROOT %lt.10 = pred[]{:T(512)} compare(%get-tuple-element.224, %constant.52.clone.1), direction=LT
}

ENTRY %main (p.1: (s32[], bf16[4,256,512], f32[512,512])) -> (s32[], bf16[4,256,512], f32[512,512]) {
  %p.1 = (s32[]{:T(128)}, bf16[4,256,512]{2,1,0:T(8,128)(2,1)}, f32[512,512]{1,0:T(8,128)}) parameter(0)
  ROOT %while.1 = (s32[]{:T(128)}, bf16[4,256,512]{2,1,0:T(8,128)(2,1)}, f32[512,512]{1,0:T(8,128)}) while(%p.1), condition=%condition, body=%body
}
"""  # noqa: E501


def test_a_tpu_program():
    found = read_program(TPU, 4)
    half, whole = 512 * 512 * 2, 512 * 512 * 4
    assert sorted(found.collectives) == [
        Collective("all-gather", 2, 4, 4 * half, 4 * half // 2),
        Collective("all-reduce", 2, 4, 4 * whole // 2, 4 * whole // 2),
        Collective("reduce-scatter", 2, 4, 4 * whole, 4 * whole // 2),
    ]
    assert found.sent == 4 * (half // 2 + whole // 2 + whole // 2)
    assert found.unknown_loops == 0
    # A turn reads its layer's slice, the array whose parts are summed, and the loop's counter
    # and a constant, and writes what was gathered, once; all else lies in vector memory.
    assert found.moved == 4 * (256 * 512 * 2 + whole + 4 + 4 + half)


def test_a_loop_that_does_not_say_its_turns():
    text = TPU.replace("direction=LT", "direction=NE")
    assert read_program(text, 4).unknown_loops == 1
    assert read_program(text, 4).sent == read_program(TPU, 4).sent // 4
    noted = text.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert read_program(noted, 4).sent == read_program(TPU, 4).sent // 4 * 7


CUT = """HloModule step

%fused (p0: f32[8,16], p1: s32[8,1]) -> f32[8,1] {
  %p0 = f32[8,16]{1,0} parameter(0)
  %slice.1 = f32[8,12]{1,0} slice(%p0), slice={[0:8], [0:12]}
  %bitcast.1 = f32[96]{0} bitcast(%slice.1)
  %p1 = s32[8,1]{1,0} parameter(1)
  ROOT %USE
}

ENTRY %main (x: f32[8,16], at: s32[8,1]) -> f32[8,1] {
  %x = f32[8,16]{1,0} parameter(0)
  %at = s32[8,1]{1,0} parameter(1)
  ROOT %fusion = f32[8,1]{1,0} fusion(%x, %at), kind=kLoop, calls=%fused
}
"""


@pytest.mark.parametrize(
    ("use", "numbers"),
    [
        ("gather.1 = f32[8,1]{1,0} gather(%bitcast.1, %p1), slice_sizes={1}", 8),
        ("reduce.1 = f32[8,1]{1,0} reduce(%bitcast.1, %p1), dimensions={0}", 8 * 12),
    ],
)
def test_what_is_cut_out_twice_is_read_once(use, numbers):
    """One logit a row, out of the words without their padding."""
    written, indices = 8, 8
    assert read_program(CUT.replace("USE", use), 1).moved == 4 * (numbers + indices + written)


def test_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        read_program("HloModule empty", 1)


def test_four_devices():
    """Layers in parts are gathered in each turn of a scan, and their gradients summed."""
    layers, width, rows = 3, 32, 8
    mesh = make_mesh(fsdp=4)
    parts, examples = NamedSharding(mesh, P(None, "fsdp")), NamedSharding(mesh, P("fsdp"))

    def loss(kernels, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, kernels)[0].sum()

    step = jax.jit(jax.grad(loss), in_shardings=(parts, examples), out_shardings=parts)
    shapes = (jnp.zeros((layers, width, width)), jnp.zeros((rows, width)))
    found = read_program(step.lower(*shapes).compile().as_text(), 4)
    kernel = width * width * 4
    gathered = sum(one.payload for one in found.collectives if one.kind == "all-gather")
    assert gathered >= layers * kernel
    assert {one.group for one in found.collectives} == {4}
    sums = [one for one in found.collectives if one.kind in ("all-reduce", "reduce-scatter")]
    assert sum(one.payload for one in sums) >= layers * kernel
    assert found.moved > 2 * layers * kernel
    assert found.unknown_loops == 0


def test_bytes_are_those_that_xla_counts():
    """Of a program without loops, on a backend that counts."""
    x = jnp.zeros((64, 128))
    compiled = jax.jit(lambda x: x @ x.T).lower(x).compile()
    assert read_program(compiled.as_text(), 1).moved == compiled.cost_analysis()["bytes accessed"]
