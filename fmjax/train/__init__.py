"""Train steps over any loss: compile them, place them, run them, resume them."""

from fmjax.train.checkpoint import Checkpoints, saving
from fmjax.train.compile import jit_init, jit_step, pmap_step
from fmjax.train.distributed import start
from fmjax.train.loop import Event, Memory, evaluation, fit
from fmjax.train.moments import keep_moments
from fmjax.train.optim import adamw, bounded, decays, ema_of, track_ema
from fmjax.train.players import Turn, init_players, take_turns
from fmjax.train.quantized_products import quantized_products
from fmjax.train.recording import Recorder, progress, recording
from fmjax.train.schedules import (
    inverse_sqrt,
    warmup_cosine,
    warmup_linear,
    warmup_stable_decay,
)
from fmjax.train.sharding import layout, make_mesh, parse_mesh, shardings
from fmjax.train.signals import stop_signals
from fmjax.train.step import (
    accumulate,
    all_reduce,
    cast,
    gradient,
    init_state,
    is_param,
    make_eval_step,
    make_train_step,
)
from fmjax.types import TrainState

__all__ = [
    "Checkpoints",
    "Event",
    "Memory",
    "Recorder",
    "TrainState",
    "Turn",
    "accumulate",
    "adamw",
    "all_reduce",
    "bounded",
    "cast",
    "decays",
    "ema_of",
    "evaluation",
    "fit",
    "gradient",
    "init_players",
    "init_state",
    "inverse_sqrt",
    "is_param",
    "jit_init",
    "jit_step",
    "keep_moments",
    "layout",
    "make_eval_step",
    "make_mesh",
    "make_train_step",
    "parse_mesh",
    "pmap_step",
    "progress",
    "quantized_products",
    "recording",
    "saving",
    "shardings",
    "start",
    "stop_signals",
    "take_turns",
    "track_ema",
    "warmup_cosine",
    "warmup_linear",
    "warmup_stable_decay",
]
