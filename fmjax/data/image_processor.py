"""preprocessor_config.json: how a checkpoint wants its pictures, in full or not at all.

The work has two parts. `ImageProcessor.pixels` decodes, resizes and crops on the host and leaves
bytes; what is done to values after that is one subtraction and one division for every pixel, whose
numbers are `ImageProcessor.normalisation`, and `fmjax.tasks.pixels.normalised` does it on the
device. A call does both, and equals what transformers' processors of Pillow return.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmjax.config import read_config, write_json
from fmjax.data.decoding import Picture, check_pixels, decode
from fmjax.data.files import raise_problems
from fmjax.weights.strict_json import parse_object

FILE = "preprocessor_config.json"
PAIR_FILE = "processor_config.json"
"""Where version 5 writes it, inside, of models that take texts too."""
SUFFIX = "ImageProcessor"
RESAMPLING = range(6)  # Pillow's codes: nearest, lanczos, bilinear, bicubic, box, hamming


@dataclasses.dataclass(frozen=True)
class Size:
    """A rule for rows and columns; exactly one of these.

    Attributes:
        height, width: the picture becomes this, its proportions aside.
        shortest_edge, longest_edge: the shorter side becomes this, as long as the longer one, if it
            has a limit, stays within it.
        max_height, max_width: the largest of the same proportions within both.
    """

    height: int | None = None
    width: int | None = None
    shortest_edge: int | None = None
    longest_edge: int | None = None
    max_height: int | None = None
    max_width: int | None = None

    def of(self, rows: int, columns: int) -> tuple[int, int]:
        """What a picture of this size becomes; rounded as transformers does it."""
        short, long = min(rows, columns), max(rows, columns)
        if self.height and self.width:
            return self.height, self.width
        if self.max_height and self.max_width:
            scale = min(self.max_height / rows, self.max_width / columns)
            return int(rows * scale), int(columns * scale)
        assert self.shortest_edge
        side: float = self.shortest_edge
        if self.longest_edge and long / short * side > self.longest_edge:
            side = self.longest_edge * short / long
        if round(side) == short:
            return rows, columns
        # The product first: the quotient of another order may be cut to another number.
        other = int(side * long / short)
        return (other, round(side)) if columns < rows else (round(side), other)

    def to_json(self) -> dict[str, int]:
        """As the file has it."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value}


KINDS = (
    {"height", "width"},
    {"shortest_edge"},
    {"shortest_edge", "longest_edge"},
    {"max_height", "max_width"},
)

IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
CLIP = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
BICUBIC = {"resample": 3}
RGB = {"do_convert_rgb": True}
CROP = {"do_center_crop": True, "crop_size": Size(224, 224)}
DETR = {**IMAGENET, "size": Size(shortest_edge=800, longest_edge=1333), "do_pad": True}
MOBILE = {"size": Size(shortest_edge=256), **CROP}
SHORTEST_224 = {"size": Size(shortest_edge=224)}

TYPES: Mapping[str, Mapping[str, Any]] = {
    "ViT": {},
    "Beit": {**BICUBIC, "crop_size": Size(224, 224)},
    "Bit": {**RGB, **CLIP, **BICUBIC, **SHORTEST_224, **CROP},
    "CLIP": {**RGB, **CLIP, **BICUBIC, **SHORTEST_224, **CROP},
    "ConditionalDetr": DETR,
    "ConvNext": {**BICUBIC, "size": Size(shortest_edge=384), "crop_pct": 224 / 256},
    "DeformableDetr": DETR,
    "DeiT": {**BICUBIC, "size": Size(256, 256), **CROP},
    "Detr": DETR,
    "EfficientNet": {
        **BICUBIC,
        "size": Size(346, 346),
        "crop_size": Size(289, 289),
        "include_top": True,
    },
    "MobileNetV1": MOBILE,
    "MobileNetV2": MOBILE,
    "MobileViT": {
        **BICUBIC,
        **SHORTEST_224,
        "do_center_crop": True,
        "crop_size": Size(256, 256),
        "do_normalize": False,
        "do_flip_channel_order": True,
    },
    "Pvt": {**IMAGENET, **BICUBIC},
    "Segformer": {**IMAGENET, "size": Size(512, 512)},
    "Siglip": {**RGB, **BICUBIC},
}
"""By the start of ``image_processor_type``: what differs from a ViT's, the fields' defaults."""

