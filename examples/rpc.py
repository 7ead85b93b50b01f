"""Spread a model over several machines with llama.cpp's RPC.

On each machine (in trusted networks only: the protocol is not protected):

    ggml-rpc-server -H 0.0.0.0 -p 50052

Here:

    python examples/rpc.py ernie.gguf 192.168.1.2:50052,192.168.1.3:50052 "def main():"

The same with llama.cpp's own server:

    ernie-gguf serve ernie.gguf -- --rpc 192.168.1.2:50052,192.168.1.3:50052
"""

from __future__ import annotations

import sys

import ernie_llama
from ernie_llama import Llama


def main(model: str, servers: str, prompt: str) -> None:
    """Print the devices and what they generate together."""
    # Devices get layers in proportion to their free memory; tensor_split=[1, 3] would give the second 3 of 4.
    with Llama(model, n_ctx=1024, rpc_servers=servers, n_gpu_layers=-1) as llm:
        print(*(f"{device.name}: {device.description}" for device in ernie_llama.info().devices), sep="\n")
        print(llm(prompt, max_tokens=32, temperature=0, echo=True)["choices"][0]["text"])


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
