"""A LoRA or OFT adapter on the denoiser's attention, trained together with the token: pivotal tuning, DCO, OFT."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils import convert_state_dict_to_diffusers
from torch import Tensor, nn

TARGETS = ("to_q", "to_k", "to_v")  # the authors' choice
OFT_ERROR = 1e-3  # of the change of a layer's weights, when OFT is written as a LoRA


class Adapter:
    """An adapter in a pipeline's denoiser, beginning as no change at all; in float32 whatever the denoiser's dtype.

    Args:
        pipe: the pipeline.
        component: which of its models, "unet" or "transformer".
        kind: "lora" or "oft".
        rank: of the LoRA; blocks of the orthogonal matrices of OFT.
        name: the concept's; the adapter is called "dti_" and its letters, for `pipe.set_adapters` and the like.
        seed: of its start.
    """

    def __init__(self, pipe: Any, component: str, kind: str, rank: int, name: str, seed: int):
        from peft import LoraConfig, OFTConfig

        self.pipe, self.component, self.kind = pipe, component, kind
        self.name = "dti_" + re.sub(r"\W", "", name)  # peft cannot have every word: "train" is a method of its modules
        if kind == "lora":
            config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(TARGETS))
        else:
            config = OFTConfig(r=rank, oft_block_size=0, target_modules=list(TARGETS))
        before = {id(p) for p in self.model.parameters()}
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # the CPU's alone, where peft draws
                self.model.add_adapter(config, self.name)
            self.parameters = {n: p for n, p in self.model.named_parameters() if id(p) not in before}
            for p in self.parameters.values():
                p.data = p.data.to(self.model.device, torch.float32)
        except BaseException:
            self.remove()
            raise
        self._kept: dict[str, Tensor] = {}

    @staticmethod
    def check(pipe: Any, component: str) -> None:
        """Whether a pipeline can take an adapter and save it.

        Raises:
            ValueError: for pipelines without LoRA support, or with adapters loaded.
        """
        model = getattr(pipe, component)
        if not hasattr(model, "add_adapter") or not hasattr(pipe, "save_lora_weights"):
            raise ValueError(f"{type(pipe).__name__} takes no LoRA: an adapter cannot be trained in it.")
        if loaded := list(getattr(model, "peft_config", {})):
            raise ValueError(
                f"The {component} has adapters loaded ({', '.join(loaded)}), and training starts from a model without: take "
                "them out first by `pipe.unload_lora_weights()`, after `pipe.fuse_lora()` if they are to be part of it."
            )

    @property
    def model(self) -> nn.Module:
        """The denoiser."""
        return getattr(self.pipe, self.component)

    def train(self, enabled: bool) -> None:
        """Whether the adapter takes part in training."""
        for p in self.parameters.values():
            p.requires_grad_(enabled)

    @contextmanager
    def off(self) -> Iterator[None]:
        """The denoiser without it, for a while."""
        trained = {p: p.requires_grad for p in self.parameters.values()}
        self.model.disable_adapters()
        try:
            yield
        finally:
            self.model.enable_adapters()
            for p, was in trained.items():  # peft changes it both times
                p.requires_grad_(was)

    def remove(self) -> None:
        """Leave the denoiser as it was."""
        self.model.unload_lora()

    def keep(self) -> None:
        """Remember the adapter as it is now, to save it also when the model is offloaded, or has the adapter no more."""
        from peft.utils import get_peft_model_state_dict

        if self.kind == "lora":
            state = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.model, adapter_name=self.name))
        else:
            state = self._as_lora()
        self._kept = {k: v.detach().cpu().clone() for k, v in state.items()}

    def save(self, folder: str | Path) -> None:
        """Write what was kept last as `pytorch_lora_weights.safetensors`, which stock `load_lora_weights` reads.

        OFT turns weights W (out, in) into W Rᵀ, which is a LoRA of as many ranks as W (Rᵀ - I) has; those that are lost in
        `OFT_ERROR` of its size are left out.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".adapter-") as temporary:
            self.pipe.save_lora_weights(temporary, **{f"{self.component}_lora_layers": self._kept})
            os.replace(Path(temporary) / LORA_WEIGHT_NAME_SAFE, folder / LORA_WEIGHT_NAME_SAFE)

    @torch.no_grad()
    def _as_lora(self) -> dict[str, Tensor]:
        parts = {}
        for path, layer in self.model.named_modules():
            if hasattr(layer, "oft_R"):
                rotation, weight = layer.get_delta_weight(self.name).float(), layer.get_base_layer().weight.float()
                change = weight @ (rotation.T - torch.eye(len(rotation), device=rotation.device))
                parts[path] = torch.linalg.svd(change, full_matrices=False)
        rank = max(_rank(s) for _, s, _ in parts.values())  # one for all: without alphas, diffusers scales by alpha / rank
        state = {}
        for path, (u, s, v) in parts.items():
            root, missing = s[:rank].sqrt(), max(rank - len(s), 0)
            up, down = u[:, :rank] * root, root[:, None] * v[:rank]
            state[f"{path}.lora.up.weight"] = nn.functional.pad(up, (0, missing)).contiguous()
            state[f"{path}.lora.down.weight"] = nn.functional.pad(down, (0, 0, 0, missing)).contiguous()
        return state


def _rank(singular: Tensor) -> int:
    """How many singular values, in falling order, hold all but `OFT_ERROR` of the matrix (Frobenius)."""
    tail = singular.square().flip(0).cumsum(0).flip(0).sqrt()  # what is lost by keeping the first 0, 1, 2 ...
    return max(int((tail > OFT_ERROR * tail[0]).sum()), 1)
