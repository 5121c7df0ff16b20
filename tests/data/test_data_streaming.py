import itertools
import json
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fmjax.data.corruption import SpanCorruption
from fmjax.data.streaming import TextBlocks, stream_batches

WORDS = {"<eos>": 0, "<pad>": 1, **{f"w{i}": i + 2 for i in range(200)}}
PAD = 1


def tokenizer():
    fast = Tokenizer(models.WordLevel(WORDS, "w0"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<eos>", pad_token="<pad>")


TOKENIZER = tokenizer()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two files of 60 lines, their words numbered through; some lines empty, one endless."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = np.random.default_rng(0)
    lines, at = [], 0
    for n in range(120):
        size = 90 if n == 70 else int(draw.integers(0, 6))
        lines.append(" ".join(f"w{(at + i) % 200}" for i in range(size)))
        at += size
    for name, part in (("a.txt", lines[:60]), ("b.txt", lines[60:])):
        (folder / name).write_text("\n".join(part) + "\n")
    return folder, [line for line in lines if line]


def blocks_of(corpus, **settings):
    folder, _ = corpus
    return TextBlocks.of(folder / "a.txt", folder / "b.txt", **{"block_bytes": 128, **settings})


def stream_of(blocks, **options):
    settings = {"length": 8, "batch_size": 4, "pad_id": PAD, "blocks_at_once": 2, "prefetch": 0}
    return stream_batches(TOKENIZER, blocks, **{**settings, **options})


@settings(max_examples=60)
@given(
    st.lists(st.text(st.sampled_from("ab é\u20ac"), max_size=60), min_size=1, max_size=12),
    st.integers(16, 90),
    st.sampled_from(["\n", "\n\n", "\r\n", "\r\n\r\n"]),
    st.booleans(),
)
def test_blocks_partition_any_file(tmp_path_factory, texts, block_bytes, separator, ended):
    path = tmp_path_factory.mktemp("file") / "text.txt"
    path.write_bytes((separator.join(texts) + separator * ended).encode())
    if not path.stat().st_size:
        with pytest.raises(ValueError, match="there is no text in it"):
            TextBlocks.of(path)
        return
    blocks = TextBlocks.of(path, block_bytes=block_bytes, separator=separator)
    found = [document for n in range(len(blocks)) for document in blocks[n]]
    characters = "".join("".join(found).split())
    assert characters == "".join("".join(texts).split()), "every character once, in order"
    assert all(document.strip() for document in found)
    assert all(len(document.encode()) <= 2 * block_bytes + 4 for document in found)
    whole = [text for text in texts if text.strip()]
    if all(len((text + separator).encode()) <= block_bytes for text in texts):
        assert found == whole, "documents no longer than a block are never cut"


@pytest.mark.parametrize("block_bytes", [16, 24, 1000])
@pytest.mark.parametrize("end", ["\r\n", "\n"])
def test_empty_lines_of_other_systems_separate_too(tmp_path, end, block_bytes):
    lines = ["doc one line", "second", "", "doc two", " \t", "doc three", "", "", " four", ""]
    (tmp_path / "a.txt").write_bytes(end.join(lines).encode())
    blocks = TextBlocks.of(tmp_path / "a.txt", separator="\n\n", block_bytes=block_bytes)
    found = [document for block in blocks for document in block]
    if block_bytes > 16:  # the first document is longer than that
        assert found == [f"doc one line{end}second", "doc two", "doc three", " four"]
    assert "".join("".join(found).split()) == "doconelineseconddoctwodocthreefour"


def test_an_endless_line_is_cut_between_words(corpus):
    blocks = blocks_of(corpus)
    found = [document for n in range(len(blocks)) for document in blocks[n]]
    assert " ".join(found).split() == " ".join(corpus[1]).split()
    assert max(map(len, found)) < 300
    assert len(found) > len(corpus[1])


def test_json_lines(tmp_path):
    path = tmp_path / "docs.jsonl"
    texts = ["w1 w2", "w3\nw4", ""]
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts))
    blocks = TextBlocks.of(path, field="text", block_bytes=32)
    assert [document for n in range(len(blocks)) for document in blocks[n]] == texts
    with pytest.raises(ValueError, match=r"no JSON object with a 'other' \(KeyError"):
        list(TextBlocks.of(path, field="other"))
    path.write_text(json.dumps({"text": "w1 " * 40}) + "\n" + json.dumps({"text": 3}) + "\n")
    with pytest.raises(ValueError, match="line around byte 32 is longer than block_bytes=32"):
        list(TextBlocks.of(path, field="text", block_bytes=32))
    with pytest.raises(ValueError, match="'text' is 3, no text"):
        list(TextBlocks.of(path, field="text"))


def test_wrong_files(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"good line\nbad \xff line\n")
    with pytest.raises(ValueError, match="byte 0xff in the block at byte 0 is not UTF-8"):
        TextBlocks.of(path)[0]
    with pytest.raises(ValueError, match=r"block_bytes=3.*separator is empty.*x.gz is compressed"):
        TextBlocks.of(tmp_path / "x.gz", block_bytes=3, separator="")
    with pytest.raises(FileNotFoundError):
        TextBlocks.of(tmp_path / "none.txt")


