"""Sounds: what is read, what is changed and said, what is refused; sets of them."""

import io
import json
import logging
import struct

import numpy as np
import pytest
import soundfile

from fmjax.data.audio import open_audio, read_audio
from fmjax.data.audio_sets import (
    AudioExamples,
    from_audio_datasets,
    read_audio_folder,
    read_audio_manifest,
)
from fmjax.data.batches import batches
from fmjax.data.buckets import choose_buckets
from fmjax.data.resampling import resample, resample_blocks

RATE = 16_000


def noise(seconds=0.1, rate=RATE, seed=0):
    samples = np.random.default_rng(seed).normal(size=int(seconds * rate)) * 0.1
    return samples.clip(-1, 1).astype(np.float32)


def encoded(samples, rate=RATE, kind="WAV", subtype=None):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return bytearray(file.getvalue())


def patched(at, content, **options):
    data = encoded(noise(), **options)
    data[at : at + len(content)] = content
    return bytes(data)


@pytest.mark.parametrize(("old", "new"), [(44_100, 16_000), (8_000, 16_000), (48_000, 16_000)])
def test_resampling_keeps_what_fits_and_nothing_else(old, new):
    """Tones below nine tenths of the lower Nyquist frequency stay, those above it go; in blocks of
    any size the result is the same."""
    time = np.arange(old // 2) / old
    inner = slice(new // 20, -new // 20)
    for share in (0.1, 0.88):
        frequency = share * min(old, new) / 2
        tone = resample(np.sin(2 * np.pi * frequency * time).astype(np.float32), old, new)
        assert len(tone) == new // 2
        expected = np.sin(2 * np.pi * frequency * np.arange(len(tone)) / new)
        np.testing.assert_allclose(tone[inner], expected[inner], atol=2e-5)  # 7e-6 measured
    if new < old:
        above = np.sin(np.pi * 1.01 * new * time).astype(np.float32)
        assert np.abs(resample(above, old, new)[inner]).max() < 2e-5
    whole = noise(0.3, old)
    expected = resample(whole, old, new)
    for size in (700, old // 7 + 1):
        blocks = [whole[start : start + size] for start in range(0, len(whole), size)]
        parts = list(resample_blocks(blocks, old, new))
        np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["PCM_16", "PCM_24", "FLOAT", "PCM_U8", "FLAC"])
def test_files_of_every_kind(kind, tmp_path):
    samples = noise()
    path = tmp_path / ("sound.flac" if kind == "FLAC" else "sound.wav")
    soundfile.write(path, samples, RATE, subtype=None if kind == "FLAC" else kind)
    sound = read_audio(path)
    assert sound.rate == RATE
    assert sound.changes == ()
    np.testing.assert_allclose(sound.samples, samples, atol=1e-2 if kind == "PCM_U8" else 1e-4)


def test_changes_are_said():
    stereo = np.stack([noise(), 0 * noise()], axis=1)
    sound = read_audio(bytes(encoded(stereo, 8_000)), RATE)
    assert sound.changes == (
        "its 2 channels were averaged",
        "it was resampled from 8000 to 16000 Hz",
    )
    expected = resample(stereo.mean(axis=1), 8_000, RATE)
    np.testing.assert_allclose(sound.samples, expected, atol=1e-4)
    again = read_audio(((stereo * 2**15).astype(np.int16), 8_000), RATE)
    np.testing.assert_allclose(again.samples, expected, atol=1e-4)
    assert read_audio((np.zeros(10), RATE)).changes == ("it is silent: all samples are 0",)


WRONG = {
    "no bytes": (b"", "0 bytes are no sound"),
    "a text": (b"hello, world", "no sound; it must be a WAV or FLAC"),
    "another format": (bytes(encoded(noise(), kind="OGG")), "it must be a WAV or FLAC"),
    "a name alone": (b"RIFF\x24\x00\x00\x00WAVE", "has no samples"),
    "truncated WAV": (
        bytes(encoded(noise())[:1000]),
        "truncated: its header has 3200 bytes .* 956",
    ),
    "truncated FLAC": (bytes(encoded(noise(2.0), kind="FLAC")[:20_000]), "truncated|broken at"),
    "corrupt FLAC": (patched(900, bytes(500), kind="FLAC"), "broken at sample"),
    "no samples": (bytes(encoded(noise()[:0])), "has no samples; record it again"),
    "rate of 0": (patched(24, struct.pack("<I", 0)), "broken"),
    "rate of 2 GHz": (patched(24, struct.pack("<I", 2**31 - 1)), "2147483647 Hz is no rate"),
    "65535 channels": (patched(22, struct.pack("<H", 65_535)), "broken"),
    "2^36 frames": (patched(21, b"\xff" * 5, kind="FLAC"), "broken at|truncated"),
    "nan": (
        bytes(encoded(np.array([0, np.nan, 1], np.float32), subtype="FLOAT")),
        "1 samples are no finite numbers, the first is number 1",
    ),
    "integers as floats": (
        (np.array([0, -9000, 500], np.float32), RATE),
        "sample 1 is 9000; floats are within 1, .* divide them by 32768",
    ),
    "a file of them": (
        bytes(encoded(np.array([0, 300, -70], np.float32), subtype="FLOAT")),
        "sample 1 is 300; floats are within 1",
    ),
    "bytes as samples": ((np.zeros(9, np.uint8), RATE), "uint8"),
    "a list": (([0.1, 0.2], RATE), "samples are a list; give a NumPy array"),
    "half a rate": ((np.zeros(9), 8000.0), r"8000\.0 Hz is no rate of sounds; .* an integer"),
    "nothing known": (3, "a int is no sound"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_sound_is_refused(case):
    source, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        read_audio(source)


def test_long_files_are_read_in_blocks(tmp_path):
    """Blocks are the whole, and a whole that is too long is refused before it is held."""
    path = tmp_path / "long.flac"
    samples = np.stack([noise(7.3, 8_000)] * 2, axis=1)
    soundfile.write(path, samples, 8_000)
    with open_audio(path, RATE) as sound:
        blocks = list(sound.blocks(2.0))
    assert [len(block) for block in blocks] == [32_000] * 3 + [20_800]
    np.testing.assert_array_equal(np.concatenate(blocks), read_audio(path, RATE).samples)
    with pytest.raises(ValueError, match="longer than 3 seconds; read it in blocks"):
        read_audio(path, max_seconds=3)


def write_set(folder):
    """Two classes of two sounds, one of them at another rate."""
    for number, name in enumerate(("no/a.wav", "no/b.flac", "yes/c.wav", "yes/d.wav")):
        (folder / name).parent.mkdir(exist_ok=True)
        rate = 8_000 if number == 3 else RATE
        soundfile.write(folder / name, noise(0.05 + 0.01 * number, rate, number), rate)


def test_folders_and_manifests(tmp_path, caplog):
    write_set(tmp_path)
    with caplog.at_level(logging.WARNING):
        folder = read_audio_folder(tmp_path)
    assert "of 1 of 4 sounds: it was resampled from 8000 to 16000 Hz" in caplog.text
    assert folder.label_names == ("no", "yes")
    assert folder.labels.tolist() == [0, 0, 1, 1]
    assert folder.seconds == pytest.approx(0.26)
    rows = [
        {"path": name, "text": f"it is {name}", "label": name.split("/")[0]}
        for name in folder.names
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = ["path\ttext\tlabel", *("\t".join(row.values()) for row in rows)]
    (tmp_path / "list.tsv").write_text("\n".join(lines))
    for name in ("list.jsonl", "list.tsv"):
        listed = read_audio_manifest(tmp_path / name, label="label")
        assert listed.texts == [row["text"] for row in rows]
        assert listed.label_names == folder.label_names
        np.testing.assert_array_equal(listed.labels, folder.labels)
        for mine, theirs in zip(listed.samples, folder.samples, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_manifests_name_every_wrong_row(tmp_path):
    write_set(tmp_path)
    (tmp_path / "broken.wav").write_bytes(bytes(encoded(noise())[:99]))
    cells = ["no/a.wav,hello", "no/none.wav,hello", "broken.wav,hello", "no/b.flac,", ",hello"]
    (tmp_path / "list.csv").write_text("\n".join(["path,text", *cells]))
    with pytest.raises(ValueError, match="4 problems") as error:
        read_audio_manifest(tmp_path / "list.csv")
    said = str(error.value)
    assert "row 3: 'path' no/none.wav is not read: [Errno 2]" in said
    assert "row 4: 'path' broken.wav is not read: the file is truncated" in said
    assert "row 5: 'text' is empty" in said
    assert "row 6: 'path' is missing" in said


def test_datasets_with_sounds(tmp_path):
    """Bytes in the set, decoded by us: torchcodec is not needed."""
    import datasets

    write_set(tmp_path)
    names = ["no/a.wav", "no/b.flac", "yes/d.wav"]
    features = datasets.Features(
        {
            "audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["yes", "no"]),
        }
    )
    table = {
        "audio": [{"bytes": (tmp_path / name).read_bytes(), "path": name} for name in names],
        "sentence": ["one", "two", "three"],
        "label": [1, 1, 0],
    }
    made = datasets.Dataset.from_dict(table, features=features)
    made = made.cast_column("audio", datasets.Audio())
    read = from_audio_datasets(made, text="sentence", label="label")
    assert read.texts == ["one", "two", "three"]
    assert read.labels.tolist() == [1, 1, 0]
    assert read.label_names == ("yes", "no")
    assert read.names == names
    np.testing.assert_array_equal(read.samples[2], read_audio(tmp_path / names[2]).samples)


def test_sounds_are_batched_by_length():
    sounds = [noise(0.01 * (1 + number % 5), seed=number) for number in range(12)]
    examples = AudioExamples(sounds, RATE, texts=["ab"] * 6 + ["abc"] * 6)
    columns = examples.columns(encode=lambda text: [ord(letter) - 96 for letter in text])
    stream = batches(columns, batch_size=4, seed=0)
    seen = 0
    for _ in range(stream.batches_per_epoch):
        batch = next(stream)
        for row, index in enumerate(batch["index"]):
            if index < 0:
                continue
            seen += 1
            length = len(sounds[index])
            assert batch["attention_mask"][row].sum() == length
            np.testing.assert_array_equal(batch["input_values"][row, :length], sounds[index])
            assert not batch["input_values"][row, length:].any()
            labels = batch["labels"][row]
            assert labels[labels != -100].tolist() == [1, 2, 3][: len(examples.texts[index])]
    assert seen == 12
    frames = examples.columns(lambda one: one[: len(one) // 4 * 4].reshape(-1, 4))
    assert next(batches(frames, batch_size=4, seed=0))["input_features"].shape[-1] == 4
    with pytest.raises(ValueError, match="sound 4 with"):
        examples.columns(max_seconds=0.045)
    with pytest.raises(ValueError, match="12 transcripts have no tokens, the first is 'ab'"):
        examples.columns(encode=lambda text: [])


def test_buckets_of_samples():
    """As many lengths as sounds: few buckets all the same, as good as equal parts at least."""
    lengths = np.random.default_rng(0).integers(2_000, 480_000, 5_000)
    ends = choose_buckets(lengths, max_length=480_000)
    assert len(ends) == 4
    assert ends[-1] >= lengths.max()
    assert not any(end % 8 for end in ends)
    equal = np.linspace(120_000, 480_000, 4)
    cost = [np.asarray(e)[np.searchsorted(e, lengths)].sum() for e in (ends, equal)]
    assert cost[0] <= cost[1]
