"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

from .checkpoint.k_order import KOrder
from .gguf_file.outtype import FloatType, VisionTokens

TokenEmbeddingType = Annotated[
    FloatType | None,
    typer.Option(
        "--token-embedding-type", help="Type of token_embd.weight (default: as other matrices).", show_default=False
    ),
]
OutputTensorType = Annotated[
    FloatType | None,
    typer.Option(
        "--output-tensor-type", help="Type of output.weight (default: as other matrices).", show_default=False
    ),
]
Mmproj = Annotated[
    Path | None,
    typer.Option("--mmproj", help="Where to write the vision encoder (mmproj) of a VL checkpoint.", show_default=False),
]
MmprojType = Annotated[FloatType, typer.Option("--mmproj-type", help="Type of the matrices in MMPROJ.")]
VisionTokensOption = Annotated[
    VisionTokens,
    typer.Option(
        "--vision-tokens",
        help="Which text tokens go through the vision experts too. all: every id from the image placeholder on, as "
        "in Baidu's engine; marks: those around an image, as in transformers.",
    ),
]
TextOnly = Annotated[
    bool, typer.Option("--text-only", help="Only the language model of a vision-language (VL) checkpoint.")
]
KOrderOption = Annotated[
    KOrder,
    typer.Option(
        "--ccq-k-order",
        help="In which order of K the experts of a 2-bit checkpoint were quantized: natural, or shuffled as Baidu's "
        "engine reads them since July 2025. auto: found from their weights, refused where these do not tell.",
    ),
]
Threads = Annotated[int, typer.Option("--threads", min=1, max=64, help="Worker threads; memory grows with them.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUTFILE if it exists.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="For a name: do not ask before a download of more than 5 GB.")]

# The names are llama.cpp's; `plain_help.OLD_NAMES` are understood as well.
CtxSize = Annotated[int, typer.Option("--ctx-size", "-c", metavar="N", min=1, help="Context size in tokens.")]
Temp = Annotated[float, typer.Option("--temp", help="Temperature; 0 is greedy.")]
Seed = Annotated[int, typer.Option("--seed", "-s", help="Random seed; -1 picks a new one each run.")]
System = Annotated[str, typer.Option("--system", help="System message, before the conversation.")]
CpuThreads = Annotated[int, typer.Option("--threads", "-t", min=0, help="0 for one per physical core.")]
Gpus = Annotated[
    str | None,
    typer.Option("--gpus", help="Memory of each card in GiB: 24,24,24,24. Default: the GPUs here.", show_default=False),
]
