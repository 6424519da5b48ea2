"""How units are found: trace, couple, group, verify; and a twin's findings carried over to large models."""
