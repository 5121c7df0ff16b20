"""preprocessor_config.json of models of our own that hear log-mel frames of any length.

Hugging Face's library has no extractor for them: the file's ``feature_extractor_type`` is ours.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.config import write_json
from fmjax.data.audio_rooms import warp_frequencies
from fmjax.data.files import raise_problems
from fmjax.data.spectral import FLOOR, Frames, mel_filters, normalise, power
from fmjax.data.waveform import FILE, WaveformProcessor, load_waveform_processor
from fmjax.weights.strict_json import parse_object

TYPE = "MelFrames"


@dataclasses.dataclass(frozen=True)
class MelFrames:
    """From sounds to ``input_features``: logarithms of mel bins, each with mean 0 and variance 1
    over a sound's frames.

    Attributes:
        sampling_rate: samples a second that the model takes.
        feature_size: M, bins of a frame.
        frame_length: samples of a frame.
        hop_length: samples from one frame to the next.
        n_fft: samples that a frame is padded to.
        low_frequency: of the first bin, Hz.
        high_frequency: of the last; None is half the rate.
        dither: deviation of the noise, always the same, that stands in for digital silence, whose
            logarithm says nothing of any sound.
        peak: the magnitude that each sound's loudest sample is brought to; None leaves it.

    Raises:
        ValueError: values that do not fit; everything wrong is listed.
    """

    sampling_rate: int = 16_000
    feature_size: int = 80
    frame_length: int = 400
    hop_length: int = 160
    n_fft: int = 512
    low_frequency: float = 0.0
    high_frequency: float | None = None
    dither: float = 0.0
    peak: float | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)} must be positive"
            for name in ("sampling_rate", "feature_size", "frame_length", "hop_length")
            if getattr(self, name) < 1
        ]
        if self.n_fft < self.frame_length:
            problems.append(f"n_fft={self.n_fft} must be at least {self.frame_length}")
        if not 0 <= self.low_frequency < self.top <= self.sampling_rate / 2:
            problems.append(
                f"low_frequency={self.low_frequency} and high_frequency={self.high_frequency} must "
                f"be in this order, from 0 to {self.sampling_rate / 2}"
            )
        if not self.dither >= 0:
            problems.append(f"dither={self.dither} must be at least 0")
        if self.peak is not None and not self.peak > 0:
            problems.append(f"peak={self.peak} must be above 0, or None")
        raise_problems(TYPE, problems)

    @property
    def top(self) -> float:
        """The highest frequency, Hz."""
        return self.sampling_rate / 2 if self.high_frequency is None else self.high_frequency

    @property
    def cut(self) -> Frames:
        """How frames are cut."""
        return Frames(length=self.frame_length, hop=self.hop_length, fft=self.n_fft)

    def count(self, samples: int) -> int:
        """How many frames so many samples have; sounds shorter than a frame have one."""
        return max(1, int(self.cut.count(samples)))

    def of(self, samples: np.ndarray) -> np.ndarray:
        """The frames of one sound: [T] -> float32 [N, M].

        Raises:
            ValueError: no samples, or some that are not finite.
        """
        if samples.ndim != 1 or not samples.size or not np.isfinite(samples).all():
            raise ValueError(
                f"a sound has the shape {samples.shape}; it must be [T] finite samples, at least 1"
            )
        if self.peak is not None:
            samples = samples * (self.peak / max(float(np.abs(samples).max()), 1e-9))
        # Whole steps of 16 frames, so that few lengths are compiled.
        step = 16 * self.hop_length
        size = -(-max(len(samples), self.frame_length) // step) * step
        padded = np.zeros(size, np.float32)
        padded[: len(samples)] = samples
        count = self.count(len(samples))
        return np.asarray(_frames(self, padded, np.int32(count)))[:count]

    def __call__(
        self, sounds: Sequence[np.ndarray], sampling_rate: int, *, length: int | None = None
    ) -> dict[str, np.ndarray]:
        """A batch of sounds; each is normalised alone.

        Args:
            sounds: of one channel, floats [T] each.
            sampling_rate: of all of them; another than the model's is refused.
            length: of all rows, in samples; None is that of the longest sound.

        Returns:
            ``input_features`` float32 [B, N, M] and ``attention_mask`` int32 [B, N].

        Raises:
            ValueError: another rate, no sounds, or what `of` refuses.
        """
        if sampling_rate != self.sampling_rate:
            raise ValueError(
                f"sounds have {sampling_rate} samples a second, and the model takes "
                f"{self.sampling_rate}: resample them"
            )
        if not sounds:
            raise ValueError("there are no sounds")
        found = [self.of(np.asarray(sound)) for sound in sounds]
        most = max(map(len, found))
        if length is not None:
            if self.count(length) < most:
                raise ValueError(f"a sound has {most} frames, more than length={length} samples")
            most = self.count(length)
        features = np.zeros((len(found), most, self.feature_size), np.float32)
        mask = np.zeros((len(found), most), np.int32)
        for row, kept, frames in zip(features, mask, found, strict=True):
            row[: len(frames)], kept[: len(frames)] = frames, 1
        return {"input_features": features, "attention_mask": mask}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the file, as `fmjax.save` asks for it."""
        settings = {"feature_extractor_type": TYPE, **dataclasses.asdict(self)}
        write_json(Path(folder) / FILE, settings)


