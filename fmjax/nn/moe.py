"""A feed-forward layer of experts, of which each token passes a few."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.sharding import PartitionSpec as P

from fmjax.nn.activation import activation
from fmjax.nn.linear import Dense
from fmjax.nn.parameter import parameter
from fmjax.nn.placement import BATCH, EXPERT, axis_size, divided_over, nearest_parts, parts_over
from fmjax.nn.product import matmul

_SENT: ContextVar[bool] = ContextVar("sent_to_experts", default=False)


@contextlib.contextmanager
def sent_to_experts() -> Iterator[None]:
    """Sends each token to its own experts alone, in what is traced in the ``with`` block.

    It is what `mix_experts` computes, without what it computes in vain or twice: for counting.
    """
    token = _SENT.set(True)
    try:
        yield
    finally:
        _SENT.reset(token)


class ExpertKernels(NamedTuple):
    """The kernels of E gated feed-forwards: gate and up [E, D, F], down [E, F, D]."""

    gate: Array
    up: Array
    down: Array


def route(logits: Array, top_k: int) -> Array:
    """The share of each expert in each token's output (Jiang et al. 2024, arXiv:2401.04088, 2.1).

    Args:
        logits: [N, E].
        top_k: how many experts a token passes; their softmax is renormalised over them.

    Returns:
        float32 [N, E], zero but for the `top_k` largest, which sum to 1.
    """
    shares, chosen = _likeliest(logits, top_k)
    one_hot = jax.nn.one_hot(chosen, logits.shape[-1], dtype=jnp.float32)  # [N, top_k, E]
    return jnp.einsum("nke,nk->ne", one_hot, shares)


def _likeliest(logits: Array, top_k: int) -> tuple[Array, Array]:
    """The shares [N, top_k] of a token's experts, and which they are."""
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    largest, chosen = jax.lax.top_k(probabilities, top_k)  # [N, top_k]
    return largest / jnp.sum(largest, axis=-1, keepdims=True), chosen


def _expert(act: str, x: Array, shares: Array, kernels: ExpertKernels) -> Array:
    """One expert's part of the output, float32 [N, D]; kernels without their axis E."""
    gate = matmul(x, kernels.gate).astype(x.dtype)  # [N, F]
    up = matmul(x, kernels.up).astype(x.dtype)
    return matmul(activation(act)(gate) * up, kernels.down) * shares[:, None]


def _of_expert(kernels: ExpertKernels, index: Array) -> ExpertKernels:
    return ExpertKernels(*(jax.lax.dynamic_index_in_dim(k, index, keepdims=False) for k in kernels))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def mix_experts(act: str, x: Array, shares: Array, kernels: ExpertKernels) -> Array:
    """The sum of the experts' outputs, weighted by each token's shares; exact, nothing is dropped.

    An expert that any token chose is computed for all of them, one expert after the other; one that
    none chose is skipped and its kernels are not read. So a large batch costs E / top_k times the
    arithmetic of sending each token to its own experts alone (4 for Mixtral), while a few tokens,
    as in decoding, read the kernels of their experts alone. In exchange all shapes are known,
    tokens stay where they are (the batch axis shards as for a dense layer),
    and memory is that of one expert: the backward pass computes each anew.

    Args:
        act: name of the activation, as in config.json.
        x: [N, D].
        shares: float32 [N, E]; zero where a token does not pass an expert.
        kernels: see `ExpertKernels`.

    Returns:
        [N, D] in x's dtype.
    """

    def add(total: Array, at: tuple[Array, Array]) -> tuple[Array, None]:
        index, share = at
        update = jax.lax.cond(
            jnp.any(share != 0),
            lambda: _expert(act, x, share, _of_expert(kernels, index)),
            lambda: jnp.zeros_like(total),
        )
        return total + update, None

    experts = jnp.arange(shares.shape[-1])
    total, _ = jax.lax.scan(add, jnp.zeros(x.shape, jnp.float32), (experts, shares.T))
    return total.astype(x.dtype)


Residuals = tuple[Array, Array, ExpertKernels]


def _forward(act: str, x: Array, shares: Array, kernels: ExpertKernels) -> tuple[Array, Residuals]:
    return mix_experts(act, x, shares, kernels), (x, shares, kernels)


def _backward(act: str, residuals: Residuals, g: Array) -> tuple[Array, Array, ExpertKernels]:
    x, shares, kernels = residuals
    g32 = g.astype(jnp.float32)

    def add(dx: Array, at: tuple[Array, Array]) -> tuple[Array, tuple[Array, ExpertKernels]]:
        index, share = at

        def used() -> tuple[Array, Array, ExpertKernels]:
            _, pull = jax.vjp(partial(_expert, act), x, share, _of_expert(kernels, index))
            return pull(g32)

        def unused() -> tuple[Array, Array, ExpertKernels]:
            zeros = ExpertKernels(*(jnp.zeros(k.shape[1:], k.dtype) for k in kernels))
            return jnp.zeros_like(x), jnp.zeros_like(share), zeros

        dx_here, dshare, dkernels = jax.lax.cond(jnp.any(share != 0), used, unused)
        return dx + dx_here.astype(jnp.float32), (dshare, dkernels)

    experts = jnp.arange(shares.shape[-1])
    dx, (dshares, dkernels) = jax.lax.scan(
        add, jnp.zeros(x.shape, jnp.float32), (experts, shares.T)
    )
    return dx.astype(x.dtype), dshares.T, dkernels


