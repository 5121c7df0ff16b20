"""Bad input at the command line: one clear line, no traceback, exit status 2, nothing left."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

import fmjax
from fmjax import cli, hub
from fmjax.cli import main

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


def refused(capsys, *argv):
    """The message of a command that must end with 2."""
    assert main(list(argv)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    "name", ["bert-mlm-sharded_msgpack", "bert-seqcls", "bert-mlm-sharded_bin", "bert-mlm-legacy"]
)
def test_convert_equals_the_original(name, tmp_path, capsys):
    from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

    assert main(["convert", str(FIXTURES / name), str(tmp_path / "new")]) == 0
    auto = AutoModelForSequenceClassification if "seqcls" in name else AutoModelForMaskedLM
    twin, info = auto.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(info.values()), info
    import torch

    io = np.load(FIXTURES / name / "io.npz")
    inputs = {k[3:]: torch.tensor(io[k]) for k in io.files if k.startswith("in.")}
    inputs.pop("labels", None)
    logits = twin.eval()(**inputs).logits.detach().numpy()
    np.testing.assert_allclose(logits, io["pt.logits"], atol=2e-4 * np.abs(io["pt.logits"]).max())


def test_convert_shards_and_casts(tmp_path):
    source, target = str(FIXTURES / "bert-mlm-legacy"), tmp_path / "new"
    command = ["convert", source, str(target), "--max-shard-size", "40KB", "--dtype", "bfloat16"]
    assert main(command) == 0
    assert (target / "model.safetensors.index.json").exists()
    _, variables = fmjax.load(target)
    import jax

    assert {str(leaf.dtype) for leaf in jax.tree.leaves(variables)} == {"bfloat16"}


def test_missing_and_wrong_models(tmp_path, capsys):
    assert "no folder" in refused(capsys, "info", str(tmp_path / "nowhere"))
    assert "config.json" in refused(capsys, "info", str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "not UTF-8 JSON" in refused(capsys, "info", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert "model.safetensors" in refused(capsys, "predict", str(tmp_path), "text")
    source = str(FIXTURES / "bert-mlm-legacy")
    assert "is the source itself" in refused(capsys, "convert", source, source)
    assert "'5QB'" in refused(
        capsys, "convert", source, str(tmp_path / "x"), "--max-shard-size", "5QB"
    )
    assert not (tmp_path / "x" / "config.json").exists()


def test_a_truncated_file_converts_to_nothing(tmp_path, capsys):
    source = tmp_path / "old"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        data = (FIXTURES / "bert-mlm-legacy" / name).read_bytes()
        (source / name).write_bytes(data[:-100] if name != "config.json" else data)
    refused(capsys, "convert", str(source), str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_texts_that_cannot_be_read(tiny_bert, tmp_path, capsys):
    run = str(tmp_path / "run")

    def finetune(text, *more):
        file = tmp_path / "train.csv"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return refused(
            capsys,
            *("finetune", "--output", run, "--model", str(tiny_bert), "--data", str(file), *more),
        )

    assert "empty" in finetune("")
    assert "label" in finetune("text,kind\na,b\n")
    assert "UTF-8" in finetune(b"text,label\n\xff\xfe,a\n")
    assert "row 3" in finetune("text,label\ngood,a\n,b\n")
    assert "too few" in finetune("text,label\ngood,a\n")
    other = tmp_path / "val.csv"
    other.write_text("text,label\nfilm,never seen\n")
    assert "never seen" in finetune("text,label\nfilm,a\nplot,b\n", "--val", str(other))
    assert "named set" in refused(
        capsys, "finetune", "--output", run, "--data", "sentiment/movie", "--val", "x.csv"
    )
    assert not (tmp_path / "run" / "run.json").exists()


def test_nothing_to_predict(tiny_bert, tmp_path, capsys):
    assert "no texts" in refused(capsys, "predict", str(tiny_bert))
    file = tmp_path / "texts.txt"
    file.write_text("one\n\ntwo\n")
    error = refused(capsys, "embed", str(tiny_bert), str(file), str(tmp_path / "v.npy"))
    assert "lines [2] are empty" in error
    assert not (tmp_path / "v.npy").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_an_unwritable_folder(tiny_bert, tmp_path, capsys):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    error = refused(capsys, "convert", str(tiny_bert), str(locked / "new"))
    assert str(locked) in error


def test_a_file_where_a_folder_should_be(tiny_bert, tmp_path, capsys):
    """What the superuser cannot write to either."""
    (tmp_path / "file").write_text("")
    error = refused(capsys, "convert", str(tiny_bert), str(tmp_path / "file" / "new"))
    assert str(tmp_path / "file") in error
    error = refused(
        capsys, "finetune", "--output", str(tmp_path / "file"), "--model", str(tiny_bert)
    )
    assert str(tmp_path / "file") in error


def test_info_lists_families(capsys, monkeypatch):
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    for name in hub.families():
        assert f"| {name} | {', '.join(hub.family_of(name).HEADS)} |" in readme, name
    monkeypatch.setattr(hub, "families", lambda: ["bert", "gpt2"])  # all take most of a minute
    assert main(["info", "--families"]) == 0
    out = capsys.readouterr().out
    assert "base 109.5 M" in out
    assert all(line in readme for line in out.splitlines())
    assert main(["info"]) == 0
    assert "versions" in capsys.readouterr().out


def test_unknown_options_end_with_2(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["finetune", "--outptu", "x"])
    assert exit_.value.code == 2


def test_a_file_of_weights_alone_is_converted(tmp_path, capsys):
    """As torchvision has them: a state dict, and nothing that says of what."""
    import jax
    import torch

    names = ["cat", "dog", "a bird"]
    model, variables = fmjax.create(
        "vgg", "tiny", head="image_classification", num_labels=names, rng=jax.random.key(0)
    )
    fmjax.save(tmp_path / "known", model, variables)
    from safetensors.torch import load_file

    file = tmp_path / "vgg.pth"
    torch.save(load_file(tmp_path / "known" / "model.safetensors"), file)
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    like = ["--like", "vgg/tiny", "--head", "image_classification"]
    command = ["convert", str(file), str(tmp_path / "new"), *like]
    assert main([*command, "--labels", str(tmp_path / "names.txt")]) == 0
    assert "vgg with head image_classification" in capsys.readouterr().out
    again, read = fmjax.load(tmp_path / "new")
    assert again == model
    for leaf, other in zip(jax.tree.leaves(variables), jax.tree.leaves(read), strict=True):
        np.testing.assert_array_equal(leaf, other)
    assert "classifier.3.weight" in refused(capsys, *command, "--labels", "4")
    assert "like=FAMILY/VARIANT" in refused(capsys, *command[:3])
    assert "has no variant '99'" in refused(capsys, *command[:3], "--like", "vgg/99")
    assert "neither a number" in refused(capsys, *command, "--labels", "nowhere.txt")


def test_what_is_compiled_is_kept_in_the_cache_folder(monkeypatch, tmp_path):
    told = {}
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    cli.keep_what_is_compiled()  # JAX_COMPILATION_CACHE_DIR is set: JAX knows already
    assert told == {}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("FMJAX_HOME", str(tmp_path))
    monkeypatch.setattr("fmjax.perf.device.cpu_name", lambda: "AMD EPYC(tm) 7/9")
    cli.keep_what_is_compiled()
    place = tmp_path / "compiled" / "amd-epyc-tm-7-9"
    assert told["jax_compilation_cache_dir"] == str(place)
