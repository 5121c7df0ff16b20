"""What speech recognition reads in generation_config.json: times, languages, tasks, thresholds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fmjax.config import read_config
from fmjax.generation_config import FILE

TASKS = ("transcribe", "translate")
PROMPTED = ("first-segment", "all-segments")
SECONDS = 0.02  # from one time token to the next: two frames of 10 ms


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeechConfig:
    """How Whisper is prompted and when it is not believed, under transformers' names.

    Args:
        no_timestamps_token_id: says that a text has no times; the token after it is time 0, the
            one before it that nobody speaks.
        decoder_start_token_id: what every text starts with.
        is_multilingual: whether a language and a task are named.
        lang_to_id: tokens of the languages, by "<|en|>" and so on.
        task_to_id: tokens of "transcribe" and "translate".
        language: what is spoken, a code such as "en"; None hears for itself.
        task: "transcribe", or "translate" into English.
        forced_decoder_ids: (place, token) of what old files begin a text with.
        max_initial_timestamp_index: steps of 0.02 s after 0 that the first time may be.
        prev_sot_token_id: what comes before text of the window before.
        condition_on_prev_tokens: whether a window is told the text of the one before.
        compression_ratio_threshold: bytes of a text's tokens over what zlib makes of them; above,
            it is repetitive and heard anew, at a higher temperature; None for no limit.
        logprob_threshold: nats a token; a text below is heard anew.
        no_speech_threshold: the probability that nobody speaks; above, a text below
            `logprob_threshold` is dropped.
        prompt_ids: what is said beforehand, such as names; `prev_sot_token_id` may come first.
        prompt_condition_type: "first-segment": before the first window, as if it had been said, or,
            without `condition_on_prev_tokens`, before each; "all-segments": always first.
        alignment_heads: (layer, head) of the decoder's attention that follows the sound in time, by
            which words have times; None for none.
        median_filter_width: by which their weights are smoothed; of config.json.

    Raises:
        ValueError: values that do not fit; all are listed.
    """

    no_timestamps_token_id: int | None = None
    decoder_start_token_id: int | None = None
    is_multilingual: bool = False
    lang_to_id: Mapping[str, int] = dataclasses.field(default_factory=dict)
    task_to_id: Mapping[str, int] = dataclasses.field(default_factory=dict)
    language: str | None = None
    task: str | None = None
    forced_decoder_ids: tuple[tuple[int, int | None], ...] = ()
    max_initial_timestamp_index: int | None = None
    prev_sot_token_id: int | None = None
    condition_on_prev_tokens: bool = False
    compression_ratio_threshold: float | None = None
    logprob_threshold: float | None = None
    no_speech_threshold: float | None = None
    prompt_ids: tuple[int, ...] = ()
    prompt_condition_type: str = "first-segment"
    alignment_heads: tuple[tuple[int, int], ...] | None = None
    median_filter_width: int = 7

    def __post_init__(self) -> None:
        problems = []
        for name in ("lang_to_id", "task_to_id"):
            table = getattr(self, name)
            if not isinstance(table, Mapping) or not all(map(_is_token, table.values())):
                problems.append(f"{name}={table!r} must map names to token ids")
        for name in (
            "no_timestamps_token_id", "decoder_start_token_id", "max_initial_timestamp_index",
            "prev_sot_token_id",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not _is_token(value):
                problems.append(f"{name}={value!r} must be an int of at least 0")
        for name in ("compression_ratio_threshold", "logprob_threshold", "no_speech_threshold"):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float)
            ):
                problems.append(f"{name}={value!r} must be a number")
        if self.task is not None and self.task not in TASKS:
            problems.append(f"task={self.task!r} must be one of {TASKS}")
        if not all(map(_is_token, self.prompt_ids)):
            problems.append(f"prompt_ids={self.prompt_ids!r} must be token ids")
        if self.prompt_condition_type not in PROMPTED:
            problems.append(
                f"prompt_condition_type={self.prompt_condition_type!r} must be one of {PROMPTED}"
            )
        if not (type(self.median_filter_width) is int and self.median_filter_width % 2 == 1):
            problems.append(f"median_filter_width={self.median_filter_width!r} must be odd")
        if not problems:
            problems += self._contradictions()
        if problems:
            raise ValueError("speech options:\n  " + "\n  ".join(problems))

    def _contradictions(self) -> list[str]:
        problems = []
        if not self.is_multilingual and (self.language or self.task):
            problems.append(
                f"language={self.language!r} and task={self.task!r} are for multilingual models; "
                "this one hears English alone"
            )
        if self.is_multilingual and self.language and self._language_token() is None:
            codes = [name.strip("<|>") for name in self.lang_to_id]
            problems.append(f"language={self.language!r} is none of {codes}")
        if self.is_multilingual and self.task and self.task not in self.task_to_id:
            problems.append(f"task={self.task!r} is none of task_to_id={dict(self.task_to_id)}")
        if self.no_speech_threshold is not None and self.logprob_threshold is None:
            problems.append("no_speech_threshold needs logprob_threshold beside it")
        if self.prompt_condition_type == PROMPTED[1] and not self.condition_on_prev_tokens:
            problems.append(
                f"prompt_condition_type={PROMPTED[1]!r} needs condition_on_prev_tokens=True"
            )
        return problems

    @property
    def prompt(self) -> tuple[int, ...]:
        """`prompt_ids` behind the token that comes before what was said; () for none."""
        mark = self.prev_sot_token_id
        if not self.prompt_ids or mark is None or self.prompt_ids[0] == mark:
            return self.prompt_ids
        return (mark, *self.prompt_ids)

    def _language_token(self) -> int | None:
        return self.lang_to_id.get(f"<|{(self.language or '').lower().strip('<|>')}|>")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SpeechConfig:
        """Of the keys of a generation_config.json, whose others `GenerationConfig` reads.

        Raises:
            ValueError: values that do not fit.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        values = {key: data[key] for key in known if data.get(key) is not None}
        if "forced_decoder_ids" in values:
            pairs = values["forced_decoder_ids"]
            if not isinstance(pairs, Sequence) or not all(map(_is_forced, pairs)):
                raise ValueError(
                    f"forced_decoder_ids={pairs!r} must be pairs of a place and a token"
                )
            values["forced_decoder_ids"] = tuple((place, token) for place, token in pairs)
        if "alignment_heads" in values:
            heads = values["alignment_heads"]
            if not isinstance(heads, Sequence) or not all(map(_is_head, heads)):
                raise ValueError(f"alignment_heads={heads!r} must be pairs of a layer and a head")
            values["alignment_heads"] = tuple((layer, head) for layer, head in heads)
        if "prompt_ids" in values:
            values["prompt_ids"] = tuple(values["prompt_ids"])
        return cls(**values)

    @classmethod
    def read(cls, folder: str | Path) -> SpeechConfig:
        """Of a checkpoint's folder.

        Raises:
            OSError: it has no generation_config.json.
            ValueError: it is no JSON object, or its values do not fit.
        """
        file = Path(folder) / FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} has no {FILE}, which names the tokens of times and languages; copy it "
                "from the checkpoint's source"
            )
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{file} is not UTF-8 JSON: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"{file} holds a {type(data).__name__}; it must be an object")
        width = read_config(Path(folder)).get("median_filter_width")
        return cls.from_dict(data | ({} if width is None else {"median_filter_width": width}))

    @property
    def time_0(self) -> int:
        """The token of time 0.

        Raises:
            ValueError: the model knows no times.
        """
        if self.no_timestamps_token_id is None:
            raise ValueError(
                "the model's generation_config.json has no no_timestamps_token_id: it knows no "
                "times, and hears no more than one window"
            )
        return self.no_timestamps_token_id + 1

    @property
    def forced(self) -> dict[int, int]:
        """Tokens by their place that an old file begins texts with; none where the language or the
        task is said."""
        pairs = () if self.language or self.task else self.forced_decoder_ids
        return {place: token for place, token in pairs if token is not None}

    @property
    def hears_language(self) -> bool:
        """Whether the language is to be detected."""
        return bool(self.lang_to_id) and self.language is None and 1 not in self.forced

    def start(self, *, timestamps: bool, heard: int | None = None) -> tuple[int, ...]:
        """What a text begins with (Radford et al. 2022, figure 1).

        Args:
            timestamps: whether times follow.
            heard: the token of the language, where none is given.

        Raises:
            ValueError: the file does not say how texts begin.
        """
        if self.decoder_start_token_id is None:
            raise ValueError("generation_config.json has no decoder_start_token_id")
        tokens = [token for _, token in sorted(self.forced.items())]
        language = self._language_token() if self.language else heard
        if language is not None:
            tokens.insert(0, language)
        task = self.task or ("transcribe" if self.language else None)
        tasks = self.task_to_id
        if task is not None and task in tasks and not set(tokens) & set(tasks.values()):
            tokens.append(tasks[task])
        tokens = [token for token in tokens if token != self.no_timestamps_token_id]
        if not timestamps and self.no_timestamps_token_id is not None:
            tokens.append(self.no_timestamps_token_id)
        return (self.decoder_start_token_id, *tokens)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_head(pair: Any) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and all(map(_is_token, pair))


def _is_forced(pair: Any) -> bool:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        return False
    return _is_token(pair[0]) and (pair[1] is None or _is_token(pair[1]))
