"""The mixin that gives every diffusers pipeline `load_directional_inversion`, and the `register` that puts it there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

from diffusers import ModularPipeline
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.utils import logging
from torch import nn

from ..concept import third_party
from ..concept.inversion import DirectionalInversion
from . import vocabulary
from .offload import weights_at_hand

logger = logging.get_logger(__name__)

Pair = tuple[Any, nn.Module]


def text_pairs(pipe: Any) -> dict[str, Pair]:
    """Tokenizer and encoder of each text encoder of a pipeline, by the encoder's component name.

    Raises:
        ValueError: where there is none, listing the components found.
    """
    components = pipe.components
    pairs = {}
    for name in sorted(n for n in components if n.startswith("text_encoder")):
        encoder, tokenizer = components[name], components.get(name.replace("text_encoder", "tokenizer"))
        if isinstance(encoder, nn.Module) and hasattr(encoder, "get_input_embeddings") and hasattr(tokenizer, "add_tokens"):
            pairs[name] = (tokenizer, encoder)
    if not pairs:
        found = {n: type(c).__name__ for n, c in components.items() if n.startswith(("text_encoder", "tokenizer"))}
        if isinstance(pipe, ModularPipeline) and "NoneType" in found.values():
            missing = ", ".join(n for n, kind in found.items() if kind == "NoneType")
            raise ValueError(f"{missing} of this {type(pipe).__name__} are not loaded yet: call `load_components()` first.")
        raise ValueError(
            f"{type(pipe).__name__} has no text encoder with a tokenizer of its own, so there is nowhere to put a token. "
            f"It has: {found or 'neither'}."
        )
    return pairs


def rescale(pairs: Mapping[str, Pair], inversion: DirectionalInversion, token_scale: str | float) -> DirectionalInversion:
    """The concept at the vocabulary's "mean", "min" or "max" norm in each encoder, or at a number."""
    if isinstance(token_scale, str):
        scaled = inversion.rescale({c: vocabulary.norm_statistic(*pairs[c], token_scale) for c in inversion.scales})
    elif token_scale > 0:
        scaled = inversion.rescale(token_scale)
    else:
        raise ValueError(f'token_scale must be "mean", "min", "max" or a positive number, got {token_scale!r}.')
    return replace(scaled, metadata=scaled.metadata | {"scale_rule": token_scale})


def load_directional_inversion(
    pipe: Any,
    source: str | Path | Mapping[str, Any] | DirectionalInversion,
    token: str | None = None,
    token_scale: str | float | None = None,
    pooling: str | None = None,
    hf_token: str | bool | None = None,
    **kwargs: Any,
) -> DirectionalInversion:
    """Load a learned concept into every text encoder of a pipeline.

    Args:
        pipe: any diffusers pipeline whose `text_encoder*` have a `tokenizer*` each.
        source: Hub id, folder, file, state dict, or a `DirectionalInversion`.
        token: the placeholder to use in prompts; the file's own by default.
        token_scale: None for the stored norm; "mean", "min", "max" of the encoder's vocabulary; or a number. "mean"
            repairs the inflated embeddings of classic textual inversion.
        pooling: "eos" pools CLIP's text vector at the end of the prompt; "legacy" at the placeholder, as transformers
            does with SDXL's configuration. By default as the concept was trained, else "eos".
        hf_token: the Hub's access token.
        kwargs: `weight_name`, `subfolder`, `allow_pickle`, `revision`, `cache_dir`, `local_files_only`, ...

    Returns:
        What was loaded, at the scale it was loaded with.

    Raises:
        ValueError: for a concept that does not fit, or a placeholder that is taken; the pipeline is then as it was.
    """
    if token is not None and token.startswith("hf_"):  # before it is sent anywhere or written in a message
        raise ValueError("`token` is the placeholder, and this one looks like a Hub credential: give that as `hf_token`.")
    if isinstance(source, DirectionalInversion):
        if kwargs:
            raise TypeError(f"{', '.join(kwargs)} cannot be given with a `DirectionalInversion`, which is in memory already.")
        inversion = source if token is None else replace(source, placeholder_token=token)
    else:
        from huggingface_hub import hf_hub_download

        known = {"weight_name", "allow_pickle", *signature(hf_hub_download).parameters} - {"repo_id", "filename", "token"}
        if unknown := kwargs.keys() - known:
            raise TypeError(f"`load_directional_inversion` has no argument {', '.join(sorted(unknown))}.")
        inversion = DirectionalInversion.from_pretrained(source, token, token=hf_token, **kwargs)
    pooling = pooling or inversion.metadata.get("pooling", "eos")
    if pooling not in ("eos", "legacy"):
        raise ValueError(f'pooling must be "eos" or "legacy", got {pooling!r}.')
    return place(pipe, inversion, pooling, token_scale)


