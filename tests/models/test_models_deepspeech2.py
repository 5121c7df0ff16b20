"""Deep Speech 2 against a plain PyTorch twin: outputs, gradients, statistics, weights and back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import assert_near, exported
from safetensors.torch import save_file

import fmjax
from fmjax import hub
from fmjax.models import deepspeech2
from fmjax.tree import count_parameters, flatten

TINY = dataclasses.replace(deepspeech2.VARIANTS["tiny"], hidden_dropout=0.0)
KINDS = {
    "relu": TINY,
    "gru": dataclasses.replace(
        TINY, cell="gru", bidirectional=False, lookahead=3, dense_sizes=(), clip=0.5
    ),
    "lstm": dataclasses.replace(TINY, cell="lstm", dense_sizes=(6, 5)),
}
FRAMES = np.array([12, 7, 4])


def draw(seed=0):
    """Frames whose padding is anything, and their mask."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(3, FRAMES.max(), TINY.num_features)).astype(np.float32)
    return features, (np.arange(FRAMES.max()) < FRAMES[:, None]).astype(np.int32)


class Part(torch.nn.Module):
    """Modules by name."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def linear(inputs, outputs):
    return torch.nn.Linear(inputs, outputs, bias=False)


class Twin(torch.nn.Module):
    """The same, one example's frames at a time wherever there is padding."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        channels, bins, convs = 1, config.num_features, []
        norm = torch.nn.BatchNorm1d
        for width, size, stride in zip(
            config.conv_channels, config.conv_sizes, config.conv_strides, strict=True
        ):
            around = size[0] // 2, size[1] // 2
            conv = torch.nn.Conv2d(channels, width, size, stride, around, bias=False)
            convs.append(Part(conv=conv, norm=torch.nn.BatchNorm2d(width)))
            channels, bins = width, -(-bins // stride[1])
        self.conv = torch.nn.ModuleList(convs)
        width, layers = channels * bins, []
        gates = {"relu": 1, "gru": 3, "lstm": 4}[config.cell] * config.hidden_size
        for _ in range(config.num_hidden_layers):
            parts = {"forward_": linear(config.hidden_size, gates)}
            if config.bidirectional:
                parts["backward_"] = linear(config.hidden_size, gates)
            layers.append(Part(input=linear(width, gates), norm=norm(gates), **parts))
            width = config.hidden_size
        self.recurrent = torch.nn.ModuleList(layers)
        if config.lookahead:
            size = config.lookahead + 1, 1
            self.lookahead = torch.nn.Conv2d(width, width, size, groups=width, bias=False)
        dense = []
        for features in config.dense_sizes:
            dense.append(Part(dense=linear(width, features), norm=norm(features)))
            width = features
        self.dense = torch.nn.ModuleList(dense)
        self.head = torch.nn.Linear(width, config.vocab_size)

    def clip(self, x):
        return x.clamp(0, self.config.clip)

    def normed(self, norm, rows):
        """Rows [T_i, C] of each example, normed together."""
        together = norm(torch.cat(rows))
        return list(together.split([len(row) for row in rows]))

    def step(self, given, hidden, state):
        """One time of one example, written out from the papers' formulas."""
        product = hidden(state[0])
        match self.config.cell:
            case "relu":
                return (self.clip(given + product),)
            case "gru":
                (r, z, n), (r_h, z_h, n_h) = given.chunk(3), product.chunk(3)
                z = torch.sigmoid(z + z_h)
                n = torch.tanh(n + torch.sigmoid(r + r_h) * n_h)
                return ((1 - z) * n + z * state[0],)
            case "lstm":
                i, f, g, o = (given + product).chunk(4)
                memory = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
                return torch.sigmoid(o) * torch.tanh(memory), memory

    def direction(self, rows, hidden, *, reverse):
        states = (rows.new_zeros(self.config.hidden_size),) * (1 + (self.config.cell == "lstm"))
        outputs = {}
        order = range(len(rows))
        for time in reversed(order) if reverse else order:
            states = self.step(rows[time], hidden, states)
            outputs[time] = states[0]
        return torch.stack([outputs[time] for time in order])

    def forward(self, features, lengths):
        config = self.config
        rows = [one[:length].T for one, length in zip(features, lengths, strict=True)]  # [M, T_i]
        images = [row.T[None, None] for row in rows]  # [1, 1, T_i, M]
        for layer in self.conv:
            images = [layer.conv(image) for image in images]
            shapes = [image.shape for image in images]
            flat = [image[0].flatten(1).T for image in images]  # [T_i * M, C]
            # As one image of the norm's, whose gradient is wrong for the transposed one.
            wide = torch.cat(flat).T[None, :, :, None].contiguous()
            wide = layer.norm(wide)[0, :, :, 0].T.split([len(one) for one in flat])
            images = [
                self.clip(one.T.reshape(shape)) for one, shape in zip(wide, shapes, strict=True)
            ]
        rows = [image[0].transpose(0, 1).flatten(1) for image in images]  # [T_i, C * M]
        states = [rows]
        for layer in self.recurrent:
            given = self.normed(layer.norm, [layer.input(row) for row in rows])
            rows = [self.direction(row, layer.forward_, reverse=False) for row in given]
            if config.bidirectional:
                back = [self.direction(row, layer.backward_, reverse=True) for row in given]
                rows = [a + b for a, b in zip(rows, back, strict=True)]
            states.append(rows)
        if config.lookahead:
            padded = [torch.nn.functional.pad(row, (0, 0, 0, config.lookahead)) for row in rows]
            rows = [self.lookahead(row.T[None, :, :, None])[0, :, :, 0].T for row in padded]
        for layer in self.dense:
            rows = [
                self.clip(row)
                for row in self.normed(layer.norm, [layer.dense(row) for row in rows])
            ]
        return [self.head(row) for row in rows], states

    def tensors(self):
        """By the names of files."""
        return {
            name.replace("forward_", "forward").replace("backward_", "backward"): value
            for name, value in self.state_dict().items()
        }


def make(kind, folder, seed=0):
    """The twin, and our model with its weights, read from a file."""
    torch.manual_seed(seed)
    twin = Twin(KINDS[kind])
    for value in [*twin.parameters(), *twin.buffers()]:
        if value.is_floating_point():
            value.data += 0.2 * torch.randn_like(value).abs()
    file = folder / "model.safetensors"
    save_file({name: value.contiguous() for name, value in twin.tensors().items()}, file)
    model, variables = hub.load_weights(file, "deepspeech2", KINDS[kind], head="ctc")
    return twin.double(), model, variables


@pytest.mark.parametrize(
    ("kind", "train"),
    [
        ("relu", True),
        pytest.param("gru", False, marks=pytest.mark.slow),
        pytest.param("relu", False, marks=pytest.mark.slow),
        pytest.param("gru", True, marks=pytest.mark.slow),
        pytest.param("lstm", True, marks=pytest.mark.slow),
    ],
)
def test_equals_the_twin(kind, train, tmp_path):
    twin, model, variables = make(kind, tmp_path)
    twin.train(train)
    features, mask = draw()
    given = torch.tensor(features).double()
    theirs, their_states = twin(given, FRAMES)
    rng = np.random.default_rng(1)
    steps = -(-FRAMES.max() // 2)
    weights = rng.normal(size=(3, steps, model.config.vocab_size))

    @jax.jit
    def run(variables):
        def total(params):
            out, updates = model.apply(
                variables | {"params": params}, features, mask, train=train,
                output_hidden_states=True, mutable=["batch_stats"],
            )  # fmt: skip
            kept = jnp.arange(steps) < out.logit_lengths[:, None]
            return jnp.vdot(jnp.where(kept[..., None], out.logits, 0), weights), (out, updates)

        return jax.grad(total, has_aux=True)(variables["params"])

    grads, (out, updates) = run(variables)
    lengths = deepspeech2.output_lengths(model.config, FRAMES)
    np.testing.assert_array_equal(out.logit_lengths, lengths)
    for row, length in enumerate(lengths):
        assert_near(out.logits[row, :length], theirs[row].detach(), "logits", 2e-5)
        for number, states in enumerate(their_states):
            mine = out.hidden_states[number][row]
            assert_near(mine[:length], states[row].detach(), f"states {number}", 2e-5)
            assert not np.any(mine[length:])
    sum(
        (row * torch.tensor(weights[i, : len(row)])).sum() for i, row in enumerate(theirs)
    ).backward()
    of_twin = {name: value.grad for name, value in twin.named_parameters()}
    largest = max(float(grad.abs().max()) for grad in of_twin.values())
    zeros = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    ours = exported(deepspeech2, model, {"params": grads, "batch_stats": zeros})
    for name, grad in of_twin.items():
        mine = ours[name.replace("forward_", "forward").replace("backward_", "backward")]
        scale = max(float(grad.abs().max()), 1e-2 * largest)
        error = np.abs(mine - grad.numpy()).max() / scale
        assert error <= 2e-5, f"gradient of {name}: {error:.2e}"
    moved = exported(deepspeech2, model, {"params": variables["params"], **updates})
    for name, value in twin.tensors().items():
        assert_near(moved[name], value.detach(), name)


def test_padding_and_batches_change_nothing(tmp_path):
    """A row alone, or with more padding of anything, has the same logits."""
    _, model, variables = make("relu", tmp_path)
    features, mask = draw()
    run = jax.jit(model.apply)
    whole = run(variables, features, mask)
    longer = np.pad(features, ((0, 0), (0, 5), (0, 0)), constant_values=7.0)
    padded = run(variables, longer, np.pad(mask, ((0, 0), (0, 5))))
    np.testing.assert_array_equal(padded.logit_lengths, whole.logit_lengths)
    for row, length in enumerate(whole.logit_lengths):
        mine = whole.logits[row, :length]
        np.testing.assert_allclose(padded.logits[row, :length], mine, atol=1e-5)
    alone = run(variables, features[1:2, : FRAMES[1]])
    np.testing.assert_allclose(alone.logits[0], whole.logits[1, : alone.logits.shape[1]], atol=1e-5)


@pytest.mark.slow
def test_recomputed_layers_are_the_same_and_files_go_there_and_back(tmp_path):
    _, model, variables = make("gru", tmp_path)
    features, mask = draw()

    def loss(model, params):
        out, _ = model.apply(
            variables | {"params": params}, features, mask, train=True, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.sin(out.logits))

    plain, again = (
        jax.jit(jax.grad(lambda params, m=m: loss(m, params)))(variables["params"])
        for m in (model, model.clone(remat="block"))
    )
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    fmjax.save(tmp_path / "saved", model, variables)
    read, back = fmjax.load(tmp_path / "saved")
    assert read == model
    for path, leaf in flatten(variables).items():
        np.testing.assert_array_equal(flatten(back)[path], leaf, err_msg=path)


def test_published_sizes():
    """Amodei et al. 2015, tables 10 and 11."""
    for name, millions in (("68m", 68), ("70m", 70)):
        model = deepspeech2.Model(deepspeech2.VARIANTS[name], head="ctc")
        count = count_parameters(hub.abstract_variables(model)["params"])
        assert count / 1e6 == pytest.approx(millions, rel=0.006)


def test_wrong_configs_and_inputs():
    with pytest.raises(ValueError, match="must be odd") as error:
        deepspeech2.Config(
            conv_sizes=((4, 4),), cell="rnn", lookahead=2, pad_token_id=29, hidden_size=0
        )
    for part in (
        "as many entries",
        "cell='rnn'",
        "lookahead=2",
        "pad_token_id=29",
        "hidden_size=0",
    ):
        assert part in str(error.value)
    model = deepspeech2.Model(TINY, head="ctc")
    with pytest.raises(ValueError, match=r"must be \[B, T, 13\]"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 12)))
    with pytest.raises(ValueError, match=r"attention_mask has the shape \(1, 3\)"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 13)), jnp.ones((1, 3)))
