"""Run the command as a module: `python -m diffusers_dti.cli`, or `accelerate launch -m diffusers_dti.cli train ...`."""

from . import main

if __name__ == "__main__":
    raise SystemExit(main())
