import hashlib

import numpy as np
import pytest

from fmjax.data import assets

# Nothing here imports fmjax.data.brown at the top: it brings tensorflow_datasets.

DOCUMENT = """

\tThe/at Fulton/np-tl County/nn-tl jury/nn said/vbd Friday/nr ''/'' They're/ppss+ber out/rp ?/. ?/.
A/at and/cc //nn-hl or/cc isn't/bez* ./.


\tAtlanta's/np$ mayor/nn (/( Cy/np )/) said/vbd c'est/fw-dt+bez not/* ``/`` fine/jj ''/'' ;/. ;/.

"""


def write_corpus(folder, genres):
    folder.mkdir(parents=True)
    (folder / "cats.txt").write_text("".join(f"{name} {g}\n" for name, g in genres.items()))
    for name in genres:
        (folder / name).write_text(f"{DOCUMENT}\tIn/in {name}/cd ./.\n")


@pytest.fixture
def small_brown(tmp_path, monkeypatch):
    """Twelve documents of news and seven of humor, four sentences each."""
    from fmjax.data import brown

    monkeypatch.setenv("FMJAX_HOME", str(tmp_path))
    genres = {f"ca{n:02}": "news" for n in range(12)} | {f"cr{n:02}": "humor" for n in range(7)}
    write_corpus(tmp_path / "assets" / f"brown-{assets.ASSETS['brown'].version}", genres)
    monkeypatch.setattr(brown, "DOCUMENTS", len(genres))
    monkeypatch.setattr(brown, "SENTENCES", 4 * len(genres))
    return brown


def test_sentences_come_back_in_order_by_document(small_brown):
    seen = []
    for split, count in [("train", 15), ("val", 2), ("test", 2)]:
        sentences = small_brown.load_brown(split)
        documents = sorted(set(sentences.documents))
        assert len(documents) == count
        assert sentences.documents == [name for name in documents for _ in range(4)]
        assert [words[1] for words in sentences.words[3::4]] == documents
        assert sentences.tag_names == small_brown.TAGS
        seen += documents
    assert len(set(seen)) == 19
    words = "The Fulton County jury said Friday '' They're out ? ?".split()
    assert sentences.words[0] == words
    assert sentences.tags[0].dtype == np.int32
    tags = [small_brown.TAGS[tag] for tag in sentences.tags[0]]
    assert tags == "at np nn nn vbd nr '' x+y rp . .".split()
    assert sentences.words[1][2] == "/"
    assert small_brown.TAGS[sentences.tags[1][4]] == "x*"


def test_names_are_spans(small_brown):
    sentences = small_brown.load_brown("test", target="names")
    assert sentences.tag_names == ("O", "B-name", "I-name")
    assert [tags.tolist() for tags in sentences.tags[:3]] == [
        [0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0],
        [0] * 6,
        [1, 0, 0, 1] + [0] * 9,
    ]


def test_documents_and_genres(small_brown):
    documents = small_brown.load_brown_documents("test")
    expected = (
        "The Fulton County jury said Friday\" They're out? A and / or isn't.\n"
        "Atlanta's mayor (Cy) said c'est not \"fine\";\nIn {}."
    )
    assert documents.texts == [expected.format(name) for name in documents.names]
    by_sentence = small_brown.load_brown_documents("test", line="sentence").texts[0].split("\n")
    assert len(by_sentence) == 4
    assert by_sentence[1] == "A and / or isn't."
    with pytest.raises(ValueError, match="line 'word' is not one of"):
        small_brown.load_brown_documents("test", line="word")
    whole = small_brown.load_brown_genres("test")
    assert whole.texts == documents.texts
    assert whole.ids == documents.names
    assert [whole.label_names[label] for label in whole.labels] == ["news", "humor"]
    parts = small_brown.load_brown_genres("test", unit="sentence")
    assert len(parts) == 8
    assert parts.ids[1] == f"{documents.names[0]}/1"
    assert parts.texts[1] == "A and / or isn't."
    assert parts.labels[1] == whole.labels[0]


def test_second_load_does_not_need_the_asset(small_brown, monkeypatch):
    before = small_brown.load_brown("val")
    monkeypatch.setattr(small_brown, "read_document", lambda path: pytest.fail("read again"))
    assert small_brown.load_brown("val").words == before.words


def test_a_corpus_of_another_size_is_refused(small_brown, monkeypatch):
    monkeypatch.setattr(small_brown, "SENTENCES", 77)
    with pytest.raises(ValueError, match="19 documents with 76 sentences, but the corpus has 19 w"):
        small_brown.load_brown("val")


