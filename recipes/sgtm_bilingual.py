"""Remove a language: SGTM on English and Spanish text, against plain training and a data filter.

Three models see the same batches. ``plain`` trains on everything, ``data_filter`` leaves out the rows that are labelled
forget, ``sgtm`` trains dedicated heads and neurons on them, which are removed afterwards (arXiv 2512.05648, section 4).

    python recipes/sgtm_bilingual.py
    python recipes/sgtm_bilingual.py --seed 1 --labels.undiscovered 0.1
    torchrun --nproc-per-node 2 recipes/sgtm_bilingual.py --config recipes/configs/sgtm_bilingual/tinystories_64m.yaml
"""

from __future__ import annotations

from gradsurgery import data
from gradsurgery.runs import build_tokenizer, ending_in_a_sentence
from gradsurgery.runs.exploration import exploration
from gradsurgery.runs.removal import RemovalConfig
from gradsurgery.runs.removal_models import build_method, build_model
from gradsurgery.runs.removal_recipe import run_removal
from gradsurgery.runs.removal_run import RemovalData

__all__ = ["Config", "build_method", "build_model", "load_data", "main"]


Config = RemovalConfig


def load_data(config: Config) -> RemovalData:
    """Tokenizer, labelled training rows, held-back sequences by category."""
    text, labels = config.text, config.labels
    corpus = data.without_repeats(data.load_bilingual(config.data, validation=text.validation, limit=text.limit))
    tokenizer = build_tokenizer(text.tokenizer, corpus)
    shape = {"context": config.model.context, "end_of_text": tokenizer.eos_token_id}
    tokens = {"train": data.tokenize(corpus, tokenizer), "validation": data.tokenize(corpus, tokenizer, "validation")}
    rows = data.build_rows(
        tokens["train"],
        **shape,
        forget=text.forget,
        adjacent=text.adjacent,
        noise=labels.noise(),
        retain_retain=labels.retain,
        adjacent_retain=labels.adjacent,
        seed=config.seed,
    )
    forget = [text.forget] if isinstance(text.forget, str) else text.forget
    rest = [name for name in rows.categories if name not in (*forget, *text.adjacent)]
    held_back = data.pack_categories(tokens["validation"], **shape)
    roles = {"forget": forget, "adjacent": text.adjacent, "retain": rest}
    return RemovalData.of(tokenizer, rows, held_back, roles, config, exploration(corpus, tokens))


def main(config: Config) -> None:
    run_removal(config, load_data, "Removing a language with selective gradient masking")


if __name__ == "__main__":
    import jsonargparse

    with ending_in_a_sentence():
        main(jsonargparse.auto_cli(Config, as_positional=False))
