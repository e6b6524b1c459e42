"""`Concept`: directions and scales, checked, and the geometry of mixing concepts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..sphere import angle, frechet_mean, slerp
from .checks import check_parts, check_word

if TYPE_CHECKING:
    from typing_extensions import Self

# A mixture was not trained: it keeps only the metadata about the model.
_MODEL_METADATA = ("family", "base_model", "pooling", "prefix_space", "encoders")


@dataclass(frozen=True, eq=False, repr=False)
class Concept:
    """A concept as directions on the sphere and scales, one set for each text encoder (paper, section 4).

    Args:
        placeholder_token: the word that stands for the concept in prompts, such as "<dog>".
        directions: unit rows, (n, d) float32, by pipeline component ("text_encoder", "text_encoder_2", ...).
        scales: the norms of the embeddings, (n,) float32, positive, by component.
        metadata: JSON values: initializer, base model, scale rule, pooling, training settings, versions.

    Raises:
        ValueError: if directions are not finite unit rows, scales do not match them, or the placeholder is not a word.
    """

    placeholder_token: str
    directions: dict[str, Tensor]
    scales: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_word(self.placeholder_token)
        check_parts(self.directions, self.scales)

    def __repr__(self) -> str:
        sizes = [f"{component} {v.shape[0]} x {v.shape[1]}" for component, v in self.directions.items()]
        return f"{type(self).__name__}({', '.join([repr(self.placeholder_token), *sizes])})"

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        base = self.metadata.get("base_model")
        lines = ["<tr><th>text encoder</th><th>vectors</th><th>width</th><th>mean norm</th></tr>"]
        for component, v in self.directions.items():
            cells = (component, len(v), v.shape[1], f"{self.scales[component].mean().item():.3g}")
            lines.append(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in cells)}</tr>")
        caption = escape(self.placeholder_token + (f", learned with {base}" if base else ""))
        return f"<table><caption>{caption}</caption>{''.join(lines)}</table>"

    @classmethod
    def from_embeddings(
        cls, placeholder_token: str, embeddings: Mapping[str, Tensor], metadata: dict[str, Any] | None = None
    ) -> Self:
        """Make a concept from raw rows. Their norms become the scales.

        Args:
            placeholder_token: the word that stands for the concept in prompts.
            embeddings: rows, (n, d) or (d,), by component.
            metadata: JSON values.

        Returns:
            The concept, on the CPU in float32.

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
        directions, scales = {}, {}
        for component, rows in embeddings.items():
            rows = torch.atleast_2d(rows.detach()).float().cpu()
            norms = torch.linalg.vector_norm(rows, dim=-1)
            if not (rows.isfinite().all() and (norms > 0).all()):
                raise ValueError(f"{component}: rows must be finite and not zero, or they have no direction.")
            directions[component], scales[component] = normalize(rows, dim=-1), norms
        return cls(placeholder_token, directions, scales, metadata or {})

    @property
    def embeddings(self) -> dict[str, Tensor]:
        """The rows to put into an encoder's table: scale · direction, (n, d) by component."""
        return {c: self.scales[c][:, None] * v for c, v in self.directions.items()}

    @property
    def num_vectors(self) -> int:
        """The number of vectors n; if encoders differ, the largest."""
        return max(len(v) for v in self.directions.values())

    def rescale(self, token_scale: float | Mapping[str, float]) -> Self:
        """Return the same directions at other norms.

        Args:
            token_scale: the norm of every vector, positive, or one norm for each component.

        Returns:
            A new concept; this one is unchanged.

        Raises:
            ValueError: if a norm is not from 1e-10 to 1e10.
            KeyError: if a mapping lacks a component.

        Example:

            ```py
            >>> import torch
            >>> from diffusers_dti import DirectionalInversion

            >>> dog = DirectionalInversion.from_embeddings("<dog>", {"text_encoder": torch.randn(2, 768)})
            >>> [round(m, 2) for m in dog.rescale(0.4).scales["text_encoder"].tolist()]
            [0.4, 0.4]
            ```

            Each text encoder has norms of its own:

            ```py
            >>> dog = DirectionalInversion.from_pretrained("user/dti-dog")
            >>> dog = dog.rescale({"text_encoder": 0.387, "text_encoder_2": 0.452})
            ```
        """
        scales = {}
        for component, m in self.scales.items():
            norm = token_scale[component] if isinstance(token_scale, Mapping) else token_scale
            # Not `full_like`, which has an error of its own for what float32 cannot hold.
            scales[component] = m.new_tensor([float(norm)] * len(m))
        return replace(self, scales=scales)

    def slerp(self, other: Concept, t: float | None = None, *, degrees: float | None = None) -> Self:
        """Move along the great circles toward another concept, each vector on its own circle. Scales move linearly.

        Args:
            other: another concept, or a word (`diffusers_dti.pipeline.inspection.from_vocabulary`).
            t: how far to move: 0 is this concept, 1 is the other. Values above 1 continue beyond the other, values below 0 lead
                away from it.
            degrees: the angle by which every vector moves, instead of `t`.

        Returns:
            A new concept with this one's placeholder. It keeps family, base model and pooling if the other's do not differ.

        Raises:
            ValueError: if the concepts have different encoders or numbers of vectors, if directions are opposite, if
                directions are equal and `degrees` is given, or if a scale would not stay positive.

        Example:

            ```py
            >>> from diffusers_dti import DirectionalInversion

            >>> dog = DirectionalInversion.from_pretrained("user/dti-dog")
            >>> cat = DirectionalInversion.from_pretrained("user/dti-cat")
            >>> between = dog.slerp(cat, 0.5)
            >>> nearly_dog = dog.slerp(cat, degrees=10)
            ```
        """
        self._check_shapes(other)
        if (t is None) == (degrees is None):
            raise ValueError("Give either `t`, how far to move, or `degrees`.")
        directions, scales = {}, {}
        for component, v in self.directions.items():
            m = self.scales[component]
            if degrees is None:
                share = torch.full_like(m, t or 0.0)
            else:
                angles = angle(v, other.directions[component])
                if (angles < 1e-3).any():
                    raise ValueError("Equal directions have no arc between them: give `t` instead of `degrees`.")
                share = math.radians(degrees) / angles
            directions[component] = slerp(v, other.directions[component], share[:, None])
            scales[component] = torch.lerp(m, other.scales[component], share)
        return replace(self, directions=directions, scales=scales, metadata=_common_metadata([self, other]))

    @classmethod
    def mean(cls, concepts: Sequence[Self], weights: Sequence[float] | None = None) -> Self:
        """Return the weighted Fréchet mean of concepts on the sphere, each vector on its own. Scales are averaged.

        For two concepts this is `slerp` with `t` the second one's share of the weights.

        Args:
            concepts: concepts with the same encoders and number of vectors.
            weights: a weight for each concept, not negative; only their ratios count. Equal by default.

        Returns:
            A new concept with the first one's placeholder. It keeps family, base model and pooling if the others' do not
            differ.

        Raises:
            ValueError: if there are no concepts, if they do not match, if directions are opposite, or if weights do not fit.

        Example:

            ```py
            >>> from diffusers_dti import DirectionalInversion

            >>> dog = DirectionalInversion.from_pretrained("user/dti-dog")
            >>> cat = DirectionalInversion.from_pretrained("user/dti-cat")
            >>> mostly_dog = DirectionalInversion.mean([dog, cat], weights=[3, 1])
            ```
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
        """Check that two concepts can be mixed."""
        own = {c: tuple(v.shape) for c, v in self.directions.items()}
        others = {c: tuple(v.shape) for c, v in other.directions.items()}
        if own != others:
            raise ValueError(f"Only concepts of the same encoders and number of vectors can be mixed: {own}, {others}.")


def _common_metadata(concepts: Sequence[Concept]) -> dict[str, Any]:
    """Return what the first concept says about its model, without what another one contradicts."""
    first, *others = (concept.metadata for concept in concepts)
    common = {}
    for key in _MODEL_METADATA:
        if key in first and all(key not in other or other[key] == first[key] for other in others):
            common[key] = first[key]
    return common
