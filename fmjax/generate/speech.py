"""Hearing: windows of log-mel frames to texts, one window or a recording of any length.

A long recording is heard window by window, each from where the last time of the one before says;
a text that repeats itself or is improbable is heard anew at higher temperatures (Radford et al.
2022, arXiv:2212.04356, section 4.5).
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax import Array

from fmjax.generate.api import Generated, generate
from fmjax.generate.forward import unembed
from fmjax.generate.processors import TimestampRules
from fmjax.generate.speech_config import PROMPTED, SECONDS, SpeechConfig
from fmjax.generate.word_times import attention_to_sound, token_times
from fmjax.generation_config import GenerationConfig
from fmjax.types import Variables

FRAMES_A_STEP = 2  # of ten milliseconds, from one time token to the next
COLD = 0.5  # a text heard at this temperature or above is not told to the next window


class Listener(NamedTuple):
    """A model that hears, and how its authors want it to.

    Args:
        model: an encoder-decoder of ``input_features`` with the head "seq2seq_lm".
        variables: its variables.
        config: options of generating.
        speech: options of hearing.
    """

    model: Any
    variables: Variables
    config: GenerationConfig
    speech: SpeechConfig


class Heard(NamedTuple):
    """What was heard in one window.

    Args:
        tokens: without the prompt and the end.
        temperature: at which it was heard.
        log_prob: nats a token, the end included; of a beam search, its score.
        compression: bytes of the tokens over what zlib makes of them.
        no_speech: the probability that nobody speaks; nan where no threshold asks for it.
        silent: whether the thresholds say that nobody speaks.
        ended: whether it came to its end, and not to the most tokens there may be.
        times: seconds from the window's start at which each token ends, where they are asked for.
    """

    tokens: tuple[int, ...]
    temperature: float
    log_prob: float
    compression: float
    no_speech: float
    silent: bool
    ended: bool = True
    times: tuple[float, ...] = ()


class Segment(NamedTuple):
    """A piece of a recording.

    Args:
        start, end: in seconds from the recording's start.
        tokens: its time tokens included.
        times: seconds from the recording's start at which each token ends, where they are asked
            for.
        language: its token, where it was heard and not given.
    """

    start: float
    end: float
    tokens: tuple[int, ...]
    times: tuple[float, ...] = ()
    language: int | None = None


class Recording(Protocol):
    """Frames of a recording, made when they are asked for."""

    @property
    def frames(self) -> int:
        """How many there are."""
        ...

    def window(self, start: int) -> np.ndarray:
        """float32 [T, M]: those from `start` on, with zeros behind the last."""
        ...


@partial(jax.jit, static_argnames="model")
def encode(model: Any, variables: Variables, features: Array | np.ndarray) -> Array:
    """The encoder's states [B, S, D] of frames [B, T, M]."""
    return model.apply(variables, input_features=features, method="encode").last_hidden_state


@partial(jax.jit, static_argnames="model")
def next_logits(model: Any, variables: Variables, states: Array, ids: Array | np.ndarray) -> Array:
    """float32 [B, V]: logits of what follows the tokens [B, P]."""
    out = model.apply(variables, encoder_outputs=states, decoder_input_ids=ids, output_logits=False)
    return unembed(model, variables, out.last_hidden_state[:, -1])


def detect_languages(listener: Listener, states: Array) -> list[int]:
    """The language tokens that the model finds likeliest (Radford et al. 2022, section 2.3).

    Args:
        listener: of a multilingual model.
        states: [B, S, D] of recordings' first windows.
    """
    speech = listener.speech
    tokens = np.array(sorted(speech.lang_to_id.values()))
    ids = np.full((states.shape[0], 1), speech.decoder_start_token_id, np.int32)
    logits = np.asarray(next_logits(listener.model, listener.variables, states, ids))
    return tokens[logits[:, tokens].argmax(axis=1)].tolist()


def hear(
    listener: Listener,
    features: Array | np.ndarray,
    *,
    timestamps: bool = False,
    words: bool = False,
    temperatures: Sequence[float] = (0.0,),
    rng: Array | None = None,
) -> list[Heard]:
    """Texts of windows, each at the first temperature at which it is believed.

    Args:
        listener: who hears.
        features: [B, T, M], windows of the model's length.
        timestamps: whether texts have times.
        words: whether each token has a time, by the model's ``alignment_heads``.
        temperatures: in their order; 0 is the likeliest token each time.
        rng: a typed key, for temperatures above 0.

    Raises:
        ValueError: options that do not go together, or frames that are no windows.
    """
    check(listener, timestamps, temperatures, rng, words=words)
    states, speech = encode(listener.model, listener.variables, features), listener.speech
    prompts = [
        (*speech.prompt, *speech.start(timestamps=timestamps, heard=token))
        for token in _languages(listener, states)
    ]
    heard = hear_states(
        listener, states, prompts, timestamps=timestamps, temperatures=temperatures, rng=rng
    )
    if not words:
        return heard
    frames = [features.shape[1]] * len(heard)
    return _with_times(listener, states, prompts, heard, frames)


