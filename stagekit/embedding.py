"""Vectors of texts from a sentence-transformers model; the library is imported only when there is one."""

import numpy as np

PROBE = "发热三天，伴咳嗽。Fever and cough for three days."  # tells one model from another, wherever it lies


class Embedder:
    """A sentence-transformers model; the library is imported here only."""

    def __init__(self, name: str, device: str | None = None):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ValueError(
                "--embedding_model needs sentence-transformers: pip install sentence-transformers"
            ) from error
        self.name = name
        try:
            self._model = SentenceTransformer(name, device=device)
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or ["it cannot be loaded"])[0]
            raise ValueError(f"--embedding_model {name}: {reason}") from error

    def encode(self, texts: list[str], question: bool = False) -> np.ndarray:
        """Vectors of length 1, float32 (texts, dimensions), with the model's own prompt for questions or documents."""
        encode = self._model.encode_query if question else self._model.encode_document
        vectors = encode(texts, normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, np.float32)


def same_vector(first: np.ndarray, second: np.ndarray) -> bool:
    """True when two vectors of length 1 differ by no more than 16-bit weights and other devices make them differ."""
    return first.shape == second.shape and bool(first @ second > 0.999)
