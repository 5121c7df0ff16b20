"""`fmjax transcribe` by models of CTC: chunks that are the whole, searches, times, bad input."""

import dataclasses
import gzip
import json

import jax
import numpy as np
import pytest
import soundfile

import fmjax
from fmjax.cli import main
from fmjax.data.characters import Characters
from fmjax.data.mel_frames import MelFrames, load_processor
from fmjax.data.waveform import WaveformProcessor
from fmjax.generate.ctc import align, greedy, greedy_spans
from fmjax.models import deepspeech2, wav2vec2
from fmjax.recipes.ctc_transcription import (
    Symbols,
    chunks,
    hear,
    load_speller,
    parts,
    spell,
    spelled,
)
from fmjax.tree import flatten, unflatten

CHARACTERS = Characters(("<pad>", "<s>", "</s>", "<unk>", "|", "a", "b", "c"))
WAVES = wav2vec2.sized(
    wav2vec2.Config, 1, 8, 2, vocab_size=8, conv_dim=(6, 6), conv_kernel=(8, 5), conv_stride=(5, 4),
    num_conv_pos_embeddings=3, num_conv_pos_embedding_groups=2, initializer_range=0.5,
    **wav2vec2.STABLE,
)  # fmt: skip
SPECTRA = deepspeech2.Config(
    num_features=10, conv_channels=(3,), conv_sizes=((5, 5),), conv_strides=((2, 2),),
    hidden_size=8, num_hidden_layers=1, dense_sizes=(), vocab_size=8,
)  # fmt: skip
MELS = MelFrames(1000, 10, 50, 20, 64, dither=1e-4, peak=0.5)


def saved(folder, family, config, processor):
    model, variables = fmjax.create(family, config, head="ctc", rng=jax.random.key(1))
    fmjax.save(folder, model, variables, Symbols(CHARACTERS, processor))
    return folder


@pytest.fixture(scope="module")
def waves(tmp_path_factory):
    processor = WaveformProcessor(1000, do_normalize=False, return_attention_mask=True)
    return saved(tmp_path_factory.mktemp("waves"), "wav2vec2", WAVES, processor)


@pytest.fixture(scope="module")
def spectra(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("spectra"), "deepspeech2", SPECTRA, MELS)


@pytest.fixture(scope="module")
def sound():
    return np.random.default_rng(0).normal(size=7013).astype(np.float32) * 0.3


def test_chunks_have_each_frame_once(waves):
    """Of the recording's own frames, whatever blocks it comes in."""
    speller = load_speller(waves)
    assert speller.hop == 20
    for length in (7, 999, 2000, 2001, 5000, 7013):
        samples = np.arange(length, dtype=np.float32)
        blocks = np.array_split(samples, range(333, length, 333))
        kept, held = [], 0
        for chunk in chunks(speller, iter(blocks), 1.0, 0.2):
            first = int(chunk.samples[0])
            assert first % speller.hop == 0
            frames = np.arange(first // 20, first // 20 + speller.frames(len(chunk.samples)))
            kept += frames[chunk.first : chunk.last].tolist()
            held = max(held, len(chunk.samples))
        assert kept == [*range(speller.frames(length))]
        assert held <= 1000
    with pytest.raises(ValueError, match="two strides"):
        next(chunks(speller, iter(()), 1.0, 0.5))


def test_chunks_hear_what_the_whole_does(waves, sound):
    """Of a model that hears no further than a stride: its attention gives nothing."""
    speller = load_speller(waves)
    flat = flatten(speller.variables)
    flat |= {path: 0 * leaf for path, leaf in flat.items() if "/attn/out/" in path}
    speller = dataclasses.replace(speller, variables=unflatten(flat))
    (whole,) = hear(speller, [(sound, 1000)])
    assert whole.seconds == 7.013
    assert len(whole.log_probabilities) == speller.frames(7013)
    inside, beside = hear(speller, [(sound, 1000), (sound[:3000], 1000)], chunk=3.0, stride=0.5)
    np.testing.assert_allclose(inside.log_probabilities, whole.log_probabilities, atol=1e-4)
    again = hear(speller, [(sound[:3000], 1000)], batch_size=1)[0]
    np.testing.assert_allclose(beside.log_probabilities, again.log_probabilities, atol=1e-4)


def test_a_spectrum_hears_as_the_model_was_trained(spectra, sound, tmp_path):
    speller = load_speller(spectra)
    assert speller.hop == 40
    assert speller.symbols.processor == MELS
    batch = MELS([sound[:4000]], 1000)
    out = speller.model.apply(speller.variables, **batch)
    expected = jax.nn.log_softmax(out.logits[0])
    (heard,) = hear(speller, [(sound[:4000], 1000)])
    np.testing.assert_allclose(heard.log_probabilities, expected, rtol=1e-4, atol=1e-5)
    (found,) = spell(speller, [(sound[:4000], 1000)])
    assert found.text == CHARACTERS.decode(greedy(expected, blank=0))
    MELS.save_pretrained(tmp_path)
    assert load_processor(tmp_path) == MELS
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"feature_extractor_type": "MelFrames", "n_fft": 1.5, "mels": 3})
    )
    with pytest.raises(ValueError, match="mels=3 is unknown"):
        load_processor(tmp_path)


