"""`fmjax transcribe`, its recipe, and Whisper's folders made of CTranslate2's."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
import torch
import transformers
from tiny_whisper import (
    BEFORE,
    CONFIG,
    GENERATION,
    NO_TIMES,
    SILENT,
    ctranslate2_arrays,
    ctranslate2_bytes,
    tokenizer,
    write_tiny_whisper,
)

import fmjax
from fmjax.cli import main
from fmjax.data import assets
from fmjax.data.audio_features import LogMel, log_energies, scaled
from fmjax.generate.speech import hear_recordings
from fmjax.recipes.transcription import (
    StreamedRecording,
    load_transcriber,
    transcribe,
)
from fmjax.tree import flatten


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def wavs(tmp_path_factory):
    """A short file at 8 kHz in two channels and one of several windows at 16 kHz."""
    place = tmp_path_factory.mktemp("wavs")
    rng = np.random.default_rng(0)
    soundfile.write(place / "short.wav", 0.1 * rng.normal(size=(6000, 2)), 8000)
    soundfile.write(place / "long.wav", 0.1 * rng.normal(size=40000), 16000)
    return place


def test_windows_are_those_of_the_whole():
    """At any place, whatever blocks the file is read in; zeros behind the end."""
    rng = np.random.default_rng(1)
    loud = np.linspace(0.1, 1.0, 45678)  # the last block is the loudest
    samples = (loud * rng.normal(size=45678)).astype(np.float32)
    settings = LogMel(chunk_length=1)
    whole = np.asarray(log_energies(samples[None], settings)[0])
    recording = StreamedRecording((samples, 16000), settings)
    assert recording.frames == len(whole) == 285
    for start in (0, 33, 100, 240):
        expected = scaled(whole, whole.max())[start : start + 100]
        window = recording.window(start)
        np.testing.assert_allclose(window[: len(expected)], expected, atol=1e-5)
        assert len(recording.held) < 2 * settings.samples + settings.n_fft  # bounded memory
        assert not window[len(expected) :].any()
        assert window.shape == (100, 80)


@pytest.mark.slow
def test_the_command_transcribes(folder, wavs, capsys):
    """A short file and a long one, which has times; what is changed is said."""
    files = [str(wavs / name) for name in ("short.wav", "long.wav")]
    assert main(["transcribe", *files, "--model", str(folder), "--json"]) == 0
    out, err = capsys.readouterr()
    short, long = map(json.loads, out.splitlines())
    assert short["seconds"] == 0.75
    assert short["pieces"] is None
    assert long["pieces"]
    ends = [piece["end"] for piece in long["pieces"]]
    assert ends == sorted(ends)
    assert "resampled from 8000 to 16000 Hz" in err
    assert "2 channels were averaged" in err


@pytest.mark.slow
def test_texts_do_not_depend_on_the_batch(folder, wavs):
    transcriber = load_transcriber(folder)
    rng = np.random.default_rng(3)
    sounds = [(0.1 * rng.normal(size=n), 16000) for n in (9000, 40000, 16000, 50000, 7000)]
    cold = {"temperatures": (0.0,)}
    together = transcribe(transcriber, sounds, **cold, batch_size=4)
    apart = [transcribe(transcriber, [sound], **cold)[0] for sound in sounds]
    assert together == apart
    times = transcribe(transcriber, sounds[:1], **cold, timestamps=True)
    assert times[0].pieces is not None


def test_words_have_times(folder, wavs, capsys):
    """As transformers puts them together from what it generates; prompts change what is heard."""
    sound = (np.random.default_rng(3).normal(size=30000).astype(np.float32), 16000)
    transcriber = load_transcriber(folder)
    options = {"temperatures": (0.0,), "timestamps": True}
    (plain,) = transcribe(transcriber, [sound], **options)
    (found,) = transcribe(transcriber, [sound], words=True, temperatures=(0.0,))
    joined = "".join(piece.text for piece in found.pieces)
    assert joined.replace(" ", "") == "".join(p.text for p in plain.pieces).replace(" ", "")
    assert found.text.replace(" ", "") == joined.replace(" ", "")
    own = transformers.WhisperTokenizer.from_pretrained(folder)
    for segment in (s for _, s in hear_recordings(
        transcriber.listener, [StreamedRecording(sound, transcriber.features)], words=True
    )):  # fmt: skip
        # Their words are of one chunk, whose first time token ends it where it is 0.
        tokens = np.array([[NO_TIMES + 1, *segment.tokens]])
        times = np.array([[segment.start, *segment.times]])
        _, there = own._decode_asr(
            [{"tokens": tokens[:, 1:], "token_timestamps": times[:, 1:]}],
            return_timestamps="word", return_language=False, time_precision=0.02,
        )  # fmt: skip
        ours = transcriber.words(segment)
        for word in there["chunks"]:
            starts = [piece for piece in ours if piece.text == word["text"]]
            assert any((p.start, p.end) == word["timestamp"] for p in starts), (word, ours)
    # Of a language that is heard, not given, too: without spaces each character is a word.
    speech = dataclasses.replace(
        transcriber.listener.speech, is_multilingual=True, lang_to_id={"<|ja|>": SILENT}
    )
    japanese = dataclasses.replace(
        transcriber, listener=transcriber.listener._replace(speech=speech)
    )
    recording = StreamedRecording(sound, transcriber.features)
    _, segment = next(iter(hear_recordings(japanese.listener, [recording], words=True)))
    assert segment.language == SILENT
    spoken = segment._replace(tokens=(64, 65, 66), times=(0.0,) * 3)
    assert [word.text for word in japanese.words(spoken)] == ["a", "b", "c"]
    assert [word.text for word in transcriber.words(spoken)] == ["abc"]
    told = load_transcriber(folder, prompt="Some names")
    assert told.listener.speech.prompt[0] == BEFORE
    assert transcribe(told, [sound], **options)[0].text != plain.text
    file = str(wavs / "short.wav")
    assert main(["transcribe", file, "--model", str(folder), "--words", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert all(set(piece) == {"start", "end", "text"} for piece in row["pieces"])
    with pytest.raises(ValueError, match="must be a text"):
        load_transcriber(folder, prompt=" ")
    with pytest.raises(ValueError, match="give one"):
        load_transcriber(folder, prompt_each=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "write them after the command"),
        (["none.wav"], "no such files: none.wav"),
        (["SHORT", "--batch-size", "0"], "batch_size=0 must be at least 1"),
        (["SHORT", "--language", "de"], "hears English alone"),
        (["NOISE"], "these are not transcribed"),
    ],
)
def test_bad_input_is_said_plainly(folder, wavs, tmp_path, capsys, arguments, words):
    noise = tmp_path / "noise.wav"
    noise.write_bytes(b"no sound at all" * 9)
    real = {"SHORT": str(wavs / "short.wav"), "NOISE": str(noise)}
    arguments = [real.get(argument, argument) for argument in arguments]
    assert main(["transcribe", *arguments, "--model", str(folder)]) == 2
    assert words in capsys.readouterr().err


def test_silence_has_no_text(folder):
    transcriber = load_transcriber(folder)
    silence = [(np.zeros(9000), 16000), (np.zeros(50000, np.int16), 8000)]
    short, long = transcribe(transcriber, silence)
    assert (short.text, short.pieces, long.text, long.pieces) == ("", None, "", ())
    assert "it is silent: all samples are 0" in short.changes
    assert transcribe(transcriber, silence[:1], timestamps=True)[0].pieces == ()


def test_a_model_of_another_kind_is_named():
    fixtures = Path(__file__).resolve().parents[1] / "fixtures"
    with pytest.raises(ValueError, match="is a vit; only a whisper or a model of CTC"):
        load_transcriber(fixtures / "vit-cls")


@pytest.fixture(scope="module")
def source(folder, tmp_path_factory):
    """The folder as CTranslate2 has it, though of a window that no real one reads."""
    place = tmp_path_factory.mktemp("ctranslate2")
    (place / "model.bin").write_bytes(ctranslate2_bytes(ctranslate2_arrays(folder)))
    told = {"suppress_ids": [1, 2], "suppress_ids_begin": [3], "alignment_heads": [[0, 1]]}
    (place / "config.json").write_text(json.dumps(told))
    tokenizer().save(str(place / "tokenizer.json"))
    return place


def test_a_folder_of_ctranslate2_is_converted(folder, source, tmp_path, monkeypatch, capsys):
    # Real models read thirty seconds, which this one would be slow at.
    monkeypatch.setattr(
        "fmjax.recipes.ctranslate2.LogMel", lambda **sizes: LogMel(chunk_length=1, **sizes)
    )
    assert main(["convert", str(source), str(tmp_path / "made")]) == 0
    assert "CTranslate2" in capsys.readouterr().out
    model, variables = fmjax.load(tmp_path / "made")
    assert model.config == CONFIG
    for path, leaf in flatten(fmjax.load(folder)[1]).items():
        np.testing.assert_array_equal(flatten(variables)[path], leaf, err_msg=path)
    made = json.loads((tmp_path / "made" / "generation_config.json").read_text())
    same = GENERATION.keys() - {"suppress_tokens", "begin_suppress_tokens"}
    same -= {"max_initial_timestamp_index"}
    assert {key: made[key] for key in same} == {key: GENERATION[key] for key in same}
    assert made["suppress_tokens"] == [1, 2]
    assert load_transcriber(tmp_path / "made").text([72, 105, 256, 270]) is not None
    assert main(["transcribe", str(source / "config.json"), "--model", str(source)]) == 2
    assert "fmjax convert" in capsys.readouterr().err


def test_contradictory_folders_are_not_converted(source, tmp_path, capsys):
    """And nothing is written."""
    assert main(["convert", str(source), str(tmp_path / "made")]) == 2
    assert "reads 100 frames; a Whisper reads 3000" in capsys.readouterr().err
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("model.bin", "config.json"):
        (bare / name).write_bytes((source / name).read_bytes())
    assert main(["convert", str(bare), str(tmp_path / "made")]) == 2
    assert "has no tokenizer.json" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


@pytest.mark.slow
@pytest.mark.asset
@pytest.mark.skipif(
    not (assets.available("whisper-tiny.en") and assets.available("prompts")),
    reason="whisper-tiny.en or prompts: fetch them with fmjax.data.fetch",
)
@pytest.mark.parametrize("timestamps", [False, True])
def test_the_real_model_hears_what_pytorch_hears(timestamps):
    """Token for token, two recordings at once."""
    from fmjax.data.audio import read_audio
    from fmjax.generate.speech import hear
    from fmjax.recipes.ctranslate2 import tiny_english

    transcriber = load_transcriber()
    files = sorted(assets.fetch("prompts").glob("agent-*.wav"))[:2]
    sounds = [read_audio(path).samples for path in files]
    features = transcriber.features(sounds)["input_features"]
    heard = hear(transcriber.listener, features, timestamps=timestamps)
    torch.set_num_threads(1)
    twin = transformers.WhisperForConditionalGeneration.from_pretrained(
        tiny_english(), dtype=torch.float32
    )
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(tiny_english())
    theirs = extractor(sounds, sampling_rate=16000, return_tensors="pt")["input_features"]
    assert np.abs(np.swapaxes(features, 1, 2) - theirs.numpy()).max() < 1e-4
    with torch.no_grad():
        rows = twin.generate(
            theirs, return_timestamps=timestamps, force_unique_generate_call=True
        ).tolist()
    start = len(transcriber.listener.speech.start(timestamps=timestamps))
    for text, row in zip(heard, rows, strict=True):
        expected = [token for token in row[start:] if token != 50256]
        assert list(text.tokens) == expected
    assert jax.tree.leaves(transcriber.listener.variables)[0].dtype == np.float32
