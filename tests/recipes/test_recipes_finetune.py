"""The whole flow on a tiny model: fine-tune, be killed, resume, report, export, predict."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fmjax
from fmjax.cli import main
from fmjax.recipes.predict import predict_texts

ROOT = Path(__file__).resolve().parent.parent.parent


def arguments(tiny_bert, files, run, *more):
    return [
        "finetune",
        *("--output", str(run), "--model", str(tiny_bert), "--max-length", "32"),
        *("--data", str(files / "train.csv"), "--val", str(files / "val.csv")),
        *("--test", str(files / "test.csv"), "--batch-size", "8", "--epochs", "6"),
        *("--learning-rate", "5e-3", "--evaluations", "1", *more),
    ]


@pytest.fixture(scope="module")
def run(tiny_bert, sentence_files, tmp_path_factory):
    """A finished run, in this process."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main(arguments(tiny_bert, sentence_files, folder)) == 0
    return folder


def test_it_learns_and_leaves_everything(run):
    results = json.loads((run / "results.json").read_text())
    assert results["test"]["accuracy"] >= 0.9
    assert set(results["baselines"]["linear probe"]) == {"val", "test"}
    for name in ("run.json", "metrics.jsonl", "report.html", "predictions_test.npz", "tb"):
        assert (run / name).exists(), name
    assert "report.html" not in (run / "report.html").read_text()[:20]
    info = json.loads((run / "run.json").read_text())
    assert info["data"]["splits"] == {"train": 150, "val": 40, "test": 41}
    assert info["data"]["label_names"] == ["bad", "good"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {row["split"] for row in rows} == {"train", "val"}
    best = max(row["accuracy"] for row in rows if row["split"] == "val")
    assert results["val"]["accuracy"] == pytest.approx(best)


def test_pytorch_loads_the_export_and_agrees(run):
    model, info = AutoModelForSequenceClassification.from_pretrained(
        run / "export", output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.config.id2label == {0: "bad", 1: "good"}
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    texts = ["a wonderful film", "boring and long", "music"]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    theirs = model.eval()(**encoded).logits.detach().numpy()
    ours, variables = fmjax.load(run / "export")
    logits = ours.apply(variables, **{k: v.numpy() for k, v in encoded.items()}).logits
    np.testing.assert_allclose(logits, theirs, atol=1e-5)
    names, rows = predict_texts(str(run / "export"), texts)
    assert names == ("bad", "good")
    exp = np.exp(theirs - theirs.max(axis=-1, keepdims=True))
    np.testing.assert_allclose(rows, exp / exp.sum(axis=-1, keepdims=True), atol=1e-5)


def start(tiny_bert, files, folder):
    command = arguments(tiny_bert, files, folder, "--no-baseline")
    return subprocess.Popen(
        [sys.executable, "-m", "fmjax", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow  # tests/train/test_train_resume.py kills the loop at each kind of moment
def test_killed_and_restarted_is_bitwise_the_same(run, tiny_bert, sentence_files, tmp_path):
    """The real stream of batches, killed in the middle of training, against the run above."""
    folder = tmp_path / "killed"
    process = start(tiny_bert, sentence_files, folder)
    file, deadline = folder / "metrics.jsonl", time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if file.exists() and len(file.read_text().splitlines()) >= 5:  # records
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process = start(tiny_bert, sentence_files, folder)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    for name in ("export/model.safetensors", "predictions_test.npz"):
        assert (folder / name).read_bytes() == (run / name).read_bytes(), name

    def numbers(path):
        timed = ("seconds", "examples_per_second", "tokens_per_second")
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k not in timed} for row in rows]

    assert numbers(folder) == numbers(run)


def test_a_finished_run_is_not_trained_again(run, tiny_bert, sentence_files, capsys):
    before = (run / "export" / "model.safetensors").read_bytes()
    assert main(arguments(tiny_bert, sentence_files, run)) == 0
    assert (run / "export" / "model.safetensors").read_bytes() == before


def test_other_settings_on_the_same_folder_are_refused(run, tiny_bert, sentence_files, capsys):
    before = (run / "run.json").read_bytes()
    assert main(arguments(tiny_bert, sentence_files, run, "--seed", "7")) == 2
    assert "seed: 0 in the checkpoint, 7 now" in capsys.readouterr().err
    assert (run / "run.json").read_bytes() == before


def test_texts_of_one_label_are_refused(tiny_bert, tmp_path, capsys):
    """Before anything is trained."""
    (tmp_path / "one.csv").write_text("text,label\na film,good\na plot,good\n")
    files = [option for name in ("--data", "--val") for option in (name, str(tmp_path / "one.csv"))]
    where = ["--output", str(tmp_path / "run"), "--model", str(tiny_bert)]
    assert main(["finetune", *where, *files]) == 2
    assert "all 2 training texts have the label 'good'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_commands_on_the_export(run, sentence_files, tmp_path, capsys):
    export = str(run / "export")
    assert main(["predict", export, "a lovely story", "an awful scene", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [max(line["scores"], key=line["scores"].get) for line in lines] == ["good", "bad"]

    assert main(["evaluate", export, "--data", str(sentence_files / "test.csv"), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    results = json.loads((run / "results.json").read_text())
    assert metrics["accuracy"] == results["test"]["accuracy"]
    with pytest.raises(SystemExit):  # it is no option, and not one without effect
        main(["evaluate", export, "--test", str(sentence_files / "test.csv")])
    capsys.readouterr()

    pair = ["a lovely story", "--text-pair", "an awful scene"]
    assert main(["predict", export, *pair, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["text"], found["text_pair"]) == (pair[0], pair[2])
    model, variables = fmjax.load(export)
    batch = fmjax.load_tokenizer(export)(pair[0], pair[2], return_tensors="np")
    assert batch["token_type_ids"].max() == 1
    logits = np.asarray(model.apply(variables, **batch).logits[0], np.float64)
    np.testing.assert_allclose(
        list(found["scores"].values()), np.exp(logits) / np.exp(logits).sum(), atol=1e-5
    )
    assert main(["predict", export, "a story", *pair]) == 2
    assert "1 text_pairs for 2 texts" in capsys.readouterr().err

    texts = tmp_path / "texts.txt"
    texts.write_text("a film\nthe plot\n")
    assert main(["embed", export, str(texts), str(tmp_path / "v.npy")]) == 0
    assert np.load(tmp_path / "v.npy").shape == (2, 16)
    capsys.readouterr()

    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert main(["info", export]) == 0
    assert "BertForSequenceClassification" in capsys.readouterr().out
