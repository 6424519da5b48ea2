"""Anatomies of tiny models, made once."""

from __future__ import annotations

import functools

import gradsurgery as gs
from tests.zoo.builder import build


@functools.cache
def anatomy_of(name: str) -> gs.Anatomy:
    return gs.dissect(build(name))
