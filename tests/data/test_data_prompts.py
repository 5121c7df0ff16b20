"""The recorded prompts and what espeak-ng says, with their texts."""

import shutil

import numpy as np
import pytest

from fmjax.data import assets
from fmjax.data.prompts import DIGITS, load_prompts, read_transcripts, recordings, samples_of
from fmjax.data.spoken import VOICES, WORDS, Utterance, load_spoken, speak, utterances


def test_transcripts_are_read(tmp_path):
    path = tmp_path / "transcripts.txt"
    path.write_text(
        "; a comment\n\ndigits/1: one\nfollowme/sorry.wav: I'm  sorry\n"
        "letters/at: at [@]\nbeep: [a tone]\nsilence/1: (1 second of silence)\nvm-press: ...\n"
    )
    assert read_transcripts(path) == {
        "digits/1": "one",
        "followme/sorry": "I'm sorry",
        "letters/at": "at",
    }
    path.write_text("digits/1: one\nno colon here\ndigits/1: won\n")
    with pytest.raises(ValueError, match="2 problems") as error:
        read_transcripts(path)
    assert "line 2: 'no colon here' is not of the form" in str(error.value)
    assert "line 3: digits/1 has two texts" in str(error.value)


def test_what_is_wrong_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no split 'dev'"):
        load_prompts("dev")
    with pytest.raises(ValueError, match=r"no words 'verbs'.* no split 'dev'"):
        load_spoken("verbs", "dev")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.wav").write_bytes(b"")
    with pytest.raises(ValueError, match="1 recordings, where there are 2"):
        recordings(tmp_path, 2)


@pytest.mark.asset
@pytest.mark.slow
@pytest.mark.skipif(not assets.available("prompts"), reason="the recorded prompts are not fetched")
def test_prompts_of_digits():
    folder = assets.fetch("prompts")
    found = recordings(folder, 568)
    digits = load_prompts("all", DIGITS, rate=8_000)
    assert list(digits.texts) == list(DIGITS.values())
    for name, samples in zip(digits.names, digits.samples, strict=True):
        np.testing.assert_array_equal(samples * 2**15, samples_of(found[name]))
    parts = [load_prompts(split) for split in ("train", "val", "test")]
    assert sum(map(len, parts)) == 568
    with pytest.raises(ValueError, match="none of 1 transcripts"):
        load_prompts("all", {"digits/eleventy": "eleventy"})


def test_voices_are_held_out():
    for words in WORDS:
        heard = {}
        for split in VOICES:
            said = utterances(words, split)
            heard[split] = {utterance.voice for utterance in said}
            assert heard[split] == set(VOICES[split])
            assert {word for one in said for word in one.text.split()} == set(WORDS[words])
        assert not heard["train"] & heard["test"]
        assert not heard["val"] & (heard["train"] | heard["test"])


@pytest.mark.skipif(
    shutil.which("espeak-ng") is None or shutil.which("flite") is None,
    reason="espeak-ng or flite is not installed",
)
def test_what_synthesisers_say():
    said = speak(Utterance("--version one two", "en-us+f2", 160, 50))
    assert said.dtype == np.float32
    assert 0.5 < len(said) / 16_000 < 4
    assert 0.02 < np.abs(said).max() <= 1
    longer = speak(Utterance("one two three four five", "en-us+f2", 130, 50))
    assert len(longer) > len(speak(Utterance("one two three four five", "en-us+f2", 200, 50)))
    slow, fast = (speak(Utterance("--help", "flite/slt", speed, 50)) for speed in (100, 200))
    assert len(slow) > 1.5 * len(fast)
    for voice in ("no-such-voice", "en-us+zzz", "flite/zzz"):
        with pytest.raises(ValueError, match="has no voice"):
            speak(Utterance("one", voice, 160, 50))
    for voice in sum(VOICES.values(), ()):
        assert len(speak(Utterance("one", voice, 160, 50)))
