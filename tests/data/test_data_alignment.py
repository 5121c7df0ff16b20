import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fmjax.data.alignment import align_labels
from fmjax.data.batches import batches
from fmjax.data.columns import IGNORED_LABEL

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "film", "##s", "##er", "see", "very", ",", "a"]
NAMES = ("O", "B-X", "I-X")


def wordpiece():
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


def bytes_of(texts, prefix):
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    fast.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=290,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<eos>"],
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<eos>")


WORDPIECE = wordpiece()
BYTES = {prefix: bytes_of(["seers see a very long film film"], prefix) for prefix in (False, True)}


def aligned(words, labels, **options):
    return align_labels(
        WORDPIECE, words, labels, **{"max_length": 12, "label_names": NAMES, **options}
    )


def row(found, name, n=0):
    return found.columns.ragged[0].rows(name)[n].tolist()


def test_the_first_piece_carries_the_label_or_all_do():
    words, labels = [["seers", "a", "films"]], [["B-X", "O", "B-X"]]
    found = aligned([["films", "a", "filmers"]], labels)
    assert row(found, "input_ids") == [2, 4, 5, 10, 4, 6, 5, 3]
    assert row(found, "word_ids") == [-1, 0, 0, 1, 2, 2, 2, -1]
    assert row(found, "labels") == [-100, 1, -100, 0, 1, -100, -100, -100]
    found = aligned([["films", "a", "filmers"]], labels, pieces="all")
    assert row(found, "labels") == [-100, 1, 1, 0, 1, 1, 1, -100]
    found = aligned([["films", "a", "filmers"]], labels, pieces="inside")
    assert row(found, "labels") == [-100, 1, 2, 0, 1, 2, 2, -100]
    by_number = aligned([["films", "a", "filmers"]], [np.array([1, 0, 1], np.int32)])
    assert row(by_number, "labels") == [-100, 1, -100, 0, 1, -100, -100, -100]
    assert aligned(words, labels, label_names=None).label_names == ("B-X", "O")


def test_truncation_counts_lost_words_and_dropped_words_stay_in_place():
    # A zero-width mark has no token; "filmers" is cut in its middle and counts as kept.
    words = [["a", "\u200b", "very", "filmers", "see", "\u200b", "a"]]
    found = aligned(words, [["O", "B-X", "I-X", "B-X", "O", "O", "O"]], max_length=6)
    assert row(found, "input_ids") == [2, 10, 8, 4, 6, 3]
    assert row(found, "labels") == [-100, 0, 2, 1, -100, -100]
    assert found.num_words.tolist() == [7]
    assert found.lost.tolist() == [2]
    assert found.dropped.tolist() == [2]
    assert [p.tolist() for p in found.by_word([np.arange(9)])] == [[1, -1, 2, 3, -1, -1, -1]]


@pytest.mark.parametrize("prefix", [False, True])
def test_byte_level_words_get_the_tokens_of_running_text(prefix):
    tokenizer = BYTES[prefix]
    words = ["a", "film", ",", "very", "very", "long"]
    found = align_labels(tokenizer, [words], max_length=64)
    assert row(found, "input_ids") == tokenizer(" ".join(words))["input_ids"]
    assert found.lost.tolist() == found.dropped.tolist() == [0]


word = st.text(st.sampled_from("aefilmrsvy, é\u200b"), min_size=1, max_size=8)
sentence = st.lists(st.tuples(word, st.sampled_from(NAMES)), min_size=1, max_size=8)


@settings(max_examples=60)
@given(
    st.lists(sentence, min_size=1, max_size=4),
    st.integers(3, 20),
    st.sampled_from(["wordpiece", "bytes"]),
    st.sampled_from(["first", "all"]),
)
def test_labels_go_to_tokens_and_back_to_words(sentences, max_length, kind, pieces):
    tokenizer = WORDPIECE if kind == "wordpiece" else BYTES[False]
    words = [[text for text, _ in pairs] for pairs in sentences]
    labels = [[label for _, label in pairs] for pairs in sentences]
    found = align_labels(
        tokenizer, words, labels, max_length=max_length, label_names=NAMES, pieces=pieces
    )
    part = found.columns.ragged[0]
    back = found.by_word(part.rows("labels"))
    for n, (given_labels, restored) in enumerate(zip(labels, back, strict=True)):
        assert found.num_words[n] == len(given_labels)
        kept = np.flatnonzero(restored >= 0)
        assert [NAMES[i] for i in restored[kept]] == [given_labels[w] for w in kept]
        assert len(kept) + found.lost[n] + found.dropped[n] == len(given_labels)
        numbers = found.word_ids[n]
        own = part.rows("labels")[n]
        assert (own[numbers < 0] == IGNORED_LABEL).all()
        marked = (own != IGNORED_LABEL).sum()
        assert marked == (len(kept) if pieces == "first" else (numbers >= 0).sum())
        assert part.lengths[n] <= max_length


def test_sentences_become_batches():
    found = aligned([["a"], ["films", "very"]], [["O"], ["B-X", "O"]])
    batch = next(batches(found.columns, batch_size=4, shuffle=False))
    assert batch["input_ids"].tolist()[:2] == [[2, 10, 3, 0, 0, 0, 0, 0], [2, 4, 5, 8, 3, 0, 0, 0]]
    assert batch["labels"].tolist() == [
        [-100, 0, *[-100] * 6],
        [-100, 1, -100, 0, *[-100] * 4],
        *[[-100] * 8] * 2,
    ]
    assert batch["word_ids"].tolist()[1:3] == [[-1, 0, 0, 1, -1, -1, -1, -1], [-1] * 8]
    assert batch["attention_mask"].sum(axis=1).tolist() == [3, 5, 1, 1]
    assert batch["token_type_ids"].shape == (4, 8)


def test_everything_wrong_is_listed_by_sentence():
    with pytest.raises(ValueError, match="align_labels: 5 problems") as error:
        aligned([["a"], [], ["a", "film"]], [["Q"], [], ["O"]], max_length=2, pieces="last")
    for part in (
        "max_length=2 leaves no room beside 2 special tokens",
        "pieces='last' is not one of",
        "sentence 1 has no words",
        r"sentence 0: \['Q'\] are not among the labels \['O', 'B-X', 'I-X'\]",
        "sentence 2: 2 words and 1 labels",
    ):
        error.match(part)
    with pytest.raises(ValueError, match=r"sentence 1: \['3'\] are not among the labels"):
        aligned([["a"], ["a"]], [np.array([2]), np.array([3])])
    with pytest.raises(ValueError, match="labels such as 2 are indices: give their label_names"):
        aligned([["a"]], [np.array([2])], label_names=None)
    with pytest.raises(ValueError, match=r"words\[0\]: one text.*\n.*word_labels\[0\]: one"):
        aligned(["a"], ["O"])
    with pytest.raises(ValueError, match="2 sentences and 1 rows of labels"):
        aligned([["a"], ["a"]], [["O"]])
    with pytest.raises(ValueError, match=r"token id 10 \(example 0: \['a'\]\).*vocabulary of 8"):
        aligned([["a"]], [["O"]], vocab_size=8)
    with pytest.raises(ValueError, match="name a class twice"):
        aligned([["a"]], [["O"]], label_names=["O", "O"])
    with pytest.raises(ValueError, match="sentence 0 has no tokens"):
        align_labels(BYTES[False], [[""]], max_length=8)
