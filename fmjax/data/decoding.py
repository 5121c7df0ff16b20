"""One picture, whatever it is kept as, into bytes [X, Y, C]; what is no picture is refused."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

Picture = Any
"""A path, the bytes of a file, a Pillow image, or uint8 [X, Y] or [X, Y, C] of 1, 3 or 4
channels."""

FILES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
"""Endings of the files that are read."""
# Only these of Pillow's readers: others run programs (EPS) or are rarely used and tested.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")
BROKEN = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, zlib.error)
"""What Pillow's readers raise for files that are broken."""


def decode(picture: Picture, channels: int = 3) -> np.ndarray:
    """uint8 [X, Y, C]: turned as its camera says, transparent pixels white, 16 bits as 8.

    Args:
        picture: see `Picture`; of an animation the first image.
        channels: C, 3 for colours or 1 for gray.

    Raises:
        OSError: a file cannot be opened.
        ValueError: a file that is no picture, or broken, or has more pixels than Pillow's limit; an
            array or a kind of pixel that has no meaning as bytes.
    """
    from PIL import Image

    if isinstance(picture, np.ndarray):
        return with_channels(_of_array(picture), channels)
    if isinstance(picture, str | Path):
        picture = Path(picture).expanduser().read_bytes()
    if isinstance(picture, bytes):
        return with_channels(_of_file(picture), channels)
    if not isinstance(picture, Image.Image):
        raise ValueError(
            f"a {type(picture).__name__} is no picture; give a path, bytes, a Pillow image or "
            "uint8 [X, Y, C]"
        )
    return with_channels(_of_image(picture), channels)


def _of_file(content: bytes) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as file:
            check_pixels(file.height, file.width, "it has")
            return _of_image(file)
    except _Refused:
        raise
    except Image.UnidentifiedImageError as error:
        raise ValueError(
            f"its {len(content)} bytes are no picture; it must be {', '.join(FORMATS)}"
        ) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{error}; make it smaller or set PIL.Image.MAX_IMAGE_PIXELS") from error
    except BROKEN as error:
        raise ValueError(f"the file is broken ({error}); save or fetch it again") from error


class _Refused(ValueError):
    """A picture that was read, and is not of use."""


def check_pixels(rows: int, columns: int, what: str) -> None:
    """Raises a ValueError, where there are more pixels than Pillow's limit or none."""
    from PIL import Image

    if min(rows, columns) < 1:
        raise _Refused(f"{what} {rows} x {columns} pixels; there must be some")
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and rows * columns > limit:
        raise _Refused(
            f"{what} {rows} x {columns} pixels, more than {limit}; make it smaller or set "
            "PIL.Image.MAX_IMAGE_PIXELS"
        )


def _of_image(image: Image) -> np.ndarray:
    """uint8 [X, Y, C], C being 1 or 3."""
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # as Pillow reads coloured pictures of 16 bits
        return (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)[..., None]
    if image.mode in ("I", "F"):
        raise _Refused(
            f"its pixels are numbers of mode {image.mode!r} without a known range; scale them to "
            "bytes and give uint8 [X, Y]"
        )
    if image.has_transparency_data:
        return on_white(np.asarray(image.convert("RGBA")))
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))[..., None]
    return np.asarray(image.convert("RGB"))


def _of_array(array: np.ndarray) -> np.ndarray:
    shape = array.shape if array.ndim == 3 else (*array.shape, 1)
    if array.dtype != np.uint8 or len(shape) != 3 or shape[-1] not in (1, 3, 4) or not array.size:
        raise ValueError(
            f"an array is {array.dtype} {list(array.shape)}; it must be uint8 [X, Y] or [X, Y, C] "
            "of 1, 3 or 4 channels"
        )
    return on_white(array.reshape(shape))


def with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Gray pictures of coloured ones (ITU-R 601 luma, as Pillow's), or gray ones three times.

    Args:
        pixels: uint8 [..., C].
        channels: what C becomes.

    Raises:
        ValueError: another change.
    """
    have = pixels.shape[-1]
    if have == channels:
        return pixels
    if (have, channels) == (1, 3):
        return np.repeat(pixels, 3, axis=-1)
    if (have, channels) == (3, 1):
        # Pillow's integers: the weights times 2 to the 16th, and a half to round.
        luma = pixels.astype(np.int64) @ np.array([19595, 38470, 7471]) + 0x8000
        return (luma >> 16).astype(np.uint8)[..., None]
    raise ValueError(f"pictures of {have} channels do not become ones of {channels}")


def on_white(image: np.ndarray) -> np.ndarray:
    """uint8 [X, Y, 3] of a picture [X, Y, 4] with transparency; one without stays."""
    if image.shape[-1] != 4:
        return image
    from PIL import Image

    picture = Image.fromarray(image, "RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB"))
