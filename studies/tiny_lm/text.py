"""The text that the language model is trained on: which files, what is held out, its tokens and what identifies it."""

import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers
import torch
from torch import Tensor

END = "<|endoftext|>"  # token 0, in front of every file
SKIPPED = {"site-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}  # encodings: tables, no language


def read_texts(roots: list[Path]) -> dict[str, str]:
    """Return name -> text of the files under roots (no roots: the standard library), names relative to their root."""
    pattern, skipped, texts = ("*", set(), {}) if roots else ("*.py", SKIPPED, {})
    for root in roots or [Path(sysconfig.get_path("stdlib"))]:
        for path in [root] if root.is_file() else root.rglob(pattern):
            name = path.relative_to(root.parent if root.is_file() else root)
            # _sysconfigdata describes the machine that Python was built on
            if path.is_file() and not skipped & set(name.parts) and not path.name.startswith("_sysconfigdata"):
                texts[name.as_posix()] = path.read_text(encoding="utf-8", errors="replace")
    return {name: texts[name] for name in sorted(texts) if texts[name].strip()}


def name_hash(name: str) -> int:
    """Return 64 bits that depend on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def heldout_names(names: Iterable[str], every: int = 32) -> list[str]:
    """Choose whole files for validation by the hash of their name: one in ``every``, and at least one."""
    ranked = sorted(names, key=name_hash)
    if len(ranked) < 2:
        raise ValueError(f"text has {len(ranked)} non-empty files; give at least two, one of them is held out")
    return sorted([name for name in ranked if name_hash(name) % every == 0] or ranked[:1])


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> tokenizers.Tokenizer:
    """Return a byte-level BPE."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, texts: dict[str, str]) -> dict[str, Tensor]:
    """Return name -> token ids, every text led by the end-of-text token."""
    coded = tokenizer.encode_batch([END + text for text in texts.values()])
    return {name: torch.tensor(c.ids) for name, c in zip(texts, coded, strict=True)}


def heldout_pieces(heldout: dict[str, Tensor], length: int = 1024, number: int = 8) -> dict[str, Tensor]:
    """Return name -> the first ``length`` tokens of the first files by name_hash that are long enough (or longest)."""
    ranked = sorted(heldout, key=lambda name: (-min(len(heldout[name]), length), name_hash(name)))
    whole = [name for name in ranked if len(heldout[name]) >= length] or ranked[:1]
    return {name: heldout[name][:length] for name in whole[:number]}


def save_pieces(path: Path, pieces: dict[str, Tensor]) -> None:
    """Write tokens (uint16), offsets (piece i is tokens[offsets[i] : offsets[i + 1]]) and the files they begin."""
    offsets = np.cumsum([0, *map(len, pieces.values())])
    np.savez(path, tokens=torch.cat(list(pieces.values())).numpy().astype(np.uint16), offsets=offsets, files=[*pieces])


def unigram_entropy(tokens: Tensor, vocabulary: int, other: Tensor | None = None) -> float:
    """Return the entropy of tokens, or their cross-entropy under the (add-one) frequencies of other tokens."""
    p = torch.bincount(tokens, minlength=vocabulary).double()
    q = p if other is None else torch.bincount(other, minlength=vocabulary).double() + 1
    return -torch.xlogy(p / p.sum(), q / q.sum()).sum().item()


def describe_text(texts: dict[str, str], train_tokens: Tensor, heldout: dict[str, Tensor]) -> dict[str, object]:
    """Return what identifies the text: its listing has a line "sha256  name" per file, in the order of the names."""
    listing = "".join(f"{hashlib.sha256(t.encode()).hexdigest()}  {name}\n" for name, t in texts.items())
    result = {"files": len(texts), "bytes": sum(len(t.encode()) for t in texts.values())}
    result |= {"listing_sha256": hashlib.sha256(listing.encode()).hexdigest(), "validation_files": [*heldout]}
    return result | {"train_tokens": len(train_tokens), "validation_tokens": sum(map(len, heldout.values()))}
