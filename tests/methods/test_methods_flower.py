"""A round of a real Flower server with two clients is the simulated round."""

import os
import socket
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from methods.test_methods_federated import LOCAL, make_round
from methods.test_methods_privacy import loss_fn, make_params

from fmjax.methods.federated import client_update, pseudo_gradient
from fmjax.methods.flower import (
    arrays_of,
    client_app,
    local_training,
    numpy_client,
    variables_of,
)
from fmjax.train import init_state, make_train_step

KEY = jax.random.key(9)
NUMBERS = (10, 11)


def rounds():
    return [make_round(seed, (2, 3, 5)) for seed in range(2)]


def simulated():
    step = jax.jit(
        make_train_step(
            pseudo_gradient(client_update(loss_fn, LOCAL), clients_at_once=2), optax.sgd(1.0)
        )
    )
    state = init_state(make_params(), optax.sgd(1.0), KEY)
    for batch in rounds():
        state, _ = step(state, batch)
    return state.trainable


def trainings():
    def batches(place):
        return lambda number: {
            name: leaf[place] for name, leaf in rounds()[number - 1].items() if name != "client"
        }

    client = client_update(loss_fn, LOCAL)
    return [
        local_training(client, make_params(), {}, batches(place), rng=KEY, number=number)
        for place, number in enumerate(NUMBERS)
    ]


def test_local_training_averaged_by_examples_is_the_simulated_round():
    arrays = arrays_of(make_params(), {})
    for number in (1, 2):
        answers = [training(arrays, number) for training in trainings()]
        weights = [examples for _, examples, _ in answers]
        arrays = [
            np.average(leaves, axis=0, weights=weights)
            for leaves in zip(*(new for new, _, _ in answers), strict=True)
        ]
    chex.assert_trees_all_close(
        variables_of(arrays, make_params(), {})[0], simulated(), rtol=1e-5, atol=1e-6
    )


def test_arrays_of_another_model_are_refused():
    statistics = {"batch_stats": {"mean": jnp.zeros(2)}, "params": {"frozen": jnp.ones(3)}}
    arrays = arrays_of(make_params(), statistics)
    assert len(arrays) == 4  # what is frozen stays
    arrays[0] = np.ones(2, np.float32)  # by the order of paths, batch_stats come first
    trainable, rest = variables_of(arrays, make_params(), statistics)
    chex.assert_trees_all_equal(trainable, make_params())
    np.testing.assert_array_equal(rest["batch_stats"]["mean"], 1)
    arrays[-1] = arrays[-1].T
    with pytest.raises(ValueError, match=r"params/layers_0/kernel: \(8, 6\), not \(6, 8\)"):
        variables_of(arrays, make_params(), statistics)
    with pytest.raises(ValueError, match="sent 3 arrays, the model has 4"):
        variables_of(arrays[:3], make_params(), statistics)


def flower():
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    return pytest.importorskip("flwr", reason="needs fmjax[federated], in its own environment")


def test_a_flower_server_and_two_clients_on_the_loopback():
    flower()
    from flwr.client import start_client
    from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
    from flwr.server import ServerConfig, start_server
    from flwr.server.strategy import FedAvg

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    last = []

    class Kept(FedAvg):
        def aggregate_fit(self, server_round, results, failures):
            assert not failures, failures
            parameters, metrics = super().aggregate_fit(server_round, results, failures)
            last.append(parameters_to_ndarrays(parameters))
            return parameters, metrics

    strategy = Kept(
        fraction_evaluate=0.0,
        min_fit_clients=2,
        min_available_clients=2,
        initial_parameters=ndarrays_to_parameters(arrays_of(make_params(), {})),
        on_fit_config_fn=lambda number: {"server_round": number},
    )
    clients = [
        threading.Thread(
            target=start_client,
            kwargs={
                "server_address": address,
                "client": numpy_client(training).to_client(),
                "insecure": True,
            },
            daemon=True,
        )
        for training in trainings()
    ]
    for thread in clients:
        thread.start()
    start_server(server_address=address, config=ServerConfig(num_rounds=2), strategy=strategy)
    for thread in clients:
        thread.join(timeout=30)
    assert len(last) == 2
    chex.assert_trees_all_close(
        variables_of(last[-1], make_params(), {})[0], simulated(), rtol=1e-5, atol=1e-6
    )


def test_messages_of_today_s_flower_are_answered_as_its_strategies_expect():
    flower()
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
    from flwr.supercore.task_identity import TaskIdentity

    # What a running server has: without it no message can be made.
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 0
    answers = []
    arrays = ArrayRecord.from_numpy_ndarrays(arrays_of(make_params(), {}))
    for number in (1, 2):
        answers = []
        for place in range(2):
            app = client_app(lambda context: trainings()[context.node_config["place"]])
            config = ConfigRecord({"server-round": number})
            content = RecordDict({"arrays": arrays, "config": config})
            context = Context(1, place, {"place": place}, RecordDict(), {})
            answers.append(app(Message(content, place, "train"), context).content)
        arrays = aggregate_arrayrecords(answers, "num-examples")
    assert isinstance(answers[0]["metrics"], MetricRecord)
    chex.assert_trees_all_close(
        variables_of(arrays.to_numpy_ndarrays(), make_params(), {})[0],
        simulated(),
        rtol=1e-5,
        atol=1e-6,
    )
