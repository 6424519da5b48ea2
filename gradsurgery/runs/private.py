"""The configuration of a private finetune, and the variants that it is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

from gradsurgery.runs.config import TrainConfig


@dataclass
class GuessConfig:
    """Who else tries the finetuned model.

    Args:
        count: Random keys of the key's size, and as many random parts of the key.
        known: Share of the key's swaps that such a part has.
        draws: Draws at each point of the curves over parts of the key and over keys with mistakes; 0 for none.
    """

    count: int = 5
    known: float = 0.5
    draws: int = 3


@dataclass
class PrivateConfig:
    """A private finetune.

    Args:
        model: Stock checkpoint (folder or hub name) to finetune.
        key: Its key file, or one for each stage.
        data: "embedded", "hub:owner/name", or a local file or folder.
        private: Private categories, one a stage; stage k trains key k. "es:bible" takes a part of a category.
        public: Categories that the public tier is held to.
        rows: Sequences of a batch of each stream.
        context: Tokens of a sequence.
        validation: Share of the documents held back.
        limit: Documents a category, for a quick look.
        test_rows: Sequences a category in the final evaluation.
        kl_weight: Weight of the divergence of C1; the private loss has the rest.
        l2: Decoupled decay of keyed entries, per unit of learning rate.
        anchors: Hold tiers of earlier stages to what they were, too.
        decoys: Partial keys that are held to what they opened before, one a step; the originals have none.
        decoy_weight: Weight of their divergence.
        decoy_fraction: Share of the key's swaps that each of them has.
        variants: What is trained: "keyed", the method; "no_decoys", as the originals do it; "no_kl", without the
            divergence of C1; "not_permuted", keyed entries where they stand in C1; "lora", adapters with as many
            entries; "extract_public" and "extract_random_key", somebody without the key who has the private data, and
            trains as many entries of the finished "keyed" model in C1 or under a key of their own; "extract_before",
            the same in C1 of the model before it was finetuned.
        extract_steps: Steps of the "extract_…" variants; by default those of the training.
        guesses: Who else tries the finetuned model.
        train: How is trained.
    """

    model: str | None = None
    key: str | list[str] | None = None
    data: str = "embedded"
    private: list[str] = field(default_factory=lambda: ["es"])
    public: list[str] = field(default_factory=lambda: ["en"])
    rows: dict[str, int] = field(default_factory=lambda: {"private": 8, "public": 8})
    context: int = 64
    validation: float = 0.05
    limit: int | None = None
    test_rows: int = 400
    kl_weight: float = 0.2
    l2: float = 0.0
    anchors: bool = True
    decoys: int = 24
    decoy_weight: float = 0.3
    decoy_fraction: float = 0.5
    variants: list[str] = field(default_factory=lambda: ["keyed", "no_kl"])
    extract_steps: int | None = None
    guesses: GuessConfig = field(default_factory=GuessConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1000, max_grad_norm=1.0))
    seed: int = 0
    out: str = "runs/private_finetune"
    name: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Variant:
    """What is trained.

    Args:
        kl: With the divergence of C1.
        decoys: With those of partial keys.
        permute: In C2, or with the same entries in C1.
        own_key: Entries of a key that somebody without the key drew.
        adapters: Adapters instead of entries.
        after: Variant whose finished model it starts from.
    """

    kl: bool = True
    decoys: bool = False
    permute: bool = True
    own_key: bool = False
    adapters: bool = False
    after: str | None = None


VARIANTS = {
    "keyed": Variant(decoys=True),
    "no_decoys": Variant(),
    "no_kl": Variant(kl=False, decoys=True),
    "not_permuted": Variant(permute=False),
    "lora": Variant(adapters=True),
    "extract_public": Variant(kl=False, permute=False, own_key=True, after="keyed"),
    "extract_random_key": Variant(kl=False, own_key=True, after="keyed"),
    "extract_before": Variant(kl=False, permute=False, own_key=True),
}
