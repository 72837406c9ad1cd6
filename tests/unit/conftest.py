"""CI generates the same cases every time, so that it judges the change and not the day; `make fuzz` makes new ones."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("same-cases", derandomize=True)
if "MEDGPT_FUZZ_CASES" not in os.environ:
    settings.load_profile("same-cases")
