"""MiniLM-L6, a sentence transformer: a BERT encoder of six layers and the mean over its tokens; and its tokenizer.

Source: Devlin et al., "BERT", NAACL 2019; Wang et al., "MiniLM", NeurIPS 2020; Reimers and
Gurevych, "Sentence-BERT", EMNLP 2019.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["MiniLM", "WordPiece", "own_name"]

WIDTH, HEADS, INNER, LAYERS, VOCABULARY, POSITIONS, PAD = 384, 12, 1536, 6, 30_522, 512, 0


class _Layer(nn.Module):
    """Attention and two linear layers, each added to what comes in and then normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.attention_norm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=1e-12)

    def forward(self, x: Tensor, is_token: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_token)
        x = self.attention_norm(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.norm(x + self.down(functional.gelu(self.up(x))))


class MiniLM(nn.Module):
    """``int64[n, tokens]``, padded with 0, to ``[n, 384]`` of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.kinds = nn.Embedding(2, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.layers = nn.ModuleList(_Layer() for _ in range(LAYERS))

    def forward(self, tokens: Tensor) -> Tensor:
        is_token = tokens != PAD
        places = torch.cumsum(torch.ones_like(tokens), dim=1) - 1
        x = self.words(tokens) + self.positions(places) + self.kinds(torch.zeros_like(tokens))
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, is_token[:, None, None, :])
        weights = is_token.unsqueeze(-1).to(x.dtype)
        return functional.normalize((x * weights).sum(dim=1) / weights.sum(dim=1), dim=1)


class WordPiece:
    """Text to tokens: lower case without accents, split at spaces and punctuation, then the longest known pieces.

    Parameters
    ----------
    vocabulary : sequence of str
        Piece by number; pieces inside a word begin with ``##``.

    Examples
    --------
    >>> pieces = WordPiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "plain", "##er", "!"])
    >>> pieces(["Plainer!", "?"], length=6).tolist()
    [[2, 4, 5, 6, 3, 0], [2, 1, 3, 0, 0, 0]]
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self._number = {piece: number for number, piece in enumerate(vocabulary)}

    def __call__(self, texts: Sequence[str], length: int = 128) -> Tensor:
        """``int64[texts, length]``; what is longer is cut off."""
        number = self._number
        rows = []
        for text in texts:
            tokens = [number[piece] for word in _words(text) for piece in self._pieces(word)][: length - 2]
            tokens = [number["[CLS]"], *tokens, number["[SEP]"]]
            rows.append(tokens + [PAD] * (length - len(tokens)))
        return torch.tensor(rows)

    def _pieces(self, word: str) -> list[str]:
        pieces, start = [], 0
        while start < len(word):
            mark = "##" if start else ""
            end = next(
                (end for end in range(len(word), start, -1) if mark + word[start:end] in self._number), None
            )
            if end is None or len(word) > 100:
                return ["[UNK]"]
            pieces.append(mark + word[start:end])
            start = end
        return pieces


def _words(text: str) -> list[str]:
    plain = "".join(
        character
        for character in unicodedata.normalize("NFD", text.lower())
        if unicodedata.category(character) != "Mn"
    )
    apart = "".join(f" {character} " if _stands_alone(character) else character for character in plain)
    return apart.split()


def _stands_alone(character: str) -> bool:
    """Punctuation, ASCII symbols, and Chinese characters."""
    if re.match(r"[!-/:-@\[-`{-~]", character) or unicodedata.category(character).startswith("P"):
        return True
    return "CJK UNIFIED" in unicodedata.name(character, "") or "CJK COMPAT" in unicodedata.name(character, "")


_NAMES = (
    (r"^embeddings\.word_embeddings", "words"),
    (r"^embeddings\.position_embeddings", "positions"),
    (r"^embeddings\.token_type_embeddings", "kinds"),
    (r"^embeddings\.LayerNorm", "norm"),
    (r"^encoder\.layer\.", "layers."),
    (r"attention\.self\.query", "q"),
    (r"attention\.self\.key", "k"),
    (r"attention\.self\.value", "v"),
    (r"attention\.output\.dense", "out"),
    (r"attention\.output\.LayerNorm", "attention_norm"),
    (r"intermediate\.dense", "up"),
    (r"output\.dense", "down"),
    (r"output\.LayerNorm", "norm"),
)


def own_name(name: str) -> str:
    """A tensor of the published file under the name that it has here; empty where it is not used."""
    if name.startswith("pooler.") or name == "embeddings.position_ids":
        return ""
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name
