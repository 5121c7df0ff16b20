import json

import numpy as np
import pytest

from fmjax.data.conll import read_conll, read_conllu
from fmjax.data.corpus import iterate_documents, read_documents
from fmjax.data.parallel import read_aligned, read_pairs
from fmjax.data.records import Answer, Documents, Questions, TaggedSentences, TextPairs
from fmjax.data.squad import read_squad


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---------------------------------------------------------------------------- records


def test_records_are_selected_from():
    tags = [np.array([0], np.int32), np.array([1, 0], np.int32)]
    sentences = TaggedSentences([["a"], ["b", "c"]], tags, ("x", "y"), ["d1", "d2"])
    chosen = sentences.select([1, 1, 0])
    assert len(chosen) == 3
    assert chosen.words == [["b", "c"], ["b", "c"], ["a"]]
    assert [row.tolist() for row in chosen.tags] == [[1, 0], [1, 0], [0]]
    assert chosen.documents == ["d2", "d2", "d1"]
    pairs = TextPairs(["a", "b"], ["A", "B"]).select(np.array([1]))
    assert (pairs.sources, pairs.targets, pairs.ids) == (["b"], ["B"], None)
    assert pairs.reverse().sources == ["B"]
    questions = Questions(["1", "2"], ["q", "r"], ["c", "d"], [[], [Answer("d", 0)]])
    assert questions.select([1]).answers == [[Answer("d", 0)]]
    assert Documents(["a", "b"], ["n", "m"]).select([1]).names == ["m"]


def test_records_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"TextPairs: 1 problem\n  2 targets for 1 sources"):
        TextPairs(["a"], ["b", "c"])
    with pytest.raises(ValueError, match="sentence 1: 1 tags for 2 words"):
        TaggedSentences([["a"], ["b", "c"]], [np.zeros(1, int), np.zeros(1, int)], ("x",))
    with pytest.raises(ValueError, match="tag 1 is outside the 1 tag_names"):
        TaggedSentences([["a"]], [np.ones(1, int)], ("x",))
    with pytest.raises(ValueError, match=r"2 problems\n  2 questions for 1 ids\n  0 contexts"):
        Questions(["1"], ["q", "r"], [], None)


# ---------------------------------------------------------------------------- CoNLL

CONLL = """-DOCSTART- -X- O O

EU NNP I-NP B-ORG
rejects VBZ I-VP O

-DOCSTART- -X- O O

Peter NNP I-NP B-PER
Blackburn NNP I-NP I-PER
"""


def test_conll_2003(tmp_path):
    sentences = read_conll(write(tmp_path, "eng.train", "\ufeff" + CONLL))
    assert sentences.words == [["EU", "rejects"], ["Peter", "Blackburn"]]
    assert sentences.tag_names == ("O", "B-ORG", "B-PER", "I-PER")
    assert [tags.tolist() for tags in sentences.tags] == [[1, 0], [2, 3]]
    assert sentences.documents == ["1", "2"]
    parts = read_conll(tmp_path / "eng.train", tag=1, tag_names=["VBZ", "NNP"])
    assert parts.tag_names == ("VBZ", "NNP")
    assert [tags.tolist() for tags in parts.tags] == [[1, 0], [1, 1]]
    assert read_conll(tmp_path / "eng.train", tag=None).tags is None


def test_conll_with_tabs_and_other_line_ends(tmp_path):
    path = write(tmp_path, "a.tsv", "New York\tLOC\r\n\u0085x\tO\r\n\r\n\r\nend\tO")
    sentences = read_conll(path, delimiter="\t")
    assert sentences.words == [["New York", "\u0085x"], ["end"]]
    assert sentences.documents is None


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("a X\nb\nc X Y\n\nd Z\n", {}, r"2 problems\n  line 2: 1 columns, the first word has 2\n"),
        (
            "a X\n\nb Z\nc Q\n",
            {"tag_names": ["X"]},
            r"line 3: tag 'Z'(.|\n)*line 4: tag 'Q' is not",
        ),
        ("a X\n", {"tag_names": ["X", "X"]}, r"\['X', 'X'\] name a tag twice"),
        ("a X\n", {"word": 2}, "no column word=2, the first line has 2"),
        ("a X\n", {"tag": -3}, "no column tag=-3, the first line has 2"),
        ("a\nb\n", {}, "word=0 and tag=-1 are the same of 1 columns"),
        ("\n\n", {}, "no sentences; a word a line was expected"),
        ("-DOCSTART- O\n", {}, "no sentences"),
        ("a X\n-DOCSTART- O\nb X\n", {}, "line 2: -DOCSTART- inside of a sentence"),
        ("a\tX\n \tX\n", {"delimiter": "\t"}, "line 2: no word in column 0"),
        (b"a X\n\xff X\n", {}, r"offset 4 \(line 2\) is not UTF-8"),
    ],
)
def test_bad_conll(tmp_path, content, options, message):
    path = write(tmp_path, "a.conll", content)
    with pytest.raises(ValueError, match=message):
        read_conll(path, **options)


