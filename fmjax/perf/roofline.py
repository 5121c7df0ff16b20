"""The least time that a step can take on a chip: by its arithmetic, its memory and its links.

Williams et al. 2009, "Roofline", doi:10.1145/1498765.1498785, with a third roof for what chips
send each other and a fourth for what they keep in the host's memory. All work at the same time at
best, so the slowest of them is the bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from fmjax.perf.device import Peak


class Bound(NamedTuple):
    """The best that a step can do; a real one takes longer.

    Args:
        compute, memory, interconnect, host: seconds that each needs at its published peak; of the
            host's link 0, where nobody publishes one.
        step: seconds, the largest of them.
        limited_by: which one that is.
        tokens_per_second: the most, over all chips.
        mfu: the largest share of the chips' peak that the model's own FLOPs can be.
        cost: the least, of a billion tokens, in the price's currency; None without a price.
    """

    compute: float
    memory: float
    interconnect: float
    host: float
    step: float
    limited_by: str
    tokens_per_second: float
    mfu: float
    cost: float | None


def roofline(
    peak: Peak,
    *,
    chips: int,
    model_flops: float,
    executed_flops: float,
    moved: float,
    sent: float,
    tokens: int,
    of_8_bits: Mapping[str, float] | None = None,
    kept_by_host: float = 0.0,
    price: float | None = None,
) -> Bound:
    """The bound of a step.

    Args:
        peak: a chip's published figures.
        chips: how many share the step.
        model_flops: of a step that recomputes nothing, over all chips.
        executed_flops: with what is recomputed, over all chips.
        moved: bytes that a chip's kernels read and write.
        sent: bytes that a chip sends to others.
        tokens: of a step, over all chips (examples, where there are no tokens).
        of_8_bits: of the executed FLOPs, those of operands of 8 bits, by their dtype's name.
        kept_by_host: bytes of a chip that go to the host's memory, and come back.
        price: of a chip for an hour.

    Raises:
        ValueError: a price below 0.
    """
    if price is not None and price < 0:
        raise ValueError(f"price={price} must not be negative")
    narrow = of_8_bits or {}
    compute = (executed_flops - sum(narrow.values())) / peak.bf16
    for name, flops in narrow.items():
        compute += flops / (peak.int8 if name == "int8" else peak.float8)
    seconds = {
        "compute": compute / chips,
        "memory": moved / peak.bandwidth,
        "interconnect": sent / peak.interconnect,
        # There and back, each its own direction of the link.
        "host": 0.0 if peak.host is None else kept_by_host / peak.host,
    }
    limit = max(seconds, key=lambda name: seconds[name])
    step = seconds[limit]
    rate = tokens / step
    cost = None if price is None else price * chips / 3600 * 1e9 / rate
    return Bound(
        **seconds,
        step=step,
        limited_by=limit,
        tokens_per_second=rate,
        mfu=model_flops / chips / peak.bf16 / step,
        cost=cost,
    )
