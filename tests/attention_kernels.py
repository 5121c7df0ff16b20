"""What the tests of attention's kernels share: operands on a mesh, and a model that attends."""

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fmjax
from fmjax.models import llama
from fmjax.nn.fused_attention import Kernel, attention_kernel
from fmjax.train import make_mesh


def rows_of(axes: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of a mesh that divide examples."""
    return tuple(name for name in axes if name != "tensor")


def laid_over(axes: Mapping[str, int], operands: tuple[jax.Array, ...]) -> tuple[Any, Any]:
    """A mesh, and queries, keys and values whose examples and heads it divides."""
    mesh = make_mesh(**axes)
    rows, heads = rows_of(axes), "tensor" if "tensor" in axes else None
    place = NamedSharding(mesh, P(rows, None, heads))
    heads_first = NamedSharding(mesh, P(rows, heads))
    return mesh, jax.device_put(operands, (place, heads_first, heads_first))


def assert_nothing_is_sent(text: str | None) -> None:
    """The program of a mesh moves no operand between devices."""
    assert text is not None
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))


def check_in_a_model(
    kernel: Kernel, length: int, named: str, program_of: Callable[[Any], Any]
) -> None:
    """A model that is scanned and recomputed has the plain way's loss and gradients.

    Args:
        kernel: instead of the plain one.
        length: of its row.
        named: what the program says where the kernel is used.
        program_of: the function of the loss whose program is looked at.
    """
    config = llama.Config(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model, variables = fmjax.create(
        "llama", config, head="causal_lm", rng=jax.random.key(0), scan=True, remat="block"
    )
    ids = jnp.arange(length)[None] % 16

    def loss(params):
        return jnp.sin(model.apply({"params": params}, ids).logits).sum()

    found = {}
    for chosen in ("plain", kernel):
        # Functions of their own: JAX remembers what it made of one before.
        with attention_kernel(chosen):
            found[chosen] = jax.jit(jax.value_and_grad(lambda p: loss(p)))(variables["params"])
            program = str(jax.make_jaxpr(program_of(lambda p: loss(p)))(variables["params"]))
        assert (named in program) == (chosen == kernel)
    chex.assert_trees_all_close(found["plain"], found[kernel], rtol=1e-4, atol=1e-4)