# Steps that only some types have; PyTorch passes over the key in the others, and we refuse it.
ONLY = {
    "crop_pct": {"ConvNext"},
    "rescale_offset": {"EfficientNet"},
    "include_top": {"EfficientNet"},
    "do_flip_channel_order": {"MobileViT"},
    "do_pad": {kind for kind, defaults in TYPES.items() if "do_pad" in defaults},
    "do_center_crop": TYPES.keys() - {"Segformer", "ConditionalDetr", "DeformableDetr", "Detr"},
    "do_normalize": TYPES.keys() - {"MobileViT"},
}
# Where an int as `size` means the shorter side; elsewhere it is both sides.
BY_SHORTEST = {
    "Bit", "CLIP", "ConditionalDetr", "ConvNext", "DeformableDetr", "Detr", "MobileNetV1",
    "MobileNetV2", "MobileViT", "Siglip",
}  # fmt: skip
# What old files leave out: the processor by config.json's model_type.
TYPE_OF = {
    "beit": "Beit", "convnext": "ConvNext", "convnextv2": "ConvNext", "cvt": "ConvNext",
    "deit": "DeiT", "detr": "Detr", "dinov2": "Bit", "dinov2_with_registers": "Bit",
    "efficientnet": "EfficientNet", "focalnet": "Bit", "mobilenet_v1": "MobileNetV1",
    "mobilenet_v2": "MobileNetV2", "mobilevit": "MobileViT", "pvt": "Pvt", "regnet": "ConvNext",
    "resnet": "ConvNext", "segformer": "Segformer", "swin": "ViT", "swinv2": "ViT", "vit": "ViT",
    "vit_mae": "ViT", "vit_msn": "ViT",
}  # fmt: skip
# Keys that change no pixel: what text, annotations and tensors they come with, and where.
HARMLESS = frozenset(
    """
    _processor_class _valid_processor_keys auto_map data_format device disable_grouping
    do_convert_annotations do_reduce_labels feature_extractor_type format image_processor_type
    image_seq_length input_data_format max_size processor_class reduce_labels return_tensors
    transformers_version
    """.split()
)


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """The steps, in their order; the fields are the file's, the defaults a ViT's.

    Attributes:
        image_processor_type: a key of `TYPES` and "ImageProcessor".
        do_convert_rgb: says nothing here, where every picture gets the channels of the mean.
        do_resize, size, resample, crop_pct: to the size, by Pillow's filter of this code. A
            ConvNext's below 384 is enlarged by 1 / `crop_pct` and its middle cut out.
        do_center_crop, crop_size: the middle, with zeros around it where it is larger.
        do_flip_channel_order: red and blue change places.
        do_rescale, rescale_factor, rescale_offset: a factor of the bytes, less 1 with an offset.
        do_normalize, image_mean, image_std: a number a channel, or one for all of three.
        include_top: divided by the standard deviation once more.
        do_pad, pad_size: zeros below and right of it, up to the largest of its batch or this size,
            and a mask.

    Raises:
        ValueError: values that do not fit; everything wrong is listed.
    """

    image_processor_type: str = "ViTImageProcessor"
    do_convert_rgb: bool = False
    do_resize: bool = True
    size: Size = Size(224, 224)
    resample: int = 2
    crop_pct: float | None = None
    do_center_crop: bool = False
    crop_size: Size | None = None
    do_flip_channel_order: bool = False
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    rescale_offset: bool = False
    do_normalize: bool = True
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    include_top: bool = False
    do_pad: bool = False
    pad_size: Size | None = None

    def __post_init__(self) -> None:
        kind = self.image_processor_type.removesuffix(SUFFIX)
        problems = [
            f"{name}={getattr(self, name)!r}: a {self.image_processor_type} has no such step"
            for name, kinds in ONLY.items()
            if getattr(self, name) and kind not in kinds
        ]
        lengths = {len(self.image_mean), len(self.image_std)}
        if not lengths <= {1, 3}:
            problems.append(
                f"image_mean={self.image_mean} and image_std={self.image_std} must be one number "
                "or three"
            )
        elif lengths == {1, 3}:
            problems.append("image_mean and image_std must have the same number of channels")
        if min(self.image_std, default=1) <= 0:
            problems.append(f"image_std={self.image_std} must be positive")
        if self.rescale_factor <= 0:
            problems.append(f"rescale_factor={self.rescale_factor} must be positive")
        if self.resample not in RESAMPLING:
            problems.append(f"resample={self.resample} must be one of {[*RESAMPLING]}")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            problems.append(f"crop_pct={self.crop_pct} must be above 0 and at most 1")
        if kind == "ConvNext" and (not self.size.shortest_edge or self.size.longest_edge):
            problems.append(f"size={self.size.to_json()} of a ConvNext must be a shortest_edge")
        if self.do_center_crop and self.crop_size is None:
            problems.append("do_center_crop needs a crop_size")
        for name in ("crop_size", "pad_size"):
            if (size := getattr(self, name)) is not None and not size.height:
                problems.append(f"{name}={size.to_json()} must be a height and a width")
        raise_problems(self.image_processor_type, problems)

    @property
    def channels(self) -> int:
        """Of the pictures: 3 for colours, 1 for gray."""
        return len(self.image_mean)

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) of pixels from 0 to 1, the second part of the work: (pixel - mean) / std."""
        scale = 255 * (self.rescale_factor if self.do_rescale else 1.0)
        offset = float(self.do_rescale and self.rescale_offset)
        mean = self.image_mean if self.do_normalize else (0.0,) * self.channels
        std = self.image_std if self.do_normalize else (1.0,) * self.channels
        again = self.image_std if self.include_top else (1.0,) * self.channels
        return (
            tuple((value + offset) / scale for value in mean),
            tuple(one * two / scale for one, two in zip(std, again, strict=True)),
        )

    def pixels(self, picture: Picture) -> np.ndarray:
        """One picture decoded, resized and cropped, the first part of the work: uint8 [X, Y, C].

        Raises:
            OSError: a file cannot be opened.
            ValueError: no picture, or one that cannot become one of this size.
        """
        image = decode(picture, self.channels)
        if self.do_resize:
            image = self._resized(image)
        if self.do_center_crop:
            assert self.crop_size is not None
            image = center_crop(image, self.crop_size.of(*image.shape[:2]))
        return image[..., ::-1] if self.do_flip_channel_order else image

    def _resized(self, image: np.ndarray) -> np.ndarray:
        side = self.size.shortest_edge
        if self.crop_pct is None or side is None:
            return resize(image, self.size.of(*image.shape[:2]), self.resample)
        if side >= 384:
            return resize(image, (side, side), self.resample)
        larger = Size(shortest_edge=int(side / self.crop_pct))
        image = resize(image, larger.of(*image.shape[:2]), self.resample)
        return center_crop(image, (side, side))

    def batch(self, pictures: Sequence[Picture]) -> dict[str, np.ndarray]:
        """``pixel_values`` uint8 [B, X, Y, C], and with padding ``pixel_mask`` int32 [B, X, Y].

        Raises:
            OSError: a file cannot be opened.
            ValueError: pictures that cannot be used, all of them named, or of different sizes.
        """
        images, problems = [], []
        for number, picture in enumerate(pictures):
            try:
                images.append(self.pixels(picture))
            except (OSError, ValueError) as error:
                named = isinstance(picture, str | Path)
                problems.append(f"{picture if named else f'picture {number}'}: {error}")
        if not len(pictures):
            problems.append("there are none")
        raise_problems("pictures", problems)
        if self.do_pad:
            return self._padded(images)
        if len(sizes := {image.shape[:2] for image in images}) > 1:
            raise ValueError(
                f"the pictures have {len(sizes)} sizes after {self.image_processor_type}, from "
                f"{min(sizes)} to {max(sizes)}; give a size of height and width, or do_center_crop"
            )
        return {"pixel_values": np.stack(images)}

    def _padded(self, images: list[np.ndarray]) -> dict[str, np.ndarray]:
        rows, columns = np.max([image.shape[:2] for image in images], axis=0)
        if self.pad_size is not None:
            most = self.pad_size.of(rows, columns)
            if rows > most[0] or columns > most[1]:
                raise ValueError(
                    f"pad_size={self.pad_size.to_json()} is below the pictures' {rows} x {columns}"
                )
            rows, columns = most
        values = np.zeros((len(images), rows, columns, self.channels), np.uint8)
        mask = np.zeros((len(images), rows, columns), np.int32)
        for place, image in enumerate(images):
            values[place, : image.shape[0], : image.shape[1]] = image
            mask[place, : image.shape[0], : image.shape[1]] = 1
        return {"pixel_values": values, "pixel_mask": mask}

    def __call__(self, pictures: Sequence[Picture]) -> dict[str, np.ndarray]:
        """As `batch`, ``pixel_values`` being the float32 that the model is given.

        Raises:
            OSError, ValueError: as `batch`.
        """
        batch = self.batch(pictures)
        mean, std = (np.array(values, np.float32) for values in self.normalisation)
        values = (batch["pixel_values"].astype(np.float32) / 255 - mean) / std
        if "pixel_mask" in batch:
            values *= batch["pixel_mask"][..., None]
        return {**batch, "pixel_values": values}

    def to_json(self) -> dict[str, Any]:
        """The keys of the file."""
        data: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Size):
                value = value.to_json()
            if value is not None:
                data[field.name] = list(value) if isinstance(value, tuple) else value
        return data

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the file, as `fmjax.save` asks for it."""
        write_json(Path(folder) / FILE, self.to_json())


