"""Add tokens to a tokenizer, remove them, and make one placeholder stand for several tokens.

For a concept of several vectors, the tokenizer itself replaces `<dog>` by the tokens of the vectors. Pipelines differ in how
they reach the tokenizer (`encode_prompt` has 15 signatures, and some pipelines have no such method), but all of them call it.
So the tokenizer becomes an instance of a subclass, of the same name, that expands text before it is tokenized.

Tokenizers are `Any` where private attributes are read or the class is replaced.
"""

import copyreg
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusers.utils import logging
from transformers import AddedToken

from .protocols import Tokenizer
from .transaction import change, change_entry, drop_entry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as _Base
else:
    _Base = object  # it comes before any class of tokenizers, and is none itself

logger = logging.get_logger(__name__)

_EXPANSIONS = "_directional_expansions"


def token_names(placeholder: str, count: int) -> list[str]:
    """Return the names of a concept's tokens: the placeholder itself for one vector, names that no prompt has for several."""
    return [placeholder] if count == 1 else [f"⟦{i}:{'·'.join(placeholder)}⟧" for i in range(count)]


@dataclass(frozen=True)
class NewTokens:
    """The tokens of a placeholder.

    Args:
        names: their names.
        absorb_space: let the first one take up the space before it, as the words of SentencePiece and byte-level vocabularies
            do ("▁dog", "Ġdog"). Otherwise Gemma reads "a <dog>" as "a", "▁", "<dog>", and no prompt that it was trained on has
            a "▁" of its own.
    """

    names: Sequence[str]
    absorb_space: bool = False


def add_tokens(undo: ExitStack, tokenizer: Tokenizer, new: Sequence[NewTokens]) -> None:
    """Add tokens that match exactly as they are written, upper case included, and only as whole words.

    They are added in place, since a copy of a tokenizer of 256,000 entries takes more than a second; to undo it, it is built
    anew without them.

    Args:
        undo: see `transaction`.
        tokenizer: a tokenizer, fast or slow.
        new: the tokens of each placeholder.
    """
    fast = hasattr(tokenizer, "_tokenizer")
    tokens = []
    for placeholder in new:
        for number, name in enumerate(placeholder.names):
            absorbs = placeholder.absorb_space and number == 0
            # Fast tokenizers match normalized tokens after lower-casing, and other tokens before. The slow CLIP tokenizer does
            # the reverse, and matches single words only between spaces, so it would miss the "<dog>" of "<dog>,".
            edges = name[0].isalnum() and name[-1].isalnum()
            tokens.append(AddedToken(name, normalized=not fast, single_word=fast and edges, lstrip=absorbs))
    undo.callback(lambda: removal(tokenizer, {token.content for token in tokens}, {})(ExitStack()))
    tokenizer.add_tokens(tokens)


def known_tokens(tokenizer: Any, names: Iterable[str]) -> set[str]:
    """Return those of some tokens that a tokenizer has. Listing all of Gemma's takes .15 s."""
    if hasattr(tokenizer, "_tokenizer"):
        return {name for name in names if tokenizer._tokenizer.token_to_id(name) is not None}
    return set(names) & tokenizer.get_vocab().keys()


def removal(tokenizer: Any, names: Set[str], moved: Mapping[int, int]) -> Callable[[ExitStack], None]:
    """Prepare to remove tokens from a tokenizer and to change the ids of others.

    Args:
        tokenizer: a tokenizer, fast or slow.
        names: the tokens to remove.
        moved: new ids by old ones.

    Returns:
        A function that does it, and can be undone.
    """
    if not known_tokens(tokenizer, names):
        return lambda undo: None  # this is not the tokenizer that they were added to
    if hasattr(tokenizer, "_tokenizer"):
        return _removal_from_fast(tokenizer, names)
    return _removal_from_slow(tokenizer, names, moved)


