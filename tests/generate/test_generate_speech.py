"""Hearing as PyTorch's Whisper does: token for token, in windows and in long recordings."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from parity import torch_twin
from transformers import GenerationConfig as TorchGenerationConfig

import fmjax
from fmjax.generate.speech import (
    Listener,
    Segment,
    compression_ratio,
    detect_languages,
    encode,
    hear,
    hear_recordings,
    segments_of,
)
from fmjax.generate.speech_config import SpeechConfig
from fmjax.generation_config import GenerationConfig
from fmjax.models import whisper

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
END, START, ENGLISH, GERMAN, TRANSLATE, TRANSCRIBE, BEFORE, SILENT, NONE = range(70, 79)
TIME_0 = NONE + 1
CONFIG = whisper.Config(
    vocab_size=99, num_mel_bins=7, d_model=24, encoder_layers=1, encoder_ffn_dim=32,
    encoder_attention_heads=2, decoder_layers=2, decoder_ffn_dim=28, decoder_attention_heads=3,
    max_source_positions=12, max_target_positions=32, pad_token_id=END, bos_token_id=END,
    eos_token_id=END, decoder_start_token_id=START,
)  # fmt: skip
ENGLISH_ONLY = {
    "decoder_start_token_id": START, "eos_token_id": END, "pad_token_id": END, "bos_token_id": END,
    "max_length": 32, "no_timestamps_token_id": NONE, "prev_sot_token_id": BEFORE,
    "suppress_tokens": [3, 4, START, ENGLISH, GERMAN, TRANSLATE, TRANSCRIBE, BEFORE, SILENT],
    "begin_suppress_tokens": [5, END], "max_initial_timestamp_index": 5, "is_multilingual": False,
    "return_timestamps": False,
}  # fmt: skip
MULTILINGUAL = ENGLISH_ONLY | {
    "is_multilingual": True, "lang_to_id": {"<|en|>": ENGLISH, "<|de|>": GERMAN},
    "task_to_id": {"translate": TRANSLATE, "transcribe": TRANSCRIBE},
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(PyTorch's model, ours and its variables) of the same random weights."""
    folder = tmp_path_factory.mktemp("whisper")
    twin = torch_twin(whisper, CONFIG, "seq2seq_lm", 0, spread=0.5)
    twin.save_pretrained(folder)
    return twin, *fmjax.load(folder)


def both(pair, options):
    """PyTorch's model and a listener with the options of a generation_config.json."""
    twin, model, variables = pair
    twin.generation_config = TorchGenerationConfig(**options)
    known = {key: value for key, value in options.items() if key != "return_timestamps"}
    listener = Listener(
        model, variables, GenerationConfig.from_dict(known), SpeechConfig.from_dict(known)
    )
    return twin, listener


def frames(batch, count, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, count, 7)).astype(np.float32)


def theirs(twin, features, **options):
    features = torch.tensor(features).movedim(-1, 1)
    with torch.no_grad():
        return twin.generate(features, return_segments=True, **options)


def without_end(row):
    row = [int(token) for token in row]
    while row and row[-1] == END:
        row.pop()
    return tuple(row)


def test_windows_equal_pytorch(pair):
    """A batch of English without times."""
    twin, listener = both(pair, ENGLISH_ONLY)
    features = frames(4, 24)
    heard = hear(listener, features)
    # What follows the last pair of times would be heard again: one call is one window's text.
    expected = theirs(twin, features, force_unique_generate_call=True)["sequences"][:, 2:]
    assert [text.tokens for text in heard] == [without_end(row) for row in expected]
    assert len({text.tokens for text in heard}) > 1
    assert all(math.isnan(text.no_speech) for text in heard)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"language": "de"}, {"language": "en", "task": "translate"}, {"task": "translate"}],
    ids=str,
)
@pytest.mark.parametrize("timestamps", [False, True])
def test_languages_and_tasks_equal_pytorch(pair, options, timestamps):
    """Given, or heard."""
    twin, listener = both(pair, MULTILINGUAL)
    features = frames(3, 24, seed=1)
    speech = dataclasses.replace(listener.speech, **options)
    heard = hear(listener._replace(speech=speech), features, timestamps=timestamps)
    expected = theirs(
        twin, features, return_timestamps=timestamps, force_unique_generate_call=True, **options
    )["sequences"]
    width = len(speech.start(timestamps=timestamps, heard=ENGLISH))
    for text, row in zip(heard, expected, strict=True):
        assert text.tokens == without_end(row[width:])
    assert len({text.tokens for text in heard}) > 1


