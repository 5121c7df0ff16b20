"""Every experiment, run on a few lines of data and a tiny model by its ordinary arguments."""

import json

import numpy as np
import pytest
from scripts import experiment, write_tagged

import fmjax


@pytest.mark.slow
def test_text_classification(tiny_bert, sentence_files, tmp_path, capsys):
    files = [*("--data", str(sentence_files / "train.csv")), *("--max-length", "32")]
    files += ["--model", str(tiny_bert), "--test", str(sentence_files / "test.csv")]
    experiment("linear_probe").main([*files, "--predict", "a great plot"])
    printed = capsys.readouterr().out
    assert "accuracy" in printed
    assert "a great plot" in printed
    experiment("finetune_text").main(
        [
            *("--output", str(tmp_path / "run"), *files, "--val", str(sentence_files / "val.csv")),
            *("--batch-size", "8", "--epochs", "1", "--no-baseline"),
        ]
    )
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_pos_tagging(tiny_bert, tmp_path, capsys):
    write_tagged(tmp_path)
    run = tmp_path / "run"
    files = [
        part
        for split, name in (("data", "train"), ("val", "val"), ("test", "test"))
        for part in (f"--{split}", str(tmp_path / f"{name}.conll"))
    ]
    experiment("pos_tagging").main(
        [
            *("--output", str(run), "--model", str(tiny_bert), *files, "--epochs", "6"),
            *("--batch-size", "8", "--learning-rate", "1e-2", "--max-length", "16"),
            *("--evaluations", "1"),
        ]
    )
    results = json.loads((run / "results.json").read_text())
    assert results["test"]["accuracy"] > 0.9
    assert "accuracy" in capsys.readouterr().out
    for name in ("report.html", "samples.json", "export/model.safetensors"):
        assert (run / name).exists(), name


