"""Kernels as products of two thinner ones, which are the best of their rank by the singular value
decomposition.

Eckart & Young 1936; of networks Denton et al. 2014, arXiv:1404.0736, section 3.2. A kernel [I, O]
of rank R has R (I + O) parameters and multiply-adds a token in the place of I O. Both factors are
parameters and train as such. `fmjax.save` takes plain arrays alone: save
``fmjax.nn.compact.whole_arrays(variables)``, or write the factors by
`fmjax.methods.compressed_files`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from fmjax.methods.adapted_layers import dense_kernels
from fmjax.nn.compact import Compact, Factors
from fmjax.tree import flatten, unflatten
from fmjax.types import Variables

ATTACHES = ("variables",)


def factorise(
    variables: Variables,
    *,
    targets: Sequence[str],
    rank: int | None = None,
    energy: float | None = None,
) -> Variables:
    """Variables with kernels of dense layers in two factors, at the place of the kernel.

    Args:
        variables: of a model; scanned or not.
        targets: globs over paths of dense layers, such as "*/mlp/*".
        rank: R of every target; of a scanned model, of each layer.
        energy: instead, each target has the least R whose singular values have this share of the
            sum of squares (scanned layers the largest R among them); a kernel that this does not
            make smaller stays whole.

    Returns:
        ``Factors`` U sqrt(S) and sqrt(S) V^T, which are of alike size; at full rank their product
        is the kernel to rounding.

    Raises:
        ValueError: targets that are no dense layers, or numbers that do not fit; all are listed.
    """
    problems = []
    if (rank is None) == (energy is None):
        problems.append(f"give one of rank and energy, not rank={rank} and energy={energy}")
    if energy is not None and not 0 < energy <= 1:
        problems.append(f"energy={energy} must be above 0 and at most 1")
    kernels = dense_kernels(variables, targets)
    for path, kernel in kernels.items():
        if isinstance(kernel, Compact):
            problems.append(f"{path} has no plain kernel any more")
        elif rank is not None and not 1 <= rank <= min(kernel.shape[-2:]):
            problems.append(f"{path} {kernel.shape}: rank={rank} must be 1 to its smaller side")
    if problems:
        raise ValueError("factors of kernels:\n  " + "\n  ".join(problems))
    new = {}
    for path, kernel in kernels.items():
        left, values, right = np.linalg.svd(np.asarray(kernel, np.float64), full_matrices=False)
        kept = rank if energy is None else _rank_for(values, energy)
        assert kept is not None  # one of both is given
        inputs, outputs = kernel.shape[-2:]
        if energy is not None and kept * (inputs + outputs) >= inputs * outputs:
            continue
        root = np.sqrt(values[..., :kept])
        down = left[..., :kept] * root[..., None, :]
        up = root[..., :, None] * right[..., :kept, :]
        new[f"params/{path}/kernel"] = Factors(
            jnp.asarray(down, kernel.dtype), jnp.asarray(up, kernel.dtype)
        )
    return unflatten(flatten(variables) | new)


def _rank_for(values: np.ndarray, energy: float) -> int:
    """The least rank with a share of the energy, of the layer that needs most: [..., min(I, O)]."""
    squares = np.cumsum(np.square(values), axis=-1)
    # The whole sum is reached to rounding alone.
    enough = squares >= energy * squares[..., -1:] * (1 - 1e-12)
    return int(np.argmax(enough, axis=-1).max()) + 1
