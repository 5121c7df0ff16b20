import builtins
import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmjax.data.text import TextExamples, from_datasets, from_tfds, load_text, read_text


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---------------------------------------------------------------------------- TextExamples


def test_select_takes_every_column():
    examples = TextExamples(
        ["a", "b", "c"],
        np.array([0, 1, 2], np.int32),
        ("x", "y", "z"),
        ["p", "q", "r"],
        list("123"),
    )
    assert len(examples) == 3
    chosen = examples.select([2, 0])
    assert chosen.texts == ["c", "a"]
    assert chosen.labels is not None
    assert chosen.labels.tolist() == [2, 0]
    assert chosen.text_pairs == ["r", "p"]
    assert chosen.ids == ["3", "1"]
    assert chosen.label_names == ("x", "y", "z")
    bare = TextExamples(["a", "b"], None, ()).select(np.array([1]))
    assert (bare.texts, bare.labels, bare.text_pairs, bare.ids) == (["b"], None, None, None)


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"1 labels for 2 texts\n  3 ids for 2 texts"):
        TextExamples(["a", "b"], np.zeros(1, np.int32), ("x",), ids=["1", "2", "3"])


# ---------------------------------------------------------------------------- good files


def test_three_formats_say_the_same(tmp_path):
    rows = [
        ("good, very\tgood", "pos"),
        ('he said "no"\nand left', "neg"),
        ("né à Zürich ½", "pos"),
    ]
    for suffix, delimiter in [("tsv", "\t"), ("csv", ",")]:
        with (tmp_path / f"set.{suffix}").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerows([("text", "label"), *rows])
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    write(tmp_path, "set.jsonl", "\n".join(lines) + "\n\n")
    for suffix in ("tsv", "csv", "jsonl"):
        examples = load_text(tmp_path / f"set.{suffix}")
        assert examples.texts == [text for text, _ in rows]
        assert examples.label_names == ("neg", "pos")
        assert examples.labels is not None
        assert examples.labels.dtype == np.int32
        assert examples.labels.tolist() == [1, 0, 1]
        assert examples.text_pairs is None
        assert examples.ids is None


# No surrogates (not UTF-8), no text of blanks alone (refused), nothing at the front that the byte
# order mark would be mistaken for.
some_text = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\ufeff"), min_size=1
)


@given(
    st.lists(some_text.filter(str.strip), min_size=1, max_size=5), st.sampled_from(["tsv", "csv"])
)
def test_what_the_csv_module_writes_is_read_back(tmp_path_factory, texts, suffix):
    path = tmp_path_factory.mktemp("round") / f"set.{suffix}"
    delimiter = "\t" if suffix == "tsv" else ","
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writerow(["text", "label"])
        writer.writerows([text, "x"] for text in texts)
    assert read_text(path).texts == texts


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_long_cells(tmp_path, suffix):
    limit, long = csv.field_size_limit(), "a" * 150_000
    path = write(tmp_path, f"a.{suffix}", f"text\n{long}\n")
    assert read_text(path, label=None).texts == [long]
    assert csv.field_size_limit() == limit


def test_columns_pairs_ids_and_unlabelled_texts(tmp_path):
    path = write(tmp_path, "pairs.csv", "id,one,two,same\r\n7,a,b,yes\r\n\r\n8,c,d,no\r\n")
    examples = read_text(path, text="one", text_pair="two", label="same")
    assert examples.texts == ["a", "c"]
    assert examples.text_pairs == ["b", "d"]
    assert examples.ids == ["7", "8"]
    assert examples.label_names == ("no", "yes")
    bare = read_text(path, text="one", label=None)
    assert bare.labels is None
    assert bare.label_names == ()


def test_order_of_labels(tmp_path):
    numbers = write(tmp_path, "n.csv", "text,label\na,10\nb,9\nc,-1\n")
    assert read_text(numbers).label_names == ("-1", "9", "10")
    words = write(tmp_path, "w.csv", "text,label\na,b10\nb,9\nc, b9 \n")
    assert read_text(words).label_names == ("9", "b10", "b9")
    given_order = read_text(words, label_names=["b9", "unused", "9", "b10"])
    assert given_order.label_names == ("b9", "unused", "9", "b10")
    assert given_order.labels is not None
    assert given_order.labels.tolist() == [3, 2, 0]
    kinds = write(tmp_path, "k.jsonl", '{"text": "a", "label": true}\n{"text": "b", "label": 0}\n')
    assert read_text(kinds).label_names == ("0", "true")


