"""Targets by name, and the devices that are compiled for."""

import importlib.util

import jax
import pytest

from fmjax.perf.targets import BOARDS, TPUS, mesh_over, parse_target


@pytest.mark.parametrize(
    ("text", "chips", "topology", "memory"),
    [
        ("v5e:4x4", 16, "v5e:4x4", 16e9),
        ("V5P:2x2x2", 8, "v5p:2x2x2", 95e9),
        ("v4:2x2x1", 4, "v4:2x2x1", 32e9),
        ("v6e:2x4", 8, "v6e:2x4", 32e9),
        ("h100", 1, "1x1x1", 80e9),
        ("h200:8", 8, "1x1x8", 141e9),
    ],
)
def test_targets_parse(text, chips, topology, memory):
    target = parse_target(text)
    assert (target.chips, target.topology, target.memory) == (chips, topology, memory)
    assert target.peak is not None
    assert target.peak.interconnect > 0
    assert parse_target(text, memory=1e9).memory == 1e9


def test_every_target_has_published_figures():
    for name in TPUS:
        assert parse_target(f"{name}:2x2x2" if name in ("v4", "v5p") else f"{name}:2x2").peak
    for name, board in BOARDS.items():
        assert parse_target(name).peak is not None
        assert f'device_description_str: "{board.kind}"' in board.config()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v9:2x2", "'v9' is unknown; known are v4:AxB"),
        ("v5e", "a v5e has 2 axes, as in v5e:2x2"),
        ("v5e:2x2x2", "a v5e has 2 axes"),
        ("v5p:4x4", "a v5p has 3 axes"),
        ("v5e:0x4", "a v5e has 2 axes"),
        ("h100:x", "'x' is no number of devices"),
        ("h100:", "'' is no number of devices"),
        ("h100:16", "at most 8, which NVLink joins"),
        ("cpu:0", "'0' is no number of devices"),
    ],
)
def test_bad_targets(text, said):
    with pytest.raises(ValueError, match=said):
        parse_target(text)


def test_no_memory():
    with pytest.raises(ValueError, match="must be above 0"):
        parse_target("cpu", memory=0)


def test_the_cpu_is_at_hand():
    target = parse_target("cpu:4")
    assert target.devices() == jax.devices("cpu")[:4]
    assert target.peak is None
    assert parse_target("cpu").memory == pytest.approx(4 * target.memory)
    with pytest.raises(ValueError, match="device_count=64"):
        parse_target("cpu:64").devices()


@pytest.mark.parametrize(
    ("target", "package", "extra"),
    [("v5e:2x2", "libtpu", "tpu"), ("h100:2", "jax_plugins", "cuda12")],
)
def test_compilers_that_are_not_installed(target, package, extra):
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(ImportError, match=rf"pip install fmjax\[{extra}\]"):
        parse_target(target).devices()


def test_meshes_over_devices():
    devices = jax.devices("cpu")[:4]
    assert dict(mesh_over(devices, {"data": 2, "fsdp": 1, "tensor": 2}).shape) == {
        "data": 2, "tensor": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match="make the axes multiply to 4"):
        mesh_over(devices, {"data": 2})
