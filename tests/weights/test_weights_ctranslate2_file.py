"""Whisper's model.bin of CTranslate2: what is in it, and what is refused."""

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_whisper import CONFIG, ctranslate2_arrays, ctranslate2_bytes, write_tiny_whisper

from fmjax.weights.ctranslate2_file import open_ctranslate2, whisper_tensors
from fmjax.weights.tensor import MappedFile


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def arrays(folder):
    return ctranslate2_arrays(folder)


def read(path, data):
    """(tensors by PyTorch's names, sizes) of a file with these bytes."""
    path.write_bytes(data)
    with MappedFile(path) as file:
        tensors, sizes = whisper_tensors(open_ctranslate2(file), path)
        return {tensor.name: np.array(tensor.read()) for tensor in tensors}, sizes


def test_all_tensors_are_pytorchs(tmp_path, folder, arrays):
    found, sizes = read(tmp_path / "model.bin", ctranslate2_bytes(arrays))
    expected = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    assert sizes == {name: vars(CONFIG)[name] for name in sizes}
    assert len(sizes) == 11


def test_half_precision_stays(tmp_path, arrays):
    half = {
        name: array.astype(np.float16) if array.dtype == np.float32 else array
        for name, array in arrays.items()
    }
    found, _ = read(tmp_path / "model.bin", ctranslate2_bytes(half))
    assert {str(tensor.dtype) for tensor in found.values()} == {"float16"}
    name = "model.decoder.layers.1.encoder_attn.v_proj.weight"
    whole = arrays["decoder/layer_1/attention/linear_1/weight"][24:]
    np.testing.assert_array_equal(found[name], whole.astype(np.float16))


def test_truncated_files_are_refused(tmp_path, arrays):
    """Wherever they end."""
    data = ctranslate2_bytes(arrays)
    places = np.random.default_rng(0).integers(1, len(data) - 1, 60).tolist()
    for place in (1, 5, 20, 40, *places, len(data) - 1):
        with pytest.raises(ValueError, match=r"are left|no text that a zero ends"):
            read(tmp_path / "model.bin", data[:place])
    with pytest.raises(ValueError, match="3 bytes after its last alias"):
        read(tmp_path / "model.bin", data + b"end")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"version": 5}, "of version 6: it begins with 5"),
        ({"spec": "TransformerSpec"}, "is a TransformerSpec of revision 3"),
        ({"revision": 4}, "of revision 4"),
        ({"spec": "\x1b[31m"}, "no text that a zero ends"),
    ],
)
def test_other_files_are_refused(tmp_path, arrays, options, words):
    with pytest.raises(ValueError, match=words):
        read(tmp_path / "model.bin", ctranslate2_bytes(arrays, **options))


def test_false_sizes_are_refused(tmp_path, arrays):
    """A shape that needs other bytes than there are, and more than memory; a number too many."""
    data = ctranslate2_bytes({"encoder/conv1/bias": np.zeros(4, np.float32)})
    shape = data.index(b"bias\0") + 6
    for claim, words in ((5, "16 bytes; shape"), (2**32 - 1, "16 bytes; shape")):
        with pytest.raises(ValueError, match=words):
            read(
                tmp_path / "model.bin",
                data[:shape] + claim.to_bytes(4, "little") + data[shape + 4 :],
            )
    with pytest.raises(ValueError, match="has type 9"):
        read(tmp_path / "model.bin", data[: shape + 4] + b"\x09" + data[shape + 5 :])
    many = data.index(b"WhisperSpec\0") + len(b"WhisperSpec\0") + 4
    with pytest.raises(ValueError, match="claims 4294967295 variables"):
        read(tmp_path / "model.bin", data[:many] + b"\xff" * 4 + data[many + 4 :])
    with pytest.raises(ValueError, match=r"no text that a zero ends|are left"):
        read(tmp_path / "model.bin", data[:many] + b"\xff\xff\0\0" + data[many + 4 :])


def test_what_is_no_whisper_is_refused(tmp_path, arrays):
    changed = dict(arrays)
    del changed["encoder/layer_0/ffn/linear_0/weight"]
    changed["encoder/layer_0/gate"] = np.zeros(3, np.float32)
    changed["decoder/alibi"] = np.array(1, np.int8)
    bias = changed["decoder/layer_0/self_attention/linear_0/bias"].copy()
    bias[30] = 1.0
    changed["decoder/layer_0/self_attention/linear_0/bias"] = bias
    with pytest.raises(ValueError, match="4 problems") as error:
        read(tmp_path / "model.bin", ctranslate2_bytes(changed))
    for words in ("ffn/linear_0/weight is missing", "gate is in no", "alibi is 1", "is not zero"):
        assert words in str(error.value)
    scale = {"encoder/layer_0/ffn/linear_0/weight_scale": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match="is quantised"):
        read(tmp_path / "model.bin", ctranslate2_bytes(arrays | scale))
