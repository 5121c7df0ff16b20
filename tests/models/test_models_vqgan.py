"""VQGAN against PyTorch's layers under the names of the authors' files."""

import jax
import numpy as np
import pytest
import torch
from generator_twins import check_outputs, parameters
from torch import nn

import fmjax
from fmjax.models import vqgan


class ResBlock(nn.Module):
    def __init__(self, width, features, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv1 = nn.Conv2d(width, features, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, features, eps=1e-6)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)
        if width != features:
            self.nin_shortcut = nn.Conv2d(width, features, 1)

    def forward(self, x):
        silu = nn.functional.silu
        y = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + y


class Attention(nn.Module):
    def __init__(self, width, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (one(y).flatten(2) for one in (self.q, self.k, self.v))  # [B, D, N]
        shares = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(-1)  # [B, T, S]
        return x + self.proj_out((v @ shares.transpose(1, 2)).reshape(x.shape))


class Side(nn.Module):
    def __init__(self, config, decodes):
        super().__init__()
        self.decodes, groups = decodes, config.norm_groups
        ch, times, size = config.base_channels, config.channel_multipliers, config.image_size
        top, levels = ch * times[-1], nn.ModuleList()
        width = top if decodes else ch
        first = config.latent_channels if decodes else config.num_channels
        self.conv_in = nn.Conv2d(first, width, 3, padding=1)
        blocks = config.blocks_per_level + decodes
        order = list(enumerate(times))
        for number, multiplier in reversed(order) if decodes else order:
            level = nn.Module()
            level.block, level.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(blocks):
                level.block.append(ResBlock(width, ch * multiplier, groups))
                width = ch * multiplier
                if size // 2**number in config.attention_sizes:
                    level.attn.append(Attention(width, groups))
            resampled = nn.Module()
            if decodes and number > 0:
                resampled.conv = nn.Conv2d(width, width, 3, padding=1)
                level.upsample = resampled
            elif not decodes and number < len(times) - 1:
                resampled.conv = nn.Conv2d(width, width, 3, stride=2)
                level.downsample = resampled
            levels.insert(0, level) if decodes else levels.append(level)
        if decodes:
            self.up = levels
        else:
            self.down = levels
        self.mid = nn.Module()
        self.mid.block_1, self.mid.block_2 = (ResBlock(top, top, groups) for _ in range(2))
        self.mid.attn_1 = Attention(top, groups)
        self.norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        last = config.num_channels if decodes else config.latent_channels
        self.conv_out = nn.Conv2d(width, last, 3, padding=1)

    def middle(self, x):
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))

    def forward(self, x):
        x = self.conv_in(x)
        if self.decodes:
            x = self.middle(x)
        for level in reversed(self.up) if self.decodes else self.down:
            for i, block in enumerate(level.block):
                x = block(x)
                x = level.attn[i](x) if len(level.attn) else x
            if hasattr(level, "downsample"):
                x = level.downsample.conv(nn.functional.pad(x, (0, 1, 0, 1)))
            if hasattr(level, "upsample"):
                x = level.upsample.conv(nn.functional.interpolate(x, scale_factor=2))
        if not self.decodes:
            x = self.middle(x)
        return self.conv_out(nn.functional.silu(self.norm_out(x)))


class Twin(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.encoder, self.decoder = Side(config, False), Side(config, True)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(config.num_embeddings, config.embedding_size)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.embedding_size, 1)
        self.post_quant_conv = nn.Conv2d(config.embedding_size, config.latent_channels, 1)

    def forward(self, x):
        z = self.quant_conv(self.encoder(x))
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)
        codes = torch.cdist(flat, self.quantize.embedding.weight).argmin(-1)
        quantised = self.quantize.embedding(codes).reshape(z.permute(0, 2, 3, 1).shape)
        quantised = quantised.permute(0, 3, 1, 2)
        images = self.decoder(self.post_quant_conv(z + (quantised - z).detach()))
        return images, z, quantised


def test_equals_pytorch(tmp_path):
    config = vqgan.VARIANTS["tiny"]
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 8, 12, 2)).astype(np.float32)
    # 2e-5 of the largest gradient where a norm's groups have two features and nearly cancel: 4e-5.
    check_outputs(
        vqgan, config, "model", Twin(config), {"pixel_values": pixels},
        ["images", "latents", "quantised"], tmp_path, tolerance=2e-5, gradient_tolerance=1e-4,
    )  # fmt: skip


class Discriminator(nn.Module):
    def __init__(self, config):
        super().__init__()
        ch, count = config.discriminator_channels, config.discriminator_layers
        layers = [nn.Conv2d(config.num_channels, ch, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = ch
        for number in range(1, count + 1):
            features = ch * min(2**number, 8)
            stride = 1 if number == count else 2
            layers.append(nn.Conv2d(width, features, 4, stride, 1, bias=False))
            layers += [nn.BatchNorm2d(features), nn.LeakyReLU(0.2)]
            width = features
        self.loss = nn.Module()
        self.loss.discriminator = nn.Module()
        self.loss.discriminator.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))

    def forward(self, x):
        return self.loss.discriminator.main(x)


@pytest.mark.slow
def test_discriminator_equals_pytorch(tmp_path):
    config = vqgan.VARIANTS["tiny"]
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 16, 24, 2)).astype(np.float32)
    check_outputs(
        vqgan, config, "image_discrimination", Discriminator(config), {"pixel_values": pixels},
        ["logits"], tmp_path, train=True,
    )  # fmt: skip


def test_published_sizes():
    with torch.device("meta"):
        twin = Twin(vqgan.VARIANTS["f16-16384"])
    count = sum(p.numel() for p in twin.parameters())
    assert parameters(vqgan, "f16-16384") == count
    # The summary that the authors' training program prints: 29.3 M and 42.4 M.
    assert [round(sum(p.numel() for p in side.parameters()) / 1e6, 1)
            for side in (twin.encoder, twin.decoder)] == [29.3, 42.4]  # fmt: skip
    # Isola et al. 2017's discriminator of 70 x 70 patches.
    assert parameters(vqgan, "f16-1024", "image_discrimination") == 2_765_633


@pytest.mark.slow
def test_codes_come_back():
    """What the codes say is what the images were decoded from."""
    model = vqgan.Model(vqgan.VARIANTS["tiny"])
    _, variables = fmjax.create("vqgan", model.config, rng=jax.random.key(0))
    table = 5.0 * np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    variables["params"]["codebook"]["embedding"] = jax.numpy.asarray(table)
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 2)).astype(np.float32)
    out = jax.jit(model.apply)(variables, pixels)
    assert out.codes.shape == (2, 4, 4)
    np.testing.assert_array_equal(out.quantised, table[np.asarray(out.codes)])
    again = jax.jit(lambda v, c: model.apply(v, c, method="decode_codes"))(variables, out.codes)
    np.testing.assert_allclose(again, out.images, atol=1e-5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="must divide by 16") as error:
        vqgan.Config(image_size=40, base_channels=48, num_embeddings=0)
    for words in ("num_embeddings=0", "no multiple of norm_groups=32"):
        assert words in str(error.value)
    model = vqgan.Model(vqgan.VARIANTS["tiny"])
    abstract = fmjax.hub.abstract_variables(model)
    with pytest.raises(ValueError, match="must divide by 2"):
        model.apply(abstract, np.zeros((1, 17, 16, 2)))
