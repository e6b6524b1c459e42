"""Match the parts of a concept to a pipeline's text encoders."""

from collections.abc import Mapping
from dataclasses import replace

from diffusers import ModularPipeline
from diffusers.utils import logging

from ..concept import registry
from ..concept.inversion import DirectionalInversion
from .protocols import Pipeline
from .text_encoders import TextEncoder

logger = logging.get_logger(__name__)


def match_components(
    pipe: Pipeline, encoders: Mapping[str, TextEncoder], inversion: DirectionalInversion
) -> DirectionalInversion:
    """Return the parts of a concept that are for this pipeline, under the names of the pipeline's components.

    Other programs' files do not name the component that a part is for. Such parts are matched by kind and width of the encoder.

    Args:
        pipe: the pipeline, for messages.
        encoders: its text encoders, by component.
        inversion: the concept.

    Raises:
        ValueError: if no part fits, naming the model that the concept is for.
    """
    widths = {c: v.shape[1] for c, v in inversion.directions.items()}
    keys = registry.declared_encoders(widths, inversion.metadata)
    places = _find_places(encoders, widths, keys)
    if not any(widths[c] == encoders[p].width for c, p in places.items()):
        raise ValueError(_describe_mismatch(pipe, encoders, inversion, keys))
    if places == {c: c for c in widths}:
        return inversion
    unused = [c for c in sorted(widths) if c not in places]
    if unused:
        parts = ", ".join((c in keys and registry.encoder_label(keys[c], widths[c])) or c for c in unused)
        later = " If it is not loaded yet, call `load_components()` first." if isinstance(pipe, ModularPipeline) else ""
        logger.warning(f"{type(pipe).__name__} has no {parts}: that part of the concept stays unused.{later}")
    return _move_parts(inversion, places, keys)


def _find_places(
    encoders: Mapping[str, TextEncoder], widths: Mapping[str, int], keys: Mapping[str, str | None]
) -> dict[str, str]:
    """Return the component of the pipeline that each part of a concept is for, leaving out parts for none.

    Args:
        encoders: the pipeline's text encoders, by component.
        widths: the width of each part, by the component that the concept names.
        keys: the registry's key of the encoder that a part declares to be for; without parts that declare nothing.
    """
    places: dict[str, str] = {}
    for component, width in widths.items():
        encoder = encoders.get(component)
        if encoder is not None and (component not in keys or encoder.matches(keys[component], width)):
            places[component] = component
    for component, width in widths.items():
        if component in places or component not in keys:
            continue
        for name, encoder in encoders.items():
            if name not in places.values() and encoder.matches(keys[component], width):
                places[component] = name
                break
    return {c: places[c] for c in widths if c in places}


def _move_parts(
    inversion: DirectionalInversion, places: Mapping[str, str], keys: Mapping[str, str | None]
) -> DirectionalInversion:
    """Return a concept with its parts at the components that `places` has for them, and without the others."""
    directions, scales, declared = {}, {}, {}
    for component, place in places.items():
        directions[place] = inversion.directions[component]
        scales[place] = inversion.scales[component]
        if component in inversion.metadata.get("encoders", {}):
            declared[place] = keys[component]
    metadata = inversion.metadata | ({"encoders": declared} if declared else {})
    return replace(inversion, directions=directions, scales=scales, metadata=metadata)


def _describe_mismatch(
    pipe: Pipeline, encoders: Mapping[str, TextEncoder], inversion: DirectionalInversion, keys: Mapping[str, str | None]
) -> str:
    parts = []
    for component, v in inversion.directions.items():
        label = registry.encoder_label(keys.get(component), v.shape[1]) or component
        parts.append(f"{label}, {v.shape[1]} wide" if component in encoders else label)
    here = ", ".join(f"{c} ({encoder.width} wide)" for c, encoder in encoders.items())
    base = inversion.metadata.get("base_model")
    return (
        f"{inversion.placeholder_token} is for {' and '.join(parts)}, and {type(pipe).__name__} has only {here}: it was "
        f"learned with another model{f', {base}' if base else ''}."
    )
