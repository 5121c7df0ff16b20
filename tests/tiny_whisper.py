"""A tiny random Whisper with all its files, that hears windows of one second."""

import json
import struct

import numpy as np
from safetensors.numpy import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import fmjax
from fmjax.data.audio_features import LogMel
from fmjax.hub import abstract_variables
from fmjax.models import whisper
from fmjax.tree import flatten, unflatten

SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|startofprev|>", "<|nospeech|>"]
SPECIAL += ["<|notimestamps|>"]
END, START, BEFORE, SILENT, NO_TIMES = range(256, 261)
CONFIG = whisper.Config(
    vocab_size=NO_TIMES + 1 + 51, num_mel_bins=80, d_model=24, encoder_layers=2, encoder_ffn_dim=32,
    encoder_attention_heads=2, decoder_layers=2, decoder_ffn_dim=28, decoder_attention_heads=3,
    max_source_positions=50, max_target_positions=24, pad_token_id=END, bos_token_id=END,
    eos_token_id=END, decoder_start_token_id=START,
)  # fmt: skip
GENERATION = {
    "begin_suppress_tokens": [32, END], "suppress_tokens": [START, BEFORE, SILENT],
    "decoder_start_token_id": START, "eos_token_id": END, "pad_token_id": END, "bos_token_id": END,
    "is_multilingual": False, "max_initial_timestamp_index": 25, "max_length": 24,
    "no_timestamps_token_id": NO_TIMES, "prev_sot_token_id": BEFORE, "return_timestamps": False,
    "alignment_heads": [[0, 1]],
}  # fmt: skip


def tokenizer():
    """Bytes, and the special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return made


def write_tiny_whisper(folder, seed=0):
    """The folder, with every file that `fmjax transcribe` reads."""
    model = whisper.Model(CONFIG, head="seq2seq_lm")
    rng = np.random.default_rng(seed)

    def drawn(path, leaf):
        around = 1.0 if path.endswith("scale") else 0.0
        return (around + 0.3 * rng.normal(size=leaf.shape)).astype(np.float32)

    flat = flatten(abstract_variables(model))
    fmjax.save(folder, model, unflatten({path: drawn(path, leaf) for path, leaf in flat.items()}))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    LogMel(chunk_length=1).write(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    kinds = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), SPECIAL[0])
    data = {"tokenizer_class": "WhisperTokenizer", **kinds}
    (folder / "tokenizer_config.json").write_text(json.dumps(data))
    return folder


def text(word):
    return struct.pack("<H", len(word) + 1) + word.encode() + b"\0"


def variable(name, array):
    """An array of float32, float16, int8 or int16, as CTranslate2 writes it."""
    kinds = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}
    head = struct.pack("<B", array.ndim) + b"".join(struct.pack("<I", n) for n in array.shape)
    data = array.tobytes()
    return text(name) + head + struct.pack("<BI", kinds[str(array.dtype)], len(data)) + data


def ctranslate2_arrays(folder):
    """What CTranslate2's converter makes of a folder's weights, by its names."""
    tensors = {
        name.removeprefix("model."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    arrays = {"decoder/embeddings/weight": tensors["decoder.embed_tokens.weight"]}
    for name, value in (
        ("activation", 3), ("alibi", 0), ("pre_norm", 1), ("scale_embeddings", 0),
        ("start_from_zero_embedding", 0),
    ):  # fmt: skip
        arrays[f"decoder/{name}"] = np.array(value, np.int8)
    arrays["decoder/alignment_heads"] = np.array(1, np.int16)
    arrays["encoder/num_heads"] = np.array(CONFIG.encoder_attention_heads, np.int16)
    arrays["decoder/num_heads"] = np.array(CONFIG.decoder_attention_heads, np.int16)

    def put(theirs, *ours):
        for leaf in ("weight", "bias"):
            parts = [
                tensors.get(f"{name}.{leaf}", np.zeros(CONFIG.d_model, np.float32)) for name in ours
            ]
            arrays[f"{theirs}/{leaf}"] = np.concatenate(parts)

    def norm(theirs, ours):
        arrays[f"{theirs}/gamma"] = tensors[f"{ours}.weight"]
        arrays[f"{theirs}/beta"] = tensors[f"{ours}.bias"]

    for number in (1, 2):
        put(f"encoder/conv{number}", f"encoder.conv{number}")
    for side in ("encoder", "decoder"):
        arrays[f"{side}/position_encodings/encodings"] = tensors[f"{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        for i in range(2):
            at, of = f"{side}/layer_{i}", f"{side}.layers.{i}"
            put(f"{at}/self_attention/linear_0", *(f"{of}.self_attn.{x}_proj" for x in "qkv"))
            put(f"{at}/self_attention/linear_1", f"{of}.self_attn.out_proj")
            norm(f"{at}/self_attention/layer_norm", f"{of}.self_attn_layer_norm")
            if side == "decoder":
                put(f"{at}/attention/linear_0", f"{of}.encoder_attn.q_proj")
                put(f"{at}/attention/linear_1", *(f"{of}.encoder_attn.{x}_proj" for x in "kv"))
                put(f"{at}/attention/linear_2", f"{of}.encoder_attn.out_proj")
                norm(f"{at}/attention/layer_norm", f"{of}.encoder_attn_layer_norm")
            put(f"{at}/ffn/linear_0", f"{of}.fc1")
            put(f"{at}/ffn/linear_1", f"{of}.fc2")
            norm(f"{at}/ffn/layer_norm", f"{of}.final_layer_norm")
    return arrays


def ctranslate2_bytes(arrays, *, version=6, spec="WhisperSpec", revision=3):
    """A model.bin."""
    head = struct.pack("<I", version) + text(spec) + struct.pack("<II", revision, len(arrays))
    alias = text("decoder/projection/weight") + text("decoder/embeddings/weight")
    body = b"".join(variable(name, array) for name, array in sorted(arrays.items()))
    return head + body + struct.pack("<I", 1) + alias
