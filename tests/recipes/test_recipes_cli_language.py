"""The commands that write and tag text, on tiny random models."""

import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers

import fmjax
from fmjax.cli import main
from fmjax.config import write_json
from fmjax.data.tokenizer import train_tokenizer
from fmjax.generation_config import GenerationConfig
from fmjax.models import bart, bert, gpt2, roberta, t5
from fmjax.recipes import generation
from fmjax.recipes.generation import Generator, stream_text, translate_texts, write_texts
from fmjax.recipes.predict import answer_texts, embed_texts, predict_texts, tag_texts
from fmjax.recipes.texts import padding_of, text_length

LINES = [
    f"the {adjective} {noun} is {place}"
    for adjective in ("old", "new", "red")
    for noun in ("cat", "dog")
    for place in ("in", "out")
]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A random GPT-2 with a byte tokenizer and a chat template."""
    tokenizer = train_tokenizer(LINES, kind="bytebpe", vocab_size=300)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    )
    config = gpt2.Config(
        vocab_size=len(tokenizer), n_positions=96, n_embd=16, n_layer=1, n_head=2,
        initializer_range=0.5,
    )  # fmt: skip
    model, variables = fmjax.create("gpt2", config, head="causal_lm", rng=jax.random.key(0))
    return fmjax.save(tmp_path_factory.mktemp("decoder"), model, variables, tokenizer)


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    """A random BART with a unigram tokenizer."""
    tokenizer = train_tokenizer(LINES * 4, kind="unigram", vocab_size=60, sentinels=2)
    config = bart.Config(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=20,
        decoder_ffn_dim=20, max_position_embeddings=40, init_std=0.5, pad_token_id=0,
    )  # fmt: skip
    model, variables = fmjax.create("bart", config, head="seq2seq_lm", rng=jax.random.key(0))
    folder = fmjax.save(tmp_path_factory.mktemp("translator"), model, variables, tokenizer)
    (folder / "generation_config.json").write_text(
        json.dumps({"decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": 1})
    )
    return folder


def run(capsys, *argv):
    assert main(list(argv)) == 0
    return capsys.readouterr().out


def test_generate_streams_what_generate_returns(decoder, capsys):
    out = run(capsys, "generate", str(decoder), "the old", "--max-new-tokens", "12")
    model, variables = fmjax.load(decoder)
    tokenizer = fmjax.load_tokenizer(decoder)
    ids = tokenizer("the old")["input_ids"]
    tokens = fmjax.generate(
        model, variables, [ids], max_new_tokens=12, eos_token_id=tokenizer.eos_token_id
    )
    text = tokenizer.decode(tokens.tokens[0][: tokens.lengths[0]], skip_special_tokens=True)
    assert out == f"the old{text}\n"
    both = run(capsys, "generate", str(decoder), "the old", "a", "--max-new-tokens", "12", "--json")
    first, second = map(json.loads, both.splitlines())
    assert first == {"prompt": "the old", "texts": [text]}
    assert second["prompt"] == "a"


def test_generate_draws_by_the_seed(decoder, capsys):
    def draw(seed):
        return run(
            capsys, "generate", str(decoder), "the old", "--max-new-tokens", "8",
            "--temperature", "2.0", "--seed", seed, "--num-return-sequences", "2",
        )  # fmt: skip

    assert draw("1") == draw("1")
    assert draw("1") != draw("2")


def test_a_file_may_want_draws(decoder, tmp_path, capsys):
    """Which a command may have otherwise."""
    arguments = ["the old", "--max-new-tokens", "8"]
    greedy = run(capsys, "generate", str(decoder), *arguments)
    folder = shutil.copytree(decoder, tmp_path / "draws")
    write_json(folder / "generation_config.json", {"do_sample": True, "temperature": 3.0})
    assert run(capsys, "generate", str(folder), *arguments) != greedy
    assert run(capsys, "generate", str(folder), *arguments, "--greedy") == greedy
    assert main(["generate", str(folder), *arguments, "--greedy", "--top-p", "0.5"]) == 2
    assert "greedy takes no sample" in capsys.readouterr().err


def test_long_sources_are_cut_where_that_is_asked_for(translator, decoder, capsys):
    arguments = ["the old cat " * 30, "--max-new-tokens", "4"]
    for command in ("generate", "translate"):
        assert main([command, str(translator), *arguments]) == 2
        assert "more than the model's 40; cut them" in capsys.readouterr().err
        run(capsys, command, str(translator), *arguments, "--max-length", "40")
    assert main(["generate", str(decoder), "the old", "--max-length", "2"]) == 2
    assert "cuts the ends of texts, which this decoder continues" in capsys.readouterr().err


def test_a_file_may_want_beams(translator, tmp_path, capsys):
    """What cannot be streamed is written at its end; a minimum gives way to a maximum."""
    folder = shutil.copytree(translator, tmp_path / "beams")
    write_json(
        folder / "generation_config.json",
        {
            "decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": 1, "num_beams": 2,
            "min_length": 20,
        },
    )  # fmt: skip
    arguments = ["generate", str(folder), "the old cat", "--max-new-tokens", "6"]
    alone = run(capsys, *arguments)
    (text,) = json.loads(run(capsys, *arguments, "--json"))["texts"]
    assert alone == f"{text}\n"


def test_texts_are_cut_to_what_the_model_reads(decoder, translator, capsys, tmp_path):
    (tmp_path / "long.txt").write_text("the old cat " * 100)
    for folder in (decoder, translator):
        assert run(
            capsys, "embed", str(folder), str(tmp_path / "long.txt"), str(tmp_path / "v.npy")
        )
    config = roberta.Config(max_position_embeddings=20, pad_token_id=1)
    assert text_length(roberta.Model(config), 512) == 18
    assert text_length(t5.Model(t5.VARIANTS["tiny"]), 512) == 512


def test_one_text_is_no_list(decoder):
    """Each of its letters would be one."""
    with pytest.raises(ValueError, match="one text was given where a list of texts is expected"):
        predict_texts(str(decoder), "abc")
    for function in (tag_texts, embed_texts):
        with pytest.raises(ValueError, match="texts: one text was given"):
            function(str(decoder), "abc")
    with pytest.raises(ValueError, match="questions: one text was given"):
        answer_texts(str(decoder), "abc", "a text")
    for write in (write_texts, translate_texts):
        with pytest.raises(ValueError, match="texts: one text was given"):
            write(None, "abc")


def test_streams_lose_nothing_to_cleaning(decoder, monkeypatch):
    tokenizer = fmjax.load_tokenizer(decoder)
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    ids = tokenizer("do n ' t know ,")["input_ids"]
    monkeypatch.setattr(
        generation, "stream", lambda *args, **options: (np.array([[i]]) for i in ids)
    )
    generator = Generator(fmjax.load(decoder)[0], None, tokenizer, GenerationConfig())
    assert "".join(stream_text(generator, ids[:1])) == "do n ' t know ,"


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bytebpe"])
def test_words_do_not_grow_together(kind, monkeypatch):
    """Where the prompt ends a space may follow, which tokenizers drop at the start of a text."""
    tokenizer = train_tokenizer(LINES * 4, kind=kind, vocab_size=300)
    config = gpt2.Config(vocab_size=len(tokenizer), n_positions=8, n_embd=2, n_layer=1, n_head=1)
    ids = tokenizer("the old cat is out", add_special_tokens=False)["input_ids"]
    prompt = tokenizer("the old", add_special_tokens=False)["input_ids"]
    assert ids[: len(prompt)] == prompt
    new = ids[len(prompt) :]
    monkeypatch.setattr(
        generation, "stream", lambda *args, **options: (np.array([[i]]) for i in new)
    )
    generator = Generator(gpt2.Model(config, head="causal_lm"), None, tokenizer, GenerationConfig())
    assert generator.text_of(new, prompt) == " cat is out"
    assert "".join(stream_text(generator, prompt)) == " cat is out"
    answers = Generator(
        bart.Model(bart.VARIANTS["tiny"], head="seq2seq_lm"), None, tokenizer, GenerationConfig()
    )
    assert answers.text_of(prompt, new) == "the old"


def test_chat_reads_lines_and_keeps_the_conversation(decoder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nthe old cat\n\n"))
    out = run(capsys, "chat", str(decoder), "--system", "be brief", "--max-new-tokens", "4")
    assert out.count("\n") >= 2


def test_translate(translator, capsys):
    out = run(
        capsys, "translate", str(translator), "the old cat", "a dog", "--max-new-tokens", "6",
        "--num-beams", "2",
    )  # fmt: skip
    assert len(out.splitlines()) == 2
    assert main(["translate", str(translator), "a", "--target-language", "xx_XX"]) == 2
    assert "xx_XX" in capsys.readouterr().err


def test_tag(tiny_bert, tmp_path, capsys):
    model, variables = fmjax.load(
        tiny_bert, head="token_classification", num_labels=("A", "N"), new=("head/",)
    )
    fmjax.save(tmp_path, model, variables, fmjax.load_tokenizer(tiny_bert))
    out = run(capsys, "tag", str(tmp_path), "a wonderful film, long.", "plot")
    pairs = [pair.rsplit("/", 1) for pair in out.splitlines()[0].split(" ")]
    assert [word for word, _ in pairs] == ["a", "wonderful", "film", ",", "long", "."]
    assert {tag for _, tag in pairs} <= {"A", "N"}
    cut = json.loads(
        run(capsys, "tag", str(tmp_path), "film plot actor", "--max-length", "4", "--json")
    )
    assert cut["tags"][2] == ["actor", None]
    # What it says is what the model says.
    batch = fmjax.load_tokenizer(tmp_path)("film plot", return_tensors="np")
    best = np.argmax(model.apply(variables, **batch).logits[0], axis=-1)
    assert [tag for _, tag in cut["tags"]][:1] != [None]
    assert best.shape == (4,)


@pytest.mark.parametrize("command", ["tag", "predict"])
def test_another_heads_weights_are_not_taken_for_its_own(command, tiny_bert, tmp_path, capsys):
    """A classifier of texts has a classifier of tokens' shapes."""
    wrong = "token_classification" if command == "predict" else "sequence_classification"
    model, variables = fmjax.load(tiny_bert, head=wrong, num_labels=("A", "N"), new=("head/",))
    fmjax.save(tmp_path, model, variables, fmjax.load_tokenizer(tiny_bert))
    assert main([command, str(tmp_path), "a film"]) == 2
    assert f"has the head {wrong!r}" in capsys.readouterr().err