def place(
    pipe: Any, inversion: DirectionalInversion, pooling: str, token_scale: str | float | None = None, adopt: bool = True
) -> DirectionalInversion:
    """Put a concept into the pipeline's tokenizers and tables, all of it or nothing; see `load_directional_inversion`.

    With `adopt`, what a reopened pipeline holds of it already is taken over.
    """
    pairs = text_pairs(pipe)
    if len({id(tokenizer) for tokenizer, _ in pairs.values()}) < len(pairs):
        raise ValueError(f"Encoders of this {type(pipe).__name__} share one tokenizer: give each its own, a `copy.deepcopy`.")
    inversion = sort_out(pipe, pairs, inversion)
    fitting = {c: pairs[c] for c in inversion.directions}
    if set(fitting) != set(pairs):
        missing = ", ".join(sorted(set(pairs) - set(fitting)))
        logger.warning(f"{inversion.placeholder_token} has nothing for {missing}: there it stays an ordinary, unknown word.")

    _check_cleaning(pipe, inversion.placeholder_token)
    added: list[Pair] = []
    with _all_at_hand(fitting):
        if token_scale is not None:
            inversion = rescale(fitting, inversion, token_scale)
        for component, pair in fitting.items():
            vocabulary.check(*pair, component, inversion, adopt)
        # < from here on the pipeline changes
        try:
            for component, pair in fitting.items():
                added.append(pair)
                vocabulary.add(*pair, component, inversion, pooling)
        except BaseException:
            for pair in added:
                ledger = vocabulary.ledger_of(pair[1])
                if ledger and inversion.placeholder_token in ledger.entries:
                    vocabulary.remove(*pair, inversion.placeholder_token, undo=True)
            raise
        # />
    return inversion


def sort_out(pipe: Any, pairs: Mapping[str, Pair], inversion: DirectionalInversion) -> DirectionalInversion:
    """The parts of a concept that are for this pipeline, by its components.

    Other programs' files do not say which component a part is for: there it goes by kind and width of the encoder.

    Raises:
        ValueError: where no part fits, saying which model the concept is for.
    """
    widths = {c: v.shape[1] for c, v in inversion.directions.items()}
    keys = third_party.known(widths, inversion.metadata)
    places = {c: c for c, w in widths.items() if c in pairs and (c not in keys or third_party.fits(keys[c], w, pairs[c][1]))}
    for c in [c for c in widths if c in keys and c not in places]:
        free = [p for p in pairs if p not in places.values() and third_party.fits(keys[c], widths[c], pairs[p][1])]
        if free:
            places[c] = free[0]
    names = {c: third_party.encoder_name(keys.get(c), w) for c, w in widths.items()}
    if not any(third_party.fits(None, widths[c], pairs[p][1]) for c, p in places.items()):
        parts = (names[c] or c if c not in pairs else f"{names[c] or c}, {w} wide" for c, w in widths.items())
        here = (f"{c} ({vocabulary.table(encoder).shape[1]} wide)" for c, (_, encoder) in pairs.items())
        base = inversion.metadata.get("base_model")
        raise ValueError(
            f"{inversion.placeholder_token} is for {' and '.join(parts)}, and {type(pipe).__name__} has only "
            f"{', '.join(here)}: it was learned with another model{f', {base}' if base else ''}."
        )
    if unused := sorted(widths.keys() - places.keys()):
        parts = ", ".join((c in keys and names[c]) or c for c in unused)
        later = " If it is not loaded yet, call `load_components()` before." if isinstance(pipe, ModularPipeline) else ""
        logger.warning(f"{type(pipe).__name__} has no {parts}: that part of the concept stays unused.{later}")
    elif all(c == p for c, p in places.items()):
        return inversion
    directions, scales = ({p: values[c] for c, p in places.items()} for values in (inversion.directions, inversion.scales))
    encoders = {p: keys[c] for c, p in places.items() if c in inversion.metadata.get("encoders", {})}
    metadata = inversion.metadata | ({"encoders": encoders} if encoders else {})
    return replace(inversion, directions=directions, scales=scales, metadata=metadata)


def _check_cleaning(pipe: Any, word: str) -> None:
    """Whether a placeholder comes through what the pipeline does to prompts before it calls the tokenizer."""
    name, lower = type(pipe).__name__, word.lower()
    if hasattr(pipe, "_text_preprocessing"):  # SANA, PixArt, IF, Lumina, Latte, Allegro
        clean = pipe._text_preprocessing
    else:  # Wan and what comes from it have a function beside the class, or beside their blocks
        blocks = _blocks(pipe.blocks) if isinstance(pipe, ModularPipeline) else ()
        modules = (sys.modules.get(c.__module__) for c in (*type(pipe).__mro__, *map(type, blocks)))
        clean = next((m.prompt_clean for m in modules if hasattr(m, "prompt_clean")), lambda text: text)
    if word not in _cleaned(clean, word):
        if lower in _cleaned(clean, lower):
            raise ValueError(f"{name} lower-cases prompts and would never see {word}: call it {lower}.")
        raise ValueError(
            f"{name} mends prompts before it reads them, and would never see {word}: choose a placeholder of plain letters, "
            "such as <dog>."
        )
    # VersatileDiffusionPipeline has no call
    caption = signature(pipe.__call__).parameters.get("clean_caption") if callable(pipe) else None
    if caption is not None and caption.default is True and word not in _cleaned(clean, word, clean_caption=True):
        logger.warning(f"{name} takes {word} out of prompts unless it is called with clean_caption=False.")


