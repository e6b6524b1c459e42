"""Train a concept on Wan and generate a video of it: `python examples/wan.py`, on a CPU, in a small world.

With a GPU and your own photos, run:

    python examples/wan.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --photos photos/dog --initializer dog
"""

import sys
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import export_to_gif
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "worlds"))

import measure
import scenes
from quickstart import compare
from sana import PLACEHOLDER, learn, parse_arguments


def save_video(pipe: DiffusionPipeline, prompt: str, path: str, **settings: Any) -> None:
    """Generate a short video and save it as a GIF. Videos of the small world are enlarged."""
    frames = pipe(prompt, output_type="pil", **settings).frames[0]
    scale = -(-256 // frames[0].width)
    export_to_gif([f.resize((f.width * scale, f.height * scale), Image.Resampling.NEAREST) for f in frames], path, fps=6)
    print(f"See {path}.")


def main() -> None:
    args = parse_arguments(__doc__)
    if args.model is None:
        pipe, concept = compare("wan", args.subject, args.steps, args.out / "wan.png")
        pipe.load_directional_inversion(concept)
        scene = scenes.Scene(scenes.TEST_SUBJECTS[args.subject], "large", "in the middle", "mint", "striped")
        settings = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 12, "guidance_scale": 3.0}
        save_video(pipe, scene.caption(measure.TOKEN), str(args.out / "wan.gif"), **settings)
    else:
        save_video(learn(args), args.prompt.replace("{}", PLACEHOLDER), str(args.out / "wan.gif"), num_frames=33)


if __name__ == "__main__":
    main()
