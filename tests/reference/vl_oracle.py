"""The oracle of pictures: transformers' image processor, tower, resampler and language model, all in float32."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from support.vl import PLACEHOLDER
from transformers import Ernie4_5_VLMoeForConditionalGeneration
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil

from reference.golden import Floats
from reference.vl_golden import PICTURES


class Model:
    """A loaded checkpoint. A tensor that is missing or not known to transformers is an error."""

    def __init__(self, folder: Path) -> None:
        self.model, loading = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, experts_implementation="eager", output_loading_info=True
        )
        if problems := {kind: found for kind, found in loading.items() if found}:
            raise ValueError(f"transformers did not load {folder} cleanly: {problems}")
        self.model.eval()
        torch.set_grad_enabled(False)
        self.processor = Ernie4_5_VLMoeImageProcessorPil()

    def embeddings(self, data: bytes) -> Floats:
        """Of one picture, [tokens, hidden]."""
        (found,) = self.model.model.get_image_features(**self._seen([data])).pooler_output
        out: Floats = found.numpy()
        return out

    def _seen(self, files: Sequence[bytes]) -> dict[str, torch.Tensor]:
        images = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
        return dict(self.processor(images=images, return_tensors="pt")) if images else {}

    def logits(self, parts: Sequence[int]) -> Floats:
        """At every position, [m, V], of a prompt as in PROMPTS."""
        seen = self._seen([PICTURES[-1 - part] for part in parts if part < 0])
        counts = iter([int(grid.prod()) // 4 for grid in seen.get("image_grid_thw", ())])
        ids: list[int] = []
        for part in parts:
            ids += [PLACEHOLDER] * next(counts) if part < 0 else [part]
        tokens = torch.tensor([ids])
        kinds = {
            "mm_token_type_ids": (tokens == PLACEHOLDER).long(),
            "moe_mm_token_type_ids": (tokens >= PLACEHOLDER).long(),
        }
        out: Floats = self.model(input_ids=tokens, **kinds, **seen).logits[0].numpy()
        return out
