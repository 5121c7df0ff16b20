"""Recurrent layers as scans: LSTM, GRU and plain ones, in one or both directions, over padding.

Hochreiter & Schmidhuber 1997, "Long short-term memory"; Cho et al. 2014, arXiv:1406.1078, with the
reset gate behind the product (Chung et al. 2014, arXiv:1412.3555, and cuDNN), as PyTorch has it;
Elman 1990. Both directions: Schuster & Paliwal 1997.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.nn.activation import activation
from fmjax.nn.adapter import adapted, adapters
from fmjax.nn.compact import Compact, whole
from fmjax.nn.dropout import Dropout
from fmjax.nn.linear import Dense
from fmjax.nn.parameter import kept, parameter
from fmjax.nn.product import gram, matmul

State = tuple[Array, ...]
"""[B, H] float32 each: the hidden state, and of an LSTM its cell's."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a layer computes at each time.

    Attributes:
      gates: G; the products with inputs and hidden states are [B, G * H].
      states: how many arrays its `State` has.
      step: (inputs' product, hidden state's product, state) -> the next state.
    """

    gates: int
    states: int
    step: Callable[[Array, Array, State], State]


def _lstm_step(given: Array, product: Array, state: State) -> State:
    enter, forget, value, out = jnp.split(given + product, 4, axis=-1)
    memory = jax.nn.sigmoid(forget) * state[1] + jax.nn.sigmoid(enter) * jnp.tanh(value)
    return jax.nn.sigmoid(out) * jnp.tanh(memory), memory


def _gru_step(given: Array, product: Array, state: State) -> State:
    reset, keep, value = jnp.split(given, 3, axis=-1)
    of_reset, of_keep, of_value = jnp.split(product, 3, axis=-1)
    value = jnp.tanh(value + jax.nn.sigmoid(reset + of_reset) * of_value)
    keep = jax.nn.sigmoid(keep + of_keep)
    return ((1 - keep) * value + keep * state[0],)


def _plain_step(act: str, given: Array, product: Array, state: State) -> State:
    return (activation(act)(given + product),)


LSTM = Cell(4, 2, _lstm_step)
GRU = Cell(3, 1, _gru_step)


@functools.cache
def plain(act: str) -> Cell:
    """The cell without gates, of an activation's name: "tanh", "relu", ..."""
    return Cell(1, 1, partial(_plain_step, act))


def within(width: int) -> Callable[..., Array]:
    """PyTorch's initial weights and biases: uniform within 1 / sqrt(H)."""
    limit = width**-0.5

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


class Recurrence(nn.Module):
    """One direction of a layer, from the products of its inputs on.

    What stands in padding changes nothing: states stay what they are there, and outputs are 0. A
    layer that runs backwards begins with each row's last token.

    Args:
        cell: what is computed.
        features: H.
        reverse: whether it runs from the end.
        use_bias: whether the hidden states' product has a bias of its own.
        kernel_init: initializer of the kernel [H, G * H] and the bias; None is `within`.
    """

    cell: Cell
    features: int
    reverse: bool = False
    use_bias: bool = True
    kernel_init: Callable[..., Array] | None = None

    @nn.compact
    def __call__(
        self, given: Array, mask: Array | None = None, state: State | None = None
    ) -> tuple[Array, State]:
        """Runs the layer.

        Args:
            given: [B, T, G * H], the inputs' products.
            mask: [B, T], nonzero = keep; None keeps everything.
            state: from which it begins; None is zeros.

        Returns:
            ([B, T, H] in given's dtype, the state at each row's end).
        """
        cell, width = self.cell, self.features
        columns = cell.gates * width
        init = within(width) if self.kernel_init is None else self.kernel_init
        kernel = kept(self, "kernel", init, (width, columns))
        bias = parameter(self, "bias", init, (columns,)) if self.use_bias else None
        if state is None:
            state = (jnp.zeros((given.shape[0], width), jnp.float32),) * cell.states
        keep = jnp.ones(given.shape[:2], bool) if mask is None else mask.astype(bool)
        dtype, given = given.dtype, jnp.swapaxes(given, 0, 1)  # [T, B, G * H]
        keep = keep.T[..., None]  # [T, B, 1]
        leaves = adapters(self)
        if leaves is None:
            runs: Any = _recurrence  # custom_vjp hides what it returns
            hidden, end = runs(cell, self.reverse, given, keep, whole(kernel), bias, state)
        else:
            # One mask for all times, as in Gal & Ghahramani 2016, arXiv:1512.05287.
            drops = "dropout" in leaves and self.has_rng("dropout")
            rng = self.make_rng("dropout") if drops else None
            product = partial(_adapted_product, leaves, dtype, kernel, bias, rng)
            hidden, _, end = _run(cell, self.reverse, product, given, keep, state)
        hidden = jnp.where(keep, hidden[0].astype(dtype), 0)
        return jnp.swapaxes(hidden, 0, 1), end


