"""CI generates the same cases every time, so that it judges the change and not the day; `make fuzz` makes new ones.

Nor does it judge the machine: Hypothesis looks at the clock while it generates, and a busy machine takes its time.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile("same-cases", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
if "MEDGPT_FUZZ_CASES" not in os.environ:
    settings.load_profile("same-cases")
