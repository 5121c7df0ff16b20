"""Runs without classes or numbers: their curves, and samples side by side."""

import json

import pytest

from fmjax.report import save_samples, write_report


@pytest.fixture
def text_run(make_run):
    folder = make_run()
    info = json.loads((folder / "run.json").read_text())
    info["data"] |= {"problem_type": None, "label_names": None, "metric": "nll", "mode": "min"}
    (folder / "run.json").write_text(json.dumps(info))
    rows = [
        {"step": step, "split": "val", "nll": 3.0 - step / 100 if step < 90 else 2.9}
        for step in range(0, 100, 10)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file in folder.glob("predictions_*"):
        file.unlink()
    (folder / "results.json").write_text(json.dumps({"test": {"nll": 2.25}}))
    return folder


def test_the_report_of_a_text_run(text_run, example):
    save_samples(text_run, ("source", "model"), [("one", "eins"), ("two", example.hostile)])
    page = write_report(text_run).read_text()
    assert "Held-out examples" in page
    assert "eins" in page
    assert "<script>" not in page
    assert "<img" not in page
    assert "2.2500" in page or "2.250" in page
    assert "no saved predictions" not in page
    assert "2.2 at step 80." in page  # the lowest value is the best one


def test_pictures_among_the_samples_are_shown(text_run):
    url = "data:image/png;base64,iVBORw0KGgo="
    save_samples(text_run, ("picture", "model"), [(url, f"{url}'>"), ("plain", url)])
    page = write_report(text_run).read_text()
    assert page.count(f'<img class="picture" src="{url}"') == 2
    assert page.count("<img") == 2


def test_samples_that_do_not_fit(text_run):
    with pytest.raises(ValueError, match="sample 1 has 1 texts for 2"):
        save_samples(text_run, ("a", "b"), [("x", "y"), ("z",)])
    assert not (text_run / "samples.json").exists()
    (text_run / "samples.json").write_text('{"columns": ["a", "b"], "rows": [["x"]]}')
    with pytest.raises(ValueError, match="rows that do not fit"):
        write_report(text_run)
    (text_run / "samples.json").write_text("[1]")
    with pytest.raises(ValueError, match="no table of samples"):
        write_report(text_run)
