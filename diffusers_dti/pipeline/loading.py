"""Load, unload and save concepts: check everything first, then change the pipeline."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, get_args

from diffusers.utils import logging

from ..concept.inversion import DirectionalInversion
from . import vocabulary
from .matching import match_components
from .offload import offload_disabled
from .prompt_check import check_placeholder
from .protocols import Pipeline
from .text_encoders import Pooling, ScaleRule, TextEncoder, find_text_encoders, rescale

logger = logging.get_logger(__name__)


def load_directional_inversion(
    pipe: Pipeline,
    source: str | Path | Mapping[str, Any] | DirectionalInversion,
    token: str | None = None,
    token_scale: ScaleRule | float | None = None,
    pooling: Pooling | None = None,
    hf_token: str | bool | None = None,
    **kwargs: Any,
) -> DirectionalInversion:
    """Load a learned concept into every text encoder of a pipeline, as `pipe.load_directional_inversion` does.

    Args:
        pipe: a diffusers pipeline in which each `text_encoder*` has a `tokenizer*`.
        source: a Hub id, a folder, a file, a state dict, or a `DirectionalInversion`.
        token: the placeholder to use in prompts; the file's own by default.
        token_scale: the norm of the embeddings: "mean", "min" or "max" of the encoder's vocabulary, or a number; as stored by
            default.
        pooling: "eos" or "legacy", where CLIP's text vector is pooled; by default as the concept was trained.
        hf_token: the Hub's access token.
        kwargs: `weight_name`, `allow_pickle`, and arguments of `huggingface_hub.hf_hub_download`.

    Returns:
        The concept as it was loaded, with its placeholder and scale.

    Raises:
        ValueError: if the concept does not fit, or the placeholder is taken; the pipeline is then unchanged.
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
    if token is not None and token.startswith("hf_"):  # before it is sent anywhere or repeated in a message
        raise ValueError("`token` is the placeholder, and this one looks like a Hub credential: pass that as `hf_token`.")
    if isinstance(source, DirectionalInversion):
        if kwargs:
            raise TypeError(f"{', '.join(kwargs)} cannot be used with a `DirectionalInversion`, which is in memory already.")
        inversion = source if token is None else replace(source, placeholder_token=token)
    else:
        _check_arguments(kwargs)
        inversion = DirectionalInversion.from_pretrained(source, token, token=hf_token, **kwargs)
    pooling = pooling or inversion.metadata.get("pooling", "eos")
    if pooling not in get_args(Pooling):
        raise ValueError(f'pooling must be "eos" or "legacy", got {pooling!r}.')
    return inject(pipe, inversion, pooling, token_scale)


def _check_arguments(kwargs: Mapping[str, Any]) -> None:
    """Check that every argument is one that reading or downloading takes: a misspelled one would be ignored."""
    from huggingface_hub import hf_hub_download

    known = {"weight_name", "allow_pickle", *signature(hf_hub_download).parameters} - {"repo_id", "filename", "token"}
    unknown = sorted(kwargs.keys() - known)
    if unknown:
        raise TypeError(f"`load_directional_inversion` has no argument {', '.join(unknown)}.")


def inject(
    pipe: Pipeline,
    inversion: DirectionalInversion,
    pooling: Pooling,
    token_scale: ScaleRule | float | None = None,
    reuse_existing: bool = True,
) -> DirectionalInversion:
    """Add a concept to the pipeline's tokenizers and tables: the whole concept, or nothing.

    Args:
        pipe: the pipeline.
        inversion: the concept.
        pooling: "eos" or "legacy", where CLIP's text vector is pooled.
        token_scale: "mean", "min" or "max" of the encoder's vocabulary, or a number; None keeps the concept's own scale.
        reuse_existing: reuse the concept's tokens and rows if a reopened pipeline already has them.

    Returns:
        The parts of the concept that were loaded, with their scale.

    Raises:
        ValueError: if the concept does not fit, or the placeholder is taken; the pipeline is then unchanged.
    """
    encoders = find_text_encoders(pipe)
    if len({id(encoder.tokenizer) for encoder in encoders.values()}) < len(encoders):
        raise ValueError(
            f"Encoders of this {type(pipe).__name__} share one tokenizer: give each its own, with `copy.deepcopy`."
        )
    inversion = match_components(pipe, encoders, inversion)
    matching = {c: encoders[c] for c in inversion.directions}
    missing = sorted(encoders.keys() - matching.keys())
    if missing:
        logger.warning(
            f"{inversion.placeholder_token} has nothing for {', '.join(missing)}: there it remains an ordinary, unknown word."
        )
    check_placeholder(pipe, inversion.placeholder_token)
    with _offload_disabled(matching.values()):
        if token_scale is not None:
            inversion = rescale(matching, inversion, token_scale)
        for encoder in matching.values():
            vocabulary.check(encoder, inversion, reuse_existing)
        # Everything above only reads. From here on the pipeline changes, and a failure has to be undone.
        changed: list[TextEncoder] = []
        try:
            for encoder in matching.values():
                changed.append(encoder)
                vocabulary.add(encoder, inversion, pooling)
        except BaseException:
            for encoder in changed:
                if inversion.placeholder_token in encoder.concepts:
                    vocabulary.remove(encoder, inversion.placeholder_token, undo=True)
            raise
    return inversion


@contextmanager
def _offload_disabled(encoders: Iterable[TextEncoder]) -> Iterator[None]:
    """Give access to the tensors of several encoders."""
    with ExitStack() as stack:
        for encoder in encoders:
            stack.enter_context(offload_disabled(encoder.model))
        yield


def directional_inversions(pipe: Pipeline) -> dict[str, DirectionalInversion]:
    """Return the concepts that are loaded in a pipeline, by placeholder, in order of loading."""
    loaded: dict[str, DirectionalInversion] = {}
    for encoder in find_text_encoders(pipe).values():
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

    Example:

        ```py
        >>> import diffusers_dti

        >>> dog = diffusers_dti.load_directional_inversion(pipe, "user/dti-dog")
        >>> diffusers_dti.unload_directional_inversion(pipe, "<dog>")
        ```
    """
    loaded = directional_inversions(pipe)
    if isinstance(token, str):
        token = [token]
    placeholders = list(loaded if token is None else token)
    unknown = [p for p in placeholders if p not in loaded]
    if unknown:
        raise ValueError(f"{', '.join(unknown)} is not loaded; loaded are: {', '.join(loaded) or 'none'}.")
    encoders = find_text_encoders(pipe)
    with _offload_disabled(encoders.values()):
        for encoder in encoders.values():
            for placeholder in placeholders:
                if placeholder in encoder.concepts:
                    vocabulary.remove(encoder, placeholder)


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
