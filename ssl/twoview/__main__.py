"""``python -m twoview``, the same as the command ``twoview``."""

from twoview.cli import main

main()
