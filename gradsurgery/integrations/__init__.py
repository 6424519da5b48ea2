"""Hosts that own the training loop, each with its optional package: nothing here is imported by ``gradsurgery``."""