def _blocks(block: Any) -> Iterator[Any]:
    """The blocks of a modular pipeline, at all depths."""
    yield block
    for inner in getattr(block, "sub_blocks", {}).values():
        yield from _blocks(inner)


def _cleaned(clean: Callable[..., Any], word: str, **settings: Any) -> str:
    """A prompt with a word, after cleaning; some pipelines clean lists."""
    text = f"a {word} here"
    try:
        text = clean(text, **settings)
    except NameError:  # ftfy is not installed: modular Wan cannot read prompts then, and Flux has it and never calls it
        return text
    return text if isinstance(text, str) else text[0]


@contextmanager
def _all_at_hand(pairs: Mapping[str, Pair]) -> Iterator[None]:
    with ExitStack() as stack:
        for _, encoder in pairs.values():
            stack.enter_context(weights_at_hand(encoder))
        yield


def directional_inversions(pipe: Any) -> dict[str, DirectionalInversion]:
    """What is loaded in a pipeline, by placeholder, in order of loading."""
    found: dict[str, DirectionalInversion] = {}
    for _, encoder in text_pairs(pipe).values():
        ledger = vocabulary.ledger_of(encoder)
        for word, entry in (ledger.entries if ledger else {}).items():
            other = found.setdefault(word, entry.inversion)
            if other is not entry.inversion:  # loaded file by file
                directions = other.directions | entry.inversion.directions
                found[word] = replace(other, directions=directions, scales=other.scales | entry.inversion.scales)
    return found


def unload_directional_inversion(pipe: Any, token: str | list[str] | None = None) -> None:
    """Take concepts out of a pipeline, as if only the others had ever been loaded.

    Args:
        pipe: the pipeline.
        token: placeholder or placeholders; all that are loaded by default.

    Raises:
        ValueError: for a placeholder that is not loaded; nothing is unloaded then.
    """
    loaded = directional_inversions(pipe)
    words = list(loaded) if token is None else [token] if isinstance(token, str) else list(token)
    unknown = [w for w in words if w not in loaded]
    if unknown:
        raise ValueError(f"{', '.join(unknown)} is not loaded; loaded are: {', '.join(loaded) or 'none'}.")
    pairs = text_pairs(pipe)
    with _all_at_hand(pairs):
        for tokenizer, encoder in pairs.values():
            for word in words:
                ledger = vocabulary.ledger_of(encoder)
                if ledger and word in ledger.entries:
                    vocabulary.remove(tokenizer, encoder, word)


def save_directional_inversion(pipe: Any, save_directory: str | Path, token: str | None = None) -> None:
    """Save a loaded concept; `token` says which where several are loaded.

    Raises:
        ValueError: where it is not clear which concept is meant.
    """
    loaded = directional_inversions(pipe)
    if token not in loaded and (token is not None or len(loaded) != 1):
        raise ValueError(f"Say with `token` which concept to save; loaded are: {', '.join(loaded) or 'none'}.")
    (loaded[token] if token else next(iter(loaded.values()))).save_pretrained(save_directory)


class DirectionalTextualInversionMixin(TextualInversionLoaderMixin):
    """Methods for pipelines: see the functions of the same names in this module."""

    def load_directional_inversion(
        self,
        source: str | Path | Mapping[str, Any] | DirectionalInversion,
        token: str | None = None,
        token_scale: str | float | None = None,
        pooling: str | None = None,
        hf_token: str | bool | None = None,
        **kwargs: Any,
    ) -> DirectionalInversion:
        """See `diffusers_dti.load_directional_inversion`."""
        return load_directional_inversion(self, source, token, token_scale, pooling, hf_token, **kwargs)

    def unload_directional_inversion(self, token: str | list[str] | None = None) -> None:
        """See `diffusers_dti.unload_directional_inversion`."""
        unload_directional_inversion(self, token)

    def save_directional_inversion(self, save_directory: str | Path, token: str | None = None) -> None:
        """See `diffusers_dti.save_directional_inversion`."""
        save_directional_inversion(self, save_directory, token)

    @property
    def directional_inversions(self) -> dict[str, DirectionalInversion]:
        """The loaded concepts by placeholder."""
        return directional_inversions(self)


def register(pipeline_class: type) -> None:
    """Give a pipeline class and all its subclasses, also later ones, the mixin's methods. Twice is the same as once.

    Raises:
        TypeError: where the class has a method of somebody else's under one of the names.
    """
    mixin = DirectionalTextualInversionMixin
    if issubclass(pipeline_class, mixin):
        return
    names = [n for n in vars(mixin) if not n.startswith("_")]
    taken = [n for n in names if hasattr(pipeline_class, n)]
    if taken:
        raise TypeError(f"{pipeline_class.__name__} has its own {', '.join(taken)}: not overwritten.")
    pipeline_class.__bases__ += (mixin,)  # last, so that no pipeline's own method is ever hidden