TEXTS = [
    f"the {adjective} {noun} is {mood}, and the {noun} was {adjective} .\nit is {mood} ."
    for adjective in ("old", "new", "red", "long")
    for noun in ("film", "story", "plot", "scene", "actor")
    for mood in ("good", "bad", "quiet")
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Arguments that name three small text files."""
    folder = tmp_path_factory.mktemp("corpus")
    parts = {"data": TEXTS[6:] * 3, "val": TEXTS[:3], "test": TEXTS[3:6]}
    arguments = []
    for name, texts in parts.items():
        (folder / f"{name}.txt").write_text("\n\n".join(texts) + "\n")
        arguments += [f"--{name}", str(folder / f"{name}.txt")]
    return arguments


@pytest.mark.slow
def test_pretrain_gpt(corpus, tmp_path, capsys):
    run = tmp_path / "run"
    experiment("pretrain_gpt").main(
        [
            *("--output", str(run), *corpus, "--vocab-size", "300", "--layers", "1"),
            *("--width", "32", "--length", "32", "--batch-size", "4", "--epochs", "4"),
            *("--learning-rate", "1e-2", "--sample-tokens", "8", "--ngram", "3"),
        ]
    )
    results = json.loads((run / "results.json").read_text())
    bits = results["test"]["bits_per_byte"]
    assert 0 < bits < 2  # a random model of 300 tokens has about 3
    assert results["baselines"]["byte 3-gram"]["test"]["bits_per_byte"] < 2
    assert len(results["samples"]) >= 1
    assert "bits per byte" in capsys.readouterr().out
    assert (run / "export" / "tokenizer.json").exists()


@pytest.mark.slow
def test_pretrain_bert(corpus, tmp_path, capsys):
    write_tagged(tmp_path)
    run = tmp_path / "run"
    tagged = {"tagged": "train", "tagged-val": "val", "tagged-test": "test"}
    files = [
        part
        for name, split in tagged.items()
        for part in (f"--{name}", f"{tmp_path}/{split}.conll")
    ]
    experiment("pretrain_bert").main(
        [
            *("--output", str(run), *corpus, *files, "--vocab-size", "120", "--layers", "1"),
            *("--width", "32", "--max-length", "24", "--batch-size", "8", "--copies", "6"),
            *("--learning-rate", "1e-2", "--tagged-epochs", "1", "--evaluations", "1"),
        ]
    )
    results = json.loads((run / "results.json").read_text())
    assert results["test"]["masked_accuracy"] > 0.3
    assert 0 <= results["test"]["next_sentence_accuracy"] <= 1
    for name in ("pretrained", "random"):
        assert 0 < results["tagging"][name]["test"]["accuracy"] <= 1
        assert (run / f"tagged-{name}" / "report.html").exists()
    assert "tagging from pretrained weights" in capsys.readouterr().out


def write_pairs(folder, columns, **splits):
    """Three .tsv files, and the arguments that name them."""
    arguments = []
    for name, rows in splits.items():
        lines = ["\t".join(columns), *("\t".join(row) for row in rows)]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
        arguments += [f"--{name}", str(folder / f"{name}.tsv")]
    return arguments


@pytest.mark.slow
def test_retrieval(tiny_bert, tmp_path, capsys):
    """Passages have no word of their query; which belong together must be learnt."""
    words = "film story actor plot scene music long short quiet loud red blue".split()

    def rows(*others):
        pairs = zip(words, [*words[5:], *words[:5]], strict=True)
        return [(query, f"{passage} {other}") for query, passage in pairs for other in others]

    files = write_pairs(
        tmp_path, ("query", "passage"), data=rows(*["wonderful", "dull", "great"] * 10),
        val=rows("lovely"), test=rows("awful"),
    )  # fmt: skip
    run = tmp_path / "run"
    experiment("retrieval").main(
        [
            *("--output", str(run), "--model", str(tiny_bert), *files, "--batch-size", "12"),
            *("--epochs", "4", "--learning-rate", "3e-3", "--max-length", "16"),
            *("--temperature", "0.1", "--evaluations", "1"),
        ]
    )
    results = json.loads((run / "results.json").read_text())
    before = results["baselines"]["before"]["test"]
    assert before.keys() == results["test"].keys()
    assert results["test"]["mrr"] > before["mrr"] + 0.1
    assert "after" in capsys.readouterr().out


@pytest.mark.slow
def test_question_answering(tiny_bert, tmp_path, capsys):
    module = experiment("question_answering")
    words = "film story actor plot scene music".split()
    glosses = module.TextPairs(
        sources=words, targets=["long red", "quiet blue", "loud", "short", "lovely red", "dull"]
    )
    made = module.make_questions(glosses, 40, 3, seed=0)
    for context, answers in zip(made.contexts, made.answers, strict=True):
        for text, start in answers:
            assert context[start : start + len(text)] == text
    assert 0 < sum(not answers for answers in made.answers) < 20
    paragraphs = [
        {
            "context": context,
            "qas": [
                {
                    "id": name, "question": question, "is_impossible": not answers,
                    "answers": [{"text": a.text, "answer_start": a.start} for a in answers],
                }
            ],
        }
        for name, question, context, answers in zip(
            made.ids, made.questions, made.contexts, made.answers, strict=True
        )
    ]  # fmt: skip
    file = tmp_path / "train.json"
    file.write_text(
        json.dumps({"version": "2.0", "data": [{"title": "t", "paragraphs": paragraphs}]})
    )
    run = tmp_path / "run"
    module.main(
        [
            *("--output", str(run), "--model", str(tiny_bert), "--data", str(file)),
            *("--test", str(file), "--epochs", "2", "--batch-size", "8", "--max-length", "32"),
            *("--doc-stride", "8", "--max-question-length", "8"),
        ]
    )
    results = json.loads((run / "results.json").read_text())
    assert 0 <= results["test"]["f1"] <= 100
    assert 0 <= results["baselines"]["before"]["test"]["f1"] <= 100
    assert "f1" in capsys.readouterr().out
    assert (run / "samples.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "score"),
    [("translate", "bleu"), pytest.param("summarise", "rouge1", marks=pytest.mark.slow)],
)
def test_sequence_to_sequence(name, score, tmp_path, capsys):
    pairs = [
        (f"the {adjective} {noun}", f"das {noun} {adjective}")
        for adjective in ("old", "new", "red", "long", "blue", "loud")
        for noun in ("film", "plot", "cat", "dog", "scene", "tree")
    ]
    columns = ("source", "target")
    files = write_pairs(tmp_path, columns, data=pairs[6:] * 2, val=pairs[:3], test=pairs[3:6])
    run = tmp_path / "run"
    experiment(name).main(
        [
            *("--output", str(run), *files, "--vocab-size", "60", "--layers", "1", "--width", "32"),
            *("--epochs", "4", "--batch-size", "8", "--max-length", "16"),
            *("--max-target-length", "8"),
        ]
    )
    results = json.loads((run / "results.json").read_text())
    assert 0 <= results["test"][score] <= 100
    assert results["test"]["nll"] < 4  # about log(60) before training
    assert "test" in capsys.readouterr().out
    assert (run / "export" / "generation_config.json").exists()


@pytest.mark.slow
def test_mnist_cnn(stripes, tmp_path, capsys):
    """Pictures in folders, augmented; the processor that it leaves is read by transformers."""
    from PIL import Image
    from transformers import AutoImageProcessor

    run = tmp_path / "run"
    arguments = [
        *("--output", str(run), "--data", str(stripes), "--model", "cnn/tiny"),
        *("--epochs", "3", "--batch-size", "4", "--learning-rate", "1e-2", "--flip"),
        *("--shift", "1", "--erase", "0.1"),
    ]
    experiment("mnist_cnn").main(arguments)
    assert "test accuracy" in capsys.readouterr().out
    results = json.loads((run / "results.json").read_text())
    assert results["test"]["accuracy"] > 0.85
    assert (run / "export" / "model.safetensors").exists()
    processor = AutoImageProcessor.from_pretrained(run / "export", backend="pil")
    picture = Image.open(stripes / "test" / "rows" / "0.png")
    pixels = processor(picture, return_tensors="np")["pixel_values"]
    assert abs(float(pixels.mean())) < 0.5
    # The model it left, fine-tuned and probed.
    other = tmp_path / "other"
    experiment("finetune_image").main(
        [
            *("--output", str(other), "--data", str(stripes), "--no-photos"),
            *("--model", str(run / "export"), "--image-size", "8", "--epochs", "2"),
            *("--batch-size", "4", "--shift", "0", "--learning-rate", "1e-2", "--no-scratch"),
        ]
    )
    compared = json.loads((other / "results.json").read_text())
    for name in ("finetuned", "linear probe"):
        assert compared[name]["test"]["accuracy"] > 0.7, name
    assert "linear probe: val accuracy" in capsys.readouterr().out
    settings = [
        json.loads((r / "export" / "preprocessor_config.json").read_text())
        for r in (run, other / "finetuned")
    ]
    assert settings[0]["image_mean"] == settings[1]["image_mean"]
    with pytest.raises(ValueError, match="both blend labels"):
        experiment("mnist_cnn").main([*arguments, "--mixup", "0.2", "--cutmix", "1"])
    with pytest.raises(FileNotFoundError, match="nor a folder with"):
        experiment("mnist_cnn").main(["--output", str(run), "--data", "nowhere"])


@pytest.mark.slow
def test_pretrain_mae(stripes, tmp_path, capsys):
    run = tmp_path / "run"
    experiment("pretrain_mae").main(
        [
            *("--output", str(run), "--data", str(stripes), "--patch", "2", "--layers", "1"),
            *("--width", "32", "--epochs", "3", "--batch-size", "4", "--learning-rate", "1e-2"),
        ]
    )
    results = json.loads((run / "results.json").read_text())
    assert results["test"]["loss"] < 0.9  # of patches normalised to a variance of 1
    for when in ("before", "after"):
        assert results["linear probe"][when]["test"]["accuracy"] > 0.4
    for name in ("reconstructions.png", "report.html", "export/preprocessor_config.json"):
        assert (run / name).exists(), name
    assert "linear probe" in capsys.readouterr().out


@pytest.fixture
def disks(monkeypatch):
    """Disks of one colour a class on gray, in place of emoji on photographs, a download."""
    from fmjax.data import scenes

    def parts(split, names):
        rows, columns = np.mgrid[:16, :16] - 7.5
        alpha = np.where(rows**2 + columns**2 < 49, 255, 0).astype(np.uint8)[..., None]
        colours = np.uint8([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]])[: len(names)]
        pictures = [np.concatenate([np.tile(c, (16, 16, 1)), alpha], axis=-1) for c in colours]
        photograph = np.full((100, 150, 3), 100, np.uint8)
        return scenes.SceneParts(split, (photograph,), tuple((one,) for one in pictures))

    monkeypatch.setattr(scenes, "load_parts", parts)


@pytest.mark.slow
@pytest.mark.usefixtures("disks")
def test_detect(tmp_path, capsys):
    from fmjax.report.markup import picture

    run = tmp_path / "run"
    experiment("detect").main(
        [
            *("--output", str(run), "--scenes", "32", "--size", "16", "--objects", "2"),
            *("--widths", "8", "--width", "16", "--layers", "1", "1", "--queries", "4"),
            *("--epochs", "1", "--batch-size", "8", "--threshold", "0.1"),
        ]
    )
    assert "test mAP" in capsys.readouterr().out
    results = json.loads((run / "results.json").read_text())
    assert 0 <= results["test"]["map"] <= results["test"]["map_50"] <= 1
    samples = json.loads((run / "samples.json").read_text())
    assert len(samples["rows"]) == 4
    for row in samples["rows"]:
        assert all(map(picture, row))
        assert row[0] in (run / "report.html").read_text()
    _, variables = fmjax.load(run / "export")
    moved = variables["batch_stats"]["backbone"]["embed"]["norm"]["mean"]
    assert np.abs(moved).max() > 0.01


@pytest.mark.slow
@pytest.mark.usefixtures("disks")
def test_segment(tmp_path, capsys):
    run = tmp_path / "run"
    experiment("segment").main(
        [
            *("--output", str(run), "--classes", "red", "green", "--image-size", "32"),
            *("--train-scenes", "160", "--held-out-scenes", "10", "--width", "16", "--depth", "1"),
            *("--stages", "1", "--epochs", "3", "--batch-size", "8", "--learning-rate", "1e-2"),
            *("--drawings", "3"),
        ]
    )
    results = json.loads((run / "results.json").read_text())
    assert results["test"]["mean_iou"] > 0.5  # of the background alone about 0.3
    assert "green: test IoU 0." in capsys.readouterr().out
    assert (run / "report.html").read_text().count("<img") == 9
    assert (run / "export" / "preprocessor_config.json").exists()