@pytest.mark.parametrize("packing", ["documents", "concatenated"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_token_once_an_epoch(corpus, packing, shuffle):
    stream = stream_of(blocks_of(corpus), packing=packing, shuffle=shuffle, epochs=2)
    everything = list(stream)
    ids = np.concatenate([batch["input_ids"] for batch in everything])
    name = "segment_ids" if packing == "documents" else "attention_mask"
    segments = np.concatenate([batch[name] * batch["weight"][:, None] for batch in everything])
    segments = segments.astype(int)
    expected = sorted(WORDS[word] for word in " ".join(corpus[1]).split())
    found = np.sort(ids[(ids > 1)])
    np.testing.assert_array_equal(found, np.repeat(expected, 2))
    np.testing.assert_array_equal(segments > 0, ids != PAD)
    for row, numbers in zip(ids, segments, strict=True):
        for number in range(1, numbers.max() + 1):
            piece = row[numbers == number]
            words = piece[:-1] if piece[-1] == 0 else piece
            if packing == "documents":
                assert (np.diff(words) % 200 == 1).all(), "a document's words follow each other"
    index = np.concatenate([batch["index"] for batch in everything])
    count = int(sum(batch["weight"].sum() for batch in everything))
    assert index[index >= 0].tolist() == list(range(count))
    assert [batch["weight"].min() for batch in everything[:-1]] == [1] * (len(everything) - 1)
    assert stream.shapes == [(4, 8)]
    assert list(stream) == []


@settings(max_examples=12)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(0, 60),
    st.sampled_from(["documents", "concatenated", "corrupted"]),
)  # fmt: skip
def test_resume_bitwise_and_shards_partition(corpus, rows, processes, stop, kind):
    blocks = blocks_of(corpus)
    options = {"packing": "concatenated" if kind == "corrupted" else kind}
    if kind == "corrupted":
        options["corruption"] = SpanCorruption(sentinels=(500, 499, 498), eos_id=0, pad_id=PAD)

    def stream(**process):
        return stream_of(blocks, batch_size=rows * processes, seed=7, **options, **process)

    first = stream()
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    shards = [stream(process_index=p, process_count=processes) for p in range(processes)]
    for shard in shards:
        shard.set_state(state)
        assert shard.get_state() == state
    for batch in itertools.islice(first, 12):
        parts = [next(shard) for shard in shards]
        for name, values in batch.items():
            rebuilt = np.stack([part[name] for part in parts], axis=1).reshape(values.shape)
            np.testing.assert_array_equal(rebuilt, values, err_msg=name)
            assert all(part[name].dtype == values.dtype for part in parts)


def test_windows_are_read_as_they_are_needed(corpus):
    class Watched:
        fingerprint = "watched"

        def __init__(self):
            self.read = []

        def __len__(self):
            return 50

        def __getitem__(self, index):
            self.read.append(index)
            return ["w1 w2 w3"] * 8

    watched = Watched()
    stream = stream_of(watched, shuffle=False)
    assert watched.read == []
    next(stream)
    assert watched.read == [0, 1]
    for _ in range(3):
        next(stream)
    assert watched.read == [0, 1, 2, 3]
    resumed = stream_of(watched, shuffle=False)
    watched.read.clear()
    resumed.set_state(stream.get_state())
    next(resumed)
    assert watched.read == [4, 5]


def test_prefetching_changes_nothing_and_leaves_no_thread(corpus):
    blocks = blocks_of(corpus)
    ahead, plain = stream_of(blocks, prefetch=2), stream_of(blocks)
    for _ in range(15):
        expected, found = next(plain), next(ahead)
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)
    ahead.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(
        thread.name.startswith("grain") for thread in threading.enumerate()
    ):
        time.sleep(0.01)
    assert not any(thread.name.startswith("grain") for thread in threading.enumerate())


def test_documents_without_tokens(tmp_path):
    path = tmp_path / "blank.txt"
    path.write_text("\n" * 400)
    with pytest.raises(ValueError, match="no document has a token"):
        next(stream_of(TextBlocks.of(path, block_bytes=16)))
    path.write_text("\n" * 400 + "w1 w2 w3")
    batch = next(stream_of(TextBlocks.of(path, block_bytes=16)))
    assert (batch["input_ids"] == WORDS["w1"]).sum() == 4, "the windows of nothing are passed over"


def test_states_and_options_are_checked(corpus):
    blocks = blocks_of(corpus)
    state = stream_of(blocks).get_state()
    others = {
        "data": stream_of(blocks_of(corpus, block_bytes=256)),
        "blocks_at_once": stream_of(blocks, blocks_at_once=3),
        "eos_id": stream_of(blocks, end=False),
        "length": stream_of(blocks, length=9),
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=rf"another stream(.|\n)*  {name}: "):
            other.set_state(state)
    state["position"]["window"] = 10**6
    with pytest.raises(ValueError, match="window 1000000, this stream ends at"):
        stream_of(blocks, epochs=1).set_state(state)
    with pytest.raises(ValueError, match=r"batch_size=0.*length=1.*blocks_at_once=0"):
        stream_of(blocks, batch_size=0, length=1, blocks_at_once=0)
    with pytest.raises(ValueError, match=r"token id \d+ .* outside the model's vocabulary of 100"):
        list(stream_of(blocks, vocab_size=100, epochs=1))