def test_byte_order_mark_is_no_part_of_the_header(tmp_path):
    path = write(tmp_path, "bom.tsv", b"\xef\xbb\xbftext\tlabel\na\tx\n")
    assert read_text(path).texts == ["a"]


def test_several_labels(tmp_path):
    table = write(tmp_path, "m.tsv", "text\tlabel\na\tjoy|fear\nb\t\nc\tanger\n")
    lines = write(
        tmp_path,
        "m.jsonl",
        '{"text": "a", "label": ["joy", "fear"]}\n{"text": "b", "label": []}\n'
        '{"text": "c", "label": ["anger"]}\n',
    )
    for path in (table, lines):
        examples = read_text(path, problem_type="multi_label_classification")
        assert examples.label_names == ("anger", "fear", "joy")
        assert examples.labels is not None
        assert examples.labels.dtype == np.float32
        assert examples.labels.tolist() == [[0, 1, 1], [0, 0, 0], [1, 0, 0]]


def test_regression(tmp_path):
    path = write(tmp_path, "r.csv", "text,label\na,1.5\nb,-2\nc,1e3\n")
    examples = read_text(path, problem_type="regression")
    assert examples.label_names == ()
    assert examples.labels is not None
    assert examples.labels.dtype == np.float32
    assert examples.labels.tolist() == [1.5, -2, 1000]