def _adapted_product(
    leaves: Any, dtype: Any, kernel: Array | Compact, bias: Array | None, rng: Any, hidden: Array
) -> Array:
    return adapted(leaves, hidden.astype(dtype), kernel, bias, rng)


def _product(kernel: Array, bias: Array | None, dtype: Any, hidden: Array) -> Array:
    """[B, H] -> [B, G * H] float32, in the inputs' precision."""
    y = matmul(hidden.astype(dtype), kernel)
    return y if bias is None else y + bias.astype(jnp.float32)


def _run(
    cell: Cell,
    reverse: bool,
    product: Callable[[Array], Array],
    given: Array,
    keep: Array,
    state: State,
) -> tuple[State, Array, State]:
    """The states [T, B, H] behind each time, the products [T, B, G * H] and the last state."""

    def step(state: State, inputs: tuple[Array, Array]) -> tuple[State, tuple[State, Array]]:
        given, keep = inputs
        y = product(state[0])
        new = cell.step(given.astype(jnp.float32), y, state)
        new = tuple(jnp.where(keep, a, b) for a, b in zip(new, state, strict=True))
        return new, (new, y)

    end, (states, products) = jax.lax.scan(step, state, (given, keep), reverse=reverse)
    return states, products, end


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recurrence(
    cell: Cell,
    reverse: bool,
    given: Array,
    keep: Array,
    kernel: Array,
    bias: Array | None,
    state: State,
) -> tuple[State, State]:
    """States of all times and the last one.

    Differentiated as it stands, every step would add to a gradient as large as the kernel; here
    the kernel's is one product over all times.
    """
    product = partial(_product, kernel, bias, given.dtype)
    states, _, end = _run(cell, reverse, product, given, keep, state)
    return states, end


def _forward(
    cell: Cell,
    reverse: bool,
    given: Array,
    keep: Array,
    kernel: Array,
    bias: Array | None,
    state: State,
) -> tuple[tuple[State, State], Any]:
    product = partial(_product, kernel, bias, given.dtype)
    states, products, end = _run(cell, reverse, product, given, keep, state)
    return (states, end), (given, keep, kernel, bias, state, states, products)


