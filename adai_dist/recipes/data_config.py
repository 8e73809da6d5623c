"""The section `data` of a recipe: text or labelled images, and in which batches. `data.source` decides which."""

from __future__ import annotations

from dataclasses import dataclass

from adai_dist.recipes.refusal import require, require_at_least, require_choice

TEXT_SOURCES = ("stdlib", "path", "dataset", "tokens")
IMAGE_SOURCES = ("digits", "cifar10", "cifar100")
SOURCES = TEXT_SOURCES + IMAGE_SOURCES


@dataclass
class DataConfig:
    """What text and images have in common."""

    source: str = "stdlib"
    """Where the data come from; the first four are text, the others labelled images.

    stdlib: the Python standard library's own sources. path: your files. dataset: the package `datasets`.
    tokens: `train.bin` and `val.bin`, 16-bit tokens in a row as nanoGPT writes them, read from the disk as needed.
    digits: the 1,797 scans of 8x8 pixels that scikit-learn brings. cifar10, cifar100: through the package `datasets`.
    """
    path: str = ""
    """For source=path a file, folder or glob pattern; for dataset its name or a folder of save_to_disk; for tokens the
    folder of the two files; for cifar10 and cifar100 a folder of save_to_disk, or nothing to take them from the hub."""
    batch: int = 16
    """Sequences or images per optimizer step, over all ranks."""

    def __post_init__(self) -> None:
        require_choice("data.source", self.source, SOURCES)
        require_at_least("data.batch", self.batch, 1)
        needs_path = self.source in ("path", "dataset", "tokens")
        must = f"data.source={self.source} needs data.path"
        require(bool(self.path) or not needs_path, must, self.path, "say there where the text is")
        takes_path = self.source not in ("stdlib", "digits")
        must = f"data.path has no effect with data.source={self.source}"
        require(takes_path or not self.path, must, self.path, "drop it, or change data.source")


@dataclass
class TextConfig(DataConfig):
    """Which text, as which tokens."""

    subset: str = ""
    """For source=dataset: the name of its configuration, where it has several."""
    text_column: str = "text"
    """For source=dataset: the column that holds the text."""
    tokenizer: str = "bytes"
    """bytes (vocabulary 256), or the name or folder of a transformers tokenizer; not used for source=tokens."""
    seq_len: int = 64
    """Tokens per sequence."""
    val_fraction: float = 0.05
    """Share of the files that is held out, chosen by a hash of their names; not used for source=tokens."""
    val_windows: int = 512
    """Number of held-out sequences that every evaluation reads, always the same ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, minimum in (("seq_len", 2), ("val_windows", 1)):
            require_at_least(f"data.{key}", getattr(self, key), minimum)
        share = self.val_fraction
        require(
            0 < share < 1, "data.val_fraction must be between 0 and 1", share, "0.05 holds out a twentieth of the files"
        )
        if self.source != "dataset":
            advice = "set data.source=dataset or drop it"
            require(not self.subset, f"data.subset has no effect with data.source={self.source}", self.subset, advice)


@dataclass
class ImagesConfig(DataConfig):
    """Which images, and how they are varied in training."""

    crop_padding: int = 0
    """Training images are padded by this many pixels on each side, and cut at random to their size again."""
    flip: bool = False
    """Training images are mirrored left to right at random."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("data.crop_padding", self.crop_padding, 0)


def data_schema(source: object) -> type[TextConfig | ImagesConfig]:
    """The keys that `data` may have with a source."""
    return ImagesConfig if source in IMAGE_SOURCES else TextConfig
