"""One concept while it is learned: its samples, its rows in training, and what it has become so far."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ..concept.inversion import DirectionalInversion
from ..pipeline import vocabulary
from ..pipeline.loading import Pair
from ..sphere import angle, unit
from .rows import TrainableRows
from .samples import Samples


@dataclass(frozen=True)
class Learner:
    """A concept that is loaded in the pipeline, in training."""

    initial: DirectionalInversion
    samples: Samples
    rows: dict[str, TrainableRows]  # by component
    raw: bool  # the rows themselves are trained (classic textual inversion), not their directions

    @classmethod
    def start(
        cls,
        initial: DirectionalInversion,
        samples: Samples,
        pairs: Mapping[str, Pair],
        raw: bool = False,
        train_magnitude: bool = False,
    ) -> "Learner":
        """Begin at a concept that is loaded: with its directions, or its rows as they are."""
        rows = {}
        for component, (_, encoder) in pairs.items():
            ids = vocabulary.ledger_of(encoder).entries[initial.placeholder_token].ids
            if raw:
                trained = TrainableRows(ids, initial.embeddings[component], torch.ones(len(ids)))
            else:
                trained = TrainableRows(ids, initial.directions[component], initial.scales[component], train_magnitude)
            rows[component] = trained.to(encoder.device)
        return cls(initial, samples, rows, raw)

    @contextmanager
    def swapped_in(self, pairs: Mapping[str, Pair]) -> Iterator[None]:
        """While open, the encoders see the rows in training."""
        with ExitStack() as stack:
            for component, (_, encoder) in pairs.items():
                stack.enter_context(self.rows[component].swapped_in(encoder))
            yield

    def current(self) -> DirectionalInversion:
        """The concept as it is now."""
        if self.raw:
            raw = {component: r().detach() for component, r in self.rows.items()}
            return DirectionalInversion.from_embeddings(self.initial.placeholder_token, raw, self.initial.metadata)
        directions = {component: r.direction.detach().cpu().clone() for component, r in self.rows.items()}
        scales = {component: r.scale.detach().cpu().flatten() for component, r in self.rows.items()}
        return replace(self.initial, directions=directions, scales=scales)

    def pull(self) -> Tensor:
        """Squared distance of the rows to where they began: the mean over entries, summed over encoders (CrossInit)."""
        starts = self.initial.embeddings
        return torch.stack([mse_loss(r(), starts[c].to(r.direction.device)) for c, r in self.rows.items()]).sum()

    def digests(self) -> dict[str, str]:
        """What tells this training from another one: photos and captions, and where it starts."""
        rows = b"".join(e.numpy().tobytes() for e in self.initial.embeddings.values())
        return {"photos": self.samples.digest(), "start": hashlib.sha256(rows).hexdigest()}

    def figures(self) -> dict[str, float]:
        """Angle to the initializer in degrees, and norm: means over all vectors."""
        now = {component: r().detach().cpu() for component, r in self.rows.items()}
        angles = torch.cat([angle(unit(e), self.initial.directions[component]) for component, e in now.items()])
        norms = torch.cat([torch.linalg.vector_norm(e, dim=-1) for e in now.values()])
        return {"angle": angles.rad2deg().mean().item(), "norm": norms.mean().item()}
