"""The page docs/measured/speed.md: what is measured, and which targets are met."""
