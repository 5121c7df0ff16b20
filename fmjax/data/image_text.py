"""Pictures with texts: from folders and manifests, and as a checkpoint of both sides wants them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fmjax.config import read_config
from fmjax.data.columns import Columns
from fmjax.data.decoding import FILES, Picture, decode
from fmjax.data.encoding import encode
from fmjax.data.examples import TextExamples
from fmjax.data.files import decode_utf8, raise_problems, read_rows, visible
from fmjax.data.image_processor import ImageProcessor, load_image_processor
from fmjax.data.tokens import padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, eq=False)
class ImageTexts:
    """N pictures of one size, each with a text.

    Attributes:
      images: uint8 [N, X, Y, C].
      texts: N strings.
      labels: int32 [N], classes of the pictures, when the source has them.
      label_names: the classes in the order of their indices.

    Raises:
      ValueError: images of another kind, other numbers of texts or labels, empty texts, labels
        that are no class.
    """

    images: np.ndarray
    texts: Sequence[str]
    labels: np.ndarray | None = None
    label_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            problems.append(
                f"images are {self.images.dtype} {self.images.shape}; they must be uint8 "
                "[N, X, Y, C]"
            )
        for name, values in (("texts", self.texts), ("labels", self.labels)):
            if values is not None and len(values) != len(self.images):
                problems.append(f"{len(values)} {name} for {len(self.images)} images")
        if empty := [number for number, text in enumerate(self.texts) if not text.strip()]:
            problems.append(f"{len(empty)} texts are empty, the first of image {empty[0]}")
        if (
            self.labels is not None
            and ((self.labels < 0) | (self.labels >= len(self.label_names))).any()
        ):
            problems.append(f"labels are not all of the {len(self.label_names)} classes")
        raise_problems("ImageTexts", problems)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def numbers(self) -> np.ndarray:
        """int32 [N]: the same number for the same text."""
        places: dict[str, int] = {}
        return np.array([places.setdefault(text, len(places)) for text in self.texts], np.int32)

    def select(self, indices: Sequence[int] | np.ndarray) -> ImageTexts:
        """The pairs at `indices`, in that order."""
        chosen = np.asarray(indices, np.int64)
        return dataclasses.replace(
            self,
            images=self.images[chosen],
            texts=[self.texts[n] for n in chosen],
            labels=None if self.labels is None else self.labels[chosen],
        )

    def columns(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        vocab_size: int | None = None,
    ) -> Columns:
        """As they are batched, for `fmjax.tasks.image_text`.

        A batch has ``pixel_values`` uint8 [B, X, Y, C], ``input_ids`` and ``attention_mask``
        int32 [B, T], and as ``labels`` [B] the numbers of the texts, so that pictures of the same
        text are not told apart.

        Args:
          tokenizer: of `transformers`.
          max_length: in tokens, special tokens included. SigLIP's texts are all padded to it: give
            `batches` the one bucket ``(max_length,)``.
          vocab_size: of the model that is to read them.

        Raises:
          ValueError: what `encode` refuses.
        """
        examples = TextExamples(list(self.texts), None, ())
        encoded = encode(tokenizer, examples, max_length=max_length, vocab_size=vocab_size)
        part = encoded.columns(padding_id(tokenizer)).ragged
        return Columns(part, {"pixel_values": self.images, "labels": self.numbers})


def read_image_texts(
    source: str | Path,
    *,
    read: Callable[[Path], np.ndarray] = decode,
    image: str = "image",
    text: str = "text",
    root: str | Path | None = None,
) -> ImageTexts:
    """Pairs from a folder, ``NAME.png`` beside ``NAME.txt``, or from a manifest.

    Args:
      source: the folder, or a .jsonl, .csv or .tsv file with a row for each pair.
      read: a file as uint8 [X, Y, C]: as it is, or resized (`resized`, `ImageProcessor.pixels`).
      image: the manifest's column of paths.
      text: its column of texts.
      root: what the paths are inside of; by default the manifest's folder.

    Raises:
      OSError: there is no such folder or file.
      ValueError: no pairs; pictures without a text and the reverse; paths that lead elsewhere;
        files that are no pictures, or of different sizes; all of it is listed.
    """
    place = Path(source).expanduser()
    if place.is_dir():
        files, texts, problems = _beside(place)
    else:
        files, texts, problems = _manifest(place, image, text, root)
    images = []
    for file in files:
        try:
            images.append(read(file))
        except (OSError, ValueError) as error:
            problems.append(f"{file}: {error}")
    if len(sizes := {picture.shape for picture in images}) > 1:
        problems.append(
            f"the pictures have {len(sizes)} shapes, from {min(sizes)} to {max(sizes)}; resize them"
        )
    raise_problems(str(place), problems)
    return ImageTexts(np.stack(images), texts)


def _beside(folder: Path) -> tuple[list[Path], list[str], list[str]]:
    pictures = [file for file in visible(folder) if file.suffix.lower() in FILES]
    texts, problems = [], []
    for file in pictures:
        try:
            texts.append(decode_utf8(file.with_suffix(".txt")).strip())
        except (OSError, ValueError) as error:
            problems.append(f"{file.name} has no text: {error}")
    stems = {file.stem for file in pictures}
    if len(stems) < len(pictures):
        problems.append("several pictures have one name, and so one text")
    problems += [
        f"{file.name} has no picture"
        for file in visible(folder)
        if file.suffix == ".txt" and file.stem not in stems
    ]
    if not pictures:
        problems.append(f"there are no pictures; they must be {folder}/*{{{','.join(FILES)}}}")
    return pictures, texts, problems


def _manifest(
    file: Path, image: str, text: str, root: str | Path | None
) -> tuple[list[Path], list[str], list[str]]:
    folder = (file.parent if root is None else Path(root).expanduser()).resolve()
    rows = read_rows(file, [image, text])
    files, texts, problems = [], [], list(rows.problems)
    for number, cells in zip(rows.numbers, rows.cells, strict=True):
        path, words = cells.get(image), cells.get(text)
        if not isinstance(path, str) or not isinstance(words, str) or not words.strip():
            problems.append(f"row {number}: {image}={path!r}, {text}={words!r} must be two strings")
            continue
        place = (folder / path).resolve()
        if not place.is_relative_to(folder):
            problems.append(f"row {number}: {path} is not inside {folder}")
            continue
        files.append(place)
        texts.append(words.strip())
    return files, texts, problems


# Families whose texts are padded to the tower's whole length, which its pooling counts on.
PADDED_FULLY = ("siglip",)


@dataclasses.dataclass(frozen=True)
class PairProcessor:
    """Pictures and texts as a model of both takes them; what Hugging Face calls a CLIPProcessor.

    Attributes:
      image_processor: of the pictures.
      tokenizer: of the texts, of `transformers`.
      max_length: tokens that a text is cut to.
      full_length: whether all texts are padded to `max_length`, and not to the longest of them.
    """

    image_processor: ImageProcessor
    tokenizer: Any
    max_length: int
    full_length: bool = False

    def __call__(
        self, *, images: Sequence[Picture] | None = None, texts: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """``pixel_values`` float32 [B, X, Y, C]; ``input_ids`` and ``attention_mask`` int32 [N, T].

        Raises:
          OSError: a file cannot be opened.
          ValueError: neither is given, empty texts, or pictures that cannot be used.
        """
        batch: dict[str, np.ndarray] = {}
        if images is not None:
            batch |= self.image_processor(images)
        if texts is not None:
            empty = [f"text {n} is empty" for n, text in enumerate(texts) if not text.strip()]
            raise_problems("texts", empty if len(texts) else ["there are none"])
            encoding = self.tokenizer(
                list(texts),
                padding="max_length" if self.full_length else True,
                truncation=True,
                max_length=self.max_length,
                return_attention_mask=not self.full_length,
                return_tensors="np",
            )
            batch |= {name: np.asarray(x, np.int32) for name, x in encoding.items()}
        if not batch:
            raise ValueError("there is nothing to process; give images=, texts= or both")
        return batch

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes both sides' files, as `fmjax.save` asks for it."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def load_pair_processor(folder: str | Path, tokenizer: Any, *, max_length: int) -> PairProcessor:
    """The processor of a checkpoint's folder.

    Args:
      folder: with the checkpoint's files.
      tokenizer: of the same folder (`fmjax.load_tokenizer`).
      max_length: tokens that the model's texts may have.

    Raises:
      OSError: there is nothing that says how pictures are made.
      ValueError: what is said is not understood.
    """
    place = Path(folder).expanduser()
    model_type = read_config(place).get("model_type", "")
    return PairProcessor(
        load_image_processor(place), tokenizer, max_length, model_type in PADDED_FULLY
    )
