"""``python -m syncbn``."""

import sys

from syncbn.cli import main

sys.exit(main())
