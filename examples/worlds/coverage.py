"""Which rows of a vocabulary a prompt can reach, and how often pretraining met each of them: gate 5.

A row that pretraining never met is random. A prompt, an initializer or a placeholder next to it would meet noise.
"""

import copy
import random
from collections import Counter

from pretraining import text_batch, world_words
from transformers import PreTrainedTokenizerBase

BATCHES = 500  # of 64 captions: at most half of what the text encoders are pretrained on


def chats(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    """Put prompts into the tokenizer's chat template, as Z-Image's pipeline does; without a template, return them."""
    if not tokenizer.chat_template:
        return prompts
    settings = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
    return [tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **settings) for prompt in prompts]


def coverage(tokenizer: PreTrainedTokenizerBase, quoted: str) -> dict[str, int]:
    """Count how often captions of pretraining meet each token that the world's words can reach.

    Reachable are the tokens of every word at the start of a text and after a space, the special tokens, and those next to a
    placeholder that stock diffusers has loaded, such as a lone "▁".

    Args:
        tokenizer: the tokenizer of a text encoder.
        quoted: a word in quotation marks, as the world's captions write some of them.

    Returns:
        The counts by token.
    """
    seen: Counter[int] = Counter()
    rng = random.Random(0)
    for _ in range(BATCHES):
        for ids in tokenizer(chats(tokenizer, text_batch(rng, quoted)[0])).input_ids:
            seen.update(ids)
    stock = copy.deepcopy(tokenizer)
    stock.add_tokens(["<thing>"])
    texts = ["", "a <thing> with no border", "on the left a <thing>"]
    for word in (*world_words(), "beside"):  # "beside" is in captions, but not among the words: it is cut into pieces
        texts += [word, f"a {word}"]
    reachable: set[int] = set()
    for ids in stock(chats(stock, texts)).input_ids:
        reachable.update(ids)
    reachable.discard(stock.convert_tokens_to_ids("<thing>"))
    return {stock.convert_ids_to_tokens(i): seen[i] for i in sorted(reachable)}
