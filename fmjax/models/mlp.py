"""The multilayer perceptron: dense layers with an activation between, for rows of numbers.

Our own family: small policies, value functions and classifiers of features. PyTorch's Sequential
of Linear layers and activations loads what it saves.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.models import config_alone
from fmjax.nn.activation import activation
from fmjax.nn.checks import check_head, refuse
from fmjax.nn.linear import Dense
from fmjax.types import Output, Remat
from fmjax.weights import Rule, dense_rules


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of config.json, our own.

    Attributes:
      num_features: D, numbers a row.
      hidden_sizes: of the layers before the last; with none the model is linear.
      hidden_gain, head_gain: of the orthogonal initial kernels (Saxe, McClelland & Ganguli 2013,
        arXiv:1312.6120). A small gain of the head begins with a nearly uniform policy, which
        policy gradients want (Andrychowicz et al. 2020, arXiv:2006.05990, section 3.2).
      id2label: names of the outputs.
    """

    num_features: int = 4
    hidden_sizes: tuple[int, ...] = (64, 64)
    hidden_act: str = "tanh"
    hidden_gain: float = 2.0**0.5
    head_gain: float = 1.0
    problem_type: str | None = None  # read by the task, not by the model
    id2label: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        problems = []
        if self.num_features < 1:
            problems.append(f"num_features={self.num_features} must be positive")
        if any(size < 1 for size in self.hidden_sizes):
            problems.append(f"hidden_sizes={self.hidden_sizes} must be positive")
        refuse(self, problems)


MODEL_TYPE = "mlp"
HEADS = {"model": "MLPModel", "classification": "MLPForClassification"}
VARIANTS = {"tiny": Config(hidden_sizes=(8, 6))}


class Model(nn.Module):
    """The perceptron with one head.

    Args:
        config: the family's.
        head: a key of ``HEADS``.
        scan, remat: have no effect: layers differ in shape and are small.
    """

    config: Config
    head: str = "model"
    scan: bool = False
    remat: Remat = "none"

    @nn.compact
    def __call__(self, features: Array, *, train: bool = False) -> Output:
        """Runs the model.

        Args:
            features: [B, D].
            train: has no effect: nothing is dropped.

        Returns:
            ``pooler_output`` [B, H], of the last layer before the head; or ``logits`` [B, C].

        Raises:
            ValueError: an unknown head, or rows of another length.
        """
        config = self.config
        check_head(self, HEADS)
        if features.ndim != 2 or features.shape[1] != config.num_features:
            raise ValueError(
                f"features have the shape {features.shape}; they must be [B, {config.num_features}]"
            )
        x = features
        for number, width in enumerate(config.hidden_sizes):
            init = nn.initializers.orthogonal(config.hidden_gain)
            x = activation(config.hidden_act)(Dense(width, True, init, name=f"dense_{number}")(x))
        if self.head == "model":
            return Output(pooler_output=x)
        init = nn.initializers.orthogonal(config.head_gain)
        logits = Dense(len(config.id2label), True, init, name="head")(x)
        return Output(logits=logits.astype(jnp.float32))


def inputs(config: Config, head: str) -> dict[str, Array]:
    """The smallest inputs that touch every parameter: what initialisation traces the model on."""
    return {"features": jnp.zeros((1, config.num_features))}


PREFIX = ""
FIXED = {}
IGNORED = ()
from_tensors = config_alone


def rules(config: Config, head: str) -> list[Rule]:
    """Parameters and the PyTorch tensors they are, for one head."""
    names = [f"dense_{i}" for i in range(len(config.hidden_sizes))]
    if head == "classification":
        names.append("head")
    # Each dense layer is followed by its activation.
    return [rule for i, name in enumerate(names) for rule in dense_rules(name, str(2 * i))]
