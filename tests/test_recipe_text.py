"""Text, tokens and batches: a pure function of seed and step, the same for every number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from adai_dist.recipes.data_config import TextConfig
from adai_dist.recipes.refusal import RecipeError
from adai_dist.recipes.text import load_tokens, train_rows, val_rows
from tests.recipe_runs import WORDS, write_text

CONFIG = TextConfig(seq_len=8, batch=12, val_windows=7)
TOKENS = np.arange(200, dtype=np.uint8)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_the_rows_of_all_ranks_are_those_of_one(num_ranks: int) -> None:
    whole = train_rows(TOKENS, CONFIG, seed=1, step=5, rank=0, num_ranks=1)
    parts = [train_rows(TOKENS, CONFIG, seed=1, step=5, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    assert whole.shape == (12, 9)
    assert torch.equal(torch.cat(parts), whole)


def test_batches_differ_by_step_and_by_seed_and_by_nothing_else() -> None:
    rows = [train_rows(TOKENS, CONFIG, seed, step, 0, 1) for seed, step in ((1, 5), (1, 6), (2, 5), (1, 5))]
    assert torch.equal(rows[0], rows[3])
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_every_token_can_be_a_target() -> None:
    rows = torch.cat([train_rows(TOKENS[:20], CONFIG, 0, step, 0, 1) for step in range(40)])
    assert set(rows[:, 1:].unique().tolist()) == set(range(1, 20))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_evaluation_windows_are_the_same_ones_for_every_number_of_ranks(num_ranks: int) -> None:
    shares = [val_rows(TOKENS, CONFIG, rank, num_ranks) for rank in range(num_ranks)]
    assert len({rows.shape for rows, _ in shares}) == 1, "ranks that evaluate less would leave the others waiting"
    counted = torch.cat([rows[weights > 0] for rows, weights in shares])
    assert counted[:, 0].tolist() == [0, 31, 63, 95, 127, 159, 191]
    assert sum(float(weights.sum()) for _, weights in shares) == 7


def test_the_standard_library_is_read_without_tests_and_installed_packages() -> None:
    tokens = load_tokens(TextConfig())
    text = tokens.train.tobytes()
    assert tokens.vocab_size == 256
    assert len(text) > 4_000_000
    assert 0.01 < len(tokens.val) / len(text) < 0.2
    assert b"class JSONDecoder" in text + tokens.val.tobytes()
    assert b"class TestCase(object):" in text + tokens.val.tobytes(), "unittest is a library"
    assert b"def test_json_decoder" not in text
    assert b"import transformers" not in text


def test_a_file_stays_on_its_side_of_the_split_when_others_come(tmp_path: Path) -> None:
    folder = write_text(tmp_path / "text", num_files=30, num_words=9)
    config = TextConfig(source="path", path=str(folder), seq_len=8, val_fraction=0.3)
    before = load_tokens(config)
    (folder / "another.txt").write_text("something else altogether")
    (folder / "deeper").mkdir()
    (folder / "deeper" / "more.txt").write_text("and this")
    after = load_tokens(config)
    for name in ("train", "val"):
        old = set(getattr(before, name).tobytes().split(b"\0"))
        assert old <= set(getattr(after, name).tobytes().split(b"\0"))
        assert len(old) > 3
    both = b"\0".join([after.train.tobytes(), after.val.tobytes()])
    assert b"something else altogether" in both
    assert b"and this" in both


def test_files_are_found_by_folder_pattern_and_name_and_binary_ones_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.txt", "b.txt", "c.md", ".hidden"):
        (tmp_path / name).write_text(name * 20)
    (tmp_path / "binary.bin").write_bytes(b"\x7fELF\0\0" * 20)

    def read(path: Path | str) -> bytes:
        tokens = load_tokens(TextConfig(source="path", path=str(path), seq_len=4))
        return tokens.train.tobytes() + tokens.val.tobytes()

    folder = read(tmp_path)
    assert all(name in folder for name in (b"a.txt", b"b.txt", b"c.md"))
    assert b".hidden" not in folder
    assert b"ELF" not in folder
    assert "binary.bin" in caplog.text
    assert b"c.md" not in read(tmp_path / "*.txt")
    one = load_tokens(TextConfig(source="path", path=str(tmp_path / "a.txt"), seq_len=4))
    assert (one.train.tobytes() + one.val.tobytes()).replace(b"\0", b"") == b"a.txt" * 20, (
        "the end of the only file is held out"
    )


def test_a_dataset_on_disk_and_a_tokenizer_folder_are_read_offline(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(("<end>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(tmp_path / "tokenizer")
    texts = [f"{WORDS[i % 5]} {WORDS[i % 7]} {WORDS[i % 11]}" for i in range(60)]
    datasets.Dataset.from_dict({"body": texts}).save_to_disk(tmp_path / "dataset")

    config = TextConfig(
        source="dataset",
        path=str(tmp_path / "dataset"),
        text_column="body",
        tokenizer=str(tmp_path / "tokenizer"),
        seq_len=4,
        val_fraction=0.2,
    )
    tokens = load_tokens(config)
    assert tokens.vocab_size == len(vocabulary)
    words = {index: word for word, index in vocabulary.items()}
    read = " ".join(words[index] for index in [*tokens.train, *tokens.val])
    assert sorted(read.removesuffix(" <end>").split(" <end> ")) == sorted(texts)
    assert 0.05 < len(tokens.val) / (60 * 4) < 0.4
    with pytest.raises(RecipeError, match=r"data.text_column must be one of body; got 'text'"):
        load_tokens(TextConfig(source="dataset", path=config.path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"source": "path", "path": "nowhere"},
            "data.path must name a file, a folder or a glob pattern; got 'nowhere'",
        ),
        ({"source": "path", "path": "{}"}, "data.source=path must lead to text files; got "),
        ({"seq_len": 100_000_000}, "the training text must be longer than data.seq_len=100000000; got"),
        ({"tokenizer": "{}"}, "data.tokenizer must be bytes, or a tokenizer's name or folder; got "),
        ({"source": "dataset", "path": "{}"}, "data.path must name a dataset; got "),
    ],
)
def test_text_that_cannot_be_had_is_refused_in_one_line(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    filled = {key: str(tmp_path) if value == "{}" else value for key, value in settings.items()}
    with pytest.raises(RecipeError, match=message) as caught:
        load_tokens(TextConfig(**filled))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_tokens_are_read_from_the_files_of_nanogpt_without_being_loaded(tmp_path: Path) -> None:
    for name, num in (("train.bin", 100), ("val.bin", 40)):
        np.arange(num, dtype="<u2").tofile(tmp_path / name)
    config = TextConfig(source="tokens", path=str(tmp_path), seq_len=8, batch=4)
    splits = load_tokens(config)
    assert isinstance(splits.train, np.memmap)
    assert splits.train.tolist() == list(range(100))
    assert len(splits.val) == 40
    rows = train_rows(splits.train, config, 0, 0, 0, 1)
    assert torch.equal(rows - rows[:, :1], torch.arange(9).expand(4, 9))


def test_tokens_that_are_not_there_are_refused(tmp_path: Path) -> None:
    config = TextConfig(source="tokens", path=str(tmp_path), seq_len=8)
    with pytest.raises(RecipeError, match=r"needs a folder with train.bin and val.bin, .*; got '.*train.bin'; "):
        load_tokens(config)
    (tmp_path / "train.bin").write_bytes(b"abc")
    with pytest.raises(RecipeError, match=r"got '.*train.bin'; "):
        load_tokens(config)
    with pytest.raises(RecipeError, match=r"data.source=tokens needs data.path; got ''"):
        TextConfig(source="tokens")
