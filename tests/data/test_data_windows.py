import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fmjax.data.batches import batches
from fmjax.data.language import TokenDocuments
from fmjax.data.records import Answer, Questions
from fmjax.data.windows import encode_questions, scoring_windows

LETTERS = "abcdefg"
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "who", "when", *LETTERS, *("##" + c for c in LETTERS)]


def tokenizer():
    fast = Tokenizer(models.WordPiece({p: i for i, p in enumerate(PIECES)}, unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer()
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


TOKENIZER = tokenizer()


def asked(*triples):
    """Questions from (question, context, answers)."""
    return Questions(
        ids=[f"q{n}" for n in range(len(triples))],
        questions=[question for question, _, _ in triples],
        contexts=[context for _, context, _ in triples],
        answers=[[Answer(*answer) for answer in answers] for _, _, answers in triples],
    )


def encoded(questions, **options):
    settings = {"max_length": 12, "doc_stride": 2, "max_question_length": 2}
    return encode_questions(TOKENIZER, questions, **{**settings, **options})


def test_windows_overlap_and_mark_the_answer():
    context = "a b c d e f g a b c"
    found = encoded(asked(("who", context, [("f g", 10)])))
    ids = [row.tolist() for row in found.columns.ragged[0].rows("input_ids")]
    letters = {letter: PIECES.index(letter) for letter in "abcdefg"}
    assert [[PIECES[i] for i in row] for row in ids] == [
        ["[CLS]", "who", "[SEP]", *"abcdefga", "[SEP]"],
        ["[CLS]", "who", "[SEP]", *"gabc", "[SEP]"],
    ]
    assert letters["a"] == ids[0][3]
    assert found.question.tolist() == [0, 0]
    # The second window begins inside the answer: it does not hold it.
    assert found.columns.fixed["start_positions"].tolist() == [8, 0]
    assert found.columns.fixed["end_positions"].tolist() == [9, 0]
    assert found.lost == ()
    assert found.answer(0, 8, 9, context) == "f g"
    assert found.answer(0, 0, 0, context) == ""
    assert found.answer(0, 9, 8, context) == ""
    assert found.answer(0, 8, 11, context) == "", "the separator is not of the context"
    assert found.answer(1, 3, 40, context) == ""
    assert found.offsets_of(1)[3:7].tolist() == [[12, 13], [14, 15], [16, 17], [18, 19]]
    assert (found.offsets_of(1)[[0, 1, 2, 7]] == -1).all()


def test_questions_without_answers_and_answers_no_window_holds():
    found = encoded(
        asked(
            ("who", "a b c", []),
            ("when", "a b c d e f g a b c", [("d e f g a b", 6)]),
            ("when", "a b", [(" b", 1), ("a", 0)]),
        ),
        max_length=10,
    )
    starts, ends = found.columns.fixed["start_positions"], found.columns.fixed["end_positions"]
    own = found.question == 1
    assert own.sum() > 1
    assert not starts[own].any()
    assert not ends[own].any()
    assert found.lost == (1,)
    assert starts[found.question == 0].tolist() == [0]
    # The first answer counts, and the space before it is no token.
    assert starts[found.question == 2].tolist() == ends[found.question == 2].tolist() == [4]


words = st.lists(
    st.text(st.sampled_from("abcdefgé,"), min_size=1, max_size=4), min_size=1, max_size=30
)


@settings(max_examples=60)
@given(words, st.integers(10, 24), st.integers(0, 4), st.data())
def test_positions_map_back_to_the_answer(texts, max_length, doc_stride, data):
    context = " ".join(texts)
    first = data.draw(st.integers(0, len(texts) - 1))
    last = data.draw(st.integers(first, min(first + 3, len(texts) - 1)))
    start = len(" ".join(texts[:first])) + (first > 0)
    answer = " ".join(texts[first : last + 1])
    found = encoded(
        asked(("who when", context, [(answer, start)])),
        max_length=max_length,
        doc_stride=doc_stride,
    )
    seen = set()
    for window in range(len(found)):
        spans = found.offsets_of(window)
        inside = spans[spans[:, 0] >= 0]
        seen |= set(map(tuple, inside.tolist()))
        begin, end = (
            int(found.columns.fixed[f"{side}_positions"][window]) for side in ("start", "end")
        )
        holds = inside[0, 0] <= start and inside[-1, 1] >= start + len(answer)
        assert (begin != 0) == holds
        if holds:
            assert found.answer(window, begin, end, context) == answer
    whole = TOKENIZER(context, add_special_tokens=False, return_offsets_mapping=True)
    assert seen == set(map(tuple, whole["offset_mapping"])), "every token is in some window"
    assert (found.lost == ()) == bool(found.columns.fixed["start_positions"].any())


def test_windows_become_batches_and_long_questions_are_cut():
    questions = asked(("who when who when a b", "a b c d", [("c", 4)]), ("who", "a" * 9, []))
    found = encoded(questions)
    batch = next(batches(found.columns, batch_size=4, shuffle=False, buckets=[12]))
    assert batch["input_ids"].shape == batch["token_type_ids"].shape == (4, 12)
    assert batch["input_ids"][0, :4].tolist() == [2, 4, 5, 3], "two tokens of the question"
    assert batch["start_positions"].tolist()[:1] == [6]
    assert batch["index"].tolist()[:3] == [0, 1, 2]
    assert found.question.tolist() == [0, 1, 1]
    unknown = Questions(questions.ids, questions.questions, questions.contexts, None)
    assert encoded(unknown).columns.fixed == {}


def test_everything_wrong_is_listed():
    with pytest.raises(ValueError, match="encode_questions: 5 problems") as error:
        encoded(
            asked(
                ("who", "a b c", [("c", 2)]),
                ("who", "a b c", [(" ", 1)]),
                ("who", "a b c", [("c", 4), ("x", 90)]),
            ),
            max_length=8,
            doc_stride=-1,
            max_question_length=9,
        )
    for part in (
        "doc_stride=-1 must be at least 0",
        "max_length=8 leaves -4 tokens for a context beside 3 special tokens and",
        "question 'q0': its context has 'b' at 2, the answer is 'c'",
        "question 'q1' has an empty answer",
        "question 'q2': its context has '' at 90, the answer is 'x'",
    ):
        error.match(part)
    with pytest.raises(ValueError, match=r"'q0' has an empty text\n.*'q1' has an empty context"):
        encoded(asked((" ", "a", []), ("who", "", [])))
    with pytest.raises(ValueError, match="outside the model's vocabulary of 6"):
        encoded(asked(("who", "a", [])), vocab_size=6)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(2, 12), st.data()
)  # fmt: skip
def test_scoring_windows_score_each_token_once_with_context(lengths, length, data):
    stride = data.draw(st.integers(1, length - 1))
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    documents = TokenDocuments(np.arange(offsets[-1], dtype=np.int32), offsets, 0)
    columns = scoring_windows(documents, length=length, stride=stride, pad_id=0)
    part = columns.ragged[0]
    scored = []
    for ids, labels in zip(part.rows("input_ids"), part.rows("labels"), strict=True):
        assert (np.diff(ids) == 1).all()
        assert ((labels == ids) | (labels == -100)).all()
        begins = ids[0] in offsets
        # A causal loss scores no first token: nothing comes before it.
        places = np.flatnonzero(labels[1:] >= 0) + 1
        assert begins or places.min() >= length - stride
        scored += ids[places].tolist()
    assert sorted(scored) == sorted(set(range(offsets[-1])) - set(offsets[:-1].tolist()))


def test_scoring_windows_need_an_overlap():
    documents = TokenDocuments(np.zeros(3, np.int32), np.array([0, 3]), 0)
    with pytest.raises(ValueError, match="stride=4 must be from 1 to length - 1 = 3"):
        scoring_windows(documents, length=4, stride=4, pad_id=0)