# ---------------------------------------------------------------------------- bad files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "the file is empty"),
        ("a.jsonl", " \n\n", "the file is empty"),
        ("a.csv", "text,label\n", "a header but no rows"),
        ("a.csv", "text,mood\na,x\n", r"no column 'label'; the header has \['text', 'mood'\]"),
        ("a.csv", "text,label,text\na,x,b\n", "column 'text' appears more than once"),
        ("a.csv", "text,label\na,x\nb\n", "row 3: 'label' is missing"),
        ("a.csv", "text,label\na,x\nb,c,y\n", "row 3: 3 cells, the header has 2"),
        ("a.csv", "text,label\n ,x\n", "row 2: 'text' is empty"),
        ("a.csv", "text,label\na,\n", "row 2: 'label' is empty"),
        ("a.tsv", 'text\tlabel\na\tx\n"b" c\tx\n', r"row 3 \(line 3\): .*double those inside"),
        ("a.tsv", 'text\tlabel\n"b\tx\nc\ty\n', r"row 2 \(line 3\): unexpected end of data"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text"\n', r"row 2: not JSON \(Expecting ':'"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n' + "[" * 200_000, r"row 2: .*nested too deeply"),
        ("a.jsonl", '{"text": ' + "1" * 5000 + "}", r"row 1: not JSON .*4300 digits"),
        ("a.jsonl", '["a", "x"]\n', "row 1: a JSON object was expected, found list"),
        ("a.jsonl", '{"text": "a"}\n', "row 1: 'label' is missing"),
        ("a.jsonl", '{"text": 3, "label": "x"}\n', "row 1: 'text' is 3, a text was expected"),
        ("a.jsonl", '{"text": "a", "label": 1.5}\n', r"'label' is 1\.5, a class is a text or an"),
        (
            "a.csv",
            b"text,label\nab,x\ncaf\xe9,y\n",
            r"byte 0xe9 at offset 19 \(line 3\) is not UTF-8",
        ),
        ("a.csv", b"\xef\xbb\xbftext,label\nab\xff,x\n", r"byte 0xff at offset 16 \(line 2\)"),
        ("a.txt", "text\n", r"suffix '\.txt' says no known format; rename it to \.tsv, \.csv"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message) as error:
        read_text(path)
    assert str(path) in str(error.value)


def test_labels_outside_the_given_set(tmp_path):
    path = write(tmp_path, "a.csv", "text,label\na,x\nb,q\nc,Y\n")
    message = r"2 problems\n  row 3: 'label' 'q' is not one of \('x', 'y'\)\n  row 4: 'label' 'Y'"
    with pytest.raises(ValueError, match=message):
        read_text(path, label_names=("x", "y"))
    path = write(tmp_path, "m.csv", "text,label\na,x|q\nb,x||y\n")
    with pytest.raises(
        ValueError, match=r"row 3: 'label' is empty\n  row 2: 'label' 'q' is not one"
    ):
        read_text(path, label_names=("x", "y"), problem_type="multi_label_classification")


@pytest.mark.parametrize("cell", ["nan", "inf", "1e39", "high", ""])
def test_regression_wants_finite_numbers(tmp_path, cell):
    path = write(tmp_path, "a.csv", f"text,label\na,1\nb,{cell}\n")
    with pytest.raises(ValueError, match=rf"row 3: 'label' is '{cell}', a (finite|number)"):
        read_text(path, problem_type="regression")


@pytest.mark.parametrize("value", ["true", "null", "[1]", "NaN"])
def test_regression_in_json(tmp_path, value):
    path = write(tmp_path, "a.jsonl", f'{{"text": "a", "label": {value}}}\n')
    with pytest.raises(ValueError, match="row 1: 'label' is"):
        read_text(path, problem_type="regression")


def test_several_labels_are_a_list_in_json(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "a", "label": 3}\n{"text": "a", "label": [[]]}\n')
    with pytest.raises(
        ValueError, match=r"is 3, a list of labels was expected\n  row 2: .*is \[\]"
    ):
        read_text(path, problem_type="multi_label_classification")


def test_all_problems_at_once_ten_are_listed(tmp_path):
    rows = "".join(f"text {n},\n" for n in range(25))
    path = write(tmp_path, "a.csv", "text,label\n ,x\n" + rows + "a,b,c\n")
    with pytest.raises(ValueError, match="27 problems") as error:
        read_text(path)
    lines = str(error.value).splitlines()
    assert len(lines) == 12
    assert lines[1] == "  row 28: 3 cells, the header has 2"
    assert lines[2] == "  row 2: 'text' is empty"
    assert lines[-1] == "  and 17 more"


def test_bad_arguments(tmp_path):
    path = write(tmp_path, "a.csv", "text,label\na,1\n")
    with pytest.raises(ValueError, match="problem_type 'ranking' is not one of"):
        read_text(path, problem_type="ranking")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="name a class twice"):
        read_text(path, label_names=["1", "1"])
    with pytest.raises(ValueError, match="regression, which has no classes"):
        read_text(path, label_names=["1"], problem_type="regression")
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "none.csv")


# ---------------------------------------------------------------------------- TFDS


def test_from_tfds_with_mock_data(tmp_path):
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=6):
        examples = from_tfds(
            "ag_news_subset",
            "train",
            text="description",
            text_pair="title",
            data_dir=tmp_path,
        )
        same = load_text("tfds:ag_news_subset", "test", text="title", data_dir=tmp_path)
        with pytest.raises(
            ValueError, match=r"no column 'text'; there are \['description', 'label'"
        ):
            from_tfds("ag_news_subset", "train", data_dir=tmp_path)
    assert len(examples) == len(same) == 6
    assert examples.label_names == ("World", "Sports", "Business", "Sci/Tech")
    assert examples.labels is not None
    assert examples.labels.dtype == np.int32
    assert set(examples.labels) <= {0, 1, 2, 3}
    assert examples.text_pairs is not None
    assert all(isinstance(text, str) for text in [*examples.texts, *examples.text_pairs])
    assert "tensorflow" not in sys.modules


