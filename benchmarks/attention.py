"""How fast is attention alone, by each kernel, next to PyTorch sdpa in the same run?

    python benchmarks/attention.py                        about 10 minutes on 2 cores
    python benchmarks/attention.py --cases causal-512-forward causal-512-gradient
    python benchmarks/attention.py --smoke                short rows, seconds

`fmjax.nn.attention.attend` forward, and forward and backward together ("gradient", of queries, keys
and values), by products and a softmax ("plain"), by JAX's own composition ("xla"), on an NVIDIA GPU
in half precision by cuDNN ("cudnn") and on a CPU in blocks of queries ("blocked"). All cases have
as many tokens: rows are fewer where they are longer. Masks: none; causal; padding, where rows end
at different places; a window, causal, of 128 keys. 12 heads of 64 features; "grouped" has 32 of
queries on 8 of keys and values, and is causal. PyTorch gets `is_causal` for a causal mask and an
array for padding and windows.

Before anything is timed all must give the same. FLOPs are those of all pairs, masked or not, and
the gradient's are three times the forward pass's; a kernel that skips what no query sees looks
faster for it. "temporary" is what the compiler plans to hold beside arguments and results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from cases import torch_is_there
from peer import Served
from record import measure_peaks, named, or_empty, print_rows
from run import OwnSettings, run_own

from fmjax.nn.attention import attend
from fmjax.nn.fused_attention import Kernel, attention_kernel, fused
from fmjax.nn.mask import make_attention_mask
from fmjax.perf.flops import count_flops
from fmjax.perf.timing import compile_time, time_alternately

SCHEMA = 1  # of this benchmark's own document: the fields of `Row`, and `ratios_of` them
# Largest difference over the largest value, of outputs and of gradients: bfloat16 keeps 8 bits,
# and kernels round the probabilities at different places.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
DType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(OwnSettings):
    """Settings of the run."""

    tokens: int | None = None
    """Of a case, all its rows together; default 4,096 on a CPU, 32,768 elsewhere."""
    dtype: DType | None = None
    """Of queries, keys and values; default float32 on a CPU, bfloat16 elsewhere."""
    peer: bool = True
    """Whether PyTorch runs too, when it is installed."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What is computed: T tokens a row, H heads of queries on G of keys and values, size K."""

    mask: str
    length: int
    backward: bool
    heads: int = 12
    groups: int = 12
    size: int = 64
    window: int = 128

    @property
    def name(self) -> str:
        """What `--cases` calls it."""
        kind = self.mask if self.groups == self.heads else "grouped"
        return f"{kind}-{self.length}-{'gradient' if self.backward else 'forward'}"


