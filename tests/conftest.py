"""Four devices on any machine, no network, and few compilations."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest
from hypothesis import settings

# Compiling takes longer than any deadline, and drawn examples must not differ between machines.
settings.register_profile("fmjax", deadline=None, derandomize=True, max_examples=20)
settings.load_profile("fmjax")


@pytest.fixture
def rng():
    """A typed random key."""
    return jax.random.key(0)
