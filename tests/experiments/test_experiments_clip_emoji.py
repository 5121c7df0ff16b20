"""clip_emoji with tiny encoders on a few of the emoji, frozen and trained."""

import json

import numpy as np
import pytest
from scripts import experiment

import fmjax
from fmjax.data import assets


@pytest.mark.slow
@pytest.mark.asset
@pytest.mark.parametrize("text_rate", ["0.0", "0.1"])
def test_clip_emoji(text_rate, tiny_bert, tmp_path, capsys):
    if not assets.available("emoji"):
        pytest.skip("the asset emoji is not cached: fmjax.data.fetch('emoji')")
    run = tmp_path / "run"
    experiment("clip_emoji").main(
        [
            *("--output", str(run), "--images", "efficientnet_lite/tiny", "--texts"),
            *(str(tiny_bert), "--image-size", "32", "--views", "3", "--max-pairs", "16"),
            *("--batch-size", "8", "--copies", "1", "--epochs", "1", "--text-rate", text_rate),
        ]
    )
    assert "R@1" in capsys.readouterr().out
    results = json.loads((run / "results.json").read_text())
    assert results["held_out"]["pairs"] == 32
    for name in ("report.html", "samples.json", "features.npz"):
        assert (run / name).exists(), name
    model, variables = fmjax.load(run / "export")
    assert model.config.text_pooling == "mean"
    out = model.apply(variables, input_ids=np.array([[2, 5, 3]]))
    np.testing.assert_allclose(np.linalg.norm(out.text_embeds), 1.0, rtol=1e-5)
