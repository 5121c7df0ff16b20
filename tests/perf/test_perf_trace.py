"""Traces of devices, and the energy they draw: on a machine without one both say so."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from fmjax.perf.energy import gpu_joules, joules_per_call
from fmjax.perf.timing import Timing
from fmjax.perf.trace import device_operations, kind

ON_GPU = jax.default_backend() == "gpu"


def test_kernels_of_one_kind_have_one_name() -> None:
    names = ["loop_add_fusion_12", "fusion.388", "fusion.388.1", "fusion", "sm90_gemm_128x64_v2"]
    assert [kind(name) for name in names] == [
        "loop_add_fusion", "fusion", "fusion", "fusion", "sm90_gemm_128x64_v2",
    ]  # fmt: skip


def test_operations_of_a_trace(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"has no \*\.xplane\.pb; write one"):
        device_operations(tmp_path)
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(jnp.ones((64, 64)) @ jnp.ones((64, 64)))
    if not ON_GPU:
        with pytest.raises(ValueError, match="no operations of a device"):
            device_operations(tmp_path)
        return
    found = device_operations(tmp_path)
    assert all(one.seconds >= other.seconds for one, other in itertools.pairwise(found))


@pytest.mark.skipif(ON_GPU, reason="a GPU may count its energy")
def test_without_a_gpu_there_are_no_joules() -> None:
    calls = []
    assert gpu_joules() is None
    assert joules_per_call(lambda: calls.append(1)) is None
    assert not calls


def test_a_turn_of_several_steps_is_told_as_one() -> None:
    assert Timing(2.0, 4.0, 6.0, (4.0, 2.0, 6.0)).of_each(2) == Timing(
        1.0, 2.0, 3.0, (2.0, 1.0, 3.0)
    )
