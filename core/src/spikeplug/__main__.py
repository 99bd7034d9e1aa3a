"""`python -m spikeplug`, the same as the console script."""

from spikeplug.cli import main

main()
