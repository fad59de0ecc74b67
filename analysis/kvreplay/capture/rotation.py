"""The rotation that a trace's header can describe (`/model`: inv_freq, rope_style, attention_scaling), computed as the
readers do, and the search for the one that reproduces a layer's rotated tensors bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

STYLES = ("half", "interleaved")


@dataclass(frozen=True)
class Recipe:
    """One rotation: everything `rotate` needs besides positions."""

    inv_freq: tuple[float, ...]  # [rope_dim / 2], float32 values
    attention_scaling: float = 1.0  # factor on cos and sin
    style: str = "half"  # pairs (i, i + rope_dim/2), or "interleaved": (2i, 2i + 1)
    rope_type: str = "default"  # the model's own name for it

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [n, rope_dim / 2] of `positions` [n]: computed in float32, rounded to `dtype`."""
        frequencies = torch.tensor(self.inv_freq, dtype=torch.float32, device=positions.device)
        angle = positions.float()[:, None] * frequencies
        return (angle.cos() * self.attention_scaling).to(dtype), (angle.sin() * self.attention_scaling).to(dtype)

    def rotate(self, x: Tensor, positions: Tensor | None, angles: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """`x` [..., n, D] rotated to `positions` [n] (or by `angles`, if they are at hand); every product and sum is
        rounded to x's type, channels past rope_dim pass."""
        cos, sin = self.angles(positions, x.dtype) if angles is None else angles
        pairs = len(self.inv_freq)
        turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
        if self.style == "half":
            first, second = turned[..., :pairs], turned[..., pairs:]
        else:
            first, second = turned[..., 0::2], turned[..., 1::2]
        ends = (first * cos + -second * sin, second * cos + first * sin)
        joined = torch.cat(ends, -1) if self.style == "half" else torch.stack(ends, -1).flatten(-2)
        return torch.cat([joined, rest], -1)

    def reproduces(self, pairs: list[tuple[Tensor, Tensor]], angles: tuple[Tensor, Tensor]) -> bool:
        """Whether rotating every `before` by `angles` gives its `after` to the bit."""
        return all(
            2 * len(self.inv_freq) <= before.shape[-1] and torch.equal(self.rotate(before, None, angles), after)
            for before, after in pairs
        )


class Frequencies:
    """The rotary embeddings of a model: every buffer `*inv_freq` with its scaling, and the positions they were last
    asked for. Frequencies are read at the time of a call: some change with the length."""

    def __init__(self, decoder: nn.Module):
        self.modules = [
            module
            for module in decoder.modules()
            if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
        ]

    def on_positions(self, callback: Callable[[Tensor], None]) -> list:
        """Calls `callback(position_ids)` before every use; returns the hooks' handles."""

        def before(_module, args, kwargs):
            given = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
            if isinstance(given, Tensor):
                callback(given)

        return [module.register_forward_pre_hook(before, with_kwargs=True) for module in self.modules]

    def recipes(self) -> Iterable[Recipe]:
        """Every rotation that the model's buffers allow now, in both styles."""
        for module in self.modules:
            for name, buffer in module.named_buffers(recurse=False):
                if not name.endswith("inv_freq") or "original" in name or buffer.ndim != 1:
                    continue
                prefix = name.removesuffix("inv_freq")
                kinds = getattr(module, "rope_type", "default")
                kind = kinds.get(prefix.removesuffix("_"), "default") if isinstance(kinds, dict) else kinds
                scaling = float(getattr(module, f"{prefix}attention_scaling", 1.0))
                for style in STYLES:
                    yield Recipe(tuple(buffer.float().tolist()), scaling, style, str(kind))

    def find(self, pairs: list[tuple[Tensor, Tensor]], positions: Tensor) -> Recipe | None:
        """The first rotation that turns every `before` into its `after` to the bit; None when none does."""
        for recipe in self.recipes():
            if recipe.reproduces(pairs, recipe.angles(positions, pairs[0][0].dtype)):
                return recipe
        return None


def most_common(recipes: Iterable[tuple[Recipe | None, bool]]) -> Recipe | None:
    """The rotation that the header names, from (rotation, whether the layer has full attention) of every layer: the one
    most layers with full attention use, without such layers the one most layers use; of equals the earlier."""
    listed = list(recipes)
    for chosen in ([recipe for recipe, full in listed if full and recipe], [recipe for recipe, _ in listed if recipe]):
        if chosen:
            return Counter(chosen).most_common(1)[0][0]
    return None
