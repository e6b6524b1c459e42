"""Check that a placeholder survives what a pipeline does to prompts before it calls the tokenizer."""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from inspect import signature
from typing import Any

from diffusers import ModularPipeline
from diffusers.utils import logging

from .protocols import Pipeline
from .text_encoders import TextEncoder
from .word_rows import token_ids_of

logger = logging.get_logger(__name__)


def check_placeholder(pipe: Pipeline, placeholder: str) -> None:
    """Check that a placeholder survives a pipeline's prompt cleaning, and warn if it only does so with `clean_caption=False`.

    Raises:
        ValueError: if cleaning would change it, naming a placeholder that works.
    """
    name, lower, clean = type(pipe).__name__, placeholder.lower(), _find_cleaning(pipe)
    if placeholder not in _clean_prompt(clean, placeholder):
        if lower in _clean_prompt(clean, lower):
            raise ValueError(f"{name} lower-cases prompts, so {placeholder} would never match: use {lower}.")
        raise ValueError(
            f"{name} cleans prompts before tokenizing them, which would remove {placeholder}. Use plain letters, such as <dog>."
        )
    if _cleans_captions(pipe) and placeholder not in _clean_prompt(clean, placeholder, clean_caption=True):
        logger.warning(f"{name} removes {placeholder} from prompts unless it is called with clean_caption=False.")


def warn_if_ordinary(encoders: Iterable[TextEncoder], placeholder: str) -> None:
    """Warn if a placeholder is a word that an encoder knows already, which prompts could then no longer use."""
    for encoder in encoders:
        try:
            ids = token_ids_of(encoder, placeholder)
        except ValueError:  # unknown
            continue
        if len(ids) == 1 and ids[0] not in encoder.tokenizer.added_tokens_decoder:  # nor a reopened pipeline's concept
            logger.warning(
                f"{placeholder} is an ordinary word of the vocabulary, and means the concept while that is loaded: "
                f"to keep the word, choose another placeholder, such as <{placeholder}>."
            )
            return


def _cleans_captions(pipe: Any) -> bool:
    """Return whether `clean_caption` is on by default in the pipeline's call."""
    if not callable(pipe):  # VersatileDiffusionPipeline
        return False
    return _cleans_by_default(type(pipe).__call__)


@functools.lru_cache
def _cleans_by_default(call: Callable[..., Any]) -> bool:
    parameter = signature(call).parameters.get("clean_caption")
    return parameter is not None and parameter.default is True


def _find_cleaning(pipe: Pipeline) -> Callable[..., Any]:
    """Find the function that a pipeline cleans prompts with. It returns a text, or a list of one text."""
    if hasattr(pipe, "_text_preprocessing"):  # SANA, PixArt, IF, Lumina, Latte, Allegro
        return pipe._text_preprocessing
    # Wan and its derivatives have a function in the module of the class, or in those of their blocks.
    blocks = _all_blocks(pipe.blocks) if isinstance(pipe, ModularPipeline) else ()
    for cls in (*type(pipe).__mro__, *map(type, blocks)):
        function = getattr(sys.modules.get(cls.__module__), "prompt_clean", None)
        if function is not None:
            return function
    return lambda text: text


def _all_blocks(block: Any) -> Iterator[Any]:
    """Yield the blocks of a modular pipeline, at all depths."""
    yield block
    for inner in getattr(block, "sub_blocks", {}).values():
        yield from _all_blocks(inner)


def _clean_prompt(clean: Callable[..., Any], placeholder: str, **settings: Any) -> str:
    """Return a prompt with the placeholder after cleaning."""
    text = f"a {placeholder} here"
    try:
        cleaned = clean(text, **settings)
    except NameError:  # ftfy is not installed: modular Wan cannot read prompts then; Flux imports it and never calls it
        return text
    return cleaned if isinstance(cleaned, str) else cleaned[0]
