"""Pictures with boxes from files in COCO's format (Lin et al. 2014, arXiv:1405.0312)."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fmjax.data.columns import Columns
from fmjax.data.decoding import decode
from fmjax.data.files import decode_utf8, parse_json, raise_problems
from fmjax.data.objects import ObjectExamples

MOST = 2**63  # what ids, kept in 64 bits, and all other numbers must be below
NEEDED = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
"""The lists of a file and what each of their entries must have."""


@dataclasses.dataclass(frozen=True, eq=False)
class CocoExamples(ObjectExamples):
    """Pictures of one size with boxes, some of which may stand for crowds.

    Attributes:
      crowd: bool [N, M], boxes around many objects: nothing is trained on them, and what is found
        there is neither right nor wrong.
      image_ids: int64 [N], the file's.
      sizes: int32 [N, 2], rows and columns before the pictures were resized.
    """

    crowd: np.ndarray
    image_ids: np.ndarray
    sizes: np.ndarray

    def columns(self) -> Columns:
        """As they are batched, without crowds; see `ObjectExamples`."""
        single = dataclasses.replace(self, object_mask=self.object_mask & ~self.crowd)
        return super(CocoExamples, single).columns()


def read_coco(
    file: str | Path,
    folder: str | Path,
    *,
    size: tuple[int, int],
    clip: bool = False,
) -> CocoExamples:
    """The pictures of an annotation file, such as instances_val2017.json, in the file's order.

    Args:
      file: JSON with "images", "annotations" and "categories"; segmentations are not read. Classes
        are the categories by their ids, which need not be without gaps.
      folder: of the pictures.
      size: rows and columns that all pictures are resized to, whatever their shape; boxes are
        shares of a picture and stay.
      clip: whether boxes are cut to their pictures and those left without an area are dropped, as
        detectors' own readers do with COCO's few bad ones, instead of refused.

    Raises:
      OSError: there is no such file or folder.
      ValueError: anything of another form; pictures outside the folder, missing, or of another
        size than the file says; boxes and categories that do not fit. All of it is listed.
    """
    from PIL import Image

    root = Path(folder).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    data = _parsed(Path(file).expanduser())
    problems = _form_problems(data)
    raise_problems(str(file), problems)
    categories = sorted(data["categories"], key=lambda one: one["id"])
    labels = {one["id"]: label for label, one in enumerate(categories)}
    ids = {one["id"]: number for number, one in enumerate(data["images"])}
    objects: dict[int, list[tuple[list[float], int, bool]]] = defaultdict(list)
    for number, one in enumerate(data["annotations"]):
        where = f"annotation {one.get('id', f'number {number}')}"
        if one["image_id"] not in ids:
            problems.append(f"{where}: there is no image {one['image_id']!r}")
            continue
        image = ids[one["image_id"]]
        box = _shares(one["bbox"], data["images"][image], clip)
        if isinstance(box, str):
            problems.append(f"{where}: bbox {one['bbox']} {box}")
        if one["category_id"] not in labels:
            problems.append(f"{where}: there is no category {one['category_id']!r}")
        elif isinstance(box, list):
            crowd = bool(one.get("iscrowd", 0))
            objects[image].append((box, labels[one["category_id"]], crowd))
    images = []
    for one in data["images"]:
        try:
            pixels = _picture(root, one)
            picture = Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BICUBIC)
            images.append(np.asarray(picture))
        except (OSError, ValueError, SyntaxError) as error:  # what Pillow's decoders raise
            problems.append(f"{one['file_name']}: {error}")
    raise_problems(str(file), problems)

    most = max(map(len, objects.values()), default=0)
    boxes = np.zeros((len(images), most, 4), np.float32)
    class_labels = np.zeros((len(images), most), np.int32)
    object_mask, crowd = (np.zeros((len(images), most), bool) for _ in range(2))
    for image, found in objects.items():
        for slot, (box, label, is_crowd) in enumerate(found):
            boxes[image, slot], class_labels[image, slot] = box, label
            object_mask[image, slot], crowd[image, slot] = True, is_crowd
    return CocoExamples(
        np.stack(images),
        boxes,
        class_labels,
        object_mask,
        tuple(one["name"] for one in categories),
        crowd,
        np.array([one["id"] for one in data["images"]], np.int64),
        np.array([(one["height"], one["width"]) for one in data["images"]], np.int32),
    )


def _parsed(file: Path) -> dict[str, Any]:
    text = decode_utf8(file)
    try:
        data = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    lists = {name: data.get(name) for name in NEEDED} if isinstance(data, dict) else {}
    if not lists or not all(isinstance(part, list) for part in lists.values()):
        raise ValueError(f"{file} must be an object with the lists {list(NEEDED)}")
    return lists


def _form_problems(data: Mapping[str, list[Any]]) -> list[str]:
    """Entries that lack something, hold another kind of value, or have an id twice."""
    problems = (
        [] if data["images"] and data["categories"] else ["there are no images or categories"]
    )
    for name, entries in data.items():
        for number, one in enumerate(entries):
            if not isinstance(one, dict) or (lacks := [k for k in NEEDED[name] if k not in one]):
                lacks = "object" if not isinstance(one, dict) else lacks
                problems.append(f"{name}[{number}] has no {lacks}")
                continue
            whole = [key for key in NEEDED[name] if key not in ("file_name", "name", "bbox")]
            wrong = {key: one[key] for key in whole if not _is_whole(one[key])}
            wrong |= {
                k: one[k] for k in ("file_name", "name") if not isinstance(one.get(k, ""), str)
            }
            if "bbox" in one and not _is_box(one["bbox"]):
                wrong["bbox"] = one["bbox"]
            if one.get("iscrowd", 0) not in (0, 1):
                wrong["iscrowd"] = one["iscrowd"]
            if not wrong and min(one.get("width", 1), one.get("height", 1)) < 1:
                wrong = {"width": one["width"], "height": one["height"]}
            if wrong:
                problems.append(f"{name}[{number}] has {wrong}, of another form")
    for name in ("images", "categories"):
        counts = Counter(
            one["id"]
            for one in data[name]
            if isinstance(one, dict) and "id" in one and type(one["id"]) is int
        )
        problems += [
            f"{name}: the id {key} is there {n} times" for key, n in counts.items() if n > 1
        ]
    return problems


def _is_whole(value: Any) -> bool:
    """Whether it is an integer of 64 bits."""
    return type(value) is int and abs(value) < MOST


def _is_box(value: Any) -> bool:
    """Whether it is four finite numbers."""
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(type(end) in (int, float) and abs(end) < MOST for end in value)
    )


def _shares(bbox: list[float], image: Mapping[str, int], clip: bool) -> list[float] | str | None:
    """A box (left, top, width, height) in pixels as centre and size in shares of its picture.

    What is wrong with it instead, or None where it is cut to nothing.
    """
    ends = []
    for low, length, whole in zip(
        bbox[:2], bbox[2:], (image["width"], image["height"]), strict=True
    ):
        high = low + length
        if clip:
            low, high = (min(max(end, 0), whole) for end in (low, high))
        if high <= low:
            return None if clip else "has no area; width and height must be positive"
        # Half a pixel is what annotators' rounding leaves.
        if low < -0.5 or high > whole + 0.5:
            return f"leaves its picture of {image['width']} x {image['height']} pixels"
        ends.append((max(low, 0) / whole, min(high, whole) / whole))
    (left, right), (top, bottom) = ends
    return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]


def _picture(root: Path, entry: Mapping[str, Any]) -> np.ndarray:
    """uint8 [X, Y, 3] of an image of the file.

    Raises:
      ValueError: it lies outside the folder, or has another size than the file says.
      OSError: it is not there or is no picture.
    """
    path = (root / entry["file_name"]).resolve()
    if not path.is_relative_to(root.resolve()):
        raise ValueError("lies outside the folder; refused")
    pixels = decode(path)
    if pixels.shape[:2] != (entry["height"], entry["width"]):
        raise ValueError(
            f"has {pixels.shape[1]} x {pixels.shape[0]} pixels, the file says {entry['width']} x "
            f"{entry['height']}"
        )
    return pixels
