"""Encode prompts behind a chat template or another fixed text, for pipelines whose text encoder is a causal language model.

The states of the tokens before a prompt do not depend on it. Where these are many, they go through the encoder once a run, and
prompts attend to their keys and values. The head that predicts the next token is never computed.
"""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..pipeline.protocols import Tokenizer
from .base import Family

SHORTEST_PREFIX = 16  # tokens before the prompt from which on keeping their keys and values saves time


class TemplatedEncoder:
    """Encode prompts as a pipeline does that puts them into a template, by `Family.clean_prompt`.

    Args:
        family: the family, whose `text_length` is the number of tokens that the text with its template is truncated to.
        tokenizer: the encoder's tokenizer.
        encoder: a causal language model of transformers, with or without its head.
        layers: the indices of the hidden states to take, side by side for each token; -1 is the last.
        drop: the number of tokens at the beginning that the pipeline leaves out.
        padded: encode all `text_length` positions, for denoisers that do not mask padding. Otherwise, texts are encoded at
            their real length: states of real tokens do not depend on the padding after them.
    """

    def __init__(
        self,
        family: Family,
        tokenizer: Tokenizer,
        encoder: Any,
        layers: Sequence[int] = (-2,),
        drop: int = 0,
        padded: bool = False,
    ):
        self.family, self.tokenizer, self.layers, self.drop, self.padded = family, tokenizer, layers, drop, padded
        self.model = encoder.base_model.get_decoder() or encoder.base_model  # transformers 4 answers None for plain models
        accepted = inspect.signature(type(self.model).forward).parameters
        self._cache_name = "cache" if "cache" in accepted else "past_key_values"  # before transformers 5.24

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode n prompts. Gradients reach the rows that training has swapped in.

        Returns:
            The states, (n, tokens, layers x d), and on the CPU a mask of the real ones, (n, tokens).
        """
        tokens = [self._ids(prompt) for prompt in prompts]
        longest = self.family.text_length if self.padded else max(map(len, tokens))
        mask = (torch.arange(longest) < torch.tensor([len(own) for own in tokens])[:, None]).long()
        ids = torch.full(mask.shape, self.tokenizer.pad_token_id or 0)
        ids[mask > 0] = torch.cat(tokens)
        known = len(self._prefix)
        if known < SHORTEST_PREFIX or not (ids[:, :known] == torch.tensor(self._prefix)).all():
            known = 0
        device, n = self.family.device, len(ids)
        cache = None
        if known:
            cache = DynamicCache()  # a new one, since the model adds the prompts to it
            for layer, (keys, values) in enumerate(self._encoded_prefix[1]):
                cache.update(keys.expand(n, -1, -1, -1), values.expand(n, -1, -1, -1), layer)
        states = self.model(
            input_ids=ids[:, known:].to(device, non_blocking=True),
            attention_mask=mask.to(device, non_blocking=True),
            position_ids=torch.arange(known, ids.shape[1], device=device)[None],
            use_cache=cache is not None,
            output_hidden_states=True,
            **{self._cache_name: cache},
        ).hidden_states
        context = torch.cat([states[layer] for layer in self.layers], -1)
        if known:
            context = torch.cat([self._encoded_prefix[0].expand(n, -1, -1), context], 1)
        return context[:, self.drop :], mask[:, self.drop :]

    def _ids(self, prompt: str) -> Tensor:
        """Return the ids of a prompt in its template, (tokens,)."""
        return self.family.token_ids(self.tokenizer, self.family.clean_prompt(prompt), self.family.text_length)

    @functools.cached_property
    def _prefix(self) -> list[int]:
        """The tokens that all texts begin with."""
        # By comparison, not from the template's text: a tokenizer may join its last space to the prompt's first word.
        one, other = self._ids("a").tolist(), self._ids("1").tolist()
        if one == other:
            raise ValueError(
                f"{self.family.name} reads {len(one)} tokens of a text, and those before the prompt are as many: shorten the "
                "pipeline's system prompt."
            )
        same = [a == b for a, b in zip(one, other)]
        return one[: same.index(False)]

    @functools.cached_property
    def _encoded_prefix(self) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The states of `_prefix`, (1, tokens, layers x d), and its keys and values in each layer of the model."""
        cache = DynamicCache()
        with torch.no_grad():
            ids = torch.tensor([self._prefix], device=self.family.device)
            out = self.model(input_ids=ids, use_cache=True, output_hidden_states=True, **{self._cache_name: cache})
        states = torch.cat([out.hidden_states[layer] for layer in self.layers], -1)
        return states, [(layer.keys, layer.values) for layer in cache.layers]


def as_message(tokenizer: Any, prompt: str, thinking: bool) -> str:
    """Return a prompt as a user's message in Qwen3's chat template, with thinking switched on or off."""
    message = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
    return text
