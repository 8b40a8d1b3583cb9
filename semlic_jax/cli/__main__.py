# SPDX-License-Identifier: Apache-2.0
"""`python -m semlic_jax.cli`."""

import sys

from semlic_jax.cli import main

sys.exit(main())
