"""Methods compared in the world: `python study.py dev` chooses TI's rate and is gate 4, `python study.py test` reports.

Every line of the table is the mean over subjects and seeds of two shares: of the subject's attributes, and of the prompt's
other attributes, that the verifier finds in pictures of `PROMPTS`. Runs are kept in a JSON-lines file and not repeated.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import scenes
import torch
import verifier
from gates import WORLDS, encoders_of, generate, open_world, world_of
from scenes import SUBJECT_ATTRIBUTES, Bundle, Scene

from diffusers_dti import DirectionalInversion, DTITrainer, families

TOKEN = "<thing>"
TI_RATES = (0.001, 0.005, 0.02)  # before `scale_lr`
TI_RATE = {"sdxl": 0.001, "sana": 0.02, "wan": 0.02}  # the best of them on dev subjects
# size, place, background, pattern, whether the token comes late, and which of the subject's attributes the prompt changes:
# the chef outfit of this world. Two changes at once were never in a caption of pretraining.
PROMPTS = (
    ("large", "on the left", "pink", "striped", False, ()),
    ("small", "on the right", "teal", "plain", False, ("fill",)),
    ("large", "at the top", "mint", "checkered", False, ()),
    ("small", "at the bottom", "tan", "striped", False, ("border",)),
    ("small", "on the left", "gray", "checkered", True, ("dot",)),
    ("large", "in the middle", "brown", "plain", True, ("fill", "border")),
    ("small", "at the top", "pink", "striped", True, ("fill", "dot")),
    ("large", "on the right", "teal", "checkered", True, ("border", "dot")),
)


@dataclass(frozen=True)
class Prompt:
    """A text, the scene it asks for, and which attributes of the subject it changes."""

    text: str
    scene: Scene
    edits: tuple[str, ...]


def prompts(bundle: Bundle, subject: str | None) -> list[Prompt]:
    """The eight prompts with `subject` in the subject's place (None: its full description)."""
    made = []
    for size, place, background, pattern, late, edits in PROMPTS:
        other_fill = scenes.FILLS[scenes.FILLS.index(bundle.fill) - 2]
        changes = {edit: other_fill if edit == "fill" else "no" for edit in edits}
        scene = Scene(replace(bundle, **changes), size, place, background, pattern)
        made.append(Prompt(scene.caption(subject and scenes.edited(subject, changes), late), scene, edits))
    return made


def scores(images: torch.Tensor, asked: list[Prompt]) -> dict[str, float]:
    """Shares found: of the subject's attributes, and of all else that the prompts name, changes to the subject included."""
    found = {"subject": [], "prompt": []}
    for read, prompt in zip(verifier.read(images), asked, strict=True):
        for attribute, truth in prompt.scene.attributes().items():
            of_subject = attribute in SUBJECT_ATTRIBUTES and attribute not in prompt.edits
            found["subject" if of_subject else "prompt"].append(read[attribute] == truth)
    return {k: sum(v) / len(v) for k, v in found.items()}


def norm_of(pipe, word: str) -> float:
    """Mean over the encoders of a word's norm."""
    norms = []
    for tokenizer, encoder in encoders_of(pipe).values():
        (id,) = tokenizer(word, add_special_tokens=False).input_ids
        norms.append(encoder.get_input_embeddings().weight[id].norm().item())
    return sum(norms) / len(norms)


def in_words(pipe, bundle: Bundle, subject: str | None, seed: int) -> tuple[torch.Tensor, dict[str, float]]:
    """Without any learning: the initializer word alone (the floor), or the full description (the ceiling)."""
    asked = prompts(bundle, subject)
    images = generate(pipe, [p.text for p in asked], seed)
    return images, scores(images, asked) | {"norm": norm_of(pipe, subject or bundle.shape)}


def learned(pipe, bundle: Bundle, seed: int, **settings) -> tuple[torch.Tensor, dict[str, float], DirectionalInversion]:
    """Learn the subject from five photos, draw it in the prompts, and take it out again."""
    photos = scenes.photos(bundle, pixels=world_of(pipe).pixels, seed=seed)
    trainer = DTITrainer(
        pipe, placeholder_token=TOKEN, initializer_token=bundle.shape, resolution=photos[0].width, seed=seed, **settings
    )
    concept = trainer.fit(photos)
    try:
        asked = prompts(bundle, TOKEN)
        images = generate(pipe, [p.text for p in asked], seed)
    finally:
        pipe.unload_directional_inversion(TOKEN)
    norms = torch.cat(list(concept.scales.values()))
    return images, scores(images, asked) | {"norm": norms.mean().item(), "angle": trainer.history[-1]["angle"]}, concept


def run(args: argparse.Namespace) -> None:
    pipe = open_world(args.world)
    steps = args.steps or families.find(pipe).DEFAULTS["max_train_steps"]
    table = {"world": args.world, "split": args.split, "steps": steps}
    subjects = {"dev": scenes.DEV_SUBJECTS, "test": scenes.TEST_SUBJECTS}[args.split][: args.subjects]
    done = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    for bundle in subjects:
        for seed in range(args.seeds):
            jobs = {"initializer word": bundle.shape, "description in words": None, "DTI": {}}
            jobs |= {f"TI, rate {r}": {"method": "ti", "learning_rate": r} for r in TI_RATES}
            for name, job in jobs.items():
                key = table | {"bundle": bundle.words(), "seed": seed, "row": name}
                if any(key.items() <= d.items() for d in done):
                    continue
                if isinstance(job, dict):
                    _, figures, _ = learned(pipe, bundle, seed, max_train_steps=steps, **job)
                else:
                    _, figures = in_words(pipe, bundle, job, seed)
                done.append(key | figures)
                with args.results.open("a") as f:
                    f.write(json.dumps(done[-1]) + "\n")
    rows: dict[str, list[dict]] = {}
    for d in done:
        if table.items() <= d.items():
            rows.setdefault(d["row"], []).append(d)
    print(f"| {args.world}, {args.split} subjects, {steps} steps | subject | prompt | norm | runs |\n|---|---|---|---|---|")
    for name, ds in rows.items():
        mean = {k: sum(d[k] for d in ds) / len(ds) for k in ("subject", "prompt", "norm")}
        print(f"| {name} | {mean['subject']:.3f} | {mean['prompt']:.3f} | {mean['norm']:.2f} | {len(ds)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("split", choices=["dev", "test"])
    parser.add_argument("--world", default="sdxl", help=f"{', '.join(WORLDS)}, or a folder")
    parser.add_argument("--results", type=Path, default=Path("out/study.jsonl"))
    parser.add_argument("--subjects", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of training; by default as many as the pipeline's family takes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    run(args)


if __name__ == "__main__":
    main()