def conllu(*rows):
    filler = ["_"] * 6
    return "".join("\t".join([*row.split(), *filler]) + "\n" for row in rows)


def test_conllu(tmp_path):
    text = (
        "# newdoc id = first\n# text = vámonos al mar\n"
        + conllu("1-2 vámonos _ _", "1 vamos ir VERB", "2 nos yo PRON", "2.1 x x X")
        + "\n# newdoc\n"
        + conllu("1 mar mar NOUN")
    )
    sentences = read_conllu(write(tmp_path, "a.conllu", text))
    assert sentences.words == [["vamos", "nos"], ["mar"]]
    assert sentences.tag_names == ("NOUN", "PRON", "VERB")
    assert [tags.tolist() for tags in sentences.tags] == [[2, 1], [0]]
    assert sentences.documents == ["first", "2"]
    assert read_conllu(tmp_path / "a.conllu", tag=None).tags is None
    lemmas = read_conllu(tmp_path / "a.conllu", tag="lemma")
    assert lemmas.tag_names == ("ir", "mar", "yo")
    with pytest.raises(ValueError, match="tag 'form' is not one of the columns"):
        read_conllu(tmp_path / "a.conllu", tag="form")
    path = write(tmp_path, "b.conllu", conllu("1 a b C") + "2 b c D\n")
    with pytest.raises(ValueError, match="line 2: 1 columns separated by tabs, CoNLL-U has 10"):
        read_conllu(path)
    with pytest.raises(ValueError, match="no sentences"):
        read_conllu(write(tmp_path, "c.conllu", "# text = none\n\n"))


# ---------------------------------------------------------------------------- SQuAD

CONTEXT = "The tower in Paris is 330 metres high. It stands in Paris."


def squad(*qas, context=CONTEXT, title="Tower"):
    return {
        "version": "v2.0",
        "data": [{"title": title, "paragraphs": [{"context": context, "qas": list(qas)}]}],
    }


def qa(name="q1", question="Where?", answers=(("Paris", 13), ("in Paris", 10)), **more):
    given = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": name, "question": question, "answers": given, **more}


def read(tmp_path, content, **options):
    return read_squad(write(tmp_path, "a.json", json.dumps(content)), **options)


def test_squad(tmp_path):
    impossible = qa("q2", "Why?", [], is_impossible=True, plausible_answers=[{"text": "x"}])
    questions = read(tmp_path, squad(qa(), impossible, qa("q3", is_impossible=False)))
    assert questions.ids == ["q1", "q2", "q3"]
    assert questions.questions == ["Where?", "Why?", "Where?"]
    assert questions.contexts == [CONTEXT] * 3
    assert questions.answers[0] == [Answer("Paris", 13), Answer("in Paris", 10)]
    assert questions.answers[1] == []
    assert questions.titles == ["Tower"] * 3


def test_squad_without_answers(tmp_path):
    content = squad({"id": "1", "question": "Where?"}, title=None)
    questions = read(tmp_path, content, answers=False)
    assert questions.answers is None
    assert questions.titles is None
    with pytest.raises(ValueError, match=r"qas\[0\]: 'answers' are missing; answers=False reads"):
        read(tmp_path, content)


@pytest.mark.parametrize("text", ["[" * 200_000, "1" * 5000])
def test_squad_of_too_much(tmp_path, text):
    with pytest.raises(ValueError, match=r"a\.json: not JSON \(.*(nested too deeply|digits)"):
        read_squad(write(tmp_path, "a.json", text))


