"""The `emoji` world: a small text-to-image model of emoji, and the recipe that makes it."""
