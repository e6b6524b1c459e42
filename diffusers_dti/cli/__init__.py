"""The command `dti`: one module per verb, imported when that verb is called."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "train": "learn subjects from their photos, one folder or many",
    "generate": "draw prompts with learned words in them",
    "evaluate": "draw and score what was learned, by the paper's protocol",
    "blend": "draw what lies between two learned words",
    "inspect": "tell what a file holds, and how it lies in a model's vocabulary",
    "convert": "rewrite a learned word for diffusers, ComfyUI, A1111 or OneTrainer",
    "data": "fetch the data set of the paper",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="dti",
        description="Directional Textual Inversion for diffusers. `dti COMMAND --help` tells of a command's options.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((a for a in argv if not a.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == chosen:  # the others are not imported
            module = import_module(f"{__name__}.{name}")
            module.add_arguments(command)
    args = parser.parse_args(argv)
    try:
        return module.run(args)
    except (ValueError, OSError, ImportError) as error:  # these name the cure; a traceback would hide it
        print(f"dti {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"dti {args.command}: stopped. What is done is kept.", file=sys.stderr)
        return 130
