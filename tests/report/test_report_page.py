"""The page of a run: well-formed, self-contained, escaped, and true to the files."""

import json
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from fmjax.metrics import expected_calibration_error
from fmjax.report import load_run, save_predictions, write_report
from fmjax.report.markup import Markup, count, duration, escape, score, short
from fmjax.report.summary import wilson_interval

VOID = {"meta", "br", "hr", "img", "input", "link"}
MINUS = "\N{MINUS SIGN}"


class Page(HTMLParser):
    """Parses a page strictly: every element closes in order; keeps what the tests ask about."""

    def __init__(self, path):
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._caption = ""
        self.feed(path.read_text("utf-8"))
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "caption":
            self._caption = ""
        elif tag == "tr":
            self.tables.setdefault(self._caption, []).append([])
        elif tag in ("th", "td"):
            self.tables[self._caption][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" in self.stack:
            return
        self.text.append(data)
        if "caption" in self.stack:
            self._caption += data
        elif {"td", "th"} & set(self.stack):
            self.tables[self._caption][-1][-1] += data

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def table(self, start: str) -> list[list[str]]:
        """The rows of the table whose caption starts so."""
        return next(rows for caption, rows in self.tables.items() if caption.startswith(start))

    def ids(self) -> list[str]:
        return [attrs["id"] for _, attrs in self.tags if "id" in attrs]


def sections(page: Page) -> list[str]:
    return [attrs["id"] for tag, attrs in page.tags if tag == "section"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, example):
    folder = example.write_run(tmp_path_factory.mktemp("report") / "run")
    path = write_report(folder)
    assert path == folder / "report.html"
    return folder, Page(path)


def test_every_section_is_there_and_linked(finished):
    _, page = finished
    expected = ["summary", "training", "confusion", "classes", "calibration", "mistakes"]
    expected += ["settings", "environment"]
    assert sections(page) == expected
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert links == ["#main", *(f"#{name}" for name in expected)]
    assert len(page.ids()) == len(set(page.ids()))
    titles = ["Loss", "Accuracy", "Learning rate", "Gradient norm"]
    titles += ["Examples per second", "Tokens per second", "Reliability diagram"]
    assert all(title in page.words for title in titles)
    assert sum(tag == "svg" for tag, _ in page.tags) == len(titles)
    assert all(attrs.get("aria-label") for tag, attrs in page.tags if tag == "svg")


def test_the_page_asks_for_nothing(finished):
    folder, page = finished
    source = (folder / "report.html").read_text("utf-8")
    assert "http:" not in source
    assert "https:" not in source
    assert "@import" not in source
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {t for t, _ in page.tags}
    targets = [
        attrs[key]
        for _, attrs in page.tags
        for key in ("src", "href", "xlink:href")
        if key in attrs
    ]
    assert targets
    assert all(target.startswith("#") for target in targets)
    policy = [
        a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_texts_and_names_are_escaped(finished, example):
    folder, page = finished
    source = (folder / "report.html").read_text("utf-8")
    assert "<script" not in source
    assert "&lt;script&gt;alert(&#x27;pwned&#x27;)&lt;/script&gt;" in source
    assert "<b>" not in source
    assert example.hostile in page.table("20 of")[1][0]
    assert "movie-reviews <b>first</b>" in page.words
    assert "&& echo <done>" in page.words


def test_numbers_are_those_of_the_files(finished):
    folder, page = finished
    results = json.loads((folder / "results.json").read_text())
    rows = {row[0]: row[1:] for row in page.table("Scores of this run")}
    assert rows["metric"] == [
        "this run, test",
        "this run, val",
        "linear probe, test",
        "linear probe, val",
    ]
    accuracy = results["test"]["accuracy"]
    assert rows["Accuracy"] == [f"{accuracy:.4f}", "0.8134", "0.7712", "0.7655"]
    assert rows["Macro F1"] == [f"{results['test']['macro_f1']:.4f}", "", "", ""]
    assert rows["Loss"] == ["", "0.4402", "", ""]
    assert f"Test accuracy {accuracy:.4f}" in page.words
    assert f"+{100 * (accuracy - 0.7712):.1f} points; linear probe has 0.7712" in page.words
    assert "Time 3 min 42 s" in page.words  # 0.9 + 214.6 + 6.4
    assert "795 training steps" in page.words

    test = load_run(folder).predictions["test"]
    assert test.probabilities is not None
    predicted = test.probabilities.argmax(axis=1)
    matrix = [
        [int(((test.labels == t) & (predicted == p)).sum()) for p in range(2)] for t in range(2)
    ]
    shown = page.table("Rows are the true class")[1:]
    for row, counts in zip(shown, matrix, strict=True):
        shares = [f"{n}{100 * n / sum(counts):.1f} %" for n in counts]
        assert row[1:] == shares
    classes = {row[0]: row[1:] for row in page.table("Precision, recall")}
    report = results["test"]["report"]
    for name in ("negative", "positive", "macro avg"):
        values = report[name]
        assert classes[name] == [
            *(f"{values[key]:.4f}" for key in ("precision", "recall", "f1-score")),
            f"{values['support']:.0f}",
        ]
    error = expected_calibration_error(test.probabilities, test.labels)
    assert f"Expected calibration error {error:.4f} over 15 bins" in page.words
    assert sum(int(row[-1]) for row in page.table("Reliability by bin")[1:]) == 400


def test_mistakes_are_the_most_confident_ones_in_order(finished):
    folder, page = finished
    test = load_run(folder).predictions["test"]
    assert test.probabilities is not None
    predicted = test.probabilities.argmax(axis=1)
    wrong = [i for i in range(400) if predicted[i] != test.labels[i]]
    wrong.sort(key=lambda i: -test.probabilities[i].max())  # type: ignore[index]
    rows = page.table(f"20 of {len(wrong)} mistakes")[1:]
    assert len(rows) == 20
    names = ["negative", "positive"]
    for row, index in zip(rows, wrong[:20], strict=True):
        text = row[0].replace("\N{HORIZONTAL ELLIPSIS}", "")
        assert text == test.texts[index]
        assert row[1:3] == [names[test.labels[index]], names[predicted[index]]]
        assert row[3] == f"{test.probabilities[index].max():.4f}"
    assert "END-OF-LONG-TEXT" in rows[1][0]


def test_settings_versions_and_hardware(finished):
    _, page = finished
    settings = {row[0]: row[1] for row in page.table("Every setting")[1:]}
    assert settings == {
        "epochs": "3",
        "batch_size": "32",
        "optimizer.name": "adamw",
        "optimizer.learning_rate": "5e-05",
        "optimizer.weight_decay": "0.01",
        "buckets": "16, 32, 64",
        "freeze": "none",
        "resume": "yes",
    }
    assert ["jax", "0.10.2"] in page.table("Package versions")
    assert ["Memory", "8.0 GiB"] in page.table("Machine")
    devices = "2 x NVIDIA H200 (gpu, 139.7 GiB), 1 x cpu (cpu)"
    assert ["Devices", devices.replace(" x ", " \N{MULTIPLICATION SIGN} ")] in page.table("Machine")
    assert ["Processor", "Some CPU @ 2.60GHz"] in page.table("Machine")
    assert ["Parameters", "22,713,986, 22,713,986 trained"] in page.table("What was run")


def test_evaluations_are_also_a_table(finished, example):
    _, page = finished
    rows = page.table("Validation by step")
    assert rows[0] == ["step", "loss", "accuracy"]
    assert [row[0] for row in rows[1:]] == [str(step) for step in range(50, 796, 50)]
    first = next(row for row in example.metric_rows("accuracy") if row["split"] == "val")
    assert rows[1] == ["50", f"{first['loss']:.4g}", f"{first['accuracy']:.4g}"]


def test_an_interrupted_run_says_so(make_run):
    folder = make_run()
    for name in ("results.json", "predictions_test.npz", "predictions_test.texts.json"):
        (folder / name).unlink()
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:3000])
    page = Page(write_report(folder))
    assert sections(page) == ["summary", "training", "predictions", "settings", "environment"]
    assert "interrupted before its final evaluation" in page.words
    assert "no saved predictions" in page.words
    assert "Test accuracy" not in page.words
    rows = [row for row in load_run(folder).metrics if row["split"] == "train"]
    assert f"Time {1.35 * len(rows):.0f} s {rows[-1]['step']} training steps" in page.words
    metrics.unlink()
    page = Page(write_report(folder))
    assert "Nothing was logged" in page.words
    assert not any(tag == "svg" for tag, _ in page.tags)


