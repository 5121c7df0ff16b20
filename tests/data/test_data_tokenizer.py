import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from fmjax.data.tokenizer import train_tokenizer

TEXTS = [
    "The river runs through the old town, and the town runs along the river.",
    "In winter the river freezes; in summer the children swim in it.",
    "Old children's stories say that the town was older than the river.",
    "She said: “Winter is coming, naïve one!” — and winter came.",
] * 3
SIZES = {"bytebpe": 330, "wordpiece": 130, "unigram": 160}
# Neither words nor characters of the texts.
FOREIGN = "Zwölf Boxkämpfer  jagen\tViktor\n東京 🙂"


@pytest.fixture(scope="module")
def trained():
    return {
        kind: train_tokenizer(iter(TEXTS), kind=kind, vocab_size=size, max_length=64)
        for kind, size in SIZES.items()
    }


@pytest.mark.parametrize("kind", SIZES)
def test_the_same_texts_give_the_same_tokenizer(trained, kind):
    again = train_tokenizer(TEXTS, kind=kind, vocab_size=SIZES[kind], max_length=64)
    assert again.backend_tokenizer.to_str() == trained[kind].backend_tokenizer.to_str()
    other = train_tokenizer(TEXTS[:3], kind=kind, vocab_size=SIZES[kind])
    assert other.get_vocab() != again.get_vocab()


@pytest.mark.parametrize(
    ("kind", "model_type", "first"),
    [
        ("bytebpe", "gpt2", ["<|endoftext|>", "<|pad|>"]),
        ("wordpiece", "bert", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]),
        ("unigram", "t5", ["<pad>", "</s>", "<unk>"]),
    ],
)
def test_folders_are_read_by_auto_tokenizer(trained, tmp_path, kind, model_type, first):
    tokenizer = trained[kind]
    tokenizer.save_pretrained(tmp_path)
    assert {"tokenizer.json", "tokenizer_config.json"} <= {p.name for p in tmp_path.iterdir()}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.convert_ids_to_tokens(list(range(len(first)))) == first
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert sorted(loaded.get_vocab().values()) == list(range(len(loaded)))
    assert len(loaded) == SIZES[kind]
    assert loaded.model_max_length == 64
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    batch = [*TEXTS[:4], FOREIGN, ""]
    for pair in (None, batch[::-1]):
        a, b = (t(batch, pair, padding=True, truncation=True) for t in (tokenizer, loaded))
        assert a.data == b.data
        assert np.asarray(a["input_ids"]).max() < len(loaded)


