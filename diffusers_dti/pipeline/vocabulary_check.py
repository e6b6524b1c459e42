"""Check that concepts can be added to a text encoder. Nothing here writes."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from ..concept.inversion import DirectionalInversion
from .listing import waiting
from .text_encoders import TextEncoder
from .tokenizer import known_tokens, token_names

SHORTEST_PROMPT = "a photo of a"  # of training's templates, without the placeholder
LONGEST_WINDOW = 1058  # Qwen-Image's, the longest of all families; tokenizers such as Gemma's say 10**30
MAX_ROUNDING = 0.25  # of a row, as a share of its norm: float8 rounds by 0.06 or less
_NUMBERED = re.compile(r"(.+)_\d+")  # how diffusers names the vectors of one token


def check(encoder: TextEncoder, inversions: Sequence[DirectionalInversion], reuse_existing: bool = True) -> None:
    """Check that concepts can be added.

    Args:
        encoder: the text encoder to add them to.
        inversions: the concepts, of which only the part for this encoder is checked.
        reuse_existing: accept a concept whose tokens and rows a reopened pipeline already has.

    Raises:
        ValueError: if a width differs, a prompt has no room for all vectors, the table is quantized or cannot hold a norm, a
            placeholder is taken, or concepts were loaded through another tokenizer.
    """
    if inversions and not encoder.weight.is_floating_point():
        raise ValueError(
            f"{encoder.component} has a table of embeddings in {encoder.weight.dtype}: load it with a floating-point table, as "
            "bitsandbytes and torchao leave it by default."
        )
    concepts = encoder.concepts
    tokens = [token for concept in concepts.values() for token in concept.tokens]
    own = set.intersection(*(known_tokens(tokenizer, tokens) for tokenizer in encoder.tokenizers))
    elsewhere = [placeholder for placeholder, concept in concepts.items() if not own.issuperset(concept.tokens)]
    if inversions and elsewhere:
        raise ValueError(
            f"{encoder.component} has {', '.join(elsewhere)}, loaded through another tokenizer, and this pipeline's own would "
            "give a new concept the same ids, and so its row. Use that tokenizer here as well, as `from_pipe` does, or first "
            "unload what was loaded through it."
        )
    loaded, saved = set(concepts), waiting(encoder)
    bases = {_base(placeholder) for placeholder in loaded}
    present = known_tokens(encoder.tokenizer, [name for inversion in inversions for name in _names(encoder, inversion)])
    for inversion in inversions:
        placeholder, rows = inversion.placeholder_token, inversion.embeddings[encoder.component]
        check_width(encoder, inversion)
        check_count(encoder, placeholder, len(rows))
        _check_norms(encoder, placeholder, rows)
        if placeholder in loaded - concepts.keys():
            raise ValueError(f"{placeholder} is the placeholder of two of the concepts: give one of them another (`token`).")
        if placeholder in loaded or (placeholder in saved and not find_existing(encoder, placeholder, rows)):
            raise ValueError(
                f"{placeholder} is already loaded: replace it with `replace=True`, choose another placeholder (`token`; in "
                f"commands `SOURCE=<other>`), or unload it first with `unload_directional_inversion({placeholder!r})`."
            )
        if placeholder in bases or _base(placeholder) in loaded:
            other = next(o for o in loaded if placeholder in (o, _base(o)) or _base(placeholder) == o)
            raise ValueError(
                f"{placeholder} and {other} cannot be loaded together: diffusers takes them for vectors of one token."
            )
        taken = not present.isdisjoint(_names(encoder, inversion))
        if taken and not (reuse_existing and find_existing(encoder, placeholder, rows)):
            raise ValueError(
                f"{placeholder} is in the vocabulary of {encoder.component} already, with another meaning: choose another "
                "placeholder (`token`, in training `placeholder_token`). If stock `load_textual_inversion` put it there, "
                "`unload_textual_inversion` takes it out."
            )
        loaded.add(placeholder)
        bases.add(_base(placeholder))


def _names(encoder: TextEncoder, inversion: DirectionalInversion) -> list[str]:
    """Return the names of a concept and of its tokens in an encoder."""
    placeholder = inversion.placeholder_token
    return [placeholder, *token_names(placeholder, len(inversion.directions[encoder.component]))]


def check_count(encoder: TextEncoder, name: str, count: int) -> None:
    """Check that a prompt has room for the vectors of a concept: those beyond the encoder's window would be cut off.

    Args:
        encoder: the text encoder.
        name: what the message calls the concept.
        count: the number of vectors.

    Raises:
        ValueError: if not all of them fit beside training's shortest template.
    """
    if count == 1:
        return
    room = min(encoder.tokenizer.model_max_length, LONGEST_WINDOW) - len(encoder.tokenizer(SHORTEST_PROMPT).input_ids)
    if count > room:
        raise ValueError(
            f"{name} would have {count} vectors in {encoder.component}, where a prompt has room for {room} beside "
            f"{SHORTEST_PROMPT!r}: use fewer (`num_vectors`)."
        )


def _base(placeholder: str) -> str | None:
    """Return the token that diffusers would take a placeholder for a vector of, such as "<dog>" for "<dog>_1"."""
    match = _NUMBERED.fullmatch(placeholder)
    return match[1] if match else None


def check_width(encoder: TextEncoder, inversion: DirectionalInversion) -> None:
    """Check that a concept's rows are as wide as the encoder's.

    Raises:
        ValueError: if they are not, naming the model that the concept was learned with.
    """
    width = inversion.directions[encoder.component].shape[1]
    if width != encoder.width:
        base = inversion.metadata.get("base_model")
        raise ValueError(
            f"{inversion.placeholder_token} is {width} wide for {encoder.component}, whose embeddings are "
            f"{encoder.width} wide: it was learned with another model{f', {base}' if base else ''}."
        )


def _check_norms(encoder: TextEncoder, placeholder: str, rows: Tensor) -> None:
    """Check that rows are still themselves in the encoder's precision: float16 ends at 6e-8 and 65504."""
    norms, dtype = torch.linalg.vector_norm(rows, dim=-1), encoder.weight.dtype
    errors = torch.linalg.vector_norm(rows.to(dtype).float() - rows, dim=-1)
    lost = ~(errors <= MAX_ROUNDING * norms)  # also if an error is NaN
    if lost.any():
        raise ValueError(
            f"{placeholder} has a norm of {norms[lost][0]:g}, which {encoder.component} cannot hold in {dtype}: choose another "
            '`token_scale`, such as "mean".'
        )


def find_existing(encoder: TextEncoder, placeholder: str, rows: Tensor) -> list[int] | None:
    """Return the ids of a concept that a reopened pipeline already has, at any precision and scale, or None."""
    # Only added tokens count: a word of the encoder's own vocabulary is not a concept, even if it has the same direction.
    added, names = encoder.tokenizer.added_tokens_encoder, token_names(placeholder, len(rows))
    ids = [added[name] for name in names if name in added]
    return ids if len(ids) == len(names) and encoder.holds(ids, rows) else None
