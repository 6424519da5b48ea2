"""Parts of `gs.project`: its options, blocks, references, coefficients, and the work on tensors."""
