"""The engine of ``gs.dissect``: gradient coupling, level sets, swap verification, twins."""
