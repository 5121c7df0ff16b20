"""preprocessor_config.json of models that hear samples: mean 0, variance 1, zeros behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmjax.config import write_json
from fmjax.data.files import raise_problems
from fmjax.weights.strict_json import parse_object

FILE = "preprocessor_config.json"
TYPE = "Wav2Vec2FeatureExtractor"
EPSILON = 1e-7  # added to the variance
# Keys that change no sample.
HARMLESS = frozenset("feature_extractor_type processor_class tokenizer_class auto_map".split())


@dataclasses.dataclass(frozen=True)
class WaveformProcessor:
    """From sounds to ``input_values``, as transformers' Wav2Vec2FeatureExtractor makes them.

    Attributes:
        sampling_rate: samples a second that the model takes.
        do_normalize: whether each sound gets mean 0 and variance 1.
        return_attention_mask: whether a mask tells samples from padding. Models whose
            ``feat_extract_norm`` is "group" were trained without.
        padding_value: what stands behind shorter sounds.
        feature_size: numbers a sample; 1.
        padding_side: "right".

    Raises:
        ValueError: values that do not fit; everything wrong is listed.
    """

    sampling_rate: int = 16_000
    do_normalize: bool = True
    return_attention_mask: bool = False
    padding_value: float = 0.0
    feature_size: int = 1
    padding_side: str = "right"

    def __post_init__(self) -> None:
        problems = []
        if self.feature_size != 1:
            problems.append(f"feature_size={self.feature_size} must be 1, a number a sample")
        if self.padding_side != "right":
            problems.append(f"padding_side={self.padding_side!r} must be 'right'")
        if self.sampling_rate < 1:
            problems.append(f"sampling_rate={self.sampling_rate} must be positive")
        raise_problems(TYPE, problems)

    def __call__(
        self, sounds: Sequence[np.ndarray], sampling_rate: int, *, length: int | None = None
    ) -> dict[str, np.ndarray]:
        """A batch of sounds.

        Without a mask the mean and the variance are those of the padded sound, as transformers has
        them: batch sounds of about one length, or normalise each alone.

        Args:
            sounds: of one channel, floats [T] each, or, where they are normalised, integers.
            sampling_rate: of all of them; another than the model's is refused.
            length: of all rows, in samples; None is that of the longest sound.

        Returns:
            ``input_values`` float32 [B, T] and, if it is returned, ``attention_mask`` int32 [B, T].

        Raises:
            ValueError: another rate, no sounds, empty or stereo ones, sounds longer than `length`,
                samples that are not finite; everything wrong is listed.
        """
        arrays = [np.asarray(sound) for sound in sounds]
        problems = []
        if sampling_rate != self.sampling_rate:
            problems.append(
                f"sounds have {sampling_rate} samples a second, and the model takes "
                f"{self.sampling_rate}: resample them"
            )
        if not arrays:
            problems.append("there are no sounds")
        for number, array in enumerate(arrays):
            if array.ndim != 1 or not array.size:
                problems.append(f"sound {number} has the shape {array.shape}; it must be [T]")
            elif array.dtype.kind not in "fiu" or not np.isfinite(array).all():
                problems.append(f"sound {number} has samples that are no finite numbers")
            elif array.dtype.kind != "f" and not self.do_normalize:
                problems.append(
                    f"sound {number} has {array.dtype} samples; without do_normalize they must be "
                    "floats from -1 to 1: divide them by 32768 (of 16 bits)"
                )
            elif length is not None and array.size > length:
                problems.append(f"sound {number} has {array.size} samples, above length={length}")
        raise_problems("sounds", problems)
        size = max(array.size for array in arrays) if length is None else length
        values = np.full((len(arrays), size), self.padding_value, np.float32)
        mask = np.zeros((len(arrays), size), np.int32)
        for row, kept, array in zip(values, mask, arrays, strict=True):
            row[: array.size], kept[: array.size] = array, 1
            if self.do_normalize:
                seen = row[: array.size] if self.return_attention_mask else row
                seen -= seen.mean()
                seen /= np.sqrt(seen.var() + EPSILON)
        if not self.return_attention_mask:
            return {"input_values": values}
        return {"input_values": values, "attention_mask": mask}

    def to_json(self) -> dict[str, Any]:
        """The keys of the file."""
        return {"feature_extractor_type": TYPE, **dataclasses.asdict(self)}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the file, as `fmjax.save` asks for it."""
        write_json(Path(folder) / FILE, self.to_json())


def load_waveform_processor(folder: str | Path) -> WaveformProcessor:
    """The processor of a checkpoint's folder.

    Raises:
        OSError: there is no preprocessor_config.json.
        ValueError: it is no JSON object, of another kind, or says what is not understood;
            everything is listed.
    """
    file = Path(folder).expanduser() / FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file.parent} has no {FILE}, which says how samples are normalised; copy it from the "
            "checkpoint's source"
        )
    data = parse_object(file.read_bytes(), str(file))
    stated = data.get("feature_extractor_type", TYPE)  # old files leave it out
    if stated != TYPE:
        raise ValueError(f"{file}: feature_extractor_type={stated!r} must be {TYPE!r}")
    fields = {field.name: field.default for field in dataclasses.fields(WaveformProcessor)}
    values: dict[str, Any] = {}
    problems = []
    for key, value in data.items():
        if key in HARMLESS or value is None:
            continue
        if key not in fields:
            problems.append(f"{key}={value!r} is unknown; if it changes nothing, delete it")
        elif isinstance(fields[key], float) and type(value) in (int, float):
            values[key] = float(value)  # pyright: ignore[reportArgumentType]
        elif type(value) is type(fields[key]):
            values[key] = value
        else:
            problems.append(f"{key}={value!r} must be {type(fields[key]).__name__}")
    raise_problems(str(file), problems)
    return WaveformProcessor(**values)
