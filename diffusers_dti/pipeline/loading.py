"""The functions that load, unload and save concepts."""

import dataclasses
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, overload

from diffusers.utils import logging

from ..concept.inversion import DirectionalInversion
from .exchange import inject, load_saved, withdraw
from .listing import directional_inversions
from .locks import changing, check_not_in_training
from .pooling import pooling_of
from .protocols import Pipeline, Source, SourceByPlaceholder
from .state import Pooling
from .text_encoders import ScaleRule, present_text_encoders

_ONE_SOURCE = (str, Path, DirectionalInversion)  # a state dict has tensors


@overload
def load_directional_inversion(
    pipe: Pipeline, source: SourceByPlaceholder, token: None = None, token_scale: ScaleRule | float | None = None,
    pooling: Pooling | None = None, hf_token: str | bool | None = None, replace: bool = False, **kwargs: Any,
) -> dict[str, DirectionalInversion]: ...  # fmt: skip


@overload
def load_directional_inversion(
    pipe: Pipeline, source: Source, token: str | Sequence[str] | None = None, token_scale: ScaleRule | float | None = None,
    pooling: Pooling | None = None, hf_token: str | bool | None = None, replace: bool = False, **kwargs: Any,
) -> DirectionalInversion: ...  # fmt: skip


@overload
def load_directional_inversion(
    pipe: Pipeline, source: Sequence[Source], token: Sequence[str] | None = None, token_scale: ScaleRule | float | None = None,
    pooling: Pooling | None = None, hf_token: str | bool | None = None, replace: bool = False, **kwargs: Any,
) -> list[DirectionalInversion]: ...  # fmt: skip


def load_directional_inversion(
    pipe: Pipeline,
    source: Source | Sequence[Source] | SourceByPlaceholder,
    token: str | Sequence[str] | None = None,
    token_scale: ScaleRule | float | None = None,
    pooling: Pooling | None = None,
    hf_token: str | bool | None = None,
    replace: bool = False,
    **kwargs: Any,
) -> DirectionalInversion | list[DirectionalInversion] | dict[str, DirectionalInversion]:
    """Load a learned concept, or several, into every text encoder of a pipeline, as `pipe.load_directional_inversion` does.

    Args:
        pipe: a diffusers pipeline in which each `text_encoder*` has a `tokenizer*`, or a processor with one.
        source: a Hub id, a folder, a file, a state dict, or a `DirectionalInversion`; for several concepts a list of
            them, or a mapping from placeholders to them.
        token: the placeholder to use in prompts, for several concepts a list of them; the files' own by default.
        token_scale: the norm of the embeddings: "mean", "min" or "max" of the encoder's vocabulary, or a number; as stored by
            default.
        pooling: "eos" or "legacy", where CLIP's text vector is pooled; by default as the concept was trained.
        hf_token: the Hub's access token.
        replace: unload the concept that is loaded under the same placeholder, if there is one, in the same change.
        kwargs: `weight_name`, `allow_pickle`, and arguments of `huggingface_hub.hf_hub_download`.

    Returns:
        The concept as it was loaded, with its placeholder and scale; a list or a dict for several concepts.

    Raises:
        ValueError: if a concept does not fit, or a placeholder is taken; nothing is loaded then.
        TypeError: if there is no such argument.
        OSError: if there is nothing at the source, or the Hub cannot be reached.
        RuntimeError: if a concept would be replaced while an encoder is being trained.

    Example:

        ```py
        >>> import diffusers_dti

        >>> dog = diffusers_dti.load_directional_inversion(pipe, "user/dti-dog", token="<rex>")
        >>> dog.placeholder_token
        '<rex>'
        ```
    """
    by_placeholder = isinstance(source, Mapping) and source and all(isinstance(s, _ONE_SOURCE) for s in source.values())
    if isinstance(source, Mapping) and by_placeholder:
        if token is not None:
            raise TypeError("A mapping from placeholders to sources names them already: leave out `token`.")
        token, source = list(source), list(source.values())
    sources: list[Any] = list(source) if isinstance(source, list | tuple) else [source]
    tokens = [token] * len(sources) if token is None or isinstance(token, str) else list(token)
    if len(tokens) != len(sources) or (len(sources) > 1 and isinstance(token, str)):
        raise ValueError(f"`token` needs a placeholder for each of {len(sources)} concepts, or is left out.")
    given = list(zip(sources, tokens))
    bar = logging.tqdm(given, desc="Reading concepts", leave=False, disable=len(given) == 1, delay=1)  # after a second
    concepts = [_read(own, name, pooling, hf_token, kwargs) for own, name in bar]
    if replace:
        load_saved(pipe, [inversion.placeholder_token for inversion, _ in concepts])
    loaded = inject(pipe, concepts, token_scale, replace=replace)
    if by_placeholder:
        return {concept.placeholder_token: concept for concept in loaded}
    return loaded if isinstance(source, list | tuple) else loaded[0]


