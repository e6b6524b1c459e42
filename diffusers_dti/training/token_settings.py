"""Settings of what is trained, and where it starts."""
# ruff: noqa: RUF009 (`setting` returns a dataclass field)

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from ..concept.inversion import DirectionalInversion
from ..concept.methods import METHODS
from .defaults import PrefixSpace, Preset
from .settings import setting

Initializer = str | DirectionalInversion
Initializers = Initializer | Sequence[Initializer]
AUTO = "auto"


@dataclass(frozen=True)
class TokenSettings:
    """The token of a concept: its placeholder, its start, its method and its norm."""

    placeholder_token: str | None = setting(
        None, 'the new word for the concept in prompts, such as "<dog>"; by default "<concept>"'
    )
    initializer_token: Initializers | Mapping[str, Initializers] | None = setting(
        None,
        'where training starts: a word or two for what the photos show, by default "object" or "style"; "auto" for the '
        "noun of the model's vocabulary that predicts the photos best (the word auto itself cannot be given); a concept to "
        "start from instead; a list of words and concepts, of which the best is taken; or a mapping from placeholder to any of "
        "these, to train several concepts",
    )
    num_starts: int | None = setting(
        None,
        "the number of starts that are tried for 25 steps each: the initializer as it is inside a prompt, and then alone, if "
        'the encoder has two rows for it; with "auto", the best words. The start with the lowest loss on fixed draws is taken',
        at_least=1,
    )
    initializer_context: bool | None = setting(
        None, 'start from the word\'s row in a prompt, such as Gemma\'s "▁dog", instead of the row of "dog"; by default on'
    )
    prefix_space: PrefixSpace | None = setting(
        None, 'the space before the placeholder: "absorbed", as by the encoder\'s own words, or "kept", as by stock loaders; '
        'by default "absorbed"', choices=get_args(PrefixSpace),
    )  # fmt: skip
    num_vectors: int | None = setting(None, "the number of vectors; by default one per token of the initializer", at_least=1)
    preset: Preset | None = setting(
        None,
        '"paper" for the authors\' choices: their steps at a constant rate, pooling "legacy", `initializer_context` off, '
        '`prefix_space` "kept"',
        choices=get_args(Preset),
    )
    # Not a `Literal`: the methods are an open registry, to which other packages may add.
    method: str = setting(
        "dti",
        "the training method: " + "; ".join(f'"{name}", {method.summary}' for name, method in METHODS.items()),
        choices=lambda: tuple(METHODS),
    )
    token_scale: str | float = setting(
        "mean",
        'the fixed norm of the embeddings: "mean", "min" or "max" of the encoder\'s vocabulary, "initializer" for the norm of '
        "the initializer, or a number",
    )
    train_magnitude: bool = setting(False, "train the norm as well, by AdamW on its logarithm (an ablation)")
