"""The machine: what it is, what it says it can do, and what it does."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_PACKAGES = ("fmjax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers", "torch")


def describe_machine() -> dict[str, Any]:
    """The machine and the software, as plain values that go into a JSON file.

    Returns:
        {"python", "platform", "cpu", "cores", "memory_bytes", "devices", "versions"}: `devices`
        has {"platform", "kind", "count", "memory_bytes"} for each kind of JAX device
        (memory_bytes None where the backend does not say); `versions` the installed packages
        that matter, read from their metadata, nothing imported.
    """
    kinds = Counter((d.platform, d.device_kind, _device_memory(d)) for d in jax.devices())
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "devices": [
            {"platform": name, "kind": kind, "count": count, "memory_bytes": memory}
            for (name, kind, memory), count in kinds.items()
        ],
        "versions": _versions(),
    }


def _device_memory(device: Any) -> int | None:
    if device.process_index != jax.process_index():
        return None  # another host's device does not answer
    stats = device.memory_stats()
    return stats.get("bytes_limit") if stats else None


def device_memory() -> float:
    """Bytes that JAX may take of one device here; of the CPU, its share of the machine's."""
    memory = _device_memory(jax.local_devices()[0])
    if memory is None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / jax.local_device_count()
    return memory


def cpu_name() -> str:
    """The model of the processor, as its maker writes it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A name of a device, or of a processor, as part of a file's.

    >>> slug("AMD EPYC 7B13 (64 cores)")
    'amd-epyc-7b13-64-cores'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


class Peak(NamedTuple):
    """A device's published figures.

    Args:
        bf16: FLOP/s of dense products.
        memory: bytes.
        bandwidth: bytes/s of the memory.
        interconnect: bytes/s that it can send to other devices over all its links.
        int8, float8: the same of products of 8 bits; bf16's, where it has none faster.
        host: bytes/s to the host's memory, or from it; None where nobody publishes them.
    """

    bf16: float
    memory: float
    bandwidth: float
    interconnect: float
    int8: float
    float8: float
    host: float | None


# Vendors' data sheets, dense (no sparsity), one chip: NVIDIA A100, H100, H200 and B200 SXM data
# sheets; cloud.google.com/tpu/docs, "System architecture" pages of v4, v5e, v5p and v6e. Links:
# half of what is published for both directions together, NVLink's and PCIe's in the same data
# sheets, TPUs' on the same pages; v4's are six of 50 GB/s each, Jouppi et al. 2023,
# arXiv:2304.01433.
# Keys are the start of JAX's `device_kind`; the longest that fits wins.
PUBLISHED_PEAKS = {
    "NVIDIA A100": Peak(312e12, 80e9, 2.04e12, 300e9, 624e12, 312e12, 32e9),
    "NVIDIA H100": Peak(989e12, 80e9, 3.35e12, 450e9, 1979e12, 1979e12, 64e9),
    "NVIDIA H200": Peak(989e12, 141e9, 4.8e12, 450e9, 1979e12, 1979e12, 64e9),
    "NVIDIA B200": Peak(2250e12, 180e9, 7.7e12, 900e9, 4500e12, 4500e12, 64e9),
    "TPU v4": Peak(275e12, 32e9, 1.23e12, 300e9, 275e12, 275e12, None),
    "TPU v5 lite": Peak(197e12, 16e9, 0.82e12, 200e9, 393e12, 197e12, None),
    "TPU v5e": Peak(197e12, 16e9, 0.82e12, 200e9, 393e12, 197e12, None),
    "TPU v5": Peak(459e12, 95e9, 2.77e12, 600e9, 918e12, 459e12, None),
    "TPU v6 lite": Peak(918e12, 32e9, 1.64e12, 400e9, 1836e12, 918e12, None),
    "TPU v6e": Peak(918e12, 32e9, 1.64e12, 400e9, 1836e12, 918e12, None),
}


def published_peak(kind: str) -> Peak | None:
    """The published figures of a device kind (`jax.devices()[0].device_kind`), None if unknown.

    >>> published_peak("TPU v5 lite").bf16 / 1e12
    197.0
    """
    keys = [key for key in PUBLISHED_PEAKS if kind.startswith(key)]
    return PUBLISHED_PEAKS[max(keys, key=len)] if keys else None


# (M, K, N). Squares, and the products of a BERT-base layer over 1024 and 8192 tokens.
CPU_SHAPES = (
    (1024, 1024, 1024),
    (2048, 2048, 2048),
    (1024, 768, 3072),
    (1024, 3072, 768),
)
ACCELERATOR_SHAPES = (
    (4096, 4096, 4096),
    (8192, 8192, 8192),
    (8192, 768, 3072),
    (8192, 3072, 768),
)


def measure_matmul_peak(
    dtype: Any,
    *,
    shapes: Sequence[tuple[int, int, int]] | None = None,
    repeats: int = 10,
    inner: int = 4,
) -> float:
    """The best rate of a few matrix products on the default device, in FLOP/s.

    The operands have `dtype`; products accumulate in and return float32, which is what a mixed
    precision layer asks for (and on CPUs with bf16 units twice as fast as returning bf16).
    float32 operands multiply at the precision that `jax_default_matmul_precision` sets.

    Args:
        dtype: of the operands, e.g. `jnp.float32` or `jnp.bfloat16`.
        shapes: (M, K, N) of the products to try; default `CPU_SHAPES` or `ACCELERATOR_SHAPES`.
        repeats: timed runs of each shape; the fastest counts.
        inner: products in one run, so that its dispatch is spread over several.

    Returns:
        FLOP/s.

    Raises:
        ValueError: no shapes, or repeats or inner below 1.
    """
    if shapes is None:
        shapes = CPU_SHAPES if jax.default_backend() == "cpu" else ACCELERATOR_SHAPES
    if not shapes or repeats < 1 or inner < 1:
        raise ValueError(
            f"shapes={shapes!r}, repeats={repeats}, inner={inner}: give at least one shape "
            "and at least one repeat and inner product"
        )
    best = 0.0
    for m, k, n in shapes:
        lhs_rng, rhs_rng = jax.random.split(jax.random.key(0))
        lhs = jax.random.normal(lhs_rng, (m, k), dtype)
        rhs = jax.random.normal(rhs_rng, (k, n), dtype)
        jax.block_until_ready(_product(lhs, rhs))  # compiles
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready([_product(lhs, rhs) for _ in range(inner)])
            best = max(best, inner * 2 * m * k * n / (time.perf_counter() - start))
    return best


@jax.jit
def _product(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return jnp.matmul(lhs, rhs, preferred_element_type=jnp.float32)


def measure_matvec_bandwidth(*, size: int = 4096, count: int = 8, repeats: int = 10) -> float:
    """How fast float32 matrices are read by products with one vector, in bytes per second.

    Decoding one text does nothing else: each token multiplies every weight matrix by one vector.

    Args:
        size: matrices are [size, size]; together they should be larger than any cache.
        count: how many, one after the other.
        repeats: timed runs; the fastest counts.

    Returns:
        Bytes per second.
    """
    keys = jax.random.split(jax.random.key(0), count)
    matrices = [jax.random.normal(key, (size, size)) for key in keys]
    vector = jnp.ones((1, size))
    jax.block_until_ready(_matvecs(vector, matrices))  # compiles
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(_matvecs(vector, matrices))
        best = min(best, time.perf_counter() - start)
    return count * size * size * 4 / best


@jax.jit
def _matvecs(vector: jax.Array, matrices: list[jax.Array]) -> jax.Array:
    for matrix in matrices:  # each needs the one before
        vector = jnp.matmul(vector, matrix) / matrix.shape[0]
    return vector