def test_charts_only_for_what_was_logged(make_run):
    folder = make_run()
    rows = [{"step": step, "split": "train", "loss": 1.0 / step} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report(folder))
    labels = [attrs["aria-label"] for tag, attrs in page.tags if tag == "svg"]
    assert len(labels) == 2
    assert labels[0].startswith(
        "Loss over training steps: training goes from 1 at step 1 to 0.3333"
    )
    assert labels[1].startswith("Reliability diagram")


@pytest.mark.parametrize("broken", [None, float("inf"), float("nan")])
def test_a_loss_that_broke_is_announced(make_run, broken):
    folder = make_run()
    rows = [
        {"step": step, "split": "train", "loss": loss, "grad_norm": 0.0}
        for step, loss in ((1, 0.7), (2, broken), (3, broken))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(write_report(folder))
    assert "The training loss stopped being finite at step 2." in page.words


@pytest.mark.parametrize(
    ("metric", "mode", "said"),
    [
        ("wer", "min", f"Against the best baseline {MINUS}0.1000 lower is better; good has 0.2000"),
        ("bleu", "max", f"Over the best baseline {MINUS}80.0 points; awful has 0.9000"),
    ],
)
def test_the_best_baseline_is_the_lowest_of_errors(make_run, metric, mode, said):
    folder = make_run()
    for name in ("predictions_test.npz", "predictions_test.texts.json"):
        (folder / name).unlink()
    info = json.loads((folder / "run.json").read_text())
    info["data"] |= {"problem_type": None, "label_names": None, "metric": metric, "mode": mode}
    (folder / "run.json").write_text(json.dumps(info))
    rivals = {"good": {"test": {metric: 0.2}}, "awful": {"test": {metric: 0.9}}}
    results = {"test": {metric: 0.1}, "baselines": rivals, "seconds": {}}
    (folder / "results.json").write_text(json.dumps(results))
    assert said in Page(write_report(folder)).words


def test_predictions_of_another_evaluation_are_announced(make_run):
    folder = make_run()
    assert "different evaluations" not in Page(write_report(folder)).words
    results = json.loads((folder / "results.json").read_text())
    results["test"]["accuracy"] = 0.9
    (folder / "results.json").write_text(json.dumps(results))
    assert (
        "test accuracy 0.9000, the saved predictions give 0.8" in Page(write_report(folder)).words
    )


def test_validation_predictions_stand_in_for_test(make_run):
    folder = make_run()
    for name in ("predictions_test.npz", "predictions_test.texts.json"):
        (folder / name).unlink()
    perfect = np.array([[0.9, 0.1], [0.2, 0.8]])
    save_predictions(folder, "val", probabilities=perfect, labels=[0, 1], texts=["a", "b"])
    page = Page(write_report(folder))
    assert "Confusion, val split" in page.words
    assert "Every prediction is right." in page.words


def test_many_classes_show_the_confused_pairs(make_run):
    page = Page(write_report(make_run(classes=40)))
    rows = page.table("The most frequent confusions among 40")
    counts = [int(row[2]) for row in rows[1:]]
    assert len(counts) == 20
    assert counts == sorted(counts, reverse=True)
    assert all(row[0] != row[1] for row in rows[1:])


def test_regression_sections(make_run, example):
    folder = make_run(problem_type="regression")
    page = Page(write_report(folder))
    expected = ["summary", "training", "scatter", "mistakes", "settings", "environment"]
    assert sections(page) == expected
    scores = json.loads((folder / "results.json").read_text())["test"]
    assert f"Test pearson correlation {scores['pearson']:.4f}" in page.words
    part = load_run(folder).predictions["test"]
    assert part.predictions is not None
    errors = part.predictions.astype(float) - part.labels
    worst = int(np.argmax(np.abs(errors)))
    row = page.table("20 of 400 predictions")[1]
    assert row[0] == example.hostile
    assert row[3] == f"{errors[worst]:.4f}".replace("-", MINUS)


def test_multi_label_sections(make_run, example):
    folder = make_run(problem_type="multi_label_classification", classes=4)
    page = Page(write_report(folder))
    expected = ["summary", "training", "classes", "mistakes", "settings", "environment"]
    assert sections(page) == expected
    report = json.loads((folder / "results.json").read_text())["test"]["report"]
    rows = {row[0]: row[1:] for row in page.table("Precision, recall")}
    assert rows["class 2"][2] == f"{report['class 2']['f1-score']:.4f}"
    part = load_run(folder).predictions["test"]
    assert part.probabilities is not None
    wrong = int(((part.probabilities >= 0.5) != part.labels).sum())
    mistakes = page.table(f"20 of {wrong} wrong decisions")[1:]
    assert mistakes[0][0] == example.hostile
    distances = [abs(float(row[4]) - 0.5) for row in mistakes]
    assert distances == sorted(distances, reverse=True)
    assert all((row[2] == "yes") != (float(row[4]) >= 0.5) for row in mistakes)


def test_predictions_out_of_range_name_their_file(make_run):
    folder = make_run()
    save_predictions(folder, "test", probabilities=[[0.5, 0.5]], labels=[2], texts=["a"])
    with pytest.raises(ValueError, match=r"predictions_test\.npz: .*\n.*outside 0\.\.1"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_lone_surrogates_do_not_stop_the_page(make_run):
    folder = make_run()
    save_predictions(folder, "test", probabilities=[[0.9, 0.1]], labels=[1], texts=["\ud800 x"])
    assert "? x" in Page(write_report(folder)).words


def test_importing_the_report_loads_no_plotting_library():
    code = "import sys, fmjax.report; print({'matplotlib', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_wilson_interval():
    # Newcombe 1998, Statistics in Medicine 17, 857-872, table I: 81 of 263 gives 0.2553 to 0.3662.
    low, high = wilson_interval(81 / 263, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson_interval(1.0, 10)[1] == pytest.approx(1.0)


def test_numbers_in_words():
    assert [duration(s) for s in (0.84, 42, 185, 7800, 3599.9)] == [
        "0.8 s",
        "42 s",
        "3 min 05 s",
        "2 h 10 min",
        "1 h 00 min",
    ]
    assert score(-0.5) == f"{MINUS}0.5000"
    assert count(22713986) == "22,713,986"
    assert [short(v) for v in (0.69314, 2e-5, 3115.4, 98765.0, 1e30, float("inf"))] == [
        "0.6931",
        "2e-05",
        "3,115",
        "98,765",
        "1e+30",
        "inf",
    ]


def test_escape_leaves_markup_alone():
    assert escape("<b>") == "&lt;b&gt;"
    assert escape(Markup("<b>")) == "<b>"
