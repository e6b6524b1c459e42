"""Write files of this version for later versions to read: `python tests/regression/write.py FOLDER`.

The files are concepts of one and three vectors for SDXL, SANA and Wan, of one vector for the other families, a concept of
classic textual inversion, an adapter and a checkpoint. They come from two steps of training on the tests' tiny pipelines.
`expected.json` has the rows as numbers.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[i]) for i in (1, 2)]

import tiny_modern
import tiny_pipelines
from PIL import Image

from diffusers_dti import DTITrainer

SETTINGS = {"placeholder_token": "<dog>", "initializer_token": "dog", "resolution": 16, "train_batch_size": 1}


def photos():
    rng = random.Random(0)
    return [Image.new("RGB", (16, 16), tuple(rng.randrange(256) for _ in "rgb")) for _ in range(2)]


KINDS = {"one": {}, "three": {"num_vectors": 3}, "adapter": {"method": "dco"}, "ti": {"method": "ti"}}
FAMILIES = {  # the pipelines' names in the tests, and what is learned in each
    "sdxl": ("one", "three", "adapter", "ti"),
    "sana": ("one", "three"),
    "wan": ("one", "three"),
} | dict.fromkeys(("sd", *tiny_modern.PIPELINES), ("one",))


def build(name, folder):
    folder.mkdir()
    builders = {known: getattr(tiny_pipelines, f"build_{known}") for known in ("sdxl", "sd", "sana", "wan")}
    return (builders | tiny_modern.PIPELINES)[name](folder)


def main(folder):
    expected = {}
    with tempfile.TemporaryDirectory() as tmp:
        for name, kinds in FAMILIES.items():
            pipe = build(name, Path(tmp) / name)
            for kind in kinds:
                settings = SETTINGS | {"resolution": 16 if name in ("sdxl", "wan") else 32, "max_train_steps": 2} | KINDS[kind]
                concept = DTITrainer(pipe, **settings, output_dir=folder / name / kind).fit(photos())
                (folder / name / kind / "train_log.jsonl").unlink()
                expected[f"{name}/{kind}"] = {c: e.tolist() for c, e in concept.embeddings.items()}
                pipe.unload_directional_inversion()
                if kind == "adapter":
                    pipe.unload_lora_weights()
            if name == "sdxl":
                run = {"max_train_steps": 4, "checkpointing_steps": 2, "output_dir": Path(tmp) / "run"}
                DTITrainer(pipe, **SETTINGS, **run).fit(photos())
                (Path(tmp) / "run" / "checkpoint-2").rename(folder / "checkpoint-2")
    (folder / "expected.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