def resize(image: np.ndarray, size: tuple[int, int], resample: int) -> np.ndarray:
    """uint8 [X, Y, C] as [*size, C], by Pillow's filter of this code."""
    from PIL import Image

    check_pixels(*size, "resized it would have")
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    resized = picture.resize((size[1], size[0]), Image.Resampling(resample))
    return np.asarray(resized).reshape(*size, image.shape[-1])


def center_crop(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle of a picture [X, Y, C]: [*size, C], with zeros around one that is smaller."""
    check_pixels(*size, "cropped it would have")
    result = np.zeros((*size, image.shape[-1]), image.dtype)
    inside, outside = [], []
    for have, want in zip(image.shape[:2], size, strict=True):
        # Of an odd number the half that is rounded down lies before what is cut, and after what is
        # padded: as PyTorch's processors have it.
        skip, pad = max(0, (have - want) // 2), max(0, math.ceil((want - have) / 2))
        length = min(have, want)
        inside.append(slice(skip, skip + length))
        outside.append(slice(pad, pad + length))
    result[tuple(outside)] = image[tuple(inside)]
    return result


def load_image_processor(folder: str | Path) -> ImageProcessor:
    """The processor of a checkpoint's folder.

    Raises:
        OSError: there is no preprocessor_config.json, nor a processor_config.json with it inside.
        ValueError: it is no JSON object, or says what is not understood; everything is listed.
    """
    file = Path(folder).expanduser() / FILE
    pair = file.with_name(PAIR_FILE)
    if not file.is_file() and pair.is_file():
        inside = parse_object(pair.read_bytes(), str(pair)).get("image_processor")
        if isinstance(inside, dict):
            return parse_image_processor(inside)
    if not file.is_file():
        raise FileNotFoundError(
            f"{file.parent} has no {FILE}, which says how pictures are resized and normalised; "
            "copy it from the checkpoint's source"
        )
    data = parse_object(file.read_bytes(), str(file))
    if not data.keys() & {"image_processor_type", "feature_extractor_type"}:
        family = TYPE_OF.get(read_config(file.parent).get("model_type", ""), "")
        data = {"image_processor_type": family + SUFFIX, **data}
    return parse_image_processor(data)


def parse_image_processor(data: Mapping[str, Any]) -> ImageProcessor:
    """An `ImageProcessor` of the keys of a preprocessor_config.json.

    Keys that are missing or null are as the class that the file names has them.

    Raises:
        ValueError: an unknown class or key, or values that do not fit; everything is listed.
    """
    stated = data.get("image_processor_type") or data.get("feature_extractor_type") or ""
    kind = str(stated)
    for ending in ("Pil", "Fast", SUFFIX, "FeatureExtractor"):
        kind = kind.removesuffix(ending)
    if kind not in TYPES:
        raise ValueError(
            f"{FILE}: image_processor_type={stated!r} is not supported; it must be one of "
            f"{[name + SUFFIX for name in TYPES]}"
        )
    values: dict[str, Any] = {"image_processor_type": kind + SUFFIX, **TYPES[kind]}
    hints = {field.name: str(field.type) for field in dataclasses.fields(ImageProcessor)}
    problems = []
    for key, value in _modern(data, kind).items():
        if value is None or key in HARMLESS:
            continue
        if key not in hints:
            problems.append(f"{key}={value!r} is unknown; if it changes nothing, delete it")
            continue
        try:
            values[key] = _read(value, hints[key])
        except ValueError as error:
            problems.append(f"{key}={value!r} {error}")
    raise_problems(FILE, problems)
    return ImageProcessor(**values)


def _modern(data: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The keys as they are written now: sizes that are numbers as rules, one name for padding."""
    result = dict(data)
    by_shortest = kind in BY_SHORTEST
    if isinstance(square := result.pop("default_to_square", None), bool):
        by_shortest = not square
    if "pad_and_return_pixel_mask" in result:
        result.setdefault("do_pad", result.pop("pad_and_return_pixel_mask"))
    for name in ("size", "crop_size", "pad_size"):
        value = result.get(name)
        if isinstance(value, list) and len(value) == 2:
            result[name] = dict(zip(("height", "width"), value, strict=True))
        elif isinstance(value, int) and not isinstance(value, bool):
            shortest = name == "size" and by_shortest
            result[name] = (
                {"shortest_edge": value} if shortest else {"height": value, "width": value}
            )
            if shortest and "do_pad" in TYPES[kind]:
                result[name]["longest_edge"] = result.get("max_size", 1333)
    return result


def _read(value: Any, hint: str) -> Any:
    """A JSON value as a field of this type.

    Raises:
        ValueError: it does not fit; the message continues "key=value ...".
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint.startswith("bool"):
        if isinstance(value, bool):
            return value
        raise ValueError("must be true or false")
    if hint.startswith("tuple"):
        if number:
            return (float(value),) * 3
        if isinstance(value, list) and value:
            return tuple(_read(element, "float") for element in value)
        raise ValueError("must be a number or a list of numbers")
    if hint.startswith("Size"):
        return _size(value)
    if hint.startswith("int"):
        if number and isinstance(value, int):
            return value
        raise ValueError("must be an int")
    if number:
        return float(value)
    raise ValueError("must be a number")


def _size(value: Any) -> Size:
    if isinstance(value, dict) and value.keys() in KINDS:
        sides: dict[str, Any] = value
        if all(type(side) is int and side > 0 for side in sides.values()):
            return Size(**sides)
    rules = " or ".join(str(sorted(kind)) for kind in KINDS)
    raise ValueError(f"must be a positive int or an object of them, with {rules}")
