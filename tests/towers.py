"""What the tests of encoders of pictures and texts share: small CLIP towers, texts that end."""

import numpy as np
from parity import text_inputs

from fmjax.models import clip_text_model, clip_vision_model

TEXT = clip_text_model.Config(
    vocab_size=51, hidden_size=18, intermediate_size=20, projection_dim=10, num_hidden_layers=2,
    num_attention_heads=3, max_position_embeddings=16, eos_token_id=50,
)  # fmt: skip
VISION = clip_vision_model.Config(
    hidden_size=12, intermediate_size=20, projection_dim=10, num_hidden_layers=2,
    num_attention_heads=3, num_channels=2, image_size=15, patch_size=5,
)  # fmt: skip


def texts(config, **options):
    """Random ids with the end token where each text ends, and some of it again as padding."""
    inputs = text_inputs(config, "model", **options)
    ids, mask = np.minimum(inputs["input_ids"], 49), inputs["attention_mask"]
    last = mask.sum(axis=1) - 1
    ids[np.arange(2), last] = 50
    ids[1, last[1] + 1] = 50
    return {"input_ids": ids, "attention_mask": mask}
