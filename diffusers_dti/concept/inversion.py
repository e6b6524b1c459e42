"""`DirectionalInversion`: a learned concept, apart from any pipeline."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..sphere import angle, mean, slerp, unit
from . import formats, hub
from .source import contents, named


@dataclass(frozen=True, eq=False)
class DirectionalInversion:
    """A concept as directions on the sphere and scales, one set per text encoder (paper, section 4).

    Args:
        placeholder_token: the word that stands for the concept in prompts, for example "<dog>".
        directions: per pipeline component ("text_encoder", "text_encoder_2", ...) float32 unit rows, (n, d).
        scales: per component the embeddings' norms, (n,) float32, positive.
        metadata: JSON values: initializer, base model, scale rule, pooling, training settings, versions.

    Raises:
        ValueError: where directions are not finite unit rows, or scales do not fit them.
    """

    placeholder_token: str
    directions: dict[str, Tensor]
    scales: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.placeholder_token or self.placeholder_token != self.placeholder_token.strip():
            raise ValueError(f"The placeholder token must be a word such as '<dog>', got {self.placeholder_token!r}.")
        if self.placeholder_token.startswith("hf_"):
            raise ValueError("A placeholder that starts with hf_ looks like a Hub credential: give that as `hf_token`.")
        if not self.directions or self.directions.keys() != self.scales.keys():
            raise ValueError(f"Needs a scale for every direction: {sorted(self.directions)} and {sorted(self.scales)}.")
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
    ) -> "DirectionalInversion":
        """From raw rows, (n, d) or (d,) per component: the scales are their norms."""
        rows = {c: torch.atleast_2d(e.detach()).float().cpu() for c, e in embeddings.items()}
        for component, e in rows.items():
            if not (e.isfinite().all() and (torch.linalg.vector_norm(e, dim=-1) > 0).all()):
                raise ValueError(f"{component}: rows must be finite and not zero, or they have no direction.")
        scales = {c: torch.linalg.vector_norm(e, dim=-1) for c, e in rows.items()}
        return cls(placeholder_token, {c: unit(e) for c, e in rows.items()}, scales, metadata or {})

    @property
    def embeddings(self) -> dict[str, Tensor]:
        """scale · direction, (n, d) per component: what stands in an encoder's table."""
        return {c: self.scales[c][:, None] * v for c, v in self.directions.items()}

    @property
    def num_vectors(self) -> int:
        """Vectors of the concept: the most that any one encoder has."""
        return max(len(v) for v in self.directions.values())

    # ------------------------------------------------------------------------------------------------ files and the Hub
    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `learned_embeds.safetensors` (and `_2`, `_3`), which stock `load_textual_inversion` reads as well.

        They replace the folder's earlier concept as a whole.
        """
        headers = {c: {**self.metadata, "component": c, "scale": m.tolist()} for c, m in self.scales.items()}
        formats.write(Path(save_directory), self.placeholder_token, self.embeddings, headers)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        images: "hub.Samples | None" = None,
        license: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Create the repository if need be, and commit the concept's files, samples and a model card, in one commit.

        Its earlier concept, with samples and card, is replaced as a whole.

        Args:
            repo_id: "user/name".
            images: samples, pictures or pairs of a prompt and a picture.
            license: for the card, as the Hub names it, "apache-2.0"; by default the card names none.
            private: of a repository that is created; by default as the account is set up.
            token: the Hub's access token; by default the one of `hf auth login`.
            subfolder: folder in the repository, where several concepts share one.
            revision: a branch, created if need be.
            create_pr: open a pull request instead of changing the branch.

        Returns:
            The commit's address, a `huggingface_hub.CommitInfo`, which has `pr_url` and `pr_revision` as well.

        Raises:
            OSError: where the Hub refuses, or the connection breaks, saying what helps.
        """
        return hub.push(
            self, repo_id, images=images, license=license, private=private, token=token, subfolder=subfolder,
            revision=revision, commit_message=commit_message, create_pr=create_pr,
        )  # fmt: skip

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | Mapping[str, Any],
        placeholder_token: str | None = None,
        weight_name: str | None = None,
        subfolder: str | None = None,
        allow_pickle: bool = False,
        **hub_kwargs: Any,
    ) -> "DirectionalInversion":
        """Read a concept from a Hub id, a folder, a file, or a state dict.

        Files may be ours or those of diffusers' scripts, A1111, ComfyUI, kohya, OneTrainer and InvokeAI: docs/formats.md.

        Args:
            source: where from. With `learned_embeds.safetensors` the files of further encoders beside it are read as well. A
                state dict is what such a file holds, or `{"text_encoder": rows, "text_encoder_2": rows}` together with
                `placeholder_token`.
            placeholder_token: replaces the file's, or says which concept of a file with several is meant.
            weight_name: the one file to read, instead of all `learned_embeds*.safetensors`.
            subfolder: folder within the repository or folder.
            allow_pickle: read pickles (`.pt`, `.bin`) as well, for their tensors alone: code in them is never run.
            hub_kwargs: of `huggingface_hub.hf_hub_download`: `token`, `revision`, `cache_dir`, `local_files_only`, ...

        Raises:
            OSError: where there is no such file. ValueError: where what is there is no concept.
        """
        read = contents(source, placeholder_token, weight_name, subfolder, allow_pickle, **hub_kwargs)
        if read.placeholder is None:
            raise ValueError(
                f"{named(source)} has no placeholder in it: give it with `token` (`placeholder_token`, `--placeholder`)."
            )
        concept = cls.from_embeddings(read.placeholder, read.rows, read.metadata)
        # a stored scale gives the direction back to the last digit; the norm of the product would round once more
        directions = {c: e / read.scales[c][:, None] for c, e in read.rows.items() if c in read.scales}
        return replace(concept, directions=concept.directions | directions, scales=concept.scales | read.scales)

    # ------------------------------------------------------------------------------------------------------- geometry
    def rescale(self, token_scale: float | Mapping[str, float]) -> "DirectionalInversion":
        """The same directions at other norms: one number, or one per component."""
        new = token_scale if isinstance(token_scale, Mapping) else dict.fromkeys(self.scales, token_scale)
        return replace(self, scales={c: torch.full_like(m, float(new[c])) for c, m in self.scales.items()})

    def slerp(
        self, other: "DirectionalInversion", t: float | None = None, *, degrees: float | None = None
    ) -> "DirectionalInversion":
        """A move along the great circles to `other`, each vector on its own; scales go in a straight line.

        Placeholder, family, base model and pooling are this concept's, without what the other has otherwise.

        Args:
            other: another concept, or a word (`diffusers_dti.pipeline.inspection.from_vocabulary`).
            t: share of the way: 0 is this concept, 1 the other. Above 1 it goes on behind the other, below 0 away from it.
            degrees: instead of `t`, the angle by which every vector moves.

        Raises:
            ValueError: for concepts of different encoders or numbers of vectors, for opposite directions, by an angle for equal
                ones too, and where a scale would not be positive any more.
        """
        self._check_shapes(other)
        if (t is None) == (degrees is None):
            raise ValueError("How far to go: give either `t`, the share of the way, or `degrees`.")
        shares = {c: torch.full_like(m, t or 0.0) for c, m in self.scales.items()}
        if degrees is not None:
            whole = {c: angle(v, other.directions[c]) for c, v in self.directions.items()}
            if any((a < 1e-3).any() for a in whole.values()):
                raise ValueError("Equal directions have no way between them to go along: give `t` instead of `degrees`.")
            shares = {c: math.radians(degrees) / a for c, a in whole.items()}
        return replace(
            self,
            directions={c: slerp(v, other.directions[c], shares[c][:, None]) for c, v in self.directions.items()},
            scales={c: torch.lerp(m, other.scales[c], shares[c]) for c, m in self.scales.items()},
            metadata=_agreed([self, other]),
        )

    @classmethod
    def mean(cls, concepts: Sequence["DirectionalInversion"], weights: Sequence[float] | None = None) -> "DirectionalInversion":
        """The weighted mean of concepts on the sphere (Fréchet's), each vector on its own; of scales the ordinary one.

        Of two concepts that is `slerp` at the second's share of the weights. Placeholder, family, base model and pooling are
        the first one's, without what others have otherwise.

        Args:
            concepts: of the same encoders and number of vectors.
            weights: one for each, not negative; only their ratios count. By default all alike.

        Raises:
            ValueError: for no concepts, concepts that do not go together, opposite directions, or weights that do not fit.
        """
        if not concepts:
            raise ValueError("The mean of no concepts: give at least one.")
        first = concepts[0]
        for other in concepts[1:]:
            first._check_shapes(other)
        w = torch.tensor([1.0] * len(concepts) if weights is None else list(map(float, weights)), dtype=torch.float64)
        directions = {c: mean(torch.stack([x.directions[c] for x in concepts]), w) for c in first.directions}
        shares = (w / w.sum()).float()
        scales = {c: shares @ torch.stack([x.scales[c] for x in concepts]) for c in first.scales}
        return replace(first, directions=directions, scales=scales, metadata=_agreed(concepts))

    def _check_shapes(self, other: "DirectionalInversion") -> None:
        shapes = [{c: tuple(v.shape) for c, v in x.directions.items()} for x in (self, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"Only concepts of the same encoders and number of vectors can be mixed: {shapes[0]}, {shapes[1]}."
            )


def _agreed(concepts: Sequence[DirectionalInversion]) -> dict[str, Any]:
    """Of the first one's metadata what the model and its encoders are, where no other has them otherwise: a mixture was not
    trained."""
    first, *others = (x.metadata for x in concepts)
    kept = {k: first[k] for k in ("family", "base_model", "pooling", "encoders") if k in first}
    return {k: v for k, v in kept.items() if all(k not in other or other[k] == v for other in others)}