def test_unknown_names(small_brown):
    with pytest.raises(ValueError, match="dev"):
        small_brown.load_brown("dev")
    with pytest.raises(ValueError, match="target 'lemmas' is not one of"):
        small_brown.load_brown("val", target="lemmas")
    with pytest.raises(ValueError, match="unit 'page' is not one of"):
        small_brown.load_brown_genres("val", unit="page")


@pytest.mark.parametrize(
    ("tag", "base"),
    [
        ("nn", "nn"),
        ("nn-tl-hl", "nn"),
        ("np$-tl", "np$"),
        ("pp$$", "pp$$"),
        ("--", "--"),
        ("---hl", "--"),
        ("*", "*"),
        ("*-nc", "*"),
        (",-tl", ","),
        ("bez*", "x*"),
        ("md*-hl", "x*"),
        ("ppss+ber-n", "x+y"),
        ("wdt+ber+pp", "x+y"),
        ("ppss+bez*", "x+y"),
        ("fw-nn-tl", "fw"),
        ("fw-*", "fw"),
        ("fw-in+at-t", "fw"),
    ],
)
def test_base_tags(tag, base):
    from fmjax.data.brown import TAGS, base_tag

    assert base_tag(tag) == base
    assert base in TAGS


def test_tags_and_genres_are_the_published_ones():
    from fmjax.data import brown

    assert len(set(brown.TAGS)) == len(brown.TAGS) == 95
    assert len(set(brown.GENRES)) == len(brown.GENRES) == 15


def test_name_spans():
    from fmjax.data.brown import name_tags

    def spans(tags):
        return "".join(tag[0] for tag in name_tags(tags.split()))

    assert spans("at np-tl nn-tl jj np np+bez vbg") == "OBIOBIO"
    assert spans("np$ np nn$-tl nn-tl nps fw-np-tl nns") == "BBIBIIO"
    assert spans("nn-tl in-tl at-tl nn-tl-hl , np") == "BIIIOB"
    assert spans("nps$ np+hvz-nc fw-nps npx") == "BBIO"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("He said : : `` Go ! ! ''", 'He said: "Go!"'),
        ("a ( b [ c ] ) , d", "a (b [c]), d"),
        ("`` ' yes ' , or not ''", "\"'yes', or not\""),
        ("x -- y . . .", "x -- y..."),
        ("", ""),
    ],
)
def test_running_text(words, text):
    from fmjax.data.brown import detokenize

    assert detokenize(words.split()) == text


def test_splits_are_the_stated_ones_and_hold_every_genre():
    from fmjax.data.brown import split_of

    genres = {f"ca{n:02}": "news" for n in range(44)} | {f"cm{n:02}": "lore" for n in range(4)}
    splits = split_of(genres)
    news = sorted(
        (name for name in genres if genres[name] == "news"),
        key=lambda name: hashlib.sha256(name.encode()).hexdigest(),
    )
    assert [splits[name] for name in news] == ["test"] * 4 + ["val"] * 4 + ["train"] * 36
    assert {splits[name] for name in genres if genres[name] == "lore"} == {"train"}
    assert split_of(dict(reversed(genres.items()))) == splits


def test_every_wrong_line_is_named(tmp_path):
    from fmjax.data.brown import read_document, read_genres

    path = tmp_path / "ca01"
    path.write_text("The/at jury/nn\n\nno-tag /nn x/nn a/zz\n")
    with pytest.raises(
        ValueError, match=r"3 problems\n  line 3: .*'/no-tag'\n  line 3: .*'/nn'\n.*'a/zz'"
    ):
        read_document(path)
    path = tmp_path / "cats.txt"
    path.write_text("ca01 news\nca02 sport\nca01 news\nx\n")
    with pytest.raises(ValueError, match=r"3 problems\n  line 2: (.|\n)*ca01 appears again\n"):
        read_genres(path)


@pytest.mark.asset
def test_the_real_corpus():
    from fmjax.data import brown

    if not assets.available("brown"):
        pytest.skip("the asset brown is not cached: fmjax.data.fetch('brown')")
    folder = assets.fetch("brown")
    genres = brown.read_genres(folder / "cats.txt")
    documents = {name: brown.read_document(folder / name) for name in genres}
    sentences = [sentence for document in documents.values() for sentence in document]
    tags = [tag for sentence in sentences for tag in sentence.tags]
    assert (len(documents), len(sentences), len(tags)) == (500, 57_340, 1_161_192)
    assert len(set(tags)) == 472
    assert {brown.base_tag(tag) for tag in set(tags)} == set(brown.TAGS)
    assert set(genres.values()) == set(brown.GENRES)
    splits = brown.split_of(genres)
    counts = {split: list(splits.values()).count(split) for split in brown.SPLITS}
    assert counts == {"train": 396, "val": 52, "test": 52}
    for split in brown.SPLITS:
        assert {genres[name] for name in splits if splits[name] == split} == set(brown.GENRES)
