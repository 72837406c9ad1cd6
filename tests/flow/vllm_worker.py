"""Runs in vLLM's own Python: ``vllm_worker.py FOLDER REQUEST.json REPLY.json``, by ``test_vllm.py``.

A request names ``dtype``, ``prompts`` (``token_ids`` with one image token a picture; ``images``, their files), whether
to ``unpack`` experts, and further ``options`` of vLLM's. The reply has, for each prompt, the token ids as vLLM
expanded them, the log probability of every token of the vocabulary behind every position, the greedy continuation, and
the pixels that the processor made of the pictures.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip

NUM_WRITTEN = 24
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)


def unpack_experts() -> None:
    """Let vLLM choose and load MXFP4 experts as on a GPU, and compute with its plain ones on their values.

    Its own kernels for them want a GPU, or a CPU with AMX.
    """
    import torch
    from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import Mxfp4MoeBackend
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.model_executor.layers.quantization import mxfp4
    from vllm.model_executor.utils import replace_parameter

    def values(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """uint8 (experts, rows, columns / 2) and (experts, rows, columns / 32) to bf16 (experts, rows, columns)."""
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).long()
        powers = torch.exp2(scales.float() - 127).repeat_interleave(32, dim=-1)
        return (torch.tensor(E2M1)[codes] * powers).bfloat16()

    def unpack(method, layer) -> None:
        for name in ("w13", "w2"):
            packed, scales = getattr(layer, f"{name}_weight"), getattr(layer, f"{name}_weight_scale")
            replace_parameter(layer, f"{name}_weight", values(packed.data, scales.data))
        plain = UnquantizedFusedMoEMethod(method.moe)
        layer._replace_quant_method(plain)
        plain.process_weights_after_loading(layer)

    mxfp4.select_mxfp4_moe_backend = lambda moe: (Mxfp4MoeBackend.CPU, None)
    mxfp4.GptOssMxfp4MoEMethod.process_weights_after_loading = unpack


def main(folder: str, request_file: str, reply_file: str) -> None:
    from PIL import Image
    from transformers import AutoProcessor
    from vllm import LLM, SamplingParams

    request = json.loads(Path(request_file).read_text())
    if request["unpack"]:
        unpack_experts()
    llm = LLM(
        folder, dtype=request["dtype"], enforce_eager=True, max_model_len=512, max_num_seqs=4,
        enable_prefix_caching=False, max_logprobs=-1, limit_mm_per_prompt={"image": 2}, **request["options"],
    )  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=NUM_WRITTEN, ignore_eos=True, prompt_logprobs=-1)
    shows = any(prompt["images"] for prompt in request["prompts"])
    pixels = AutoProcessor.from_pretrained(folder).image_processor if shows else None
    replies = []
    for prompt in request["prompts"]:
        pictures = [Image.open(file).convert("RGB") for file in prompt["images"]]
        asked = {"prompt_token_ids": prompt["token_ids"]}
        asked |= {"multi_modal_data": {"image": pictures}} if pictures else {}
        (output,) = llm.generate([asked], greedy, use_tqdm=False)
        replies.append(
            {
                "token_ids": list(output.prompt_token_ids),
                "log_probs": [[at[i].logprob for i in range(len(at))] for at in output.prompt_logprobs[1:]],
                "written": list(output.outputs[0].token_ids),
                "pixels": [pixels(picture, return_tensors="pt")["pixel_values"][0].tolist() for picture in pictures],
            }
        )
    Path(reply_file).write_text(json.dumps(replies))


if __name__ == "__main__":
    main(*sys.argv[1:])