CASES = tuple(
    Case(mask, length, backward, *heads)
    for mask, heads in (
        ("none", ()), ("causal", ()), ("padding", ()), ("window", ()), ("causal", (32, 8, 64)),
    )
    for length in (128, 512, 2048)
    for backward in (False, True)
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """One side of one case.

    Attributes:
        case: its name.
        side: "plain", "xla", "cudnn", "blocked" or "torch".
        chosen: whether it is what fmjax chooses here by itself.
        dtype: of queries, keys and values.
        mask, length, batch_size, heads, groups, size: of the case; batch_size is B.
        seconds: {"min", "median", "max", "all"}.
        model_flops: of all pairs; see above.
        flops_per_second: from the median.
        peak_share: the same over the measured matmul peak of `dtype`.
        temporary_bytes: what the compiler plans to hold beside arguments and results; None for the
            peer.
        compile_seconds: {"lower", "compile"}; None for the peer.
        max_difference: from the plain way, of outputs or gradients, over the largest of it.
    """

    case: str
    side: str
    chosen: bool
    dtype: str
    mask: str
    length: int
    batch_size: int
    heads: int
    groups: int
    size: int
    seconds: dict[str, Any]
    model_flops: int
    flops_per_second: float
    peak_share: float
    temporary_bytes: int | None
    compile_seconds: dict[str, float] | None
    max_difference: float


Arrays = dict[str, np.ndarray]


def arrays_of(case: Case, batch_size: int) -> Arrays:
    """Random queries, keys, values and cotangents [B, heads, T, K] from seed 0, and padding [B, T].

    Heads come first, as PyTorch has them.
    """
    random = np.random.default_rng(0)

    def draw(heads: int) -> np.ndarray:
        shape = (batch_size, heads, case.length, case.size)
        return random.normal(size=shape).astype(np.float32)

    heads = {"query": case.heads, "key": case.groups, "value": case.groups, "out": case.heads}
    lengths = random.integers(case.length // 2, case.length + 1, batch_size)
    return {
        **{name: draw(count) for name, count in heads.items()},
        "padding": np.arange(case.length) < lengths[:, None],
    }


def attention_fn(case: Case) -> Callable[..., Any]:
    """(query [B, T, H, K], key, value [B, G, T, K], padding, cotangent) -> out or gradients."""

    def forward(query: jax.Array, key: jax.Array, value: jax.Array, padding: jax.Array) -> Any:
        mask = make_attention_mask(
            padding if case.mask == "padding" else None,
            query_length=case.length,
            key_length=case.length,
            causal=case.mask in ("causal", "window"),
            window=case.window if case.mask == "window" else None,
        )
        return attend(query, key, value, mask=mask)[0]

    def backward(
        query: jax.Array, key: jax.Array, value: jax.Array, padding: jax.Array, out: jax.Array
    ) -> Any:
        _, pull = jax.vjp(lambda q, k, v: forward(q, k, v, padding), query, key, value)
        return pull(out)

    return backward if case.backward else lambda q, k, v, padding, _: forward(q, k, v, padding)


class Peer(Served):
    """`scaled_dot_product_attention` in a process of its own."""

    def __init__(self) -> None:
        super().__init__(_serve, "cpu" if jax.default_backend() == "cpu" else "cuda")

    def begin(self, case: Case, dtype: str, arrays: Arrays) -> list[np.ndarray]:
        """The output of a case, or the gradients of query, key and value, [B, heads, T, K]."""
        return self._ask(case, dtype, arrays)

    def run(self) -> None:
        """The same again, not fetched."""
        self._ask()


def _serve(connection: Connection, device: str) -> None:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_float32_matmul_precision("highest")
    compute: Callable[[], list[torch.Tensor]] = list
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return
        if asked:
            case, dtype, arrays = asked
            compute = _torch_attention(case, dtype, arrays, device)
            connection.send([part.float().cpu().numpy() for part in compute()])
        else:
            compute()
            connection.send(None)


def _torch_attention(case: Case, dtype: str, arrays: Arrays, device: str) -> Callable[[], Any]:
    """What computes a case and waits for it."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    query, key, value, out = (
        torch.from_numpy(arrays[name]).to(device, getattr(torch, dtype))
        for name in ("query", "key", "value", "out")
    )
    inputs = [part.requires_grad_(case.backward) for part in (query, key, value)]
    mask = None
    if case.mask == "padding":
        mask = torch.from_numpy(arrays["padding"]).to(device)[:, None, None]
    elif case.mask == "window":
        places = torch.arange(case.length, device=device)
        distance = places[:, None] - places[None]
        mask = (distance >= 0) & (distance < case.window)

    def compute() -> list[torch.Tensor]:
        with torch.set_grad_enabled(case.backward):
            found = scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=case.mask == "causal",
                enable_gqa=case.groups != case.heads,
            )
            results = torch.autograd.grad(found, inputs, out) if case.backward else [found]
        if device == "cuda":
            torch.cuda.synchronize()
        return list(results)

    return compute


def kernels(query: jax.Array, key: jax.Array, value: jax.Array) -> Iterator[tuple[Kernel, bool]]:
    """The kernels that there are here for these operands, and whether fmjax would choose it."""
    chosen = fused(query, key, value) or "plain"
    names: list[Kernel] = ["plain", "xla", chosen]
    if jax.default_backend() == "cpu":
        names.append("blocked")
    for name in dict.fromkeys(names):
        yield name, name == chosen


def difference(reference: list[np.ndarray], found: list[np.ndarray]) -> float:
    """The largest difference of results, each over its largest value."""
    pairs = zip(reference, found, strict=True)
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)


def fetched(case: Case, results: Any) -> list[np.ndarray]:
    """Results as PyTorch has them, [B, heads, T, K]: queries' axes are swapped on our side."""
    parts = list(results) if case.backward else [results]
    parts[0] = jnp.swapaxes(parts[0], 1, 2)
    return [np.asarray(part, np.float32) for part in parts]


def run_case(
    case: Case, *, tokens: int, dtype: DType, repeats: int, peak: float, peer: Peer | None
) -> list[Row]:
    """Compile, compare and time one case.

    Args:
        case: which.
        tokens: of all its rows.
        dtype: of the operands.
        repeats: timed turns.
        peak: the measured matmul peak, FLOP/s.
        peer: PyTorch, if it is there.

    Raises:
        ValueError: the sides differ by more than `TOLERANCE`.
    """
    batch_size = max(1, tokens // case.length)
    arrays = arrays_of(case, batch_size)
    low = {name: jnp.asarray(value, dtype) for name, value in arrays.items() if name != "padding"}
    operands = (
        jnp.swapaxes(low["query"], 1, 2), low["key"], low["value"], jnp.asarray(arrays["padding"]),
        jnp.swapaxes(low["out"], 1, 2),
    )  # fmt: skip
    compiled, chosen = {}, {}
    for kernel, by_itself in kernels(*operands[:3]):
        with attention_kernel(kernel):
            compiled[kernel] = compile_time(jax.jit(attention_fn(case)), *operands)
        chosen[kernel] = by_itself
    with attention_kernel("plain"):
        flops = count_flops(attention_fn(case), *operands).total
    results = {name: fetched(case, side.call(*operands)) for name, side in compiled.items()}
    thunks: dict[str, Callable[[], Any]] = {
        name: lambda call=side.call: jax.block_until_ready(call(*operands))
        for name, side in compiled.items()
    }
    if peer is not None:
        results["torch"], thunks["torch"] = peer.begin(case, dtype, arrays), peer.run
    apart = {name: difference(results["plain"], found) for name, found in results.items()}
    if wrong := {name: d for name, d in apart.items() if not d <= TOLERANCE[dtype]}:
        raise ValueError(
            f"{case.name}: {wrong} of the largest value apart from the plain way, more than "
            f"{TOLERANCE[dtype]:.0e}; their times are not comparable"
        )
    timings = time_alternately(thunks, repeats=repeats)
    rows = []
    for name, timing in timings.items():
        ours = compiled.get(name)
        rows.append(
            Row(
                case=case.name,
                side=name,
                chosen=chosen.get(name, False),
                dtype=dtype,
                mask=case.mask,
                length=case.length,
                batch_size=batch_size,
                heads=case.heads,
                groups=case.groups,
                size=case.size,
                seconds=dataclasses.asdict(timing),
                model_flops=flops,
                flops_per_second=flops / timing.median,
                peak_share=flops / timing.median / peak,
                temporary_bytes=ours.memory.get("temporaries") if ours else None,
                compile_seconds=(
                    {"lower": ours.lower_seconds, "compile": ours.compile_seconds} if ours else None
                ),
                max_difference=apart[name],
            )
        )
    return rows


def ratios_of(rows: list[Row]) -> dict[str, float]:
    """{case: PyTorch's median time / that of the kernel that fmjax chooses}; > 1 means fmjax is
    faster."""
    chosen = {row.case: row.seconds["median"] for row in rows if row.chosen}
    return {
        row.case: row.seconds["median"] / chosen[row.case] for row in rows if row.side == "torch"
    }


def show(doc: dict[str, Any]) -> None:
    """Print a document as a table."""

    def ratio(row: dict[str, Any]) -> str:
        return f"{doc['ratios'][row['case']]:.2f}" if row["side"] == "torch" else ""

    print_rows(
        doc,
        {
            "case": lambda row: row["case"],
            "side": lambda row: row["side"] + ("*" if row["chosen"] else ""),
            "dtype": lambda row: row["dtype"],
            "B x T": lambda row: f"{row['batch_size']} x {row['length']}",
            "median ms": lambda row: f"{1e3 * row['seconds']['median']:,.2f}",
            "GFLOP/s": lambda row: f"{row['flops_per_second'] / 1e9:,.1f}",
            "of peak": lambda row: f"{row['peak_share']:.0%}",
            "temporary MB": lambda row: or_empty(
                row["temporary_bytes"], lambda size: f"{size / 1e6:,.1f}"
            ),
            "torch / fmjax": ratio,
        },
        caption="* is what fmjax chooses by itself",
        words=3,
    )


def main(settings: Settings) -> None:
    """Run the chosen cases, print the table, write the JSON."""
    chosen = named(CASES, settings.cases)
    on_cpu = jax.default_backend() == "cpu"
    tokens = settings.tokens or (4096 if on_cpu else 32768)
    dtype: DType = settings.dtype or ("float32" if on_cpu else "bfloat16")
    if settings.smoke:
        tokens = 64
        sizes = {"length": 32, "heads": 4, "size": 8, "window": 8}
        chosen = [
            dataclasses.replace(case, **sizes, groups=4 * case.groups // case.heads)
            for case in chosen
        ]
    peak = measure_peaks({dtype}, smoke=settings.smoke)[dtype]
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(Peer()) if settings.peer and torch_is_there() else None
        run = partial(
            run_case, tokens=tokens, dtype=dtype, repeats=settings.repeats, peak=peak, peer=peer
        )
        run_own("attention", SCHEMA, chosen, settings, run, ratios_of=ratios_of, show=show)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
