"""A picture encoder beside a text encoder, compared by cosine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from fmjax.nn.checks import check_head
from fmjax.nn.norm import unit_length
from fmjax.types import Output, Remat


class DualEncoder(nn.Module):
    """Two encoders whose pooled outputs lie in one space, with one head.

    A family subclasses it as its ``Model``, gives `heads` and the methods that raise here, and
    overrides what differs. Its heads are among "model", which compares all pictures with all texts,
    "text_with_projection" and "vision_with_projection", one side alone, and "image_classification".

    Args:
        config: the family's.
        head: a key of the family's ``HEADS``.
        scan: the encoders' weights stacked over layers and one compiled block each.
        remat: what the backward pass recomputes, as `fmjax.types.Remat` says.
    """

    config: Any
    head: str = "model"
    scan: bool = False
    remat: Remat = "none"

    heads: ClassVar[Mapping[str, str]]

    def text_tower(self, **fields: Any) -> nn.Module:
        """The encoder of texts, with the head "model"; `fields` are further ones of the module."""
        raise NotImplementedError

    def vision_tower(self) -> nn.Module:
        """The encoder of pictures, with the head "model"."""
        raise NotImplementedError

    def pooled_text(self, out: Output, attention_mask: Array | None) -> Array:
        """[B, D]: what stands for each whole text, of the text encoder's outputs."""
        return pooled_of(out, "text")

    def text_space(self, pooled: Array) -> Array:
        """The texts' pooled outputs in the common space: [B, D] -> [B, E]."""
        return pooled

    def vision_space(self, pooled: Array) -> Array:
        """The pictures' pooled outputs in the common space: [B, D] -> [B, E]."""
        return pooled

    def scoring(self) -> tuple[Array, Array | None]:
        """float32 []: the factor of cosines, and what is added to them, if anything is."""
        raise NotImplementedError

    def patches(self, hidden: Array) -> Array:
        """Of the last hidden states [B, T, D] those that a classifier averages."""
        return hidden

    def classify(self, x: Array) -> Array:
        """Scores of the classes: [B, D] -> [B, C] float32."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Further modules and parameters; called in ``setup``."""

    def setup(self) -> None:
        check_head(self, self.heads)
        self.text = self.text_tower()
        self.vision = self.vision_tower()
        self.prepare()

    @property
    def max_positions(self) -> int | None:
        """How many positions a text may have; None where any is computed."""
        tower = self.text_tower(parent=None)
        return tower.max_positions  # pyright: ignore[reportAttributeAccessIssue]

    def __call__(
        self,
        input_ids: Array | None = None,
        pixel_values: Array | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        image_features: Array | None = None,
        text_features: Array | None = None,
        *,
        train: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Output:
        """Runs both sides, or the one that is given.

        Args:
            input_ids: int [B, T]; None encodes no texts.
            pixel_values: [P, X, Y, C], normalised, P pictures; None encodes none.
            attention_mask: [B, T], 1 = token, 0 = padding; None keeps everything.
            token_type_ids, position_ids: int [B, T], for text encoders that have them.
            image_features, text_features: [P, D], [B, D], what `pooled_images` and `pooled_texts`
                made before, in place of `pixel_values` and `input_ids`: an encoder that is not
                trained need not run again (Zhai et al. 2022, arXiv:2111.07991).
            train: whether dropout is on; it needs ``rngs={"dropout": key}``.
            output_hidden_states, output_attentions: whether each side's are returned.

        Raises:
            ValueError: neither side is given, or not the one that the head reads; or inputs that
                contradict the config.
        """
        given = {
            "input_ids": input_ids, "text_features": text_features,
            "pixel_values": pixel_values, "image_features": image_features,
        }  # fmt: skip
        check_given([name for name, value in given.items() if value is not None], self.head)
        options = {
            "train": train,
            "output_hidden_states": output_hidden_states,
            "output_attentions": output_attentions,
        }
        text, vision = None, None
        if input_ids is not None:
            # By name and only where given: not every encoder takes each of them.
            extra = {"token_type_ids": token_type_ids, "position_ids": position_ids}
            extra = {name: value for name, value in extra.items() if value is not None}
            text = self.text(input_ids, attention_mask, **extra, **options)
        if pixel_values is not None:
            vision = self.vision(pixel_values, **options)
        if self.head == "image_classification":
            assert vision is not None
            x = jnp.mean(self.patches(vision.last_hidden_state).astype(jnp.float32), axis=1)
            logits = self.classify(x.astype(vision.last_hidden_state.dtype))
            return dataclasses.replace(
                vision, logits=logits, last_hidden_state=None, pooler_output=None
            )
        seen = image_features if vision is None else pooled_of(vision, "picture")
        said = text_features if text is None else self.pooled_text(text, attention_mask)
        texts = None if said is None else self.text_space(said)
        pictures = None if seen is None else self.vision_space(seen)
        if self.head != "model":
            side = text if vision is None else vision
            assert side is not None
            return dataclasses.replace(
                side, text_embeds=texts, image_embeds=pictures, pooler_output=None
            )
        return self.compared(texts, pictures, text, vision)

    def pooled_images(self, pixel_values: Array) -> Array:
        """[P, D]: what the picture encoder makes of pictures [P, X, Y, C], without dropout."""
        return pooled_of(self.vision(pixel_values, train=False), "picture")

    def pooled_texts(self, input_ids: Array, attention_mask: Array | None = None) -> Array:
        """[B, D]: what the text encoder makes of texts [B, T], without dropout."""
        return self.pooled_text(self.text(input_ids, attention_mask, train=False), attention_mask)

    def compared(
        self,
        texts: Array | None,
        pictures: Array | None,
        text: Output | None,
        vision: Output | None,
    ) -> Output:
        """The outputs of the head "model", from what lies in the common space."""
        texts, pictures = (None if x is None else unit_length(x) for x in (texts, pictures))
        scale, bias = self.scoring()
        out = Output(
            text_embeds=texts,
            image_embeds=pictures,
            text_model_output=text,
            vision_model_output=vision,
            logit_scale=scale,
            logit_bias=bias,
        )
        if texts is None or pictures is None:
            return out
        logits = scale * (texts @ pictures.T) + (0.0 if bias is None else bias)  # [B, P] float32
        return dataclasses.replace(out, logits_per_text=logits, logits_per_image=logits.T)


def check_given(given: list[str], head: str) -> None:
    """Refuses inputs that a head does not read, and too few or too many of them.

    Raises:
        ValueError: they are such.
    """
    pictures = {"vision_with_projection": "pixel_values", "image_classification": "pixel_values"}
    both = "one of input_ids and text_features, one of pixel_values and image_features, or two"
    wanted = {"text_with_projection": "input_ids", "model": both, **pictures}[head]
    sides = ({"input_ids", "text_features"}, {"pixel_values", "image_features"})
    fits = bool(given) and not any(side <= set(given) for side in sides)
    if not (fits if head == "model" else given == [wanted]):
        raise ValueError(f"the head {head!r} reads {wanted}; it was given {given or 'neither'}")


def pooled_of(out: Output, side: str) -> Array:
    """[B, D]: what an encoder made of each whole input.

    Raises:
        ValueError: it made nothing.
    """
    if out.pooler_output is None:
        raise ValueError(f"the {side} encoder has no pooled output, which pairs are compared by")
    pooled = out.pooler_output
    return pooled.reshape(pooled.shape[0], -1)
