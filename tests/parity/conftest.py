from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def one_process():
    """Groups of a world of one process."""
    from megatron_medgpt.config.presets import TINY, TINY_CLIP
    from megatron_medgpt.config.schema import ModelConfig, ParallelConfig
    from megatron_medgpt.parallel import groups
    from megatron_medgpt.parallel.plan import make_layout

    groups.start(timeout_s=60)
    layout = make_layout(ParallelConfig(), ModelConfig(language=TINY, vision=TINY_CLIP), 1)
    yield groups.build_groups(layout)
    groups.stop()
