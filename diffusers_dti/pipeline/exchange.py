"""Exchange the concepts of a pipeline: some out, others in, in all of its text encoders or in none."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from diffusers.utils import logging
from torch import Tensor, tensor

from ..concept.inversion import DirectionalInversion
from . import vocabulary
from .listing import directional_inversions, waiting
from .locks import changing, check_not_in_training
from .matching import match_components
from .offload import all_offload_disabled
from .pooling import pooling_of, warn_if_mixed
from .prompt_check import check_placeholder, warn_if_ordinary
from .protocols import Pipeline
from .state import LoadedConcept, Pooling
from .text_encoders import ScaleRule, TextEncoder, find_text_encoders, present_text_encoders, rescale
from .transaction import write_rows
from .vocabulary_check import check

logger = logging.get_logger(__name__)


def inject(
    pipe: Pipeline,
    concepts: Sequence[tuple[DirectionalInversion, Pooling]],
    token_scale: ScaleRule | float | None = None,
    reuse_existing: bool = True,
    replace: bool = False,
) -> list[DirectionalInversion]:
    """Add concepts to the pipeline's tokenizers and tables: all of them whole, or nothing.

    Args:
        pipe: the pipeline.
        concepts: the concepts, each with "eos" or "legacy", where CLIP's text vector is pooled.
        token_scale: "mean", "min" or "max" of the encoder's vocabulary, or a number; None keeps the concepts' own scales.
        reuse_existing: reuse a concept's tokens and rows if a reopened pipeline already has them.
        replace: first remove the concepts that are loaded under the same placeholders.

    Returns:
        The parts of the concepts that were loaded, with their scale.

    Raises:
        ValueError: if a concept does not fit, or a placeholder is taken; the pipeline is then unchanged.
        RuntimeError: if a concept would be replaced while an encoder is being trained.
    """
    encoders = find_text_encoders(pipe)
    if len({id(encoder.tokenizer) for encoder in encoders.values()}) < len(encoders):
        raise ValueError(
            f"Encoders of this {type(pipe).__name__} share one tokenizer: give each its own, with `copy.deepcopy`."
        )
    loaded: list[DirectionalInversion] = []
    parts: dict[str, list[tuple[DirectionalInversion, Pooling]]] = {component: [] for component in encoders}
    models = [encoder.model for encoder in encoders.values()]
    with changing(models), all_offload_disabled(models), ExitStack() as undo:
        if replace:  # before the checks, which then see what they would after unloading; the stack puts it back
            _make_way(undo, encoders.values(), {given.placeholder_token for given, _ in concepts})
        for given, pooling in concepts:
            inversion = _fitted(pipe, encoders, given, token_scale)
            loaded.append(inversion)
            for component in inversion.directions:
                parts[component].append((inversion, pooling))
        for component, own in parts.items():
            check(encoders[component], [inversion for inversion, _ in own], reuse_existing)
        vocabulary.add(undo, ((encoders[component], own) for component, own in parts.items()))
        undo.pop_all()
    for component, own in parts.items():
        if own and warn_if_mixed(encoders[component]):
            break  # once is enough: the other encoders have the same concepts
    return loaded


def _make_way(undo: ExitStack, encoders: Collection[TextEncoder], placeholders: Collection[str]) -> None:
    """Remove the concepts that are loaded under these placeholders, if there are any.

    Raises:
        RuntimeError: while an encoder is being trained.
    """
    replaced = [(encoder, [p for p in encoder.concepts if p in placeholders]) for encoder in encoders]
    if any(own for _, own in replaced):
        check_not_in_training(encoder.model for encoder in encoders)
        vocabulary.remove(undo, replaced)


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


def load_saved(pipe: Pipeline, placeholders: Collection[str]) -> None:
    """Load those concepts that the pipeline was saved with: that finds their rows and what was there before them."""
    saved: dict[str, DirectionalInversion] = {}
    for encoder in present_text_encoders(pipe).values():
        saved |= waiting(encoder)
    listed = directional_inversions(pipe) if saved else {}
    if found := [listed[p] for p in placeholders if p in saved]:
        inject(pipe, [(inversion, pooling_of(inversion)) for inversion in found])


def withdraw(pipe: Pipeline, placeholders: Collection[str]) -> None:
    """Remove concepts in every encoder that has them, also while they are being trained."""
    encoders = present_text_encoders(pipe).values()
    models = [encoder.model for encoder in encoders]
    with changing(models), all_offload_disabled(models), ExitStack() as undo:
        there = [(encoder, encoder.concepts.keys()) for encoder in encoders]
        vocabulary.remove(undo, [(encoder, [p for p in placeholders if p in loaded]) for encoder, loaded in there])
        undo.pop_all()


# ------------------------------------------------------------------------------------------------------------ training
@contextmanager
def making_way(pipe: Pipeline, placeholders: Collection[str]) -> Iterator[None]:
    """Withdraw concepts, so that the block can load others in their place. If it fails, the concepts are again as before.

    Args:
        pipe: the pipeline.
        placeholders: placeholders, also of concepts that are not loaded.
    """
    load_saved(pipe, placeholders)
    before = _Snapshot(pipe)
    replaced = [p for p in placeholders if any(p in concepts for concepts in before.concepts)]
    if replaced:
        logger.warning(f"{', '.join(replaced)} is loaded already: it is trained anew, and replaced when the run has ended.")
    try:
        withdraw(pipe, placeholders)
        yield
    except BaseException:
        before.put_back()
        raise


class _Snapshot:
    """The concepts in a pipeline, with their rows as the tables hold them.

    Not the tables themselves, nor the `ExitStack` of the removal, which would hold them: Gemma's takes 1.2 GB.
    """

    def __init__(self, pipe: Pipeline):
        self.encoders = list(present_text_encoders(pipe).values())
        self.models = [encoder.model for encoder in self.encoders]
        self.concepts: list[dict[str, LoadedConcept]] = []
        self.rows: list[dict[str, Tensor]] = []
        with changing(self.models), all_offload_disabled(self.models):
            for encoder in self.encoders:
                concepts, table = encoder.concepts, encoder.weight.detach()
                self.concepts.append(concepts)
                self.rows.append({p: table[concept.ids] for p, concept in concepts.items()})

    def put_back(self) -> None:
        """Remove what was loaded since, and load what was removed, in the same order and so under the same ids."""
        with changing(self.models), all_offload_disabled(self.models), ExitStack() as undo:
            gone, missing = [], []
            for encoder, before in zip(self.encoders, self.concepts):
                now, kept = encoder.concepts, 0
                for concept, other in zip(before.values(), now.values()):
                    if concept.inversion is not other.inversion:
                        break
                    kept += 1
                gone.append((encoder, list(now)[kept:]))
                missing.append((encoder, list(before.values())[kept:]))
            vocabulary.remove(undo, gone)
            vocabulary.add(undo, [(encoder, [(c.inversion, c.pooling) for c in own]) for encoder, own in missing])
            for (encoder, own), rows in zip(missing, self.rows):  # the rows may have been rounded since they were loaded
                for concept in own:
                    placeholder = concept.inversion.placeholder_token
                    write_rows(undo, encoder.weight, tensor(encoder.token_ids(placeholder)), rows[placeholder])
            undo.pop_all()
