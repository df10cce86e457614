"""`python -m inference_api` is the same as the command `inference-api`."""

import sys

from inference_api.cli import main

sys.exit(main())
