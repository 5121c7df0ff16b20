"""Experiments that make images, of a few small ones."""

import json

import numpy as np
import pytest
from scripts import experiment

import fmjax


@pytest.mark.slow
@pytest.mark.parametrize("game", ["dcgan", "wgan-gp"])
def test_gan_fashion(game, stripes, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = [
        *("--output", str(run), "--data", str(stripes), "--game", game, "--hidden-sizes", "8"),
        *("--latent-size", "8", "--steps", "24", "--batch-size", "8", "--evaluations", "2"),
        *("--measured", "16", "--feature-model", "cnn/tiny", "--learning-rate", "1e-3"),
    ]
    script = experiment("gan_fashion")
    script.main(arguments)
    results = json.loads((run / "results.json").read_text())
    assert results["test"]["fid"] > 0
    assert "of real pictures" in capsys.readouterr().out
    assert sorted(path.stem for path in (run / "samples").iterdir()) == ["12", "24"]
    page = (run / "report.html").read_text()
    assert page.count("<img") == 2
    assert "Losses of the players" in page
    generator, variables = fmjax.load(run / "export" / "generator")
    images = generator.apply(variables, latents=np.zeros((1, 8))).images
    assert images.shape == (1, 8, 8, 3)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("generator/loss" in line for line in lines)
    # The run is over: nothing is trained again.
    script.main(arguments)
    assert json.loads((run / "results.json").read_text()) == results
    if game == "dcgan":  # watched from the beginning, where new weights make nothing
        arguments[1] = str(tmp_path / "watched")
        with pytest.raises(SystemExit, match="the generator has collapsed"):
            script.main([*arguments, "--watched-after", "0"])


@pytest.fixture
def shapes(monkeypatch):
    """Squares of one colour on white, named by it, in the place of emoji, a download."""
    from fmjax.data import emoji

    colours = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}

    def named(split, *, size):
        images = np.full((24 if split == "train" else 6, size, size, 3), 255, np.uint8)
        names = [f"{list(colours)[i % 3]} square" for i in range(len(images))]
        for image, name in zip(images, names, strict=True):
            image[size // 4 : -size // 4, size // 4 : -size // 4] = colours[name.split()[0]]
        return images, names

    monkeypatch.setattr(emoji, "named_emoji", named)


@pytest.mark.slow
@pytest.mark.usefixtures("shapes")
@pytest.mark.parametrize("kind", ["vqgan", "dvae"])
def test_dalle_emoji(kind, tmp_path, capsys, monkeypatch):
    from fmjax.cli import main

    run = tmp_path / "run"
    script = experiment("dalle_emoji")
    seen = []
    monkeypatch.setattr(  # the features are a download
        script, "quality_of", lambda real, made: seen.append(made.shape) or {"fid": 1.0, "kid": 0.5}
    )
    arguments = [
        *("--output", str(run), "--image-size", "8", "--image-tokenizer", kind, "--codes", "8"),
        *("--base-channels", "8", "--levels", "2", "--tokenizer-steps", "12", "--steps", "12"),
        *("--vocab-size", "270", "--text-length", "8", "--width", "16", "--layers", "2"),
        *("--batch-size", "8", "--evaluations", "2", "--measured", "4", "--restarts", "3"),
    ]
    script.main(arguments)
    assert "drawn for held-out names" in capsys.readouterr().out
    results = json.loads((run / "results.json").read_text())
    assert 0 < results["reconstruction"]["squared_error"] < 1
    assert seen == [(6, 8, 8, 3), (4, 8, 8, 3), (4, 8, 8, 3)]
    for name in ("drawn.png", "reconstructions.png", "transformer/report.html"):
        assert (run / name).exists(), name
    # What it leaves draws from the command line, the same for the same seed.
    export = str(run / "export")
    out = tmp_path / "drawn"
    assert main(["draw", export, "a Red square!", "blue", "--out", str(out), "--count", "2"]) == 0
    assert capsys.readouterr().out.split() == [
        str(out / name) for name in ("1-a-red-square.png", "2-blue.png")
    ]
    from PIL import Image

    with Image.open(out / "2-blue.png") as picture:
        assert picture.size == (2 * 8 * 4, 8 * 4)
        first = np.asarray(picture)
    again = tmp_path / "again"
    main(["draw", export, "a Red square!", "blue", "--out", str(again), "--count", "2"])
    with Image.open(again / "2-blue.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), first)
    assert main(["draw", export, " "]) == 2
    assert main(["draw", export]) == 2
    assert main(["draw", str(run / "export" / "image_tokenizer"), "red"]) == 2
    errors = capsys.readouterr().err
    for words in ("the texts [0] are empty", "no text; write it", "only a dalle"):
        assert words in errors
