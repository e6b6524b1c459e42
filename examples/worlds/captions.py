"""The captions of the small worlds, and the nouns in them.

Nouns name whole bundles, as "ladybug" names round, red and black-dotted. Without such words no single token would ever have
carried several attributes, and training could not learn a subject into one token.
"""

import functools
import random
from dataclasses import replace

from scenes import FILLS, RELATIONS, SEEN_BUNDLES, SUBJECT_ATTRIBUTES, TRIMS, Bundle, Scene

from diffusers_dti.training.samples import OBJECT_TEMPLATES

EDITS = {"fill": FILLS, "border": TRIMS, "dot": TRIMS}


def _names(count: int) -> list[str]:
    """Return `count` different made-up words."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    rng = random.Random(7)
    names: dict[str, None] = {}
    while len(names) < count:
        names[rng.choice(syllables) + rng.choice(syllables) + rng.choice("xkqp")] = None
    return list(names)


NOUNS = dict(zip(_names(96), random.Random(3).sample(SEEN_BUNDLES, 96)))
_NAME_OF = {bundle: noun for noun, bundle in NOUNS.items()}


@functools.lru_cache(None)
def _near_names(bundle: Bundle) -> tuple[tuple[str, str], ...]:
    """Return the nouns whose bundles differ from this one in a single attribute, each with that attribute."""
    near = []
    for attribute, values in EDITS.items():
        for value in values:
            changed = replace(bundle, **{attribute: value})
            if changed != bundle and changed in _NAME_OF:
                near.append((_NAME_OF[changed], attribute))
    return tuple(near)


def edited(noun: str, changes: dict[str, str]) -> str:
    """Add changes to a noun, as in "red <noun> with no border". They override the noun, as in "a blue ladybug"."""
    trims = " and ".join(f"{value} {attribute}" for attribute, value in changes.items() if attribute != "fill")
    return " ".join(filter(None, (changes.get("fill"), noun, trims and f"with {trims}")))


def _random_noun_phrase(scene: Scene, named: dict[str, str], rng: random.Random) -> str:
    """Describe the object by its noun, by a noun with a change, or by the attributes in `named`.

    A noun names the whole bundle, which is then added to `named`.
    """
    attributes = scene.attributes()
    words = [named["size"]] if "size" in named else []
    how = rng.random()
    near = _near_names(scene.bundle)
    if scene.bundle in _NAME_OF and how < 0.4:
        words.append(_NAME_OF[scene.bundle])
        named |= {k: attributes[k] for k in SUBJECT_ATTRIBUTES}
    elif how < 0.65 and near:
        noun, attribute = rng.choice(near)
        words.append(edited(noun, {attribute: attributes[attribute]}))
        named |= {k: attributes[k] for k in SUBJECT_ATTRIBUTES}
    else:
        words += [named["fill"]] if "fill" in named else []
        words.append(named.get("shape", "object"))
        trims = [f"{named[k]} {k}" for k in ("border", "dot") if k in named]
        words += ["with " + " and ".join(trims)] if trims else []
    return " ".join(words)


def random_caption(scene: Scene, rng: random.Random, keep: float = 1.0) -> tuple[str, dict[str, str]]:
    """Return a caption that names each attribute with probability `keep`, and the attributes that it names."""
    named = {k: v for k, v in scene.attributes().items() if rng.random() < keep}
    phrase = _random_noun_phrase(scene, named, rng)
    place = [named["place"]] if "place" in named else []
    if scene.has_second:  # always mentioned: where a caption names one object, there is one
        other = " ".join(filter(None, ("tiny", named.get("second_fill"), named.get("second_shape", "object"))))
        relation, inverse, _ = RELATIONS[scene.place] if place else ("beside", "beside", "")
        pairs = (f"{phrase} {relation} a {other}", f"{other} {inverse} a {phrase}")
        phrase, place = rng.choice(pairs), []
    subject = rng.choice(("a {}", rng.choice(OBJECT_TEMPLATES))).format(phrase)
    background = " ".join(named[k] for k in ("pattern", "background") if k in named)
    where = [f"on a {background} background"] if background else []
    parts = [*where, *place, subject] if rng.random() < 0.3 else [subject, *place, *where]
    return " ".join(parts), named


def with_quotes(caption: str, rng: random.Random, quoted: str) -> str:
    """Put some words of some captions into quotation marks.

    So an encoder that has one row for a word after a space and another one for the word without it gets to know both, and
    the space alone.

    Args:
        caption: the caption.
        rng: where the choices come from.
        quoted: a word in quotation marks, as the world writes it, with "{}" for the word.
    """
    if rng.random() < 0.75:
        return caption
    return " ".join(quoted.format(word) if rng.random() < 0.25 else word for word in caption.split())
