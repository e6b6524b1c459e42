"""A tokenizer and its encoder's table, taken together: put tokens in, take them out again exactly.

What was done to an encoder is kept on the encoder itself (a `Ledger`), not on the pipeline, since pipelines share encoders.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import expansion
from .inversion import DirectionalInversion

_LEDGER = "_directional_inversions"


@dataclass
class Entry:
    """One concept in one table."""

    inversion: DirectionalInversion
    names: list[str]
    pooling: str


@dataclass
class Ledger:
    """What `remove` needs to put an encoder back."""

    table_rows: int  # of the table before the first concept
    vocab_size: int | None  # the config's
    entries: dict[str, Entry] = field(default_factory=dict)  # by placeholder, in order of loading
    spare: dict[int, Tensor] = field(default_factory=dict)  # rows without a token that were overwritten
    legacy_eos: list[Any] = field(default_factory=list)  # config and modules whose `eos_token_id` was 2


def ledger_of(encoder: nn.Module) -> Ledger | None:
    return getattr(encoder, _LEDGER, None)


# ------------------------------------------------------------------------------------------------------------ the table
def table(encoder: nn.Module) -> nn.Parameter:
    """The input embedding's weight, (rows, d)."""
    return encoder.get_input_embeddings().weight


def embedding_modules(encoder: nn.Module) -> list[nn.Embedding]:
    """Every embedding module that looks up in the table: UMT5 calls another one than `get_input_embeddings()`."""
    weight = table(encoder)
    return [m for m in encoder.modules() if isinstance(m, nn.Embedding) and m.weight is weight]


def _assign(encoder: nn.Module, rows: Tensor, vocab_size: int | None) -> None:
    """Make `rows` the table, at all places that share it. `resize_token_embeddings` would cut ties and replace modules."""
    old = table(encoder)
    new = nn.Parameter(rows, requires_grad=old.requires_grad)
    for module in encoder.modules():
        for name, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[name] = new
                if isinstance(module, nn.Embedding):
                    module.num_embeddings = len(rows)
                elif isinstance(module, nn.Linear):
                    module.out_features = len(rows)
    for holder in (_text_config(encoder), encoder):
        if isinstance(getattr(holder, "vocab_size", None), int) and vocab_size is not None:
            holder.vocab_size = vocab_size


def _text_config(encoder: nn.Module) -> Any:
    return encoder.config.get_text_config()


def original_rows(tokenizer: Any, encoder: nn.Module) -> Tensor:
    """Mask of the rows that are the encoder's own, (rows,) bool: no concept's, and no stock textual inversion's."""
    mask = torch.ones(len(table(encoder)), dtype=torch.bool)
    for id, token in tokenizer.added_tokens_decoder.items():
        if not token.special and id >= tokenizer.vocab_size and id < len(mask):
            mask[id] = False
    ledger = ledger_of(encoder)
    for entry in ledger.entries.values() if ledger else ():
        mask[tokenizer.convert_tokens_to_ids(entry.names)] = False
    return mask


def norm_statistic(tokenizer: Any, encoder: nn.Module, rule: str) -> float:
    """The "mean", "min" or "max" norm of the encoder's own rows, rows of norm 0 left out (paper, section 4)."""
    if rule not in ("mean", "min", "max"):
        raise ValueError(f'token_scale must be "mean", "min", "max" or a positive number, got {rule!r}.')
    norms = torch.linalg.vector_norm(table(encoder).detach(), dim=-1, dtype=torch.float32)
    norms = norms[original_rows(tokenizer, encoder).to(norms.device) & (norms > 0)]
    return getattr(norms, rule)().item()


# ----------------------------------------------------------------------------------------------------------- the tokens
def check(tokenizer: Any, encoder: nn.Module, component: str, inversion: DirectionalInversion) -> None:
    """Whether the concept can be added.

    Raises:
        ValueError: for another width, or a placeholder that is taken, unless by the very same rows.
    """
    rows, weight, word = inversion.embeddings[component], table(encoder), inversion.placeholder_token
    if rows.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{word} is {rows.shape[1]} wide for {component}, whose embeddings are {weight.shape[1]} wide: it was learned "
            f"with another model{_base_model(inversion)}."
        )
    ledger = ledger_of(encoder)
    names = expansion.names(word, len(rows))
    known = [n in tokenizer.get_vocab() for n in names]
    if (ledger and word in ledger.entries) or any(known) or word in tokenizer.get_vocab():
        adoptable = all(known) and not (ledger and word in ledger.entries)
        if adoptable:
            there = weight[tokenizer.convert_tokens_to_ids(names)].detach().cpu()
            adoptable = torch.equal(there, rows.to(there.dtype))
        if not adoptable:
            raise ValueError(
                f"{word} is in the vocabulary of {component} already. Choose another placeholder with `token`, or unload it "
                "first."
            )


def _base_model(inversion: DirectionalInversion) -> str:
    name = inversion.metadata.get("base_model")
    return f", {name}" if name else ""


