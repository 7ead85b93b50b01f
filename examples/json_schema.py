"""Make the model fill in a form: the answer always follows a JSON schema.

python examples/json_schema.py ernie.gguf "Ada Lovelace, born in 1815, wrote the first program."
"""

from __future__ import annotations

import json
import sys

from ernie_llama import Llama

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "born": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "topics": {"type": "array", "items": {"enum": ["art", "science", "politics"]}, "maxItems": 3},
    },
    "required": ["name", "born", "topics"],
    "additionalProperties": False,
}


def main(model: str, text: str) -> None:
    """Print the completed form."""
    with Llama(model, n_ctx=1024) as llm:
        chat = llm.create_chat_completion(
            [{"role": "user", "content": f"Describe the person of this text as JSON: {text}"}],
            response_format={"type": "json_object", "schema": SCHEMA},
            temperature=0.2,
            seed=42,
            max_tokens=256,
        )
    print(json.dumps(json.loads(chat["choices"][0]["message"]["content"] or ""), ensure_ascii=False, indent=2))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
