"""Language modelling: the next token."""

from __future__ import annotations

from torch import Tensor, nn

from adai_dist.recipes.config import Recipe
from adai_dist.recipes.data_config import TextConfig
from adai_dist.recipes.model import build_model, row_losses
from adai_dist.recipes.refusal import require
from adai_dist.recipes.task import Rows, Task
from adai_dist.recipes.text import load_tokens, train_rows, val_rows


class LanguageTask(Task):
    """A decoder of transformers, trained to predict the next token."""

    unit = "token"

    def __init__(self, recipe: Recipe, data: TextConfig) -> None:
        self.units_per_step: int = data.batch * data.seq_len
        self._data = data
        self._settings = recipe.model
        self._tokens = load_tokens(data)

    def build_model(self, seed: int) -> nn.Module:
        vocab_size = self._tokens.vocab_size or self._settings.get("vocab_size", 0)
        require(vocab_size > 0, "data.source=tokens needs model.vocab_size", None, "set it to that of the tokenizer")
        return build_model(self._settings, vocab_size, self._data.seq_len, seed)

    def train_rows(self, seed: int, step: int, rank: int, num_ranks: int) -> Rows:
        return (train_rows(self._tokens.train, self._data, seed, step, rank, num_ranks),)

    def val_rows(self, rank: int, num_ranks: int) -> tuple[Rows, Tensor]:
        windows, weights = val_rows(self._tokens.val, self._data, rank, num_ranks)
        return (windows,), weights

    def losses(self, model: nn.Module, rows: Rows) -> Tensor:
        return row_losses(model, *rows)

    def scores(self, model: nn.Module, rows: Rows) -> dict[str, Tensor]:
        return {"loss": self.losses(model, rows)}
