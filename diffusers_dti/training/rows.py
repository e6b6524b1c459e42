"""The rows in training: they take the placeholder's place in what the encoder's embedding returns.

The table itself is never copied, resized or given a gradient: what is trained is a few KB.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..pipeline.vocabulary import embedding_modules


class TrainableRows(nn.Module):
    """`scale · direction` for a concept's ids, in float32 whatever the encoder's dtype.

    Args:
        ids: the concept's token ids, n of them.
        direction: (n, d) float32; the trained parameter. For classic textual inversion it is the raw row.
        scale: (n,) float32; ones for classic textual inversion.
        train_magnitude: have a trained factor on the scale, `log_factor`, (n, 1), which keeps it positive.
    """

    def __init__(self, ids: list[int], direction: Tensor, scale: Tensor, train_magnitude: bool = False):
        super().__init__()
        self.direction = nn.Parameter(direction.clone())
        self.log_factor = nn.Parameter(torch.zeros(len(ids), 1)) if train_magnitude else None
        self.register_buffer("initial_scale", scale[:, None].clone())
        self.register_buffer("ids", torch.tensor(ids))
        self._inside = False

    @property
    def scale(self) -> Tensor:
        """The norms, (n, 1)."""
        return self.initial_scale if self.log_factor is None else self.initial_scale * self.log_factor.exp()

    def forward(self) -> Tensor:
        """The rows, (n, d)."""
        return self.scale * self.direction

    @contextmanager
    def swapped_in(self, encoder: nn.Module) -> Iterator[None]:
        """While open, the encoder sees these rows wherever the ids stand."""
        handles = [m.register_forward_hook(self._replace) for m in embedding_modules(encoder)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _replace(self, module: nn.Embedding, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self._inside:  # `functional_call` below comes through this hook as well
            return None
        hit = args[0][..., None] == self.ids
        # Through the module itself, since Gemma's multiplies what it looks up by √d. Its padding row, whose gradient
        # torch drops, would be one of ours.
        padding, module.padding_idx, self._inside = module.padding_idx, None, True
        try:
            rows = functional_call(module, {"weight": self().to(module.weight.dtype)}, (hit.int().argmax(-1),))
        finally:
            module.padding_idx, self._inside = padding, False
        return torch.where(hit.any(-1, keepdim=True), rows, output)
