"""A client of federated learning served by Flower (Beutel et al. 2020, arXiv:2007.14390).

The client function that `fmjax.methods.federated` simulates by the hundred trains here on one
machine's own data, for a Flower server elsewhere (``pip install 'fmjax[federated]'``, in an
environment of its own: flwr asks for older versions of some packages than others get). Arrays
travel in the order of `arrays_of`. Random numbers are those of the simulation, so a round of the
server's FedAvg gives what ``pseudo_gradient(client)`` with ``optax.sgd(1.0)`` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.methods.federated import ClientFn
from fmjax.metrics.optional import optional_library
from fmjax.tree import flatten, is_running, override, split, unflatten
from fmjax.types import Batch, Variables

ATTACHES = ("program",)

LocalTraining = Callable[
    [Sequence[np.ndarray], int], tuple[list[np.ndarray], float, dict[str, float]]
]
"""(the server's arrays, number of the round from 1) -> (new arrays, examples, metrics)."""


def arrays_of(trainable: Variables, non_trainable: Variables) -> list[np.ndarray]:
    """What travels: trainable leaves and running statistics, by the order of their paths."""
    # Not in the trees' own order: what a compiled function returns is sorted.
    leaves = flatten(trainable) | flatten(split(non_trainable, is_running)[0])
    return [np.asarray(leaves[path]) for path in sorted(leaves)]


def variables_of(
    arrays: Sequence[np.ndarray], trainable: Variables, non_trainable: Variables
) -> tuple[Variables, Variables]:
    """The inverse of `arrays_of`: both trees with the arrays in their places.

    Raises:
        ValueError: arrays of another model; all that differ are listed.
    """
    mine, running = flatten(trainable), flatten(split(non_trainable, is_running)[0])
    expected = dict(sorted((mine | running).items()))
    shapes = [np.shape(array) for array in arrays]
    if len(shapes) != len(expected):
        raise ValueError(f"the server sent {len(shapes)} arrays, the model has {len(expected)}")
    if wrong := [
        f"{path}: {shape}, not {leaf.shape}"
        for (path, leaf), shape in zip(expected.items(), shapes, strict=True)
        if shape != leaf.shape
    ]:
        raise ValueError("the server's arrays are of another model: " + "; ".join(wrong))
    new = {
        path: jnp.asarray(array, leaf.dtype)
        for (path, leaf), array in zip(expected.items(), arrays, strict=True)
    }
    return (
        unflatten({path: new[path] for path in mine}),
        override(non_trainable, unflatten({path: new[path] for path in running})),
    )


def local_training(
    client: ClientFn,
    trainable: Variables,
    non_trainable: Variables,
    batches: Callable[[int], Batch],
    *,
    rng: Array,
    number: int,
) -> LocalTraining:
    """A client's part of a round, for `numpy_client` and `client_app`.

    Args:
        client: from `client_update`.
        trainable, non_trainable: the model's, split; frozen leaves stay here.
        batches: round, from 1 -> this client's own batches [steps, batch, ...].
        rng: the typed key of the whole federation.
        number: of this client, by which its random numbers differ from others'.
    """
    compiled = jax.jit(client)

    def trained(
        arrays: Sequence[np.ndarray], number_of_round: int
    ) -> tuple[list[np.ndarray], float, dict[str, float]]:
        mine, frozen = variables_of(arrays, trainable, non_trainable)
        key = jax.random.fold_in(jax.random.fold_in(rng, number_of_round - 1), number)
        update = compiled(mine, frozen, batches(number_of_round), key)
        new = jax.tree.map(jnp.add, mine, update.change)
        metrics = {name: float(mean.value) for name, mean in update.metrics.items()}
        return arrays_of(new, update.running), float(update.examples), metrics

    return trained


def numpy_client(training: LocalTraining) -> Any:
    """A ``flwr.client.NumPyClient``.

    The server's strategy must say which round it is:
    ``on_fit_config_fn=lambda round: {"server_round": round}``.

    Args:
        training: from `local_training`.

    Raises:
        ImportError: flwr is not installed.
    """
    flower = optional_library("flwr.client", "flwr", "federated")

    class Client(flower.NumPyClient):
        def fit(
            self, parameters: list[np.ndarray], config: Mapping[str, Any]
        ) -> tuple[list[np.ndarray], int, dict[str, float]]:
            if "server_round" not in config:
                raise ValueError(
                    "the server does not say which round it is; give its strategy "
                    'on_fit_config_fn=lambda round: {"server_round": round}'
                )
            arrays, examples, metrics = training(parameters, int(config["server_round"]))
            return arrays, round(examples), metrics

    return Client()


def client_app(training: Callable[[Any], LocalTraining]) -> Any:
    """A ``flwr.clientapp.ClientApp`` that answers "train" messages, for a SuperNode.

    Its replies are what the strategies of ``flwr.serverapp`` expect: "arrays", and "metrics" with
    "num-examples".

    Args:
        training: the SuperNode's Context -> what `local_training` gives; its ``node_config`` says
            which client it is.

    Raises:
        ImportError: flwr is not installed.
    """
    flower = optional_library("flwr.app", "flwr", "federated")
    app = optional_library("flwr.clientapp", "flwr", "federated").ClientApp()

    @app.train()
    def train(message: Any, context: Any) -> Any:
        arrays = message.content["arrays"].to_numpy_ndarrays()
        number = int(message.content["config"]["server-round"])
        new, examples, metrics = training(context)(arrays, number)
        record = flower.ArrayRecord.from_numpy_ndarrays(new)
        content = flower.RecordDict(
            {
                "arrays": record,
                "metrics": flower.MetricRecord({**metrics, "num-examples": examples}),
            }
        )
        return flower.Message(content=content, reply_to=message)

    return app
