"""The oracle of pictures and videos: transformers' processors, tower, resampler and language model, all in float32."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from support.videos import Frames
from support.vl import PLACEHOLDER
from transformers import Ernie4_5_VLMoeForConditionalGeneration
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil

from reference import video_golden
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

    def _frames(
        self, frames: Frames, times: Sequence[float] | None = None, font: str | None = None
    ) -> dict[str, torch.Tensor]:
        """Patches and grid of a video, with these times drawn if there are any; needs torchvision."""
        from transformers.models.ernie4_5_vl_moe.video_processing_ernie4_5_vl_moe import Ernie4_5_VLMoeVideoProcessor
        from transformers.video_utils import VideoMetadata

        processor = Ernie4_5_VLMoeVideoProcessor(size=video_golden.LIMITS, font=font, do_sample_frames=False)
        seconds = list(times or range(len(frames)))
        fps = 1000.0
        metadata = VideoMetadata(len(frames), fps=fps, frames_indices=[round(fps * second) for second in seconds])
        found = processor(
            videos=[frames.copy()], video_metadata=[metadata], draw_on_frames=times is not None, return_tensors="pt"
        )
        return dict(found)

    def video_embeddings(self, frames: Frames, times: Sequence[float] | None = None, font: str | None = None) -> Floats:
        """Of one video, [tokens, hidden]."""
        (found,) = self.model.model.get_video_features(**self._frames(frames, times, font)).pooler_output
        out: Floats = found.numpy()
        return out

    def logits_of_videos(self, parts: Sequence[int]) -> Floats:
        """At every position, [m, V], of a prompt as in video_golden.PROMPTS."""
        model = self.model.model
        embeddings, kinds, routed = [], [], []
        grids: dict[int, list[torch.Tensor]] = {1: [], 2: []}
        for part in parts:
            if part >= 0:
                found, kind = model.get_input_embeddings()(torch.tensor([part])), 0
            elif part > -101:
                seen, kind = self._seen([PICTURES[-1 - part]]), 1
                (found,) = model.get_image_features(**seen).pooler_output
                grids[kind].append(seen["image_grid_thw"])
            else:
                seen, kind = self._frames(video_golden.VIDEOS[-101 - part]), 2
                (found,) = model.get_video_features(**seen).pooler_output
                grids[kind].append(seen["video_grid_thw"])
            embeddings.append(found)
            kinds += [kind] * len(found)
            routed += [int(part < 0 or part >= PLACEHOLDER)] * len(found)
        grid = {kind: torch.cat(found) if found else None for kind, found in grids.items()}
        types = torch.tensor([kinds])
        theirs, _ = model.get_rope_index(torch.zeros_like(types), types, grid[1], grid[2])
        positions = self._positions(kinds, grid)
        if video_golden.LONG not in parts:
            np.testing.assert_array_equal(theirs.numpy(), positions.numpy())
        out: Floats = (
            self.model(
                inputs_embeds=torch.cat(embeddings)[None],
                position_ids=positions,
                moe_mm_token_type_ids=torch.tensor([routed]),
            )
            .logits[0]
            .numpy()
        )
        return out

    @staticmethod
    def _positions(kinds: Sequence[int], grid: dict[int, torch.Tensor | None]) -> torch.Tensor:
        """[3, 1, tokens] for time, row and column, as Baidu's engine counts them."""
        grids = {kind: iter(found) for kind, found in grid.items() if found is not None}
        out: list[tuple[int, int, int]] = []
        start = 0
        while len(out) < len(kinds):
            kind = kinds[len(out)]
            if kind == 0:
                out.append((start, start, start))
            else:
                t, h, w = (int(n) for n in next(grids[kind]))
                pairs, rows, columns = max(t // 2, 1), h // 2, w // 2
                cells = np.indices((pairs, rows, columns)).reshape(3, -1).T + start
                out += [(int(a), int(b), int(c)) for a, b, c in cells]
            start = max(out[-1]) + 1 if kind == 0 else max(start + pairs, start + rows, start + columns)
        return torch.tensor(out).T[:, None]
