"""Wikipedia by topic, as ``sgtm_topics.py --data FOLDER`` reads it: ORES' topics, packed sequences, test articles.

    python recipes/prepare_wikipedia.py --topics topicsForAllWikipediaPages2020-08-24.csv --out data/wikipedia
    python recipes/prepare_wikipedia.py --topics topics.csv --out data/military \\
        --forget "[History_and_Society.Military_and_warfare]" --adjacent "[History_and_Society.History]"

What the corpus holds is in ``data.html`` and ``data.json`` of the folder.
The topics are at https://analytics.wikimedia.org/published/datasets/topics/. Articles stream from the hub or from local
files; memory stays constant. An index of the topics is kept beside them.
"""

from __future__ import annotations

from pathlib import Path

from gradsurgery.data import Explorer, TopicIndex, prepare_articles, stream_articles
from gradsurgery.data.articles import ADJACENT, FORGET
from gradsurgery.evaluation import table
from gradsurgery.runs import build_tokenizer, ending_in_a_sentence
from gradsurgery.runs.exploration import write_exploration


def main(
    topics: str,
    out: str,
    articles: str = "hub:wikimedia/wikipedia:20231101.en",
    tokenizer: str = "gpt2",
    context: int = 1024,
    forget: list[str] = list(FORGET),  # noqa: B006
    adjacent: list[str] = list(ADJACENT),  # noqa: B006
    test_articles: int = 5000,
    wiki: str = "enwiki",
    columns: list[str] | None = None,
    limit: int | None = None,
) -> None:
    """Prepare articles.

    Args:
        topics: ORES' dump of topics, a CSV, also .gz or .bz2.
        out: Folder to be written.
        articles: "hub:owner/name:configuration", a .jsonl file, or a folder.
        tokenizer: "embedded", or a name or folder for AutoTokenizer.
        context: Tokens of a sequence.
        forget: Topics to be removed.
        adjacent: Topics close to them.
        test_articles: Held back from each category.
        wiki: Whose pages of the dump.
        columns: The dump's columns in their order, where it has no header and is not in the usual one.
        limit: Articles to read, for a quick look.
    """
    index = topic_index(Path(topics), wiki, columns)
    explorer = Explorer(repeats=False)  # repeated articles are left out below
    made = prepare_articles(
        stream_articles(articles),
        index,
        out,
        build_tokenizer(tokenizer, {}),
        context=context,
        forget=forget,
        adjacent=adjacent,
        test_articles=test_articles,
        limit=limit,
        explorer=explorer,
    )
    read = {"articles": articles, "topics": topics, "tokenizer": tokenizer, "limit": limit}
    page = write_exploration(out, explorer.result(), "Articles by topic", read)
    print(table([{"category": name, "role": role} for name, role in made.about["categories"].items()]))
    counted = ("articles", "sequences")
    print(table([{"side": s, **{n: made.about[n][s] for n in counted}} for s in ("train", "test")]))
    print(f"without a topic: {made.about['without_topic']:,}; repeated: {made.about['repeated']:,}\n{page}")


def topic_index(dump: Path, wiki: str, columns: list[str] | None) -> TopicIndex:
    """The index beside the dump, made where there is none or the dump is newer."""
    path = dump.with_name(f"{dump.name}.{wiki}.index")
    if path.is_file() and dump.is_file() and path.stat().st_mtime >= dump.stat().st_mtime:
        return TopicIndex(path)
    return TopicIndex.build(dump, path, wiki=wiki, columns=columns)


if __name__ == "__main__":
    import jsonargparse

    with ending_in_a_sentence():
        jsonargparse.auto_cli(main, as_positional=False)
