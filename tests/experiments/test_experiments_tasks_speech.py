"""The experiments of speech, run on noise and tiny models by their ordinary arguments."""

import json
import wave

import numpy as np
import pytest
from scripts import experiment
from tiny_whisper import write_tiny_whisper


@pytest.mark.slow
def test_transcribe(tmp_path, capsys):
    model = write_tiny_whisper(tmp_path / "model")
    sounds = tmp_path / "sounds"
    (sounds / "digits").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("hello", "digits/1", "tone"):
        with wave.open(str(sounds / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(rng.integers(-3000, 3000, 6000).astype("<i2").tobytes())
    said = tmp_path / "said.txt"
    said.write_text("hello: Hello, all of you.\ndigits/1: one\ntone: [tone]\n")
    arguments = [
        *("--output", str(tmp_path / "run"), "--transcripts", str(said), "--words", "1"),
        *("--recordings", str(sounds), "--model", str(model), "--batch-size", "2"),
    ]
    experiment("transcribe").main(arguments)
    printed = capsys.readouterr().out
    assert "2 recordings, 1.5 s" in printed
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for name in ("batch", "single"):
        assert list(results[name]["texts"]) == ["digits/1", "hello"]
        assert results[name]["word_error_rate"] > 0.5  # of noise, by a model that knows nothing
        assert results[name]["real_time_factor"] > 0
    with pytest.raises(ValueError, match="none of the 3 recordings"):
        experiment("transcribe").main([*arguments[:5], "9", *arguments[6:]])