@pytest.mark.slow
def test_languages_are_detected_as_pytorch_does(pair):
    twin, listener = both(pair, MULTILINGUAL)
    features = frames(6, 24, seed=2)
    states = encode(listener.model, listener.variables, features)
    expected = twin.detect_language(torch.tensor(features).movedim(-1, 1))
    assert detect_languages(listener, states) == expected.tolist()


class Whole:
    """A recording whose frames are there."""

    def __init__(self, features):
        self.features = features

    @property
    def frames(self):
        return len(self.features)

    def window(self, start):
        found = self.features[start : start + 24]
        return np.pad(found, ((0, 24 - len(found)), (0, 0)))


def check_long(twin, listener, recordings, **options):
    """Segments of each recording, times and tokens."""
    found = [[] for _ in recordings]
    for number, segment in hear_recordings(listener, [Whole(x) for x in recordings], batch_size=2):
        found[number].append(segment)
    for features, segments in zip(recordings, found, strict=True):
        expected = theirs(twin, features[None], return_timestamps=True, **options)["segments"][0]
        assert len(segments) == len(expected)
        for ours, other in zip(segments, expected, strict=True):
            tokens = without_end(other["tokens"])
            if len(tokens) > 1 and tokens[-1] >= TIME_0 and tokens[-2] >= TIME_0:
                tokens = tokens[:-1]  # theirs has the next one's first time too
            assert ours.tokens == tokens
            assert abs(ours.start - float(other["start"])) < 1e-6
            assert abs(ours.end - float(other["end"])) < 1e-6
    return found


def test_long_recordings_equal_pytorch(pair):
    """Windows start where the last time says; two at a time, of different lengths."""
    twin, listener = both(pair, ENGLISH_ONLY)
    found = check_long(twin, listener, [frames(1, n, seed=n)[0] for n in (61, 24, 130)])
    assert max(len(segments) for segments in found) > 4


@pytest.mark.slow
def test_conditioned_recordings_equal_pytorch(pair):
    """Each window is told the text of those before."""
    twin, listener = both(pair, MULTILINGUAL | {"condition_on_prev_tokens": True})
    recordings = [frames(1, n, seed=n)[0] for n in (60, 110)]
    check_long(twin, listener, recordings, condition_on_prev_tokens=True)


@pytest.mark.slow
def test_thresholds_equal_pytorch(pair):
    """Windows in which nobody speaks are skipped: thresholds among the values there are."""
    twin, listener = both(pair, ENGLISH_ONLY)
    speech = dataclasses.replace(listener.speech, logprob_threshold=0.0, no_speech_threshold=0.0)
    recording = frames(1, 130, seed=5)[0]
    windows = np.stack([Whole(recording).window(start) for start in range(0, 120, 24)])
    heard = hear(listener._replace(speech=speech), windows, timestamps=True)
    assert all(text.silent for text in heard)
    middle = float(np.mean(sorted(text.no_speech for text in heard)[2:4]))
    speech = dataclasses.replace(speech, no_speech_threshold=middle)
    found = check_long(
        twin, listener._replace(speech=speech), [recording], logprob_threshold=0.0,
        no_speech_threshold=middle, temperature=0.0,
    )  # fmt: skip
    assert found[0]


@pytest.mark.slow
def test_log_probabilities_equal_pytorch(pair):
    """By which texts are believed; and the ratio of compression."""
    twin, listener = both(pair, ENGLISH_ONLY)
    features = frames(3, 24, seed=4)
    heard = hear(listener, features)
    out = theirs(
        twin, features, return_dict_in_generate=True, output_scores=True,
        force_unique_generate_call=True,
    )  # fmt: skip
    for row, text in enumerate(heard):
        tokens = out["sequences"][row, 2:]
        scores = [score[row] for score in out["scores"]]
        length = len(text.tokens) + (END in tokens.tolist())
        expected = twin._retrieve_avg_logprobs(scores, tokens[:length], 0.0)
        assert abs(text.log_prob - float(expected)) < 1e-5
        ratio = twin._retrieve_compression_ratio(tokens[:length], 99)
        assert abs(text.compression - ratio) < 1e-9
    assert compression_ratio([1] * 99, 99) > 4 * compression_ratio(range(99), 99)


