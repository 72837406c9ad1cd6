"""What ``medgpt convert`` calls: one function per subcommand. Each prints what it did and returns the exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_medgpt.config.errors import UsageError, WorkError
from megatron_medgpt.convert.hf_to_megatron import import_hf, plan_import
from megatron_medgpt.convert.megatron_to_hf import export_hf
from megatron_medgpt.convert.mxfp4 import SCALE_RULES
from megatron_medgpt.convert.stream import amount, refuse_existing


def hf_to_megatron(
    language: Path, out: Path, *, vision: Path | None = None, new_vision: str | None = None,
    projector: Path | None = None, dtype: str = "same", feature_layer: int | None = None,
    image_size_px: int | None = None, pixel_shuffle: int = 1, projector_norm: bool = False, keep_packed: bool = False,
    seed: int = 1234, dry_run: bool = False, num_threads: int = 2,
) -> int:  # fmt: skip
    """Published weights to a checkpoint. See ``hf_to_megatron.plan_import`` for the options.

    Args:
        dry_run: say what would be read and written, and write nothing.
    """
    if not dry_run:
        refuse_existing(out)  # before minutes of reading
    if seed < 0:
        raise UsageError(f"--seed {seed}; allowed: 0 or more")
    plan = plan_import(
        language, vision=vision, new_vision=new_vision, projector=projector, dtype=dtype, feature_layer=feature_layer,
        image_size_px=image_size_px, pixel_shuffle=pixel_shuffle, projector_norm=projector_norm,
        keep_packed=keep_packed, seed=seed,
    )  # fmt: skip
    print(plan.describe())
    if dry_run:
        print(f"dry run: {out} was not written")
        return 0
    import_hf(plan, out, num_threads=num_threads)
    print(f"wrote {out}; train from it with checkpoint.start_from={out}")
    return 0


def megatron_to_hf(
    checkpoint: Path, out: Path, *, dtype: str = "bf16", part: str = "whole", tokenizer: Path | None = None,
    scale_rule: str = "up", original: Path | None = None, evaluation: Sequence[Path] = (), num_threads: int = 2,
) -> int:  # fmt: skip
    """A checkpoint to a Hugging Face folder. See ``megatron_to_hf.export_hf`` for the options.

    Args:
        evaluation: files of ``medgpt eval``, for the model card.
    """
    refuse_existing(out)
    if scale_rule not in SCALE_RULES:
        raise UsageError(f"--scale-rule {scale_rule}; allowed: {', '.join(SCALE_RULES)}")
    if scale_rule != "up" and dtype != "mxfp4":
        raise UsageError("--scale-rule is of MXFP4; it needs --dtype mxfp4")
    summary = export_hf(
        checkpoint, out, tokenizer=tokenizer, dtype=dtype, part=part, scale_rule=scale_rule, original=original,
        evaluation=[_read_evaluation(path) for path in evaluation], num_threads=num_threads,
    )  # fmt: skip
    print(f"wrote {summary.out}: {summary.num_tensors} tensors, {amount(summary.num_bytes)}")
    if summary.quantisation:
        worst, error = max(summary.quantisation.items(), key=lambda item: item[1].relative)
        print(f"MXFP4: largest relative error {error.relative:.4f} ({worst}); every tensor's in quantisation.json")
        print(f"MXFP4: {summary.num_experts_kept} of {summary.num_experts} expert matrices kept byte for byte")
    return 0


def verify(
    checkpoint: Path, hf: Path, *, layouts: Sequence[str] = ("single",), images: bool | None = None,
    logits: bool = True, vision: Path | None = None, num_threads: int = 2,
) -> int:  # fmt: skip
    """Compare a checkpoint with a Hugging Face folder; 1 when they differ. See ``verify.verify`` for the options."""
    if images is not None and not logits:
        raise UsageError("--images is of the prompts whose logits are compared; --no-logits has none")
    from megatron_medgpt.convert.verify import verify as verify_folder  # with megatron-core, which takes two seconds

    report = verify_folder(
        checkpoint, hf, layouts=tuple(layouts) or ("single",), images=images, logits=logits, vision=vision,
        num_threads=num_threads,
    )  # fmt: skip
    print(report.describe())
    if not report.passed:
        print(f"medgpt: failed: {hf} is not the model of {checkpoint}", file=sys.stderr)
    return 0 if report.passed else WorkError.exit_code


def _read_evaluation(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UsageError(f"--evaluation {path}: {error.strerror}; give a file that medgpt eval wrote") from None
    except ValueError as error:
        raise UsageError(f"--evaluation {path} is not JSON ({error}); give a file that medgpt eval wrote") from None
    if not isinstance(content, dict) or "accuracy" not in content:
        raise UsageError(f"--evaluation {path} holds no accuracy; give a file that medgpt eval wrote")
    return content
