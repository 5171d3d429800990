"""The study: its numbers, the grid of its runs, where they lie, and what follows from them."""
