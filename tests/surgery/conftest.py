"""One thread: these models are tiny, and threads only wait for each other."""

import gc

import torch
import transformers  # noqa: F401

torch.set_num_threads(1)
gc.freeze()  # what is imported by now stays: looking for garbage, as some tests do often, need not visit it
