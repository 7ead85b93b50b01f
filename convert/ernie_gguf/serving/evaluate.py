"""The command `eval`: lm-evaluation-harness on the bindings."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ErnieGgufError
from ..options import CtxSize


class EvalError(ErnieGgufError):
    """The file cannot be evaluated, or lm_eval is not there."""


def evaluate(  # noqa: PLR0917 - typer makes options of the parameters
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF file; of a split one the first part.")],
    tasks: Annotated[str, typer.Option(metavar="TASKS", help="Tasks of lm_eval, separated by commas.")],
    ctx_size: CtxSize = 4096,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Only the first N examples of each task.", show_default=False)
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Examples in the prompt.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Write lm_eval's results as JSON there.", show_default=False)
    ] = None,
    args: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- ARGS]...", help="More arguments of `lm_eval run`: -- --apply_chat_template"),
    ] = None,
) -> None:
    """Evaluate FILE with tasks of lm-evaluation-harness: MMLU, GSM8K and hundreds more."""
    from .model_file import check_model

    check_model(file, EvalError)
    if importlib.util.find_spec("lm_eval") is None:
        raise EvalError("lm_eval is not installed: run `pip install -e '.[eval]'` in the checkout of ernie-gguf")
    from ernie_llama.evaluation import main

    command = ["run", "--model", "ernie_llama", "--model_args", f"model_path={file},n_ctx={ctx_size}", "--tasks", tasks]
    for option, value in (("--limit", limit), ("--num_fewshot", num_fewshot), ("--output_path", output)):
        command += [] if value is None else [option, str(value)]
    main([*command, *(args or [])])
