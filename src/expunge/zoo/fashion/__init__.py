"""The `fashion` world: ten kinds of clothing in 32x32 gray pixels, drawn by class."""
