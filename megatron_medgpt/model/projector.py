"""From the encoder's features to the language model's embeddings: LLaVA's two-layer MLP.

Layer names, biases and the GELU (by erf) are transformers' ``LlavaMultiModalProjector``'s. The optional 2x2 pixel
shuffle folds four neighbouring patches into one image token before the MLP, as InternVL does
(transformers ``models/internvl/modeling_internvl.py``, ``pixel_shuffle`` with a factor of 0.5): token (y, x) of the
smaller grid holds the channels of the patches (2y, 2x), (2y, 2x + 1), (2y + 1, 2x), (2y + 1, 2x + 1), in this order.
With the optional LayerNorm over that row the module is InternVL's ``InternVLMultiModalProjector``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from medgpt_kernels.projector.op import placement, project_into
from torch import Tensor, nn

from megatron_medgpt.config.schema import ModelConfig
from megatron_medgpt.model.merge import ImageRun, take_image_rows
from megatron_medgpt.model.replicated import ReplicatedModule


def pixel_shuffle(features_IPF: Tensor, fold: int) -> Tensor:
    """(I, P, F) on a square grid of patches to (I, P / fold**2, F * fold**2); channel order as above."""
    num_images, num_patches, width = features_IPF.shape
    side = round(num_patches**0.5)
    grid = features_IPF.view(num_images, side // fold, fold, side // fold, fold, width)
    return grid.transpose(2, 3).reshape(num_images, (side // fold) ** 2, fold * fold * width)


NORM_EPS = 1e-5
"""Of the optional LayerNorm: torch's default, which transformers' InternVL takes."""


class Projector(ReplicatedModule):
    """Two linear layers with a GELU between them: ``linear_1`` (Hp, Hv * fold**2), ``linear_2`` (H, Hp), and before
    them ``norm`` (Hv * fold**2) where the configuration has it.

    Args:
        config: of the whole model: the encoder's width, the language model's, and the projector's own section.
        dtype: of the parameters.
        seed: of the random initial weights.
        tp_group: see ``ReplicatedModule``.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        *,
        seed: int = 0,
        device: torch.device | None = None,
        tp_group: torch.distributed.ProcessGroup | None = None,
    ):
        super().__init__(tp_group)
        made = {"dtype": dtype, "device": "meta"}
        self.fold = config.projector.pixel_shuffle
        width = config.language.hidden_size
        inner = config.projector.hidden_size or width
        width_in = config.vision.hidden_size * self.fold**2
        self.norm = nn.LayerNorm(width_in, eps=NORM_EPS, **made) if config.projector.norm else None
        self.linear_1 = nn.Linear(width_in, inner, **made)
        self.linear_2 = nn.Linear(inner, width, **made)
        self.embedding_std = config.language.init_std
        self.finish(seed=seed, device=device)

    def forward(self, features_IPF: Tensor, runs: Sequence[ImageRun] | None = None) -> Tensor:
        """Project the image tokens of the runs, or all of them.

        Args:
            features_IPF: of the encoder, (I, P, Hv).
            runs: which tokens of which images (offsets count image tokens, after the pixel shuffle); only they are
                projected.

        Returns:
            rows_NH, run after run, (N, H); or (I, P / fold**2, H) without ``runs``.
        """
        if self.fold > 1:
            features_IPF = pixel_shuffle(features_IPF, self.fold)
        rows = features_IPF if runs is None else take_image_rows(features_IPF, runs)
        if self.norm is not None:
            rows = self.norm(rows)
        return self.linear_2(F.gelu(self.linear_1(rows)))

    def into(self, text_SBH: Tensor, features_IPF: Tensor, runs: Sequence[ImageRun]) -> Tensor:
        """``text_SBH`` with the projected image tokens of the runs at their places, in one fused call.

        The same function as ``merge_images`` after ``forward``.
        """
        images, patches, _ = features_IPF.shape
        side, width = round(patches**0.5), text_SBH.shape[1]
        per_image = patches // self.fold**2
        tokens = [run.image * per_image + run.offset + i for run in runs for i in range(run.length)]
        places = [(run.start + i) * width + run.row for run in runs for i in range(run.length)]
        at = placement(tokens, places, num_images=images, side=side, fold=self.fold, device=text_SBH.device)
        first, second = self.linear_1, self.linear_2
        norm = None if self.norm is None else (self.norm.weight, self.norm.bias)
        return project_into(
            text_SBH.contiguous(), features_IPF.contiguous(), at, first.weight, first.bias, second.weight, second.bias,
            norm=norm, eps=NORM_EPS,
        )  # fmt: skip

    def reset_parameters(self, generator: torch.Generator) -> None:
        """By fan-in, except that image rows start at the size of text embeddings (``language.init_std``).

        The features of a pre-norm encoder are of order 1 and a GELU keeps about a third of the variance, so the
        second layer's weights carry the scale.
        """
        if self.norm is not None:
            self.norm.reset_parameters()
        nn.init.normal_(self.linear_1.weight, std=self.linear_1.in_features**-0.5, generator=generator)
        second_std = self.embedding_std * (3.0 / self.linear_2.in_features) ** 0.5
        nn.init.normal_(self.linear_2.weight, std=second_std, generator=generator)
        nn.init.zeros_(self.linear_1.bias)
        nn.init.zeros_(self.linear_2.bias)
