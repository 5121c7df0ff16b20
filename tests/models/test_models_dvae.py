"""DALL-E's discrete VAE: its encoder against transformers', both sides against PyTorch's layers."""

import jax
import numpy as np
import pytest
import torch
import transformers
from generator_twins import check_outputs, parameters
from torch import nn

import fmjax
from fmjax.models import dvae


class Conv(nn.Module):
    def __init__(self, width, features, size):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(features, width, size, size))
        self.b = nn.Parameter(torch.zeros(features))

    def forward(self, x):
        return nn.functional.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class Block(nn.Module):
    def __init__(self, width, features, sizes, gain):
        super().__init__()
        narrow = features // 4
        widths = (width, narrow, narrow, narrow, features)
        self.res_path = nn.Module()
        for i, size in enumerate(sizes):
            self.res_path.add_module(f"conv_{i + 1}", Conv(widths[i], widths[i + 1], size))
        if width != features:
            self.id_path = Conv(width, features, 1)
        self.gain = gain

    def forward(self, x):
        y = x
        for i in range(1, 5):
            y = getattr(self.res_path, f"conv_{i}")(torch.relu(y))
        return (self.id_path(x) if hasattr(self, "id_path") else x) + self.gain * y


class Side(nn.Module):
    def __init__(self, config, decodes):
        super().__init__()
        self.decodes, self.blocks = decodes, nn.Module()
        self.groups, self.depth = len(config.multipliers), config.blocks_per_group
        first = config.codebook_size if decodes else config.num_channels
        width = config.initial_size if decodes else config.hidden_size
        self.blocks.input = Conv(first, width, 1 if decodes else 7)
        times = config.multipliers[::-1] if decodes else config.multipliers
        sizes = (1, 3, 3, 3) if decodes else (3, 3, 3, 1)
        for number, multiplier in enumerate(times):
            group = nn.Module()
            for i in range(self.depth):
                features = multiplier * config.hidden_size
                gain = 1 / (self.groups * self.depth) ** 2
                group.add_module(f"block_{i + 1}", Block(width, features, sizes, gain))
                width = features
            self.blocks.add_module(f"group_{number + 1}", group)
        self.blocks.output = nn.Module()
        last = 2 * config.num_channels if decodes else config.codebook_size
        self.blocks.output.conv = Conv(width, last, 1)

    def forward(self, x):
        x = self.blocks.input(x)
        for number in range(1, self.groups + 1):
            for i in range(1, self.depth + 1):
                x = getattr(getattr(self.blocks, f"group_{number}"), f"block_{i}")(x)
            if number < self.groups:
                x = (
                    nn.functional.interpolate(x, scale_factor=2)
                    if self.decodes
                    else nn.functional.max_pool2d(x, 2)
                )
        return self.blocks.output.conv(torch.relu(x))


class Twin(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.encoder, self.decoder = Side(config, False), Side(config, True)

    def forward(self, pixels, gumbel, temperature):
        logits = self.encoder(0.8 * pixels + 0.1)
        tokens = ((logits + gumbel) / temperature).softmax(1)
        location, log_scale = self.decoder(tokens).chunk(2, dim=1)
        images = ((torch.sigmoid(location) - 0.1) / 0.8).clip(0, 1)
        return logits, location, log_scale, images


def test_equals_pytorch(tmp_path):
    config = dvae.VARIANTS["tiny"]
    rng = np.random.default_rng(0)
    inputs = {
        "pixel_values": rng.uniform(size=(2, 8, 6, 2)).astype(np.float32),
        "gumbel": rng.gumbel(size=(2, 4, 3, 7)).astype(np.float32),
        "temperature": np.float32(0.7),
    }
    fields = ["logits", "image_location", "image_log_scale", "images"]
    check_outputs(dvae, config, "model", Twin(config), inputs, fields, tmp_path)


@pytest.mark.slow
def test_encoder_equals_transformers():
    """FLAVA's codebook is this encoder."""
    config = dvae.Config(hidden_size=8, initial_size=4, codebook_size=11)
    torch.manual_seed(0)
    theirs = transformers.FlavaImageCodebook(
        transformers.FlavaImageCodebookConfig(hidden_size=8, vocab_size=11)
    ).double()
    model, variables = fmjax.create("dvae", config, rng=jax.random.key(0))
    tensors = theirs.state_dict()
    own = {}
    for rule in dvae.rules(config, "model"):
        (name,) = rule.tensors
        if not name.startswith("encoder."):
            continue
        kind = {"w": "weight", "b": "bias"}[name.rpartition(".")[2]]
        place = name.removeprefix("encoder.").rpartition(".")[0]
        place = place.replace(".block_", ".group.block_").replace("res_path.", "res_path.path.")
        own[name] = tensors[f"{place}.{kind}"].numpy().astype(np.float32)
    flat = fmjax.tree.flatten(variables)
    for rule in dvae.rules(config, "model"):
        if rule.tensors[0] in own:
            (flat[rule.params[0]],) = rule.transform.load([own[rule.tensors[0]]])
    pixels = np.random.default_rng(0).uniform(size=(2, 16, 16, 3)).astype(np.float32)
    out = model.apply(fmjax.tree.unflatten(flat), pixels, method="encode")
    mapped = torch.tensor(0.8 * pixels + 0.1).double().movedim(-1, 1)
    expected = theirs.blocks(mapped).movedim(1, -1).detach()
    np.testing.assert_allclose(out.logits, expected, atol=1e-5 * float(expected.abs().max()))
    np.testing.assert_array_equal(out.codes, theirs.get_codebook_indices(mapped))


def test_published_sizes():
    with torch.device("meta"):
        twin = Twin(dvae.VARIANTS["dall-e"])
        encoder = transformers.FlavaImageCodebook(transformers.FlavaImageCodebookConfig())
    counts = {name: sum(p.numel() for p in side.parameters())
              for name, side in (("encoder", twin.encoder), ("decoder", twin.decoder))}  # fmt: skip
    assert counts["encoder"] == sum(p.numel() for p in encoder.parameters())
    assert parameters(dvae, "dall-e") == sum(counts.values())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="multipliers") as error:
        dvae.Config(multipliers=(), hidden_size=6, codebook_size=0)
    for words in ("codebook_size=0", "hidden_size=6 must divide by 4"):
        assert words in str(error.value)
    model = dvae.Model(dvae.VARIANTS["tiny"])
    with pytest.raises(ValueError, match="must divide by 2"):
        model.apply(fmjax.hub.abstract_variables(model), np.zeros((1, 3, 4, 2)))
