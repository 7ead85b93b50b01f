"""LangChain on ernie_llama: a chain that streams, and one that fills in a form.

pip install langchain-community
python examples/langchain_form.py ernie.gguf "Ada Lovelace, born in 1815, wrote the first program."
"""

from __future__ import annotations

import sys

from ernie_llama.as_llama_cpp import install

install()  # LangChain imports llama_cpp: this makes it find ernie_llama

from langchain_community.chat_models import ChatLlamaCpp  # noqa: E402
from langchain_core.prompts import ChatPromptTemplate  # noqa: E402
from pydantic import BaseModel, Field  # noqa: E402


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=40)
    born: int = Field(ge=0, le=2100)


def main(model: str, text: str) -> None:
    """Print a streamed answer, then the form."""
    chat = ChatLlamaCpp(model_path=model, n_ctx=1024, max_tokens=128, temperature=0, verbose=False)
    chain = ChatPromptTemplate.from_template("Say in one sentence what this is about: {text}") | chat
    for chunk in chain.stream({"text": text}):
        print(chunk.content, end="", flush=True)
    print()
    print(chat.with_structured_output(Person).invoke(f"Describe the person of this text: {text}"))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
