"""DALL-E's transformer against PyTorch's layers, its patterns against pictures of them."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from generator_twins import parameters
from parity import assert_near, check_decoding, exported
from torch import nn

import fmjax
from fmjax.models import dalle
from fmjax.tree import flatten

TINY = dataclasses.replace(dalle.VARIANTS["tiny"], text_vocab_size=11, dropout=0.0)


def pattern(config, kind):
    """What an image's token sees of the image, from the figure's words: bool [N, N]."""
    side = config.grid_size
    table = np.zeros((side**2, side**2), bool)
    for query in range(side**2):
        for key in range(query + 1):
            table[query, key] = {
                "full": True,
                "row": query - key <= side,  # up to the one in the row above
                "column": query % side == key % side,
                # A window around it, whose sides go on in the next row.
                "conv": any(
                    query - key == down * side + right
                    for down in range(config.window // 2 + 1)
                    for right in range(-(config.window // 2), config.window // 2 + 1)
                ),
            }[kind]
    return table


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.norm_1, self.norm_2 = (nn.LayerNorm(width, eps=1e-5) for _ in range(2))
        self.attn, self.mlp = nn.Module(), nn.Module()
        for name in ("query", "key", "value", "out"):
            self.attn.add_module(name, nn.Linear(width, width))
        self.mlp.up, self.mlp.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.heads = config.num_attention_heads

    def forward(self, x, mask):
        y = self.norm_1(x)
        q, k, v = (
            getattr(self.attn, name)(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        found = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.attn.out(found.transpose(1, 2).flatten(2))
        return x + self.mlp.down(nn.functional.gelu(self.mlp.up(self.norm_2(x))))


class Twin(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.hidden_size
        self.model = nn.Module()
        self.model.embed = nn.Module()
        for name, size in (
            ("word", config.vocab_size), ("position", config.text_length),
            ("row", config.grid_size), ("column", config.grid_size),
        ):  # fmt: skip
            self.model.embed.add_module(name, nn.Embedding(size, width))
        self.model.layers = nn.ModuleList(
            Layer(config) for _ in range(config.num_hidden_layers)
        )  # fmt: skip
        self.model.final_norm = nn.LayerNorm(width, eps=1e-5)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)

    def forward(self, ids):
        config, embed = self.config, self.model.embed
        text, side = config.text_length, config.grid_size
        length = ids.shape[1]
        place = torch.arange(side**2)
        positions = torch.cat(
            [embed.position.weight, embed.row(place // side) + embed.column(place % side)]
        )
        x = embed.word(ids) + positions[:length]
        names = [config.attention_pattern[i % 3] for i in range(config.num_hidden_layers - 1)]
        for layer, kind in zip(self.model.layers, (*names, config.last_attention), strict=True):
            mask = np.tril(np.ones((text + side**2, text + side**2), bool))
            mask[text:, text:] &= pattern(config, kind)
            x = layer(x, torch.tensor(mask[:length, :length]))
        return self.lm_head(self.model.final_norm(x))


def test_equals_pytorch(tmp_path):
    torch.manual_seed(0)
    twin = Twin(TINY)
    for tensor in twin.parameters():
        tensor.data = 0.4 * torch.randn_like(tensor)
    torch.save(twin.state_dict(), tmp_path / "twin.pth")
    model, variables = fmjax.load_weights(tmp_path / "twin.pth", "dalle", TINY, head="causal_lm")
    named = exported(dalle, model, variables)
    assert named.keys() == twin.state_dict().keys()
    for name, tensor in twin.state_dict().items():
        np.testing.assert_array_equal(named[name], tensor, err_msg=name)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, TINY.vocab_size, (2, 13))
    twin = twin.double()
    theirs = twin(torch.tensor(ids))
    weights = rng.normal(size=theirs.shape)
    (theirs * torch.tensor(weights)).sum().backward()

    @jax.jit
    def run(variables):
        def total(params):
            logits = model.apply({"params": params}, ids).logits
            return (logits * weights).sum(), logits

        return jax.value_and_grad(total, has_aux=True)(variables["params"])

    (_, logits), grads = run(variables)
    assert_near(logits, theirs.detach(), "logits", 1e-5)
    grads = exported(dalle, model, {"params": grads})
    largest = max(float(p.grad.abs().max()) for p in twin.parameters())
    for name, parameter in twin.named_parameters():
        scale = max(float(parameter.grad.abs().max()), 1e-2 * largest)
        error = np.abs(grads[name] - parameter.grad.numpy()).max() / scale
        assert error < 2e-5, f"gradient of {name}: {error}"
    fmjax.save(tmp_path / "again", model, variables)
    again, read = fmjax.load(tmp_path / "again")
    assert again == model
    for path, leaf in flatten(read).items():
        np.testing.assert_array_equal(leaf, flatten(variables)[path], err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_cached_decoding_equals_the_full_pass(scan):
    model, variables = fmjax.create(
        "dalle", dataclasses.replace(TINY, initializer_range=0.3), head="causal_lm",
        rng=jax.random.key(0), scan=scan,
    )  # fmt: skip
    check_decoding(model, variables)


def test_patterns_are_the_figures():
    """Of 4 x 4 tokens behind a text of 6, a window of 3, as in figure 11."""
    config = dataclasses.replace(TINY, text_length=6, grid_size=4)
    places = np.arange(22)
    found = np.asarray(dalle.sees(config, places[:, None], places[None]))
    for number, kind in enumerate(dalle.PATTERNS):
        np.testing.assert_array_equal(found[number, 6:, 6:], pattern(config, kind), err_msg=kind)
        np.testing.assert_array_equal(found[number, 6:, :6], True)
        np.testing.assert_array_equal(found[number, :6, :6], np.tril(np.ones((6, 6), bool)))
        assert not found[number, :6, 6:].any()


def test_published_size():
    # 12 billion: blocks of 12 * 3968^2 each, and the tables.
    config = dalle.VARIANTS["12b"]
    assert round(parameters(dalle, "12b", "causal_lm") / 1e9, 1) == 12.3
    # Section 3 and appendix B.1: column attention where (i - 2) mod 4 = 0 of layers 1 to 63.
    kinds = [dalle.PATTERNS[kind] for kind in config.kinds]
    assert [i for i in range(1, 64) if kinds[i - 1] == "column"] == list(range(2, 64, 4))
    assert kinds[-1] == "conv"
    assert set(kinds[:-1]) == {"row", "column"}


@pytest.mark.slow
def test_a_text_is_continued_by_an_image():
    """Drawn with a cache, one token after the other, as the greedy choice of the full pass."""
    model, variables = fmjax.create(
        "dalle", dataclasses.replace(TINY, initializer_range=0.5), head="causal_lm",
        rng=jax.random.key(0),
    )  # fmt: skip
    ids = dalle.padded_ids(TINY, [[3, 1], [5, 6, 7, 8, 9]])
    np.testing.assert_array_equal(ids, [[3, 1, 13, 14], [5, 6, 7, 8]])
    out = fmjax.generate(
        model, variables, ids, attention_mask=np.ones_like(ids), max_new_tokens=9, do_sample=False,
    )  # fmt: skip
    assert out.tokens.shape == (2, 9)
    logits = jax.jit(lambda v, x: model.apply(v, x).logits)(variables, out.sequences)
    np.testing.assert_array_equal(np.argmax(logits, axis=-1)[:, 3:-1], out.tokens)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="num_attention_heads=5") as error:
        dalle.Config(
            num_attention_heads=5, text_length=0, window=4, attention_pattern=("diagonal",)
        )
    for words in ("text_length=0", "window=4 must be odd", "not ['diagonal']"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="texts \\[0, 1\\]"):
        dalle.padded_ids(TINY, [[], [11], [1]])
