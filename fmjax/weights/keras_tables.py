"""Pieces of the tables of rules for Keras' files: tensors are called LAYER/WEIGHT.

Kernels are [X, Y, I, O] and [I, O], as ours. What Keras has besides and a model of ours has not is
folded into the running statistics of the normalisation after it, exactly: a bias into the mean, and
a larger epsilon into the variance.
"""

from __future__ import annotations

import numpy as np

from fmjax.weights.rules import Rule
from fmjax.weights.transforms import BESIDE_ONES, DIFFERENCE, IDENTITY, permute, plus

DEPTHWISE = permute(0, 1, 3, 2)  # [X, Y, C, 1] -> [X, Y, 1, C]


def keras_dense_rules(param: str, layer: str) -> list[Rule]:
    """Kernel and bias of a Dense, or of a Conv2D with a bias; `param` is inside "params/"."""
    return [
        Rule(f"params/{param}/kernel", f"{layer}/kernel"),
        Rule(f"params/{param}/bias", f"{layer}/bias"),
    ]


def keras_conv_norm_rules(
    param: str,
    conv: str,
    norm: str,
    *,
    depthwise: bool = False,
    bias: bool = False,
    scale: bool = True,
    epsilon: float = 0.0,
) -> list[Rule]:
    """A Conv2D and the BatchNormalization of what it gives.

    Args:
        param: path of a `fmjax.nn.conv.ConvNorm`, inside "params/" and "batch_stats/".
        conv, norm: the layers' names.
        depthwise: whether it is a DepthwiseConv2D.
        bias, scale, epsilon: see `keras_batch_norm_rules`; `bias` is that of `conv`.
    """
    kernel = f"params/{param}/conv/kernel"
    first = (
        Rule(kernel, f"{conv}/kernel", DEPTHWISE, aliases=(f"{conv}/depthwise_kernel",))
        if depthwise
        else Rule(kernel, f"{conv}/kernel")
    )
    biases = f"{conv}/bias" if bias else None
    return [
        first,
        *keras_batch_norm_rules(f"{param}/norm", norm, bias=biases, scale=scale, epsilon=epsilon),
    ]


def keras_batch_norm_rules(
    param: str, layer: str, *, bias: str | None = None, scale: bool = True, epsilon: float = 0.0
) -> list[Rule]:
    """A BatchNormalization.

    Args:
        param: path inside "params/" and "batch_stats/".
        layer: its name.
        bias: a tensor added to what is normalised, which the running mean takes up.
        scale: whether it has a scale; otherwise that is one.
        epsilon: by how much Keras' is larger than ours.
    """
    affine = (
        [
            Rule(f"params/{param}/scale", f"{layer}/gamma"),
            Rule(f"params/{param}/bias", f"{layer}/beta"),
        ]
        if scale
        else [Rule((f"params/{param}/scale", f"params/{param}/bias"), f"{layer}/beta", BESIDE_ONES)]
    )
    mean, path = f"{layer}/moving_mean", f"batch_stats/{param}/mean"
    return [
        *affine,
        Rule(path, mean) if bias is None else Rule(path, (mean, bias), DIFFERENCE),
        Rule(
            f"batch_stats/{param}/variance",
            f"{layer}/moving_variance",
            plus(epsilon) if epsilon else IDENTITY,
        ),
        Rule(  # which Keras does not keep
            f"batch_stats/{param}/count",
            f"{layer}/count",
            default=lambda: np.zeros((), np.int32),
        ),
    ]
