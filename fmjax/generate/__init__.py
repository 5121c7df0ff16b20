"""Text generation with any decoder or encoder-decoder: `generate`, `stream` and their words."""

from fmjax.generate.api import Generated, generate, stream
from fmjax.generate.state import Processor, State
from fmjax.generation_config import GenerationConfig

__all__ = ["Generated", "GenerationConfig", "Processor", "State", "generate", "stream"]
