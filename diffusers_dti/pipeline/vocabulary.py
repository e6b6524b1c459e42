"""A tokenizer and its encoder's table, taken together: put tokens in, take them out again exactly.

What was done to an encoder is kept on the encoder itself (a `Ledger`), not on the pipeline, since pipelines share encoders.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..concept.inversion import DirectionalInversion
from ..sphere import unit
from .tokenizer import add_tokens, start_expanding, stop_expanding, token_names

_LEDGER = "_directional_inversions"
_TABLE_ROWS = "table_rows_without_concepts"  # in the config while concepts are loaded, so that saved pipelines know too


@dataclass
class Entry:
    """One concept in one table."""

    inversion: DirectionalInversion
    names: list[str]  # its tokens
    ids: list[int]
    pooling: str
    adopted: Tensor | None  # the rows that a reopened pipeline had under these tokens already


@dataclass
class Ledger:
    """What `remove` needs to put an encoder back."""

    table_rows: int  # of the table before the first concept
    vocab_size: int | None  # the config's
    rowless: frozenset[str]  # tokens that had no row in the table
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
    """Mask of the rows of the encoder's own tokens, (rows,) bool: no spare ones, no concept's, no stock textual inversion's."""
    mask = torch.arange(len(table(encoder))) < len(tokenizer)
    for id, token in tokenizer.added_tokens_decoder.items():
        if not token.special and id >= tokenizer.vocab_size and id < len(mask):
            mask[id] = False
    ledger = ledger_of(encoder)
    for entry in ledger.entries.values() if ledger else ():
        mask[entry.ids] = False
    return mask


def norm_statistic(tokenizer: Any, encoder: nn.Module, rule: str) -> float:
    """The "mean", "min" or "max" norm of the encoder's own rows, rows of norm 0 left out (paper, section 4)."""
    if rule not in ("mean", "min", "max"):
        raise ValueError(f'token_scale must be "mean", "min", "max" or a positive number, got {rule!r}.')
    norms = torch.linalg.vector_norm(table(encoder).detach(), dim=-1, dtype=torch.float32)
    norms = norms[original_rows(tokenizer, encoder).to(norms.device) & (norms > 0)]
    return getattr(norms, rule)().item()


# ----------------------------------------------------------------------------------------------------------- the tokens
def check(tokenizer: Any, encoder: nn.Module, component: str, inversion: DirectionalInversion, adopt: bool = True) -> None:
    """Whether the concept can be added; with `adopt` also where a reopened pipeline holds it already.

    Raises:
        ValueError: for another width, or a placeholder that is taken.
    """
    rows, weight, word = inversion.embeddings[component], table(encoder), inversion.placeholder_token
    if rows.shape[1] != weight.shape[1]:
        base = inversion.metadata.get("base_model")
        raise ValueError(
            f"{word} is {rows.shape[1]} wide for {component}, whose embeddings are {weight.shape[1]} wide: it was learned "
            f"with another model{f', {base}' if base else ''}."
        )
    ledger = ledger_of(encoder)
    for other in ledger.entries if ledger else ():
        if word != other and re.fullmatch(f"{re.escape(min(word, other, key=len))}_\\d+", max(word, other, key=len)):
            raise ValueError(f"{word} and {other} cannot be loaded together: diffusers takes them for vectors of one token.")
    if ledger and word in ledger.entries:
        raise ValueError(
            f"{word} is loaded already: choose another placeholder (`token`, in training `placeholder_token`), or take it out "
            f"first by `unload_directional_inversion({word!r})`."
        )
    taken = {word, *token_names(word, len(rows))} & tokenizer.get_vocab().keys()
    if taken and not (adopt and _adoptable(tokenizer, encoder, word, rows)):
        raise ValueError(
            f"{word} is in the vocabulary of {component} already, with another meaning: choose another placeholder (`token`, "
            "in training `placeholder_token`). What stock `load_textual_inversion` put there, `unload_textual_inversion` takes "
            "out."
        )


def _adoptable(tokenizer: Any, encoder: nn.Module, word: str, rows: Tensor) -> list[int] | None:
    """The ids under which a reopened pipeline holds this concept already, at whatever precision and scale; else None."""
    # among added tokens alone: a word of the encoder's own is nobody's concept, whatever its direction
    added, weight = tokenizer.added_tokens_encoder, table(encoder)
    ids = [added.get(n, len(weight)) for n in token_names(word, len(rows))]
    if max(ids) >= len(weight):
        return None
    there = weight[ids].detach().float().cpu()
    return ids if (unit(there) - unit(rows)).abs().max() < 1e-2 else None


