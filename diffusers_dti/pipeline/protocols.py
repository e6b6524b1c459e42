"""The parts of diffusers' pipelines and transformers' tokenizers that this package uses."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from ..concept.inversion import DirectionalInversion

Source = str | Path | Mapping[str, Any] | DirectionalInversion  # where a concept is
SourceByPlaceholder = Mapping[str, str | Path | DirectionalInversion]  # where several are


class Pipeline(Protocol):
    """A diffusers pipeline, ordinary or modular.

    `DiffusionPipeline` itself would be no better: diffusers has no types, and modular pipelines are not a subclass of it.
    """

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def components(self) -> dict[str, Any]: ...

    @property
    def device(self) -> torch.device: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    # Components are attributes, and each of the 306 pipeline classes has methods and a call of its own.
    def __getattr__(self, name: str) -> Any: ...

    def __setattr__(self, name: str, value: Any) -> None: ...


class Tokenizer(Protocol):
    """A tokenizer of transformers, fast or slow."""

    model_max_length: int
    padding_side: str
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    unk_token_id: int | None

    @property
    def vocab_size(self) -> int: ...

    @property
    def added_tokens_decoder(self) -> dict[int, Any]: ...

    @property
    def added_tokens_encoder(self) -> dict[str, int]: ...

    def __len__(self) -> int: ...

    def __call__(self, text: str | list[str], **kwargs: Any) -> Any: ...

    def add_tokens(self, new_tokens: Any) -> int: ...

    def get_vocab(self) -> dict[str, int]: ...

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]: ...

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]: ...
