"""``python -m twoview`` is the command line too."""

from twoview.cli import main

main()
