"""Log-mel frames of sound, as Whisper reads them (Radford et al. 2022, arXiv:2212.04356, sec. 2.2).

Filters and windows are made on the host, once; the frames are computed by JAX, on any device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.config import read_config, write_json
from fmjax.data.audio import PEAK
from fmjax.data.files import raise_problems
from fmjax.data.spectral import Frames, log_mel, mel_filters

FILE = "preprocessor_config.json"
TYPE = "WhisperFeatureExtractor"
FLOOR = 1e-10  # the least energy whose logarithm is taken
RANGE = 8.0  # decades below the loudest bin that are kept
# Keys that follow from others or say how to return: old files hold their filters too.
DERIVED = frozenset(
    """
    feature_extractor_type image_processor_type mel_filters n_samples nb_max_frames padding_side
    processor_class return_attention_mask do_normalize
    """.split()
)


@dataclasses.dataclass(frozen=True)
class LogMel:
    """How sound becomes frames; the fields are keys of preprocessor_config.json.

    Attributes:
        feature_size: M, mel bins of a frame.
        sampling_rate: of the samples, in Hz.
        hop_length: samples from one frame to the next.
        n_fft: samples of a frame.
        chunk_length: seconds that a model reads at once.
        padding_value: the samples that fill up a shorter recording.

    Raises:
        ValueError: numbers that are no sizes; all are listed.
    """

    feature_size: int = 80
    sampling_rate: int = 16000
    hop_length: int = 160
    n_fft: int = 400
    chunk_length: int = 30
    padding_value: float = 0.0

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value!r} must be an int of at least 1"
            for name, value in vars(self).items()
            if name != "padding_value" and (type(value) is not int or value < 1)
        ]
        if not problems and self.n_fft % 2:
            problems.append(f"n_fft={self.n_fft} must be even")
        if not problems and self.samples % self.hop_length:
            problems.append(
                f"{self.chunk_length} seconds are {self.samples} samples, no multiple of "
                f"hop_length={self.hop_length}"
            )
        raise_problems(FILE, problems)

    @property
    def samples(self) -> int:
        """Samples that a model reads at once."""
        return self.chunk_length * self.sampling_rate

    @property
    def frames(self) -> int:
        """Frames that a model reads at once."""
        return self.samples // self.hop_length

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = FILE) -> LogMel:
        """Of the keys of a preprocessor_config.json.

        Raises:
            ValueError: another extractor's, an unknown key, or values that do not fit.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        problems = []
        if data.get("feature_extractor_type", TYPE) != TYPE:
            problems.append(
                f"feature_extractor_type={data['feature_extractor_type']!r} must be {TYPE!r}"
            )
        if data.get("dither"):
            problems.append(f"dither={data['dither']!r} is not supported; only 0 is")
        if data.get("do_normalize"):
            problems.append("do_normalize=true is not supported")
        problems += [
            f"{key}={value!r} is unknown; if it changes nothing, delete it"
            for key, value in data.items()
            if key not in known and key not in DERIVED and key != "dither"
        ]
        raise_problems(source, problems)
        return cls(**{key: data[key] for key in known if data.get(key) is not None})

    @classmethod
    def read(cls, folder: str | Path) -> LogMel:
        """Of a checkpoint's folder.

        Raises:
            OSError: it has no preprocessor_config.json.
            ValueError: as `from_dict`.
        """
        return cls.from_dict(read_config(Path(folder), FILE), str(Path(folder) / FILE))

    def write(self, folder: str | Path) -> None:
        """Writes the folder's preprocessor_config.json, as transformers reads it."""
        derived = {
            "feature_extractor_type": TYPE, "processor_class": "WhisperProcessor",
            "n_samples": self.samples, "nb_max_frames": self.frames, "padding_side": "right",
            "return_attention_mask": False,
        }  # fmt: skip
        write_json(Path(folder) / FILE, dataclasses.asdict(self) | derived)

    def __call__(self, recordings: Sequence[np.ndarray]) -> dict[str, Array]:
        """Recordings of at most `chunk_length` seconds as a model reads them.

        Args:
            recordings: B arrays of float samples [N] in -1 to 1, at `sampling_rate`.

        Returns:
            ``input_features`` float32 [B, T, M].

        Raises:
            ValueError: recordings that are no such arrays, or too long; all are named.
        """
        batch = np.full((len(recordings), self.samples), self.padding_value, np.float32)
        problems = []
        for number, samples in enumerate(recordings):
            if problem := sample_problem(samples):
                problems.append(f"recording {number} {problem}")
            elif len(samples) > self.samples:
                seconds = len(samples) / self.sampling_rate
                problems.append(
                    f"recording {number} has {seconds:.1f} s, more than the {self.chunk_length} s "
                    "that are read at once: cut it"
                )
            else:
                batch[number, : len(samples)] = samples
        if not len(recordings):
            problems.append("there is no recording")
        raise_problems("recordings", problems)
        energies = log_energies(batch, self)
        loudest = energies.max(axis=(1, 2), keepdims=True)
        return {"input_features": scaled(energies, loudest)}


def sample_problem(samples: np.ndarray) -> str | None:
    """What is wrong with an array of samples; None where nothing is."""
    samples = np.asarray(samples)
    if samples.ndim != 1:
        return f"has shape {samples.shape}; it must be [N], one channel: average the channels"
    if samples.dtype.kind != "f":
        return f"has dtype {samples.dtype}; samples are floats from -1 to 1: divide integers"
    if not len(samples):
        return "is empty"
    if not np.isfinite(samples).all():
        return f"has {np.count_nonzero(~np.isfinite(samples))} samples that are nan or infinite"
    if (peak := float(np.abs(samples).max())) > PEAK:
        return f"has a sample of {peak:g}; samples are floats from -1 to 1: divide integers"
    return None


@functools.cache
def _filters(settings: LogMel) -> np.ndarray:
    return mel_filters(
        Frames(settings.n_fft, settings.hop_length),
        settings.feature_size,
        settings.sampling_rate,
        high=min(8000.0, settings.sampling_rate / 2),
        scale="slaney",
        equal_area=True,
    )  # [n_fft / 2 + 1, M]


@functools.partial(jax.jit, static_argnames=("settings", "padded"))
def log_energies(samples: Array | np.ndarray, settings: LogMel, *, padded: bool = False) -> Array:
    """Logarithms (base 10) of the energies in mel bins, at most `FLOOR`'s below.

    Args:
        samples: float [B, N].
        settings: of the frames.
        padded: whether the samples begin and end with the half frame each that otherwise is made
            by reflection: pieces of a long recording have real ones.

    Returns:
        float32 [B, T, M]: T is N / hop_length, rounded down.
    """
    frames = Frames(settings.n_fft, settings.hop_length, center=not padded)
    samples = jnp.asarray(samples, jnp.float32)
    found = log_mel(samples, frames, _filters(settings), floor=FLOOR) / np.log(10.0)
    return found if padded else found[:, :-1]


def scaled(energies: Any, loudest: Any) -> Any:
    """Log energies as the model reads them: eight decades below the loudest, in about -1 to 1.

    Args:
        energies: [..., T, M], arrays of numpy or JAX.
        loudest: the largest of the recording, broadcastable.
    """
    return (energies.clip(loudest - RANGE) + 4.0) / 4.0
