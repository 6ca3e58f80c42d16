"""Makes `python -m fastflow.vae` the command line."""

from fastflow.vae.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