@pytest.mark.slow
def test_what_is_not_believed_is_heard_anew(pair):
    """At the first temperature at which it is, or the last; believed texts stay as they were."""
    _, listener = both(pair, ENGLISH_ONLY)
    features = frames(5, 24, seed=6)
    plain = hear(listener, features)
    middle = float(np.median([text.log_prob for text in plain]))
    speech = dataclasses.replace(listener.speech, logprob_threshold=middle)
    again = hear(
        listener._replace(speech=speech), features, temperatures=(0.0, 0.3, 0.9),
        rng=jax.random.key(0),
    )  # fmt: skip
    for before, after in zip(plain, again, strict=True):
        if before.log_prob >= middle:
            assert after == before
        else:
            assert after.temperature == 0.9 or after.log_prob >= middle
            assert after.temperature > 0
    assert {text.temperature for text in again} >= {0.0}


def test_texts_are_cut_where_times_meet():
    t = lambda step: TIME_0 + step  # noqa: E731
    segments, done = segments_of([t(0), 1, 2, t(5), t(6), 3, t(9), t(9), 4], TIME_0, 10.0, 24)
    assert [s.tokens for s in segments] == [(t(0), 1, 2, t(5)), (t(6), 3, t(9))]
    np.testing.assert_allclose([s[:2] for s in segments], [(10.0, 10.1), (10.12, 10.18)])
    assert done == 18  # to the last pair; 4 is heard again
    segments, done = segments_of([t(0), 1, t(5), t(6), 3, t(9)], TIME_0, 0.0, 24)
    assert (len(segments), done) == (2, 24)
    assert segments_of([t(0), 1, t(5)], TIME_0, 0.0, 24)[1] == 24
    assert segments_of([1, 2], TIME_0, 1.0, 24) == ([Segment(1.0, 1.24, (1, 2))], 24)


def test_bad_options_are_refused(pair):
    _, listener = both(pair, ENGLISH_ONLY)
    with pytest.raises(ValueError, match="need rng"):
        hear(listener, frames(1, 24), temperatures=(0.0, 0.2))
    with pytest.raises(ValueError, match="must be numbers of at least 0"):
        hear(listener, frames(1, 24), temperatures=())
    with pytest.raises(ValueError, match=r"must be \[B, 24, 7\]"):
        hear(listener, frames(1, 23))
    timeless = listener._replace(speech=SpeechConfig(decoder_start_token_id=START))
    with pytest.raises(ValueError, match="no times"):
        hear_recordings(timeless, [Whole(frames(1, 60)[0])])
    with pytest.raises(ValueError, match=r"(?s)language='fr'.*task='transcribe' is none"):
        SpeechConfig(
            is_multilingual=True, lang_to_id={"<|en|>": 1}, language="fr", task="transcribe"
        )
    with pytest.raises(ValueError, match="hears English alone"):
        dataclasses.replace(listener.speech, language="de")
    with pytest.raises(ValueError, match=r"(?s)task='sing'.*|no_timestamps_token_id=-1"):
        SpeechConfig(task="sing", no_timestamps_token_id=-1)


@pytest.mark.slow
def test_the_fixture_generates_what_pytorch_recorded():
    """By the general `fmjax.generate`: greedily, with an end, and by beams."""
    model, variables = fmjax.load(FIXTURES / "whisper-cond")
    io = np.load(FIXTURES / "whisper-cond" / "io.npz")
    features = np.moveaxis(io["in.input_features"], 1, -1)
    options = {"max_new_tokens": 10, "pad_token_id": 0, "decoder_start_token_id": 3}
    out = fmjax.generate(model, variables, input_features=features, **options)
    np.testing.assert_array_equal(out.sequences, io["pt.generate"])
    out = fmjax.generate(model, variables, input_features=features, **options, num_beams=3)
    np.testing.assert_array_equal(out.sequences, io["pt.generate_beam3"])


