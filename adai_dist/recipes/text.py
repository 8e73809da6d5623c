"""Text as tokens, split by file, and batches that are a pure function of (seed, step).

Every rank computes where the whole batch lies and cuts out its own rows, so the data are the same for every number of
ranks, and a resumed run needs no state of the data. All tokens are held in memory, on every rank, but for those of
source=tokens, which stay in their files.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import logging
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adai_dist.recipes.data_config import TextConfig
from adai_dist.recipes.refusal import RecipeError, require

logger: logging.Logger = logging.getLogger("adai_dist")

Tokens = NDArray[Any]
Document = tuple[str, bytes]
"""A name, which decides on which side of the split it falls, and UTF-8 text."""

BYTE_VOCABULARY = 256
SEPARATOR = 0  # between documents read as bytes: the NUL byte, which text does not contain
_BATCH_DOCUMENTS = 256  # given to a tokenizer at once
_SNIFF_BYTES = 8192  # a NUL byte among the first ones means that a file is not text, as git decides it
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class TokenSplits:
    """Tokens of all documents in a row, for training and for evaluation."""

    train: Tokens
    """Shape (number of tokens,), the smallest unsigned dtype that holds the vocabulary."""
    val: Tokens
    vocab_size: int
    """Number of tokens that may occur; 0 for source=tokens, which does not know."""


def load_tokens(config: TextConfig) -> TokenSplits:
    """Reads the text that the recipe names, tokenises it and splits it by document.

    Raises:
        RecipeError: no text is found, it is too short, or a package that it needs is missing.

    Collective: none; every rank reads the same files.
    """
    if config.source == "tokens":
        splits = TokenSplits(_map_tokens(config, "train.bin"), _map_tokens(config, "val.bin"), 0)
    else:
        encode, vocab_size = _tokenizer(config.tokenizer)
        train, val = _split(_documents(config), config.val_fraction)
        splits = TokenSplits(encode(train), encode(val), vocab_size)
    for name, tokens in (("training", splits.train), ("held-out", splits.val)):
        require(
            len(tokens) > config.seq_len,
            f"the {name} text must be longer than data.seq_len={config.seq_len}",
            f"{len(tokens)} tokens",
            "give more text, a shorter data.seq_len or another data.val_fraction",
        )
    return splits


def train_rows(tokens: Tokens, config: TextConfig, seed: int, step: int, rank: int, num_ranks: int) -> Tensor:
    """This rank's rows of the batch of a step.

    Returns:
        int64, shape (batch / num_ranks, seq_len + 1); together the rows of all ranks do not depend on their number.
    """
    starts = np.random.default_rng((seed, step)).integers(0, len(tokens) - config.seq_len, size=config.batch)
    num_rows = config.batch // num_ranks
    return _windows(tokens, starts[rank * num_rows : (rank + 1) * num_rows], config.seq_len)


def val_rows(tokens: Tokens, config: TextConfig, rank: int, num_ranks: int) -> tuple[Tensor, Tensor]:
    """This rank's part of the fixed evaluation windows, evenly spaced over the held-out text.

    Returns:
        int64 windows of shape (rows, seq_len + 1), as many on every rank, and float64 weights of shape (rows,): 1, or 0
        for the repeated windows that fill up the last ranks.
    """
    starts = np.linspace(0, len(tokens) - config.seq_len - 1, config.val_windows).astype(np.int64)
    num_rows = -(-config.val_windows // num_ranks)
    mine = np.arange(rank * num_rows, (rank + 1) * num_rows)
    weights = torch.from_numpy((mine < config.val_windows).astype(np.float64))
    return _windows(tokens, starts[mine.clip(max=config.val_windows - 1)], config.seq_len), weights


def _windows(tokens: Tokens, starts: NDArray[np.int64], seq_len: int) -> Tensor:
    return torch.from_numpy(tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64))


def _map_tokens(config: TextConfig, name: str) -> Tokens:
    path = Path(config.path) / name
    must = "data.source=tokens needs a folder with train.bin and val.bin, 16-bit tokens in a row"
    try:
        return np.memmap(path, dtype="<u2", mode="r")
    except (OSError, ValueError) as error:  # ValueError: empty, or half a token at its end
        raise RecipeError(f"{must}; got {str(path)!r}; {error}") from error


def _split(documents: Iterable[Document], val_fraction: float) -> tuple[list[bytes], list[bytes]]:
    """Splits by a hash of the names, so that a document stays on its side whatever else is added."""
    ranked = sorted(
        (int(hashlib.sha256(name.encode()).hexdigest(), 16) / 2.0**256, name, text) for name, text in documents
    )
    if len(ranked) == 1:  # one file: its end is held out
        text = ranked[0][2]
        cut = len(text) - max(1, int(len(text) * val_fraction))
        return [text[:cut]], [text[cut:]]
    num_val = sum(place < val_fraction for place, _, _ in ranked)
    num_val = min(max(num_val, 1), len(ranked) - 1)  # neither side may be empty
    in_order = [sorted(part, key=lambda document: document[1]) for part in (ranked[num_val:], ranked[:num_val])]
    return [text for _, _, text in in_order[0]], [text for _, _, text in in_order[1]]


def _documents(config: TextConfig) -> Iterator[Document]:
    if config.source == "dataset":
        yield from _dataset_documents(config)
        return
    files = _stdlib_files() if config.source == "stdlib" else _user_files(config.path)
    num_read = 0
    for name, path in files:
        text = path.read_bytes()
        if b"\0" not in text[:_SNIFF_BYTES]:
            num_read += 1
            yield name, text
        else:
            logger.warning("left out, as it is no text: %s", path)
    require(num_read > 0, f"data.source={config.source} must lead to text files", config.path, "check data.path")


def _stdlib_files() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not _NOT_STDLIB.intersection(name.parts):
            yield name.as_posix(), path


def _user_files(pattern: str) -> Iterator[tuple[str, Path]]:
    found = sorted(Path(path) for path in glob.glob(pattern, recursive=True)) or [Path(pattern)]
    for path in found:
        require(path.exists(), "data.path must name a file, a folder or a glob pattern", pattern, "check the spelling")
        if path.is_file():
            yield path.name, path
            continue
        for below in sorted(path.rglob("*")):
            name = below.relative_to(path)
            if below.is_file() and not any(part.startswith(".") for part in name.parts):
                yield name.as_posix(), below


def _dataset_documents(config: TextConfig) -> Iterator[Document]:
    try:
        import datasets
    except ImportError as error:
        raise RecipeError(
            "data.source=dataset needs the package datasets; got none; run: pip install datasets"
        ) from error
    try:
        if Path(config.path).is_dir() and not config.subset:
            dataset: Any = datasets.load_from_disk(config.path)
        else:
            dataset = datasets.load_dataset(config.path, config.subset or None)
    except (OSError, ValueError) as error:
        message = " ".join(str(error).split())
        raise RecipeError(f"data.path must name a dataset; got {config.path!r}; {message}") from error
    if isinstance(dataset, dict):
        require(
            "train" in dataset,
            "a dataset with several parts must have a part 'train'",
            sorted(dataset),
            "save one with it",
        )
        dataset = dataset["train"]
    column, columns = config.text_column, dataset.column_names
    require(column in columns, f"data.text_column must be one of {', '.join(columns)}", column, "set data.text_column")
    for text in dataset[column]:
        # Named by what it says: a text that occurs twice is never on both sides of the split.
        yield hashlib.sha256(text.encode()).hexdigest(), text.encode()


def _tokenizer(name: str) -> tuple[Callable[[list[bytes]], Tokens], int]:
    if name == "bytes":
        return _encode_bytes, BYTE_VOCABULARY
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        message = str(error).splitlines()[0]
        raise RecipeError(
            f"data.tokenizer must be bytes, or a tokenizer's name or folder; got {name!r}; {message}"
        ) from error
    vocab_size = len(tokenizer)
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    end: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(documents: list[bytes]) -> Tokens:
        parts: list[Tokens] = [np.empty(0, dtype)]
        for first in range(0, len(documents), _BATCH_DOCUMENTS):
            texts = [text.decode(errors="replace") for text in documents[first : first + _BATCH_DOCUMENTS]]
            encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            parts += [np.array(ids + end, dtype) for ids in encoded]
        return np.concatenate(parts)

    return encode, vocab_size


def _encode_bytes(documents: list[bytes]) -> Tokens:
    separated = itertools.chain.from_iterable((text, bytes([SEPARATOR])) for text in documents)
    return np.frombuffer(b"".join(separated), dtype=np.uint8)
