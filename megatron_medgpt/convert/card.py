"""The model card of an export: what it is, how it was measured, what it may be used for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_medgpt.checkpoint.manifest import CheckpointFacts
from megatron_medgpt.config.schema import ModelConfig
from megatron_medgpt.convert.mxfp4 import QuantisationError

_TOWER_TERMS = {
    "clip": "CLIP ViT: MIT (openai/CLIP)",
    "siglip": "MedSigLIP: Health AI Developer Foundations terms (gated); SigLIP so400m: Apache-2.0",
}
_USAGE = """```python
from transformers import AutoModelForImageTextToText, AutoProcessor
from PIL import Image

model = AutoModelForImageTextToText.from_pretrained(".")
processor = AutoProcessor.from_pretrained(".")
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which modality is this?"}]}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
image = Image.open("image.png").convert("RGB")
inputs = processor(images=[image], text=prompt, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1]:]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
```

Pictures are 8 bits, grey or RGB. `convert("RGB")` drops transparency, as training did; the processor alone would blend
it over white. It also cuts 16 bits off at 255: window such a picture first, as the study's own header says, or between
its 0.5th and 99.5th percentiles, as training did where nothing was said.
"""
_UNPACKED = """
On a CPU the MXFP4 experts are unpacked when the model is opened: import `Mxfp4Config` from transformers and add
`quantization_config=Mxfp4Config(dequantize=True)` to the first `from_pretrained`.
"""
_SERVED = """
Served: `vllm serve FOLDER` takes it as it is, with pictures and this chat template.
"""
_SERVED_PACKED = """
Served by vLLM, which from 0.20 on takes MXFP4 experts for DeepSeek's where a model's own name is not GPT-oss:

```
vllm serve FOLDER --hf-overrides '{"quantization_config": {"quant_method": "gpt_oss_mxfp4"}}'
```
"""


def write_card(
    folder: Path, config: ModelConfig, *, part: str, dtype: str, evaluation: Sequence[Mapping[str, Any]] | None,
    facts: CheckpointFacts, quantisation: Mapping[str, QuantisationError],
) -> None:  # fmt: skip
    """Write README.md with the front matter that model hubs read."""
    evaluation = list(evaluation or ())
    sections = [
        _front_matter(part, evaluation),
        "# Medical GPT-oss vision-language model\n\n"
        "**Not for clinical use.** Research only: this model has not been validated for diagnosis, treatment or any "
        "other clinical decision, its answers can be wrong, and it is no medical device.\n",
        _model_section(config, part, dtype, facts),
        _evaluation_section(evaluation),
    ]
    if quantisation:
        worst = max(quantisation.items(), key=lambda item: item[1].relative)
        sections.append(
            f"## Quantisation\n\nExperts are MXFP4 ({len(quantisation)} tensors). Largest relative error "
            f"{worst[1].relative:.4f} (`{worst[0]}`); every tensor's stands in `quantisation.json`.\n"
        )
    if part == "whole":
        sections.append(f"## Use\n\n{_USAGE}" + (_UNPACKED + _SERVED_PACKED if dtype == "mxfp4" else _SERVED))
    sections.append(_terms_section(config, part))
    (folder / "README.md").write_text("\n".join(sections), encoding="utf-8")


def _front_matter(part: str, evaluation: Sequence[Mapping[str, Any]]) -> str:
    pipeline = "image-text-to-text" if part == "whole" else "text-generation"
    lines = [
        "---", "library_name: transformers", "license: other", "license_name: see-below",
        "license_link: README.md", "tags:", "- medical", "- gpt_oss", "- vision-language",
    ]  # fmt: skip
    if part != "projector":
        lines.append(f"pipeline_tag: {pipeline}")
    if evaluation:
        lines += ["model-index:", "- name: megatron-medgpt", "  results:"]
        for result in evaluation:
            name = json.dumps(f"{result.get('task')} ({result.get('protocol')})")
            lines += [
                "  - task:", f"      type: {pipeline}", "    dataset:", f"      name: {name}",
                f"      type: {json.dumps(str(result.get('task')))}", "    metrics:", "    - type: accuracy",
                f"      value: {json.dumps(result.get('accuracy'))}",
            ]  # fmt: skip
    return "\n".join([*lines, "---", ""])


def _model_section(config: ModelConfig, part: str, dtype: str, facts: CheckpointFacts) -> str:
    language, vision = config.language, config.vision
    contents = {"whole": "the whole model", "language": "the language model", "projector": "the projector"}
    rows = [
        ("Contents", contents[part]),
        ("Weights", {"mxfp4": "experts MXFP4, the rest bfloat16"}.get(dtype, dtype)),
        ("Language model", f"GPT-oss, {language.num_layers} layers, width {language.hidden_size}, "
                           f"{language.num_experts} experts, {language.num_experts_per_token} a token"),
    ]  # fmt: skip
    if part != "language":
        rows.append(
            ("Vision encoder", f"{vision.kind}, {vision.num_layers} layers (all up to the feature), "
                               f"{vision.image_size_px} px, {config.tokens_per_image} tokens an image")
        )  # fmt: skip
    trained = (
        f"{facts.step} steps, last stage {facts.stage_name or 'none'}" if facts.step else "not at all: as imported"
    )
    rows.append(("Trained", trained))
    if facts.config_hash:
        rows.append(("Configuration", f"`{facts.config_hash}`"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"## Model\n\n| | |\n|---|---|\n{table}\n"


def _evaluation_section(evaluation: Sequence[Mapping[str, Any]]) -> str:
    if not evaluation:
        return "## Evaluation\n\nNo evaluation was given to the export.\n"
    lines = ["| task | protocol | questions | accuracy | 95 % interval |", "|---|---|---|---|---|"]
    for result in evaluation:
        low, high = (result.get("ci95") or (None, None))[:2]
        interval = f"{low:.3f} to {high:.3f}" if low is not None and high is not None else "not given"
        accuracy = result.get("accuracy")
        shown = f"{accuracy:.3f}" if isinstance(accuracy, int | float) else "not given"
        lines.append(f"| {result.get('task')} | {result.get('protocol')} | {result.get('n')} | {shown} | {interval} |")
    return "## Evaluation\n\n" + "\n".join(lines) + "\n"


def _terms_section(config: ModelConfig, part: str) -> str:
    terms = ["GPT-oss weights: Apache-2.0 (openai/gpt-oss)"]
    if part != "language":
        terms.append(_TOWER_TERMS[config.vision.kind])
    terms.append("Training data: the terms of every dataset used; LLaVA-Med's are CC BY-NC 4.0, research only")
    listed = "\n".join(f"- {term}" for term in terms)
    return (
        f"## Licences\n\nThese apply together, where the weights derive from them; the narrowest decides:\n\n{listed}\n"
    )
