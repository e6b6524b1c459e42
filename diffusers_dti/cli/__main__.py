"""`python -m diffusers_dti.cli`, for `accelerate launch -m diffusers_dti.cli train ...`."""

from . import main

if __name__ == "__main__":
    raise SystemExit(main())