@pytest.fixture(scope="module")
def unpadded(decoder, tmp_path_factory):
    """A classifier as GPT-2's and Llama's are: without a padding token."""
    tokenizer = fmjax.load_tokenizer(decoder)
    tokenizer.pad_token = None
    model, variables = fmjax.load(
        decoder, head="sequence_classification", num_labels=("A", "N"), new=("head/",)
    )
    return fmjax.save(tmp_path_factory.mktemp("unpadded"), model, variables, tokenizer)


def test_classifiers_without_a_padding_token(unpadded):
    assert fmjax.load_tokenizer(unpadded).pad_token_id is None
    texts = ["the old cat is in", "a dog"]
    _, rows = predict_texts(str(unpadded), texts)
    model, variables = fmjax.load(unpadded)
    assert model.config.pad_token_id is None
    run = jax.jit(lambda ids: model.apply(variables, input_ids=ids).logits)
    tokenizer = fmjax.load_tokenizer(unpadded)
    for text, row in zip(texts, rows, strict=True):
        logits = run(tokenizer(text, return_tensors="np")["input_ids"])
        np.testing.assert_allclose(row, jax.nn.softmax(logits)[0], atol=1e-5)
    said = model.clone(config=dataclasses.replace(model.config, pad_token_id=3))
    assert padding_of(tokenizer, model) == tokenizer.eos_token_id
    assert padding_of(tokenizer, said) == 3


