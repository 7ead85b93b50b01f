"""Embeddings: of each token, or pooled, of texts and of token ids."""

from __future__ import annotations

import numpy as np
import pytest
from ernie_llama import Llama

from .test_options import LONG

pytestmark = pytest.mark.build


def test_without_pooling_there_is_one_embedding_per_token(bf16: str) -> None:
    with Llama(bf16, n_threads=1, embedding=True, n_batch=32) as llm:
        one = llm.embed("import os")
        assert np.shape(one) == (len(llm.tokenize(b"import os")), 256)
        assert np.allclose(llm.embed(["x", "import os"])[1], one)


def test_a_long_text_is_truncated_to_n_batch_or_refused(bf16: str) -> None:
    with Llama(bf16, n_threads=1, embedding=True, n_batch=32) as llm:
        n = len(llm.tokenize(LONG.encode()))
        assert len(llm.embed(LONG)) == 32
        with pytest.raises(ValueError, match=rf"a text has {n} tokens, expected 1 to 32 \(n_batch\)"):
            llm.embed(LONG, truncate=False)


def test_pooling_gives_one_embedding_per_text(bf16: str) -> None:
    with Llama(bf16, n_threads=1, embedding=True) as llm:
        each = llm.embed("import os")
    with Llama(bf16, n_threads=1, embedding=True, pooling_type=1) as llm:
        assert llm.pooling_type() == 1
        assert np.allclose(llm.embed("import os"), np.mean(each, axis=0), atol=0.02)
        assert np.linalg.norm(llm.embed("import os", normalize=True)) == pytest.approx(1)


def test_create_embedding_is_embed_as_a_dictionary(bf16: str) -> None:
    with Llama(bf16, n_threads=1, embedding=True, pooling_type=1) as llm:
        texts = ["import os", "x"]
        n = sum(len(llm.tokenize(text.encode())) for text in texts)
        result = llm.create_embedding(texts)
        assert result["data"][0] == {"object": "embedding", "embedding": llm.embed(texts[0]), "index": 0}
        assert result["usage"] == {"prompt_tokens": n, "total_tokens": n}


def test_embeddings_of_token_ids(bf16: str) -> None:
    with Llama(bf16, n_threads=1, embedding=True, pooling_type=1, n_batch=32) as llm:
        texts = ["import os", "x"]
        tokens = [llm.tokenize(text.encode()) for text in texts]
        both = llm.embed(texts)
        assert llm.embed(tokens) == both
        assert llm.embed(np.array(tokens[0])) == llm.embed(tokens[0]) == both[0]  # type: ignore[arg-type]  # an array
        assert llm.embed([tokens[0], "x"]) == both  # type: ignore[arg-type]  # of both kinds
        assert llm.create_embedding(tokens)["usage"]["prompt_tokens"] == sum(map(len, tokens))


def test_what_holds_no_tokens_is_refused(bf16: str) -> None:
    with Llama(bf16, n_threads=1, embedding=True, pooling_type=1) as llm:
        with pytest.raises(ValueError, match="token 4096 is not in the vocabulary"):
            llm.embed([5, 4096])
        with pytest.raises(ValueError, match=r"a text has 0 tokens"):
            llm.embed([[]])
        for wrong in (5, b"x", [b"x"], [5.5], [[5.5]], [None]):
            with pytest.raises(TypeError, match=r"^(input|a token) "):
                llm.embed(wrong)  # type: ignore[arg-type]  # the mistake


def test_embeddings_need_the_option(llm: Llama) -> None:
    with pytest.raises(RuntimeError, match="embeddings need Llama"):
        llm.embed("x")