def _read(
    source: Source, token: str | None, pooling: Pooling | None, hf_token: str | bool | None, kwargs: Mapping[str, Any]
) -> tuple[DirectionalInversion, Pooling]:
    """Read a concept, and say where CLIP's text vector is pooled with it."""
    if token is not None and token.startswith("hf_"):  # before it is sent anywhere or repeated in a message
        raise ValueError("`token` is the placeholder, and this one looks like a Hub credential: pass that as `hf_token`.")
    if isinstance(source, DirectionalInversion):
        if kwargs:
            raise TypeError(f"{', '.join(kwargs)} cannot be used with a `DirectionalInversion`, which is in memory already.")
        inversion = source if token is None else dataclasses.replace(source, placeholder_token=token)
    else:
        _check_arguments(kwargs)
        inversion = DirectionalInversion.from_pretrained(source, token, token=hf_token, **kwargs)
    return inversion, pooling_of(inversion, pooling)


def _check_arguments(kwargs: Mapping[str, Any]) -> None:
    """Check that every argument is one that reading or downloading takes: a misspelled one would be ignored."""
    from huggingface_hub import hf_hub_download

    known = {"weight_name", "allow_pickle", *signature(hf_hub_download).parameters} - {"repo_id", "filename", "token"}
    unknown = sorted(kwargs.keys() - known)
    if unknown:
        raise TypeError(f"`load_directional_inversion` has no argument {', '.join(unknown)}.")


def unload_directional_inversion(pipe: Pipeline, token: str | list[str] | None = None) -> None:
    """Unload concepts from a pipeline, as if only the others had ever been loaded.

    Args:
        pipe: the pipeline.
        token: a placeholder or several; all of `directional_inversions` by default.

    Raises:
        ValueError: if a placeholder is not loaded; nothing is unloaded then.
        RuntimeError: while an encoder is being trained, also in a training callback.

    Example:

        ```py
        >>> import diffusers_dti

        >>> dog = diffusers_dti.load_directional_inversion(pipe, "user/dti-dog")
        >>> diffusers_dti.unload_directional_inversion(pipe, "<dog>")
        ```
    """
    models = [encoder.model for encoder in present_text_encoders(pipe).values()]
    with changing(models):
        loaded = directional_inversions(pipe)
        placeholders = list(loaded) if token is None else [token] if isinstance(token, str) else list(token)
        unknown = [p for p in placeholders if p not in loaded]
        if unknown:
            raise ValueError(f"{', '.join(unknown)} is not loaded; loaded are: {', '.join(loaded) or 'none'}.")
        check_not_in_training(models)
        load_saved(pipe, placeholders)
        withdraw(pipe, placeholders)


def save_directional_inversion(pipe: Pipeline, save_directory: str | Path, token: str | None = None) -> None:
    """Save a loaded concept.

    Args:
        pipe: the pipeline.
        save_directory: the folder for its files, one for each text encoder.
        token: the placeholder of the concept, needed if several are loaded.

    Raises:
        ValueError: if it is not clear which concept is meant.

    Example:

        ```py
        >>> import diffusers_dti

        >>> dog = diffusers_dti.load_directional_inversion(pipe, "user/dti-dog")
        >>> diffusers_dti.save_directional_inversion(pipe, "out/dog")
        ```
    """
    loaded = directional_inversions(pipe)
    if token is None and len(loaded) == 1:
        (token,) = loaded
    if token is None or token not in loaded:
        raise ValueError(f"Say which concept to save with `token`; loaded are: {', '.join(loaded) or 'none'}.")
    loaded[token].save_pretrained(save_directory)