def test_a_search_finds_words_and_their_times(waves, tmp_path):
    """n-grams of words change what is found; times are those of the symbols' frames."""
    text = tmp_path / "text.txt"
    text.write_text("ab ba\nab ba\n\nab\n")
    rows = np.full((12, 8), 1e-3)
    said = [0, 5, 5, 0, 6, 4, 6, 7, 0, 0, 0, 0]  # "ab bc": c and a are about as likely
    rows[np.arange(12), said] = 1.0
    rows[7, 5] = 0.8
    scores = np.log(rows / rows.sum(axis=1, keepdims=True))
    plain = load_speller(waves, beams=8)
    assert plain.text(spelled(plain, scores)) == "ab bc"
    assert plain.text(spelled(load_speller(waves), scores)) == "ab bc"
    told = load_speller(waves, beams=8, ngram=text, weight=1.0)
    spans = spelled(told, scores)
    assert told.text(spans) == "ab ba"
    assert [(span.start, span.end) for span in spans] == [(1, 3), (4, 5), (5, 6), (6, 7), (7, 8)]
    with pytest.raises(ValueError, match="beams above 1"):
        load_speller(waves, ngram=text)
    (tmp_path / "lm.arpa.gz").write_bytes(gzip.compress(b"nothing"))
    with pytest.raises(ValueError, match=r"lm\.arpa\.gz: its header"):
        load_speller(waves, beams=8, ngram=tmp_path / "lm.arpa.gz")


def test_alignments_are_the_likeliest_of_all():
    """Against every path of five frames."""
    rng = np.random.default_rng(3)
    scores = np.log(rng.dirichlet(np.ones(3), 5))
    paths = np.stack(np.meshgrid(*[range(3)] * 5, indexing="ij"), -1).reshape(-1, 5)
    for symbols in ([1], [1, 2], [2, 2], [1, 2, 1]):
        of = [p for p in paths if greedy(np.eye(3)[p], blank=0) == symbols]
        best = max(of, key=lambda path: scores[np.arange(5), path].sum())
        assert align(scores, symbols, blank=0) == greedy_spans(np.eye(3)[best], blank=0)
    assert align(scores, [], blank=0) == []
    with pytest.raises(ValueError, match="need 7 frames"):
        align(scores, [1, 1, 1, 1], blank=0)


def test_long_searches_are_cut_where_nobody_speaks():
    quiet = np.zeros(100, int)
    quiet[[*range(20), *range(25, 70), *range(78, 100)]] = 1
    scores = np.log(np.eye(2)[1 - quiet] + 1e-9)  # the blank is 0
    cuts = parts(scores, 0, 40)
    assert cuts[0] == (0, 32)
    assert [end for _, end in cuts[:-1]] == [start for start, _ in cuts[1:]]
    assert cuts[-1][1] == 100
    assert max(end - start for start, end in cuts) <= 40
    assert parts(np.log(np.eye(2)[[1] * 50] + 1e-9), 0, 20) == [(0, 20), (20, 40), (40, 50)]


def test_the_command_spells(waves, sound, tmp_path, capsys):
    files = [str(tmp_path / name) for name in ("a.wav", "b.wav")]
    soundfile.write(files[0], sound, 1000)
    soundfile.write(files[1], sound[:3000], 1000)
    assert main(["transcribe", *files, "--model", str(waves), "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    speller = load_speller(waves)
    alone = [spell(speller, [file])[0] for file in files]
    assert [row["text"] for row in found] == [one.text for one in alone]
    assert found[1]["seconds"] == 3.0
    assert found[0]["pieces"] is None
    assert main(["transcribe", files[0], "--model", str(waves), "--timestamps"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(line.split()[2] for line in lines[1:]) == alone[0].text
    times = [float(part) for line in lines[1:] for part in line.split()[:2]]
    assert times == sorted(times)
    assert times[-1] <= 7.02


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--task", "translate"], "does not take --task"),
        (["--beams", "0"], "beams=0 must be at least 1"),
        (["--batch-size", "0"], "batch_size=0 must be at least 1"),
        (["--beams", "4", "--ngram", "nowhere.arpa"], "nowhere.arpa"),
    ],
)
def test_bad_input_is_named(waves, sound, tmp_path, capsys, options, said):
    file = tmp_path / "a.wav"
    soundfile.write(file, sound[:500], 1000)
    assert main(["transcribe", str(file), "--model", str(waves), *options]) == 2
    assert said in capsys.readouterr().err


def test_what_is_no_sound_is_named(waves, sound, tmp_path):
    (tmp_path / "no.wav").write_bytes(b"no sound")
    with pytest.raises(ValueError, match="recording 1: it has no samples") as error:
        spell(
            load_speller(waves),
            [(sound, 1000), (np.zeros(0, np.float32), 1000), tmp_path / "no.wav"],
        )
    assert "no.wav" in str(error.value)
