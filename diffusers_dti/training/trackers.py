"""Whether a tracker of accelerate can be used, checked before anything is loaded."""

from pathlib import Path


def check_tracker(name: str | None, output_dir: str | Path | None) -> None:
    """Check that a tracker is known and installed: accelerate itself leaves out, without a word, what is not installed.

    Args:
        name: accelerate's name of the tracker, such as "wandb"; None for none.
        output_dir: the folder of the run, which some trackers need.

    Raises:
        ValueError: if the tracker is unknown, or needs a folder.
        ImportError: if its package is not installed.
    """
    if name in (None, "all"):
        return
    # Not `filter_trackers`: it only logs that a package is missing, and fails if no `Accelerator` has been made before.
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name not in LOGGER_TYPE_TO_CLASS:
        raise ValueError(f"report_to must be one of all, {', '.join(LOGGER_TYPE_TO_CLASS)}, got {name!r:.80}.")
    if name not in map(str, get_available_trackers()):
        raise ImportError(f"report_to={name!r} needs a package that is not installed: pip install {name}")
    if LOGGER_TYPE_TO_CLASS[name].requires_logging_directory and output_dir is None:
        raise ValueError(f"report_to={name!r} writes files: it needs an `output_dir`.")