def _with_times(
    listener: Listener,
    states: Array,
    prompts: Sequence[tuple[int, ...]],
    heard: Sequence[Heard],
    frames: Sequence[int],
) -> list[Heard]:
    """The same with ``times``; `frames` of each window are the recording's."""
    speech = listener.speech
    assert speech.alignment_heads is not None  # `check` has seen to that
    result = []
    for row, (prompt, text, count) in enumerate(zip(prompts, heard, frames, strict=True)):
        # While the last token was chosen, the one before it was looked for last.
        seen = text.tokens if text.ended else text.tokens[:-1]
        weights = attention_to_sound(
            listener.model, listener.variables, states[row : row + 1], prompt, seen,
            speech.alignment_heads,
        )[..., : max(1, count // FRAMES_A_STEP)]  # fmt: skip
        times = token_times(weights, speech.median_filter_width).tolist()
        times += (times[-1:] or [0.0]) * (len(text.tokens) - len(seen))
        result.append(text._replace(times=tuple(times)))
    return result


def check(
    listener: Listener,
    timestamps: bool,
    temperatures: Sequence[float],
    rng: Array | None,
    *,
    words: bool = False,
) -> None:
    """Refuses options that do not go together.

    Raises:
        ValueError: what is wrong, all of it.
    """
    problems = []
    if not temperatures or not all(0 <= t < math.inf for t in temperatures):
        problems.append(f"temperatures={temperatures!r} must be numbers of at least 0, one or more")
    elif max(temperatures) > 0 and rng is None:
        problems.append(f"temperatures={temperatures!r} need rng, a jax.random.key")
    speech = listener.speech
    if speech.no_timestamps_token_id is None and timestamps:
        problems.append(
            "the model's generation_config.json has no no_timestamps_token_id: no times"
        )
    if speech.no_timestamps_token_id is None and speech.no_speech_threshold is not None:
        problems.append("no_speech_threshold needs no_timestamps_token_id")
    problems += _head_problems(listener) if words else []
    if problems:
        raise ValueError("hearing:\n  " + "\n  ".join(problems))


def _head_problems(listener: Listener) -> list[str]:
    heads, config = listener.speech.alignment_heads, listener.model.config
    if not heads:
        return [
            "times of words need alignment_heads in generation_config.json: the (layer, head) of "
            "the decoder's attention that follow the sound"
        ]
    sizes = config.decoder_layers, config.decoder_attention_heads
    wrong = [head for head in heads if head[0] >= sizes[0] or head[1] >= sizes[1]]
    return [f"alignment_heads {wrong} are not of {sizes} layers and heads"] if wrong else []


def _languages(listener: Listener, states: Array) -> list[int | None]:
    if listener.speech.hears_language:
        return [*detect_languages(listener, states)]
    return [None] * states.shape[0]


def hear_states(
    listener: Listener,
    states: Array,
    prompts: Sequence[tuple[int, ...]],
    *,
    timestamps: bool,
    temperatures: Sequence[float],
    rng: Array | None,
) -> list[Heard]:
    """As `hear`, of encoded windows [B, S, D] and what each text begins with."""
    silence = _no_speech(listener, states, prompts)
    found: list[Heard | None] = [None] * len(prompts)
    waiting = list(range(len(prompts)))
    for number, temperature in enumerate(temperatures):
        key = None if rng is None else jax.random.fold_in(rng, number)
        again = []
        # Prompts of one length at a time: a decoder's prompts have no padding.
        for width in sorted({len(prompts[row]) for row in waiting}):
            rows = [row for row in waiting if len(prompts[row]) == width]
            chosen, ids = _filled(states, prompts, rows)
            out = _generate(listener, chosen, ids, timestamps, temperature, key)
            for place, row in enumerate(rows):
                heard = _judge(listener, out, place, temperature, silence[row])
                found[row] = heard
                if not heard.silent and not _believed(listener.speech, heard):
                    again.append(row)
        waiting = sorted(again)
        if not waiting:
            break
    return [heard for heard in found if heard is not None]


def _filled(
    states: Array, prompts: Sequence[tuple[int, ...]], rows: Sequence[int]
) -> tuple[Array, np.ndarray]:
    """States and prompts of rows, the last repeated to a power of two: few sizes are compiled."""
    rows = [*rows, *[rows[-1]] * (_ceiling(len(rows)) - len(rows))]
    chosen = states if rows == [*range(states.shape[0])] else states[np.array(rows)]
    return chosen, np.array([prompts[row] for row in rows], np.int32)


def _ceiling(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


def _generate(
    listener: Listener,
    states: Array,
    ids: np.ndarray,
    timestamps: bool,
    temperature: float,
    rng: Array | None,
) -> Generated:
    model, variables, config, speech = listener
    # The prompts are whole: the start is not put before text of the window before.
    options: dict[str, Any] = {
        "do_sample": temperature > 0,
        "decoder_start_token_id": int(ids[0, 0]),
    }
    if temperature > 0:
        options |= {"temperature": temperature, "num_beams": 1}
    most = model.side_positions[1]
    if config.max_new_tokens is None:  # max_length counts no more of the prompt than half the room
        counted = min(ids.shape[1], most // 2 - 1)
        options["max_length"] = min((config.max_length or most) + counted, most)
    rules = []
    if timestamps:
        first = speech.max_initial_timestamp_index
        end = min(config.eos, default=speech.time_0 - 1)
        numbers = (speech.time_0, speech.time_0 - 1, end)
        limit = model.config.vocab_size if first is None else first
        rules.append(TimestampRules(*map(np.int32, (*numbers, limit))))
    return generate(
        model,
        variables,
        encoder_outputs=states,
        decoder_input_ids=ids,
        generation_config=config,
        processors=rules,
        rng=rng if temperature > 0 else None,
        output_log_probs=temperature > 0 or config.num_beams == 1,
        **options,
    )


def _no_speech(
    listener: Listener, states: Array, prompts: Sequence[tuple[int, ...]]
) -> list[float]:
    """Probabilities that nobody speaks: of its token where the text would begin."""
    speech = listener.speech
    if speech.no_speech_threshold is None:
        return [math.nan] * len(prompts)
    start = speech.decoder_start_token_id
    before = [prompt[: prompt.index(start) + 1] for prompt in prompts]
    result = [math.nan] * len(prompts)
    for width in sorted({len(prompt) for prompt in before}):
        rows = [row for row, prompt in enumerate(before) if len(prompt) == width]
        chosen, ids = _filled(states, before, rows)
        logits = next_logits(listener.model, listener.variables, chosen, ids)
        silent = jax.nn.softmax(logits, axis=-1)[:, speech.time_0 - 2]
        for row, value in zip(rows, np.asarray(silent), strict=False):
            result[row] = float(value)
    return result


def _judge(
    listener: Listener, out: Generated, row: int, temperature: float, no_speech: float
) -> Heard:
    config, speech = listener.config, listener.speech
    length = int(out.lengths[row])
    tokens = tuple(out.tokens[row, :length].tolist())
    if out.log_probs is not None:
        log_prob = float(out.log_probs[row].sum()) / length
    else:
        assert out.scores is not None  # of a beam search
        log_prob = float(out.scores[row])
    silent = (
        speech.no_speech_threshold is not None
        and speech.logprob_threshold is not None
        and no_speech > speech.no_speech_threshold
        and log_prob < speech.logprob_threshold
    )
    compression = compression_ratio(tokens, listener.model.config.vocab_size)
    ended = tokens[-1] in config.eos
    said = tokens[:-1] if ended else tokens
    return Heard(said, temperature, log_prob, compression, no_speech, silent, ended)


def _believed(speech: SpeechConfig, heard: Heard) -> bool:
    most, least = speech.compression_ratio_threshold, speech.logprob_threshold
    return not (
        (most is not None and heard.compression > most)
        or (least is not None and heard.log_prob < least)
    )


def compression_ratio(tokens: Sequence[int], vocab_size: int) -> float:
    """Bytes of tokens, each as many as the vocabulary needs, over what zlib makes of them."""
    size = int(math.log2(vocab_size) / 8) + 1
    data = b"".join(token.to_bytes(size, "little") for token in tokens)
    return len(data) / len(zlib.compress(data))


def hear_recordings(
    listener: Listener,
    recordings: Sequence[Recording],
    *,
    batch_size: int = 8,
    words: bool = False,
    temperatures: Sequence[float] = (0.0,),
    rng: Array | None = None,
) -> Iterator[tuple[int, Segment]]:
    """Segments of recordings of any length, as soon as each is heard.

    A window of each of `batch_size` recordings is in memory, and no more.

    Args:
        listener: who hears; its model must know times.
        recordings: N of them.
        batch_size: recordings at a time.
        words, temperatures, rng: see `hear`.

    Yields:
        (the recording's number, a segment): a recording's in their order.

    Raises:
        ValueError: at the call: options that do not go together.
    """
    check(listener, True, temperatures, rng, words=words)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    return _hear_recordings(listener, recordings, batch_size, words, temperatures, rng)


@dataclasses.dataclass
class _Place:
    """Where hearing is in a recording.

    Attributes:
        number: the recording's.
        recording: itself.
        seek: the next window's first frame.
        language: its token, once heard.
        said: tokens so far.
        cold: whether the last window was heard at a low temperature.
    """

    number: int
    recording: Recording
    seek: int = 0
    language: int | None = None
    said: list[int] = dataclasses.field(default_factory=list)
    cold: bool = True

    @property
    def left(self) -> int:
        return self.recording.frames - self.seek


def _hear_recordings(
    listener: Listener,
    recordings: Sequence[Recording],
    batch_size: int,
    words: bool,
    temperatures: Sequence[float],
    rng: Array | None,
) -> Iterator[tuple[int, Segment]]:
    waiting = [_Place(number, item) for number, item in enumerate(recordings) if item.frames]
    if listener.speech.prompt_condition_type == PROMPTED[0]:
        for place in waiting:
            mark = listener.speech.prev_sot_token_id
            place.said = [token for token in listener.speech.prompt if token != mark]
    batch_size = min(batch_size, len(waiting))
    active, step = [], 0
    whole = listener.model.config.frames
    while True:
        active = [place for place in active if place.left > 0]
        while waiting and len(active) < batch_size:
            active.append(waiting.pop(0))
        if not active:
            return
        windows = [place.recording.window(place.seek) for place in active]
        filled = windows + windows[-1:] * (_ceiling(len(windows)) - len(windows))
        states = encode(listener.model, listener.variables, np.stack(filled))
        if new := [row for row, place in enumerate(active) if place.seek == 0]:
            languages = _languages(listener, states)
            for row in new:
                active[row].language = languages[row]
        prompts = [_prompt(listener, place) for place in active]
        heard = hear_states(
            listener, states, prompts, timestamps=True, temperatures=temperatures,
            rng=None if rng is None else jax.random.fold_in(rng, step),
        )  # fmt: skip
        if words:
            counts = [min(place.left, whole) for place in active]
            heard = _with_times(listener, states, prompts, heard, counts)
        step += 1
        for place, text in zip(active, heard, strict=True):
            frames = min(place.left, whole)
            place.cold = text.temperature < COLD
            if text.silent or not text.tokens:
                place.seek += frames
                continue
            offset = place.seek * SECONDS / FRAMES_A_STEP
            segments, done = segments_of(text.tokens, listener.speech.time_0, offset, frames)
            place.seek += done or frames
            first = 0
            for segment in segments:
                own = text.times[first : first + len(segment.tokens)]
                segment = segment._replace(
                    times=tuple(offset + time for time in own), language=place.language
                )
                first += len(segment.tokens)
                if listener.speech.condition_on_prev_tokens:
                    place.said.extend(segment.tokens)
                yield place.number, segment


def _prompt(listener: Listener, place: _Place) -> tuple[int, ...]:
    """What the next window's text begins with: the text before, as far as there is room for it."""
    speech = listener.speech
    start = speech.start(timestamps=True, heard=place.language)
    if not (speech.condition_on_prev_tokens and place.said and place.cold):
        return (*speech.prompt, *start)
    room = listener.model.side_positions[1] // 2 - 1
    place.said = place.said[-room:]
    before = speech.prompt if speech.prompt_condition_type == PROMPTED[1] else ()
    if not before and speech.prev_sot_token_id is not None:
        before = (speech.prev_sot_token_id,)
    return (*before, *place.said, *start)


def segments_of(
    tokens: Sequence[int], time_0: int, offset: float, frames: int
) -> tuple[list[Segment], int]:
    """A window's text cut where two times meet.

    What follows the last pair is dropped, and to be heard again from that time on, unless a single
    time ends the text, which says that nothing follows.

    Args:
        tokens: of the window, without its end.
        time_0: the token of time 0.
        offset: seconds at which the window starts.
        frames: of the recording in the window.

    Returns:
        (segments, the frames they have dealt with).
    """
    is_time = [token >= time_0 for token in tokens]
    cuts = [i + 1 for i in range(len(tokens) - 1) if is_time[i] and is_time[i + 1]]

    def seconds(token: int) -> float:
        return offset + (token - time_0) * SECONDS

    if not cuts:
        times = [token for token in tokens if token >= time_0]
        end = int(frames / FRAMES_A_STEP)
        if times and times[-1] != time_0:
            end = times[-1] - time_0
        return [Segment(offset, offset + end * SECONDS, tuple(tokens))], frames
    closed = is_time[-2:] == [False, True]
    if closed:
        cuts.append(len(tokens))
    segments = [
        Segment(seconds(tokens[first]), seconds(tokens[last - 1]), tuple(tokens[first:last]))
        for first, last in zip([0, *cuts], cuts, strict=False)
    ]
    done = frames if closed else (tokens[cuts[-1] - 1] - time_0) * FRAMES_A_STEP
    return segments, done
