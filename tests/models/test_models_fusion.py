"""Fused encoders: what is missing changes nothing, and files and orders change nothing either."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import shuffled

import fmjax
from fmjax.config import config_to_json, parse_config
from fmjax.models import bart, bert, deepspeech2, efficientnet_lite, fusion, mlp, wav2vec2
from fmjax.tree import flatten

TINY = fusion.VARIANTS["tiny"]
CO, *OTHERS = ("co_attention", "late", "cross_attention")
KINDS = [CO, *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)]


def examples(rows=3):
    rng = np.random.default_rng(0)
    mask = np.ones((rows, 5), np.int32)
    mask[1, 3:] = 0
    return {
        "input_ids": rng.integers(3, 60, (rows, 5)),
        "attention_mask": mask,
        "pixel_values": rng.normal(size=(rows, 8, 8, 3)).astype(np.float32),
        "features": rng.normal(size=(rows, 4)).astype(np.float32),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_missing_changes_nothing(kind):
    """A row without its picture, text or numbers: outputs and gradients are bitwise the same
    whatever stands there, numbers or not.
    """
    text, image, table = TINY.encoders
    shallow = [(n, dataclasses.replace(c, num_hidden_layers=1)) for n, c in (text, image)]
    config = dataclasses.replace(
        TINY, encoders=(*shallow, table), fusion=kind, num_hidden_layers=1 + (kind != CO)
    )
    model, variables = fmjax.create("fusion", config, head="classification", rng=jax.random.key(0))
    variables = shuffled(variables)
    inputs = examples()
    inputs["present"] = np.array([[1, 0, 1], [0, 1, 1], [1, 1, 0]])

    @jax.jit
    def run(inputs):
        def loss(params):
            logits = model.apply({"params": params}, **inputs).logits
            return jnp.sin(logits).sum(), logits

        return jax.grad(loss, has_aux=True)(variables["params"])

    grads, logits = run(inputs)
    assert np.isfinite(logits).all()
    other = {name: np.array(value) for name, value in inputs.items()}
    other["pixel_values"][0] = np.nan
    other["input_ids"][1], other["attention_mask"][1] = 59, 0
    other["features"][2] = np.inf
    again_grads, again = run(other)
    np.testing.assert_array_equal(again, logits)
    for path, grad in flatten(again_grads).items():
        assert np.isfinite(grad).all(), path
        np.testing.assert_array_equal(grad, flatten(grads)[path], err_msg=path)
    for name, value in (("pixel_values", 1.0), ("input_ids", 3), ("features", 1.0)):
        moved = {key: np.array(given) for key, given in inputs.items()}
        moved[name][:] = value
        changed = np.abs(run(moved)[1] - logits).max(axis=1) > 1e-6
        column = {"input_ids": 0, "pixel_values": 1, "features": 2}[name]
        np.testing.assert_array_equal(changed, inputs["present"][:, column] == 1, err_msg=name)


@pytest.mark.slow
def test_the_order_of_modalities_says_nothing_in_co_attention():
    model, variables = fmjax.create("fusion", TINY, rng=jax.random.key(0))
    turned = dataclasses.replace(TINY, encoders=TINY.encoders[::-1])
    inputs = examples()
    out = model.apply(variables, **inputs).pooler_output
    again = fusion.Model(turned).apply(variables, **inputs).pooler_output
    np.testing.assert_allclose(again, out, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", fusion.FUSIONS)
def test_files_come_back(kind, tmp_path):
    """With batch statistics among the encoders', and the encoder's variables as they are."""
    encoders = (*TINY.encoders[:1], ("image", efficientnet_lite.VARIANTS["tiny"]))
    config = dataclasses.replace(TINY, encoders=encoders, fusion=kind, combination="product")
    model, variables = fmjax.create("fusion", config, head="classification", rng=jax.random.key(0))
    _, alone = fmjax.create("bert", TINY.encoders[0][1], rng=jax.random.key(1))
    variables["params"]["text"] = alone["params"]
    fmjax.save(tmp_path, model, variables)
    again, read = fmjax.load(tmp_path)
    assert again == model
    for path, value in flatten(variables).items():
        np.testing.assert_array_equal(flatten(read)[path], value, err_msg=path)


@pytest.mark.slow
def test_states_of_encoders_stand_for_their_inputs():
    model, variables = fmjax.create("fusion", TINY, rng=jax.random.key(0))
    inputs = examples() | {"present": np.array([[1, 0, 1], [0, 1, 1], [1, 1, 0]])}
    whole = model.apply(variables, **inputs).pooler_output
    params, ready = variables["params"], {}
    for name, config in TINY.encoders:
        source = fusion.reads(config)[0]
        own = {source: inputs.pop(source)}
        own |= {"attention_mask": inputs["attention_mask"]} if name == "text" else {}
        out = fusion.family_for(config).Model(config).apply({"params": params[name]}, **own)
        ready[name] = out.pooler_output if name == "table" else out.last_hidden_state
    ready["image"] = ready["image"].at[0].set(jnp.nan)
    again = model.apply(variables, **inputs, encoder_outputs=ready).pooler_output
    np.testing.assert_allclose(again, whole, atol=1e-6)
    with pytest.raises(ValueError, match="encoder_outputs has 'sound', no encoder") as error:
        model.apply({}, **inputs, encoder_outputs={"sound": ready["text"]})
    assert "pixel_values is missing" in str(error.value)


@pytest.mark.slow
def test_late_fusion_of_one_encoder_is_its_mean_projected():
    config = dataclasses.replace(TINY, encoders=TINY.encoders[:1], fusion="late")
    model, variables = fmjax.create("fusion", config, rng=jax.random.key(0))
    inputs = examples()
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    params = variables["params"]
    states = bert.Model(TINY.encoders[0][1]).apply({"params": params["text"]}, **inputs)
    keep = inputs["attention_mask"][..., None]
    mean = (states.last_hidden_state * keep).sum(axis=1) / keep.sum(axis=1)

    def dense(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    x = np.asarray(dense("text_project", mean))
    x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-12)
    out = model.apply(variables, **inputs).pooler_output
    np.testing.assert_allclose(out, np.tanh(dense("pooler", x)), atol=1e-5)


def test_config_goes_there_and_back():
    for config in fusion.VARIANTS.values():
        data = config_to_json(config, {"model_type": "fusion"})
        read = parse_config(fusion.Config, data, fusion.FIXED)
        # Whether an encoder has a pooler its tensors tell.
        assert fusion.from_tensors(read, "model", ()) == fusion.from_tensors(config, "model", ())
    with pytest.raises(ValueError, match="must be an object, from names of modalities"):
        parse_config(fusion.Config, {"encoders": []}, fusion.FIXED)


def test_bad_configs_and_inputs_are_refused():
    with pytest.raises(ValueError, match="all different") as error:
        fusion.Config(
            (("head", bert.Config()), ("head", bart.Config())),
            fusion="early", combination="sum", num_attention_heads=5,
        )  # fmt: skip
    for said in (
        "encoder 'head' must be of letters alone", "fusion='early' must be one of",
        "combination='sum' must be one of", "768 is not a multiple of num_attention_heads=5",
    ):  # fmt: skip
        assert said in str(error.value)
    with pytest.raises(ValueError, match="needs two encoders at least"):
        fusion.Config((("table", mlp.Config()),))
    with pytest.raises(ValueError, match=r"pairs: fusion reads .* must read one of"):
        fusion.Config((("table", mlp.Config()), ("pairs", TINY)))
    model = fusion.Model(TINY)
    inputs = examples()
    del inputs["features"]
    with pytest.raises(ValueError, match="features is missing") as error:
        model.apply({}, **inputs, input_values=np.ones((2, 9)), present=np.ones((3, 2)))
    assert "no encoder reads input_values" in str(error.value)
    assert "different numbers of rows: [2, 3]" in str(error.value)
    assert "present has the shape (3, 2); it must be (3, 3)" in str(error.value)


SOUND = wav2vec2.sized(
    wav2vec2.Config, 1, 8, 2, conv_dim=(6, 6), conv_kernel=(4, 3), conv_stride=(4, 2),
    num_conv_pos_embeddings=3, num_conv_pos_embedding_groups=2, initializer_range=0.3,
    **wav2vec2.STABLE,
)  # fmt: skip
SPECTRUM = deepspeech2.Config(
    num_features=5, conv_channels=(2,), conv_sizes=((3, 3),), conv_strides=((2, 2),), hidden_size=6,
    num_hidden_layers=1, dense_sizes=(),
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_padding_of_sounds_changes_nothing(kind):
    """More of it, or anything else in it, beside a row that lacks the sound."""
    config = dataclasses.replace(
        TINY, encoders=(("wave", SOUND), ("spectrum", SPECTRUM)), fusion=kind, num_hidden_layers=1
    )
    model, variables = fmjax.create("fusion", config, head="classification", rng=jax.random.key(0))
    variables, apply = shuffled(variables), jax.jit(model.apply)
    draw = np.random.default_rng(0)
    values = draw.normal(size=(3, 96)).astype(np.float32)
    features = draw.normal(size=(3, 20, 5)).astype(np.float32)
    heard, seen = np.arange(96) < [[96], [64], [50]], np.arange(20) < [[20], [13], [8]]

    def run(more, value, rows=slice(None)):
        there = {"input_values_mask": heard, "input_features_mask": seen}
        there = {n: np.pad(m, ((0, 0), (0, more)))[rows].astype(int) for n, m in there.items()}
        inputs = {
            "input_values": np.pad(np.where(heard, values, value), ((0, 0), (0, more))),
            "input_features": np.pad(
                np.where(seen[..., None], features, value), ((0, 0), (0, more), (0, 0))
            ),
            "present": np.array([[1, 1], [1, 1], [0, 1]]),
        }
        inputs = {name: x[rows] for name, x in inputs.items()}
        return apply(variables, **inputs, **there).logits

    plain = run(0, 0.0)
    np.testing.assert_allclose(run(16, 9.0), plain, atol=1e-4)
    np.testing.assert_allclose(run(0, 0.0, slice(1, 2)), plain[1:2], atol=1e-4)
    whole = apply(
        variables, input_values=values, input_features=features,
        present=np.array([[1, 1], [1, 1], [0, 1]]),
    ).logits  # fmt: skip
    moved = np.abs(whole - plain).max(axis=1) > 1e-3
    assert moved.tolist() == [False, True, True]  # without masks there is no padding
    with pytest.raises(ValueError, match=r"input_values_mask has the shape \(3, 95\)"):
        model.apply(
            variables, input_values=values, input_features=features,
            input_values_mask=heard[:, 1:],
        )  # fmt: skip
    text = TINY.encoders[:1]
    alone = model.clone(config=dataclasses.replace(TINY, encoders=text, fusion="late"))
    with pytest.raises(ValueError, match="no encoder reads input_values_mask"):
        alone.init(jax.random.key(0), input_ids=np.ones((1, 2), int), input_values_mask=heard)
