"""Bounds by hand, and classes of memory that add up."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from fmjax.perf.device import Peak
from fmjax.perf.memory import bytes_per_chip, memory_use
from fmjax.perf.roofline import roofline
from fmjax.train import gradient, init_state, jit_step, make_train_step
from fmjax.types import Aux

PEAK = Peak(
    bf16=100.0, memory=1e9, bandwidth=10.0, interconnect=2.0, int8=200.0, float8=400.0, host=4.0
)  # fmt: skip
SIZES: dict[str, Any] = {
    "chips": 1, "model_flops": 1, "executed_flops": 1, "moved": 1, "sent": 0, "tokens": 1
}  # fmt: skip


@pytest.mark.parametrize(
    ("moved", "sent", "limit", "step"),
    [(5, 1, "compute", 2.0), (50, 1, "memory", 5.0), (50, 20, "interconnect", 10.0)],
)
def test_the_slowest_roof_is_the_bound(moved, sent, limit, step):
    bound = roofline(
        PEAK, chips=4, model_flops=600, executed_flops=800, moved=moved, sent=sent, tokens=40,
        price=9.0,
    )  # fmt: skip
    assert (bound.limited_by, bound.step) == (limit, step)
    assert bound.mfu == pytest.approx(600 / (4 * 100 * step))
    assert bound.tokens_per_second == 40 / step
    # 36 an hour for four chips, and 1e9 tokens.
    assert bound.cost == pytest.approx(36 / 3600 * 1e9 / (40 / step))


def test_no_price_no_cost():
    assert roofline(PEAK, **SIZES).cost is None
    with pytest.raises(ValueError, match="price=-1 must not be negative"):
        roofline(PEAK, **SIZES, price=-1)


def test_products_of_8_bits_have_a_roof_of_their_own():
    of_8_bits = {"int8": 400.0, "float8_e4m3fn": 800.0}
    sizes = SIZES | {"chips": 2, "executed_flops": 1300.0}
    assert roofline(PEAK, **sizes, of_8_bits=of_8_bits).compute == (1 + 2 + 2) / 2


def test_the_hosts_link_is_a_roof_where_it_is_published():
    bound = roofline(PEAK, **SIZES, kept_by_host=100.0)
    assert (bound.limited_by, bound.step) == ("host", 25.0)
    unknown = roofline(PEAK._replace(host=None), **SIZES, kept_by_host=100.0)
    assert (unknown.limited_by, unknown.host) == ("memory", 0.0)


def test_classes_add_up():
    def loss(variables, batch, rng):
        hidden = jnp.tanh(batch["x"] @ variables["params"]["kernel"])
        return jnp.mean(hidden @ variables["frozen"]["kernel"]), Aux(jnp.ones(()), {}, {})

    tx = optax.adam(1e-3)
    step = jit_step(make_train_step(gradient(loss), tx))
    variables = {
        "params": {"kernel": jnp.ones((64, 32))},
        "frozen": {"kernel": jnp.ones((32, 8))},
    }
    state = init_state(variables, tx, jax.random.key(0), lambda path: path.startswith("params/"))
    batch = {"x": jnp.ones((16, 64))}
    compiled = step.lower(state, batch).compile()
    use = memory_use(compiled, state)
    kernel, frozen = 64 * 32 * 4, 32 * 8 * 4
    assert use.parameters == kernel + frozen
    assert use.optimizer == 2 * kernel + 4  # moments and a count
    found = compiled.memory_analysis()
    assert use.gradients + use.activations == found.temp_size_in_bytes
    assert sum(use) == use.total
    assert use.total == (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
    )
    assert use.other >= batch["x"].nbytes
    assert bytes_per_chip(state.trainable) == kernel
