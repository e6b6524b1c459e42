"""`dti data dreambooth`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which data set, and where to put it."""
    parser.add_argument("name", choices=["dreambooth"], help="DreamBooth's 30 subjects of 4 to 6 photos, about 110 MB")
    parser.add_argument("--folder", type=Path, default=Path("data/dreambooth"), help="by default data/dreambooth")


def run(args: argparse.Namespace) -> int:
    """Fetch it, if it is not there yet."""
    from ..data.dreambooth import download

    print(f"See {download(args.folder)}, which `dti train` and `dti evaluate` take.")
    return 0
