"""How near made images are to real ones, by the features that a net has of both: FID and KID.

Numbers depend on the net. The published ones are of an Inception v3 with weights that no package
carries; those of another net can be compared with each other and with nothing else.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def frechet_distance(real: ArrayLike, made: ArrayLike) -> float:
    """FID: the Frechet distance of two Gaussians (Heusel et al. 2017, arXiv:1706.08500, eq. 6).

    ``|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2))``. Too large for few examples, by an amount that
    depends on how many: compare numbers of equal sizes.

    Args:
      real: features [N, D] of real images.
      made: features [M, D] of made ones.

    Raises:
      ValueError: features of other shapes, or that are not finite.
    """
    first, second = _checked(real, made)
    centres = first.mean(axis=0) - second.mean(axis=0)
    one, other = (np.cov(x, rowvar=False).reshape(x.shape[1], -1) for x in (first, second))
    # The trace of the root of C1 C2 is that of A = C1^(1/2) C2 C1^(1/2), which is symmetric.
    root = _root(one)
    product = root @ other @ root
    values = np.linalg.eigvalsh((product + product.T) / 2)
    shared = np.sqrt(np.maximum(values, 0)).sum()
    return float(max(0.0, centres @ centres + np.trace(one) + np.trace(other) - 2 * shared))


def kernel_distance(
    real: ArrayLike,
    made: ArrayLike,
    *,
    subset_size: int | None = None,
    subsets: int = 100,
    seed: int = 0,
) -> tuple[float, float]:
    """KID: the squared maximum mean discrepancy (Binkowski et al. 2018, arXiv:1801.01401, sec. 4).

    By the kernel ``(x . y / D + 1)^3``, unbiased: of two samples of one distribution it is 0 in the
    mean, and may be below.

    Args:
      real: features [N, D] of real images.
      made: features [M, D] of made ones.
      subset_size: examples of each that are compared at a time; None compares all once.
      subsets: how many such draws, whose mean is returned.
      seed: of the draws.

    Returns:
      The estimate, and its standard deviation over subsets (0 without).

    Raises:
      ValueError: features of other shapes, or that are not finite, or too few of them.
    """
    first, second = _checked(real, made)
    if subset_size is None:
        return _discrepancy(first, second), 0.0
    most = min(len(first), len(second))
    if not 2 <= subset_size <= most or subsets < 1:
        raise ValueError(
            f"subset_size={subset_size}, subsets={subsets}: there are {most} examples; subsets "
            "have from 2 to as many, and there is at least one"
        )
    rng = np.random.default_rng(seed)
    values = [
        _discrepancy(*(x[rng.choice(len(x), subset_size, replace=False)] for x in (first, second)))
        for _ in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values))


def _discrepancy(first: np.ndarray, second: np.ndarray) -> float:
    """The unbiased estimate (Gretton et al. 2012, eq. 3)."""
    width = first.shape[1]

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / width + 1) ** 3

    def within(x: np.ndarray) -> float:
        table = kernel(x, x)
        return (table.sum() - np.trace(table)) / (len(x) * (len(x) - 1))

    return float(within(first) + within(second) - 2 * kernel(first, second).mean())


def _root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric root of a symmetric matrix without negative eigenvalues but by rounding."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def _checked(real: ArrayLike, made: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64."""
    parts = {"real": np.asarray(real, np.float64), "made": np.asarray(made, np.float64)}
    problems = []
    for name, x in parts.items():
        if x.ndim != 2 or len(x) < 2 or x.shape[1] < 1:
            problems.append(f"{name} features have the shape {x.shape}; they must be [N >= 2, D]")
        elif wrong := int((~np.isfinite(x)).any(axis=1).sum()):
            problems.append(
                f"{wrong} of {len(x)} {name} examples have features that are not finite"
            )
    widths = {x.shape[-1] for x in parts.values() if x.ndim == 2}
    if len(widths) > 1:
        problems.append(f"features have {sorted(widths)} numbers; both must come from one net")
    if problems:
        raise ValueError("; ".join(problems))
    return parts["real"], parts["made"]
