"""Let the model call Python functions until it answers.

python examples/tools.py ernie.gguf "How late is it in Tokyo?"

The model needs a chat template that knows tools, as the -Thinking and the 21B and 300B post-trained ones have.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, Literal
from zoneinfo import ZoneInfo

from ernie_llama import Llama


def get_time(zone: str) -> str:
    """The time in a zone such as Asia/Tokyo."""
    return f"{datetime.now(timezone.utc).astimezone(ZoneInfo(zone)):%H:%M}"


FUNCTIONS: dict[str, Callable[..., str]] = {"get_time": get_time}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_time",
            "description": "The time in a zone",
            "parameters": {
                "type": "object",
                "properties": {"zone": {"enum": ["Asia/Tokyo", "Europe/Berlin", "America/New_York"]}},
                "required": ["zone"],
                "additionalProperties": False,
            },
        },
    }
]


def run(call: Any) -> str:  # noqa: ANN401 - a tool call of the answer
    """The result of a call, or the error, which the model may mend."""
    try:
        return FUNCTIONS[call["function"]["name"]](**json.loads(call["function"]["arguments"]))
    except Exception as error:
        return f"error: {error!r}"


def main(model: str, question: str, rounds: str = "4") -> None:
    """Print every call with its result, then the answer."""
    messages: list[Any] = [{"role": "user", "content": question}]
    with Llama(model, n_ctx=4096) as llm:
        for i in range(int(rounds)):
            choice: Literal["required", "auto"] = "required" if i == 0 else "auto"
            chat = llm.create_chat_completion(messages, tools=TOOLS, tool_choice=choice, max_tokens=256, temperature=0)
            message = chat["choices"][0]["message"]
            messages.append(message)
            if "tool_calls" not in message:
                break
            for call in message["tool_calls"]:
                result = run(call)
                print(f"{call['function']['name']}({call['function']['arguments']}) = {result}", file=sys.stderr)
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    print(message["content"] or "")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
