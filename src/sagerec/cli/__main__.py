"""`python -m sagerec.cli`."""

import sys

from sagerec.cli import main

sys.exit(main())
