"""Hardware to compile for that need not be there: TPU slices, NVIDIA boards, the CPU at hand.

A TPU's compiler comes with libtpu and an NVIDIA GPU's with JAX's CUDA plugin; both compile for a
description of the hardware. What they give is the program that the hardware would run, with the
memory it needs; nothing runs here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from fmjax.nn.fused_attention import attention_kernel
from fmjax.perf.device import Peak, describe_machine, published_peak

TPUS = {"v4": "TPU v4", "v5e": "TPU v5e", "v5p": "TPU v5", "v6e": "TPU v6e"}
"""The published figures' keys by the names of libtpu's topologies."""

# What libtpu else asks a cloud's server; and that it may be loaded while another process has it.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}


@dataclasses.dataclass(frozen=True)
class _Board:
    """An NVIDIA board as XLA's compiler sees it.

    The numbers are the device attributes that the CUDA driver reports, in XLA's GpuTargetConfig.
    """

    kind: str
    capability: int  # the major version
    cores: int
    lanes: int
    shared: int
    shared_optin: int
    cache: int
    clock: float
    memory: int
    bandwidth: int

    def config(self) -> str:
        """The description, a GpuTargetConfigProto as text."""
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared}
  threads_per_core_limit: 2048
  core_count: {self.cores}
  fpus_per_core: {self.lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth}
  l2_cache_size: {self.cache}
  clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory}
  shared_memory_per_block_optin: {self.shared_optin}
  cuda_compute_capability {{ major: {self.capability} minor: 0 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 2 }}
device_description_str: "{self.kind}"
"""


_HOPPER = (9, 132, 128, 233472, 232448, 52428800, 1.98)
BOARDS = {
    "a100": _Board(
        "NVIDIA A100-SXM4-80GB", 8, 108, 64, 167936, 166912, 41943040, 1.41,
        85_100_068_864, 2_039_040_000_000,
    ),
    "h100": _Board("NVIDIA H100 80GB HBM3", *_HOPPER, 84_978_434_048, 3_352_320_000_000),
    "h200": _Board("NVIDIA H200", *_HOPPER, 151_397_597_184, 4_800_000_000_000),
    "b200": _Board(
        "NVIDIA B200", 10, 148, 128, 233472, 232448, 132644864, 1.965,
        191_514_411_008, 7_672_320_000_000,
    ),
}  # fmt: skip
NVLINKED = 8
"""Boards that one NVLink domain of the common servers joins; more talk over slower networks."""
_CUDNN = 91002  # 9.10.2, which the descriptions name


@dataclasses.dataclass(frozen=True)
class Target:
    """Hardware to plan for.

    Args:
        name: as the user wrote it.
        backend: "tpu", "cuda" or "cpu".
        model: its name in `TPUS` or `BOARDS`; "cpu".
        chips: how many.
        topology: of the chips, as the compiler takes it.
        peak: the published figures of a chip; None of a CPU, which has none.
        memory: bytes of a chip.
    """

    name: str
    backend: str
    model: str
    chips: int
    topology: str
    peak: Peak | None
    memory: float

    def devices(self) -> list[Any]:
        """The chips, as devices that can be compiled for (the CPU's can also run).

        Raises:
            ImportError: the compiler is not installed.
            ValueError: the compiler does not know the topology, or there are fewer CPU devices.
        """
        if self.backend == "cpu":
            there = jax.devices("cpu")
            if len(there) < self.chips:
                raise ValueError(
                    f"{self.name} needs {self.chips} CPU devices and there are {len(there)}; set "
                    f"XLA_FLAGS=--xla_force_host_platform_device_count={self.chips}"
                )
            return there[: self.chips]
        options: dict[str, Any] = {"topology_name": self.topology, "platform": "tpu"}
        if self.backend == "cuda":
            config = BOARDS[self.model].config()
            options = {
                "topology_name": self.model,
                "platform": "cuda",
                "target_config": config,
                "topology": self.topology,
            }
        else:
            for name, value in _LIBTPU.items():
                os.environ.setdefault(name, value)
            sides = [int(side) for side in self.topology.partition(":")[2].split("x")]
            # A host has 2 x 2 chips (of each 3-dimensional slice's layer), a small slice fewer.
            bounds = (min(2, sides[0]), min(2, sides[1]), 1)
            options["chips_per_host_bounds"] = bounds
            if self.model == "v4":  # both cores of a chip as one device, as a v4's runtime has it
                options["chip_config_name"] = "megacore"
        try:
            found = list(topologies.get_topology_desc(**options).devices)
        except Exception as error:
            text = str(error)
            if re.search("not installed|not implemented for", text):
                raise ImportError(_missing(self)) from error
            raise ValueError(f"the compiler refuses {self.name}: {text.splitlines()[0]}") from error
        if len(found) != self.chips:
            raise ValueError(
                f"the compiler knows {self.name} as {len(found)} devices, not {self.chips}"
            )
        return found

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """What is traced and compiled in the ``with`` block is as on the hardware itself."""
        if self.backend == "cuda":
            with _answered(BOARDS[self.model].capability), attention_kernel("cudnn"):
                yield
        elif self.backend == "tpu":
            with attention_kernel("splash"):
                yield
        else:
            yield


