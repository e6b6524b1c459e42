"""A LoRA or OFT adapter on the denoiser's attention, trained together with the token: pivotal tuning, DCO, OFT."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils import convert_state_dict_to_diffusers
from torch import Tensor, nn

from ..atomic import atomic_file
from ..families.base import Family
from ..pipeline.offload import group_offload
from ..pipeline.protocols import Pipeline
from .defaults import AdapterKind

TARGETS = ("to_q", "to_k", "to_v")  # the authors' choice
OFT_ERROR = 1e-3  # relative to the change of a layer's weights, when OFT is written as a LoRA


def component_of(family: Family) -> str:
    """Return the name of the model that an adapter is trained in.

    Raises:
        ValueError: if the pipeline has several denoisers.
    """
    present = list(family.present_denoisers())
    if len(present) > 1:
        raise ValueError(f"An adapter is trained in one model, and {type(family.pipe).__name__} has {' and '.join(present)}.")
    return present[0]


def check_adapter(family: Family) -> None:
    """Check that a pipeline can take an adapter and save it.

    Raises:
        ValueError: if the pipeline does not support LoRAs, has several denoisers, or has adapters loaded.
    """
    pipe, component = family.pipe, component_of(family)
    model = getattr(pipe, component)
    if not hasattr(model, "add_adapter") or not hasattr(pipe, "save_lora_weights"):
        raise ValueError(f"{type(pipe).__name__} takes no LoRA: an adapter cannot be trained in it.")
    if group_offload(model) is not None:
        raise ValueError(
            f"The {component} is offloaded by groups, and an adapter is trained on the device: offload all but it, by "
            f'`enable_group_offload(..., exclude_modules="{component}")`.'
        )
    loaded = list(getattr(model, "peft_config", {}))
    if loaded:
        raise ValueError(
            f"The {component} has adapters loaded ({', '.join(loaded)}), and training starts from a model without them: "
            "remove them first by `pipe.unload_lora_weights()`, after `pipe.fuse_lora()` to make them part of the model."
        )


class Adapter:
    """An adapter in a pipeline's denoiser. It starts as no change at all, and is trained in float32 in any denoiser.

    Args:
        pipe: the pipeline.
        component: the name of its denoiser, "unet" or "transformer".
        kind: "lora" or "oft".
        rank: the rank of the LoRA, or the number of blocks of OFT's orthogonal matrices.
        name: the concept's name; the adapter is called "dti_" and its letters, for `pipe.set_adapters` and the like.
        seed: the seed of its random start.

    Attributes:
        parameters: the trained parameters, by name.
    """

    def __init__(self, pipe: Pipeline, component: str, kind: AdapterKind, rank: int, name: str, seed: int):
        from peft import LoraConfig, OFTConfig

        self.pipe, self.component, self.kind = pipe, component, kind
        self.name = "dti_" + re.sub(r"\W", "", name)  # not the bare word: peft cannot have "train", a method of its modules
        if kind == "lora":
            config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(TARGETS))
        else:
            config = OFTConfig(r=rank, oft_block_size=0, target_modules=list(TARGETS))
        before = {id(p) for p in self.model.parameters()}
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # of the CPU only, which peft draws on
                self.model.add_adapter(config, self.name)
            self.parameters: dict[str, nn.Parameter] = {}
            for parameter_name, p in self.model.named_parameters():
                if id(p) not in before:
                    self.parameters[parameter_name] = p
                    p.data = p.data.to(self.model.device, torch.float32)
        except BaseException:
            self.remove()
            raise
        self._kept: dict[str, Tensor] = {}

    @property
    def model(self) -> Any:
        """The denoiser."""
        return getattr(self.pipe, self.component)

    def train(self, enabled: bool) -> None:
        """Include the adapter in training, or leave it out."""
        for p in self.parameters.values():
            p.requires_grad_(enabled)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Run the denoiser without the adapter, within the block."""
        trained = {p: p.requires_grad for p in self.parameters.values()}
        self.model.disable_adapters()
        try:
            yield
        finally:
            self.model.enable_adapters()
            for p, was in trained.items():  # peft changes it both times
                p.requires_grad_(was)

    def remove(self) -> None:
        """Put the denoiser back as it was."""
        self.model.unload_lora()

    def keep(self) -> None:
        """Keep a copy of the adapter as it is now, which `save` writes, also when the model is offloaded or has it no more."""
        from peft.utils import get_peft_model_state_dict

        if self.kind == "lora":
            state = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.model, adapter_name=self.name))
        else:
            state = self._as_lora()
        self._kept = {k: v.detach().cpu().clone() for k, v in state.items()}

    def save(self, folder: str | Path) -> None:
        """Write what was last kept as `pytorch_lora_weights.safetensors`, which stock `load_lora_weights` reads.

        OFT turns weights W (out, in) into W Rᵀ. This is a LoRA of the rank of W (Rᵀ - I); singular values that together are
        less than `OFT_ERROR` of its size are left out.

        Args:
            folder: the folder for the file; it is created.
        """
        with atomic_file(Path(folder) / LORA_WEIGHT_NAME_SAFE) as temporary:
            layers = {f"{self.component}_lora_layers": self._kept}
            self.pipe.save_lora_weights(temporary.parent, weight_name=temporary.name, **layers)

    @torch.no_grad()
    def _as_lora(self) -> dict[str, Tensor]:
        """Write OFT as a LoRA of one rank in all layers."""
        # Not peft's `convert_to_lora`: versions that we support do not have it, and its rank is either chosen beforehand or
        # another one in each layer. Without alphas in the file, diffusers scales by alpha / rank of a single layer.
        parts = {}
        for path, layer in self.model.named_modules():
            if hasattr(layer, "oft_R"):
                rotation, weight = layer.get_delta_weight(self.name).float(), layer.get_base_layer().weight.float()
                change = weight @ (rotation.T - torch.eye(len(rotation), device=rotation.device))
                parts[path] = torch.linalg.svd(change, full_matrices=False)
        rank = max(_rank(s) for _, s, _ in parts.values())
        state = {}
        for path, (u, s, v) in parts.items():
            root, missing = s[:rank].sqrt(), max(rank - len(s), 0)
            up, down = u[:, :rank] * root, root[:, None] * v[:rank]
            state[f"{path}.lora.up.weight"] = nn.functional.pad(up, (0, missing)).contiguous()
            state[f"{path}.lora.down.weight"] = nn.functional.pad(down, (0, 0, 0, missing)).contiguous()
        return state


def _rank(singular: Tensor) -> int:
    """Return how many singular values, in falling order, hold all but `OFT_ERROR` of the matrix (Frobenius norm)."""
    tail = singular.square().flip(0).cumsum(0).flip(0).sqrt()  # what is lost by keeping the first 0, 1, 2 ...
    return max(int((tail > OFT_ERROR * tail[0]).sum()), 1)