def _backward(cell: Cell, reverse: bool, saved: Any, grads: tuple[State, State]) -> tuple[Any, ...]:
    given, keep, kernel, bias, first, states, products = saved
    # What each time began with.
    before = tuple(
        jnp.concatenate([x[1:], x0[None]] if reverse else [x0[None], x[:-1]])
        for x, x0 in zip(states, first, strict=True)
    )

    def step(grad: State, inputs: Any) -> tuple[State, tuple[Array, Array]]:
        given, keep, product, state, own = inputs
        grad = tuple(a + b for a, b in zip(grad, own, strict=True))
        _, back = jax.vjp(cell.step, given.astype(jnp.float32), product, state)
        through = tuple(jnp.where(keep, g, 0) for g in grad)
        dgiven, dproduct, dstate = back(through)
        past = tuple(jnp.where(keep, d, g) for d, g in zip(dstate, grad, strict=True))
        dhidden = matmul(dproduct.astype(given.dtype), kernel, transposed=True)
        return (past[0] + dhidden, *past[1:]), (dgiven.astype(given.dtype), dproduct)

    inputs = given, keep, products, before, grads[0]
    dstate, (dgiven, dproducts) = jax.lax.scan(step, grads[1], inputs, reverse=not reverse)
    rows = dproducts.reshape(-1, dproducts.shape[-1])  # [T * B, G * H]
    hidden = before[0].reshape(-1, before[0].shape[-1])
    dkernel = gram(hidden.astype(given.dtype), rows.astype(given.dtype)).astype(kernel.dtype)
    dbias = None if bias is None else jnp.sum(rows, axis=0).astype(bias.dtype)
    return dgiven, None, dkernel, dbias, dstate


_recurrence.defvjp(_forward, _backward)


class RecurrentLayer(nn.Module):
    """One layer: [B, T, I] -> [B, T, H], or [B, T, 2 * H] with both directions side by side.

    Args:
        cell, features, use_bias, kernel_init: see `Recurrence`.
        bidirectional: whether there is a second direction, with weights of its own.
    """

    cell: Cell
    features: int
    bidirectional: bool = False
    use_bias: bool = True
    kernel_init: Callable[..., Array] | None = None

    @nn.compact
    def __call__(
        self, x: Array, mask: Array | None = None, states: tuple[State, ...] | None = None
    ) -> tuple[Array, tuple[State, ...]]:
        """Runs the layer.

        Args:
            x: [B, T, I].
            mask: [B, T], nonzero = keep; None keeps everything.
            states: from which the directions begin; None is zeros.

        Returns:
            (outputs, the directions' last states).
        """
        outputs, ends = [], []
        init = within(self.features) if self.kernel_init is None else self.kernel_init
        for number, name in enumerate(("forward", "backward")[: 1 + self.bidirectional]):
            columns = self.cell.gates * self.features
            given = Dense(columns, self.use_bias, init, name=f"{name}_input")(x)
            y, end = Recurrence(
                self.cell, self.features, bool(number), self.use_bias, init, name=f"{name}_hidden"
            )(given, mask, None if states is None else states[number])
            outputs.append(y)
            ends.append(end)
        return jnp.concatenate(outputs, axis=-1), tuple(ends)


class Recurrent(nn.Module):
    """Layers one upon the other, as torch.nn.LSTM, GRU and RNN with ``batch_first``.

    Args:
        cell, features, bidirectional, use_bias: see `RecurrentLayer`.
        num_layers: L.
        dropout_rate: of the outputs of all layers but the last.
    """

    cell: Cell
    features: int
    num_layers: int = 1
    bidirectional: bool = False
    use_bias: bool = True
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Array | None = None,
        states: tuple[tuple[State, ...], ...] | None = None,
        *,
        train: bool = False,
    ) -> tuple[Array, tuple[tuple[State, ...], ...]]:
        """Runs the layers.

        Args:
            x: [B, T, I].
            mask: [B, T], nonzero = keep; None keeps everything.
            states: of each layer and direction; None is zeros.
            train: whether dropout is on; it needs ``rngs={"dropout": key}``.

        Returns:
            (outputs of the last layer, the last states of each layer and direction).
        """
        ends = []
        for number in range(self.num_layers):
            layer = RecurrentLayer(
                self.cell, self.features, self.bidirectional, self.use_bias, name=f"blocks_{number}"
            )
            x, end = layer(x, mask, None if states is None else states[number])
            ends.append(end)
            if number < self.num_layers - 1:
                x = Dropout(self.dropout_rate)(x, train)
        return x, tuple(ends)
