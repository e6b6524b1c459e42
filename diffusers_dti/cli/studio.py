"""`dti studio`: a page in the browser to learn concepts and to try them out."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from . import arguments

EXAMPLE = "dti studio --models stabilityai/stable-diffusion-xl-base-1.0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `dti studio`."""
    parser.add_argument(
        "--models",
        nargs="+",
        default=["stabilityai/stable-diffusion-xl-base-1.0"],
        metavar="MODEL",
        help="Hub ids or folders of pipelines to offer, also with the resolution to train at as in examples/worlds/sdxl=32; "
        "any other one can be named in the page; by default stabilityai/stable-diffusion-xl-base-1.0",
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("out/studio"), help="folder for runs and kept concepts, by default out/studio"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at, by default 127.0.0.1: this machine alone")
    parser.add_argument("--port", type=int, default=7860, help="port to listen at, by default 7860")
    parser.add_argument("--password", help="password to ask for, needed for any other host; by default none")
    parser.add_argument(
        "--dtype", choices=arguments.DTYPES, help="dtype of the models, by default bfloat16 on a GPU and float32 on the CPU"
    )
    parser.add_argument("--device", help='device of the models, such as "cuda:1"; by default the first GPU')


def run(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C."""
    if find_spec("gradio") is None:
        raise ImportError('The studio needs Gradio: pip install "diffusers-dti[studio]"')
    from ..studio import app
    from ..studio.models import Opening
    from .open_pipeline import check_device

    app.check_host(args.host, args.password)
    if args.device:
        check_device(args.device)
    resolutions = dict(map(_read_model, args.models))
    studio = app.make_studio(args.output_dir, Opening(args.dtype, args.device), resolutions)
    app.serve(studio, args.host, args.port, args.password)
    return 0


def _read_model(text: str) -> tuple[str, int | None]:
    """Return a model and the resolution behind its equals sign, if any."""
    name, _, resolution = text.rpartition("=")
    if name and resolution.isdigit():
        return name, int(resolution)
    return text, None