@functools.cache
def _filters(settings: MelFrames) -> np.ndarray:
    return mel_filters(
        settings.cut, settings.feature_size, settings.sampling_rate,
        low=settings.low_frequency, high=settings.top,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames="settings")
def _frames(settings: MelFrames, samples: Array, count: Array) -> Array:
    return mel_frames(settings, samples[None], count[None])[0]


def mel_frames(
    settings: MelFrames, samples: Array, counts: Array, speakers: Array | None = None
) -> Array:
    """Normalised frames of sounds at their own level, on any device: float32 [B, N, M].

    Args:
        settings: how.
        samples: [B, T]; padding is 0.
        counts: int [B], frames that are of each sound; the others become 0.
        speakers: [B], factors of the frequencies; see `fmjax.data.audio_rooms.warp_frequencies`.
    """
    noise = settings.dither * jax.random.normal(jax.random.key(0), samples.shape)
    powers = power(samples + noise, settings.cut)
    if speakers is not None:
        powers = warp_frequencies(powers, speakers)
    energies = jnp.matmul(powers, _filters(settings), precision="highest")
    found = jnp.log(jnp.maximum(energies, FLOOR))
    return normalise(found, jnp.arange(found.shape[1]) < counts[:, None])


Processor = WaveformProcessor | MelFrames


def load_processor(folder: str | Path) -> Processor:
    """What makes a checkpoint's inputs of sounds.

    Raises:
        OSError: there is no preprocessor_config.json.
        ValueError: it is no JSON object, of another kind, or says what is not understood.
    """
    file = Path(folder).expanduser() / FILE
    if not file.is_file():
        return load_waveform_processor(folder)  # which says what is missing
    data = parse_object(file.read_bytes(), str(file))
    if data.get("feature_extractor_type") != TYPE:
        return load_waveform_processor(folder)
    values = {key: value for key, value in data.items() if key != "feature_extractor_type"}
    fields = {field.name: str(field.type) for field in dataclasses.fields(MelFrames)}
    problems = [f"{key}={values[key]!r} is unknown" for key in sorted(values.keys() - fields)]
    for key in sorted(values.keys() & fields):
        value, kind = values[key], fields[key]
        whole = kind == "int"
        if type(value) not in ((int,) if whole else (int, float)) and not (
            value is None and "None" in kind
        ):
            problems.append(f"{key}={value!r} must be {kind}")
    raise_problems(str(file), problems)
    return MelFrames(**values)  # pyright: ignore[reportArgumentType]
