"""Language modelling: text as tokens, a transformers decoder with new weights, and the next-token loss.

All tokens are held in memory on every rank, except those of data.source=tokens, which are memory-mapped.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import logging
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from adai_dist.recipes.recipe import DatasetData, FilesData, RecipeError, TextData, TokensData, require, require_known
from adai_dist.recipes.task import Rows, Task, share_of_rank

logger: logging.Logger = logging.getLogger("adai_dist")

Tokens = NDArray[Any]
Document = tuple[str, bytes]
"""A name, whose hash decides the side of the split, and UTF-8 text."""

_BYTE_VOCABULARY = 256
_SEPARATOR = b"\0"  # follows every document read as bytes; text does not contain it
_TOKENIZED_AT_ONCE = 256  # documents
_SNIFFED_BYTES = 8192  # a NUL byte among the first ones means that a file is not text, as git decides it
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # their defaults belong to released vocabularies


class TokenSplits(NamedTuple):
    """The concatenated tokens of all documents, in the smallest unsigned dtype that holds the vocabulary."""

    train: Tokens
    val: Tokens
    vocab_size: int
    """Size of the vocabulary; 0 if unknown, with source=tokens."""


class LanguageTask(Task):
    """Next-token prediction with a transformers decoder."""

    unit = "token"

    def __init__(self, data: TextData, settings: Mapping[str, Any], tokens: TokenSplits) -> None:
        self._data = data
        self._settings = settings
        self._tokens = tokens
        self.units_per_step: int = data.batch * data.seq_len

    def build_model(self, seed: int) -> nn.Module:
        vocab_size = self._tokens.vocab_size or self._settings.get("vocab_size", 0)
        require(vocab_size > 0, "data.source=tokens needs model.vocab_size", None, "set it to that of the tokenizer")
        return build_decoder(self._settings, vocab_size, self._data.seq_len, seed)

    def train_rows(self, seed: int, step: int, rank: int, num_ranks: int) -> Rows:
        batch, seq_len, tokens = self._data.batch, self._data.seq_len, self._tokens.train
        starts = np.random.default_rng((seed, step)).integers(0, len(tokens) - seq_len, size=batch)
        num_rows = batch // num_ranks
        return (_windows(tokens, starts[rank * num_rows : (rank + 1) * num_rows], seq_len),)

    def val_rows(self, rank: int, num_ranks: int) -> tuple[Rows, Tensor]:
        tokens, seq_len, num_windows = self._tokens.val, self._data.seq_len, self._data.val_windows
        starts = np.linspace(0, len(tokens) - seq_len - 1, num_windows).astype(np.int64)
        mine, weights = share_of_rank(num_windows, rank, num_ranks)
        return (_windows(tokens, starts[mine], seq_len),), weights

    def losses(self, model: nn.Module, rows: Rows) -> Tensor:
        (windows,) = rows  # int64, shape (rows, seq_len + 1)
        inputs, targets = windows[:, :-1], windows[:, 1:]
        logits: Tensor = model(input_ids=inputs, use_cache=False).logits
        losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(targets.shape).mean(dim=1)


def build_decoder(settings: Mapping[str, Any], vocab_size: int, seq_len: int, seed: int) -> nn.Module:
    """Build a decoder from `model` of a recipe, for text in which ``vocab_size`` tokens occur."""
    given = dict(settings)
    architecture = str(given.pop("architecture"))
    try:
        defaults: Any = AutoConfig.for_model(architecture)
    except ValueError as error:
        must = "model.architecture must be a model_type of transformers"
        raise RecipeError(f"{must}; got {architecture!r}; llama, gpt2 and qwen3 are some") from error
    valid = {*defaults.to_dict(), *defaults.attribute_map} - {"transformers_version", "model_type", "architectures"}
    require_known("model.", given, sorted(valid), f"for {architecture}")
    given = {**dict.fromkeys(_TOKEN_IDS), "vocab_size": vocab_size, **given}
    must = f"model.vocab_size must be at least {vocab_size}"
    require(int(given["vocab_size"] or 0) >= vocab_size, must, given["vocab_size"], "drop it")
    torch.manual_seed(seed)
    try:
        config: Any = AutoConfig.for_model(architecture, **given)
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # many classes, all about the settings
        must, reason = f"model must describe a {architecture} decoder", " ".join(str(error).split())
        raise RecipeError(f"{must}; got {dict(settings)}; {reason}") from error
    positions = getattr(config, "max_position_embeddings", seq_len)
    must = f"the model must have at least data.seq_len={seq_len} positions"
    require(positions >= seq_len, must, positions, "raise it in model")
    return model


def load_tokens(data: TextData) -> TokenSplits:
    """Read the text that the recipe names, tokenise it and split it by document. See :func:`load_task`."""
    if isinstance(data, TokensData):
        splits = TokenSplits(_memory_map(data, "train.bin"), _memory_map(data, "val.bin"), 0)
    else:
        encode, vocab_size = _tokenizer(data.tokenizer)
        train, val = _split(_documents(data), data.val_fraction)
        splits = TokenSplits(encode(train), encode(val), vocab_size)
    for name, tokens in (("training", splits.train), ("held-out", splits.val)):
        must = f"the {name} text must be longer than data.seq_len={data.seq_len}"
        advice = "give more text, a shorter data.seq_len or another data.val_fraction"
        require(len(tokens) > data.seq_len, must, f"{len(tokens)} tokens", advice)
    return splits


def _windows(tokens: Tokens, starts: NDArray[np.int64], seq_len: int) -> Tensor:
    return torch.from_numpy(tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64))


def _memory_map(data: TokensData, name: str) -> Tokens:
    path = Path(data.path) / name
    must = "data.source=tokens needs a folder with train.bin and val.bin, 16-bit tokens in a row"
    try:
        return np.memmap(path, dtype="<u2", mode="r")
    except (OSError, ValueError) as error:  # ValueError: empty, or half a token at its end
        raise RecipeError(f"{must}; got {str(path)!r}; {error}") from error


def _split(documents: Iterable[Document], val_fraction: float) -> tuple[list[bytes], list[bytes]]:
    """Split by a hash of the names, so that a document stays on its side when others are added."""
    ranked = sorted(
        (int(hashlib.sha256(name.encode()).hexdigest(), 16) / 2.0**256, name, text) for name, text in documents
    )
    if len(ranked) == 1:  # hold out the end of a single file
        text = ranked[0][2]
        cut = len(text) - max(1, int(len(text) * val_fraction))
        return [text[:cut]], [text[cut:]]
    num_val = sum(place < val_fraction for place, _, _ in ranked)
    num_val = min(max(num_val, 1), len(ranked) - 1)  # neither side may be empty
    parts = (ranked[num_val:], ranked[:num_val])
    train, val = ([text for _, text in sorted((name, text) for _, name, text in part)] for part in parts)
    return train, val


def _documents(data: TextData) -> Iterator[Document]:
    if isinstance(data, DatasetData):
        yield from _dataset_documents(data)
        return
    path = data.path if isinstance(data, FilesData) else ""
    num_read = 0
    for name, file in _files(path) if path else _stdlib_files():
        text = file.read_bytes()
        if b"\0" not in text[:_SNIFFED_BYTES]:
            num_read += 1
            yield name, text
        else:
            logger.warning("skipped a file that is not text: %s", file)
    require(num_read > 0, f"data.source={data.source} must lead to text files", path, "check data.path")


def _stdlib_files() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not _NOT_STDLIB.intersection(name.parts):
            yield name.as_posix(), path


def _files(pattern: str) -> Iterator[tuple[str, Path]]:
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


def _dataset_documents(data: DatasetData) -> Iterator[Document]:
    try:
        import datasets
    except ImportError as error:
        must = "data.source=dataset needs the package datasets"
        raise RecipeError(f"{must}; got none; run: pip install datasets") from error
    try:
        if Path(data.path).is_dir() and not data.subset:
            dataset: Any = datasets.load_from_disk(data.path)
        else:
            dataset = datasets.load_dataset(data.path, data.subset or None)
    except (OSError, ValueError) as error:
        message = " ".join(str(error).split())
        raise RecipeError(f"data.path must name a dataset; got {data.path!r}; {message}") from error
    if isinstance(dataset, dict):
        must = "a dataset with several splits must have a split 'train'"
        require("train" in dataset, must, sorted(dataset), "save one with it")
        dataset = dataset["train"]
    column, columns = data.text_column, dataset.column_names
    require(column in columns, f"data.text_column must be one of {', '.join(columns)}", column, "set data.text_column")
    for text in dataset[column]:
        # Named after its content: a text that occurs twice is never on both sides of the split.
        yield hashlib.sha256(text.encode()).hexdigest(), text.encode()


def _tokenizer(name: str) -> tuple[Callable[[list[bytes]], Tokens], int]:
    if name == "bytes":
        return _encode_bytes, _BYTE_VOCABULARY
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        must = "data.tokenizer must be bytes, or a tokenizer's name or folder"
        raise RecipeError(f"{must}; got {name!r}; {str(error).splitlines()[0]}") from error
    vocab_size = len(tokenizer)
    dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
    end: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(documents: list[bytes]) -> Tokens:
        parts: list[Tokens] = [np.empty(0, dtype)]
        for first in range(0, len(documents), _TOKENIZED_AT_ONCE):
            texts = [text.decode(errors="replace") for text in documents[first : first + _TOKENIZED_AT_ONCE]]
            encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            parts += [np.array(ids + end, dtype) for ids in encoded]
        return np.concatenate(parts)

    return encode, vocab_size


def _encode_bytes(documents: list[bytes]) -> Tokens:
    separated = itertools.chain.from_iterable((text, _SEPARATOR) for text in documents)
    return np.frombuffer(b"".join(separated), dtype=np.uint8)
