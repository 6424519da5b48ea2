"""One prompt, every tier side by side: C1, the model as it is, and C2 under the key; stock ``generate``.

python recipes/tiered_inference.py --prompt "En el principio"
python recipes/tiered_inference.py --model path/or/name --key key.json --prompt "Once upon a time" --do_sample true
"""

from __future__ import annotations

import json
import sys
import textwrap
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed

import gradsurgery as gs
from gradsurgery.errors import ArtefactError, PlanError
from gradsurgery.runs import ending_in_a_sentence


@dataclass
class Config:
    """What to generate.

    Args:
        model: Stock checkpoint, a folder or hub name; by default the newest of ``private_finetune.py``.
        key: Its key file, or several for tiers C2, C3, …; by default that of the newest run.
        prompt: Text to continue, or several.
        max_new_tokens: Tokens to add.
        do_sample: Sample, instead of taking the likeliest token.
        temperature: Of sampling.
        top_p: Sample from the likeliest tokens that make up this share.
        top_k: Sample from this many likeliest tokens; 0 for all.
        num_return_sequences: Continuations of each tier.
        seed: Of sampling; every tier starts from it.
        bf16: Load the weights in bf16.
        width: Columns of each tier on the screen.
        out: Write prompts and continuations to this JSON file.
    """

    model: str | None = None
    key: str | list[str] | None = None
    prompt: str | list[str] = field(default_factory=lambda: ["In the beginning", "En el principio"])
    max_new_tokens: int = 40
    do_sample: bool = False
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    num_return_sequences: int = 1
    seed: int = 0
    bf16: bool = False
    width: int = 56
    out: str | None = None


def newest_run(folder: str = "runs/private_finetune") -> tuple[str, list[str]]:
    """The model of the finetuning run that finished last, and its keys."""
    done = [path for path in Path(folder).glob("*/key_files.json") if (path.parent / "models/keyed").is_dir()]
    if not done:
        raise ArtefactError(f"{folder} holds no finished run: run recipes/private_finetune.py, or give model and key.")
    newest = max(done, key=lambda path: path.stat().st_mtime)
    return str(newest.parent / "models/keyed"), json.loads(newest.read_text(encoding="utf-8"))


def sampling(config: Config) -> dict[str, Any]:
    """Arguments of ``generate``."""
    out: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "do_sample": config.do_sample}
    if config.do_sample:
        out |= {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
        out["num_return_sequences"] = config.num_return_sequences
    elif config.num_return_sequences > 1:
        raise PlanError(f"num_return_sequences={config.num_return_sequences} needs do_sample: all would be the same.")
    return out


@torch.no_grad()
def generate(model: PreTrainedModel, tokenizer: Any, prompt: str, config: Config) -> list[str]:
    """Continuations of a prompt in the model's present configuration."""
    set_seed(config.seed)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    ids = model.generate(**inputs, **sampling(config), pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def side_by_side(columns: dict[str, list[str]], width: int) -> str:
    """Continuations under the names of their tiers, wrapped to ``width``."""
    lines = ["  ".join(f"{tier:<{width}}" for tier in columns), "  ".join("-" * width for _ in columns)]
    for texts in zip(*columns.values(), strict=True):
        wrapped = [textwrap.wrap(" ".join(text.split()), width) or ["(nothing)"] for text in texts]
        for k in range(max(map(len, wrapped))):
            lines.append("  ".join(f"{part[k] if k < len(part) else '':<{width}}" for part in wrapped))
        lines.append("")
    return "\n".join(line.rstrip() for line in lines)


def main(config: Config) -> list[dict[str, Any]]:
    given = [config.key] if isinstance(config.key, str) else config.key
    if (config.model is None) != (given is None):
        raise PlanError("model and key belong together: give both, or neither for the newest finetuned run.")
    where, files = newest_run() if config.model is None else (config.model, given or [])
    tokenizer = AutoTokenizer.from_pretrained(where)
    model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.bfloat16 if config.bf16 else torch.float32).eval()
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    tiers: dict[str, gs.PermutationKey | None] = {"C1": None}
    tiers |= {f"C{k + 2}": gs.PermutationKey.load(path) for k, path in enumerate(files)}
    out = []
    for prompt in [config.prompt] if isinstance(config.prompt, str) else config.prompt:
        columns = {}
        for tier, key in tiers.items():
            with key.applied(model) if key is not None else nullcontext():
                columns[tier] = generate(model, tokenizer, prompt, config)
        print(f"\n{prompt} …\n\n{side_by_side(columns, config.width)}")
        out.append({"prompt": prompt, **columns})
    if config.out is not None:
        Path(config.out).write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return out


if __name__ == "__main__":
    import jsonargparse

    with ending_in_a_sentence():
        try:
            main(jsonargparse.auto_cli(Config, as_positional=False))
        except OSError as error:
            sys.exit(f"the model cannot be loaded: {str(error).splitlines()[0]}")
