"""Measure what a long row does inside the encoders: `python effects.py` (paper, section 3).

A row of m times the vocabulary's mean norm drowns the position that is added to it, and the layers, whose outputs do not grow
with it, turn it less. Only CLIP adds positions: for the others the first effect cannot exist.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from statistics import mean

import torch
from captions import NOUNS
from gates import STUDIED, open_world
from torch import Tensor, nn

from diffusers_dti import DirectionalInversion
from diffusers_dti.pipeline.text_encoders import TextEncoder, find_text_encoders
from diffusers_dti.pipeline.word_rows import word_rows
from diffusers_dti.sphere import angle

MULTIPLES = (1, 2, 5, 10, 50)
EFFECTS = ("angle between two positions", "turned by the layers")
TOKEN = "<thing>"
PROMPTS = (
    "a {}",
    "a photo of a {}",
    "on the left a small {}",
    "on a striped pink background a large {}",
    "on a checkered teal background at the bottom a small {}",
)  # the placeholder comes last, at five positions


def first_norm(encoder: nn.Module) -> nn.Module:
    """Return the normalization that an encoder's first layer begins with."""
    names = ("layer_norm1", "input_layernorm", "layer_norm")  # CLIP, Gemma, T5
    return next(module for name, module in encoder.named_modules() if name.rpartition(".")[2] in names)


@torch.no_grad()
def states(encoder: TextEncoder, prompt: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the placeholder's state, (d,), at the encoder's input, at its last layer's input, and after its first norm."""
    tokens = encoder.tokenizer(prompt, return_tensors="pt")
    place = tokens.input_ids[0].tolist().index(encoder.token_ids(TOKEN)[0])
    hidden = encoder.model(**tokens, output_hidden_states=True).hidden_states
    return hidden[0][0, place], hidden[-2][0, place], first_norm(encoder.model)(hidden[0])[0, place]


def measure(world: str, nouns: Sequence[str]) -> dict[str, dict[int, tuple[float, float]]]:
    """Measure both effects in a world.

    Args:
        world: the world.
        nouns: words whose directions are used.

    Returns:
        For each encoder and multiple of the mean norm, in degrees: the mean angle between the states of one row at two
        positions, as the first layer reads them, and the mean angle by which the layers turn a row.
    """
    pipe = open_world(world)
    encoders = find_text_encoders(pipe)
    found: dict[str, dict[int, tuple[float, float]]] = {component: {} for component in encoders}
    for multiple in MULTIPLES:
        apart: dict[str, list[float]] = {component: [] for component in encoders}
        turned: dict[str, list[float]] = {component: [] for component in encoders}
        for noun in nouns:
            concept = DirectionalInversion.from_embeddings(TOKEN, word_rows(encoders, noun, 1))
            scales = {c: torch.tensor([multiple * encoder.norm("mean")]) for c, encoder in encoders.items()}
            pipe.load_directional_inversion(replace(concept, scales=scales))
            for component, encoder in find_text_encoders(pipe).items():
                read = []
                for prompt in PROMPTS:
                    start, end, normed = states(encoder, prompt.format(TOKEN))
                    turned[component].append(angle(start, end).rad2deg().item())
                    read.append(normed)
                apart[component] += [angle(a, b).rad2deg().item() for a, b in combinations(read, 2)]
            pipe.unload_directional_inversion(TOKEN)
        for component in encoders:
            found[component][multiple] = (mean(apart[component]), mean(turned[component]))
    return found


def main() -> None:
    torch.set_num_threads(1)
    print("| world | encoder | effect | " + " | ".join(f"{m} x mean norm" for m in MULTIPLES) + " |")
    print("|---" * (len(MULTIPLES) + 3) + "|")
    for world in STUDIED:
        for component, by_multiple in measure(world, list(NOUNS)[:24]).items():
            for i, effect in enumerate(EFFECTS):
                cells = " | ".join(f"{by_multiple[m][i]:.1f}°" for m in MULTIPLES)
                print(f"| {world} | {component} | {effect} | {cells} |")


if __name__ == "__main__":
    main()
