"""The command `dti`: one module for each verb, imported only when that verb is called.

To add a verb, add its line to `COMMANDS` and a module of the same name with `add_arguments(parser)`, `run(args)`, and
`EXAMPLE`, one of the documentation's commands, for its help.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

COMMANDS = {
    "train": "learn concepts from photos: a folder of one subject, or a JSON file of many",
    "generate": "generate images of prompts that contain learned concepts",
    "evaluate": "generate images of learned concepts and score them, following the paper's protocol",
    "blend": "generate images along the path from one concept to another",
    "inspect": "show what a concept's files hold, and compare it with the words of a model's vocabulary",
    "convert": "rewrite a concept's files for another program",
    "data": "download the data set of the paper",
    "studio": "open a page in the browser to learn concepts and to try them out",
    "env": "print what a bug report needs: versions, devices and the platform",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after `dti`; those of the process by default.

    Returns:
        The exit status: 0, or 1 after an error, or 130 after Ctrl+C.

    Raises:
        SystemExit: if the arguments cannot be parsed, and after `--help`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file or a pipe may have an encoding that lacks the letters of a word
            stream.reconfigure(errors="backslashreplace")
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="dti",
        description="Directional Textual Inversion for diffusers. `dti COMMAND --help` lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"dti {version('diffusers-dti')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((a for a in argv if not a.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,  # it does not break the example's line
        )
        if name == chosen:  # the other verbs are not imported, so `dti --help` loads neither models nor training
            module = import_module(f"{__name__}.{name}")
            module.add_arguments(command)
            command.epilog = f"example:\n  {module.EXAMPLE}"
    args = parser.parse_args(argv)
    try:
        status: int = module.run(args)
    except (ValueError, OSError, ImportError) as error:  # their messages say what helps; a traceback would hide it
        from ..pipeline.inspection_report import printable

        lines = [printable(line) for line in str(error).split("\n")]  # it may repeat the text of a file
        print(f"dti {args.command}: {chr(10).join(lines)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"dti {args.command}: stopped. Finished results are kept.", file=sys.stderr)
        return 130
    return status
