"""What the tests of speech families share: small configs, random samples."""

import numpy as np

from fmjax.models import wav2vec2

# Sizes that no wrong transpose survives.
SIZES = {
    "vocab_size": 11, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 20, "conv_dim": (5, 7), "conv_kernel": (4, 3), "conv_stride": (3, 2),
    "num_conv_pos_embeddings": 5, "num_conv_pos_embedding_groups": 2, "output_hidden_size": 12,
    "num_codevectors_per_group": 6, "codevector_dim": 8, "proj_codevector_dim": 5,
    "classifier_proj_size": 9, "tdnn_dim": (6, 7), "tdnn_kernel": (3, 2), "tdnn_dilation": (2, 1),
    "xvector_output_dim": 8,
}  # fmt: skip
STABLE = {
    "do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True,
    "num_conv_pos_embeddings": 4, "feat_extract_activation": "relu", "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-3,
}  # fmt: skip


def waves(config, *, masked=False, samples=71):
    """Random samples, the second row padded, and which frames are masked."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, samples)).astype(np.float32)
    mask = np.ones((2, samples), np.int64)
    mask[1, 50:] = 0
    result = {"input_values": (values * mask).astype(np.float32), "attention_mask": mask}
    if masked:
        frames = wav2vec2.frames_of(config, samples)
        result["mask_time_indices"] = rng.random((2, frames)) < 0.4
    return result


def tied(twin):
    """transformers 5 has the last hidden state before the norm; 4 and trained files, after it."""
    twin.config.tie_last_hidden_states = True
