"""`Concept`: directions and scales, checked, with the geometry of mixing them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..sphere import angle, frechet_mean, slerp

if TYPE_CHECKING:
    from typing_extensions import Self

# Of a mixture's metadata only what concerns the model remains: a mixture was not trained.
_MODEL_METADATA = ("family", "base_model", "pooling", "encoders")


@dataclass(frozen=True, eq=False)
class Concept:
    """A concept as directions on the sphere and scales, one set for each text encoder (paper, section 4).

    Args:
        placeholder_token: the word that stands for the concept in prompts, such as "<dog>".
        directions: unit rows, (n, d) float32, by pipeline component ("text_encoder", "text_encoder_2", ...).
        scales: the embeddings' norms, (n,) float32, positive, by component.
        metadata: JSON values: initializer, base model, scale rule, pooling, training settings, versions.

    Raises:
        ValueError: if directions are not finite unit rows, or scales do not match them.
    """

    placeholder_token: str
    directions: dict[str, Tensor]
    scales: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.placeholder_token or self.placeholder_token != self.placeholder_token.strip():
            raise ValueError(f"The placeholder token must be a word such as '<dog>', got {self.placeholder_token!r}.")
        if self.placeholder_token.startswith("hf_"):
            raise ValueError("A placeholder that starts with hf_ looks like a Hub credential: pass that as `hf_token`.")
        if not self.directions or self.directions.keys() != self.scales.keys():
            raise ValueError(f"Every direction needs a scale, got {sorted(self.directions)} and {sorted(self.scales)}.")
        for component, v in self.directions.items():
            m = self.scales[component]
            if v.ndim != 2 or m.shape != v.shape[:1] or not len(v):
                raise ValueError(f"{component}: directions (n, d) and scales (n,) expected, got {v.shape} and {m.shape}.")
            if not (torch.linalg.vector_norm(v, dim=-1) - 1).abs().le(1e-3).all():
                raise ValueError(f"{component}: directions must be finite unit rows; use `from_embeddings` for raw rows.")
            if not (m.isfinite() & (m > 0)).all():
                raise ValueError(f"{component}: scales must be positive, got {m.tolist()}.")

    @classmethod
    def from_embeddings(
        cls, placeholder_token: str, embeddings: Mapping[str, Tensor], metadata: dict[str, Any] | None = None
    ) -> Self:
        """Make a concept from raw rows, whose norms become the scales.

        Args:
            placeholder_token: the word that stands for the concept in prompts.
            embeddings: rows, (n, d) or (d,), by component.
            metadata: JSON values.

        Raises:
            ValueError: if a row is zero or not finite, and so has no direction.

        Example:

            ```py
            >>> import torch
            >>> from diffusers_dti import DirectionalInversion

            >>> dog = DirectionalInversion.from_embeddings("<dog>", {"text_encoder": torch.randn(2, 768)})
            >>> dog.num_vectors
            2
            ```
        """
        rows = {c: torch.atleast_2d(e.detach()).float().cpu() for c, e in embeddings.items()}
        scales = {c: torch.linalg.vector_norm(e, dim=-1) for c, e in rows.items()}
        for component, e in rows.items():
            if not (e.isfinite().all() and (scales[component] > 0).all()):
                raise ValueError(f"{component}: rows must be finite and not zero, or they have no direction.")
        return cls(placeholder_token, {c: normalize(e, dim=-1) for c, e in rows.items()}, scales, metadata or {})

    @property
    def embeddings(self) -> dict[str, Tensor]:
        """The rows for an encoder's table, scale · direction, (n, d) by component."""
        return {c: self.scales[c][:, None] * v for c, v in self.directions.items()}

    @property
    def num_vectors(self) -> int:
        """The number of vectors, the largest of any encoder."""
        return max(len(v) for v in self.directions.values())

    def rescale(self, token_scale: float | Mapping[str, float]) -> Self:
        """Return the same directions at other norms: one number for all, or one for each component."""
        norms = token_scale if isinstance(token_scale, Mapping) else dict.fromkeys(self.scales, token_scale)
        return replace(self, scales={c: torch.full_like(m, float(norms[c])) for c, m in self.scales.items()})

    def slerp(self, other: Concept, t: float | None = None, *, degrees: float | None = None) -> Self:
        """Move along the great circles to another concept, each vector on its own; scales move in a straight line.

        The result keeps this concept's placeholder, and its family, base model and pooling unless the other concept differs.

        Args:
            other: another concept, or a word (`diffusers_dti.pipeline.inspection.from_vocabulary`).
            t: how far to move: 0 is this concept, 1 the other. Above 1 continues beyond the other, below 0 leads away from it.
            degrees: the angle by which every vector moves, instead of `t`.

        Raises:
            ValueError: if the concepts have different encoders or numbers of vectors, or opposite directions; with `degrees`
                also for equal directions; and if a scale would not stay positive.
        """
        self._check_shapes(other)
        if (t is None) == (degrees is None):
            raise ValueError("Give either `t`, how far to move, or `degrees`.")
        shares = {c: torch.full_like(m, t or 0.0) for c, m in self.scales.items()}
        if degrees is not None:
            angles = {c: angle(v, other.directions[c]) for c, v in self.directions.items()}
            if any((a < 1e-3).any() for a in angles.values()):
                raise ValueError("Between equal directions there is no way to move along: give `t` instead of `degrees`.")
            shares = {c: math.radians(degrees) / a for c, a in angles.items()}
        return replace(
            self,
            directions={c: slerp(v, other.directions[c], shares[c][:, None]) for c, v in self.directions.items()},
            scales={c: torch.lerp(m, other.scales[c], shares[c]) for c, m in self.scales.items()},
            metadata=_common_metadata([self, other]),
        )

    @classmethod
    def mean(cls, concepts: Sequence[Self], weights: Sequence[float] | None = None) -> Self:
        """Return the weighted Fréchet mean of concepts on the sphere, each vector on its own; scales are averaged.

        For two concepts this is `slerp` at the second's share of the weights. The result keeps the first one's placeholder, and
        its family, base model and pooling unless another concept differs.

        Args:
            concepts: concepts of the same encoders and number of vectors.
            weights: a weight for each, not negative; only their ratios count. All equal by default.

        Raises:
            ValueError: if there are no concepts, if they do not match, if directions are opposite, or if weights do not fit.
        """
        if not concepts:
            raise ValueError("The mean needs at least one concept.")
        first = concepts[0]
        for other in concepts[1:]:
            first._check_shapes(other)
        w = torch.tensor([1.0] * len(concepts) if weights is None else list(map(float, weights)), dtype=torch.float64)
        directions = {c: frechet_mean(torch.stack([x.directions[c] for x in concepts]), w) for c in first.directions}
        shares = (w / w.sum()).float()
        scales = {c: shares @ torch.stack([x.scales[c] for x in concepts]) for c in first.scales}
        return replace(first, directions=directions, scales=scales, metadata=_common_metadata(concepts))

    def _check_shapes(self, other: Concept) -> None:
        here, there = ({c: tuple(v.shape) for c, v in x.directions.items()} for x in (self, other))
        if here != there:
            raise ValueError(f"Only concepts of the same encoders and number of vectors can be mixed: {here}, {there}.")


def _common_metadata(concepts: Sequence[Concept]) -> dict[str, Any]:
    """Return what the first concept says of its model, unless another one says otherwise."""
    first, *others = (concept.metadata for concept in concepts)
    common = {}
    for key in _MODEL_METADATA:
        if key in first and all(key not in other or other[key] == first[key] for other in others):
            common[key] = first[key]
    return common
