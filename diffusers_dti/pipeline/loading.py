"""Load, unload and save concepts: check everything first, then change the pipeline."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, overload

from diffusers.utils import logging

from ..concept.inversion import DirectionalInversion
from . import vocabulary
from .locks import changing, check_not_in_training
from .matching import match_components
from .offload import all_offload_disabled
from .pooling import pooling_of
from .prompt_check import check_placeholder, warn_if_ordinary
from .protocols import Pipeline, Source
from .text_encoders import Pooling, ScaleRule, TextEncoder, find_text_encoders, present_text_encoders, rescale
from .vocabulary_check import check

logger = logging.get_logger(__name__)


@overload
def load_directional_inversion(
    pipe: Pipeline, source: Source, token: str | Sequence[str] | None = None, token_scale: ScaleRule | float | None = None,
    pooling: Pooling | None = None, hf_token: str | bool | None = None, **kwargs: Any,
) -> DirectionalInversion: ...  # fmt: skip


@overload
def load_directional_inversion(
    pipe: Pipeline, source: Sequence[Source], token: Sequence[str] | None = None, token_scale: ScaleRule | float | None = None,
    pooling: Pooling | None = None, hf_token: str | bool | None = None, **kwargs: Any,
) -> list[DirectionalInversion]: ...  # fmt: skip


def load_directional_inversion(
    pipe: Pipeline,
    source: Source | Sequence[Source],
    token: str | Sequence[str] | None = None,
    token_scale: ScaleRule | float | None = None,
    pooling: Pooling | None = None,
    hf_token: str | bool | None = None,
    **kwargs: Any,
) -> DirectionalInversion | list[DirectionalInversion]:
    """Load a learned concept, or several, into every text encoder of a pipeline, as `pipe.load_directional_inversion` does.

    Args:
        pipe: a diffusers pipeline in which each `text_encoder*` has a `tokenizer*`.
        source: a Hub id, a folder, a file, a state dict, or a `DirectionalInversion`; a list of them for several concepts.
        token: the placeholder to use in prompts, for several concepts a list of them; the files' own by default.
        token_scale: the norm of the embeddings: "mean", "min" or "max" of the encoder's vocabulary, or a number; as stored by
            default.
        pooling: "eos" or "legacy", where CLIP's text vector is pooled; by default as the concept was trained.
        hf_token: the Hub's access token.
        kwargs: `weight_name`, `allow_pickle`, and arguments of `huggingface_hub.hf_hub_download`.

    Returns:
        The concept as it was loaded, with its placeholder and scale; a list for several concepts.

    Raises:
        ValueError: if a concept does not fit, or a placeholder is taken; nothing is loaded then.
        TypeError: if there is no such argument.
        OSError: if there is nothing at the source, or the Hub cannot be reached.

    Example:

        ```py
        >>> import diffusers_dti

        >>> dog = diffusers_dti.load_directional_inversion(pipe, "user/dti-dog", token="<rex>")
        >>> dog.placeholder_token
        '<rex>'
        ```
    """
    sources: list[Any] = list(source) if isinstance(source, list | tuple) else [source]
    tokens = [token] * len(sources) if token is None or isinstance(token, str) else list(token)
    if len(tokens) != len(sources) or (len(sources) > 1 and isinstance(token, str)):
        raise ValueError(f"`token` needs a placeholder for each of {len(sources)} concepts, or is left out.")
    given = list(zip(sources, tokens))
    bar = logging.tqdm(given, desc="Reading concepts", leave=False, disable=len(given) == 1, delay=1)  # after a second
    concepts = [_read(own, name, pooling, hf_token, kwargs) for own, name in bar]
    loaded = inject(pipe, concepts, token_scale)
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
        inversion = source if token is None else replace(source, placeholder_token=token)
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


def inject(
    pipe: Pipeline,
    concepts: Sequence[tuple[DirectionalInversion, Pooling]],
    token_scale: ScaleRule | float | None = None,
    reuse_existing: bool = True,
) -> list[DirectionalInversion]:
    """Add concepts to the pipeline's tokenizers and tables: all of them whole, or nothing.

    Args:
        pipe: the pipeline.
        concepts: the concepts, each with "eos" or "legacy", where CLIP's text vector is pooled.
        token_scale: "mean", "min" or "max" of the encoder's vocabulary, or a number; None keeps the concepts' own scales.
        reuse_existing: reuse a concept's tokens and rows if a reopened pipeline already has them.

    Returns:
        The parts of the concepts that were loaded, with their scale.

    Raises:
        ValueError: if a concept does not fit, or a placeholder is taken; the pipeline is then unchanged.
    """
    encoders = find_text_encoders(pipe)
    if len({id(encoder.tokenizer) for encoder in encoders.values()}) < len(encoders):
        raise ValueError(
            f"Encoders of this {type(pipe).__name__} share one tokenizer: give each its own, with `copy.deepcopy`."
        )
    loaded: list[DirectionalInversion] = []
    parts: dict[str, list[tuple[DirectionalInversion, Pooling]]] = {component: [] for component in encoders}
    models = [encoder.model for encoder in encoders.values()]
    with changing(models), all_offload_disabled(models):
        for given, pooling in concepts:
            inversion = _fitted(pipe, encoders, given, token_scale)
            loaded.append(inversion)
            for component in inversion.directions:
                parts[component].append((inversion, pooling))
        for component, own in parts.items():
            check(encoders[component], [inversion for inversion, _ in own], reuse_existing)
        vocabulary.add((encoders[component], own) for component, own in parts.items())
    return loaded


def _fitted(
    pipe: Pipeline,
    encoders: Mapping[str, TextEncoder],
    inversion: DirectionalInversion,
    token_scale: ScaleRule | float | None,
) -> DirectionalInversion:
    """Return the parts of a concept that are for this pipeline, at the norms that were asked for."""
    inversion = match_components(pipe, encoders, inversion)
    matching = {c: encoders[c] for c in inversion.directions}
    missing = sorted(encoders.keys() - matching.keys())
    if missing:
        logger.warning(
            f"{inversion.placeholder_token} has nothing for {', '.join(missing)}: there it remains an ordinary, unknown word."
        )
    check_placeholder(pipe, inversion.placeholder_token)
    warn_if_ordinary(matching.values(), inversion.placeholder_token)
    return inversion if token_scale is None else rescale(matching, inversion, token_scale)


def directional_inversions(pipe: Pipeline) -> dict[str, DirectionalInversion]:
    """Return the concepts that are loaded in a pipeline, by placeholder, in order of loading."""
    loaded: dict[str, DirectionalInversion] = {}
    for encoder in present_text_encoders(pipe).values():
        for placeholder, concept in encoder.concepts.items():
            here, other = concept.inversion, loaded.setdefault(placeholder, concept.inversion)
            if other is not here:  # its files were loaded one by one
                directions, scales = other.directions | here.directions, other.scales | here.scales
                loaded[placeholder] = replace(other, directions=directions, scales=scales)
    return loaded


def unload_directional_inversion(pipe: Pipeline, token: str | list[str] | None = None) -> None:
    """Unload concepts from a pipeline, as if only the others had ever been loaded.

    Args:
        pipe: the pipeline.
        token: a placeholder or several; all that are loaded by default.

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
        withdraw(pipe, placeholders)


def withdraw(pipe: Pipeline, placeholders: Sequence[str]) -> None:
    """Unload loaded concepts without a check, as a training run does that failed."""
    encoders = present_text_encoders(pipe).values()
    models = [encoder.model for encoder in encoders]
    with changing(models), all_offload_disabled(models):
        vocabulary.remove((encoder, [p for p in placeholders if p in encoder.concepts]) for encoder in encoders)


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
