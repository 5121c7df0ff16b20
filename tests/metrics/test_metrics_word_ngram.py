"""Word n-grams: probabilities sum to one, back off as the definition says, files are checked."""

import gzip
import math

import numpy as np
import pytest

from fmjax.generate.ctc import prefix_beam
from fmjax.metrics.word_ngram import END, START, UNKNOWN, fit_word_ngram, read_arpa

TEXTS = ["the cat sat on the mat", "the rat sat", "a cat ran on"]
ARPA = """
\\data\\
ngram 1=5
ngram 2=2

\\1-grams:
-1.0\t<unk>
-99\t<s>\t-0.5
-0.4\t</s>
-0.6\tone\t-0.25
-0.8\ttwo

\\2-grams:
-0.1\t<s> one
-0.2\tone two

\\end\\
"""


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_probabilities_of_the_next_word_sum_to_one(order):
    model = fit_word_ngram(TEXTS, order)
    words = {word for text in TEXTS for word in text.split()} | {END, UNKNOWN}
    for before in ([START], [START, "the"], [START, "the", "cat"], ["the", "cat"], ["never"]):
        total = sum(math.exp(model.log_probability(before, word)) for word in words)
        assert total == pytest.approx(1.0)


def test_by_hand():
    """a b / a a: Witten-Bell of the end, and of what never followed."""
    model = fit_word_ngram(["a b", "a a"], 2)
    even = 1 / 4  # a, b, the end, the unknown one
    after_a = (1 + 3 * (2 + 3 * even) / (6 + 3)) / (3 + 3)  # b, a and the end came once each
    assert model.log_probability([START, "a"], END) == pytest.approx(math.log(after_a))
    unknown = 3 * even / (6 + 3)
    assert model.log_probability(["b"], "z") == pytest.approx(math.log(unknown / (1 + 1)))


@pytest.mark.parametrize("order", [4, 5])
def test_long_ngrams_know_where_a_text_begins(order, tmp_path):
    model = fit_word_ngram(["a b c d", "a b c d", "x b c e"], order)
    assert model.log_probability([START, "a"], "b") == model.logs[START, "a", "b"]
    grams = ["-1 <unk>", "-99 <s>", "-1 </s>", "-1 a", "-1 b", "-0.9 <s> a", "-0.8 a b"]
    grams += ["-0.1 <s> a b", "-0.05 <s> a b </s>", "-0.3 a b a b a"]
    lines, sizes = ["\\data\\"], range(1, order + 1)
    lists = {k: [gram for gram in grams if len(gram.split()) == k + 1] for k in sizes}
    lines += [f"ngram {k}={len(lists[k])}" for k in sizes]
    for k in sizes:
        lines += [f"\\{k}-grams:", *lists[k]]
    (tmp_path / "lm.arpa").write_text("\n".join([*lines, "\\end\\"]))
    nats = read_arpa(tmp_path / "lm.arpa").nats("a b")
    assert nats == pytest.approx((0.9 + 0.1 + 0.05) * math.log(10))


def test_an_arpa_file_backs_off(tmp_path):
    (tmp_path / "lm.arpa").write_text(ARPA)
    (tmp_path / "lm.arpa.gz").write_bytes(gzip.compress(ARPA.encode()))
    model = read_arpa(tmp_path / "lm.arpa")
    assert model == read_arpa(tmp_path / "lm.arpa.gz")
    ten = math.log(10)
    assert model.nats("one two") == pytest.approx((0.1 + 0.2 + 0.4) * ten)
    assert model.nats("two three") == pytest.approx((0.5 + 0.8 + 1.0 + 0.4) * ten)
    assert model.log_probability([START, "one"], "one") == pytest.approx(-(0.25 + 0.6) * ten)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("ngram 2=2", "ngram 2=3", "promises"),
        ("\\end\\", "", "no end"),
        ("-0.2\tone two", "-0.2\tone", "no 2-gram"),
        ("-0.8\ttwo", "x\ttwo", "line 11: 'x' is no number"),
        ("\\data\\\nngram 1=5\nngram 2=2", "", "promises"),
    ],
)
def test_damaged_files_are_refused(old, new, words, tmp_path):
    assert old in ARPA
    (tmp_path / "lm.arpa").write_text(ARPA.replace(old, new))
    with pytest.raises(ValueError, match=words):
        read_arpa(tmp_path / "lm.arpa")


def test_a_damaged_archive_is_refused(tmp_path):
    content = bytearray(gzip.compress(ARPA.encode()))
    content[20] ^= 255
    (tmp_path / "lm.arpa.gz").write_bytes(content)
    with pytest.raises(ValueError, match="is no ARPA file"):
        read_arpa(tmp_path / "lm.arpa.gz")


def test_a_search_follows_the_model():
    """The sounds of "cat" and "kat" are alike; one of them is a word."""
    symbols = ["", " ", "c", "k", "a", "t"]
    scores = np.full((7, 6), -20.0)
    for t, likely in enumerate(
        [{2: 0.45, 3: 0.55}, {4: 1}, {5: 1}, {1: 1}, {4: 1}, {0: 1}, {5: 1}]
    ):
        for symbol, probability in likely.items():
            scores[t, symbol] = math.log(probability)

    def said(scorer):
        found = prefix_beam(scores, blank=0, symbols=symbols, scorer=scorer)[0]
        return "".join(symbols[symbol] for symbol in found.symbols)

    assert said(None) == "kat at"
    assert said(fit_word_ngram(["cat at", "a cat"], 2).scorer()) == "cat at"


@pytest.mark.parametrize("piece", ["", "|", "a"])
def test_words_end_at_the_delimiter(piece):
    model = fit_word_ngram(["cat at", "a cat"], 2)
    spaced = model.scorer()("cat at", piece.replace("|", " "))
    assert model.scorer(delimiter="|")("cat|at", piece) == spaced


def test_refusals():
    with pytest.raises(ValueError, match="order=0"):
        fit_word_ngram(TEXTS, 0)
    with pytest.raises(ValueError, match="must have words"):
        fit_word_ngram([""], 2)
    with pytest.raises(ValueError, match="texts: one text was given"):
        fit_word_ngram("a b")