def test_squad_json_lines(tmp_path):
    rows = [
        {"id": "1", "question": "Where?", "context": CONTEXT, "title": "Tower"},
        {"id": "2", "question": "Why?", "context": CONTEXT, "title": "Tower"},
    ]
    rows[0]["answers"] = {"text": ["Paris"], "answer_start": [52]}
    rows[1]["answers"] = {"text": [], "answer_start": []}
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    questions = read_squad(path)
    assert questions.answers == [[Answer("Paris", 52)], []]
    assert questions.titles == ["Tower"] * 2
    rows[0]["answers"]["answer_start"] = [51, 2]
    rows[1]["answers"] = None
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n[]")
    with pytest.raises(ValueError, match="5 problems") as error:
        read_squad(path)
    assert "row 3: a JSON object was expected" in str(error.value)
    assert "row 1: 1 answers with 2 answer_start" in str(error.value)
    assert "row 2: 'answers' is None, an object with 'text' was expected" in str(error.value)
    assert "row 1: answer 'Paris' at 51: there stands ' Pari', and the context has it at 52" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            squad(qa(answers=[("Paris", 14)])),
            r"qas\[0\]: answer 'Paris' at 14: there stands 'aris ', and the context has it at 13",
        ),
        (squad(qa(answers=[("Rome", 0)])), "and the context does not have it"),
        (squad(qa(answers=[("Paris", "13")])), "'answer_start' is '13', a character's number"),
        (squad(qa(answers=[("Paris", -1)])), "'answer_start' is -1"),
        (squad(qa(answers=[("", 3)])), r"answers\[0\]: 'text' is '', a text was expected"),
        (squad(qa(), qa()), r"qas\[1\]: id 'q1' appears again"),
        (squad(qa(answers=[])), "no answers, and 'is_impossible' does not say why"),
        (squad(qa(is_impossible=True)), "an answer of a question with 'is_impossible'"),
        (squad(qa(is_impossible="no")), "'is_impossible' is 'no', true or false was expected"),
        (squad(qa(question=" ")), r"qas\[0\]: 'question' is ' ', a text was expected"),
        (squad(qa(), context=None), r"paragraphs\[0\]: 'context' is None, a text was expected"),
        (squad("q"), r"qas\[0\]: 'id' is None"),
        ([], r"the file is \[\], an object with 'data' was expected"),
        ({"data": [{"paragraphs": {}}]}, r"data\[0\]: 'paragraphs' is {}, a list was expected"),
        ({"data": []}, "no questions"),
    ],
)
def test_bad_squad(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, content)


def test_all_problems_of_squad_at_once(tmp_path):
    content = squad(qa("a", answers=[("Paris", 1)]), qa("b", ""), qa("a", answers=[("x" * 99, 1)]))
    with pytest.raises(ValueError, match="4 problems") as error:
        read(tmp_path, content)
    assert max(map(len, str(error.value).splitlines())) < 250
    with pytest.raises(ValueError, match=r"not JSON .*JSON Lines are read as \.jsonl"):
        read_squad(write(tmp_path, "b.json", '{"a": 1}\n{"a": 2}'))


# ---------------------------------------------------------------------------- parallel text


def test_aligned_files(tmp_path):
    # A line separator of Unicode is not the end of a line.
    source = write(tmp_path, "a.en", "one\u2028more\r\n two\n")
    pairs = read_aligned(source, write(tmp_path, "a.de", "eins\nzwei"))
    assert (pairs.sources, pairs.targets) == (["one\u2028more", "two"], ["eins", "zwei"])


def test_empty_lines_of_aligned_files(tmp_path):
    source = write(tmp_path, "a.en", "one\n\nthree\n\n")
    target = write(tmp_path, "a.de", "eins\nzwei\n \n\n")
    with pytest.raises(ValueError, match="4 problems") as error:
        read_aligned(source, target)
    assert "line 2: the source is empty" in str(error.value)
    assert "line 3: the target is empty" in str(error.value)
    assert read_aligned(source, target, skip_empty=True).targets == ["eins"]


