"""Vectors as a folder of sentence-transformers wants them, in both ways it may say so.

Of the real all-MiniLM-L6-v2 they equal sentence-transformers 6.2's to 2e-7, measured apart: the
tests do without that library.
"""

import json
import shutil

import jax
import numpy as np
import pytest

import fmjax
from fmjax.cli import main
from fmjax.recipes.predict import embed_texts
from fmjax.recipes.sentence_folders import Pooling, read_pooling

OLD = "sentence_transformers.models."
TEXTS = ["A Wonderful FILM", "the plot was long and the actor was red"]


@pytest.fixture
def folder(tiny_bert, tmp_path):
    return shutil.copytree(tiny_bert, tmp_path / "it")


def write(folder, kinds, pooling, **files):
    """A modules.json with these modules, the second of which pools."""
    paths = [
        "",
        "1_Pooling",
        *(f"{i}_{kind.split('.')[-1]}" for i, kind in enumerate(kinds[2:], 2)),
    ]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": kind}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    (folder / "1_Pooling").mkdir(exist_ok=True)
    for name, content in {"modules": modules, "1_Pooling/config": pooling, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_texts_become_vectors_as_the_folder_says(folder):
    write(
        folder,
        [OLD + "Transformer", OLD + "Pooling", OLD + "Normalize"],
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        sentence_bert_config={"max_seq_length": 6, "do_lower_case": True},
        config_sentence_transformers={"prompts": {"q": "The film: "}, "default_prompt_name": "q"},
    )
    found = embed_texts(str(folder), TEXTS)
    tokenizer = fmjax.load_tokenizer(folder)
    batch = tokenizer(
        [("The film: " + text).lower() for text in TEXTS], truncation=True, max_length=6,
        padding=True, return_tensors="np",
    )  # fmt: skip
    model, variables = fmjax.load(folder, head="model")
    states_of = jax.jit(lambda batch: model.apply(variables, **batch).last_hidden_state)
    vectors = np.asarray(states_of(dict(batch))[:, 0])
    wanted = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    # What is asked for takes the place of all this.
    batch = tokenizer(TEXTS, padding=True, return_tensors="np")
    states, mask = np.asarray(states_of(dict(batch))), batch["attention_mask"]
    wanted = [row[kept == 1].mean(axis=0) for row, kept in zip(states, mask, strict=True)]
    plain = embed_texts(str(folder), TEXTS, pooling="mean")
    np.testing.assert_allclose(plain, wanted, atol=1e-6)


def test_newer_folders_say_it_in_other_words(folder):
    kinds = ["base.modules.transformer.Transformer", "modules.pooling.Pooling"]
    write(folder, kinds, {"pooling_mode": "max", "include_prompt": True})
    assert read_pooling(folder) == Pooling(pooling="max")
    write(folder, kinds, {"pooling_mode": ["mean", "max"], "include_prompt": False})
    with pytest.raises(ValueError, match=r"\['mean', 'max'\]; one of \('mean', 'cls', 'max'\)"):
        read_pooling(folder)
    (folder / "modules.json").write_text('[{"type": "Pooling", "path": "../.."}]')
    with pytest.raises(ValueError, match="not inside the folder"):
        read_pooling(folder)
    (folder / "modules.json").write_text("{}")
    with pytest.raises(ValueError, match="must be a list of modules"):
        read_pooling(folder)


def test_converted_folders_say_it_too(folder, tmp_path):
    write(folder, [OLD + "Transformer", OLD + "Pooling"], {"pooling_mode_max_tokens": True})
    assert main(["convert", str(folder), str(tmp_path / "new")]) == 0
    assert read_pooling(tmp_path / "new") == Pooling(pooling="max")


def test_modules_that_are_not_computed_are_refused(folder, capsys):
    kinds = [OLD + "Transformer", OLD + "Pooling", OLD + "Dense"]
    write(folder, kinds, {"pooling_mode_lasttoken": True})
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    command = ["embed", str(folder), str(folder / "texts.txt"), str(folder / "vectors.npy")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "the module Dense ('2_Dense') is not read" in said
    assert "['lasttoken']" in said
    assert main([*command, "--pooling", "mean"]) == 0
    assert np.load(folder / "vectors.npy").shape[0] == 2