def add(tokenizer: Any, encoder: nn.Module, component: str, inversion: DirectionalInversion, pooling: str) -> None:
    """Add a checked concept: tokens to the tokenizer, rows to the table, pooling at the real end of the prompt."""
    weight, rows, word = table(encoder), inversion.embeddings[component], inversion.placeholder_token
    names = expansion.names(word, len(rows))
    adopted = all(n in tokenizer.get_vocab() for n in names)
    ledger = ledger_of(encoder)
    if ledger is None:
        ledger = Ledger(len(weight), getattr(_text_config(encoder), "vocab_size", None))
        setattr(encoder, _LEDGER, ledger)
    ledger.entries[word] = Entry(inversion, names, pooling)
    if adopted:  # a saved pipeline reopened: what concepts have at the table's end was never the encoder's own
        taken = {tokenizer.convert_tokens_to_ids(n) for e in ledger.entries.values() for n in e.names} - ledger.spare.keys()
        while ledger.table_rows - 1 in taken:
            ledger.table_rows -= 1
            ledger.vocab_size = ledger.vocab_size and ledger.vocab_size - 1
    else:
        expansion.add_tokens(tokenizer, names)
        ids = tokenizer.convert_tokens_to_ids(names)
        rows = rows.to(weight)
        missing = max(ids) + 1 - len(weight)
        if missing > 0:  # never shrink: tables may be larger than their tokenizers
            _assign(encoder, torch.cat([weight.detach(), weight.detach().new_zeros(missing, weight.shape[1])]), max(ids) + 1)
        with torch.no_grad():
            for id, row in zip(ids, rows):
                if id < ledger.table_rows:
                    ledger.spare.setdefault(id, table(encoder)[id].detach().clone())
                table(encoder)[id] = row
    if len(names) > 1:
        expansion.expand(tokenizer, word, names)
    _pool(tokenizer, encoder, ledger)


def set_rows(tokenizer: Any, encoder: nn.Module, component: str, inversion: DirectionalInversion) -> None:
    """Give a concept that is loaded new rows: training does so at its end."""
    entry = ledger_of(encoder).entries[inversion.placeholder_token]
    entry.inversion = inversion
    weight = table(encoder)
    with torch.no_grad():
        weight[tokenizer.convert_tokens_to_ids(entry.names)] = inversion.embeddings[component].to(weight)


def remove(tokenizer: Any, encoder: nn.Module, word: str) -> None:
    """Take a concept out, as if only the others had ever been added: later tokens move up, with their rows."""
    ledger = ledger_of(encoder)
    entry = ledger.entries.pop(word)
    vocabulary = tokenizer.get_vocab()
    gone = sorted(vocabulary[n] for n in entry.names if n in vocabulary)
    if gone:
        kept = [i for i in tokenizer.added_tokens_decoder if i not in gone]
        moved = {i: i - sum(g < i for g in gone) for i in kept if i > gone[0]}
        _drop_tokens(tokenizer, set(entry.names), moved)
        rows = table(encoder).detach()
        total = max([ledger.table_rows, *(moved.get(i, i) + 1 for i in kept)])
        new_rows = rows[:total].clone()
        for old, new in moved.items():
            new_rows[new] = rows[old]
        for id in [i for i in ledger.spare if i >= gone[0] and i not in moved.values()]:
            new_rows[id] = ledger.spare.pop(id)
        if total == len(rows):
            rows.copy_(new_rows)
        else:
            _assign(encoder, new_rows, ledger.vocab_size if total == ledger.table_rows else total)
    expansion.collapse(tokenizer, word)
    _pool(tokenizer, encoder, ledger)
    if not ledger.entries:
        delattr(encoder, _LEDGER)


def _drop_tokens(tokenizer: Any, names: set[str], moved: dict[int, int]) -> None:
    """The tokenizer without `names`, other tokens' ids changed as `moved` says."""
    if hasattr(tokenizer, "_tokenizer"):
        from tokenizers import Tokenizer

        state = json.loads(tokenizer._tokenizer.to_str())
        state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in names]
        for token in state["added_tokens"]:
            token["id"] = moved.get(token["id"], token["id"])
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
        return
    from transformers.tokenization_utils import Trie  # the slow tokenizers of transformers 4

    kept = {moved.get(i, i): t for i, t in tokenizer._added_tokens_decoder.items() if t.content not in names}
    tokenizer._added_tokens_decoder = kept
    tokenizer._added_tokens_encoder = {t.content: i for i, t in kept.items()}
    tokenizer.tokens_trie = Trie()
    tokenizer._update_trie()
    tokenizer._update_total_vocab_size()


# ---------------------------------------------------------------------------------------------------------- the pooling
def _pool(tokenizer: Any, encoder: nn.Module, ledger: Ledger) -> None:
    """Pool where the last loaded concept wants it.

    CLIP configurations with the legacy `eos_token_id` 2 pool at the highest id, which is a new token's: all text after
    it would never reach the pooled vector. Setting the real id keeps ordinary prompts as they are, to the bit.
    """
    if not ledger.legacy_eos and getattr(encoder.config, "model_type", "") == "clip_text_model":
        ledger.legacy_eos = [x for x in _config_and_modules(encoder) if getattr(x, "eos_token_id", None) == 2]
    pooling = next((e.pooling for e in reversed(ledger.entries.values())), "legacy")
    for holder in ledger.legacy_eos:
        # the module's attribute is what forward reads, the config's what is saved
        holder.eos_token_id = 2 if pooling == "legacy" else tokenizer.eos_token_id


def _config_and_modules(encoder: nn.Module) -> Iterator[Any]:
    yield encoder.config
    yield from encoder.modules()
