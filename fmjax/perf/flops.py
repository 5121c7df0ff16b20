"""Model FLOPs: the multiply-adds of the matrix products and convolutions in a function's jaxpr.

Counted on the program as traced, before any compiler sees it, so the number belongs to the
mathematics and not to a backend. What is counted: `dot_general`, `ragged_dot_general`,
`conv_general_dilated` and fused attention: cuDNN's, the TPU's, and the one in blocks on CPUs. What
is not: element-wise work, reductions, gathers, sorts, linear-algebra routines (Cholesky, SVD, FFT).
One multiply-add is two FLOPs.

The model FLOPs of a train step are the count of `value_and_grad` of the plain loss. Give the loss
without rematerialisation: a rematerialised gradient holds its recomputation in its jaxpr, which
is work done, not work needed, and is counted like any other product.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

from fmjax.nn.blocked_attention import share_of_pairs

# Kernels whose arithmetic the jaxpr does not show.
_OPAQUE = frozenset({"pallas_call", "ffi_call", "scaled_matmul_wrapper"})


@dataclasses.dataclass(frozen=True)
class FlopCount:
    """FLOPs of one call of a function.

    Attributes:
        total: FLOPs, the sum of `by_primitive`.
        by_primitive: FLOPs for each primitive name.
        of_8_bits: FLOPs of the products both of whose operands have 8 bits, by their dtype's name;
            part of the total.
        matmuls: how often each product [B, M, K] x [B, K, N] runs, as {(B, M, K, N): times}.
        unbounded: `while` loops with a product inside. Their trip count is not in the program,
            so one iteration of each is in the total. (`fori_loop` with fixed bounds is a scan and
            is exact.)
        opaque: {primitive: times} of the custom kernels met, whose FLOPs are not in the total.
    """

    total: int
    by_primitive: Mapping[str, int]
    of_8_bits: Mapping[str, int]
    matmuls: Mapping[tuple[int, int, int, int], int]
    unbounded: int
    opaque: Mapping[str, int]


def count_flops(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> FlopCount:
    """Count the FLOPs of `fn(*args, **kwargs)` without running it.

    A scan counts its body times its length, a `cond` its most expensive branch, a
    `platform_dependent` its default, a `shard_map` its body once for each device that runs it.

    Args:
        fn: a function of arrays. Close over everything that is not an array.
        *args: trees of arrays or `jax.ShapeDtypeStruct`s.
        **kwargs: the same, by name.

    Returns:
        The count.

    >>> x = jax.ShapeDtypeStruct((8, 4), "float32")
    >>> w = jax.ShapeDtypeStruct((4, 16), "float32")
    >>> count_flops(lambda x, w: x @ w, x, w).total == 2 * 8 * 4 * 16
    True
    """
    return _count(jax.make_jaxpr(fn)(*args, **kwargs).jaxpr)


def count_needed_flops(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> FlopCount:
    """As `count_flops`, without work that no result needs.

    A custom rule gives gradients of frozen weights too; a compiler leaves them out.

    >>> x = jax.ShapeDtypeStruct((8, 8), "float32")
    >>> count_needed_flops(lambda x: (x @ x, x)[1], x).total
    0
    """
    jaxpr = jax.make_jaxpr(fn)(*args, **kwargs).jaxpr
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return _count(needed)


def _count(jaxpr: core.Jaxpr) -> FlopCount:
    tally = _walk(jaxpr)
    return FlopCount(
        total=tally.total(),
        by_primitive=dict(tally.flops),
        of_8_bits=dict(tally.narrow),
        matmuls=dict(tally.matmuls),
        unbounded=tally.unbounded,
        opaque=dict(tally.opaque),
    )


@dataclasses.dataclass
class _Tally:
    """The counters of one (sub)program."""

    flops: Counter[str] = dataclasses.field(default_factory=Counter)
    narrow: Counter[str] = dataclasses.field(default_factory=Counter)
    matmuls: Counter[tuple[int, int, int, int]] = dataclasses.field(default_factory=Counter)
    opaque: Counter[str] = dataclasses.field(default_factory=Counter)
    unbounded: int = 0

    def total(self) -> int:
        return sum(self.flops.values())

    def add(self, other: _Tally, times: int) -> None:
        pairs: list[tuple[Counter[Any], Counter[Any]]] = [
            (self.flops, other.flops), (self.narrow, other.narrow),
            (self.matmuls, other.matmuls), (self.opaque, other.opaque),
        ]  # fmt: skip
        for mine, others in pairs:
            for key, number in others.items():
                mine[key] += times * number
        self.unbounded += other.unbounded


def _walk(jaxpr: core.Jaxpr) -> _Tally:
    tally = _Tally()
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            batch, m, k, n = _dot_shape(eqn)
            tally.matmuls[batch, m, k, n] += 1
            flops = 2 * batch * m * k * n
            tally.flops[name] += flops
            left, right = _dtypes(eqn.invars)
            if left.itemsize == right.itemsize == 1:
                tally.narrow[left.name] += flops
        elif name == "ragged_dot_general":
            tally.flops[name] += _ragged_dot_flops(eqn)
        elif name == "conv_general_dilated":
            tally.flops[name] += _conv_flops(eqn)
        elif name.startswith("dot_product_attention_") and name.endswith("_wrapper"):
            tally.flops["dot_product_attention"] += _fused_attention_flops(eqn)
        elif (share := share_of_pairs(str(eqn.params.get("name")))) is not None:
            tally.flops["blocked_attention"] += _blocked_attention_flops(eqn, share)
        elif name == "pallas_call" and (products := _splash_products(eqn)) is not None:
            tally.flops["splash_attention"] += _splash_flops(eqn, products)
        elif name in _OPAQUE:
            tally.opaque[name] += 1
        elif name == "cond":
            branches = [_walk(branch.jaxpr) for branch in _branches(eqn)]
            tally.add(max(branches, key=_Tally.total), 1)
        elif name == "while":
            loop = _Tally()
            for sub in _subprograms(eqn):
                loop.add(_walk(sub), 1)
            loop.unbounded += loop.total() > 0
            tally.add(loop, 1)
        else:
            for sub in _subprograms(eqn):
                tally.add(_walk(sub), _times(eqn))
    return tally


def _subprograms(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The programs that an equation calls: jit, scan, remat, custom_jvp, custom_vjp, shard_map."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _branches(eqn: core.JaxprEqn) -> Sequence[core.ClosedJaxpr]:
    """The branches that a `cond` may take; of a choice by platform the default, which is the
    mathematics, where others may compute more (zeros around an image) to be faster."""
    branches = eqn.params["branches"]
    platforms = eqn.params.get("branches_platforms")
    if platforms is None or None not in platforms:
        return branches
    return [branches[platforms.index(None)]]


def _times(eqn: core.JaxprEqn) -> int:
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "shard_map":
        # The body's shapes are local along the manual axes and global along the others.
        # The parameter is called manual_axes or newly_manual_axes, by JAX version.
        mesh = eqn.params["mesh"]
        axes = next(value for key, value in eqn.params.items() if key.endswith("manual_axes"))
        return math.prod(mesh.shape[axis] for axis in axes)
    return 1


def _dot_shape(eqn: core.JaxprEqn) -> tuple[int, int, int, int]:
    """(B, M, K, N) of a `dot_general`, each the product of its axes."""
    lhs, rhs = _shapes(eqn.invars)
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    batch = math.prod(lhs[i] for i in lhs_batch)
    k = math.prod(lhs[i] for i in lhs_contract)
    m = _product_except(lhs, {*lhs_contract, *lhs_batch})
    n = _product_except(rhs, {*rhs_contract, *rhs_batch})
    return batch, m, k, n


def _ragged_dot_flops(eqn: core.JaxprEqn) -> int:
    """Every row of the left side meets one group of the right side: 2 * M * K * N."""
    lhs, rhs = _shapes(eqn.invars[:2])
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, rhs_contract), (_, rhs_batch) = numbers.dot_dimension_numbers
    skip = {*rhs_contract, *rhs_batch, *numbers.rhs_group_dimensions}
    return 2 * math.prod(lhs) * _product_except(rhs, skip)


def _conv_flops(eqn: core.JaxprEqn) -> int:
    """2 * (output batch) * O * (I / groups) * (pairs of output position and kernel tap).

    Only pairs that meet an element of the input count, not those that meet padding or a zero that
    `lhs_dilation` inserted. A convolution then costs the same as each of its two gradients, and
    the same as XLA reports; figures that count padding are a few percent higher.
    """
    lhs, rhs = _shapes(eqn.invars)
    (out,) = _shapes(eqn.outvars)
    params = eqn.params
    numbers = params["dimension_numbers"]
    batch_axis, out_feature_axis, *out_spatial = numbers.out_spec
    # The kernel's I axis is already divided by the feature groups, and the output's batch axis by
    # the batch groups.
    macs = out[batch_axis] * out[out_feature_axis] * rhs[numbers.rhs_spec[1]]
    for i, axis in enumerate(out_spatial):
        macs *= _live_pairs(
            out[axis],
            rhs[numbers.rhs_spec[2 + i]],
            lhs[numbers.lhs_spec[2 + i]],
            stride=params["window_strides"][i],
            padding=params["padding"][i][0],
            lhs_dilation=params["lhs_dilation"][i],
            rhs_dilation=params["rhs_dilation"][i],
        )
    return 2 * macs


def _live_pairs(
    out: int,
    kernel: int,
    size: int,
    *,
    stride: int,
    padding: int,
    lhs_dilation: int,
    rhs_dilation: int,
) -> int:
    """Pairs (output position, kernel tap) along one axis that land on an input element."""
    position = (
        np.arange(out)[:, None] * stride + np.arange(kernel)[None, :] * rhs_dilation - padding
    )
    inside = (position >= 0) & (position <= (size - 1) * lhs_dilation)
    return int(np.count_nonzero(inside & (position % lhs_dilation == 0)))


def _fused_attention_flops(eqn: core.JaxprEqn) -> int:
    """Two products forward, four backward (the recomputed scores are not model FLOPs)."""
    query, key = _shapes(eqn.invars[:2])
    # layout 0 is [B, T, H, K], 1 is [B, H, T, K].
    key_length = key[2] if eqn.params["layout"] else key[1]
    products = 4 if "_bwd_" in eqn.primitive.name else 2
    return products * 2 * math.prod(query) * key_length


def _blocked_attention_flops(eqn: core.JaxprEqn, share: Fraction) -> int:
    """As of all pairs, of which only a share is computed, and without the recomputed scores: one of
    the equal products of a block that is differentiated."""
    (program,) = _subprograms(eqn)
    total = _walk(program).total() / share
    for one in _equations(program):
        if one.params.get("differentiated"):
            (block,) = _subprograms(one)
            products = sum(inner.primitive.name == "dot_general" for inner in _equations(block))
            return int(total * (products - 1) / products)
    return int(total)


def _equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """Those of a program and of the programs that they call."""
    for eqn in jaxpr.eqns:
        yield eqn
        for sub in _subprograms(eqn):
            yield from _equations(sub)


# By parts of the kernels' names: what of `_fused_attention_flops`' two and four products is theirs.
_SPLASH = {"_fwd_": 2, "_dq_": 1, "_dkv_": 3}


def _splash_products(eqn: core.JaxprEqn) -> int | None:
    """How many of attention's products a Pallas kernel computes; None of another kernel."""
    name = str(eqn.params["name"])
    if not name.startswith("splash_"):
        return None
    return next((count for part, count in _SPLASH.items() if part in f"{name}_"), None)


def _splash_flops(eqn: core.JaxprEqn, products: int) -> int:
    """As of a kernel that skips no block, at the lengths that its operands are padded to."""
    # Before queries [..., H, T, K], keys and values [..., G, S, K] come the numbers of blocks.
    avals: list[Any] = [variable.aval for variable in eqn.invars]
    query, key, *_ = (aval.shape for aval in avals if aval.dtype.kind != "i")
    return products * 2 * math.prod(query) * key[-2]


def _shapes(variables: Sequence[Any]) -> list[tuple[int, ...]]:
    return [variable.aval.shape for variable in variables]


def _dtypes(variables: Sequence[Any]) -> list[Any]:
    return [variable.aval.dtype for variable in variables]


def _product_except(shape: tuple[int, ...], skip: set[int]) -> int:
    return math.prod(size for i, size in enumerate(shape) if i not in skip)
