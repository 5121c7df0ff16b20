import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fmjax.data.batches import batches
from fmjax.data.encoding import (
    encode,
    encode_choices,
    encode_retrieval,
    encode_seq2seq,
    encode_targets,
)
from fmjax.data.text import TextExamples

WORDS = ["<pad>", "</s>", "[CLS]", "[SEP]", "a", "good", "bad", "film", "very", "ein", "Film"]
PAD, EOS, CLS, SEP = range(4)


def tokenizer(kind="t5"):
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "a"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "t5":
        fast.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS)]
        )
        named = {"eos_token": "</s>", "pad_token": "<pad>"}
    elif kind == "bert":
        fast.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
        named = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "<pad>"}
    elif kind == "mbart":
        fast.post_processor = processors.TemplateProcessing(
            single="$A </s> [SEP]", special_tokens=[("</s>", EOS), ("[SEP]", SEP)]
        )
        named = {"eos_token": "</s>", "extra_special_tokens": ["[SEP]"]}
    else:
        named = {"eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"]
        if kind == "bert"
        else ["input_ids", "attention_mask"],
        **named,
    )


def rows(columns, name, part=0):
    return [row.tolist() for row in columns.ragged[part].rows(name)]


def test_seq2seq_cuts_both_sides_and_ends_targets():
    sources, targets = ["a film", "very very very good film"], ["ein Film", "Film"]
    columns = encode_seq2seq(
        tokenizer(), sources, targets, max_length=4, max_target_length=3, vocab_size=11
    )
    assert rows(columns, "input_ids") == [[4, 7, EOS], [8, 8, 8, EOS]]
    assert rows(columns, "labels", 1) == [[9, 10, EOS], [10, EOS]]
    assert columns.max_lengths == (4, 3)
    batch = next(batches(columns, batch_size=2, shuffle=False, buckets=[(4, 4)]))
    assert batch["input_ids"].tolist() == [[4, 7, EOS, PAD], [8, 8, 8, EOS]]
    assert batch["labels"].tolist() == [[9, 10, EOS, -100], [10, EOS, -100, -100]]
    assert set(batch) == {"input_ids", "attention_mask", "labels", "weight", "index"}


def test_seq2seq_ends_targets_of_tokenizers_that_do_not():
    columns = encode_seq2seq(
        tokenizer("gpt2"), ["a film"], ["ein Film Film"], max_length=8, max_target_length=3
    )
    assert rows(columns, "input_ids") == [[4, 7]]
    assert rows(columns, "labels", 1) == [[9, 10, EOS]]
    assert columns.ragged[0].fill == {"input_ids": EOS}, "no pad token: the end, masked"
    bert = encode_seq2seq(tokenizer("bert"), ["a"], ["Film"], max_length=8)
    assert rows(bert, "labels", 1) == [[CLS, 10, SEP]]


def test_seq2seq_leaves_a_language_behind_the_end():
    """mBART's targets, which `shift_right` begins with their last token."""
    wrapped = tokenizer("mbart")
    long = encode_seq2seq(wrapped, ["a"], ["ein Film"], max_length=8)
    assert rows(long, "labels", 1) == [[9, 10, EOS, SEP]]
    cut = encode_seq2seq(wrapped, ["a"], ["ein Film Film"], max_length=8, max_target_length=4)
    assert rows(cut, "labels", 1) == [[9, 10, EOS, SEP]]


def test_seq2seq_prefix_and_sources_alone():
    columns = encode_seq2seq(tokenizer(), ["film"], max_length=8, prefix="very good ")
    assert rows(columns, "input_ids") == [[8, 5, 7, EOS]]
    assert len(columns.ragged) == 1


def test_seq2seq_refuses():
    with pytest.raises(ValueError, match=r"1 sources and 2 targets\n.*max_target_length=1 leaves"):
        encode_seq2seq(tokenizer(), ["a"], ["a", "a"], max_length=8, max_target_length=1)
    with pytest.raises(ValueError, match=r"token id 10 \(example 0: 'Film'\).*vocabulary of 10"):
        encode_seq2seq(tokenizer(), ["a"], ["Film"], max_length=8, vocab_size=10)
    with pytest.raises(ValueError, match=r"token id 7 \(example 1: 'film'\)"):
        encode_seq2seq(tokenizer(), ["a", "film"], ["a", "a"], max_length=8, vocab_size=7)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match="has no eos token"):
        encode_seq2seq(fast, ["a"], ["a"], max_length=8)


def test_one_text_is_no_list():
    bert, said = tokenizer("bert"), "one text was given where a list of texts is expected"
    with pytest.raises(ValueError, match=rf"sources: {said}\n  targets: {said}"):
        encode_seq2seq(bert, "a", "a", max_length=8)
    with pytest.raises(ValueError, match=f"targets: {said}"):
        encode_targets(bert, "a", max_length=8)
    with pytest.raises(ValueError, match=rf"contexts: {said}\n  choices\[0\]: {said}"):
        encode_choices(bert, "a", ["good"], max_length=8)
    with pytest.raises(ValueError, match=rf"queries: {said}\n  passages: {said}"):
        encode_retrieval(bert, "a", "a", max_query_length=8, max_passage_length=8)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "example 1 is None, a text was expected"),
        (5, "example 1 is 5, a text"),
        ("a \ud83d", r"example 1: 'a \\ud83d' has half a character at 2"),
    ],
    ids=["none", "number", "surrogate"],
)
def test_what_is_no_text_is_named(text, said):
    with pytest.raises(ValueError, match=said):
        encode(tokenizer(), TextExamples(["a", text], None, ()), max_length=8)
    with pytest.raises(ValueError, match=said):
        encode(tokenizer(), TextExamples(["a", "b"], None, (), ["a", text]), max_length=8)


