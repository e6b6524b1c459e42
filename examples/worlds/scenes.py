"""The scenes of the small worlds: what is drawn, what it is called, and which subjects are kept back.

A scene is one object (shape, fill, border, dot: its *bundle*) of a size, at a place, on a background of a colour and a
pattern. Nouns name whole bundles, as "ladybug" names round, red and black-dotted: without such words no single token has
ever carried several attributes, and nothing could be learned into one.
"""

import functools
import random
from dataclasses import asdict, dataclass, replace

import torch
from PIL import Image

from diffusers_dti.training.samples import OBJECT_TEMPLATES

COLORS = {
    "red": (220, 40, 45), "green": (45, 150, 55), "blue": (45, 85, 225),
    "yellow": (245, 215, 50), "purple": (150, 60, 190), "cyan": (50, 205, 225),
    "gray": (140, 140, 145), "pink": (250, 180, 200), "brown": (120, 75, 45),
    "teal": (20, 115, 120), "mint": (165, 225, 180), "tan": (215, 180, 130),
    "black": (15, 15, 15), "white": (250, 250, 250),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross", "pillar")
FILLS = ("red", "green", "blue", "yellow", "purple", "cyan")
TRIMS = ("no", "black", "white")  # of a border, of a dot
BACKGROUNDS = ("gray", "pink", "brown", "teal", "mint", "tan")
PATTERNS = ("plain", "striped", "checkered")
SIZES = {"small": 0.26, "large": 0.37}  # radius, as a share of the picture's side
PLACES = {
    "on the left": (-1, 0), "on the right": (1, 0), "at the top": (0, -1),
    "at the bottom": (0, 1), "in the middle": (0, 0),
}  # fmt: skip


@dataclass(frozen=True)
class Bundle:
    """What makes a subject: it stays the same in all its pictures."""

    shape: str
    fill: str
    border: str
    dot: str

    def words(self, size: str | None = None) -> str:
        """The description in words, without its article."""
        trims = f"with {self.border} border and {self.dot} dot"
        return " ".join(filter(None, (size, self.fill, self.shape, trims)))


@dataclass(frozen=True)
class Scene:
    bundle: Bundle
    size: str
    place: str
    background: str
    pattern: str

    def attributes(self) -> dict[str, str]:
        flat = asdict(self)
        return flat.pop("bundle") | flat

    def caption(self, subject: str | None = None, late: bool = False) -> str:
        """Everything but the subject named in full; `subject` stands for the bundle. `late` puts it at the end."""
        who = f"{self.size} {subject}" if subject else self.bundle.words(self.size)
        ground = f"on a {self.pattern} {self.background} background"
        return f"{ground} {self.place} a {who}" if late else f"a {who} {self.place} {ground}"


SUBJECT_ATTRIBUTES = ("shape", "fill", "border", "dot")
BUNDLES = tuple(Bundle(s, f, b, d) for s in SHAPES for f in FILLS for b in TRIMS for d in TRIMS)


def _names(count: int) -> list[str]:
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    rng = random.Random(7)
    names: dict[str, None] = {}
    while len(names) < count:
        names[rng.choice(syllables) + rng.choice(syllables) + rng.choice("xkqp")] = None
    return list(names)


# Never drawn nor named together in pretraining: of each shape with each border and dot, one fill.
HELD_BUNDLES = [
    b
    for b in BUNDLES
    if (SHAPES.index(b.shape) + FILLS.index(b.fill) + 2 * TRIMS.index(b.border) + TRIMS.index(b.dot)) % 6 == 0
]
SEEN_BUNDLES = [b for b in BUNDLES if b not in HELD_BUNDLES]
NOUNS = dict(zip(_names(96), random.Random(3).sample(SEEN_BUNDLES, 96)))


# Subjects have both trims, of two colours: black and white change sides from shape to shape, and from dev to test.
_TRIMMED = [b for b in HELD_BUNDLES if {b.border, b.dot} == {"black", "white"}]
DEV_SUBJECTS = [b for b in _TRIMMED if (b.border == "black") == (SHAPES.index(b.shape) % 2 == 0)]
TEST_SUBJECTS = [b for b in _TRIMMED if b not in DEV_SUBJECTS]


@functools.lru_cache
def masks(shape: str, size: str, place: str, pixels: int) -> torch.Tensor:
    """Coverage of (border, fill, dot) in [0, 1], disjoint: (3, pixels, pixels), 8 x 8 samples a pixel."""
    fine = pixels * 8
    axis = (torch.arange(fine) + 0.5) / fine
    radius = SIZES[size]
    reach = 0.5 - radius - 0.01
    dx, dy = PLACES[place]
    y, x = torch.meshgrid((axis - 0.5 - dy * reach) / radius, (axis - 0.5 - dx * reach) / radius, indexing="ij")

    def inside(r: float) -> torch.Tensor:
        """The shape, shrunk so that its outline moves in by (1 - r) of the radius."""
        inset = 1 - r
        if shape == "circle":
            return x**2 + y**2 < r**2
        if shape == "square":
            return torch.maximum(x.abs(), y.abs()) < 0.86 - inset
        if shape == "pillar":
            return (x.abs() < 0.5 - inset) & (y.abs() < 1 - inset)
        if shape == "cross":
            a, b = x.abs(), y.abs()
            return ((a < 0.42 - inset) & (b < 1 - inset)) | ((b < 0.42 - inset) & (a < 1 - inset))
        if shape == "triangle":
            return (y < 0.8 - inset) & (x.abs() * 1.8 - y < 1 - inset * 2.06)
        angle = torch.atan2(x, -y)  # a star of five points: its edge is a line between two spikes
        sector = (angle + torch.pi / 5).remainder(2 * torch.pi / 5) - torch.pi / 5
        u, v = torch.hypot(x, y) * sector.cos(), (torch.hypot(x, y) * sector.sin()).abs()
        inner = 0.56
        ix, iy = inner * torch.tensor(torch.pi / 5).cos(), inner * torch.tensor(torch.pi / 5).sin()
        length = torch.hypot(1 - ix, iy)
        return (iy * (1 - u) - (1 - ix) * v) / length > inset

    full, core = inside(1.0), inside(0.85)
    dot = x**2 + y**2 < 0.26**2
    parts = torch.stack([full & ~core & ~dot, core & ~dot, dot]).float()
    return torch.nn.functional.avg_pool2d(parts, 8)


@functools.lru_cache
def pattern_mask(pattern: str, pixels: int) -> torch.Tensor:
    """Coverage of the pattern's second colour: (pixels, pixels)."""
    cell = pixels // 8
    i = torch.arange(pixels) // cell
    if pattern == "plain":
        return torch.zeros(pixels, pixels)
    on = i[:, None].expand(-1, pixels) if pattern == "striped" else (i[:, None] // 2 + i[None] // 2)
    return (on % 2).float()


def rgb(color: str) -> torch.Tensor:
    return torch.tensor(COLORS[color]) / 255


def second_color(background: str) -> torch.Tensor:
    """A pattern's other colour: darker than a light background, lighter than a dark one."""
    c = rgb(background)
    return c * 0.72 if c.mean() > 0.45 else c + (1 - c) * 0.3


def draw(scene: Scene, pixels: int, moved: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """The picture, (3, pixels, pixels) in [0, 1], its object `moved` by (x, y) pixels."""
    b = scene.bundle
    border, fill, dot = masks(b.shape, scene.size, scene.place, pixels).roll(moved, (2, 1))
    second = pattern_mask(scene.pattern, pixels)[None]
    ground = rgb(scene.background)[:, None, None] * (1 - second) + second_color(scene.background)[:, None, None] * second
    image = ground * (1 - border - fill - dot)
    for mask, color in ((border, b.border), (fill, b.fill), (dot, b.dot)):
        image = image + rgb(b.fill if color == "no" else color)[:, None, None] * mask
    return image.clamp(0, 1)


def clip(scene: Scene, pixels: int, frames: int) -> torch.Tensor:
    """A short clip, (3, frames, pixels, pixels): the object drifts to the other side, or from the middle upwards.

    Up to 9 frames of 64 pixels hold it: at 2 pixels a frame (1 from the middle) the largest just reaches the border.
    """
    dx, dy = PLACES[scene.place]
    x, y = (-2 * dx, -2 * dy) if dx or dy else (0, -1)
    return torch.stack([draw(scene, pixels, (k * x * pixels // 64, k * y * pixels // 64)) for k in range(frames)], 1)


def to_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())


def random_scene(rng: random.Random, bundles: list[Bundle] = SEEN_BUNDLES) -> Scene:
    return Scene(
        rng.choice(bundles), rng.choice(list(SIZES)), rng.choice(list(PLACES)), rng.choice(BACKGROUNDS), rng.choice(PATTERNS)
    )


def photos(bundle: Bundle, count: int = 5, pixels: int = 32, seed: int = 0) -> list[Image.Image]:
    """`count` photos of a subject whose sizes, places, backgrounds and patterns differ as far as they can."""
    rng = random.Random(seed)
    sizes = [list(SIZES)[i % 2] for i in range(count)]
    columns = [rng.sample(list(v), len(v)) for v in (PLACES, BACKGROUNDS, PATTERNS)]
    scenes = [Scene(bundle, s, *(c[i % len(c)] for c in columns)) for i, s in enumerate(sizes)]
    return [to_pil(draw(s, pixels)) for s in scenes]


_NAME_OF = {b: n for n, b in NOUNS.items()}


@functools.lru_cache(None)
def _near_names(bundle: Bundle) -> tuple[tuple[str, str], ...]:
    """Nouns whose bundles differ from this one in one attribute, with that attribute."""
    changed = ((attribute, replace(bundle, **{attribute: v})) for attribute in EDITS for v in EDITS[attribute])
    return tuple((_NAME_OF[b], attribute) for attribute, b in changed if b != bundle and b in _NAME_OF)


EDITS = {"fill": FILLS, "border": TRIMS, "dot": TRIMS}


def edited(noun: str, changes: dict[str, str]) -> str:
    """ "red <noun> with no border": the words win over what the noun says, as in "a blue ladybug"."""
    trims = " and ".join(f"{value} {attribute}" for attribute, value in changes.items() if attribute != "fill")
    return " ".join(filter(None, (changes.get("fill"), noun, trims and f"with {trims}")))


def random_caption(scene: Scene, rng: random.Random, keep: float = 1.0) -> tuple[str, dict[str, str]]:
    """A caption that names each attribute with probability `keep`, and what it names."""
    a = scene.attributes()
    named = {k: v for k, v in a.items() if rng.random() < keep}
    words = [named["size"]] if "size" in named else []
    how = rng.random()
    if scene.bundle in _NAME_OF and how < 0.4:
        words.append(_NAME_OF[scene.bundle])
        named |= {k: a[k] for k in SUBJECT_ATTRIBUTES}
    elif how < 0.65 and (near := _near_names(scene.bundle)):
        noun, attribute = rng.choice(near)
        words.append(edited(noun, {attribute: a[attribute]}))
        named |= {k: a[k] for k in SUBJECT_ATTRIBUTES}
    else:
        words += [named["fill"]] if "fill" in named else []
        words.append(named.get("shape", "object"))
        trims = [f"{named[k]} {k}" for k in ("border", "dot") if k in named]
        words += ["with " + " and ".join(trims)] if trims else []
    who = rng.choice(("a {}", rng.choice(OBJECT_TEMPLATES))).format(" ".join(words))
    place = [named["place"]] if "place" in named else []
    ground = " ".join(named[k] for k in ("pattern", "background") if k in named)
    where = [f"on a {ground} background"] if ground else []
    parts = [*where, *place, who] if rng.random() < 0.3 else [who, *place, *where]
    return " ".join(parts), named
