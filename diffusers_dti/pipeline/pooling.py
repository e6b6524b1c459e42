"""Where CLIP's text vector is pooled while concepts are loaded.

CLIP configurations with the legacy `eos_token_id` 2 pool at the highest id. A concept's token has the highest id, so the text
after it would never reach the pooled vector. With the real id, ordinary prompts stay bit for bit as they are.
"""

from contextlib import ExitStack
from typing import Any, get_args

from diffusers.utils import logging

from ..concept.inversion import DirectionalInversion
from .state import Pooling, VocabularyState
from .text_encoders import TextEncoder
from .transaction import change

logger = logging.get_logger(__name__)

LEGACY_EOS = 2
# This key is in the config while concepts are loaded, so that a saved pipeline knows that its own id is the legacy one.
LEGACY_POOLING = "legacy_pooling_without_concepts"


def pooling_of(inversion: DirectionalInversion, given: Pooling | None = None) -> Pooling:
    """Return where CLIP's text vector is pooled with a concept: as it was trained, unless `given` says otherwise.

    Raises:
        ValueError: if it is neither "eos" nor "legacy".
    """
    pooling = given or inversion.metadata.get("pooling", "eos")
    if pooling not in get_args(Pooling):
        raise ValueError(f'pooling must be "eos" or "legacy", got {pooling!r:.80}.')
    return pooling


def legacy_holders(encoder: TextEncoder) -> list[Any]:
    """Return the config and modules of an encoder whose own `eos_token_id` is the legacy one."""
    if getattr(encoder.model.config, "model_type", "") != "clip_text_model":
        return []
    ids: set[int | None] = {LEGACY_EOS}
    if getattr(encoder.config, LEGACY_POOLING, False):  # saved with concepts in it
        ids.add(encoder.tokenizer.eos_token_id)
    return [x for x in (encoder.model.config, *encoder.model.modules()) if getattr(x, "eos_token_id", -1) in ids]


def current_pooling(holders: list[Any]) -> Pooling:
    """Return where an encoder with these `legacy_holders` pools now."""
    return "eos" if any(holder.eos_token_id != LEGACY_EOS for holder in holders) else "legacy"


def set_pooling(undo: ExitStack, encoder: TextEncoder, state: VocabularyState, pooling: Pooling) -> None:
    """Pool in another place, if the encoder's own configuration is a legacy one.

    Args:
        undo: see `transaction`.
        encoder: the text encoder.
        state: its record.
        pooling: where to pool.
    """
    for holder in state.legacy_eos:
        # `forward` reads the module's attribute, and saving writes the config's.
        change(undo, holder, "eos_token_id", LEGACY_EOS if pooling == "legacy" else encoder.tokenizer.eos_token_id)


def warn_if_mixed(encoder: TextEncoder) -> bool:
    """Warn if an encoder's concepts want to pool in different places, and return whether they do."""
    *earlier, (last, chosen) = encoder.concepts.items()
    others = [placeholder for placeholder, concept in earlier if concept.pooling != chosen.pooling]
    if not others or encoder.state is None or not encoder.state.legacy_eos:
        return False
    logger.warning(
        f'{last} has pooling="{chosen.pooling}", and {", ".join(others)} not: an encoder pools in one place, which the concept '
        f"loaded last decides, so pictures of {', '.join(others)} change while {last} is loaded. To avoid that, load all "
        "concepts with the same `pooling`."
    )
    return True
