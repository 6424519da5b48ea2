"""What a recipe of a removal does from its configuration to its report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

from gradsurgery.runs.exploration import write_exploration
from gradsurgery.runs.folder import RunFolder
from gradsurgery.runs.removal import RemovalConfig
from gradsurgery.runs.removal_models import require_models
from gradsurgery.runs.removal_report import write_report
from gradsurgery.runs.removal_run import RemovalData, run_model
from gradsurgery.runs.setup import deciding, digest

Config = TypeVar("Config", bound=RemovalConfig)


def run_name(config: RemovalConfig) -> str:
    """The run's name: as given, or made from the configuration."""
    return config.name or f"seed{config.seed}-undiscovered{config.labels.undiscovered:g}-{digest(deciding(config))}"


def run_removal(config: Config, load: Callable[[Config], RemovalData], title: str) -> None:
    """Load the data, train and probe every model, report; what the run's folder has is not done again."""
    started = time.perf_counter()
    rank = int(os.environ.get("RANK", "0"))
    require_models(config.models, bool(config.protocols.relearn))
    folder = RunFolder(f"{config.out}/{run_name(config)}", deciding(config), config.overwrite, main=rank == 0)
    loaded = load(config)
    if rank == 0 and loaded.explore is not None and not (folder / "data.json").is_file():
        write_exploration(folder.path, loaded.explore(), f"{title}: the corpus", folder.config)
    for name in config.models:
        run_model(name, config, folder, loaded)
    if rank == 0:
        forget = [config.text.forget] if isinstance(config.text.forget, str) else config.text.forget
        roles = {"forget": loaded.roles["forget"], "adjacent": loaded.roles["adjacent"]}
        if roles["forget"] == ["forget"]:  # topics of one role were joined
            roles = {"forget": forget, "adjacent": config.text.adjacent}
        notes = [f"{role}: {', '.join(names)}." for role, names in roles.items() if names]
        notes.append(f"Wall time of the last start: {time.perf_counter() - started:.0f} s.")
        table = write_report(config, folder, loaded, title, notes)
        print(f"\n{table}\n\n{folder.path}/report.html ({time.perf_counter() - started:.0f} s)")
