"""What vision transformers share: patches, positions for any size of image, the stack of blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from fmjax.nn.checks import check_head
from fmjax.nn.dropout import Dropout
from fmjax.nn.norm import LayerNorm
from fmjax.nn.parameter import parameter
from fmjax.nn.product import add_bias, add_to_all, matmul
from fmjax.nn.stack import run_stack
from fmjax.types import Output, PyTree, Remat


def pair(size: int | tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a size that a config gives as one number or as two."""
    rows, columns = (size, size) if isinstance(size, int) else size
    return rows, columns


def check_pixels(pixel_values: Array, channels: int) -> None:
    """Refuses anything but images [B, X, Y, C] of floats: bytes would pass for normalised ones.

    Raises:
        ValueError: the shape or the kind of number is another.
    """
    if pixel_values.ndim != 4 or pixel_values.shape[-1] != channels:
        raise ValueError(
            f"pixel_values have the shape {pixel_values.shape}; they must be [B, X, Y, "
            f"{channels}], channels last"
        )
    if not jnp.issubdtype(pixel_values.dtype, jnp.floating):
        raise ValueError(
            f"pixel_values are {pixel_values.dtype}; a model takes normalised floats: call the "
            "ImageProcessor, or wrap the loss or the prediction in fmjax.tasks.pixels.normalised, "
            "which does it on the device"
        )


def check_mask(masked: Array | None, batch: int, grid: tuple[int, int]) -> None:
    """Refuses a mask of patches, if there is one, that is not [B, N].

    Raises:
        ValueError: the shape is another.
    """
    shape = (batch, grid[0] * grid[1])
    if masked is not None and masked.shape != shape:
        raise ValueError(
            f"a mask has the shape {masked.shape}; these images have {shape[1]} patches each: "
            f"it must be {shape}"
        )


def image_size_problems(config: Any) -> list[str]:
    """What is wrong with a config's ``image_size`` and ``patch_size``."""
    problems = []
    for name in ("image_size", "patch_size"):
        value = getattr(config, name)
        if not isinstance(value, int) and len(value) != 2:
            problems.append(f"{name}={value} must be one number, or rows and columns")
        elif min(pair(value)) < 1:
            problems.append(f"{name}={value} must be positive")
    if not problems and 0 in grid_of(pair(config.image_size), pair(config.patch_size)):
        problems.append(
            f"patch_size={config.patch_size} does not fit into image_size={config.image_size}"
        )
    return problems


