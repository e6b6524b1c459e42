"""The rows of the study (study.py): what is trained, after how many steps it is scored, and how it is then used."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FLOOR, CEILING = "the initializer's word", "the description in words"  # nothing is trained
RANDOM = "a random noun"


@dataclass(frozen=True)
class Row:
    """A row of the study.

    Args:
        name: its name in the tables.
        settings: settings of the trainer.
        lengths: the numbers of steps after which it is scored. A rate that falls needs a run for each.
        uses: arguments of `load_directional_inversion` by the name of a use. Each use is scored.
        start: the initializer: None for the subject's shape, RANDOM for a noun of the world, or the setting itself.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (100,)
    uses: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    start: str | None = None

    @property
    def runs(self) -> list[tuple[int, ...]]:
        """The lengths of each run."""
        falls = self.settings.get("lr_scheduler", "constant") != "constant"
        return [(length,) for length in self.lengths] if falls else [self.lengths]


@dataclass(frozen=True)
class Part:
    """A part of the study: its rows in each world, its subjects, and its number of seeds."""

    rows: Mapping[str, list[Row]]
    splits: tuple[str, ...]
    seeds: int


# The old default is written out, so that the comparison stays. The new one is written out too, to find runs again when what it
# does not depend on changes; a test compares it with the trainer's.
OLD: dict[str, Any] = {"optimizer": "rsgd", "learning_rate": 0.01, "lr_scheduler": "constant"}


def new(steps: int) -> dict[str, Any]:
    """Return the default's settings for a number of steps."""
    return {"optimizer": "rsgd", "learning_rate": round(1 / math.sqrt(steps), 4), "lr_scheduler": "cosine"}


NEW = new(100)
FINAL = {"sdxl": 400, "sana": 500, "wan": 500}  # the old default's steps, which are the authors'
# The best rate and schedule of the dev subjects' walks of 100 steps (walk.py); and the rate that lengthens a row to about 50
# times the mean norm, as in real models. AdamW lengthens it by rate x sqrt(width x steps), so that a narrow encoder with long
# rows needs a higher rate.
TI_BEST: dict[str, dict[str, Any]] = {
    "sdxl": {"learning_rate": 0.001, "lr_scheduler": "constant"},
    "sana": {"learning_rate": 0.02, "lr_scheduler": "cosine"},
    "wan": {"learning_rate": 0.02, "lr_scheduler": "cosine"},
}
TI_INFLATED = {"sdxl": 0.03, "sana": 0.1, "wan": 0.4}
RESCALED: dict[str, dict[str, Any]] = {"": {}, "rescaled": {"token_scale": "mean"}}
BOTH_POOLINGS: dict[str, dict[str, Any]] = {f"used with {p}": {"pooling": p} for p in ("eos", "legacy")}


def _main(world: str) -> list[Row]:
    return [
        Row(FLOOR),
        Row(CEILING),
        Row("DTI", NEW),
        Row("DTI, the old default", OLD, (25, 50, 100, 200, FINAL[world])),
        Row("TI, best rate", {"method": "ti", **TI_BEST[world]}, (100, FINAL[world]), RESCALED),
    ]


def _rates(world: str) -> list[Row]:
    """The rate of 100 steps; and textual inversion, to compare."""
    rates = [Row(f"rate {rate:g}", NEW | {"learning_rate": rate}) for rate in (0.05, 0.07, 0.1, 0.2)]
    return [*rates, Row("TI, rate 0.02", {"method": "ti", "learning_rate": 0.02, "lr_scheduler": "cosine"})]


def _curve(world: str) -> list[Row]:
    """The new default by the number of steps: with the rate that goes with it, and with the rate of 100 steps."""
    rows = [Row("DTI", new(steps), (steps,)) for steps in (25, 50, 100, 200, 400)]
    return [*rows, Row("DTI, rate .1", NEW, (25, 50, 100, 200, 400))]


def _others(world: str) -> list[Row]:
    return [
        Row("DTI, preset paper", {"preset": "paper"}, (100, FINAL[world])),
        Row("TI, as long as in real models", {"method": "ti", "learning_rate": TI_INFLATED[world]}, (FINAL[world],), RESCALED),
        Row("CrossInit", {"method": "crossinit", **TI_BEST[world]}, uses=RESCALED),
        Row("DTI + CoRe", {**NEW, "context_lambda": 1.5e-4}),
        Row("TI + CoRe", {"method": "ti", **TI_BEST[world], "context_lambda": 1.5e-4}),
        Row("DCO + DTI", {**NEW, "method": "dco"}),
        Row("DTI, 2 vectors", {**NEW, "num_vectors": 2}),
        Row("DTI, 4 vectors", {**NEW, "num_vectors": 4}),
    ]


def _starts(world: str) -> list[Row]:
    return [
        Row("the user's word", NEW),
        Row("the user's word, two starts", {**NEW, "num_starts": 2}),
        Row("auto", NEW, start="auto"),
        Row("auto, three starts", {**NEW, "num_starts": 3}, start="auto"),
        Row("object", NEW, start="object"),
        Row(RANDOM, NEW, start=RANDOM),
    ]


def _ablations(world: str) -> list[Row]:
    """The old default for 100 steps, with each part of the new one alone, and the new one without each."""
    return [
        Row("old default", OLD),
        Row("+ the rate", OLD | {"learning_rate": NEW["learning_rate"]}),
        Row("+ the schedule", OLD | {"lr_scheduler": "linear"}),
        Row("+ stratified noise levels", OLD | {"timestep_sampling": "stratified"}),
        Row("+ two starts", OLD | {"num_starts": 2}),
        Row("- the start in context", OLD | {"initializer_context": False, "prefix_space": "kept"}),
        Row("new default", NEW),
        Row("new, without the start in context", NEW | {"initializer_context": False, "prefix_space": "kept"}),
    ]


def _prior(world: str) -> list[Row]:
    kappas = {f"kappa {kappa:g}": {"kappa": kappa} for kappa in (0.0, 5e-4, 5e-3, 5e-2)}
    scales = {f"scale {scale}": {"token_scale": scale} for scale in ("min", "max", "initializer", 5.0)}
    return [Row("the defaults", NEW), *(Row(name, NEW | own) for name, own in {**kappas, **scales}.items())]


def _pooling(world: str) -> list[Row]:
    """Only CLIP is pooled."""
    if world != "sdxl":
        return []
    return [Row(f"trained with {p}", NEW | {"pooling": p}, uses=BOTH_POOLINGS) for p in ("eos", "legacy")]


_REPORTED = ("test", "fresh")
PARTS = {
    name: Part({world: rows(world) for world in FINAL}, splits, seeds)
    for name, rows, splits, seeds in (
        ("main", _main, _REPORTED, 3),
        ("rates", _rates, ("dev", "more"), 1),
        ("curve", _curve, ("dev", *_REPORTED), 1),
        ("others", _others, _REPORTED, 3),
        ("starts", _starts, ("dev",), 3),
        ("ablations", _ablations, ("dev",), 3),
        ("pooling", _pooling, _REPORTED, 1),
        ("prior", _prior, ("test",), 1),
    )
}
