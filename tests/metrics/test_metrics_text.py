"""Tags, translations and summaries: known values, and what is refused."""

import json
import subprocess
import sys

import pytest

from fmjax.metrics import optional
from fmjax.metrics.summarisation import summarisation_metrics
from fmjax.metrics.tagging import are_entities, entity_metrics, tag_accuracy
from fmjax.metrics.translation import translation_metrics


def test_entities_by_hand():
    labels = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-PER", "O"]]
    found = [["B-PER", "I-PER", "O", "B-PER"], ["O", "B-PER", "B-LOC"]]
    scores = entity_metrics(found, labels)
    # 4 found, 2 of them right, 3 there are
    assert scores["precision"] == pytest.approx(2 / 4)
    assert scores["recall"] == pytest.approx(2 / 3)
    assert scores["f1"] == pytest.approx(2 * 2 / (4 + 3))
    assert scores["entities"]["PER"]["precision"] == pytest.approx(2 / 3)
    assert scores["entities"]["LOC"] == {"precision": 0, "recall": 0, "f1": 0, "support": 1}
    assert tag_accuracy(found, labels) == pytest.approx(5 / 7)
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores


def test_half_an_entity_is_none():
    assert entity_metrics([["B-PER", "O"]], [["B-PER", "I-PER"]])["f1"] == 0


def test_schemes_differ_where_an_entity_has_no_beginning():
    found, labels = [["O", "I-PER"]], [["O", "B-PER"]]
    assert entity_metrics(found, labels)["f1"] == 1  # as conlleval
    assert entity_metrics(found, labels, scheme="IOB2")["f1"] == 0


def test_no_entities_score_zero_without_warnings(recwarn):
    assert entity_metrics([["O"]], [["O"]]) == {
        "precision": 0,
        "recall": 0,
        "f1": 0,
        "entities": {},
    }
    assert not recwarn.list


def test_entity_tags_are_recognised():
    assert are_entities(["O", "B-PER", "I-PER"])
    assert not are_entities(["NN", "VB"])
    assert not are_entities(["O"])


def test_tags_that_conlleval_does_not_know_are_read_by_their_scheme():
    twice = [["U-PER", "U-PER"]]
    assert entity_metrics(twice, twice)["entities"]["PER"]["support"] == 2
    scores = entity_metrics([["B-PER", "L-PER", "U-PER"]], [["B-PER", "L-PER", "O"]])
    assert (scores["precision"], scores["recall"]) == (0.5, 1)


@pytest.mark.parametrize(
    ("found", "labels", "scheme", "message"),
    [
        (["NN", "VB"], [["O"], ["O"]], None, r"predictions\[0\]: one text was given"),
        ([["O"]], "O", None, "labels: one text was given"),
        ([["O"]], [["O"], ["O"]], None, "1 predicted sentences for 2"),
        ([["O"]], [["O", "O"]], None, "sentence 0: 1 predicted tags for 2 words"),
        ([[]], [[]], None, "no words"),
        ([["NN"]], [["O"]], "IOB", r"'NN' is no entity tag; scheme is 'IOB'"),
    ],
)
def test_bad_tags_are_named(found, labels, scheme, message):
    with pytest.raises(ValueError, match=message):
        entity_metrics(found, labels, scheme=scheme)


def test_translations_of_known_worth():
    # sacrebleu's own example in its README: BLEU 48.53.
    references = [
        ["The dog bit the man.", "The dog had bit the man."],
        ["It was not unexpected.", "No one was surprised."],
        ["The man bit him first.", "The man had bitten the dog."],
    ]
    texts = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    scores = translation_metrics(texts, references)
    assert scores["bleu"] == pytest.approx(48.5308, abs=1e-3)
    assert scores["bleu_signature"].startswith("nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp")
    same = translation_metrics(["ein Haus am See steht"], ["ein Haus am See steht"])
    assert (same["bleu"], same["chrf"], same["length_ratio"]) == pytest.approx((100, 100, 1))
    # chrF by hand: "ab" against "ac": 1-grams 1/2 right, 2-grams 0/1; mean of 0.5 and 0.
    assert translation_metrics(["ab"], ["ac"])["chrf"] == pytest.approx(25)


def test_summaries_of_known_worth():
    # 5 of 7 words and 2 of 6 pairs; longest common subsequence: the cat the bed.
    scores = summarisation_metrics(
        ["the cat was found under the bed"], ["the cat hid under a big bed"], use_stemmer=False
    )
    assert scores["rouge1"] == pytest.approx(100 * 4 / 7)
    assert scores["rouge2"] == pytest.approx(100 * 1 / 6)
    assert scores["rougeL"] == pytest.approx(100 * 4 / 7)
    stemmed = summarisation_metrics(["running dogs"], ["run dog"])
    assert stemmed["rouge1"] == pytest.approx(100)
    assert summarisation_metrics(["running dogs"], ["run dog"], use_stemmer=False)["rouge1"] == 0
    best = summarisation_metrics(["a b c"], [["x y z", "a b c"]])
    assert best["rouge2"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("texts", "references", "message"),
    [
        ([], [], "no texts"),
        (["a"], ["a", "b"], "1 texts for 2 references"),
        (["a", "b"], [["a"], ["b", "c"]], r"\[1, 2\] references"),
        ("a", ["a"], "one text was given"),
    ],
)
def test_bad_texts_are_named(texts, references, message):
    for metric in (translation_metrics, summarisation_metrics):
        with pytest.raises(ValueError, match=message):
            metric(texts, references)


def test_an_unknown_tokenizer_is_named():
    with pytest.raises(ValueError, match="tokenize is 'foo'; it must be one of"):
        translation_metrics(["a"], ["a"], tokenize="foo")


def test_a_missing_library_is_named():
    with pytest.raises(ImportError, match=r"pip install 'fmjax\[text\]'"):
        optional.text_library("no_such_module", "no-such-package")


def test_importing_the_metrics_imports_no_library():
    code = (
        "import sys, fmjax.metrics.tagging, fmjax.metrics.translation, fmjax.metrics.summarisation;"
        "print({'seqeval', 'sacrebleu', 'rouge_score', 'nltk'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
