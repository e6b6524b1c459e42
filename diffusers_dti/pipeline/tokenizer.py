"""Concepts of several vectors: the tokenizer itself writes `<dog>` out as the vectors' own tokens.

Pipelines differ in how they come to the tokenizer (15 signatures of `encode_prompt`, some pipelines have none), but all
of them call it. So the instance becomes one of a subclass, of the same name, that expands text before it is cut up.
"""

import copyreg
import functools
import re
from typing import Any

from diffusers.utils import logging
from transformers import AddedToken

logger = logging.get_logger(__name__)

_WORDS = "_directional_expansions"


def token_names(word: str, count: int) -> list[str]:
    """The tokens of a concept: the placeholder itself for one vector, names that no prompt has for several."""
    return [word] if count == 1 else [f"⟦{i}:{'·'.join(word)}⟧" for i in range(count)]


def add_tokens(tokenizer: Any, tokens: list[str]) -> None:
    """Add tokens that match as they are written, upper case too, and whole words only."""
    fast = hasattr(tokenizer, "_tokenizer")
    for token in tokens:
        # Fast tokenizers match normalised tokens after lower-casing, others before. The slow CLIP tokenizer does it the
        # other way round, and its single words must stand between spaces, where "<dog>," would no longer be one.
        edges = token[0].isalnum() and token[-1].isalnum()
        tokenizer.add_tokens(AddedToken(token, normalized=not fast, single_word=fast and edges))


def start_expanding(tokenizer: Any, word: str, tokens: list[str]) -> None:
    """From now on `word` in a text stands for `tokens`."""
    words = getattr(tokenizer, _WORDS, None)
    if words is None:
        tokenizer.__class__ = _expanding(type(tokenizer))
        words = {}
        tokenizer.__dict__[_WORDS] = words
    words[word] = "".join(tokens)  # no spaces between: Gemma and T5 would make a token of each


def stop_expanding(tokenizer: Any, word: str) -> None:
    """Undo `start_expanding`; with the last word the tokenizer gets its own class back."""
    words = getattr(tokenizer, _WORDS, {})
    if words.pop(word, None) is not None and not words:
        del tokenizer.__dict__[_WORDS]
        tokenizer.__class__ = type(tokenizer).__bases__[-1]


def _expanded(text: Any, words: dict[str, str]) -> Any:
    if isinstance(text, list | tuple):
        return type(text)(_expanded(t, words) for t in text)
    if not isinstance(text, str):
        return text

    def pattern(word: str) -> str:  # a placeholder of letters does not match inside a longer word
        return (r"\b" if word[0].isalnum() else "") + re.escape(word) + (r"\b" if word[-1].isalnum() else "")

    longest_first = sorted(words, key=len, reverse=True)
    # what is expanded already is passed over
    return re.sub("⟦[^⟧]*⟧|" + "|".join(map(pattern, longest_first)), lambda m: words.get(m[0], m[0]), text)


class _Expands:
    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(_expanded(text, self.__dict__[_WORDS]), *args, **kwargs)

    def encode(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        return super().encode(_expanded(text, self.__dict__[_WORDS]), *args, **kwargs)

    def tokenize(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        return super().tokenize(_expanded(text, self.__dict__[_WORDS]), *args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        words = ", ".join(self.__dict__[_WORDS])
        logger.warning(
            f"{words}: of concepts with several vectors the vectors are saved, but not what the placeholder stands for. After "
            "reopening, load them again by `load_directional_inversion`, which finds its vectors and adds nothing."
        )
        return super().save_pretrained(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Copies and pickles by the class that can be imported."""
        how, args, *rest = super().__reduce_ex__(protocol)
        return (_new, (type(self).__bases__[-1], *args[1:]), *rest) if how is copyreg.__newobj__ else (how, args, *rest)


def _new(base: type, *args: Any) -> Any:
    return base.__new__(_expanding(base), *args)


@functools.lru_cache
def _expanding(base: type) -> type:
    return type(base.__name__, (_Expands, base), {"__module__": base.__module__, "__qualname__": base.__qualname__})
