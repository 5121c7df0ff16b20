"""generation_config.json: how a checkpoint's authors want text generated, as one dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fmjax.config import read_config, write_json

FILE = "generation_config.json"

# Keys that say how to compute or what to return, not which text comes out.
BOOKKEEPING = frozenset(
    """
    _commit_hash _from_model_config transformers_version use_cache cache_implementation
    cache_config max_cache_len return_legacy_cache compile_config disable_compile
    continuous_batching_config output_attentions output_hidden_states output_scores output_logits
    return_dict_in_generate num_assistant_tokens_schedule assistant_confidence_threshold
    assistant_lookbehind target_lookbehind max_matching_ngram_size generation_kwargs
    trust_remote_code low_memory is_assistant
    """.split()
)
# What speech recognition reads beside these options (Whisper's files).
SPEECH = frozenset(
    """
    alignment_heads is_multilingual lang_to_id language task task_to_id no_timestamps_token_id
    return_timestamps max_initial_timestamp_index prev_sot_token_id median_filter_width
    compression_ratio_threshold logprob_threshold no_speech_threshold condition_on_prev_tokens
    forced_decoder_ids
    """.split()
)
# Options of transformers that are not here, and the values at which they change nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beam_groups": (None, 1),
    "diversity_penalty": (None, 0.0),
    "guidance_scale": (None, 1.0),
    "penalty_alpha": (None, 0.0),
    "watermarking_config": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "dola_layers": (None,),
    "token_healing": (None, False),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "assistant_ensemble_weight": (None,),
    "speculation_type": (None,),
    "use_mtp": (None, False),
    "max_time": (None,),
    "top_h": (None,),
}
SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
)  # fmt: skip
BEAMS = ("early_stopping", "length_penalty")

Tokens = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How text is generated, under transformers' names and with its defaults.

    Args:
        max_new_tokens: how many tokens may follow the prompt.
        max_length: the same, counted with the prompt; None of the two is 20 new tokens.
        min_new_tokens: no end-of-sequence token comes before so many.
        min_length: the same, counted with the prompt.
        do_sample: draw tokens; else take the most probable.
        num_beams: hypotheses of a beam search; 1 is none.
        num_return_sequences: texts per prompt: draws, or the best beams.
        temperature: divides the logits.
        top_k: only so many tokens can be drawn; 0 is all (transformers' default is 50).
        top_p: only the most probable tokens that together have this probability.
        min_p: only tokens at least so probable, relative to the most probable one.
        typical_p: only the tokens of most typical surprise that together have this probability
            (Meister et al. 2022, arXiv:2202.00666).
        epsilon_cutoff, eta_cutoff: only tokens above an absolute, or an entropy-dependent,
            probability (Hewitt et al. 2022, arXiv:2210.15191); 0 is off.
        repetition_penalty: divides positive and multiplies negative logits of tokens that have
            occurred (Keskar et al. 2019, arXiv:1909.05858).
        encoder_repetition_penalty: the inverse for the encoder's tokens: above 1 favours them.
        no_repeat_ngram_size: no n-gram of this size occurs twice; 0 is off.
        encoder_no_repeat_ngram_size: no n-gram of the encoder's text occurs.
        bad_words_ids: token sequences that do not occur.
        sequence_bias: (token sequence, bias of the logit of its last token) pairs, or a dict.
        suppress_tokens: tokens that do not occur.
        begin_suppress_tokens: tokens that do not come first.
        forced_bos_token_id: the token after a prompt of one token.
        forced_eos_token_id: the token (or tokens) the text ends with when it is cut at its limit.
        exponential_decay_length_penalty: (start, factor): after `start` new tokens, the end's
            logit rises exponentially.
        remove_invalid_values: nan becomes 0, infinities the largest finite numbers.
        renormalize_logits: processed logits become log-probabilities.
        length_penalty: scores of beams are divided by their length to this power.
        early_stopping: True stops at `num_beams` finished beams; False when none is likely to be
            better; "never" when none can be.
        stop_strings: texts after which generation ends.
        eos_token_id: token (or tokens) that end a text.
        pad_token_id: what follows the end of a text; None is the first end token, or 0.
        bos_token_id, decoder_start_token_id: what a decoder starts with where there is no prompt.
        num_assistant_tokens: tokens that a draft model proposes at a time.

    Raises:
        ValueError: values that are out of range; all are listed.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int = 0
    do_sample: bool = False
    num_beams: int = 1
    num_return_sequences: int = 1
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[Tokens, ...] | None = None
    sequence_bias: tuple[tuple[Tokens, float], ...] | None = None
    suppress_tokens: Tokens | None = None
    begin_suppress_tokens: Tokens | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Tokens | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    remove_invalid_values: bool = False
    renormalize_logits: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    stop_strings: tuple[str, ...] | None = None
    eos_token_id: int | Tokens | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    decoder_start_token_id: int | None = None
    num_assistant_tokens: int = 5

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = vars(self)[field.name]
            if field.name == "sequence_bias" and isinstance(value, Mapping):
                value = tuple(value.items())
            if field.name == "stop_strings" and isinstance(value, str):
                value = (value,)
            # None is "not said" everywhere in these files.
            value = field.default if value is None else _tuples(value)
            object.__setattr__(self, field.name, value)
        if problems := _problems(self):
            raise ValueError("generation options:\n  " + "\n  ".join(problems))

    @property
    def eos(self) -> Tokens:
        """All end tokens."""
        return _as_tokens(self.eos_token_id)

    @property
    def pad(self) -> int:
        """What follows the end of a text."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.eos[0] if self.eos else 0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = FILE) -> GenerationConfig:
        """From the keys of a generation_config.json.

        Raises:
            ValueError: unknown keys, options that are not supported, values out of range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        problems = []
        for key, value in data.items():
            if key in NEUTRAL:
                if value not in NEUTRAL[key]:
                    problems.append(f"{key}={value!r} is not supported; only {NEUTRAL[key]} are")
            elif key not in known and key not in BOOKKEEPING and key not in SPEECH:
                problems.append(f"{key}={value!r} is not a known key" + _like(key, known))
        if problems:
            raise ValueError(
                f"{source}:\n  " + "\n  ".join(problems) + "\nDelete the keys from the file, or "
                "pass a GenerationConfig of your own."
            )
        return cls(**{key: data[key] for key in known if key in data})

    @classmethod
    def read(cls, folder: str | Path) -> GenerationConfig:
        """From a checkpoint's folder: its generation_config.json, or the generation keys that
        older files have in config.json (of the decoder, where that is a config of its own).

        Raises:
            OSError: the folder has neither.
            ValueError: as `from_dict`.
        """
        folder = Path(folder)
        file = folder / FILE
        if file.is_file():
            try:
                data = json.loads(file.read_text(encoding="utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{file} is not UTF-8 JSON: {error}") from error
            if not isinstance(data, dict):
                raise ValueError(f"{file} holds a {type(data).__name__}; it must be an object")
            return cls.from_dict(data, str(file))
        data = read_config(folder)
        nested = next(
            (data[key] for key in ("decoder", "generator", "text_config") if data.get(key)), {}
        )
        if not isinstance(nested, dict):
            nested = {}
        known = {field.name for field in dataclasses.fields(cls)} | NEUTRAL.keys()
        merged = {
            key: value
            for source in (nested, data)
            for key, value in source.items()
            if key in known and value is not None
        }
        return cls.from_dict(merged, str(folder / "config.json"))

    def to_dict(self) -> dict[str, Any]:
        """The keys of a generation_config.json: what is not at its default."""
        return {
            field.name: vars(self)[field.name]
            for field in dataclasses.fields(self)
            if vars(self)[field.name] != field.default
        }

    def write(self, folder: str | Path) -> Path:
        """Writes the folder's generation_config.json."""
        path = Path(folder) / FILE
        write_json(path, self.to_dict())
        return path

    def replace(self, **options: Any) -> GenerationConfig:
        """The config with other options.

        Of two options for the same length the one given here counts; options without effect are
        refused only where they are given here: files of old checkpoints are full of them.

        Raises:
            ValueError: unknown options, values out of range, contradictions; all are listed.
        """
        known = [field.name for field in dataclasses.fields(self)]
        problems = [
            f"{name}={value!r} is not an option" + _like(name, known)
            for name, value in options.items()
            if name not in known
        ]
        given = {name for name, value in options.items() if value is not None}
        for new, old in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
            if {new, old} <= given:
                problems.append(f"give {new} or {old}, not both")
            elif old in given:
                options[new] = None
            elif new in given:
                options[old] = None
        # Nor does a minimum that was not given here stand against a maximum that was.
        for low, high in (("min_new_tokens", "max_new_tokens"), ("min_length", "max_length")):
            shortest, longest = vars(self)[low] or 0, options.get(high)
            if low not in options and isinstance(longest, int) and 1 <= longest < shortest:
                options[low] = longest
        if problems:
            raise ValueError("generation options:\n  " + "\n  ".join(problems))
        changes = {name: value for name, value in options.items() if name in known}
        config = dataclasses.replace(self, **changes)
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        active = {name for name in given if vars(config)[name] != defaults[name]}
        if not config.do_sample and (idle := [name for name in SAMPLING if name in active]):
            problems.append(f"{', '.join(idle)}: needs do_sample=True")
        if config.num_beams == 1 and (idle := [name for name in BEAMS if name in active]):
            problems.append(f"{', '.join(idle)}: needs num_beams above 1")
        if problems:
            raise ValueError("generation options:\n  " + "\n  ".join(problems))
        return config