def add(tokenizer: Any, encoder: nn.Module, component: str, inversion: DirectionalInversion, pooling: str) -> None:
    """Add a checked concept: tokens to the tokenizer, rows to the table, pooling at the real end of the prompt."""
    weight, rows, word = table(encoder), inversion.embeddings[component], inversion.placeholder_token
    config, names = _text_config(encoder), token_names(word, len(rows))
    ledger = ledger_of(encoder)
    if ledger is None:
        saved = getattr(config, _TABLE_ROWS, None)
        own = len(weight) if saved is None else saved
        rowless = frozenset(t.content for i, t in tokenizer.added_tokens_decoder.items() if i >= len(weight))
        vocab_size = getattr(config, "vocab_size", None)
        ledger = Ledger(own, vocab_size if saved is None else saved, rowless)
        setattr(encoder, _LEDGER, ledger)
        setattr(config, _TABLE_ROWS, own)
    ids = _adoptable(tokenizer, encoder, word, rows)
    adopted = None if ids is None else weight[ids].detach().clone()
    entry = ledger.entries[word] = Entry(inversion, names, ids or [], pooling, adopted)
    if ids is None:
        add_tokens(tokenizer, names)
        ids = entry.ids = tokenizer.convert_tokens_to_ids(names)
        missing = max(ids) + 1 - len(weight)
        if missing > 0:  # never shrink: tables may be larger than their tokenizers
            _assign(encoder, torch.cat([weight.detach(), weight.detach().new_zeros(missing, weight.shape[1])]), max(ids) + 1)
        for id in ids:
            if id < ledger.table_rows:
                ledger.spare.setdefault(id, table(encoder)[id].detach().clone())
    set_rows(encoder, component, inversion)
    if len(names) > 1:
        start_expanding(tokenizer, word, names)
    _pool(tokenizer, encoder, ledger)


def set_rows(encoder: nn.Module, component: str, inversion: DirectionalInversion) -> None:
    """Write a loaded concept's rows; training does so at its end."""
    entry, weight = ledger_of(encoder).entries[inversion.placeholder_token], table(encoder)
    entry.inversion = inversion
    with torch.no_grad():
        weight[entry.ids] = inversion.embeddings[component].to(weight)


def remove(tokenizer: Any, encoder: nn.Module, word: str, undo: bool = False) -> None:
    """Take a concept out, as if only the others had ever been added: later tokens move up, with their rows.

    With `undo` what was adopted stays, as it was before.
    """
    ledger = ledger_of(encoder)
    entry = ledger.entries.pop(word)
    rows, gone = table(encoder).detach(), sorted(entry.ids)
    if undo and entry.adopted is not None:
        rows[entry.ids] = entry.adopted
    elif gone:
        names = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.content not in entry.names}
        others = {i for e in ledger.entries.values() for i in e.ids}
        kept = others.union(i for n, i in names.items() if n not in ledger.rowless)
        moved = {i: i - sum(g < i for g in gone) for i in others.union(names.values()) if i > gone[0]}
        total = max([ledger.table_rows, *(moved.get(i, i) + 1 for i in kept if i < len(rows))])
        new_rows = rows[:total].clone()
        for old, new in moved.items():
            if old < len(rows) and new < total:
                new_rows[new] = rows[old]
        for id in [i for i in ledger.spare if i >= gone[0] and i not in moved.values()]:
            if id < len(new_rows):
                new_rows[id] = ledger.spare[id]
            del ledger.spare[id]
        _drop_tokens(tokenizer, set(entry.names), moved)
        for other in ledger.entries.values():
            other.ids = [moved.get(i, i) for i in other.ids]
        if total == len(rows):
            rows.copy_(new_rows)
        else:
            _assign(encoder, new_rows, ledger.vocab_size if total == ledger.table_rows else total)
    stop_expanding(tokenizer, word)
    _pool(tokenizer, encoder, ledger)
    if not ledger.entries:
        delattr(encoder, _LEDGER)
        # of a reopened pipeline other concepts may still be there, waiting to be adopted
        if entry.adopted is None or len(table(encoder)) == ledger.table_rows:
            delattr(_text_config(encoder), _TABLE_ROWS)


def _drop_tokens(tokenizer: Any, names: set[str], moved: dict[int, int]) -> None:
    """The tokenizer without `names`, other tokens' ids changed as `moved` says."""
    if not names & tokenizer.get_vocab().keys():
        return  # another tokenizer than the one they were added to
    if hasattr(tokenizer, "_tokenizer"):
        from tokenizers import Tokenizer

        state = json.loads(tokenizer._tokenizer.to_str())
        state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in names]
        for token in state["added_tokens"]:
            token["id"] = moved.get(token["id"], token["id"])
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
        if hasattr(tokenizer, "_wrap_decode_method_backend_tokenizer"):  # CLIPTokenizerFast of transformers 4
            tokenizer._wrap_decode_method_backend_tokenizer()
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