def grid_of(image: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """How many whole patches an image has, (rows, columns); pixels past the last are not read."""
    return image[0] // patch[0], image[1] // patch[1]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Grid:
    """Rows and columns of patches, for a tree of what blocks read: they stay numbers when traced.

    Args:
        size: (rows, columns).
    """

    size: tuple[int, int]


def grid_offsets(grid: tuple[int, int], table: tuple[int, int]) -> np.ndarray:
    """Where a table of relative positions has those of each patch from each: int [N, N].

    The table has all offsets of rows within ``table``, row by row, and of columns:
    ``(2 X - 1) (2 Y - 1)`` entries.

    Args:
        grid: rows and columns of the patches.
        table: (X, Y), those of the largest grid that it has the offsets of.
    """
    rows, columns = np.indices(grid).reshape(2, -1)
    down = rows[:, None] - rows[None, :] + table[0] - 1
    right = columns[:, None] - columns[None, :] + table[1] - 1
    return down * (2 * table[1] - 1) + right


def patchify(pixel_values: Array, patch: tuple[int, int]) -> Array:
    """Images as rows of patches: [B, X, Y, C] -> [B, N, P * Q * C], row by row.

    Args:
        pixel_values: [B, X, Y, C].
        patch: (P, Q), its rows and columns.
    """
    batch, *size, channels = pixel_values.shape
    rows, columns = grid_of((size[0], size[1]), patch)
    x = pixel_values[:, : rows * patch[0], : columns * patch[1]]
    x = x.reshape(batch, rows, patch[0], columns, patch[1], channels)
    x = jnp.swapaxes(x, 2, 3)  # [B, rows, columns, P, Q, C]
    return x.reshape(batch, rows * columns, patch[0] * patch[1] * channels)


def unpatchify(patches: Array, grid: tuple[int, int], patch: tuple[int, int]) -> Array:
    """The inverse of `patchify`: [B, N, P * Q * C] -> [B, X, Y, C].

    Args:
        patches: [B, N, P * Q * C].
        grid: rows and columns of patches.
        patch: (P, Q).
    """
    batch, channels = patches.shape[0], patches.shape[-1] // (patch[0] * patch[1])
    x = patches.reshape(batch, *grid, *patch, channels)
    return jnp.swapaxes(x, 2, 3).reshape(batch, grid[0] * patch[0], grid[1] * patch[1], channels)


def cubic_resampling(old: int, new: int, *, antialias: bool = False) -> np.ndarray:
    """The matrix [new, old] of bicubic resampling along one axis, as PyTorch's ``interpolate``.

    Pixels are areas (``align_corners=False``). Keys 1981, "Cubic convolution interpolation", with
    a = -0.75 and the border repeated; or, smoothed when the image gets smaller, a = -0.5 and the
    weights outside the border left out. (jax.image.resize has a = -0.5 in both cases.)

    Args:
        old, new: sizes.
        antialias: whether the kernel widens with the step between new pixels.
    """
    a = -0.5 if antialias else -0.75
    step = old / new
    width = max(step, 1.0) if antialias else 1.0
    centers = (np.arange(new) + 0.5) * step - 0.5
    first = np.floor(centers - 2 * width).astype(int)
    taps = first[:, None] + np.arange(int(np.ceil(4 * width)) + 2)  # [new, taps]
    x = np.abs(taps - centers[:, None]) / width
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    if antialias:
        weights = np.where((taps >= 0) & (taps < old), weights, 0.0)
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], np.clip(taps, 0, old - 1)), weights)
    return matrix / matrix.sum(axis=1, keepdims=True)


def resize_grid(
    table: Array, old: tuple[int, int], new: tuple[int, int], *, antialias: bool = False
) -> Array:
    """Vectors of a grid of positions, resampled for another: [1, N, D] -> [1, N', D].

    Args:
        table: [1, N, D], row by row.
        old, new: rows and columns.
        antialias: see `cubic_resampling`.
    """
    if old == new:
        return table
    rows, columns = (
        jnp.asarray(cubic_resampling(*sizes, antialias=antialias), jnp.float32)
        for sizes in zip(old, new, strict=True)
    )
    grid = table.reshape(*old, table.shape[-1]).astype(jnp.float32)
    grid = jnp.einsum("xX,yY,XYD->xyD", rows, columns, grid)
    return grid.reshape(1, new[0] * new[1], -1).astype(table.dtype)


def resize(x: Array, size: tuple[int, ...]) -> Array:
    """Images resampled bilinearly, as PyTorch's ``interpolate``: [B, X, Y, C] -> [B, *size, C].

    Pixels are areas (``align_corners=False``), and nothing is smoothed where they get fewer.
    """
    shape = (x.shape[0], *size, x.shape[-1])
    resized = jax.image.resize(x.astype(jnp.float32), shape, "linear", antialias=False)
    return resized.astype(x.dtype)


