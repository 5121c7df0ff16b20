"""Run folders: predictions there and back, torn and malformed files, folders that are no runs."""

import json
import zipfile

import numpy as np
import pytest

from fmjax.report import atomic_write, load_run, save_predictions

PROBABILITIES = np.array([[0.25, 0.75], [0.5, 0.5]], np.float32)


def edit(path, change):
    """Rewrite a JSON file after `change` has worked on its content."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_predictions_come_back_as_saved(make_run):
    folder = make_run()
    texts = ["naïve \ud800 <b>", "line\nbreak"]
    save_predictions(folder, "val", probabilities=PROBABILITIES, labels=[1, 0], texts=texts)
    part = load_run(folder).predictions["val"]
    np.testing.assert_array_equal(part.probabilities, PROBABILITIES)
    assert part.probabilities is not None
    assert part.probabilities.dtype == np.float32
    np.testing.assert_array_equal(part.labels, [1, 0])
    assert part.texts == texts
    assert part.predictions is None
    assert set(load_run(folder).predictions) == {"test", "val"}


def test_saving_again_replaces_and_leaves_no_other_files(make_run):
    folder = make_run()
    before = sorted(path.name for path in folder.iterdir())
    save_predictions(folder, "test", probabilities=PROBABILITIES, labels=[1, 0], texts=["a", "b"])
    assert sorted(path.name for path in folder.iterdir()) == before
    assert load_run(folder).predictions["test"].texts == ["a", "b"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probabilities": None}, "not neither"),
        ({"predictions": [1.0, 2.0]}, "not both"),
        ({"labels": [1]}, "1 labels for 2 rows"),
        ({"labels": [0.0, 1.0]}, "class labels are integers"),
        ({"labels": [[0, 1, 1], [1, 0, 0]]}, r"labels have shape \(2, 3\)"),
        ({"texts": ["a"]}, "1 texts for 2 rows"),
        ({"texts": ["a", 7]}, "1 texts are not strings, the first at row 1"),
        ({"probabilities": [0.5, 0.5]}, r"expected \[N, C\]"),
        ({"probabilities": [[np.nan, 1.0], [0.5, 0.5]]}, "NaN or infinity"),
        ({"probabilities": np.zeros((0, 2)), "labels": [], "texts": []}, "are empty"),
        ({"labels": [None, "x"]}, "expected numbers"),
    ],
)
def test_bad_predictions_are_refused_and_nothing_is_written(tmp_path, options, message):
    arguments = {"probabilities": PROBABILITIES, "labels": [1, 0], "texts": ["a", "b"]} | options
    with pytest.raises(ValueError, match=message):
        save_predictions(tmp_path, "test", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("split", ["../escape", "", "a/b", ".hidden"])
def test_split_must_be_a_plain_name(tmp_path, split):
    with pytest.raises(ValueError, match="no plain name"):
        save_predictions(
            tmp_path, split, probabilities=PROBABILITIES, labels=[1, 0], texts=["a", "b"]
        )


def test_a_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        save_predictions(
            tmp_path / "no", "test", probabilities=PROBABILITIES, labels=[1, 0], texts=["a", "b"]
        )


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write_half():
        with atomic_write(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_only_run_json_is_required(make_run):
    folder = make_run()
    for path in folder.iterdir():
        if path.name != "run.json":
            path.unlink()
    run = load_run(folder)
    assert run.metrics == []
    assert run.results is None
    assert run.predictions == {}
    assert run.label_names == ["negative", "positive"]
    assert run.started.year == 2026


def test_folders_that_are_no_runs(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        load_run(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"run\.json is missing"):
        load_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is not JSON"):
        load_run(tmp_path)
    (tmp_path / "run.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"run\.json is not JSON"):
        load_run(tmp_path)
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"run\.json is not JSON"):
        load_run(tmp_path)
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(ValueError, match="name is missing"):
        load_run(tmp_path)


def test_every_missing_or_wrong_key_is_listed_at_once(make_run):
    folder = make_run()

    def spoil(info):
        del info["model"]["num_params"]
        del info["environment"]
        info["data"]["splits"] = 7

    edit(folder / "run.json", spoil)
    with pytest.raises(ValueError, match="does not describe a run") as caught:
        load_run(folder)
    text = str(caught.value)
    assert "model.num_params is missing" in text
    assert "environment.versions is missing" in text
    assert "data.splits is 7, expected dict" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda info: info.update(started="yesterday"), "expected an ISO 8601 time"),
        (lambda info: info["data"].update(problem_type="ranking"), "expected one of"),
        (lambda info: info["data"].update(label_names=[]), "needs the classes"),
        (lambda info: info["model"].update(num_params=True), "expected int"),
    ],
)
def test_bad_values_in_run_json(make_run, change, message):
    folder = make_run()
    edit(folder / "run.json", change)
    with pytest.raises(ValueError, match=message):
        load_run(folder)


def test_a_torn_last_line_is_left_out_wherever_it_tears(make_run):
    folder = make_run()
    path = folder / "metrics.jsonl"
    whole = b'{"step": 5, "split": "train", "loss": 0.5}\n'
    last = '{"step": 10, "split": "train", "loss": 0.25, "note": "naïve"}'.encode()
    for length in range(len(last)):
        path.write_bytes(whole + last[:length])
        assert [row["step"] for row in load_run(folder).metrics] == [5]
    path.write_bytes(whole + last)  # complete, only its newline is missing
    assert [row["step"] for row in load_run(folder).metrics] == [5, 10]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 5, "spl', r"metrics\.jsonl, line 2 is not JSON"),
        ('{"split": "train"}', "line 2 has no 'step'"),
        ('{"step": -1, "split": "train"}', "line 2 has no 'step'"),
        ('{"step": 1.5, "split": "train"}', "line 2 has no 'step'"),
        ('{"step": 5}', "line 2 has no 'split'"),
        ("[1]", "line 2 has no 'step'"),
    ],
)
def test_any_other_malformed_line_is_named(make_run, line, message):
    folder = make_run()
    good = '{"step": 1, "split": "train"}\n'
    (folder / "metrics.jsonl").write_text(good + line + "\n")
    with pytest.raises(ValueError, match=message):
        load_run(folder)


def test_series_are_sorted_and_the_last_row_of_a_step_counts(make_run):
    folder = make_run()
    rows = [
        {"step": 1, "split": "train", "loss": 3.0},
        {"step": 3, "split": "train", "loss": 1.0},
        {"step": 3, "split": "val", "loss": 9.0},
        {"step": 2, "split": "train", "loss": 2.0},  # resumed from step 1
        {"step": 3, "split": "train", "loss": 1.5},
        {"step": 4, "split": "train", "loss": None},
        {"step": 5, "split": "train", "loss": float("nan")},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps, losses = load_run(folder).series("train", "loss")
    np.testing.assert_array_equal(steps, [1, 2, 3, 5])
    np.testing.assert_array_equal(losses, [3.0, 2.0, 1.5, np.nan])
    assert len(load_run(folder).series("train", "accuracy")[0]) == 0


def test_predictions_that_do_not_fit_the_run(make_run):
    folder = make_run()
    edit(folder / "run.json", lambda info: info["data"].update(label_names=["a", "b", "c"]))
    with pytest.raises(ValueError, match="2 columns of probabilities for 3 label names"):
        load_run(folder)
    none = {"problem_type": None, "label_names": None}
    edit(folder / "run.json", lambda info: info["data"].update(none))
    with pytest.raises(ValueError, match=r"predictions_test\.npz.*\n.*names no classes"):
        load_run(folder)
    edit(folder / "run.json", lambda info: info["data"].update(problem_type="regression"))
    with pytest.raises(ValueError, match=r"lacks \['predictions'\], needed for regression"):
        load_run(folder)


def test_unreadable_prediction_files(make_run):
    folder = make_run()
    path = folder / "predictions_test.npz"
    whole = path.read_bytes()
    for broken in (b"", b"not a zip", whole[: len(whole) // 2]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"predictions_test\.npz is not a readable"):
            load_run(folder)
    np.savez(path, probabilities=np.array([{}], object), labels=np.array([0]))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_run(folder)
    with zipfile.ZipFile(path, "w") as archive:  # a header that claims 10 GB in 1 KB
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2500000000, 1), }"
        header += b" " * (117 - len(header)) + b"\n"
        magic = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
        archive.writestr("probabilities.npy", magic + header + b"\0" * 1000)
        archive.writestr("labels.npy", magic + header)
    with pytest.raises(ValueError, match="is not a readable"):
        load_run(folder)
    path.write_bytes(whole)
    (folder / "predictions_test.texts.json").unlink()
    with pytest.raises(ValueError, match="holds the texts of predictions_test"):
        load_run(folder)
    (folder / "predictions_test.texts.json").write_text("[1]")
    with pytest.raises(ValueError, match="list of strings"):
        load_run(folder)


def test_results_must_be_objects(make_run):
    folder = make_run()
    path = folder / "results.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        load_run(folder)
    path.write_text('{"test": 0.8, "baselines": {"probe": {"test": 0.7}}}')
    with pytest.raises(ValueError, match=r"test, baselines\.probe\.test must be objects"):
        load_run(folder)
