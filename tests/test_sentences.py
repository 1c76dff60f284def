"""Real sentence-transformers: a tiny model with random weights, saved to a folder and loaded from it."""

from pathlib import Path

import numpy as np
import pytest

from sagerec.actions.semantic_ids.embedders import embed_sentences
from sagerec.errors import DatasetError

pytest.importorskip("sentence_transformers", reason="the extra `text` is not installed")


def save_tiny_model(folder: Path) -> None:
    """A BERT of width 16 with a vocabulary of a few words, mean pooling."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "nail", "polish", "hand", "cream"]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), **shape)).save_pretrained(folder)
    encoder = Transformer(str(folder))
    model = SentenceTransformer(modules=[encoder, Pooling(16)], device="cpu")
    model.save(str(folder / "sentences"))


def test_a_saved_folder_gives_unit_vectors_that_depend_on_the_words(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    vectors = embed_sentences(
        ["red nail polish", "hand cream", "red nail polish"], str(tmp_path / "model" / "sentences"), device="cpu"
    )
    assert vectors.shape == (3, 16)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-6)
    assert not np.allclose(vectors[0], vectors[1], atol=1e-3)


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot be loaded"):
        embed_sentences(["words"], str(tmp_path), device="cpu")