HEADS = [[0, 1], [1, 0], [1, 2]]


@pytest.mark.parametrize(
    ("condition", "kind"),
    [
        (False, "first-segment"),
        pytest.param(True, "first-segment", marks=pytest.mark.slow),
        pytest.param(True, "all-segments", marks=pytest.mark.slow),
    ],
)
def test_prompts_equal_pytorch(pair, condition, kind):
    """What is said beforehand is before each window, or the first, or always first."""
    options = MULTILINGUAL | {"condition_on_prev_tokens": condition}
    twin, listener = both(pair, options)
    prompt = (BEFORE, 11, 12, 13, 14)
    speech = dataclasses.replace(listener.speech, prompt_ids=prompt, prompt_condition_type=kind)
    recordings = [frames(1, n, seed=n)[0] for n in (60, 110)]
    plain = check_long(twin, listener, recordings, condition_on_prev_tokens=condition)
    found = check_long(
        twin, listener._replace(speech=speech), recordings, prompt_ids=torch.tensor(prompt),
        prompt_condition_type=kind, condition_on_prev_tokens=condition,
    )  # fmt: skip
    assert found != plain
    assert speech.prompt == dataclasses.replace(speech, prompt_ids=prompt[1:]).prompt
    with pytest.raises(ValueError, match="needs condition_on_prev_tokens"):
        dataclasses.replace(
            speech, condition_on_prev_tokens=False, prompt_condition_type="all-segments"
        )


def test_times_of_tokens_equal_pytorch(pair):
    """In windows of long recordings, the last of which is short; with a prompt."""
    options = ENGLISH_ONLY | {"alignment_heads": HEADS}
    twin, listener = both(pair, options)
    twin.config.median_filter_width = 3
    speech = dataclasses.replace(listener.speech, median_filter_width=3, prompt_ids=(BEFORE, 9))
    listener = listener._replace(speech=speech)
    seen = 0
    for count in (61, 24, 100):
        features = frames(1, count, seed=count)
        ours = [s for _, s in hear_recordings(listener, [Whole(features[0])], words=True)]
        expected = theirs(
            twin, features, return_timestamps=True, return_token_timestamps=True,
            attention_mask=torch.ones(1, count, dtype=torch.long),
            prompt_ids=torch.tensor([BEFORE, 9]),
        )["segments"][0]  # fmt: skip
        assert len(ours) == len(expected)
        for one, other in zip(ours, expected, strict=True):
            times = other["token_timestamps"][: len(one.tokens)].tolist()
            np.testing.assert_allclose(one.times, times, atol=1e-5)
            seen += len(set(times))
    assert seen > 20
    for _, segment in hear_recordings(listener, [Whole(frames(1, 1)[0])], words=True):
        assert set(segment.times) == {0.0}  # there is one step, however short the window
    twin.config.median_filter_width = 7
    plain = both(pair, ENGLISH_ONLY)[1]
    with pytest.raises(ValueError, match="alignment_heads"):
        hear(plain, frames(1, 24), words=True)
    far = dataclasses.replace(plain.speech, alignment_heads=((2, 0),))
    with pytest.raises(ValueError, match=r"\[\(2, 0\)\] are not of \(2, 3\)"):
        hear(plain._replace(speech=far), frames(1, 24), words=True)


@pytest.mark.slow
def test_times_of_one_window_equal_pytorch(pair):
    twin, listener = both(pair, ENGLISH_ONLY | {"alignment_heads": HEADS})
    for seed in range(4):
        features = frames(1, 24, seed=seed)
        (heard,) = hear(listener, features, words=True)
        # Without times in the text theirs may never come to the window's end: one call.
        found = theirs(
            twin, features, return_token_timestamps=True, force_unique_generate_call=True
        )
        times = found["token_timestamps"][0, 2:].tolist()[: len(heard.tokens)]
        np.testing.assert_allclose(heard.times, times, atol=1e-5)
