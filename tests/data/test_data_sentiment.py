import hashlib
import subprocess
import sys

import numpy as np
import pytest

from fmjax.data import assets
from fmjax.data.text import load_text

# Nothing here imports fmjax.data.sentiment at the top: it brings tensorflow_datasets.


def write_asset(folder, name, lines):
    from fmjax.data.sentiment import SETS

    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETS[name].file).write_bytes("\r\n".join(lines).encode())


@pytest.fixture
def small_sets(tmp_path, monkeypatch):
    """An asset folder with two small sets in the real format."""
    from fmjax.data import sentiment

    monkeypatch.setenv("FMJAX_HOME", str(tmp_path))
    folder = tmp_path / "assets" / f"sentiment-{assets.ASSETS['sentiment'].version}"
    movie = [f'{n}\t{(n % 7 - 3) * 1.25}\tFilm {n} ½ "café"\u2028 &amp; more' for n in range(1, 61)]
    write_asset(folder, "movie", movie)
    amazon = [f"{n}_{s}\t0.0\tsentence {s} of {n}" for n in range(1, 31) for s in (1, 2, 3)]
    write_asset(folder, "amazon", amazon)
    for name, count in [("movie", 60), ("amazon", 90)]:
        monkeypatch.setitem(sentiment.SETS, name, sentiment.SETS[name]._replace(count=count))
    return sentiment


def test_builder_writes_and_reads_the_sets(small_sets):
    parts = {split: small_sets.load_sentiment("movie", split) for split in small_sets.SPLITS}
    seen = {}
    for examples in parts.values():
        assert examples.label_names == ("negative", "positive")
        assert examples.labels.dtype == np.int32
        for name, text, label in zip(examples.ids, examples.texts, examples.labels, strict=True):
            assert text == f'Film {name} ½ "café"\u2028 &amp; more'
            assert label == ((int(name) % 7 - 3) * 1.25 > 0)
            seen[name] = text
    assert len(seen) == sum(len(examples) for examples in parts.values()) == 60
    assert all(len(examples) for examples in parts.values())


def test_ratings_for_regression_and_the_one_entry(small_sets):
    ratings = small_sets.load_sentiment("movie", "train", label="rating")
    assert ratings.label_names == ()
    assert ratings.labels.dtype == np.float32
    expected = [(int(name) % 7 - 3) * 1.25 for name in ratings.ids]
    np.testing.assert_array_equal(ratings.labels, expected)
    same = load_text("sentiment/movie", "train", label="rating", problem_type="regression")
    np.testing.assert_array_equal(same.labels, ratings.labels)
    assert load_text("sentiment/movie", "train", label=None).labels is None


def test_second_load_does_not_need_the_asset(small_sets, tmp_path, monkeypatch):
    before = small_sets.load_sentiment("movie", "test")
    monkeypatch.setattr(small_sets, "parse", lambda *args: pytest.fail("parsed again"))
    after = small_sets.load_sentiment("movie", "test")
    assert after.texts == before.texts
    assert (tmp_path / "tfds" / "sentiment" / "movie" / "1.0.0").is_dir()


def test_two_processes_may_prepare_at_once(small_sets, monkeypatch):
    # The second preparation begins and ends inside the first.
    parse = small_sets.parse
    inner = []

    def prepare_meanwhile(*args):
        if not inner:
            inner.append(None)
            inner[0] = small_sets.load_sentiment("movie", "train").texts
        return parse(*args)

    monkeypatch.setattr(small_sets, "parse", prepare_meanwhile)
    assert small_sets.load_sentiment("movie", "train").texts == inner[0]
    folder = assets.home() / "tfds" / "sentiment" / "movie"
    assert [path.name for path in folder.iterdir()] == ["1.0.0"]


def test_sentences_of_a_text_stay_together(small_sets):
    rows = small_sets.parse(
        assets.fetch("sentiment") / small_sets.SETS["amazon"].file, small_sets.SETS["amazon"].count
    )
    by_text = {}
    for row, split in zip(rows, small_sets.split_of("amazon", rows), strict=True):
        by_text.setdefault(row.id.split("_")[0], set()).add(split)
    assert all(len(splits) == 1 for splits in by_text.values())
    assert {split for (split,) in by_text.values()} == set(small_sets.SPLITS)


