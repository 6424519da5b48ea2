"""References of losses: a snapshot of what trains, adapters switched off, a cache on disk, a second model."""
