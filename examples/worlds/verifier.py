"""Read a scene back from its image by analysis through synthesis, without weights or training.

For every layout (shape, size, place, pattern, second object) the image is a weighted sum of at most six colors. The weights are
the share of each pixel that each part covers. The verifier fits the colors by least squares, snaps them to the palette and
renders the scene. The answer is the layout with the smallest error. An attribute that does not fit well is "unclear", and
counts as wrong.
"""

import functools
from itertools import product

import scenes
import torch

COLOR_LIMIT = 0.30  # a part's color is unclear above this RGB distance (each channel in [0, 1])
PART_LIMIT = 0.22  # shape, size and place are unclear above this root mean square error over the object's pixels


@functools.lru_cache(2)
def _layouts(pixels: int) -> tuple[list[tuple[str, str, str, str, str]], torch.Tensor, torch.Tensor]:
    """Return all layouts, the coverage of each one's six parts, and the pseudo-inverse that fits their colors."""
    keys = list(product(scenes.SHAPES, scenes.SIZES, scenes.PLACES, scenes.PATTERNS, ("no",)))
    keys += product(scenes.SHAPES, ("small",), scenes.RELATIONS, scenes.PATTERNS, scenes.SECOND_SHAPES)
    parts = []
    for shape, size, place, pattern, second_shape in keys:
        border, fill, dot = scenes.masks(shape, scenes.SIZES[size], place, pixels)
        other = scenes.second_mask(second_shape, place, pixels)
        ground, second = 1 - border - fill - dot - other, scenes.pattern_mask(pattern, pixels)
        parts.append(torch.stack([ground * (1 - second), ground * second, border, fill, dot, other]))
    cover = torch.stack(parts).flatten(2).double()  # (layouts, 6, pixels²)
    return keys, cover.float(), torch.linalg.pinv(cover.transpose(1, 2)).float()


def _nearest(colors: torch.Tensor, choices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the index of the nearest choice for each color, and its distance."""
    distance = (colors[..., None, :] - choices).norm(dim=-1)
    best = distance.min(-1)
    return best.indices, best.values


def _around(cover: torch.Tensor, pixels: int) -> torch.Tensor:
    """Return the pixels of an object and next to it, (pixels²,), from its coverage."""
    return torch.nn.functional.max_pool2d(cover.view(1, 1, pixels, pixels), 5, 1, 2).flatten() > 0.5


def _error(squares: torch.Tensor) -> torch.Tensor:
    """Return the root mean square error per channel of pixels with these sums of squares."""
    return (squares.mean() / 3).sqrt()


@torch.no_grad()
def read(images: torch.Tensor) -> list[dict[str, str]]:
    """Read the attributes of images.

    Args:
        images: (n, 3, pixels, pixels) in [0, 1].

    Returns:
        The attributes of each image. A value is "unclear" if nothing fits.
    """
    pixels = images.shape[-1]
    keys, cover, solve = _layouts(pixels)
    fills = torch.stack([scenes.rgb(c) for c in scenes.FILLS])
    trims = torch.stack([scenes.rgb(c) for c in scenes.TRIMS[1:]])
    grounds = torch.stack([scenes.rgb(c) for c in scenes.BACKGROUNDS])
    seconds = torch.stack([scenes.second_color(c) for c in scenes.BACKGROUNDS])
    plain = torch.tensor([k[3] == "plain" for k in keys])
    answers = []
    for image in images:
        x = image.flatten(1).T  # (pixels², 3)
        colors = solve @ x  # (layouts, 6, 3)
        # the two colors of a background are chosen together
        gaps = (colors[:, :1] - grounds).norm(dim=-1), (colors[:, 1:2] - seconds).norm(dim=-1)
        ground = torch.where(plain[:, None], gaps[0], (gaps[0] + gaps[1]) / 2).min(-1)
        fill, fill_gap = _nearest(colors[:, 3], fills)
        snapped = [grounds[ground.indices], seconds[ground.indices]]
        trimmed = []
        for part in (2, 4):  # border, dot: the fill's own color, black or white
            choices = torch.cat([fills[fill][:, None], trims.expand(len(keys), -1, -1)], 1)
            index, gap = _nearest(colors[:, part], choices)
            snapped.append(choices[torch.arange(len(keys)), index])
            trimmed.append((index, gap))
        second_fill, second_gap = _nearest(colors[:, 5], fills)
        palette = torch.stack([snapped[0], snapped[1], snapped[2], fills[fill], snapped[3], fills[second_fill]], 1)
        error = (torch.einsum("lpn,lpc->lnc", cover, palette) - x).square().sum(-1)  # (layouts, pixels²)
        best = int(error.mean(-1).argmin())
        shape, size, place, pattern, second_shape = keys[best]
        near, other = (_around(cover[best, part].sum(0), pixels) for part in (slice(2, 5), slice(5, 6)))
        lost, away = (_error(error[best, part]) > PART_LIMIT for part in (near, ~near & ~other))
        second_lost = second_shape != "no" and _error(error[best, other]) > PART_LIMIT
        (border, border_gap), (dot, dot_gap) = trimmed
        answer = {
            "shape": (shape, lost), "size": (size, lost), "place": (place, lost),
            "fill": (scenes.FILLS[fill[best]], fill_gap[best] > COLOR_LIMIT),
            "border": (scenes.TRIMS[border[best]], border_gap[best] > COLOR_LIMIT),
            "dot": (scenes.TRIMS[dot[best]], dot_gap[best] > COLOR_LIMIT),
            "background": (scenes.BACKGROUNDS[ground.indices[best]], ground.values[best] > COLOR_LIMIT),
            "pattern": (pattern, away),
            "second_shape": (second_shape, second_lost),
            "second_fill": ("no", False) if second_shape == "no" else
                (scenes.FILLS[second_fill[best]], second_gap[best] > COLOR_LIMIT),
        }  # fmt: skip
        answers.append({k: "unclear" if unclear else v for k, (v, unclear) in answer.items()})
    return answers
