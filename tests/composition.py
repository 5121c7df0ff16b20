"""What every composition of methods must do, whatever it is composed of."""

import dataclasses
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fmjax.train import gradient, init_state, is_param, jit_step, make_train_step
from fmjax.train.checkpoint import Checkpoints
from fmjax.train.loop import Memory
from fmjax.tree import flatten


@dataclasses.dataclass(frozen=True)
class Composition:
    """One row: what is composed, and how it is trained.

    Attributes:
      methods: names of files in methods/.
      on: family and task.
      devices: how the step runs.
      slow: whether its methods are all in other rows, too, and it is for `make test-all`.
      make: gives the arguments of `check_trains`.
    """

    methods: tuple[str, ...]
    on: str
    make: Callable[[], dict]
    devices: str = "one device"
    slow: bool = False

    @property
    def name(self):
        return f"{'+'.join(self.methods)} on {self.on}"


COMPOSITIONS = []


def composition(*methods, on, devices="one device", slow=False):
    """Adds a function's arguments of `check_trains` to the table."""

    def add(make):
        COMPOSITIONS.append(Composition(methods, on, make, devices, slow))
        return make

    return add


def check_trains(
    variables,
    loss,
    tx,
    batch,
    *,
    is_trainable=is_param,
    differentiate=gradient,
    mesh=None,
    steps=8,
    falls_to=0.9,
    changes=("batch_stats/",),
    folder=None,
):
    """Trains on one batch: compiled once, a lower loss, frozen leaves as they were, and from half
    way on once more, to bitwise the same end.

    Args:
        falls_to: share of the first loss that the last one must be below; None for any below it.
        changes: how paths begin that the loss itself may move.
        folder: where given, the half is a checkpoint that was saved and restored.

    Returns:
        The last state and the losses.
    """
    # It counts by the function's address, which an earlier one may have had.
    chex.clear_trace_counter()
    # Compiled steps donate the state: the caller keeps its arrays.
    variables = jax.tree.map(jnp.copy, variables)
    state = init_state(variables, tx, jax.random.key(7), is_trainable)
    frozen = {path: np.asarray(leaf) for path, leaf in flatten(state.non_trainable).items()}
    step = jit_step(chex.assert_max_traces(make_train_step(differentiate(loss), tx), 1), mesh)
    losses = []
    half = None
    for number in range(steps):
        if number == steps // 2:
            half = jax.tree.map(jnp.copy, state)
            if folder is not None:
                with Checkpoints(folder, settings={}) as checkpoints:
                    checkpoints.save(state, {}, Memory())
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"].value))
    assert np.isfinite(losses).all(), losses
    assert losses[-1] < (losses[0] if falls_to is None else falls_to * losses[0]), losses
    for path, leaf in flatten(state.non_trainable).items():
        if not path.startswith(changes):
            np.testing.assert_array_equal(leaf, frozen[path], err_msg=path)
    assert half is not None
    if folder is not None:
        with Checkpoints(folder, settings={}) as checkpoints:
            restored = checkpoints.restore_last(jax.eval_shape(lambda: half))
        assert restored is not None
        half = restored.state
    for _ in range(steps - steps // 2):
        half, _ = step(half, batch)
    chex.assert_trees_all_equal(half.trainable, state.trainable)
    chex.assert_trees_all_equal(half.opt_state, state.opt_state)
    return state, losses