def shuffle_pixels(x: Array, side: int) -> Array:
    """Squares of pixels put side by side, as PyTorch's ``PixelShuffle``.

    [B, X, Y, C * side * side] -> [B, X * side, Y * side, C].
    """
    batch, rows, columns, features = x.shape
    x = x.reshape(batch, rows, columns, features // side**2, side, side)
    x = x.transpose(0, 1, 4, 2, 5, 3)  # [B, rows, side, columns, side, C]
    return x.reshape(batch, rows * side, columns * side, -1)


class PatchEmbed(nn.Module):
    """A linear map of each patch: a convolution whose stride is its size, and so a product.

    Args:
        features: D.
        patch: (P, Q), rows and columns of a patch.
        kernel_init: initializer of the kernel [P, Q, C, D].
        use_bias: whether there is a bias.
    """

    features: int
    patch: tuple[int, int]
    kernel_init: Callable[..., Array]
    use_bias: bool = True

    @nn.compact
    def __call__(self, pixel_values: Array) -> Array:  # [B, X, Y, C] -> [B, N, D]
        shape = (*self.patch, pixel_values.shape[-1], self.features)
        kernel = parameter(self, "kernel", self.kernel_init, shape)
        # Pixels are float32 whatever the weights are: they are rounded as the weights are.
        patches = patchify(pixel_values, self.patch).astype(kernel.dtype)
        y = matmul(patches, kernel.reshape(-1, self.features))
        if self.use_bias:
            y = add_bias(y, parameter(self, "bias", nn.initializers.zeros, (self.features,)))
        return y.astype(kernel.dtype)


class ImageEmbeddings(nn.Module):
    """Patches and the tokens before them, with positions: [B, X, Y, C] -> [B, T, D].

    Args:
        width: D.
        image: rows and columns of the image that the positions are made for; those of others are
            resampled from them.
        patch: rows and columns of a patch.
        kernel_init: initializer of the patches' kernel.
        token_init: of the tokens and positions.
        tokens: names of the vectors put before the patches, each with a position.
        patch_bias: whether the map of the patches has a bias.
        positions: whether there are any.
        registers: how many further tokens, without positions, stand after these (Darcet et al.
            2023, arXiv:2309.16588).
        mask_shape: of the vector that stands for masked patches; None for no such vector.
        dropout_rate: of the sum.
        antialias: whether positions are smoothed where they get fewer.
    """

    width: int
    image: tuple[int, int]
    patch: tuple[int, int]
    kernel_init: Callable[..., Array]
    token_init: Callable[..., Array]
    tokens: tuple[str, ...] = ("cls",)
    patch_bias: bool = True
    positions: bool = True
    registers: int = 0
    mask_shape: tuple[int, ...] | None = None
    dropout_rate: float = 0.0
    antialias: bool = False

    @nn.compact
    def __call__(self, pixel_values: Array, masked: Array | None, train: bool) -> Array:
        old = grid_of(self.image, self.patch)
        new = grid_of((pixel_values.shape[1], pixel_values.shape[2]), self.patch)
        patches = PatchEmbed(
            self.width, self.patch, self.kernel_init, self.patch_bias, name="patch"
        )
        x = patches(pixel_values)
        if self.mask_shape is not None:
            mask = parameter(self, "mask", nn.initializers.zeros, (*self.mask_shape, self.width))
            if masked is not None:
                x = jnp.where(masked.astype(bool)[:, :, None], mask.astype(x.dtype), x)
        elif masked is not None:
            raise ValueError("bool_masked_pos needs a model with a vector for masked patches")

        def vectors(name: str, count: int = 1) -> Array:
            rows = parameter(self, name, self.token_init, (1, count, self.width))
            return rows.astype(x.dtype)

        count, before, after = len(self.tokens), 0.0, jnp.zeros((), x.dtype)
        if self.positions:
            shape = (1, count + old[0] * old[1], self.width)
            table = parameter(self, "position", self.token_init, shape)
            others = resize_grid(table[:, count:], old, new, antialias=self.antialias)
            before, after = table[:, :count].astype(x.dtype), others.astype(x.dtype)
        first = []
        if self.tokens:
            tokens = jnp.concatenate([vectors(name) for name in self.tokens], axis=1)
            first.append(tokens + before)
        if self.registers:
            first.append(vectors("registers", self.registers))
        rows = jnp.concatenate([*first, jnp.broadcast_to(after, (1, *x.shape[1:]))], axis=1)
        x = jnp.pad(x, ((0, 0), (rows.shape[1] - x.shape[1], 0), (0, 0)))
        x = add_to_all(x, rows[0])
        return Dropout(self.dropout_rate)(x, train)


class VisionEncoder(nn.Module):
    """A pre-norm transformer over patches, with one head.

    A family subclasses it as its ``Model``, gives `block` and `heads`, and overrides what differs.
    Its blocks are called ``(hidden, cache, index, shared)`` (see `fmjax.nn.stack.run_stack`).

    Args:
        config: the family's.
        head: a key of the family's ``HEADS``.
        scan: weights stacked over layers (``layers/...`` [L, ...]) and one compiled block.
        remat: what the backward pass recomputes, as `fmjax.types.Remat` says.
    """

    config: Any
    head: str = "model"
    scan: bool = False
    remat: Remat = "none"

    block: ClassVar[type[nn.Module]]
    heads: ClassVar[Mapping[str, str]]

    @property
    def kernel_init(self) -> Callable[..., Array]:
        """Initializer of kernels."""
        return nn.initializers.normal(self.config.initializer_range)

    @property
    def tokens(self) -> int:
        """How many tokens stand before the patches."""
        return 1

    def embed_images(self, pixel_values: Array, masked: Array | None, train: bool) -> Array:
        """[B, X, Y, C] -> [B, T, D]; called in a compact method, a module named "embed"."""
        raise NotImplementedError

    def shared(self, grid: tuple[int, int]) -> PyTree:
        """What every block reads."""
        return None

    def finish(self, hidden: Array) -> Array:
        """What follows the last block: [B, T, D] -> [B, T, D]."""
        return LayerNorm(self.config.layer_norm_eps, name="final_norm")(hidden)

    def outputs(self, hidden: Array, grid: tuple[int, int]) -> Output:
        """What the head makes of the last hidden states [B, T, D]; called in a compact method."""
        raise NotImplementedError

    @nn.compact
    def __call__(
        self,
        pixel_values: Array,
        bool_masked_pos: Array | None = None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Output:
        """Runs the model.

        Args:
            pixel_values: [B, X, Y, C], normalised; of any size, whose positions are resampled from
                those of the config's ``image_size``.
            bool_masked_pos: [B, N], 1 for patches that the model does not see.
            train: whether dropout is on; it needs ``rngs={"dropout": key}``.
            output_hidden_states: whether ``hidden_states`` is returned: the embeddings and each
                block's output, before the last norm.
            output_attentions: whether ``attentions`` is returned.

        Raises:
            ValueError: images or masks of the wrong shape, or a mask for a model that has no vector
                for masked patches.
        """
        grid = self.check(pixel_values, bool_masked_pos)
        embedded = self.embed_images(pixel_values, bool_masked_pos, train)
        return self.run(
            embedded,
            grid,
            train=train,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )

    def check(self, pixel_values: Array, masked: Array | None) -> tuple[int, int]:
        """The grid of patches of the images, once these and the mask have been checked.

        Raises:
            ValueError: an unknown head, or images or masks of the wrong shape.
        """
        config = self.config
        check_head(self, self.heads)
        check_pixels(pixel_values, config.num_channels)
        size = (pixel_values.shape[1], pixel_values.shape[2])
        grid = grid_of(size, pair(config.patch_size))
        if 0 in grid:
            raise ValueError(f"images of {size} are smaller than a patch of {config.patch_size}")
        check_mask(masked, pixel_values.shape[0], grid)
        return grid

    def run(
        self,
        embedded: Array,
        grid: tuple[int, int],
        *,
        train: bool,
        output_hidden_states: bool,
        output_attentions: bool,
    ) -> Output:
        """Blocks, last norm and head; to be called in a compact method."""
        hidden, layers, _ = run_stack(
            self.block,
            {
                "config": self.config,
                "train": train,
                "output_hidden_states": output_hidden_states,
                "output_attentions": output_attentions,
            },
            embedded,
            self.shared(grid),
            num_layers=self.config.num_hidden_layers,
            scan=self.scan,
            remat=self.remat,
        )
        out = self.outputs(self.finish(hidden), grid)
        if output_hidden_states:
            states = (embedded, *(layer.hidden_state for layer in layers))
            out = dataclasses.replace(out, hidden_states=states)
        if output_attentions:
            out = dataclasses.replace(out, attentions=tuple(layer.attentions for layer in layers))
        return out
