"""Language modelling: batches are a pure function of seed and step, and decoders are built from their configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from adai_dist.recipes.engines import repeated_blocks
from adai_dist.recipes.language import LanguageTask, TokenSplits, build_decoder, load_tokens
from adai_dist.recipes.recipe import (
    DatasetData,
    FilesData,
    RecipeError,
    StdlibData,
    TextData,
    TokensData,
    load_recipe,
)
from tests.recipe_runs import ROOT, WORDS, write_text

DATA = StdlibData(seq_len=8, batch=12, val_windows=7)
TOKENS = np.arange(200, dtype=np.uint8)
SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def task(tokens: np.ndarray = TOKENS, data: TextData = DATA) -> LanguageTask:
    return LanguageTask(data, {}, TokenSplits(tokens, tokens, 256))


def train_rows(seed: int, step: int, rank: int = 0, num_ranks: int = 1, tokens: np.ndarray = TOKENS) -> torch.Tensor:
    (rows,) = task(tokens).train_rows(seed, step, rank, num_ranks)
    return rows


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_the_rows_of_all_ranks_together_are_those_of_a_single_rank(num_ranks: int) -> None:
    whole = train_rows(1, 5)
    parts = [train_rows(1, 5, rank, num_ranks) for rank in range(num_ranks)]
    assert whole.shape == (12, 9)
    assert torch.equal(torch.cat(parts), whole)


def test_batches_depend_on_seed_and_step_alone() -> None:
    rows = [train_rows(seed, step) for seed, step in ((1, 5), (1, 6), (2, 5), (1, 5))]
    assert torch.equal(rows[0], rows[3])
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_every_token_can_be_a_target() -> None:
    rows = torch.cat([train_rows(0, step, tokens=TOKENS[:20]) for step in range(40)])
    assert set(rows[:, 1:].unique().tolist()) == set(range(1, 20))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_evaluation_windows_are_the_same_for_every_number_of_ranks(num_ranks: int) -> None:
    shares = [task().val_rows(rank, num_ranks) for rank in range(num_ranks)]
    assert len({rows.shape for (rows,), _ in shares}) == 1, "ranks must evaluate equally many windows"
    counted = torch.cat([rows[weights > 0] for (rows,), weights in shares])
    assert counted[:, 0].tolist() == [0, 31, 63, 95, 127, 159, 191]
    assert sum(float(weights.sum()) for _, weights in shares) == 7


def test_the_standard_library_is_read_without_tests_and_installed_packages() -> None:
    tokens = load_tokens(StdlibData())
    text = tokens.train.tobytes()
    assert tokens.vocab_size == 256
    assert len(text) > 4_000_000
    assert 0.01 < len(tokens.val) / len(text) < 0.2
    assert b"class JSONDecoder" in text + tokens.val.tobytes()
    assert b"class TestCase(object):" in text + tokens.val.tobytes(), "the module unittest is not a test"
    assert b"def test_json_decoder" not in text
    assert b"import transformers" not in text


def test_a_file_stays_on_its_side_of_the_split_when_others_are_added(tmp_path: Path) -> None:
    folder = write_text(tmp_path / "text", num_files=30, num_words=9)
    config = FilesData(source="path", path=str(folder), seq_len=8, val_fraction=0.3)
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


def test_files_are_found_by_folder_pattern_or_name_and_binary_ones_are_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.txt", "b.txt", "c.md", ".hidden"):
        (tmp_path / name).write_text(name * 20)
    (tmp_path / "binary.bin").write_bytes(b"\x7fELF\0\0" * 20)

    def read(path: Path | str) -> bytes:
        tokens = load_tokens(FilesData(source="path", path=str(path), seq_len=4))
        return tokens.train.tobytes() + tokens.val.tobytes()

    folder = read(tmp_path)
    assert all(name in folder for name in (b"a.txt", b"b.txt", b"c.md"))
    assert b".hidden" not in folder
    assert b"ELF" not in folder
    assert "binary.bin" in caplog.text
    assert b"c.md" not in read(tmp_path / "*.txt")
    one = load_tokens(FilesData(source="path", path=str(tmp_path / "a.txt"), seq_len=4))
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

    config = DatasetData(
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
        load_tokens(DatasetData(source="dataset", path=config.path))


SCHEMAS = {"stdlib": StdlibData, "path": FilesData, "dataset": DatasetData}


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
def test_unavailable_text_is_refused_in_one_line(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    filled = {key: str(tmp_path) if value == "{}" else value for key, value in settings.items()}
    with pytest.raises(RecipeError, match=message) as caught:
        load_tokens(SCHEMAS[settings.get("source", "stdlib")](**filled))
    assert "\n" not in str(caught.value)


def test_token_files_of_nanogpt_are_memory_mapped(tmp_path: Path) -> None:
    for name, num in (("train.bin", 100), ("val.bin", 40)):
        np.arange(num, dtype="<u2").tofile(tmp_path / name)
    config = TokensData(source="tokens", path=str(tmp_path), seq_len=8, batch=4)
    splits = load_tokens(config)
    assert isinstance(splits.train, np.memmap)
    assert splits.train.tolist() == list(range(100))
    assert len(splits.val) == 40
    (rows,) = task(splits.train, config).train_rows(0, 0, 0, 1)
    assert torch.equal(rows - rows[:, :1], torch.arange(9).expand(4, 9))


def test_missing_and_malformed_token_files_are_refused(tmp_path: Path) -> None:
    config = TokensData(source="tokens", path=str(tmp_path), seq_len=8)
    with pytest.raises(RecipeError, match=r"needs a folder with train.bin and val.bin, .*; got '.*train.bin'; "):
        load_tokens(config)
    (tmp_path / "train.bin").write_bytes(b"abc")
    with pytest.raises(RecipeError, match=r"got '.*train.bin'; "):
        load_tokens(config)


def test_weights_depend_on_the_seed_alone() -> None:
    models = [build_decoder({"architecture": "gpt2", **SMALL}, 256, 8, seed) for seed in (1, 1, 2)]
    parameters = [nn.utils.parameters_to_vector(model.parameters()) for model in models]
    assert torch.equal(parameters[0], parameters[1])
    assert not torch.equal(parameters[0], parameters[2])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_blocks_are_found_and_the_initial_loss_is_that_of_a_uniform_guess(architecture: str) -> None:
    model = build_decoder({"architecture": architecture, **SMALL, "vocab_size": 300}, 256, 8, seed=0).eval()
    assert len(repeated_blocks(model)) == 3
    losses = task().scores(model, (torch.randint(0, 256, (5, 9)),))["loss"]
    assert losses.shape == (5,)
    assert losses.mean().item() == pytest.approx(torch.tensor(300.0).log().item(), abs=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architecture": "camel"}, "model.architecture must be a model_type of transformers; got 'camel'"),
        (
            {"architecture": "llama", "hiden_size": 8},
            "unknown key 'model.hiden_size' for llama; did you mean 'model.hidden_size'. valid keys are ",
        ),
        pytest.param(
            {"architecture": "llama", "hidden_size": "wide"},
            "model must describe a llama decoder; got .*'wide'",
            id="wrong type",
        ),
        pytest.param(
            {"architecture": "llama", "hidden_size": 15, "num_attention_heads": 2},
            "model must describe a llama decoder; got ",
            id="indivisible",
        ),
        ({"architecture": "gpt2", **SMALL, "vocab_size": 100}, "model.vocab_size must be at least 256; got 100"),
        ({"architecture": "gpt2", **SMALL, "n_positions": 4}, "must have at least data.seq_len=8 positions; got 4"),
        ({"architecture": "vit"}, "model must describe a vit decoder; got "),
    ],
)
def test_an_impossible_model_is_refused_in_one_line(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        build_decoder(settings, 256, 8, seed=0)
    assert "\n" not in str(caught.value)


def test_the_recipe_lm_1b_has_over_a_billion_parameters() -> None:
    recipe = load_recipe(ROOT / "configs" / "recipes" / "lm_1b.yaml")
    with torch.device("meta"):
        model = build_decoder(recipe.model, recipe.model["vocab_size"], 1024, recipe.run.seed)
    assert sum(param.numel() for param in model.parameters()) == 1_175_021_568
    assert len(repeated_blocks(model)) == 22
