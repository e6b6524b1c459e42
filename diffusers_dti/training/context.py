"""CoRe (arXiv 2408.15914): the words around the placeholder keep the states that they have around the class noun.

Of the paper's two losses this is the one on the text encoder's output. The other one compares attention maps: it needs two more
passes of the denoiser, whose attention differs from family to family.
"""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..families.base import Family
from ..pipeline.text_encoders import find_text_encoders
from ..pipeline.word_rows import word_rows
from .config import ResolvedConfig
from .seeds import seeded_generator
from .trainable import TrainableConcept, TrainableRows

# Texts alone, in the paper's kinds: places, colors and materials, outfits and actions, art. None is a prompt of the evaluation.
OBJECT_PROMPTS: tuple[str, ...] = (
    "a {} on a beach at sunset",
    "a {} in a forest in winter",
    "a {} on a city street at night",
    "a {} in front of a castle",
    "a {} in a sunny garden",
    "a {} on a wooden kitchen table",
    "a {} under water, among fish",
    "a {} on top of a mountain, seen from afar",
    "a bright yellow {} on a sofa",
    "a black {} seen from above",
    "a {} made of stone in a park",
    "a {} wearing sunglasses and a scarf",
    "a {} dressed as a king",
    "a {} flying through the clouds",
    "a {} at a party with two friends",
    "a child with a {} in its arms",
    "an oil painting of a {}",
    "a cartoon of a {} with big eyes",
    "a {} on the cover of a magazine",
    "a cake in the shape of a {}, with candles",
)
STYLE_PROMPTS: tuple[str, ...] = (
    "in the style of {}, a harbor at night",
    "in the style of {}, a portrait of an old man",
    "in the style of {}, a horse in a meadow",
    "in the style of {}, a bowl of fruit on a table",
    "a {} style drawing of a city street",
    "a {} style picture of a mountain lake",
    "a bridge over a river in the style of {}, in autumn",
    "a vase of flowers in the style of {}, against a dark wall",
)


class ContextLoss:
    """The context embedding loss of one concept, which is loaded and not yet swapped in.

    It is the cosine distance between the states, as the denoiser gets them, that a prompt's context tokens have with the
    placeholder and with the class noun: mean over the context tokens, then over text encoders and prompts. Context tokens are
    all tokens but the placeholder's own, also those that begin and end the prompt: in a causal encoder only the tokens after
    the placeholder know of it, and the end is always one of them. Padding does not count, nor does CLIP's pooled state.

    Args:
        family: the family, bound to the pipeline.
        config: the settings.
        concept: the concept in training.
    """

    def __init__(self, family: Family, config: ResolvedConfig, concept: TrainableConcept):
        self.family, self.seed = family, config.seed
        self.encoders = find_text_encoders(family.pipe)
        built_in = STYLE_PROMPTS if config.learnable_property == "style" else OBJECT_PROMPTS
        word = concept.placeholder_token
        self.prompts = [prompt.replace("{}", word) for prompt in config.context_prompts or built_in]
        self.places = [self._context_places(prompt, word) for prompt in self.prompts]
        # The class noun is the initializer's rows at the placeholder's tokens, so that the other tokens keep their places for
        # any number of vectors. It is not the concept's start, which has another norm, or in CrossInit another direction.
        count = concept.initial.num_vectors
        rows = word_rows(self.encoders, config.initializers_for(word)[0], count, config.initializer_context)
        with torch.no_grad(), ExitStack() as stack:
            for component, encoder in self.encoders.items():
                noun = TrainableRows(encoder.token_ids(word), rows[component], torch.ones(count))
                stack.enter_context(noun.to(family.device).swapped_in(encoder))
            self.references = [self._context_states([number])[0] for number in range(len(self.prompts))]

    def __call__(self, first: int, size: int) -> Tensor:
        """Return the loss of the prompts of samples number `first` to `first + size - 1`, a scalar in float32."""
        numbers = []
        for k in range(first, first + size):
            drawn = torch.randint(len(self.prompts), (), generator=seeded_generator(self.seed, k, 5))
            numbers.append(int(drawn))
        distances = []
        for number, states in zip(numbers, self._context_states(numbers)):
            for now, reference in zip(states, self.references[number]):
                distances.append((1 - cosine_similarity(now, reference, dim=-1)).mean())
        return torch.stack(distances).mean()

    def _context_places(self, prompt: str, word: str) -> list[list[int]]:
        """Return the positions of a prompt's context tokens in each encoder."""
        places = []
        for encoder in self.encoders.values():
            length = min(self.family.text_length, encoder.tokenizer.model_max_length)
            ids = encoder.tokenizer(self.family.clean_prompt(prompt), truncation=True, max_length=length).input_ids
            own = encoder.token_ids(word)
            places.append([place for place, id in enumerate(ids) if id not in own])
        return places

    def _context_states(self, numbers: Sequence[int]) -> list[list[Tensor]]:
        """Return the states of the context tokens, (tokens, d) float32, for each prompt and in each encoder."""
        context = self.family.encode_prompts([self.prompts[n] for n in numbers], [0] * len(numbers))["context"]
        parts = context.float().split([encoder.width for encoder in self.encoders.values()], -1)
        states = []
        for row, number in enumerate(numbers):
            states.append([part[row, places] for part, places in zip(parts, self.places[number])])
        return states
