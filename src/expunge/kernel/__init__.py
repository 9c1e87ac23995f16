"""The mathematics: noise paths, denoisers, sampling, training pieces. Imports torch only."""