def _removal_from_fast(tokenizer: Any, names: Set[str]) -> Callable[[ExitStack], None]:
    """Build a tokenizer around the same model, which has the vocabulary, and give it the other added tokens in their order.

    Not from JSON, as `tokenizers` copies: that takes 1.6 s for the 256,000 words of Gemma, and this a millisecond. Ids follow
    from the order there too.
    """
    import tokenizers

    old = tokenizer._tokenizer
    without = tokenizers.Tokenizer(old.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(old, part) is not None:
            setattr(without, part, getattr(old, part))
    without.encode_special_tokens = old.encode_special_tokens
    if old.truncation is not None:
        without.enable_truncation(**old.truncation)
    if old.padding is not None:
        without.enable_padding(**old.padding)
    added = sorted(old.get_added_tokens_decoder().items())
    kept = [token for _, token in added if token.content not in names]
    for special, group in itertools.groupby(kept, key=lambda token: token.special):
        (without.add_special_tokens if special else without.add_tokens)(list(group))

    def remove(undo: ExitStack) -> None:
        change(undo, tokenizer, "_tokenizer", without)
        if hasattr(tokenizer, "_wrap_decode_method_backend_tokenizer"):  # CLIPTokenizerFast of transformers 4
            tokenizer._wrap_decode_method_backend_tokenizer()

    return remove


def _removal_from_slow(tokenizer: Any, names: Set[str], moved: Mapping[int, int]) -> Callable[[ExitStack], None]:
    kept = {moved.get(i, i): t for i, t in tokenizer._added_tokens_decoder.items() if t.content not in names}

    def remove(undo: ExitStack) -> None:
        change(undo, tokenizer, "_added_tokens_decoder", kept)
        change(undo, tokenizer, "_added_tokens_encoder", {t.content: i for i, t in kept.items()})
        change(undo, tokenizer, "tokens_trie", type(tokenizer.tokens_trie)())
        change(undo, tokenizer, "total_vocab_size", tokenizer.total_vocab_size)
        tokenizer._update_trie()
        tokenizer._update_total_vocab_size()

    return remove


def start_expanding(undo: ExitStack, tokenizer: Any, expansions: Mapping[str, Sequence[str]]) -> None:
    """Make placeholders stand for several tokens in every text from now on.

    Args:
        undo: see `transaction`.
        tokenizer: a tokenizer, fast or slow.
        expansions: the tokens by placeholder.
    """
    # No spaces between the tokens: Gemma and T5 would turn them into tokens.
    own = {placeholder: "".join(tokens) for placeholder, tokens in expansions.items() if len(tokens) > 1}
    if own:
        before = tokenizer.__dict__.get(_EXPANSIONS)
        change_entry(undo, tokenizer.__dict__, _EXPANSIONS, (before or {}) | own)
        if before is None:
            own_class: type = type(tokenizer)
            change(undo, tokenizer, "__class__", _expanding_class(own_class))


def stop_expanding(undo: ExitStack, tokenizer: Any, placeholders: Iterable[str]) -> None:
    """Undo `start_expanding`; after the last placeholder the tokenizer gets its own class back."""
    before = tokenizer.__dict__.get(_EXPANSIONS, {})
    kept = {placeholder: text for placeholder, text in before.items() if placeholder not in set(placeholders)}
    if kept:
        change_entry(undo, tokenizer.__dict__, _EXPANSIONS, kept)
    elif before:
        change(undo, tokenizer, "__class__", type(tokenizer).__bases__[-1])
        drop_entry(undo, tokenizer.__dict__, _EXPANSIONS)


def _expand(text: Any, expansions: dict[str, str]) -> Any:
    """Replace placeholders in a text, or in the texts of nested lists; anything else is returned as it is."""
    if isinstance(text, list | tuple):
        return type(text)(_expand(t, expansions) for t in text)
    return _pattern(tuple(expansions)).sub(lambda m: expansions.get(m[0], m[0]), text) if isinstance(text, str) else text


@functools.lru_cache(maxsize=16)  # one for each tokenizer of a few pipelines: it is used for every text
def _pattern(placeholders: Iterable[str]) -> re.Pattern[str]:
    """Return the pattern that finds placeholders in a text."""
    patterns = ["⟦[^⟧]*⟧"]  # tokens that are already expanded come first, and so stay as they are
    for placeholder in sorted(placeholders, key=len, reverse=True):  # the longest match wins
        # A placeholder of letters must not match inside a longer word.
        start = r"\b" if placeholder[0].isalnum() else ""
        end = r"\b" if placeholder[-1].isalnum() else ""
        patterns.append(start + re.escape(placeholder) + end)
    return re.compile("|".join(patterns))


class _ExpandingTokenizer(_Base):
    """Expand placeholders in every way into the tokenizer; `_expanding_class` puts this before a tokenizer's own class."""

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(_expand(text, self.__dict__[_EXPANSIONS]), *args, **kwargs)

    def encode(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        return super().encode(_expand(text, self.__dict__[_EXPANSIONS]), *args, **kwargs)

    def tokenize(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        return super().tokenize(_expand(text, self.__dict__[_EXPANSIONS]), *args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        placeholders = ", ".join(self.__dict__[_EXPANSIONS])
        logger.warning(
            f"{placeholders}: the vectors of concepts with several vectors are saved, but not what the placeholder stands for. "
            "After reopening, load the concepts again with `load_directional_inversion`: it reuses the vectors."
        )
        return super().save_pretrained(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the tokenizer's own class, since this one cannot be imported."""
        how, args, *rest = super().__reduce_ex__(protocol)
        if how is not copyreg.__newobj__:  # type: ignore[attr-defined]  # not in typeshed
            return (how, args, *rest)
        return (_new, (type(self).__bases__[-1], *args[1:]), *rest)


def _new(base: type, *args: Any) -> Any:
    """Make an instance for `pickle` and `copy`, which fill it."""
    return base.__new__(_expanding_class(base), *args)


@functools.lru_cache
def _expanding_class(base: type) -> type:
    """Make the subclass of a tokenizer's class that expands placeholders, under the same name."""
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (_ExpandingTokenizer, base), names)
