"""Read the rows of words, or of concepts, for each text encoder. Nothing here writes."""

from collections.abc import Mapping

from torch import Tensor

from ..concept.concept import Concept
from .offload import offload_disabled
from .text_encoders import TextEncoder
from .vocabulary_check import check_count

LONE_SPACES = ("▁", "Ġ")  # tokens of SentencePiece and byte-level vocabularies that are a space and nothing else


def token_ids_of(encoder: TextEncoder, words: str, in_context: bool = True) -> list[int]:
    """Tokenize words of an encoder's own vocabulary.

    Args:
        encoder: the text encoder.
        words: a word or several.
        in_context: take the tokens that the words have inside a prompt, such as Gemma's "▁dog", instead of those that they have
            alone, such as "dog". The two are different rows, which have little in common.

    Raises:
        ValueError: if the text has no tokens that the encoder knows.
    """
    tokenizer = encoder.tokenizer
    ids: list[int] = tokenizer(words, add_special_tokens=False).input_ids
    if in_context and ids:
        before: list[int] = tokenizer("a", add_special_tokens=False).input_ids
        inside: list[int] = tokenizer(f"a {words}", add_special_tokens=False).input_ids
        if inside[: len(before)] == before and len(inside) > len(before):
            ids = inside[len(before) :]
        # A word without a token for "▁word" is cut into "▁" and the rest. The placeholder takes up that space.
        if len(ids) > 1 and tokenizer.convert_ids_to_tokens(ids[:1])[0] in LONE_SPACES:
            ids = ids[1:]
    # CLIP's unknown token is its end token, and its vocabulary has the bytes of every text.
    if not ids or tokenizer.unk_token_id in set(ids) - {tokenizer.eos_token_id, tokenizer.pad_token_id}:
        raise ValueError(f"The initializer {words!r} has no known tokens: give a word for what the photos show.")
    return ids


def word_rows(
    encoders: Mapping[str, TextEncoder], words: str | Concept, num_vectors: int | None, in_context: bool = True
) -> dict[str, Tensor]:
    """Return the rows of words, one for each token, or those of a concept.

    Args:
        encoders: the text encoders, by component.
        words: a word or several, or a concept.
        num_vectors: the number of rows n. If it is larger than the number of tokens, the rows are repeated in turn.
        in_context: see `token_ids_of`.

    Returns:
        Rows, (n, d) float32 on the CPU, by component.

    Raises:
        ValueError: if an encoder does not know the words, a concept lacks a component, or `num_vectors` is too small or large.
    """
    rows = {}
    for component, encoder in encoders.items():
        if isinstance(words, Concept):
            if component not in words.directions:
                raise ValueError(f"The concept to start from, {words.placeholder_token}, has nothing for {component}.")
            own = words.embeddings[component]
        else:
            ids = token_ids_of(encoder, words, in_context)
            with offload_disabled(encoder.model):
                own = encoder.weight.detach()[ids].float().cpu()
        rows[component] = repeat_rows(own, num_vectors, encoder)
    return rows


def repeat_rows(rows: Tensor, num_vectors: int | None, encoder: TextEncoder) -> Tensor:
    """Repeat rows in turn until there are `num_vectors`; None keeps them as they are.

    Args:
        rows: (n, d).
        num_vectors: the number of rows to return.
        encoder: the text encoder that they are for.

    Raises:
        ValueError: if there are more rows than `num_vectors`, or a prompt has no room for as many.
    """
    count = num_vectors or len(rows)
    if count < len(rows):
        raise ValueError(
            f"The initializer has {len(rows)} vectors in {encoder.component}: num_vectors must be {len(rows)} or more."
        )
    check_count(encoder, "The concept", count)
    return rows[[i % len(rows) for i in range(count)]]
