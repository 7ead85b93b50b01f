"""Small random checkpoints with experts that are no ERNIE: made by transformers, converted by upstream."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import tokenizers
import torch
import transformers

from reference.specimens import TEXTS

TEXT = "".join(TEXTS)
SPECIAL_TOKENS = ["<|endoftext|>", "[gMASK]", "<|user|>", "<|observation|>", "<|im_start|>", "<|im_end|>"]
VOCAB = 512

# What all have: rows of 512 and 256, which ccq2 can hold.
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 512,
    "intermediate_size": 768,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "initializer_range": 0.05,
}
_DEEPSEEK = {
    **_COMMON,
    "num_key_value_heads": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 64,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_group": 2,
    "topk_group": 1,
}
# by name: transformers' configuration and the architecture in GGUF
CONFIGS: dict[str, tuple[transformers.PreTrainedConfig, str]] = {
    "deepseek-v2": (transformers.DeepseekV2Config(**_DEEPSEEK, topk_method="greedy"), "deepseek2"),
    "deepseek-v3": (transformers.DeepseekV3Config(**_DEEPSEEK), "deepseek2"),
    "qwen3-moe": (
        transformers.Qwen3MoeConfig(**_COMMON, num_experts=8, num_key_value_heads=4, head_dim=64, norm_topk_prob=True),
        "qwen3moe",
    ),
    "glm4-moe": (
        transformers.Glm4MoeConfig(
            **_COMMON,
            num_key_value_heads=4,
            head_dim=64,
            n_routed_experts=8,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
        ),
        "glm4moe",
    ),
}

# The converter knows the pre-tokenizers of published models by a hash, and would refuse this one's.
_CONVERT = """
import runpy, sys
tree = sys.argv.pop(1)
sys.path.insert(0, tree)
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv[0] = tree + "/convert_hf_to_gguf.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def make(name: str, folder: Path) -> Path:
    """Write the checkpoint of this name, BF16, into a new folder below `folder` and return it."""
    checkpoint = folder / name
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name][0])
    model.to(torch.bfloat16).save_pretrained(checkpoint)
    _tokenizer().save_pretrained(checkpoint)
    return checkpoint


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


def convert(tree: Path, checkpoint: Path, outfile: Path) -> Path:
    """Run the converter of a llama.cpp source tree: a BF16 GGUF."""
    arguments = [str(tree), str(checkpoint), "--outtype", "bf16", "--outfile", str(outfile)]
    # its own gguf-py, not the installed one
    environment = {name: value for name, value in os.environ.items() if name != "NO_LOCAL_GGUF"}
    command = [sys.executable, "-c", _CONVERT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"convert_hf_to_gguf.py ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return outfile
