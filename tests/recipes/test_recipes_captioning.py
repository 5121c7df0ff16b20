"""Captions: trained, measured beside a neighbour's, and written by `fmjax caption`."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

import fmjax
from fmjax.cli import main
from fmjax.data.image_processor import parse_image_processor
from fmjax.data.image_text import ImageTexts
from fmjax.data.records import TextPairs
from fmjax.data.tokenizer import train_tokenizer
from fmjax.metrics.captioning import captioning_metrics
from fmjax.models import bert, encoder_decoder, gpt2, mbart, t5, vision_encoder_decoder
from fmjax.recipes.captioning import CaptionTraining, nearest_texts, train_on_captions
from fmjax.recipes.sequence_to_sequence import PairTraining, train_on_pairs

COLOURS = {"red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255)}


def squares(count=24, seed=0):
    """Coloured squares with their names."""
    draw = np.random.default_rng(seed)
    names = [list(COLOURS)[i] for i in np.arange(count) % 3]
    images = np.stack([np.full((8, 8, 3), COLOURS[name]) for name in names])
    noisy = np.clip(images + draw.integers(-20, 20, images.shape), 0, 255).astype(np.uint8)
    return ImageTexts(noisy, [f"a {name} square" for name in names])


def pair():
    """A tiny captioner, its tokenizer and its processor."""
    tokenizer = train_tokenizer(squares().texts, kind="unigram", vocab_size=40, sentinels=0)
    decoder = gpt2.Config(
        vocab_size=len(tokenizer), n_positions=16, n_embd=16, n_layer=1, n_head=2,
        add_cross_attention=True,
    )  # fmt: skip
    config = vision_encoder_decoder.Config(
        vision_encoder_decoder.VARIANTS["tiny"].encoder, decoder,
        pad_token_id=tokenizer.pad_token_id, decoder_start_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model, variables = fmjax.create(
        "vision-encoder-decoder", config, head="seq2seq_lm", rng=jax.random.key(0)
    )
    processor = parse_image_processor(
        {
            "image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8},
            "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        }
    )  # fmt: skip
    return model, variables, tokenizer, processor


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [True, False])
def test_colours_are_named(frozen, tmp_path, capsys):
    """A run learns to name colours, and the command writes from its export what the run wrote."""
    examples = {"train": squares(240), "val": squares(9, seed=1), "test": squares(6, seed=2)}
    settings = CaptionTraining(
        output=tmp_path / "run", epochs=4.0, batch_size=8, learning_rate=1e-2, num_beams=1,
        max_target_length=14, frozen=frozen,
    )  # fmt: skip
    model, variables, tokenizer, processor = pair()
    encoder = jax.tree.map(np.asarray, variables["params"]["encoder"])
    results = train_on_captions(
        settings, model, variables, tokenizer, examples, processor,
        about={"source": "tiny", "data": "squares"},
    )  # fmt: skip
    assert results["test"]["exact_match"] == 1.0
    assert results["baselines"]["nearest neighbour"]["test"]["exact_match"] == 1.0
    _, kept = fmjax.load(tmp_path / "run" / "export")
    same = jax.tree.map(np.array_equal, encoder, kept["params"]["encoder"])
    assert all(jax.tree.leaves(same)) == frozen
    samples = json.loads((tmp_path / "run" / "samples.json").read_text())
    assert samples["rows"][0][0].startswith("data:image/png")
    paths = []
    for name, image in zip(("one", "two"), examples["test"].images, strict=False):
        paths.append(str(tmp_path / f"{name}.png"))
        Image.fromarray(image).save(paths[-1])
    capsys.readouterr()
    assert main(["caption", str(tmp_path / "run" / "export"), *paths, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["caption"] for row in rows] == ["a red square", "a green square"]


def test_what_cannot_be_captioned(tmp_path, capsys):
    def refused(*argv):
        assert main(["caption", *map(str, argv)]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    assert "no pictures" in refused(tmp_path)
    model, variables, tokenizer, processor = pair()
    folder = fmjax.save(tmp_path / "model", model, variables, tokenizer)
    assert "preprocessor_config.json" in refused(folder, tmp_path / "a.png")
    processor.save_pretrained(folder)
    (bad := tmp_path / "bad.png").write_bytes(b"nothing")
    assert "bad.png" in refused(folder, bad)
    config = t5.Config(vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=8, num_layers=1)
    decoder, weights = fmjax.create("t5", config, head="seq2seq_lm", rng=jax.random.key(0))
    text = fmjax.save(tmp_path / "text", decoder, weights, tokenizer)
    processor.save_pretrained(text)
    Image.fromarray(squares(1).images[0]).save(good := tmp_path / "good.png")
    assert "model_type 't5', which writes nothing of pictures" in refused(text, good)


def test_what_could_not_write_is_not_trained(tmp_path):
    """mBART's config, for one, does not say with which token it starts."""
    _, _, tokenizer, processor = pair()
    config = vision_encoder_decoder.VARIANTS["tiny"]
    config = dataclasses.replace(config, decoder_start_token_id=None)
    for train, model, settings, others in (
        (
            train_on_captions,
            vision_encoder_decoder.Model(config, head="seq2seq_lm"),
            CaptionTraining(output=tmp_path),
            {"processor": processor},
        ),
        (
            train_on_pairs,
            mbart.Model(mbart.Config(), head="seq2seq_lm"),
            PairTraining(output=tmp_path),
            {"measure": None, "baselines": {}},
        ),
    ):
        with pytest.raises(ValueError, match="decoder_start_token_id=None"):
            train(settings, model, {}, tokenizer, {}, **others, about={})


def test_a_pair_of_two_models_is_trained_on_texts(tmp_path):
    """Whose config has no tokens of its own but the first and the padding."""
    texts = ["one two", "three four", "five six", "seven eight"]
    tokenizer = train_tokenizer(texts, kind="wordpiece", vocab_size=60)
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 32,
    }  # fmt: skip
    config = encoder_decoder.Config(
        bert.Config(**sizes), bert.Config(**sizes, is_decoder=True, add_cross_attention=True),
        pad_token_id=tokenizer.pad_token_id, decoder_start_token_id=tokenizer.cls_token_id,
    )  # fmt: skip
    model, variables = fmjax.create(
        "encoder-decoder", config, head="seq2seq_lm", rng=jax.random.key(0)
    )
    pairs = {split: TextPairs(texts, texts[::-1]) for split in ("train", "val")}
    results = train_on_pairs(
        PairTraining(output=tmp_path, max_steps=2, batch_size=4, num_beams=1),
        model, variables, tokenizer, pairs, measure=captioning_metrics,
        baselines={"copy": lambda source: source}, about={"source": "a pair", "data": "four texts"},
    )  # fmt: skip
    assert np.isfinite(results["val"]["nll"])


def test_neighbours_and_measures():
    states = np.array([[[1.0, 0.0]], [[0.0, 2.0]]])
    queries = np.array([[[0.1, 9.0]], [[3.0, 1.0]]])
    assert nearest_texts(states, ["first", "second"], queries) == ["second", "first"]
    found = captioning_metrics(["the red fox runs home", "a cat"], ["a red fox runs home", "a dog"])
    assert found["exact_match"] == 0.5
    assert found["token_f1"] == pytest.approx(0.5)
    assert 0 < found["bleu"] < 100
    assert captioning_metrics(["a b c d"], [["x", "a b c d"]])["exact_match"] == 1.0
