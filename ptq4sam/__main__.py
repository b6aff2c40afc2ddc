"""`python -m ptq4sam` is the `ptq4sam` command."""

import sys

from ptq4sam.cli import main

sys.exit(main())
