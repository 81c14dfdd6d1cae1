"""A package of its own: other projects install one called `tests`, which would be found before a folder without this file."""
