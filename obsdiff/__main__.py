"""`python -m obsdiff`, for torchrun and for environments without scripts."""

from obsdiff.cli import main

main()
