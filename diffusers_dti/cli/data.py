"""`dti data`: download a data set."""

import argparse
from pathlib import Path

EXAMPLE = "dti data dreambooth"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `dti data`."""
    parser.add_argument(
        "name", choices=["dreambooth"], help="data set: DreamBooth's 30 subjects with 4 to 6 photos each, about 110 MB"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("data/dreambooth"), help="folder to download to, by default data/dreambooth"
    )


def run(args: argparse.Namespace) -> int:
    """Download the data set, unless it is there already."""
    from ..data.dreambooth import download

    print(f"See {download(args.folder)}, which `dti train` and `dti evaluate` take.")
    return 0