def test_split_is_the_stated_hash_and_repeated_texts_stay_together():
    from fmjax.data.sentiment import Row, split_of

    def stated(key):
        h = int(hashlib.sha256(f"tweets/{key}".encode()).hexdigest()[:8], 16) % 10
        return "train" if h < 8 else "val" if h == 8 else "test"

    rows = [Row(str(n), 0.0, f"text number {n}") for n in range(1, 301)]
    assert split_of("tweets", rows) == [stated(n) for n in range(1, 301)]
    # Same words but for case and punctuation.
    twins = list(rows)
    twins[299] = Row("300", 0.0, "TEXT, number 7!!")
    assert split_of("tweets", twins)[299] == stated(7)
    # Texts without any word say nothing about each other.
    wordless = [Row(str(n), 0.0, "...") for n in range(1, 301)]
    assert split_of("tweets", wordless) == [stated(n) for n in range(1, 301)]


def test_groups_are_chained_through_repeated_sentences():
    from fmjax.data.sentiment import Row, split_of

    # 9 and 5 share a sentence, 5 and 3 another: all are group 3, whatever the order of the rows.
    rows = [
        Row("9_1", 0.0, "shared one"),
        Row("9_2", 0.0, "nine"),
        Row("5_1", 0.0, "Shared one."),
        Row("5_2", 0.0, "shared two"),
        Row("3_1", 0.0, "shared two"),
    ]
    alone = split_of("amazon", [Row("3_1", 0.0, "alone")])
    assert split_of("amazon", rows) == alone * 5
    assert split_of("amazon", rows[::-1]) == alone * 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("3\t1.0", "line 3: id, rating, text expected"),
        ("3\t1.0\ta\tb", "line 3: id, rating, text expected"),
        ("x\t1.0\ta", "line 3"),
        ("3\t1.0\t ", "line 3"),
        ("3\t4.5\ta", r"line 3: rating 4\.5 is outside"),
        ("3\tnan\ta", "line 3: rating nan is outside"),
        ("2\t1.0\ta", "3 rows with 2 ids, but the set has 3"),
    ],
)
def test_parser_refuses_other_lines(tmp_path, line, message):
    from fmjax.data.sentiment import parse

    path = tmp_path / "set.txt"
    path.write_bytes(("1\t1.0\ta\r\n2\t-1.0\tb\r\n" + line).encode())
    with pytest.raises(ValueError, match=message):
        parse(path, 3)
    path.write_bytes(b"1\t1.0\ta\r\n2\t-1.0\tb\r\n")
    assert [row.rating for row in parse(path, 2)] == [1.0, -1.0]
    with pytest.raises(ValueError, match="2 rows with 2 ids, but the set has 9"):
        parse(path, 9)


def test_unknown_names(small_sets):
    with pytest.raises(ValueError, match=r"no sentiment set is called 'books'; there are \['ama"):
        small_sets.load_sentiment("books", "train")
    with pytest.raises(ValueError, match="dev"):
        small_sets.load_sentiment("movie", "dev")
    with pytest.raises(ValueError, match="no column 'mood'"):
        small_sets.load_sentiment("movie", "train", label="mood")


@pytest.mark.asset
@pytest.mark.parametrize(
    ("name", "counts", "positive"),
    [
        ("movie", (8439, 1090, 1076), 5242),
        ("tweets", (3308, 469, 423), 2897),
        ("amazon", (3045, 427, 236), 2128),
        ("editorials", (4210, 569, 411), 2204),
    ],
)
def test_real_sets(name, counts, positive, tmp_path, monkeypatch):
    if not assets.available("sentiment"):
        pytest.skip("the asset sentiment is not cached: fmjax.data.fetch('sentiment')")
    real = assets.fetch("sentiment")
    # A folder of its own, so that the set is parsed, split and written here.
    monkeypatch.setenv("FMJAX_HOME", str(tmp_path))
    monkeypatch.setattr(assets, "fetch", lambda asset: real)
    from fmjax.data.sentiment import SETS, load_sentiment

    parts = [load_sentiment(name, split) for split in ("train", "val", "test")]
    assert tuple(len(part) for part in parts) == counts
    assert sum(counts) == SETS[name].count
    assert sum(int((part.labels == 1).sum()) for part in parts) == positive
    texts = [{text.casefold() for text in part.texts} for part in parts]
    assert not texts[0] & texts[1]
    assert not texts[0] & texts[2]
    assert not texts[1] & texts[2]
    if name in ("amazon", "editorials"):
        sources = [{example.split("_")[0] for example in part.ids or ()} for part in parts]
        assert not sources[0] & sources[1]
        assert not sources[0] & sources[2]
        assert not sources[1] & sources[2]


@pytest.mark.asset
def test_tensorflow_is_never_imported():
    if not assets.available("sentiment"):
        pytest.skip("the asset sentiment is not cached: fmjax.data.fetch('sentiment')")
    program = """
import sys
from fmjax.data import load_text
heavy = {"tensorflow_datasets", "grain", "datasets", "transformers"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
print(len(load_text("sentiment/tweets", "val")), "tensorflow" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.split()[-2:] == ["469", "False"], run.stderr