def _missing(target: Target) -> str:
    if target.backend == "tpu":
        return (
            f"{target.name} is compiled by libtpu, which is not installed: "
            "pip install fmjax[tpu] (no TPU is needed)"
        )
    return (
        f"{target.name} is compiled by JAX's CUDA plugin, which is not installed: "
        "pip install fmjax[cuda12] or fmjax[cuda13] (no GPU is needed)"
    )


@contextlib.contextmanager
def _answered(capability: int) -> Iterator[None]:
    """JAX asks the device at hand whether cuDNN's attention runs on it; here the target answers."""
    from jax._src.cudnn import fused_attention_stablehlo as asking

    answers = {
        "check_cudnn_version": lambda: _CUDNN,
        "check_compute_capability": lambda wanted: float(wanted) <= capability,
        "is_cuda_compute_capability_equal": lambda wanted: float(wanted) == capability,
    }
    own = {name: getattr(asking, name) for name in answers if hasattr(asking, name)}
    for name in own:
        setattr(asking, name, answers[name])
    try:
        yield
    finally:
        for name, answer in own.items():
            setattr(asking, name, answer)


def parse_target(text: str, memory: float | None = None) -> Target:
    """A target from its name: ``v5e:4x4``, ``v5p:2x2x2``, ``h100``, ``h100:8``, ``cpu``, ``cpu:4``.

    Args:
        text: the name.
        memory: bytes of a chip, instead of the published ones (of a CPU, the machine's).

    Raises:
        ValueError: an unknown name or a topology that is none; known ones are listed.
    """
    model, colon, size = text.strip().lower().partition(":")
    problem = None
    chips = 1
    if model in TPUS:
        axes = 3 if model in ("v4", "v5p") else 2
        if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)" + f"{{{axes - 1}}}", size):
            chips = math.prod(map(int, size.split("x")))
        else:
            problem = f"a {model} has {axes} axes, as in {model}:{'x'.join('2' * axes)}"
    elif model in BOARDS or model == "cpu":
        if colon and not re.fullmatch(r"[1-9]\d*", size):
            problem = f"{size!r} is no number of devices"
        else:
            chips = int(size or 1)
        if model in BOARDS and chips > NVLINKED:
            problem = f"{chips} boards: at most {NVLINKED}, which NVLink joins"
    else:
        problem = f"{model!r} is unknown"
    if memory is not None and not memory > 0:
        problem = f"a chip's memory of {memory:g} bytes must be above 0"
    if problem is not None:
        raise ValueError(
            f"target {text!r}: {problem}; known are {', '.join(f'{name}:AxB' for name in TPUS)} "
            f"(v4 and v5p AxBxC), {', '.join(BOARDS)} (or h100:8) and cpu (or cpu:4)"
        )
    if model == "cpu":
        own = describe_machine()["memory_bytes"] / chips
        return Target(text, "cpu", "cpu", chips, "", None, memory or own)
    peak = published_peak(TPUS[model] if model in TPUS else BOARDS[model].kind)
    assert peak is not None
    if model in TPUS:
        return Target(text, "tpu", model, chips, f"{model}:{size}", peak, memory or peak.memory)
    return Target(text, "cuda", model, chips, f"1x1x{chips}", peak, memory or peak.memory)


def mesh_over(devices: list[Any], axes: Mapping[str, int]) -> Mesh:
    """A mesh of these devices; axes of size 1 are left out, but for one.

    Raises:
        ValueError: the axes do not multiply to the number of devices.
    """
    if math.prod(axes.values()) != len(devices):
        raise ValueError(
            f"the mesh {dict(axes)} is of {math.prod(axes.values())} devices and the target has "
            f"{len(devices)}; make the axes multiply to {len(devices)}"
        )
    kept = {name: size for name, size in axes.items() if size > 1} or {"data": 1}
    kinds = (AxisType.Auto,) * len(kept)
    try:
        return jax.make_mesh(tuple(kept.values()), tuple(kept), axis_types=kinds, devices=devices)
    except (NotImplementedError, ValueError):  # axes that no tiling of the chips' torus gives
        grid = np.array(devices).reshape(tuple(kept.values()))
        return Mesh(grid, tuple(kept), axis_types=kinds)
