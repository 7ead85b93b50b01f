"""What is a name, and which names of the family are near a wrong one."""

from pathlib import Path

import pytest
from ernie_gguf.hub.names import FAMILY, HubName, as_name, near, parse_name, suggestion


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("baidu/ERNIE-4.5-0.3B-PT", HubName("hf", "baidu/ERNIE-4.5-0.3B-PT")),
        ("baidu/ERNIE-4.5-0.3B-PT@v1.0", HubName("hf", "baidu/ERNIE-4.5-0.3B-PT", "v1.0")),
        ("a/b@refs/pr/3", HubName("hf", "a/b", "refs/pr/3")),
        ("hf:a/b", HubName("hf", "a/b")),
        ("ms:PaddlePaddle/ERNIE-4.5-0.3B-PT@master", HubName("ms", "PaddlePaddle/ERNIE-4.5-0.3B-PT", "master")),
        ("./a/b", None),
        ("/a/b", None),
        ("../a", None),
        ("a/b/c", None),
        ("ab", None),
        ("a/", None),
        ("~/b", None),
        ("a/b@", None),
        ("gs:a/b", None),
        ("a b/c", None),
    ],
)
def test_form_of_a_name(text: str, name: HubName | None) -> None:
    assert parse_name(text) == name


def test_a_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert as_name(Path("a/b")) == HubName("hf", "a/b")
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert as_name(Path("a/b")) is None


def test_the_family_is_written_once() -> None:
    assert len(set(FAMILY)) == len(FAMILY) == 27
    assert all(parse_name(name) == HubName("hf", name) for name in FAMILY)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("baidu/ERNIE-4.5-21B-A3B", "baidu/ERNIE-4.5-21B-A3B-PT"),
        ("ERNIE-4.5-21B-A3B-PT", "baidu/ERNIE-4.5-21B-A3B-PT"),
        ("baidu/ernie-4.5-300b-a47b-2bits-paddle", "baidu/ERNIE-4.5-300B-A47B-2Bits-Paddle"),
        ("Baidu/ERNIE-45-0.3B-PT", "baidu/ERNIE-4.5-0.3B-PT"),
        ("ms:PaddlePaddle/ERNIE-4.5-VL-28B-A3B-PT@master", "baidu/ERNIE-4.5-VL-28B-A3B-PT"),
    ],
)
def test_near_names(text: str, first: str) -> None:
    assert near(text)[0] == first


def test_nothing_is_near() -> None:
    assert near("meta-llama/Llama-3.1-8B") == []
    assert suggestion("meta-llama/Llama-3.1-8B") == ""
    assert suggestion("baidu/ERNIE-4.5-0.3B-PT") == ""  # it is right as it stands