def test_choices_are_a_group():
    columns = encode_choices(
        tokenizer("bert"), ["a film", "bad"], [["good", "very bad"], ["a", "film"]], [1, 0],
        max_length=7,
    )  # fmt: skip
    assert rows(columns, "input_ids") == [
        [CLS, 4, 7, SEP, 5, SEP],
        [CLS, 4, 7, SEP, 8, 6, SEP],
        [CLS, 6, SEP, 4, SEP],
        [CLS, 6, SEP, 7, SEP],
    ]
    batch = next(batches(columns, batch_size=2, shuffle=False))
    assert batch["input_ids"].shape == (2, 2, 7)
    assert batch["token_type_ids"][0, 1].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert batch["labels"].tolist() == [1, 0]


def test_choices_are_checked():
    with pytest.raises(ValueError, match="encode_choices: 4 problems") as error:
        encode_choices(
            tokenizer("bert"), ["a"] * 3, [["a", "a"], ["a"]], [0, 1, 5, 0], max_length=8
        )
    for part in (
        "example 1: 1 choices, the first example has 2",
        "2 choices for 3 contexts",
        "4 labels for 3 contexts",
        "example 2: label 5 is none of 2 choices",
    ):
        error.match(part)


def test_queries_and_passages_have_names_of_their_own():
    columns = encode_retrieval(
        tokenizer("bert"), ["a film", "bad"], ["very good", "very very very bad"],
        max_query_length=8, max_passage_length=5,
    )  # fmt: skip
    assert columns.max_lengths == (8, 5)
    batch = next(batches(columns, batch_size=2, shuffle=False))
    assert {name: v.shape for name, v in batch.items()} == {
        **{f"query_{name}": (2, 8) for name in ("input_ids", "attention_mask", "token_type_ids")},
        **{f"passage_{name}": (2, 5) for name in ("input_ids", "attention_mask", "token_type_ids")},
        "weight": (2,),
        "index": (2,),
    }
    assert batch["passage_input_ids"][1].tolist() == [CLS, 8, 8, 8, SEP]
    with_negatives = encode_retrieval(
        tokenizer("bert"), ["a film", "bad"], [["very", "bad", "a"], ["bad", "good", "a"]],
        max_query_length=8, max_passage_length=8,
    )  # fmt: skip
    batch = next(batches(with_negatives, batch_size=2, shuffle=False))
    assert batch["passage_input_ids"].shape == (2, 3, 8)
    assert batch["passage_input_ids"][1, :, 1].tolist() == [6, 5, 4]
    with pytest.raises(ValueError, match=r"example 1: 2 passages(.|\n)*2 passages for 1 queries"):
        encode_retrieval(
            tokenizer("bert"), ["a"], [["a"], ["a", "a"]],
            max_query_length=8, max_passage_length=8,
        )  # fmt: skip


def test_word_ids_number_the_words_of_a_text_or_pair():
    examples = TextExamples(["very good, very bad"], None, (), text_pairs=["a film"])
    encoded = encode(
        tokenizer("bert"), examples, max_length=20, word_ids=True, special_tokens_mask=True
    )
    assert encoded.word_ids is not None
    assert encoded.word_ids.tolist() == [-1, 0, 1, 2, 3, 4, -1, 5, 6, -1]
    assert encoded.special_tokens_mask is not None
    assert encoded.special_tokens_mask.tolist() == [1, 0, 0, 0, 0, 0, 1, 0, 0, 1]
    batch = next(batches(encoded, batch_size=2, pad_id=PAD, shuffle=False, buckets=[12]))
    assert batch["word_ids"][0].tolist() == [*encoded.word_ids, -1, -1]
    assert batch["special_tokens_mask"][0, 10:].tolist() == [1, 1]
    assert batch["word_ids"][1].tolist() == [-1] * 12
    plain = encode(tokenizer("bert"), examples, max_length=20)
    assert plain.fingerprint != encoded.fingerprint
    assert plain.word_ids is plain.special_tokens_mask is None


@pytest.mark.parametrize("split", [True, False])
def test_word_ids_of_tokenizers_that_keep_the_space(split):
    """SentencePiece ones, also where the text is one word to the tokenizer itself."""
    text = "a quiet  film about seas"
    fast = Tokenizer(models.Unigram())
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    fast.train_from_iterator(
        [text] * 3,
        trainers.UnigramTrainer(
            vocab_size=24, unk_token="<unk>", special_tokens=["<unk>", "</s>"], show_progress=False
        ),
    )
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=split)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="</s>")
    encoded = encode(wrapped, TextExamples([text], None, ()), max_length=64, word_ids=True)
    assert encoded.word_ids is not None
    pieces = wrapped.convert_ids_to_tokens(encoded.tokens.tolist())
    words = [""] * (encoded.word_ids.max() + 1)
    for number, piece in zip(encoded.word_ids, pieces, strict=True):
        words[number] += piece.replace("▁", "")
    assert [word for word in words if word] == text.split()
    assert np.all(np.diff(encoded.word_ids) >= 0)
