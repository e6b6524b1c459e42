"""Prompts for the evaluation, for objects, living subjects and styles: built in, or read from a file."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from ..data.text_files import read_text

Kind = Literal["object", "live", "style"]

OBJECT_PROMPTS = (
    # places
    "a {} among ferns on a mossy forest floor",
    "a {} half buried in fresh snow",
    "a {} on a pebble shore at low tide",
    "a {} on a narrow street in Lisbon",
    "a {} at the rim of a volcano",
    "a {} in a field of lavender",
    "a {} on the deck of a sailing boat",
    "a {} at the bottom of a swimming pool",
    "a {} on a rock in a mountain stream",
    "a {} in the crater of a grey moon, the earth above the horizon",
    # surfaces
    "a {} on a checkered picnic blanket",
    "a {} on a black marble counter",
    "a {} on a heap of orange leaves",
    "a {} on a stack of old books",
    "a {} on crumpled yellow paper",
    "a {} on a green velvet cushion",
    "a {} on a grand piano",
    "a {} on a workbench between hammers and saws",
    # backgrounds
    "a {} with a windmill behind it",
    "a {} with the Golden Gate Bridge in the distance",
    "a {} with a stormy sea behind it",
    "a {} with a wall of ivy behind it",
    "a {} with fireworks in the night sky behind it",
    "a {} with a row of colorful beach huts in the background",
    # colors, materials, situations
    "a blue {}",
    "a green {} on a white table",
    "a {} carved from dark wood",
    "a {} made of clear glass",
    "a {} knitted from thick wool",
    "a rusty {} on a scrapyard",
    "a {} covered in frost",
    "a {} wrapped in brown paper and string",
    "a {} with soap bubbles drifting around it",
    "a {} lit by a single candle in a dark room",
    "a pencil drawing of a {}",
    # several clauses, the placeholder late
    "a child's desk with crayons, a globe and a {}",
    "in the window of a toy shop at Christmas stands a {}",
    "a robot arm that holds up a {}",
    "behind the glass of a museum case, lit from above, a {}",
    "an astronaut kneels in red dust on Mars and picks up a {}",
    "a rainy evening in Tokyo, neon signs mirrored in a puddle, and beside the puddle a {}",
)

LIVE_PROMPTS = (
    # places
    "a {} in tall grass by a river",
    "a {} in deep snow between fir trees",
    "a {} on a sand dune in the desert",
    "a {} on the steps of an old temple",
    "a {} in a market street in Marrakesh",
    "a {} in a rowing boat on a calm lake",
    "a {} in an orchard full of blossom",
    "a {} in an empty subway car",
    # surfaces and backgrounds
    "a {} on a leather armchair",
    "a {} on a red carpet",
    "a {} on a bale of hay",
    "a {} with a waterfall behind it",
    "a {} with the Colosseum in the background",
    "a {} with hot air balloons in the sky behind it",
    "a {} with a brick wall full of graffiti behind it",
    # outfits
    "a {} in a knight's armor",
    "a {} in a raincoat and rubber boots",
    "a {} in a white lab coat",
    "a {} in a pirate costume",
    "a {} in a blue kimono",
    "a {} in a soccer jersey",
    "a {} dressed as a mail carrier",
    # accessories
    "a {} wearing a straw hat",
    "a {} wearing large headphones",
    "a {} wearing a green bow tie",
    "a {} wearing a crown of daisies",
    "a {} wearing swimming goggles",
    "a {} with a small backpack",
    # activities
    "a {} playing a drum kit",
    "a {} reading a newspaper at a breakfast table",
    "a {} riding a skateboard down a hill",
    "a {} painting at an easel",
    "a {} asleep in front of a fireplace",
    "a {} blowing out the candles on a birthday cake",
    "an orange {} made of clay",
    "a watercolor of a {}",
    # several clauses, the placeholder late
    "through the round window of a submarine looks a {}",
    "a crowded ice rink, and in the middle of it, on skates, a {}",
    "on the throne of a dark castle, under banners, sits a {}",
    "a farmer in a straw hat drives a tractor, and next to him sits a {}",
    "a long table set for a feast, with candles and fruit, and at its head, in a purple cape, a {}",
)

STYLE_PROMPTS = (
    # places
    "a lighthouse on a cliff in {} style",
    "a windmill in a field in {} style",
    "a castle on a hill in {} style",
    "a wooden bridge over a stream in {} style",
    "a village under snow in {} style",
    "a harbor with fishing boats in {} style",
    "a market square with stalls in {} style",
    "a street in the rain in {} style",
    "a greenhouse full of ferns in {} style",
    # vehicles and things outdoors
    "a train in a station in {} style",
    "a bicycle against a wall in {} style",
    "a sailing ship in a storm in {} style",
    "a hot air balloon over hills in {} style",
    "an old car on a country road in {} style",
    "a tram in a city in {} style",
    "a rocket on a launch pad in {} style",
    # animals
    "an owl on a branch in {} style",
    "a fox in the grass in {} style",
    "a horse by a fence in {} style",
    "a school of fish in {} style",
    "a rooster on a gate in {} style",
    "a butterfly on a thistle in {} style",
    "a turtle on a beach in {} style",
    "a rabbit in a meadow in {} style",
    # people
    "a woman with an umbrella in {} style",
    "a man who plays the cello in {} style",
    "a child with a kite in {} style",
    "two dancers on a stage in {} style",
    "a baker with a tray of bread in {} style",
    "a diver under water in {} style",
    # things indoors
    "a bowl of cherries in {} style",
    "a teapot and two cups in {} style",
    "a loaf of bread on a board in {} style",
    "a slice of lemon tart in {} style",
    "a pair of boots in {} style",
    "a typewriter on a desk in {} style",
    "a guitar on a chair in {} style",
    "a cactus in a pot in {} style",
    "a globe on a shelf in {} style",
    # landscapes
    "a mountain lake at dawn in {} style",
    "a waterfall in a forest in {} style",
)

# Words that mean a living subject wherever they end a class noun. Words that also end the names of things are left out:
# a teddy bear, a rubber duck, a stuffed animal, a computer mouse.
LIVE_CLASSES = frozenset(
    """cat kitten dog puppy corgi poodle terrier retriever husky dachshund bulldog labrador beagle horse pony foal donkey cow
    calf bull sheep lamb goat pig piglet rabbit bunny hamster squirrel hedgehog fox wolf lion tiger leopard cheetah elephant
    giraffe zebra monkey gorilla panda koala kangaroo sloth otter raccoon deer bird parrot owl eagle chicken rooster hen
    penguin pigeon goose swan fish goldfish turtle tortoise frog lizard snake dolphin whale
    person people man woman boy girl child baby kid toddler lady guy gentleman""".split()
)

_DREAMBOOTH_PROMPT = re.compile(r"""^(['"])(?P<prompt>.*)\1\.format\(.*\),?$""")
_DREAMBOOTH_HEADINGS: dict[str, list[Kind]] = {"object prompts": ["object"], "live subject prompts": ["live"]}


def is_live(class_noun: str) -> bool:
    """Return whether a class noun, of one word or several, means a living subject. Its last word decides."""
    return class_noun.lower().strip().rpartition(" ")[2] in LIVE_CLASSES


def read_prompts(path: str | Path) -> dict[Kind, list[str]]:
    """Read prompts with one "{}" each, by the kind of subject that they are for.

    Args:
        path: DreamBooth's own `prompts_and_classes.txt`, which has none for the kind "style", or a text file with a prompt on
            each line, for all kinds. Blank lines and lines that start with # are skipped.

    Raises:
        ValueError: if a prompt does not have exactly one "{}", there are no prompts, or the file has an unknown encoding.
        OSError: if there is no such file.
    """
    lines = [line.strip() for line in read_text(Path(path)).splitlines()]
    dreambooth = any(_DREAMBOOTH_PROMPT.match(line) for line in lines)
    found: dict[Kind, list[str]] = {"object": [], "live": []}
    for number, kinds, prompt in _dreambooth_prompts(lines) if dreambooth else _plain_prompts(lines):
        if re.findall("[{}]", prompt) != ["{", "}"] or "{}" not in prompt:
            raise ValueError(
                f'{path}, line {number}: {lines[number - 1]!r} must have exactly one "{{}}", where the subject goes.'
            )
        for kind in kinds:
            found.setdefault(kind, []).append(prompt)
    missing = [kind for kind, prompts in found.items() if not prompts]
    if missing:
        raise ValueError(
            f'{path} has no prompts for {" and ".join(missing)}: write one on each line, with "{{}}" for the subject.'
        )
    return found


def _plain_prompts(lines: Iterable[str]) -> Iterator[tuple[int, list[Kind], str]]:
    """Yield the number of each prompt's line, its kinds and the prompt."""
    for number, line in enumerate(lines, start=1):
        if line and not line.startswith("#"):
            yield number, ["object", "live", "style"], line


def _dreambooth_prompts(lines: Iterable[str]) -> Iterator[tuple[int, list[Kind], str]]:
    """Yield the same for DreamBooth's file. Other lines are headings, the table of classes, or Python's brackets."""
    kinds: list[Kind] = ["object"]
    for number, line in enumerate(lines, start=1):
        match = _DREAMBOOTH_PROMPT.match(line)
        if match:
            yield number, kinds, match["prompt"].replace("{0} {1}", "{}")
        else:
            kinds = _DREAMBOOTH_HEADINGS.get(line.lower(), kinds)
