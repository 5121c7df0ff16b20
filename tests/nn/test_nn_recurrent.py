"""Recurrent layers against PyTorch's on packed sequences: outputs, last states, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import assert_near

from fmjax.nn.recurrent import GRU, LSTM, Recurrent, plain
from fmjax.tree import flatten, unflatten
from fmjax.weights import Tensor, export_params, import_params, recurrent_rules

B, T, D, H, L = 3, 7, 5, 4, 2
LENGTHS = np.array([7, 4, 1])
MASK = (np.arange(T) < LENGTHS[:, None]).astype(np.int32)
CELLS = {
    "lstm": (LSTM, torch.nn.LSTM, {}),
    "gru": (GRU, torch.nn.GRU, {}),
    "relu": (plain("relu"), torch.nn.RNN, {"nonlinearity": "relu"}),
    "tanh": (plain("tanh"), torch.nn.RNN, {"nonlinearity": "tanh"}),
}


def twin_of(name, *, bidirectional, bias=True):
    torch.manual_seed(0)
    options = {"batch_first": True, "bidirectional": bidirectional, "bias": bias, "num_layers": L}
    return CELLS[name][1](D, H, **options, **CELLS[name][2])


def ours_of(name, twin, *, bidirectional, bias=True):
    """The module and the twin's weights."""
    model = Recurrent(CELLS[name][0], H, L, bidirectional, bias)
    abstract = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1, D)))
    abstract = flatten({"params": {"rnn": abstract["params"]}})
    table = recurrent_rules("rnn", "rnn", layers=L, bidirectional=bidirectional, bias=bias)
    arrays = {f"rnn.{key}": value.detach().numpy() for key, value in twin.named_parameters()}
    tensors = {
        key: Tensor(key, value.shape, value.dtype, lambda value=value: value)
        for key, value in arrays.items()
    }
    read = import_params(table, tensors, abstract, place=lambda path, leaf: jnp.asarray(leaf))
    for tensor in export_params(table, read):
        np.testing.assert_array_equal(tensor.read(), arrays[tensor.name])
    return model, read, table


def variables_of(flat):
    return {"params": unflatten(flat)["params"]["rnn"]}


@pytest.mark.parametrize(
    ("name", "bidirectional"),
    [
        ("lstm", True),
        ("gru", True),
        pytest.param("relu", True, marks=pytest.mark.slow),
        pytest.param("tanh", False, marks=pytest.mark.slow),
        pytest.param("lstm", False, marks=pytest.mark.slow),
    ],
)
def test_layers_equal_packed_sequences(name, bidirectional):
    twin = twin_of(name, bidirectional=bidirectional)
    model, flat, table = ours_of(name, twin, bidirectional=bidirectional)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    wanted = rng.normal(size=(B, T, H * (1 + bidirectional))).astype(np.float32)
    wanted *= MASK[..., None]  # PyTorch's padding has no gradient either

    given = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    pack = torch.nn.utils.rnn.pack_padded_sequence
    packed = pack(given, torch.tensor(LENGTHS), batch_first=True)
    outputs, ends = twin.double()(packed)
    outputs, _ = torch.nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True)
    ends = ends if isinstance(ends, tuple) else (ends,)
    weights = [rng.normal(size=tuple(end.shape)) for end in ends]
    total = (outputs * torch.tensor(wanted)).sum()
    total = total + sum((e * torch.tensor(w)).sum() for e, w in zip(ends, weights, strict=True))
    total.backward()

    @jax.jit
    def run(flat, x):
        def total(flat, x):
            y, ends = model.apply(variables_of(flat), x, MASK)
            # [layer and direction, B, H] for each kind of state, as PyTorch has it
            ends = [jnp.stack(kind) for kind in zip(*sum(ends, ()), strict=True)]
            total = jnp.vdot(y, wanted) + sum(map(jnp.vdot, ends, weights))
            return total, (y, ends)

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(flat, x)

    (_, (y, ours)), (grads, dx) = run(flat, x)
    assert_near(y, outputs.detach(), "outputs")
    for kind, (mine, theirs) in enumerate(zip(ours, ends, strict=True)):
        assert_near(mine, theirs.detach(), f"state {kind}")
    assert_near(dx, given.grad, "gradient of the inputs")
    of_tensors = {tensor.name: tensor.read() for tensor in export_params(table, grads)}
    for key, parameter in twin.named_parameters():
        assert_near(of_tensors[f"rnn.{key}"], parameter.grad, f"gradient of {key}")


@pytest.mark.slow
def test_layers_without_biases():
    twin = twin_of("gru", bidirectional=False, bias=False)
    model, flat, _ = ours_of("gru", twin, bidirectional=False, bias=False)
    x = np.random.default_rng(1).normal(size=(B, T, D)).astype(np.float32)
    y, _ = model.apply(variables_of(flat), x)
    assert_near(y, twin(torch.tensor(x))[0].detach(), "outputs")


def test_a_sequence_in_two_parts_is_the_whole():
    """States go on where they were, padding or not, and what is in it changes nothing."""
    model = Recurrent(LSTM, H, L)
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    run = jax.jit(model.apply)
    whole, ends = run(variables, x, MASK)
    first, states = run(variables, x[:, :4], MASK[:, :4])
    second, states = run(variables, jnp.where(MASK[..., None], x, 9.0)[:, 4:], MASK[:, 4:], states)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=1e-6)
    for mine, reference in zip(jax.tree.leaves(states), jax.tree.leaves(ends), strict=True):
        np.testing.assert_allclose(mine, reference, atol=1e-6)
    assert not np.any(np.asarray(whole)[MASK == 0])


def test_adapters_of_both_products_are_merged_kernels():
    """A low-rank update of the recurrent kernel as of the input's: outputs and gradients."""
    model = Recurrent(GRU, H, 1)
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    variables = model.init(jax.random.key(1), x)
    places = {"blocks_0/forward_input": D, "blocks_0/forward_hidden": H}
    leaves = {}
    for number, (place, width) in enumerate(places.items()):
        down, up = jax.random.split(jax.random.key(2 + number))
        leaves[f"{place}/down"] = jax.random.normal(down, (width, 2))
        leaves[f"{place}/up"] = jax.random.normal(up, (2, 3 * H))
        leaves[f"{place}/scale"] = jnp.float32(0.3)
    merged = flatten(variables)
    for place in places:
        update = leaves[f"{place}/down"] @ leaves[f"{place}/up"] * 0.3
        merged[f"params/{place}/kernel"] += update

    def total(variables, x):
        return jnp.sum(jnp.sin(model.apply(variables, x, MASK)[0]))

    values = jax.jit(jax.value_and_grad(total, argnums=1))
    one, of_one = values(variables | {"adapters": unflatten(leaves)}, x)
    other, of_other = values(unflatten(merged), x)
    np.testing.assert_allclose(one, other, rtol=1e-5)
    np.testing.assert_allclose(of_one, of_other, atol=1e-5)


@pytest.mark.slow
def test_low_precision_is_near():
    model = Recurrent(LSTM, H, L, True)
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    variables = model.init(jax.random.key(1), x)
    whole, _ = model.apply(variables, x, MASK)
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    y, _ = model.apply(low, x.astype(jnp.bfloat16), MASK)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float32), whole, atol=0.02)
