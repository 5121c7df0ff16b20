"""The experiments on speech, on a few made-up sounds and tiny models, by their arguments."""

import json

import numpy as np
import pytest
import soundfile
from scripts import experiment

import fmjax
from fmjax.cli import main as cli


def write_tones(folder, name, count, seed):
    """Words that are tones, one after another, and their manifest."""
    rng = np.random.default_rng(seed)
    heights = {"low": 400, "high": 1_500}
    rows = ["path,text"]
    time = np.arange(2_400) / 8_000
    for number in range(count):
        words = rng.choice(list(heights), rng.integers(1, 3))
        parts = [0.3 * np.sin(2 * np.pi * heights[word] * time) for word in words]
        silence = np.zeros(800)
        sound = np.concatenate([silence, *(x for part in parts for x in (part, silence))])
        file = f"{name}-{number}.wav"
        soundfile.write(folder / file, sound + 1e-3 * rng.normal(size=len(sound)), 8_000)
        rows.append(f"{file},{' '.join(words)}")
    (folder / f"{name}.csv").write_text("\n".join(rows))
    return str(folder / f"{name}.csv")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["deepspeech2", "wav2vec2"])
def test_speech_ctc(model, tmp_path, capsys):
    files = [
        part
        for number, (option, count) in enumerate((("data", 32), ("val", 6), ("test", 6)))
        for part in (f"--{option}", write_tones(tmp_path, option, count, number))
    ]
    run = tmp_path / "run"
    experiment("speech_ctc").main(
        [
            *("--output", str(run), *files, "--model", model, "--width", "16", "--layers", "1"),
            *("--batch-size", "8", "--epochs", "2"),
        ]
    )
    results = json.loads((run / "results.json").read_text())
    assert 0 <= results["test"]["cer"] <= 2
    assert "test wer" in capsys.readouterr().out
    for name in ("report.html", "samples.json", "export/model.safetensors", "export/vocab.json"):
        assert (run / name).exists(), name
    read, _ = fmjax.load(run / "export")
    assert read.head == "ctc"
    sound = next(tmp_path.rglob("*.wav"))
    assert cli([str(word) for word in ("transcribe", sound, "--model", run / "export")]) == 0
