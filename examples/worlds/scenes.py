"""The scenes of the small worlds: how they are rendered, and which subjects pretraining never sees.

A scene shows an object of a size, at a place, on a background of a color and a pattern. Shape, fill, border and dot of the
object are its *bundle*. A second, tiny object of one color may be opposite to it.
"""

import functools
import random
from dataclasses import asdict, dataclass

import torch
from PIL import Image

COLORS = {
    "red": (220, 40, 45), "green": (45, 150, 55), "blue": (45, 85, 225),
    "yellow": (245, 215, 50), "purple": (150, 60, 190), "cyan": (50, 205, 225),
    "gray": (140, 140, 145), "pink": (250, 180, 200), "brown": (120, 75, 45),
    "teal": (20, 115, 120), "mint": (165, 225, 180), "tan": (215, 180, 130),
    "black": (15, 15, 15), "white": (250, 250, 250),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross", "pillar")
FILLS = ("red", "green", "blue", "yellow", "purple", "cyan")
TRIMS = ("no", "black", "white")  # color of a border or a dot
BACKGROUNDS = ("gray", "pink", "brown", "teal", "mint", "tan")
PATTERNS = ("plain", "striped", "checkered")
SIZES = {"small": 0.26, "large": 0.37}  # radius, as a share of the image's side
SECOND_RADIUS = 0.19  # of the second object
SECOND_SHAPES = ("circle", "square", "triangle", "cross")  # a star or a pillar of this size is hard to tell from others
PLACES = {
    "on the left": (-1, 0), "on the right": (1, 0), "at the top": (0, -1),
    "at the bottom": (0, 1), "in the middle": (0, 0),
}  # fmt: skip
# Where an object can be when there are two: what that is called, what it is called from the other one, and the other's place.
RELATIONS = {
    "on the left": ("left of", "right of", "on the right"), "on the right": ("right of", "left of", "on the left"),
    "at the top": ("above", "below", "at the bottom"), "at the bottom": ("below", "above", "at the top"),
}  # fmt: skip


@dataclass(frozen=True)
class Bundle:
    """What makes a subject. It is the same in all images of the subject."""

    shape: str
    fill: str
    border: str
    dot: str

    def words(self, size: str | None = None) -> str:
        """Return the description in words, without an article."""
        trims = f"with {self.border} border and {self.dot} dot"
        return " ".join(filter(None, (size, self.fill, self.shape, trims)))


@dataclass(frozen=True)
class Scene:
    """A subject in a setting. If there is a second object, the subject is small and the second one is opposite to it."""

    bundle: Bundle
    size: str
    place: str
    background: str
    pattern: str
    second_shape: str = "no"
    second_fill: str = "no"

    @property
    def has_second(self) -> bool:
        """Whether there is a second object."""
        return self.second_shape != "no"

    def attributes(self) -> dict[str, str]:
        """Return the attributes, those of the bundle first. A second object leaves no choice of size."""
        flat = asdict(self)
        flat = flat.pop("bundle") | flat
        for absent in ("size",) if self.has_second else ("second_shape", "second_fill"):
            del flat[absent]
        return flat

    def caption(self, subject: str | None = None, late: bool = False) -> str:
        """Return a caption that names every attribute.

        Args:
            subject: a word for the bundle, instead of its description.
            late: put the subject at the end.
        """
        ground = f"on a {self.pattern} {self.background} background"
        if self.has_second:
            who, other = subject or self.bundle.words(), f"tiny {self.second_fill} {self.second_shape}"
            relation, inverse, _ = RELATIONS[self.place]
            return f"{ground} a {other} {inverse} a {who}" if late else f"a {who} {relation} a {other} {ground}"
        who = f"{self.size} {subject}" if subject else self.bundle.words(self.size)
        return f"{ground} {self.place} a {who}" if late else f"a {who} {self.place} {ground}"


SUBJECT_ATTRIBUTES = ("shape", "fill", "border", "dot")
BUNDLES = tuple(Bundle(s, f, b, d) for s in SHAPES for f in FILLS for b in TRIMS for d in TRIMS)


# Pretraining never shows or names these: one fill of each shape with each border and dot.
HELD_BUNDLES = [
    b
    for b in BUNDLES
    if (SHAPES.index(b.shape) + FILLS.index(b.fill) + 2 * TRIMS.index(b.border) + TRIMS.index(b.dot)) % 6 == 0
]
SEEN_BUNDLES = [b for b in BUNDLES if b not in HELD_BUNDLES]


# Subjects have a border and a dot of different colors. Black and white swap from shape to shape, and from dev to test.
_TRIMMED = [b for b in HELD_BUNDLES if {b.border, b.dot} == {"black", "white"}]
DEV_SUBJECTS = [b for b in _TRIMMED if (b.border == "black") == (SHAPES.index(b.shape) % 2 == 0)]
TEST_SUBJECTS = [b for b in _TRIMMED if b not in DEV_SUBJECTS]
# Fresh subjects, one of each shape, drawn before any run. An earlier study had seen these, with border and dot of one color:
_SEEN_BEFORE = {"circle": "red", "square": "blue", "triangle": "green", "star": "red", "cross": "blue", "pillar": "purple"}
_UNSEEN = [b for b in HELD_BUNDLES if b not in _TRIMMED and not (b.border == b.dot != "no" and _SEEN_BEFORE[b.shape] == b.fill)]
FRESH_SUBJECTS = [random.Random(2027 + i).choice([b for b in _UNSEEN if b.shape == s]) for i, s in enumerate(SHAPES)]


@functools.lru_cache
def masks(shape: str, radius: float, place: str, pixels: int) -> torch.Tensor:
    """Return the disjoint coverage of border, fill and dot in [0, 1]: (3, pixels, pixels), from 8 x 8 samples per pixel."""
    fine = pixels * 8
    axis = (torch.arange(fine) + 0.5) / fine
    reach = 0.5 - radius - 0.01
    dx, dy = PLACES[place]
    y, x = torch.meshgrid((axis - 0.5 - dy * reach) / radius, (axis - 0.5 - dx * reach) / radius, indexing="ij")

    def inside(r: float) -> torch.Tensor:
        """Return the mask of the shape, shrunk so that its outline moves in by (1 - r) of the radius."""
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
        # A star: its edge is straight from each of the five points to the notches next to it.
        angle = torch.atan2(x, -y)
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
    """Return the coverage of the pattern's second color: (pixels, pixels)."""
    cell = pixels // 8
    i = torch.arange(pixels) // cell
    if pattern == "plain":
        return torch.zeros(pixels, pixels)
    on = i[:, None].expand(-1, pixels) if pattern == "striped" else (i[:, None] // 2 + i[None] // 2)
    return (on % 2).float()


def second_mask(shape: str, place: str, pixels: int) -> torch.Tensor:
    """Return the coverage of the second object, opposite to the `place` of the first: (pixels, pixels)."""
    if shape == "no":
        return torch.zeros(pixels, pixels)
    return masks(shape, SECOND_RADIUS, RELATIONS[place][2], pixels).sum(0)


def rgb(color: str) -> torch.Tensor:
    """Return a color by its name, (3,) in [0, 1]."""
    return torch.tensor(COLORS[color]) / 255


def second_color(background: str) -> torch.Tensor:
    """Return the other color of a pattern: darker than a light background, lighter than a dark one."""
    c = rgb(background)
    return c * 0.72 if c.mean() > 0.45 else c + (1 - c) * 0.3


def render(scene: Scene, pixels: int, moved: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """Render a scene, (3, pixels, pixels) in [0, 1], with its first object `moved` by (x, y) pixels."""
    b = scene.bundle
    border, fill, dot = masks(b.shape, SIZES[scene.size], scene.place, pixels).roll(moved, (2, 1))
    other = second_mask(scene.second_shape, scene.place, pixels)
    second = pattern_mask(scene.pattern, pixels)[None]
    ground = rgb(scene.background)[:, None, None] * (1 - second) + second_color(scene.background)[:, None, None] * second
    image = ground * (1 - border - fill - dot - other)
    for mask, color in ((border, b.border), (fill, b.fill), (dot, b.dot), (other, scene.second_fill)):
        image = image + rgb(b.fill if color == "no" else color)[:, None, None] * mask
    return image.clamp(0, 1)


def clip(scene: Scene, pixels: int, frames: int) -> torch.Tensor:
    """Render a short clip, (3, frames, pixels, pixels): the object moves to the other side, or up from the middle.

    The object stays inside for up to 9 frames of 64 pixels. At 2 pixels per frame (1 from the middle) the largest one just
    reaches the edge. Two objects stand still.
    """
    dx, dy = PLACES[scene.place]
    x, y = (-2 * dx, -2 * dy) if dx or dy else (0, -1)
    if scene.has_second:
        x, y = 0, 0
    shifts = [(k * x * pixels // 64, k * y * pixels // 64) for k in range(frames)]
    return torch.stack([render(scene, pixels, shift) for shift in shifts], 1)


def to_pil(image: torch.Tensor) -> Image.Image:
    """Convert an image, (3, height, width) in [0, 1]."""
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())


def random_scene(rng: random.Random, bundles: list[Bundle] = SEEN_BUNDLES) -> Scene:
    """Choose a random scene, half of the time with a second object. The order of the choices is part of every seed."""
    bundle, background, pattern = rng.choice(bundles), rng.choice(BACKGROUNDS), rng.choice(PATTERNS)
    if rng.random() < 0.5:
        return Scene(bundle, rng.choice(list(SIZES)), rng.choice(list(PLACES)), background, pattern)
    place, second = rng.choice(list(RELATIONS)), (rng.choice(SECOND_SHAPES), rng.choice(FILLS))
    return Scene(bundle, "small", place, background, pattern, *second)


def photos(bundle: Bundle, count: int = 5, pixels: int = 32, seed: int = 0) -> list[Image.Image]:
    """Render `count` photos of a subject, with sizes, places, backgrounds and patterns as different as possible."""
    rng = random.Random(seed)
    sizes = [list(SIZES)[i % 2] for i in range(count)]
    columns = [rng.sample(list(v), len(v)) for v in (PLACES, BACKGROUNDS, PATTERNS)]
    images = []
    for i, size in enumerate(sizes):
        place, background, pattern = (column[i % len(column)] for column in columns)
        images.append(to_pil(render(Scene(bundle, size, place, background, pattern), pixels)))
    return images
