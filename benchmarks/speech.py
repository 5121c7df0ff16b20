"""How fast is speech recognition, next to PyTorch sdpa in the same run?

    python benchmarks/speech.py                           the real Whisper tiny.en, 8 recordings
    python benchmarks/speech.py --cases whisper-batch-8 --repeats 9
    python benchmarks/speech.py --smoke                   a tiny model and noise, seconds

From samples to tokens, greedy, float32: log-mel frames, the encoder, and text until all rows have
ended; one recording and eight (prompts of their Debian package, resampled to 16 kHz; the model is
that of its package). Before anything is timed both sides must give the same frames and the same
tokens, and while they are timed nothing may be compiled. Tokens are those of the longest text. Run
it on an idle machine: other load slows the two sides unequally.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from cases import TINY, Case, torch_is_there
from peer import Served
from record import Row
from record import row as make_row
from run import Settings, run

import fmjax
from fmjax.data.assets import fetch
from fmjax.data.audio import read_audio
from fmjax.data.audio_features import LogMel
from fmjax.generate.speech import Listener, hear
from fmjax.generate.speech_config import SpeechConfig
from fmjax.generation_config import GenerationConfig
from fmjax.models import whisper
from fmjax.perf.flops import count_flops
from fmjax.perf.timing import compile_events, time_alternately
from fmjax.recipes.ctranslate2 import tiny_english

SAME_FRAMES = 1e-4
CASES = tuple(
    Case(f"whisper-batch-{size}", whisper.VARIANTS["whisper-tiny.en"], "seq2seq_lm", size, 1,
         "float32")
    for size in (1, 8)
)  # fmt: skip
TINY["whisper"] = dataclasses.replace(
    whisper.VARIANTS["tiny"], max_source_positions=50, num_mel_bins=80, dropout=0.0
)


class Peer(Served):
    """transformers' Whisper with scaled dot-product attention, in a process of its own.

    Args:
        folder: a Hugging Face folder.
        sounds: B arrays of samples at 16 kHz.
    """

    def __init__(self, folder: Path, sounds: list[np.ndarray]) -> None:
        super().__init__(_serve, str(folder), sounds)

    def ask(self, what: str) -> np.ndarray:
        """ "features" [B, M, T], or "tokens" [B, N], the prompt included."""
        return self._ask(what)


def _serve(connection: Connection, folder: str, sounds: list[np.ndarray]) -> None:
    import torch
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_float32_matmul_precision("highest")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = WhisperForConditionalGeneration.from_pretrained(
        folder, attn_implementation="sdpa", dtype=torch.float32
    )
    model = model.to(device).eval()
    extractor = WhisperFeatureExtractor.from_pretrained(folder)

    def features() -> Any:
        return extractor(sounds, sampling_rate=16000, return_tensors="pt")["input_features"]

    while True:
        try:
            (what,) = connection.recv()
        except EOFError:
            return
        if what == "features":
            connection.send(features().numpy())
            continue
        with torch.no_grad():
            tokens: Any = model.generate(
                features().to(device), force_unique_generate_call=True, do_sample=False
            )
        connection.send(tokens.cpu().numpy())


def smoke_folder(config: whisper.Config, folder: Path) -> Path:
    """A random model with what transformers needs to run it."""
    model, variables = fmjax.create("whisper", config, head="seq2seq_lm", rng=jax.random.key(0))
    fmjax.save(folder, model, variables)
    told = {
        "decoder_start_token_id": config.decoder_start_token_id, "max_length": 16,
        "eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id, "no_timestamps_token_id": 40,
        "is_multilingual": False, "return_timestamps": False,
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(told))
    LogMel(chunk_length=1).write(folder)
    return folder


def recordings(count: int, *, smoke: bool) -> list[np.ndarray]:
    """Samples at 16 kHz."""
    if smoke:
        rng = np.random.default_rng(0)
        return [0.1 * rng.normal(size=12000).astype(np.float32) for _ in range(count)]
    names = (
        "agent-alreadyon", "agent-pass", "auth-incorrect", "conf-adminmenu", "conf-extended",
        "conf-getpin", "demo-thanks", "vm-advopts",
    )  # fmt: skip
    folder = fetch("prompts")
    return [read_audio(folder / f"{name}.wav").samples for name in names[:count]]


def run_case(case: Case, settings: Settings, peak: float) -> list[Row]:
    """Compare, compile and time one case."""
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = smoke_folder(case.config, scratch) if settings.smoke else tiny_english()
        model, variables = fmjax.load(folder, dtype="float32")
        extractor, speech = LogMel.read(folder), SpeechConfig.read(folder)
        listener = Listener(model, variables, GenerationConfig.read(folder), speech)
        sounds = recordings(case.batch_size, smoke=settings.smoke)

        def transcribe() -> list[tuple[int, ...]]:
            features = extractor(sounds)["input_features"]
            return [text.tokens for text in hear(listener, features)]

        with compile_events() as first:
            ours = transcribe()
        length = max(map(len, ours)) + 1
        thunks: dict[str, Any] = {"fmjax": transcribe}
        difference = None
        if settings.peer and torch_is_there():
            peer = stack.enter_context(Peer(folder, sounds))
            frames = np.swapaxes(np.asarray(extractor(sounds)["input_features"]), 1, 2)
            difference = float(np.abs(frames - peer.ask("features")).max())
            check_same(case, listener, ours, peer.ask("tokens"), difference)
            thunks["torch"] = lambda: peer.ask("tokens")
        with compile_events() as later:
            timings = time_alternately(thunks, repeats=settings.repeats)
    if later.compilations:
        raise ValueError(f"{case.name}: {later.compilations} compilations while it was timed")
    flops = model_flops(listener, case.batch_size, length)
    rows = []
    for side, timing in timings.items():
        entry = make_row(
            timing,
            case=case.name,
            side=side,
            dtype=case.dtype,
            batch_size=case.batch_size,
            length=length,
            model_flops=flops,
            matmul_peak=peak,
            compiled=None,
            max_difference=difference,
        )
        compiled = first.seconds if side == "fmjax" else None
        rows.append(dataclasses.replace(entry, compile_seconds=compiled))
    return rows


def check_same(
    case: Case,
    listener: Listener,
    ours: list[tuple[int, ...]],
    theirs: np.ndarray,
    difference: float,
) -> None:
    """Both sides hear the same.

    Raises:
        ValueError: they do not: their times are not comparable.
    """
    if difference > SAME_FRAMES:
        raise ValueError(f"{case.name}: frames differ by {difference:.2g}")
    prompt, ends = len(listener.speech.start(timestamps=False)), set(listener.config.eos)
    for row, (mine, other) in enumerate(zip(ours, theirs[:, prompt:].tolist(), strict=True)):
        text = other[: next((i for i, token in enumerate(other) if token in ends), len(other))]
        if list(mine) != text:
            raise ValueError(
                f"{case.name}: fmjax and PyTorch hear different texts in row {row}; their times "
                "are not comparable"
            )


def model_flops(listener: Listener, batch_size: int, length: int) -> int:
    """FLOPs of the encoder and of a text's tokens, all rows as long as the longest."""
    config = listener.model.config
    prompt = len(listener.speech.start(timestamps=False))
    shape = (batch_size, config.frames, config.num_mel_bins)
    ids = jax.ShapeDtypeStruct((batch_size, prompt + length - 1), np.int32)
    return count_flops(
        lambda v, features, ids: (
            listener.model.apply(v, input_features=features, decoder_input_ids=ids).logits
        ),
        listener.variables,
        jax.ShapeDtypeStruct(shape, np.float32),
        ids,
    ).total


if __name__ == "__main__":
    run("speech", CASES, tyro.cli(Settings, description=__doc__), run_case)