mix_experts.defvjp(_forward, _backward)


def _send(act: str, x: Array, logits: Array, top_k: int, kernels: ExpertKernels) -> Array:
    """`mix_experts` of routed tokens, each of which passes its own experts alone."""
    shares, chosen = (part.reshape(-1) for part in _likeliest(logits, top_k))  # [N * top_k]
    order = jnp.argsort(chosen)  # expert by expert
    sizes = jnp.bincount(chosen, length=logits.shape[1])
    product = partial(jax.lax.ragged_dot, group_sizes=sizes, preferred_element_type=jnp.float32)
    rows = x[order // top_k]
    gate, up = (product(rows, kernel).astype(x.dtype) for kernel in (kernels.gate, kernels.up))
    y = product(activation(act)(gate) * up, kernels.down) * shares[order][:, None]
    return jnp.zeros(x.shape, jnp.float32).at[order // top_k].add(y).astype(x.dtype)


def spread_experts(act: str, x: Array, logits: Array, top_k: int, kernels: ExpertKernels) -> Array:
    """`mix_experts` of routed tokens: each part of a mesh's axis "expert" computes its experts.

    Tokens are gathered from all parts, pass the experts of each, and their sums return to where
    the tokens came from. Without such an axis, or where tokens do not divide over the mesh, each
    device has all experts of its tokens.

    Args:
        act, x, kernels: as for `mix_experts`.
        logits: [N, E].
        top_k: experts a token passes.

    Raises:
        ValueError: the experts do not divide by the axis.
    """
    if _SENT.get():
        return _send(act, x, logits, top_k, kernels)
    parts, experts = axis_size(EXPERT), logits.shape[1]
    if experts % parts:
        raise ValueError(
            f"the {experts} experts do not divide by the mesh's {EXPERT}={parts}; the nearest "
            f"sizes of {EXPERT} that do: {nearest_parts(experts, parts)}"
        )
    over = divided_over(BATCH)
    if parts == 1 or x.shape[0] % parts_over(over):
        return mix_experts(act, x, route(logits, top_k), kernels)

    def own(x: Array, logits: Array, kernels: ExpertKernels) -> Array:
        shares = route(logits, top_k)  # [n, E] of the device's n tokens
        x = jax.lax.all_gather(x, EXPERT, tiled=True)  # [parts * n, D]
        # Each part has all experts' shares of its tokens; it needs all tokens' of its experts.
        shares = jax.lax.all_to_all(shares, EXPERT, 1, 0, tiled=True)  # [parts * n, E / parts]
        y = mix_experts(act, x, shares, kernels)
        return jax.lax.psum_scatter(y, EXPERT, tiled=True)

    rows = P(over)
    return jax.shard_map(
        own,
        in_specs=(rows, rows, P(EXPERT)),
        out_specs=rows,
        axis_names=set(over),
        check_vma=False,
    )(x, logits, kernels)


class Kernel(nn.Module):
    """A parameter named "kernel" in a module of its own, as dense layers have it."""

    shape: tuple[int, ...]
    kernel_init: Callable[..., Array]

    @nn.compact
    def __call__(self) -> Array:
        return parameter(self, "kernel", self.kernel_init, self.shape)


class Experts(nn.Module):
    """A router and E gated feed-forwards, of which each token passes the `top_k` likeliest.

    Args:
        num_experts: E.
        top_k: experts a token passes.
        width: F, the inner width of an expert.
        act: name of the activation, as in config.json.
        kernel_init: initializer of the kernels.
        jitter: in training, the inputs are multiplied by numbers in 1 +- jitter (Fedus et al.
            2022, arXiv:2101.03961, section 2.4), drawn by the "dropout" key.
        train: whether to jitter.
    """

    num_experts: int
    top_k: int
    width: int
    act: str
    kernel_init: Callable[..., Array] = nn.initializers.lecun_normal()
    jitter: float = 0.0
    train: bool = False

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """[B, T, D] -> ([B, T, D], the router's logits [B * T, E])."""
        if self.train and self.jitter > 0.0:
            low, high = 1.0 - self.jitter, 1.0 + self.jitter
            noise = jax.random.uniform(self.make_rng("dropout"), x.shape, minval=low, maxval=high)
            x = x * noise.astype(x.dtype)
        tokens = x.reshape(-1, x.shape[-1])  # [N, D]
        width, experts = tokens.shape[-1], self.num_experts
        logits = Dense(experts, False, self.kernel_init, name="router")(tokens)  # [N, E]

        def kernel(name: str, inner: int, outer: int) -> Array:
            return Kernel((experts, inner, outer), self.kernel_init, name=name)()

        kernels = ExpertKernels(
            kernel("gate", width, self.width),
            kernel("up", width, self.width),
            kernel("down", self.width, width),
        )
        y: Array = spread_experts(self.act, tokens, logits, self.top_k, kernels)
        return y.reshape(x.shape), logits
