"""How fast are image classifiers, forward and trained, next to PyTorch in the same run?

    python benchmarks/vision.py                           about 10 minutes on 2 cores
    python benchmarks/vision.py --cases forward-vit-b16-float32 --repeats 11
    python benchmarks/vision.py --smoke                   tiny models, seconds

ViT-B/16 and ResNet-50 on 8 pictures of 224 x 224 pixels, with 1,000 classes; the steps are AdamW's,
with dropout and batch normalisation as in training. Weights are float32 on both sides; bfloat16
casts them inside the call, as PyTorch's autocast does. A picture counts as one token in the JSON.
CLIP ViT-B/32 compares 8 pictures with 8 texts of 77 tokens, which are what counts there.
"""

from __future__ import annotations

import forward
import train_step
import tyro
from cases import Case, pairs, pictures
from record import Row
from run import Settings, run

from fmjax.models import clip, resnet, vit

CASES = tuple(
    pictures(f"{kind}-{name}-{dtype}", config, 8, dtype)
    for name, config in (("vit-b16", vit.VARIANTS["b16"]), ("resnet-50", resnet.VARIANTS["50"]))
    for kind in ("forward", "step")
    for dtype in ("float32", "bfloat16")
) + tuple(
    pairs(f"forward-clip-b32-{dtype}", clip.VARIANTS["b32"], 8, dtype)
    for dtype in ("float32", "bfloat16")
)


def run_case(case: Case, settings: Settings, peak: float) -> list[Row]:
    """Compare, compile and time one case."""
    script = forward if case.name.startswith("forward-") else train_step
    return script.run_case(case, settings, peak)


if __name__ == "__main__":
    run("vision", CASES, tyro.cli(Settings, description=__doc__), run_case)