@pytest.mark.slow
def test_they_are_fine_tuned_and_know_it_then(unpadded, tmp_path):
    """PyTorch refuses batches of a causal classifier whose config has no padding token."""
    lines = [f"{line},{line.split()[-1]}\n" for line in LINES * 3]
    (tmp_path / "texts.csv").write_text("text,label\n" + "".join(lines))
    files = [
        option for name in ("--data", "--val") for option in (name, str(tmp_path / "texts.csv"))
    ]
    arguments = ["--model", str(unpadded), "--epochs", "1", "--max-length", "32", *files]
    assert main(["finetune", "--output", str(tmp_path / "run"), *arguments]) == 0
    export = tmp_path / "run" / "export"
    twin = transformers.AutoModelForSequenceClassification.from_pretrained(export).eval()
    tokenizer = fmjax.load_tokenizer(export)
    assert twin.config.pad_token_id == tokenizer.eos_token_id
    tokenizer.pad_token = tokenizer.eos_token
    texts = ["the old cat is in", "a dog"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    wanted = torch.softmax(twin(**batch).logits, -1).detach().numpy()
    np.testing.assert_allclose(predict_texts(str(export), texts)[1], wanted, atol=1e-5)


def test_answer(tiny_bert, tmp_path, capsys):
    model, variables = fmjax.load(
        tiny_bert, head="question_answering", num_labels=2, new=("head/",)
    )
    fmjax.save(tmp_path, model, variables, fmjax.load_tokenizer(tiny_bert))
    text = "the film was long and the plot was red " * 5
    (tmp_path / "text.txt").write_text(text)
    arguments = ["answer", str(tmp_path), "long film", "--must-answer", "--max-length", "16"]
    plain = run(capsys, *arguments, "--context", text)
    assert plain.strip() in text
    found = json.loads(run(capsys, *arguments, "--file", str(tmp_path / "text.txt"), "--json"))
    assert found["answer"] == plain.strip() == text[found["start"] : found["end"]]
    assert main([*arguments]) == 2
    assert "exactly one of --context" in capsys.readouterr().err
    assert main(["answer", str(tmp_path), " ", "--context", "a"]) == 2
    assert "questions [0] are empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("generate", "{decoder}"), "no texts"),
        (("generate", "{decoder}", ""), "the prompt is empty"),
        (("generate", "{decoder}", "", "a"), "prompts [0] are empty"),
        (("generate", "{decoder}", "the " * 200), "96"),
        (("generate", "{decoder}", "a", "--temperature", "-1"), "temperature"),
        (("generate", "{bert}", "a"), "generating text needs one of"),
        (("chat", "{plain}"), "no chat template"),
        (("translate", "{decoder}", "a"), "needs an encoder-decoder"),
    ],
)
def test_bad_input(argv, words, decoder, tiny_bert, tmp_path, capsys):
    plain = tmp_path / "plain"
    tokenizer = fmjax.load_tokenizer(decoder)
    tokenizer.chat_template = None
    fmjax.save(plain, *fmjax.load(decoder), tokenizer)
    places = {"decoder": decoder, "bert": tiny_bert, "plain": plain}
    assert main([part.format(**places) for part in argv]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_a_tokenizer_of_another_model_is_refused(decoder, tmp_path, capsys):
    config = bert.Config(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16, is_decoder=True,
    )  # fmt: skip
    model, variables = fmjax.create("bert", config, head="causal_lm", rng=jax.random.key(0))
    fmjax.save(tmp_path, model, variables, fmjax.load_tokenizer(decoder))
    assert main(["generate", str(tmp_path), "a"]) == 2
    assert "the model's vocabulary is 20" in capsys.readouterr().err