def test_files_that_are_not_aligned(tmp_path):
    source = write(tmp_path, "a.en", "one\ntwo\nthree")
    with pytest.raises(ValueError, match="3 and 1 lines; aligned files have the same number"):
        read_aligned(source, write(tmp_path, "a.de", "eins"))
    long = write(tmp_path, "b.de", "eins\n" + "zwei " * 9 + "\ndrei")
    with pytest.raises(ValueError, match=r"line 2: the target has 45 characters, more than max_"):
        read_aligned(source, long, max_characters=44)
    empty = write(tmp_path, "empty", "\n")
    with pytest.raises(ValueError, match="no pairs of texts"):
        read_aligned(empty, empty, skip_empty=True)


def test_pairs_from_columns(tmp_path):
    path = write(tmp_path, "a.tsv", "en\tid\tde\none\t1\teins\ntwo\t2\tzwei\n")
    pairs = read_pairs(path, source="en", target="de")
    assert (pairs.sources, pairs.targets) == (["one", "two"], ["eins", "zwei"])
    lines = '{"source": "one", "target": "eins"}\n'
    assert read_pairs(write(tmp_path, "a.jsonl", lines)).targets == ["eins"]
    wmt = '{"translation": {"en": "one", "de": "eins"}}\n{"translation": {"en": "two", "de": ""}}\n'
    path = write(tmp_path, "wmt.jsonl", wmt)
    with pytest.raises(ValueError, match="row 2: 'de' is empty"):
        read_pairs(path, source="en", target="de")
    pairs = read_pairs(path, source="en", target="de", skip_empty=True)
    assert (pairs.sources, pairs.targets) == (["one"], ["eins"])


def test_bad_pairs(tmp_path):
    path = write(tmp_path, "a.csv", "en,de\none,eins\n,zwei\nthree,drei,tres\n")
    with pytest.raises(
        ValueError, match=r"2 problems\n  row 4: 3 cells(.|\n)*row 3: 'en' is empty"
    ):
        read_pairs(path, source="en", target="de")
    with pytest.raises(ValueError, match="no column 'source'"):
        read_pairs(path)
    path = write(tmp_path, "a.jsonl", '{"source": 3}\n')
    with pytest.raises(ValueError, match=r"'source' is 3, a text was (.|\n)*'target' is missing"):
        read_pairs(path)


# ---------------------------------------------------------------------------- plain text


def test_documents_by_line(tmp_path):
    path = write(tmp_path, "a.txt", "\ufefffirst\r\nsecond é\u2028\n\n\n")
    documents = read_documents(path)
    assert documents.texts == ["first", "second é\u2028"]
    assert documents.names == [f"{path}:1", f"{path}:2"]
    other = write(tmp_path, "b.txt", "third")
    assert read_documents([path, other]).texts[2] == "third"


def test_documents_between_empty_lines(tmp_path):
    path = write(tmp_path, "a.txt", "\na\nb\n\n  \nc\n")
    documents = read_documents(path, separator="blank")
    assert documents.texts == ["a\nb", "c"]
    assert documents.names == [f"{path}:2", f"{path}:6"]
    assert read_documents(path, separator="file").texts == ["a\nb\n\n\nc"]


def test_bad_documents(tmp_path):
    path = write(tmp_path, "a.txt", "a\n\nb\nc\n\n\nd\n\n")
    with pytest.raises(ValueError, match=r"2 problems\n  line 2 is empty: .*\n  line 5 is empty"):
        read_documents(path)
    with pytest.raises(ValueError, match="no text in this file"):
        read_documents(write(tmp_path, "b.txt", "\n \n"), separator="blank")
    with pytest.raises(ValueError, match="separator 'page' is not one of"):
        read_documents(path, separator="page")
    with pytest.raises(ValueError, match="no files were given"):
        read_documents([])
    latin = write(tmp_path, "c.txt", b"a\ncaf\xe9\n")
    with pytest.raises(ValueError, match="line 2: byte 0xe9 is not UTF-8; convert"):
        read_documents(latin)


@pytest.mark.parametrize("character", ["x", "é", "€", "😀"])
def test_an_endless_line_is_refused_before_it_is_read_whole(tmp_path, character):
    path = write(tmp_path, "a.txt", "ok\n" + character * 20 + "\r\n")
    assert read_documents(path, max_characters=20).texts[1] == character * 20
    path = write(tmp_path, "b.txt", "ok\n" + character * 1000)
    stream = iterate_documents(path, max_characters=20)
    assert next(stream)[1] == "ok"
    with pytest.raises(ValueError, match="line 2 has more than max_characters=20 characters; put"):
        next(stream)
