"""The run of ``medgpt demo``: a small GPT-oss with all of its features learns to read phantoms on two CPU cores.

Nothing is pretrained here, so the alignment stage trains the encoder and the language model too; with public weights
it would freeze both and train the projector alone.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_medgpt.config.schema import (
    BlendConfig,
    CheckpointConfig,
    LanguageConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    StageConfig,
    VisionConfig,
)

VOCAB_SIZE = 512

MODEL = ModelConfig(
    language=LanguageConfig(
        num_layers=4, hidden_size=96, num_attention_heads=6, num_query_groups=2, head_dim=16, num_experts=8,
        num_experts_per_token=2, expert_hidden_size=96, vocab_size=VOCAB_SIZE, sliding_window=64,
        yarn_original_length=128, max_length=4096, init_std=0.08,
    ),
    vision=VisionConfig(
        num_layers=4, hidden_size=128, num_attention_heads=4, mlp_hidden_size=384, image_size_px=60,
        pretrained_size_px=60, patch_size_px=20,
    ),
)  # fmt: skip
"""Nine image tokens: with 36 (84 px in patches of 14) the model needs three times as many steps to find the picture. A
2x2 pixel shuffle over those learns a little faster, but LLaVA's layout, to which the demo exports, has none."""


def demo() -> RunConfig:
    """Two stages in two layouts: alignment with the experts split, then instruction tuning with tensors split too."""
    rates = OptimizerConfig(
        learning_rate=2e-3, weight_decay=0.02, schedule=ScheduleConfig(warmup_steps=40, min_factor=0.05)
    )
    align = StageConfig(
        name="align",
        data=(BlendConfig(path="demo/data/captions"),),
        num_steps=300,
        sequence_length=256,
        micro_batch_rows=4,
        global_batch_rows=8,
        parallel=ParallelConfig(expert=2),
        optimizer=rates,
        validation_data=(BlendConfig(path="demo/data/validation"),),
        validation_interval=150,
    )
    instruct = replace(
        align,
        name="instruct",
        data=(BlendConfig(path="demo/data/dialogues"), BlendConfig(path="demo/data/captions")),
        num_steps=1600,
        micro_batch_rows=8,
        parallel=ParallelConfig(tensor=2, expert=2),
        validation_interval=250,
    )
    return RunConfig(
        name="demo", out="demo/run", tokenizer="demo/tokenizer", model=MODEL, stages=(align, instruct),
        precision="fp32", checkpoint=CheckpointConfig(interval=400), log=LogConfig(interval=25),
    )  # fmt: skip


def demo_quick() -> RunConfig:
    """The same way in a minute; it learns next to nothing. For tests."""
    run = demo()
    stages = tuple(replace(stage, num_steps=8, validation_interval=4) for stage in run.stages)
    return replace(run, name="demo-quick", stages=stages, log=replace(run.log, interval=2))
