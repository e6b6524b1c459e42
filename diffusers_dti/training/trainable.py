"""What is trained: rows that take the placeholder's place in the encoder's embedding, and the concept that they make up.

The table itself is never copied, resized or given a gradient: what is trained is a few KB.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize

from ..concept.inversion import DirectionalInversion
from ..pipeline.offload import compute_device
from ..pipeline.text_encoders import TextEncoder
from ..sphere import angle
from .samples import TrainingSamples


class TrainableRows(nn.Module):
    """Trainable rows `scale · direction` for a concept's ids, in float32 in any encoder.

    Args:
        ids: the concept's token ids, n of them.
        direction: the trained parameter, (n, d) float32; for classic textual inversion the raw rows.
        scale: the norms, (n,) float32; ones for classic textual inversion.
        train_magnitude: also train a factor on each norm. Its logarithm is trained, (n, 1), which keeps it positive.
    """

    # Not PEFT's `TrainableTokens`: it trains the sum of row and delta in the encoder's dtype, replaces the embedding module,
    # which breaks Gemma's scaling by √d, and needs the table to be resized first.

    ids: Tensor
    initial_scale: Tensor

    def __init__(self, ids: list[int], direction: Tensor, scale: Tensor, train_magnitude: bool = False):
        super().__init__()
        self.direction = nn.Parameter(direction.clone())
        self.log_factor = nn.Parameter(torch.zeros(len(ids), 1)) if train_magnitude else None
        self.register_buffer("initial_scale", scale[:, None].clone())
        self.register_buffer("ids", torch.tensor(ids))

    @property
    def scale(self) -> Tensor:
        """The norms, (n, 1)."""
        return self.initial_scale if self.log_factor is None else self.initial_scale * self.log_factor.exp()

    def forward(self) -> Tensor:
        """Return the rows, (n, d)."""
        return self.scale * self.direction

    @contextmanager
    def swapped_in(self, encoder: TextEncoder) -> Iterator[None]:
        """Show the encoder these rows wherever the ids are, within the block."""
        handles = [m.register_forward_hook(self._replace) for m in encoder.embedding_modules()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _replace(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        assert isinstance(module, nn.Embedding)
        hit = args[0][..., None] == self.ids
        # By the module's own code, since Gemma's multiplies what it looks up by √d, but without hooks, which move its table
        # and are one for every concept in training.
        # Without its padding index, because torch drops the gradient of that row, which would be one of ours.
        own: dict[str, Any] = module._parameters
        padding, module.padding_idx, table = module.padding_idx, None, module.weight
        try:
            own["weight"] = self().to(output.dtype)
            rows = type(module).forward(module, hit.int().argmax(-1))
        finally:
            module.padding_idx, own["weight"] = padding, table
        return torch.where(hit.any(-1, keepdim=True), rows, output)


@dataclass(frozen=True)
class TrainableConcept:
    """A concept in training, which is loaded in the pipeline.

    Args:
        initial: the concept at the start.
        samples: what it is trained on.
        rows: the rows in training, by component.
        raw: whether the rows themselves are trained (classic textual inversion), not their directions.
    """

    initial: DirectionalInversion
    samples: TrainingSamples
    rows: dict[str, TrainableRows]
    raw: bool

    @classmethod
    def start(
        cls,
        initial: DirectionalInversion,
        samples: TrainingSamples,
        encoders: Mapping[str, TextEncoder],
        raw: bool = False,
        train_magnitude: bool = False,
    ) -> "TrainableConcept":
        """Start from a concept that is loaded: from its directions, or with `raw` from its rows."""
        rows = {}
        for component, encoder in encoders.items():
            ids = encoder.token_ids(initial.placeholder_token)
            if raw:
                trained = TrainableRows(ids, initial.embeddings[component], torch.ones(len(ids)))
            else:
                trained = TrainableRows(ids, initial.directions[component], initial.scales[component], train_magnitude)
            rows[component] = trained.to(compute_device(encoder.model))
        return cls(initial, samples, rows, raw)

    @property
    def placeholder_token(self) -> str:
        """The word that stands for the concept in prompts."""
        return self.initial.placeholder_token

    @contextmanager
    def swapped_in(self, encoders: Mapping[str, TextEncoder]) -> Iterator[None]:
        """Show the encoders the rows in training, within the block."""
        with ExitStack() as stack:
            for component, encoder in encoders.items():
                stack.enter_context(self.rows[component].swapped_in(encoder))
            yield

    def current(self) -> DirectionalInversion:
        """Return the concept as it is now.

        Raises:
            ValueError: if raw rows have become zero or infinite.
        """
        if self.raw:
            raw = {component: rows().detach() for component, rows in self.rows.items()}
            return DirectionalInversion.from_embeddings(self.placeholder_token, raw, self.initial.metadata)
        directions = {component: rows.direction.detach().cpu().clone() for component, rows in self.rows.items()}
        scales = {component: rows.scale.detach().cpu().flatten() for component, rows in self.rows.items()}
        return replace(self.initial, directions=directions, scales=scales)

    def distance_to_start(self) -> Tensor:
        """Return the squared distance of the rows to their start: mean over entries, summed over encoders (CrossInit)."""
        starts = self.initial.embeddings
        distances = [mse_loss(rows(), starts[c].to(rows.direction.device)) for c, rows in self.rows.items()]
        return torch.stack(distances).sum()

    def fingerprint(self) -> dict[str, str]:
        """Return digests that identify the training: its photos and captions, and its start."""
        rows = b"".join(e.numpy().tobytes() for e in self.initial.embeddings.values())
        return {"photos": self.samples.digest(), "start": hashlib.sha256(rows).hexdigest()}

    def metrics(self) -> dict[str, float]:
        """Return the angle to the initializer in degrees and the norm, means over all vectors."""
        now = {component: rows().detach().cpu() for component, rows in self.rows.items()}
        angles = torch.cat([angle(normalize(e, dim=-1), self.initial.directions[c]) for c, e in now.items()])
        norms = torch.cat([torch.linalg.vector_norm(e, dim=-1) for e in now.values()])
        return {"angle": angles.rad2deg().mean().item(), "norm": norms.mean().item()}