def test_from_tfds_reads_files_that_were_written(tmp_path):
    """Every kind of label, written to array_record files and read back."""
    import tensorflow_datasets as tfds

    moods = tfds.features.ClassLabel(names=["joy", "fear"])
    rows = [("first", 1, [0, 1], 0.5, "b"), ("second é", 0, [], -2.0, "a")]

    class TinyText(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        # TFDS looks for it by name, and finds the "tests" that another package has installed.
        pkg_dir_path = Path(__file__).parent

        def _info(self):
            features = {
                "text": tfds.features.Text(),
                "mood": moods,
                "moods": tfds.features.Sequence(moods),
                "score": np.float32,
                "word": tfds.features.Text(),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for text, mood, several, score, word in rows:
                cells = {"text": text, "mood": mood, "moods": several, "score": score, "word": word}
                yield text, cells

    def read(**options):
        examples = from_tfds("tiny_text", "train", data_dir=tmp_path, **options)
        order = np.argsort(examples.texts)
        return examples.select(order)

    single = read(label="mood")
    assert single.texts == ["first", "second é"]
    assert single.label_names == ("joy", "fear")
    assert single.labels is not None
    assert single.labels.tolist() == [1, 0]
    several = read(label="moods", problem_type="multi_label_classification")
    assert several.label_names == ("joy", "fear")
    assert several.labels is not None
    assert several.labels.tolist() == [[1, 1], [0, 0]]
    score = read(label="score", problem_type="regression")
    assert score.labels is not None
    assert score.labels.tolist() == [0.5, -2.0]
    assert read(label="word").label_names == ("a", "b")
    assert read(label=None).labels is None
    with pytest.raises(
        ValueError, match=r"tfds:tiny_text/1\.0\.0 train: 2 problems\n  row 1: 'mood"
    ):
        read(label="moods")


# ---------------------------------------------------------------------------- HF datasets


def hf_dataset():
    import datasets

    moods = datasets.ClassLabel(names=["joy", "fear"])
    return datasets.Dataset.from_dict(
        {
            "text": ["first", "second"],
            "other": ["one", "two"],
            "label": [1, 0],
            "moods": [[0, 1], []],
            "score": [0.5, -2.0],
            "word": ["b", "a"],
            "hidden": [-1, -1],
        },
        features=datasets.Features(
            {
                "text": datasets.Value("string"),
                "other": datasets.Value("string"),
                "label": moods,
                "moods": datasets.List(moods),
                "score": datasets.Value("float32"),
                "word": datasets.Value("string"),
                "hidden": moods,
            }
        ),
    )


def test_from_datasets_reads_every_kind_of_label():
    dataset = hf_dataset()
    single = from_datasets(dataset, text_pair="other")
    assert single.texts == ["first", "second"]
    assert single.text_pairs == ["one", "two"]
    assert single.label_names == ("joy", "fear")
    assert single.labels is not None
    assert single.labels.tolist() == [1, 0]
    several = from_datasets(dataset, label="moods", problem_type="multi_label_classification")
    assert several.labels is not None
    assert several.labels.tolist() == [[1, 1], [0, 0]]
    score = from_datasets(dataset.with_format("numpy"), label="score", problem_type="regression")
    assert score.labels is not None
    assert score.labels.tolist() == [0.5, -2.0]
    assert from_datasets(dataset, label="word").label_names == ("a", "b")
    reordered = from_datasets(dataset, label_names=["fear", "joy"])
    assert reordered.labels is not None
    assert reordered.labels.tolist() == [0, 1]


def test_from_datasets_splits_and_problems():
    import datasets

    both = datasets.DatasetDict({"train": hf_dataset(), "dev": hf_dataset().select([1])})
    assert from_datasets(both, "dev").texts == ["second"]
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['dev', 'train'\]"):
        from_datasets(both, "test")
    with pytest.raises(ValueError, match="name one, for instance split='train'"):
        from_datasets(both)
    with pytest.raises(ValueError, match="which is one split; drop it"):
        from_datasets(hf_dataset(), "train")
    with pytest.raises(ValueError, match="no column 'mood'; there are"):
        from_datasets(hf_dataset(), label="mood")
    with pytest.raises(
        ValueError, match=r"row 1: 'hidden' is -1, outside the 2 classes(.|\n)*row 2"
    ):
        from_datasets(hf_dataset(), label="hidden")


def test_hub_names_go_to_load_dataset(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return hf_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_text("hf:nyu-mll/glue:mrpc", "train").texts == ["first", "second"]
    assert load_text("hf:imdb", "test[:10%]").label_names == ("joy", "fear")
    assert asked == [
        (("nyu-mll/glue", "mrpc"), {"split": "train"}),
        (("imdb", None), {"split": "test[:10%]"}),
    ]


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without_datasets(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(ImportError, match=r"pip install fmjax\[datasets\]"):
        from_datasets("imdb", "train")


# ---------------------------------------------------------------------------- load_text


def test_load_text_says_what_a_source_can_be(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'none\.csv' is no file, and none of 'sentiment/"):
        load_text("none.csv")
    path = write(tmp_path, "a.csv", "text,label\na,1\n")
    with pytest.raises(ValueError, match="a file is one split; drop it"):
        load_text(path, "train")
    for empty in ("hf:", "tfds:"):
        with pytest.raises(ValueError, match=f"'{empty}' names no data set"):
            load_text(empty, "train")
    with pytest.raises(ValueError, match="sentiment/movie has several splits"):
        load_text("sentiment/movie")
    with pytest.raises(ValueError, match="is for 'tfds:NAME', not for"):
        load_text(path, data_dir=tmp_path)
