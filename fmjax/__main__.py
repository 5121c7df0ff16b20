"""``python -m fmjax``: the command line where its script is not on the path."""

import sys

from fmjax.cli import main

sys.exit(main())
