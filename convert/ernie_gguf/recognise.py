"""What a file is that is not what its name says: the mistakes that people make with downloads, by the first bytes."""

from pathlib import Path

from .errors import ErnieGgufError

HEAD_BYTES = 512  # that decide

_AGAIN = "download it again"
_LFS = (
    "a Git LFS pointer, not the file itself: run `git lfs install && git lfs pull` in its folder, or download it with "
    "`hf download`"
)
_PAGE = f"a web page, not the file itself: {_AGAIN}; a link to a file on the Hub has /resolve/ in it, not /blob/"
_PICKLE = "a pickle of PyTorch or Paddle, which can run code and is not read: save the weights as safetensors"

# First bytes, in lower case -> what has them
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", _LFS),
    (b"<!doctype html", _PAGE),
    (b"<html", _PAGE),
    (b"<?xml", f"an XML page, such as a server's error, not the file itself: {_AGAIN}"),
    (b'{"error', f"a server's error, not the file itself: {_AGAIN}"),
    (
        b"access to model",
        f"the Hub's refusal, not the file itself: accept the model's terms there, log in and {_AGAIN}",
    ),
    (b"entry not found", f"the Hub's answer for a file that is not there: {_AGAIN} from the right place"),
    (b"repository not found", f"the Hub's answer for a repository that is not there: {_AGAIN} from the right place"),
    (b"invalid username or password", f"the Hub's refusal, not the file itself: log in and {_AGAIN}"),
    (b"gguf", "a GGUF file, which is converted already: llama.cpp's programs and `ernie-gguf inspect` take it"),
    (b"pk\x03\x04", "a zip archive or a PyTorch file: unpack the one; the other can run code and is not read"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"\xfd7zxz\x00", "an xz archive: unpack it"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive: unpack it"),
    (b"7z\xbc\xaf", "a 7-Zip archive: unpack it"),
    (b"rar!", "a RAR archive: unpack it"),
    (b"bzh", "a bzip2 archive: unpack it"),
    *((bytes((0x80, version)), _PICKLE) for version in (2, 3, 4, 5)),
)


def what_is(head: bytes) -> str | None:
    """What a file is by its first `HEAD_BYTES`, and what to do with it; None if it is nothing that is known."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:64].lower()
    for magic, what in _MAGIC:
        if start.startswith(magic) or head.startswith(magic):
            return what
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it"
    if not head:
        return f"empty: {_AGAIN}"
    return f"all zeros at its beginning, an unfinished download: {_AGAIN}" if not any(head) and len(head) > 8 else None


def refuse_other_files(path: Path, head: bytes, error: type[ErnieGgufError], expected: str) -> None:
    """Raise `error` if the first bytes show what a file is; else return, and the caller says what is wrong with it."""
    if (what := what_is(head[:HEAD_BYTES])) is not None:
        raise error(f"{path.name}: this is {what} (expected {expected})")
