"""Samples and characters against transformers' feature extractor and tokenizer."""

import json

import numpy as np
import pytest
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor

from fmjax.data.characters import Characters, characters_of, load_characters
from fmjax.data.waveform import WaveformProcessor, load_waveform_processor

RNG = np.random.default_rng(0)
SOUNDS = [(RNG.normal(size=n) * 0.1 + 0.3).astype(np.float32) for n in (900, 400, 1200)]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mask", [True, False])
def test_samples_equal_transformers(normalize, mask, tmp_path):
    theirs = Wav2Vec2FeatureExtractor(
        do_normalize=normalize, return_attention_mask=mask, padding_value=0.0
    )
    theirs.save_pretrained(tmp_path)
    ours = load_waveform_processor(tmp_path)
    for length, padding in ((None, "longest"), (1500, "max_length")):
        expected = theirs(
            SOUNDS, sampling_rate=16000, padding=padding, max_length=length, return_tensors="np"
        )
        found = ours(SOUNDS, 16000, length=length)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5)
            assert value.dtype == expected[name].dtype
    (tmp_path / "ours").mkdir()
    ours.save_pretrained(tmp_path / "ours")
    again = Wav2Vec2FeatureExtractor.from_pretrained(tmp_path / "ours")
    assert again.to_dict() == theirs.to_dict()


def test_bad_sounds_and_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="8000 samples a second") as error:
        WaveformProcessor()([np.zeros((4, 2)), np.zeros(9), np.array([np.nan])], 8000, length=5)
    for words in ("sound 0 has the shape (4, 2)", "above length=5", "sound 2 has samples"):
        assert words in str(error.value)
    integers = [np.array([300, -9000, 900], np.int16)]
    with pytest.raises(ValueError, match=r"has int16 samples; without do_normalize .* by 32768"):
        WaveformProcessor(do_normalize=False)(integers, 16_000)
    np.testing.assert_allclose(  # which does not matter where they are normalised
        WaveformProcessor()(integers, 16_000)["input_values"],
        WaveformProcessor()([integers[0] / np.float32(32768)], 16_000)["input_values"],
        rtol=1e-3,
    )
    with pytest.raises(ValueError, match="feature_size=2"):
        WaveformProcessor(feature_size=2)
    with pytest.raises(FileNotFoundError, match="has no preprocessor_config"):
        load_waveform_processor(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"sampling_rate": "fast", "loud": True}))
    with pytest.raises(ValueError, match="loud=True is unknown") as error:
        load_waveform_processor(tmp_path)
    assert "sampling_rate='fast' must be int" in str(error.value)
    file.write_text(json.dumps({"feature_extractor_type": "WhisperFeatureExtractor"}))
    with pytest.raises(ValueError, match="must be 'Wav2Vec2FeatureExtractor'"):
        load_waveform_processor(tmp_path)


@pytest.mark.parametrize("upper", [True, False])
def test_characters_equal_transformers(upper, tmp_path):
    ours = characters_of(["hello world", "it's a test"], upper=upper)
    ours.save_pretrained(tmp_path)
    assert load_characters(tmp_path) == ours
    theirs = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path)
    for text in ("hello world", "its a new world", "tell"):
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids
        frames = [i for symbol in ids for i in (symbol, symbol, ours.numbers["<pad>"])]
        assert ours.decode(ids) == theirs.decode(frames).replace("<unk>", "")
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_characters(tmp_path / "theirs") == ours


def test_bad_vocabularies_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"vocab\.json"):
        load_characters(tmp_path)
    file = tmp_path / "vocab.json"
    file.write_text(json.dumps({"<pad>": 0, "|": 1, "a": 3}))
    with pytest.raises(ValueError, match="numbers 0 to 2"):
        load_characters(tmp_path)
    file.write_text(json.dumps({"eng": {"<pad>": 0, "|": 1, "a": 2}, "fra": {"<pad>": 0, "|": 1}}))
    with pytest.raises(ValueError, match=r"languages \['eng', 'fra'\]; not None"):
        load_characters(tmp_path)
    english = load_characters(tmp_path, language="eng")
    assert english.encode("a a") == [2, 1, 2]
    with pytest.raises(ValueError, match=r"the characters \['b'\]"):
        english.encode("ab")
    with pytest.raises(ValueError, match="blank='<pad>' is not among"):
        Characters(("a", "|", "<unk>"))