def _tuples(value: Any) -> Any:
    """Lists and arrays as tuples, also inside; NumPy's and JAX' numbers as Python's."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        value = value.tolist()
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _as_tokens(value: int | Tokens | None) -> Tokens:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def _like(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or isinstance(value, float)


def _are_tokens(value: Any) -> bool:
    return isinstance(value, tuple) and all(_is_int(token) and token >= 0 for token in value)


def _problems(config: GenerationConfig) -> list[str]:
    """What is wrong with the values, a line each."""
    problems = []

    def check(names: str, rule: str, right: Any) -> None:
        for name in names.split():
            value = vars(config)[name]
            if value is not None and not right(value):
                problems.append(f"{name}={value!r} must be {rule}")

    def number(low: float, high: float, *, open_low: bool = False) -> Any:
        def right(x: Any) -> bool:
            return _is_number(x) and (low < x if open_low else low <= x) and x <= high

        return right

    check(
        "max_new_tokens max_length num_beams num_return_sequences num_assistant_tokens",
        "an int of at least 1",
        lambda x: _is_int(x) and x >= 1,
    )
    check(
        "min_new_tokens min_length top_k no_repeat_ngram_size encoder_no_repeat_ngram_size",
        "an int of at least 0",
        lambda x: _is_int(x) and x >= 0,
    )
    check(
        "do_sample remove_invalid_values renormalize_logits",
        "true or false",
        lambda x: isinstance(x, bool),
    )
    check(
        "temperature repetition_penalty encoder_repetition_penalty",
        "a positive number (for temperature 0, do_sample=False)",
        lambda x: _is_number(x) and 0 < x < math.inf,
    )
    check("top_p typical_p", "above 0 and at most 1", number(0, 1, open_low=True))
    check("min_p", "from 0 to 1", number(0, 1))
    check(
        "epsilon_cutoff eta_cutoff",
        "at least 0 and below 1",
        lambda x: _is_number(x) and 0 <= x < 1,
    )
    check("length_penalty", "a number", lambda x: _is_number(x) and math.isfinite(x))
    check("early_stopping", "true, false or 'never'", lambda x: isinstance(x, bool) or x == "never")
    check(
        "pad_token_id bos_token_id decoder_start_token_id forced_bos_token_id",
        "a token id",
        lambda x: _is_int(x) and x >= 0,
    )
    check(
        "eos_token_id forced_eos_token_id",
        "a token id or several",
        lambda x: (_is_int(x) and x >= 0) or (x != () and _are_tokens(x)),
    )
    check("suppress_tokens begin_suppress_tokens", "token ids", _are_tokens)
    check(
        "bad_words_ids",
        "sequences of token ids, none empty",
        lambda x: isinstance(x, tuple) and all(word != () and _are_tokens(word) for word in x),
    )
    check(
        "sequence_bias",
        "pairs of token ids (not empty) and a number (not nan)",
        lambda x: (
            isinstance(x, tuple)
            and all(
                isinstance(pair, tuple)
                and len(pair) == 2
                and pair[0] != ()
                and _are_tokens(pair[0])
                and _is_number(pair[1])
                and not math.isnan(pair[1])
                for pair in x
            )
        ),
    )
    check(
        "exponential_decay_length_penalty",
        "(an int of at least 0, a positive number)",
        lambda x: (
            isinstance(x, tuple)
            and len(x) == 2
            and _is_int(x[0])
            and x[0] >= 0
            and _is_number(x[1])
            and x[1] > 0
        ),
    )
    check(
        "stop_strings",
        "strings, none empty",
        lambda x: isinstance(x, tuple) and all(isinstance(text, str) and text for text in x),
    )
    if not problems:
        problems = _contradictions(config)
    return problems


def _contradictions(config: GenerationConfig) -> list[str]:
    """Right values that cannot all hold."""
    problems = []
    if config.num_return_sequences > 1:
        if config.num_beams == 1 and not config.do_sample:
            problems.append(
                f"num_return_sequences={config.num_return_sequences} would return one text several "
                "times; set do_sample=True or num_beams"
            )
        elif 1 < config.num_beams < config.num_return_sequences:
            problems.append(
                f"num_return_sequences={config.num_return_sequences} is more than "
                f"num_beams={config.num_beams}"
            )
    shortest, longest = config.min_new_tokens, config.max_new_tokens
    if shortest is not None and longest is not None and shortest > longest:
        problems.append(f"min_new_tokens={shortest} is more than max_new_tokens={longest}")
    if config.max_length is not None and longest is None and config.min_length > config.max_length:
        problems.append(
            f"min_length={config.min_length} is more than max_length={config.max_length}"
        )
    suppressed = set(config.suppress_tokens or ())
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = set(_as_tokens(vars(config)[name]))
        if forced and forced <= suppressed:
            problems.append(f"{name}={sorted(forced)} is among suppress_tokens")
    return problems
