"""`ernie-gguf serve` and `ernie-gguf chat`: the real llama-server on loopback, spoken to with the openai client."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ernie_gguf.serving.serve import DEFAULTS, ServeError, server_command
from ernie_llama import Llama
from support.servers import accepts, free_port, running

if TYPE_CHECKING:
    from openai import OpenAI

pytestmark = pytest.mark.build

CLI = [sys.executable, "-c", "from ernie_gguf.cli import main; main()"]
SLOTS = 4
PROMPTS = ("def main():", "import os\n\n\nclass ", "# naïve 日本語 🎉\n", "def f(x):\n" + "    x += 1\n" * 40)
MESSAGES: Any = [{"role": "system", "content": "You write Python."}, {"role": "user", "content": "def f"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 10}, "n": {"type": "integer"}},
    "required": ["name", "n"],
}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 10}},
            "required": ["city"],
        },
    },
}
# The example's own template knows no tools. This one has them in the manner of ERNIE-4.5-21B-A3B-Thinking.
TOOLS_TEMPLATE = r"""
{%- if tools %}
{{- '<|begin_of_sentence|>system\n<tool_list>\n' }}
{%- for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}
{{- '</tool_list>\n<|end_of_sentence|>\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- 'Assistant: ' }}
{%- if message.content %}{{ '<response>\n' + message.content + '\n</response>\n' }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\n' }}
{{- {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}{{ '\n</tool_call>\n' }}
{%- endfor %}
{{- '<|end_of_sentence|>\n' }}
{%- elif message.role == 'tool' %}
{{- 'Tool: <tool_output>' + message.content + '</tool_output>\n' }}
{%- else %}
{{- message.role | capitalize + ': ' + message.content + '\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}
"""


class Server:
    """Where a server listens."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.address = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.address + path, timeout=60) as answer:
            text: str = answer.read().decode()
            return text

    def client(self) -> OpenAI:
        openai = pytest.importorskip("openai", reason="the openai client is not installed: pip install -e '.[dev]'")
        client: OpenAI = openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=60)
        return client


@contextmanager
def serving(model: Path, log: Path, *options: str | Path) -> Iterator[Server]:
    """`ernie-gguf serve` with these options after `--`."""
    port = free_port()
    fixed = ["--port", str(port), "-t", "1", "-np", str(SLOTS), "-c", "2048"]

    def healthy() -> bool:
        if not accepts(port):
            return False
        try:
            return '"ok"' in Server(port).get("/health")
        except OSError:  # 503 while it loads
            return False

    with running([*CLI, "serve", model, "--", *fixed, *options], log, healthy):
        yield Server(port)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve") / "server.log"


@pytest.fixture(scope="module")
def server(built_library: None, tiny_ccq2_gguf: Path, log: Path) -> Iterator[Server]:
    with serving(tiny_ccq2_gguf, log) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def llm(built_library: None, tiny_ccq2_gguf: Path) -> Iterator[Llama]:
    """The bindings with the server's options."""
    with Llama(tiny_ccq2_gguf, n_ctx=2048, n_threads=1, type_k="q8_0", type_v="q8_0", cache_prompt=False) as llm:
        yield llm


def test_serve_says_what_it_runs_and_passes_options_through(server: Server, log: Path, tiny_ccq2_gguf: Path) -> None:
    first = log.read_text().splitlines()[0]
    assert re.search(r"/llama-server --model \S+ --alias ernie-tiny-ccq2 --cache-type-k q8_0 ", first)
    assert first.endswith(" -t 1 -np 4 -c 2048")
    props = json.loads(server.get("/props"))
    assert props["total_slots"] == SLOTS
    assert props["model_path"] == str(tiny_ccq2_gguf)
    assert "{% for message in messages %}" in props["chat_template"]


def test_a_given_option_replaces_the_default(built_library: None, tiny_ccq2_gguf: Path) -> None:
    command = server_command(tiny_ccq2_gguf, ["-ctk", "f16", "--alias=x"])
    assert command[-2:] == ["f16", "--alias=x"]
    assert "--cache-type-k" not in command
    assert command.count("--alias") == 0
    assert [names for names, _ in DEFAULTS if names[0] in command] == [
        names for names, _ in DEFAULTS if "-ctk" not in names
    ]


def test_serve_without_a_file_or_a_server_is_a_sentence(
    built_library: None, tiny_ccq2_gguf: Path, llama_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ServeError, match=r"nowhere\.gguf does not exist"):
        server_command(tmp_path / "nowhere.gguf", [])
    monkeypatch.setenv("ERNIE_LLAMA_LIB_PATH", str(tmp_path))
    with pytest.raises(
        ServeError, match=r"llama-server is not built; libllama\.so was not found; tried:.*; run `ernie-"
    ):
        server_command(tiny_ccq2_gguf, [])
    (tmp_path / "libllama.so").symlink_to(llama_bin / "libllama.so")
    with pytest.raises(ServeError, match=rf"{tmp_path}/llama-server does not exist \(it was looked for beside the lib"):
        server_command(tiny_ccq2_gguf, [])


def test_completions_are_those_of_the_bindings(client: OpenAI, llm: Llama) -> None:
    """Greedy and seeded: with `cache_prompt` off, the server evaluates every prompt as the bindings do.

    With it on, it evaluates the last token of a prompt that it knows alone, by other kernels: a draw may then differ.
    """
    for prompt in PROMPTS:
        for temperature, seed in ((0.0, 1), (0.8, 42), (0.8, 7)):
            ours = llm(prompt, max_tokens=48, temperature=temperature, seed=seed)
            theirs = client.completions.create(
                model="x",
                prompt=prompt,
                max_tokens=48,
                extra_body={"cache_prompt": False, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
                temperature=temperature,
                seed=seed,
            )
            # The server shows half a character at the end, the bindings, as llama-cpp-python, do not.
            assert theirs.choices[0].text.rstrip("\ufffd") == ours["choices"][0]["text"].rstrip("\ufffd")
            assert theirs.choices[0].finish_reason == ours["choices"][0]["finish_reason"]
            assert theirs.usage is not None
            assert theirs.usage.prompt_tokens == ours["usage"]["prompt_tokens"]
            assert theirs.usage.completion_tokens == ours["usage"]["completion_tokens"]


def test_chats_are_those_of_the_bindings(client: OpenAI, llm: Llama) -> None:
    options: Any = {"max_tokens": 32, "temperature": 0.8, "seed": 42}
    ours = llm.create_chat_completion(MESSAGES, **options)
    theirs = client.chat.completions.create(
        model="x",
        messages=MESSAGES,
        extra_body={"cache_prompt": False, "min_p": 0.05, "top_k": 40},
        **options,
        top_p=0.95,
    )
    assert theirs.choices[0].message.content == ours["choices"][0]["message"]["content"]
    assert theirs.usage is not None
    assert theirs.usage.prompt_tokens == ours["usage"]["prompt_tokens"]


def test_streams_are_the_whole(client: OpenAI) -> None:
    options: Any = {"max_tokens": 32, "temperature": 0, "extra_body": {"cache_prompt": False}}
    whole = client.completions.create(model="x", prompt=PROMPTS[0], **options)
    chunks = list(client.completions.create(model="x", prompt=PROMPTS[0], stream=True, **options))
    assert len(chunks) > 8
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    chat = client.chat.completions.create(model="x", messages=MESSAGES, **options)
    deltas = list(client.chat.completions.create(model="x", messages=MESSAGES, stream=True, **options))
    assert "".join(each.choices[0].delta.content or "" for each in deltas) == chat.choices[0].message.content


def test_a_json_schema_is_kept(client: OpenAI) -> None:
    for seed in range(3):
        chat = client.chat.completions.create(
            model="x",
            messages=MESSAGES,
            max_tokens=200,
            seed=seed,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": dict(SCHEMA)}},
        )
        answer = json.loads(chat.choices[0].message.content or "")
        assert set(answer) == {"name", "n"}
        assert isinstance(answer["n"], int)


def test_logprobs_are_those_of_the_bindings(client: OpenAI, llm: Llama) -> None:
    options: Any = {"messages": MESSAGES, "max_tokens": 4, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    theirs = client.chat.completions.create(model="x", extra_body={"cache_prompt": False}, **options)
    ours = llm.create_chat_completion(**options)["choices"][0]["logprobs"]
    assert theirs.choices[0].logprobs is not None
    assert ours is not None
    content = theirs.choices[0].logprobs.content or []
    assert [each.token for each in content] == [each["token"] for each in ours["content"] or []]
    for their, our in zip(content, ours["content"] or [], strict=True):
        assert their.logprob == pytest.approx(our["logprob"], abs=1e-3)
        assert [top.token for top in their.top_logprobs] == [top["token"] for top in our["top_logprobs"]]


def test_parallel_requests_run_on_several_slots(client: OpenAI, server: Server) -> None:
    def complete(i: int) -> str:
        text = (
            client.completions.create(model="x", prompt=f"def f{i}(", max_tokens=96, temperature=0, seed=1)
            .choices[0]
            .text
        )
        assert isinstance(text, str)
        return text

    before = metrics(server)
    with ThreadPoolExecutor(SLOTS) as pool:
        together = list(pool.map(complete, range(2 * SLOTS)))
    after = metrics(server)
    assert all(len(text) > 20 for text in together)
    tokens = after["tokens_predicted_total"] - before["tokens_predicted_total"]
    # One call of llama_decode makes a token for each busy slot.
    assert tokens / (after["n_decode_total"] - before["n_decode_total"]) > 1.2
    slots = json.loads(server.get("/slots"))
    assert len(slots) == SLOTS
    assert len({slot["id_task"] for slot in slots}) == SLOTS


def metrics(server: Server) -> dict[str, float]:
    lines = [line for line in server.get("/metrics").splitlines() if not line.startswith("#")]
    return {name.removeprefix("llamacpp:"): float(value) for name, value in (line.split() for line in lines)}


def test_the_metrics_count(client: OpenAI, server: Server) -> None:
    before = metrics(server)
    client.completions.create(
        model="x", prompt="import sys", max_tokens=7, temperature=0, extra_body={"cache_prompt": False}
    )
    after = metrics(server)
    assert after["tokens_predicted_total"] - before["tokens_predicted_total"] == 7
    assert after["prompt_tokens_total"] > before["prompt_tokens_total"]
    assert {"predicted_tokens_seconds", "requests_processing", "requests_deferred"} <= set(after)


def test_tools(built_library: None, tiny_ccq2_gguf: Path, tmp_path: Path) -> None:
    """A model that knows nothing of tools makes one call after the other: only the first is sure to be whole.

    llama.cpp lets it write text before a required call, so that it may not come to one: the first seed that does.
    """
    template = tmp_path / "tools.jinja"
    template.write_text(TOOLS_TEMPLATE)
    options: Any = {
        "messages": MESSAGES,
        "tools": [TOOL],
        "tool_choice": "required",
        "max_tokens": 200,
        "temperature": 0.8,
    }
    with serving(tiny_ccq2_gguf, tmp_path / "log", "--chat-template-file", template) as server:
        create = server.client().chat.completions.create
        chats = ((seed, create(model="x", seed=seed, **options)) for seed in range(1, 9))
        seed, chat = next((seed, chat) for seed, chat in chats if chat.choices[0].message.tool_calls)
        chunks = list(create(model="x", stream=True, seed=seed, **options))
    first, *_ = chat.choices[0].message.tool_calls or []
    assert first.type == "function"
    assert first.function.name == "get_weather"
    assert set(json.loads(first.function.arguments)) == {"city"}
    parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or [] if part.index == 0]
    assert [part.function.name for part in parts if part.function and part.function.name] == ["get_weather"]
    arguments = "".join(part.function.arguments or "" for part in parts if part.function)
    assert set(json.loads(arguments)) == {"city"}
    with Llama(tiny_ccq2_gguf, n_ctx=2048, n_threads=1, chat_template=TOOLS_TEMPLATE) as llm:
        (call,) = llm.create_chat_completion(seed=1, **options)["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] == "get_weather"
        assert set(json.loads(call["function"]["arguments"])) == {"city"}


def chat_command(model: Path) -> list[str]:
    return [*CLI, "chat", str(model), "--temp", "0", "-c", "512", "--threads", "1"]


def test_chat_answers_lines_until_exit(built_library: None, tiny_ccq2_gguf: Path, llm: Llama) -> None:
    lines = "def f\n\n/reset\nimport os\n/exit\nnever\n"
    done = subprocess.run(
        [*chat_command(tiny_ccq2_gguf), "--system", "You write Python."],
        input=lines,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    system = MESSAGES[0]
    with Llama(tiny_ccq2_gguf, n_ctx=512, n_threads=1, type_k="q8_0", type_v="q8_0") as own:
        answers = [
            own.create_chat_completion([system, {"role": "user", "content": line}], temperature=0)["choices"][0]
            for line in ("def f", "import os")
        ]
    assert done.stdout == "".join(f"{answer['message']['content']}\n" for answer in answers)
    assert "/exit or Ctrl-D ends" in done.stderr


def test_chat_ends_at_the_end_of_input_and_refuses_what_is_no_model(
    built_library: None, tiny_ccq2_gguf: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        chat_command(tiny_ccq2_gguf), input="", capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == ""
    other = tmp_path / "other.gguf"
    other.write_bytes(b"no")
    done = subprocess.run(chat_command(other), input="", capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (
        1,
        f"error: {other} is not a GGUF file: it starts with b'no', expected b'GGUF'\n",
    )


def test_ctrl_c_stops_an_answer_and_ctrl_d_ends(built_library: None, tiny_ccq2_gguf: Path) -> None:
    """In a terminal, as a user has it."""
    ours, theirs = pty.openpty()
    command = [*CLI, "chat", str(tiny_ccq2_gguf), "--temp", "2", "-c", "0", "--threads", "1", "--seed", "1"]
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=own_terminal,  # noqa: PLW1509 - no other thread runs here
    )
    os.close(theirs)
    try:
        terminal = Terminal(ours)
        terminal.read_until("> ")
        terminal.write("def f\n")
        terminal.read_until("def f\r\n")
        terminal.read_some(40)
        terminal.write("\x03")
        terminal.read_until("> ")
        terminal.write("\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def own_terminal() -> None:
    """Make standard input the terminal that controls this new session."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """The user's side of a terminal."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._unread = ""

    def write(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def read_some(self, n: int) -> None:
        """Wait for n characters."""
        while len(self._unread) < n:
            self._unread += os.read(self._descriptor, 1024).decode(errors="replace")
        self._unread = self._unread[n:]

    def read_until(self, text: str) -> None:
        """Wait for `text`."""
        while text not in self._unread:
            self._unread += os.read(self._descriptor, 1024).decode(errors="replace")
        self._unread = self._unread.split(text, 1)[1]
