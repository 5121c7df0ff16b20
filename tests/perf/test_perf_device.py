"""The description of the machine and the measured peak."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from fmjax.perf.device import (
    describe_machine,
    measure_matmul_peak,
    measure_matvec_bandwidth,
    published_peak,
)


def test_description_is_json_in_the_documented_form() -> None:
    machine = describe_machine()
    assert json.loads(json.dumps(machine)) == machine
    assert list(machine) == [
        "python", "platform", "cpu", "cores", "memory_bytes", "devices", "versions",
    ]  # fmt: skip
    assert machine["cores"] == os.cpu_count()
    assert machine["memory_bytes"] > 2**28
    assert machine["cpu"]
    assert machine["versions"]["jax"] == jax.__version__
    assert sum(entry["count"] for entry in machine["devices"]) == jax.device_count()
    assert machine["devices"][0]["kind"] == jax.devices()[0].device_kind


def test_versions_import_nothing() -> None:
    code = (
        "import sys; from fmjax.perf.device import describe_machine; describe_machine();"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matmul_peak_is_a_rate(dtype) -> None:
    rate = measure_matmul_peak(dtype, shapes=[(64, 64, 64), (256, 256, 256)], repeats=3)
    assert 1e7 < rate < 1e16


def test_matmul_peak_needs_something_to_measure() -> None:
    with pytest.raises(ValueError, match="at least one shape"):
        measure_matmul_peak(jnp.float32, shapes=[])


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
    ],
)
def test_published_peaks_by_device_kind(kind: str, tflops: int) -> None:
    peak = published_peak(kind)
    assert peak is not None
    assert peak.bf16 == tflops * 1e12


def test_unknown_device_has_no_published_peak() -> None:
    assert published_peak("cpu") is None


def test_matvec_bandwidth_is_a_rate_of_memory() -> None:
    """Between what no memory is below and what no cache is above."""
    assert 1e7 < measure_matvec_bandwidth(size=256, count=4, repeats=3) < 1e14