def test_bytes_come_back_exactly(trained):
    tokenizer = trained["bytebpe"]
    for text in [*TEXTS, FOREIGN, "", " ", "\x00\ud7ff"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token_id == 1
    tokens = tokenizer.tokenize(TEXTS[0])
    assert "Ġriver" in tokens
    assert len(tokens) < len(TEXTS[0]) / 2
    # The offset of a word is without the space before it.
    offsets = tokenizer("a river", return_offsets_mapping=True)["offset_mapping"]
    assert offsets == [(0, 1), (2, 7)]


def test_wordpiece_is_as_berts(trained):
    tokenizer = trained["wordpiece"]
    encoding = tokenizer("the river", "winter Qq")
    tokens = tokenizer.convert_ids_to_tokens(encoding["input_ids"])
    assert tokens == ["[CLS]", "the", "river", "[SEP]", "winter", "[UNK]", "[SEP]"]
    assert encoding["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert list(encoding) == ["input_ids", "token_type_ids", "attention_mask"]
    assert tokenizer.decode(
        tokenizer("The river stories!")["input_ids"], skip_special_tokens=True
    ) == ("The river stories!")
    # Every word of known characters can be written, with capitals and accents.
    assert tokenizer.tokenize("naïve Winter")[0][0] == "n"
    assert "[UNK]" not in tokenizer.tokenize("naïve Winter thronest")
    lower = train_tokenizer(TEXTS, kind="wordpiece", vocab_size=130, lowercase=True)
    assert lower.tokenize("NAÏVE River") == lower.tokenize("naive river")
    assert lower.unk_token_id not in lower("NAÏVE River")["input_ids"]


def test_unigram_is_as_t5s(trained):
    tokenizer = trained["unigram"]
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("the  river", "winter")["input_ids"])
    assert [token for token in tokens if token == "</s>"] == ["</s>"] * 2
    assert tokens[-1] == "</s>"
    assert "".join(tokens) == "▁the▁river</s>▁winter</s>"
    size = len(tokenizer)
    sentinels = [f"<extra_id_{n}>" for n in range(100)]
    assert tokenizer.convert_tokens_to_ids(sentinels) == list(range(size - 1, size - 101, -1))
    assert "<extra_id_3>" in tokenizer.tokenize("the<extra_id_3> river")
    assert tokenizer.decode(tokenizer(TEXTS[0])["input_ids"], skip_special_tokens=True) == TEXTS[0]
    scores = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
    assert scores[3:] == sorted(scores[3:], key=lambda item: (-item[1], item[0]))
    few = train_tokenizer(TEXTS, kind="unigram", vocab_size=80, sentinels=4)
    assert few.convert_tokens_to_ids("<extra_id_0>") == len(few) - 1
    assert "<extra_id_4>" not in few.get_vocab()


def test_longer_pieces_cover_more_text(trained):
    small = train_tokenizer(TEXTS, kind="wordpiece", vocab_size=100)
    assert len(small) == 100
    assert len(small.tokenize(TEXTS[0])) > len(trained["wordpiece"].tokenize(TEXTS[0]))
    # A small corpus does not have so many pieces.
    for kind in SIZES:
        most = train_tokenizer(TEXTS, kind=kind, vocab_size=20_000)
        assert SIZES[kind] < len(most) < 1000


@pytest.mark.parametrize("kind", SIZES)
def test_further_special_tokens(kind):
    tokenizer = train_tokenizer(
        TEXTS, kind=kind, vocab_size=SIZES[kind], special_tokens=["<|user|>"], sentinels=None
    )
    first = {"bytebpe": 2, "wordpiece": 5, "unigram": 3}[kind]
    assert tokenizer.convert_tokens_to_ids("<|user|>") == first
    ids = tokenizer("the <|user|> river")["input_ids"]
    assert first in ids
    assert "user" not in tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "sentencepiece"}, r"kind 'sentencepiece' is not one of \['bytebpe', 'unigram'"),
        (
            {"vocab_size": 257},
            "vocab_size=257 has no room for 2 special tokens and 256 bytes: 258 at",
        ),
        ({"special_tokens": ["<|pad|>"]}, r"special token '<\|pad\|>' is given twice"),
        (
            {"special_tokens": ["a", "a", " "]},
            r"2 problems\n.*'a' is given twice\n  a special token",
        ),
        ({"kind": "unigram", "special_tokens": ["<extra_id_3>"]}, "'<extra_id_3>' is given twice"),
        ({"kind": "unigram", "sentinels": -1}, "sentinels=-1 is negative"),
        ({"sentinels": 5}, "sentinels=5 with kind='bytebpe': only 'unigram' has some"),
        ({"kind": "unigram", "vocab_size": 103}, "103 special tokens and 1 characters"),
        ({"texts": "corpus.txt"}, "texts: one text was given where a list"),
        ({"texts": []}, "no text to train a tokenizer on"),
        ({"texts": ["", " \n"], "kind": "wordpiece"}, "no text to train a tokenizer on"),
        ({"texts": ["a", None]}, "text 1 is None, a string was expected"),
    ],
)
def test_bad_arguments(options, message):
    options = {"texts": TEXTS, "kind": "bytebpe", "vocab_size": 300} | options
    with pytest.raises(ValueError, match=message):
        train_tokenizer(options.pop("texts"), **options)


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_a_vocabulary_below_the_characters_is_refused(kind):
    characters = "".join(chr(0x3B1 + n) for n in range(20))
    options = {"kind": kind, "sentinels": 2 if kind == "unigram" else None}
    with pytest.raises(ValueError, match=r"vocab_size=20 has no room.*kind='bytebpe' needs 256"):
        train_tokenizer([characters], vocab_size=20, **options)
    # The 20 of which 19 also continue a word; the 20 and the start of a word.
    enough = {"wordpiece": 5 + 1 + 19, "unigram": 5 + 21}[kind]
    tokenizer = train_tokenizer([characters], vocab_size=enough, **options)
    assert len(tokenizer) == enough
    assert tokenizer.unk_token_id not in tokenizer(characters)["input_ids"]


def test_texts_are_streamed():
    drawn = []

    def stream():
        for n in range(2500):
            drawn.append(n)
            yield f"text number {n}"

    tokenizer = train_tokenizer(stream(), kind="bytebpe", vocab_size=300)
    assert len(drawn) == 2500
    assert "Ġnumber" in tokenizer.get_vocab()
