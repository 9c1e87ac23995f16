"""Shipped worlds: small models that need no download, each with the recipe that made it."""
