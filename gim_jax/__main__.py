"""`python -m gim_jax` is `gim-jax`."""

import sys

from gim_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
